"""Jobs retry Slurm commands that the controller does not answer; scripts replace the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaphase.launch.slurm.job_file import JOB_FILE, refuse_second_job, remember_job
from megaphase.utils import slurm
from megaphase.utils.errors import InputError, RunError

TIMED_OUT = "slurm_load_jobs error: Socket timed out on send/recv operation"
NOT_REACHED = "sbatch: error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file to which every call of a command of Slurm adds a line."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(slurm, "RETRY_EVERY_SECONDS", 0.01)
    return tmp_path / "calls"


def answers(calls: Path, command: str, said: str, *, until: int, then: str = "") -> None:
    """Let a command fail with what it says, until its call of this number, counted from 1."""
    script = calls.parent / command
    script.write_text(
        f"#!/bin/bash\necho {command} >> {calls}\n"
        f'(($(wc -l < {calls}) < {until})) && echo "{said}" >&2 && exit 1\necho "{then}"\n'
    )
    script.chmod(0o755)


def test_a_job_asks_again_until_it_is_answered(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    answers(calls, "squeue", TIMED_OUT, until=3, then="17")
    assert slurm.queued_jobs({"17", "18"}) == {"17"}
    calls.unlink()
    answers(calls, "scontrol", TIMED_OUT, until=3)
    assert slurm.control("requeue", "7") is None
    assert len(calls.read_text().split()) == 3
    calls.unlink()
    answers(calls, "sbatch", NOT_REACHED, until=3, then="19")
    assert slurm.submit("#!/bin/bash\n") == "19"


def test_what_is_refused_is_not_asked_again(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    answers(calls, "scontrol", "Requested operation not supported on this system", until=9)
    assert slurm.control("requeue", "7") == "Requested operation not supported on this system"
    # It may have been submitted.
    answers(calls, "sbatch", TIMED_OUT, until=9)
    with pytest.raises(RunError, match="Socket timed out"):
        slurm.submit("#!/bin/bash\n")
    assert calls.read_text().split() == ["scontrol", "sbatch"]


def test_outside_of_jobs_and_after_some_minutes_the_error_is_told(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(calls, "squeue", TIMED_OUT, until=9)
    with pytest.raises(RunError, match="Socket timed out"):
        slurm.queued_jobs({"17"})
    assert calls.read_text().split() == ["squeue"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "RETRY_SECONDS", 0.0)
    with pytest.raises(RunError, match="Socket timed out"):
        slurm.queued_jobs({"17"})


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("48151", "48151"),
        ("48151;cluster-4", "48151"),
        ("* 2026: maintenance on Monday *\n12 nodes are down\n48151", "48151"),
        ("48151\nsbatch: charged to mine", "48151"),
    ],
)
def test_the_id_is_found_among_the_lines_of_a_sites_wrapper(
    calls: Path, printed: str, job: str
) -> None:
    answers(calls, "sbatch", "", until=1, then=printed)
    assert slurm.submit("#!/bin/bash\n") == job


def test_what_is_no_id_is_not_taken_for_one(calls: Path) -> None:
    answers(calls, "sbatch", "", until=1, then="queued")
    with pytest.raises(RunError, match="sbatch did not print the job's id, but: queued; see"):
        slurm.submit("#!/bin/bash\n")


def test_options_of_the_script_are_arguments_too(calls: Path) -> None:
    """Variables such as SBATCH_ACCOUNT take the place of the script's options."""
    (calls.parent / "sbatch").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {calls}\ncat > {calls}.script\necho 7\n'
    )
    (calls.parent / "sbatch").chmod(0o755)
    script = "#!/bin/bash\n#SBATCH --account=mine\n#SBATCH '--output=a b/%j.log'\necho\n"
    assert slurm.submit(script, ["--dependency=afterok:6"]) == "7"
    arguments = ["--parsable", "--account=mine", "--output=a b/%j.log", "--dependency=afterok:6"]
    assert calls.read_text().splitlines() == arguments
    assert Path(f"{calls}.script").read_text() == script


def test_all_commands_of_slurm_ask_the_same_cluster(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (calls.parent / "sbatch").write_text(f'#!/bin/bash\necho "$SLURM_CLUSTERS" > {calls}\necho 7\n')
    (calls.parent / "sbatch").chmod(0o755)
    monkeypatch.setenv("SLURM_CLUSTERS", "large")
    slurm.submit("#!/bin/bash\n")
    assert calls.read_text() == "large\n"
    with pytest.raises(InputError, match="--clusters is not allowed there; set SLURM_CLUSTERS"):
        slurm.sbatch_options("--clusters=large", {})
    monkeypatch.setenv("SBATCH_CLUSTERS", "large")
    with pytest.raises(InputError, match="SBATCH_CLUSTERS: only sbatch follows it; unset it"):
        slurm.submit("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
    ],
)
def test_the_job_of_this_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], job: str | None
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm.own_job() == job


@pytest.mark.parametrize(
    ("configuration", "most"),
    [
        ("MailProg = /bin/mail\nMaxArraySize            = 1001\nMaxBatchRequeue = 5", 1001),
        ("MaxArraySize = 100001\nSchedulerParameters = defer,max_array_tasks=500,x=1", 500),
        ("MaxArraySize = 0", 0),
        ("", None),
    ],
)
def test_the_size_of_arrays(calls: Path, configuration: str, most: int | None) -> None:
    answers(calls, "scontrol", TIMED_OUT, until=1, then=configuration)
    assert slurm.max_array_size() == most


def test_no_array_is_too_large_where_the_limit_is_not_known(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(calls, "scontrol", TIMED_OUT, until=9)
    slurm.refuse_large_array("--tasks", 5000, "pass --tasks {most}")
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.max_array_size() is None
    slurm.refuse_large_array("--tasks", 5000, "pass --tasks {most}")


def test_a_job_of_which_nothing_is_known_may_be_in_the_queue(calls: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    refuse_second_job(run_dir)
    record = remember_job(run_dir, "17", tmp_path / "17.log")
    answers(calls, "scontrol", TIMED_OUT, until=2, then="JobId=17 JobState=COMPLETED")
    with pytest.raises(RunError) as caught:
        refuse_second_job(run_dir)
    assert str(caught.value) == (
        f"{run_dir}: Slurm does not answer ({TIMED_OUT}), so job {record.job} of this run may be "
        f"in the queue; try again, or, if it has ended, remove {run_dir / 'slurm' / JOB_FILE}"
    )
    refuse_second_job(run_dir)
