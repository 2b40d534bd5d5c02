"""Changes of a sweep file after runs had ended are recorded, once each."""

import json

import pytest
from sweep_support import record_of, sweep_of

from megaphase.sweep.changes import differences, read_changes, refuse_other_measurements
from megaphase.sweep.directory import SweepDirectory
from megaphase.sweep.outcome import Outcome
from megaphase.utils.errors import InputError

ARMS = {"static": {"rates": [0.1, 0.5]}, "two-phase": {"rates": [0.25], "pretrain": [0.8]}}
MORE = {"static": {"rates": [0.1, 0.2]}, "keep": {"rates": [0.25], "pretrain": [0.8]}}


def prepare(folder, arms=ARMS, **more):
    directory = SweepDirectory(folder)
    directory.prepare(sweep_of(folder, arms, **more))
    return directory


def end_runs(directory, *names):
    for name in names:
        directory.write_outcome(name, Outcome(failed="out of memory"))


def told(folder):
    return [(change.ended, change.differences) for change in read_changes(folder).changes]


def test_a_change_after_runs_have_ended_is_recorded_once(tmp_path):
    folder = tmp_path / "sweep"
    directory = prepare(folder)
    prepare(folder, ARMS, seeds=[1, 2])  # nobody has seen a result yet
    assert read_changes(folder).sentence == (
        "The sweep file has not been changed since the first run ended."
    )
    end_runs(directory, "a", "b")
    for _ in range(2):
        prepare(
            folder, MORE, seeds=[1, 2, 3], steps=60, primary={"arm": "keep", "against": "static"}
        )
    expected = [
        "seeds: added 3",
        "arms.static.rates: added 0.2",
        "arms.static.rates: removed 0.5",
        "arms.two-phase: removed",
        "arms.keep: added",
        "primary: added",
    ]
    assert told(folder) == [(2, expected)]
    end_runs(directory, "c")
    prepare(folder, MORE, seeds=[1, 2], primary={"arm": "keep", "against": "static"})
    assert told(folder)[1:] == [(3, ["seeds: removed 3"])]
    assert read_changes(folder).sentence == (
        "The sweep file was changed 2 times after runs had ended."
    )


def test_a_change_is_recorded_once_if_the_sweep_was_not_written_after_it(tmp_path):
    folder = tmp_path / "sweep"
    directory = prepare(folder)
    end_runs(directory, "a")
    before = directory.sweep_file.read_text()
    prepare(folder, MORE)
    directory.sweep_file.write_text(before)  # as if it had been killed between the two
    prepare(folder, MORE)
    assert len(told(folder)) == 1


def test_what_determines_no_run_is_no_change(tmp_path):
    folder = tmp_path / "sweep"
    end_runs(prepare(folder), "a")
    prepare(folder, keep_checkpoints="first-stages", slurm={"nodes": 2})
    assert told(folder) == []


@pytest.mark.parametrize("is_removed_between", [False, True])
def test_a_measurement_is_the_same_for_all_runs(tmp_path, is_removed_between):
    folder = tmp_path / "sweep"
    directory = prepare(folder, training_loss={"samples": 100})
    if is_removed_between:
        prepare(folder)
        prepare(folder)

    def refuse(samples, outcome):
        sweep = sweep_of(folder, ARMS, training_loss=samples and {"samples": samples})
        refuse_other_measurements(folder, directory.sweep_file, sweep, [outcome])

    measured = Outcome(losses={"hi": 3.0}, training={"hi": 3.0})
    refuse(200, Outcome(losses={"hi": 3.0}))
    refuse(100, measured)
    refuse(None, measured)
    with pytest.raises(InputError) as caught:
        refuse(200, measured)
    assert str(caught.value).endswith(
        ": training_loss.samples: changed 100 to 200, after runs had been measured; "
        "put it back, or choose another output"
    )


def test_before_it_has_been_used_a_measurement_may_be_changed(tmp_path):
    folder = tmp_path / "sweep"
    directory = prepare(folder, training_loss={"samples": 100})
    prepare(folder, training_loss={"samples": 200})
    measured = Outcome(losses={"hi": 3.0}, training={"hi": 3.0})
    sweep = sweep_of(folder, ARMS, training_loss={"samples": 200})
    refuse_other_measurements(folder, directory.sweep_file, sweep, [measured])


def test_the_directory_of_an_earlier_version(tmp_path):
    folder = tmp_path / "sweep"
    directory = prepare(folder)
    (folder / "changes.json").unlink()
    end_runs(directory, "a")
    assert read_changes(folder).sentence == ("Earlier changes of the sweep file were not recorded.")
    prepare(folder, MORE)
    assert read_changes(folder).sentence == (
        "The sweep file was changed once after runs had ended; earlier changes of the sweep file "
        "were not recorded."
    )


def test_a_damaged_sweep_cannot_be_compared_with(tmp_path):
    folder = tmp_path / "sweep"
    directory = prepare(folder)
    end_runs(directory, "a")
    directory.sweep_file.write_text("{}")
    prepare(folder, MORE)
    assert (told(folder), read_changes(folder).is_whole) == ([], False)


def test_an_altered_record_is_refused(tmp_path):
    folder = tmp_path / "sweep"
    prepare(folder)
    path = folder / "changes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"changes": [], "is_whole": False}))
    with pytest.raises(InputError, match=r"changes\.json: has been altered"):
        read_changes(folder)


def test_differences_of_other_values():
    before = {"tokens": 100, "phases": [{"share": 0.1}], "settings": {"model.dropout": 0.1}}
    before["betas"] = {"try": [[0.9, 0.95]]}
    after = {"tokens": 200, "phases": [{"share": 0.2}], "settings": {}}
    after["betas"] = {"try": [[0.9, 0.95], [0.9, 0.99]]}
    assert list(differences(before, after)) == [
        "tokens: changed 100 to 200",
        "phases[0].share: changed 0.1 to 0.2",
        "settings.model.dropout: removed",
        "betas.try: added [0.9, 0.99]",
    ]


def test_each_change_of_a_phase_is_recorded(tmp_path):
    folder, changed = tmp_path / "sweep", []
    for rates in ([0.2], [0.2, 0.3], [0.2, 0.3, 0.4]):
        phases = [{"share": 0.6, "rate": 0}, {"rate": rates}]
        directory = prepare(folder, {"a": {"phases": phases}})
        end_runs(directory, "first")
        changed += [] if len(rates) == 1 else [f"arms.a.phases[1].rate: added {rates[-1]}"]
    prepare(
        folder,
        {"a": {"phases": [{"share": 0.6, "rate": 0}, {"share": 0.2, "rate": 0.1}, {"rate": 0.4}]}},
    )
    assert told(folder)[:2] == [(1, [line]) for line in changed]
    assert "arms.a.phases[2]: added" in told(folder)[2][1]


def test_records_without_files_have_no_changes():
    assert read_changes(record_of(ARMS, lambda _: (4.0, 6.0)).directory.path).changes == []
