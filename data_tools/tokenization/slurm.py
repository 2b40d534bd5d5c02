"""Tokenize with a SLURM job array over shards, and a merge job that depends on it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaphase.utils.files import make_directory
from megaphase.utils.python_command import python_command
from megaphase.utils.slurm import cancel, refuse_large_array, require_sbatch, submit

# Options of sbatch that both jobs would get, and what to do instead.
NOT_FOR_SBATCH = {
    **dict.fromkeys(("array", "ntasks"), "--tasks says how many shards there are"),
    "cpus-per-task": "use --workers",
    **dict.fromkeys(("output", "error", "job-name", "dependency"), "leave it out"),
}
_COMMAND = python_command("megaphase", "data")


@dataclass(frozen=True)
class Submission:
    """The ids of both submitted jobs and the folder of their output."""

    array: str
    merge: str
    logs: Path


@dataclass(frozen=True)
class ArrayOfShards:
    """Writes and submits the two batch scripts.

    Attributes:
        out: prefix of the corpus.
        tasks: number of shards; each is a task of the array.
        tokenize: arguments of `megaphase data tokenize` without --shard.
        merge: arguments of `megaphase data merge` without --shards.
        cores: CPU cores of each task; None: SLURM's default.
        options: options of sbatch for both jobs, such as --partition=cpu.
    """

    out: Path
    tasks: int
    tokenize: Sequence[str]
    merge: Sequence[str]
    cores: int | None = None
    options: Sequence[str] = ()

    @property
    def logs(self) -> Path:
        """The folder for the jobs' output."""
        return self.out.absolute().with_name(f"{self.out.name}.slurm")

    @property
    def array_script(self) -> str:
        """The script that tokenizes shard `$SLURM_ARRAY_TASK_ID`; when restarted, it resumes."""
        command = shlex.join([*_COMMAND, "tokenize", *self.tokenize])
        cores = [] if self.cores is None else [f"--cpus-per-task={self.cores}"]
        lines = self._header("tokenize", "%A_%a", [f"--array=0-{self.tasks - 1}", *cores])
        return f'{lines}exec {command} --shard "$SLURM_ARRAY_TASK_ID/{self.tasks}"\n'

    @property
    def merge_script(self) -> str:
        """The script that merges the shards, verifies them on the way, and removes them."""
        command = shlex.join([*_COMMAND, "merge", "--shards", "--remove", *self.merge])
        return f"{self._header('merge', '%j', [])}exec {command}\n"

    def submit(self) -> Submission:
        """Submit both jobs.

        Raises InputError if there is no sbatch or this cluster's arrays take fewer tasks, and
        RunError if sbatch refuses a job; no job is left in the queue then.
        """
        require_sbatch("--slurm", "run it on a login node, or use --workers")
        refuse_large_array("--tasks", self.tasks, "pass --tasks {most}, or fewer")
        make_directory(self.logs)
        array = submit(self.array_script)
        try:
            after = [f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"]
            merge = submit(self.merge_script, after)
        except BaseException:
            cancel(array)
            raise
        return Submission(array, merge, self.logs)

    def _header(self, what: str, log: str, options: Sequence[str]) -> str:
        own = [f"--job-name={what}-{self.out.name}", "--ntasks=1", "--requeue"]
        output = f"--output={self.logs / f'{what}-{log}.log'}"
        lines = [*own, output, "--open-mode=append", *options, *self.options]
        return "#!/bin/bash\n" + "".join(f"#SBATCH {shlex.quote(line)}\n" for line in lines)
