"""One tokenization as a SLURM job array over shards, and the merge that waits for it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megaphase.utils.files import make_directory
from megaphase.utils.slurm import cancel, require_sbatch, submit

_COMMAND = (sys.executable, "-m", "megaphase", "data")


@dataclass(frozen=True)
class Submission:
    """What was submitted: the ids of both jobs and where their output goes."""

    array: str
    merge: str
    logs: Path


@dataclass(frozen=True)
class ArrayOfShards:
    """The two batch scripts.

    Attributes:
        out: prefix of the corpus.
        tasks: how many shards, each a task of the array.
        tokenize: arguments of `megaphase data tokenize` but --shard.
        merge: arguments of `megaphase data merge` but --shards.
        cores: of each task; as many as SLURM gives where it is None.
        options: of sbatch, for both jobs, such as --partition=cpu.
    """

    out: Path
    tasks: int
    tokenize: Sequence[str]
    merge: Sequence[str]
    cores: int | None = None
    options: Sequence[str] = ()

    @property
    def logs(self) -> Path:
        """The folder of the jobs' output."""
        return self.out.absolute().with_name(f"{self.out.name}.slurm")

    @property
    def array_script(self) -> str:
        """Tokenizes shard `$SLURM_ARRAY_TASK_ID`; started again, it goes on where it was."""
        command = shlex.join([*_COMMAND, "tokenize", *self.tokenize])
        cores = [] if self.cores is None else [f"--cpus-per-task={self.cores}"]
        lines = self._header("tokenize", "%A_%a", [f"--array=0-{self.tasks - 1}", *cores])
        return f'{lines}exec {command} --shard "$SLURM_ARRAY_TASK_ID/{self.tasks}"\n'

    @property
    def merge_script(self) -> str:
        """Joins the shards, checks them on the way, and removes them."""
        command = shlex.join([*_COMMAND, "merge", "--shards", "--remove", *self.merge])
        return f"{self._header('merge', '%j', [])}exec {command}\n"

    def submit(self) -> Submission:
        """Hand both to sbatch.

        Raises InputError where there is no sbatch; RunError where it refuses, and then nothing is
        left in the queue.
        """
        require_sbatch("--slurm", "run it on a login node, or use --workers")
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
