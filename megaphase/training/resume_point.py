"""From where a run would resume if it ended now: said when it does."""

from __future__ import annotations

from collections.abc import Callable

from megaphase.checkpoint.state import NAME


class ResumePoint:
    """Known on every rank; any thread may ask, as it stays in memory and waits for no disk."""

    def __init__(self, checkpoint: str | None, step: int, tell: Callable[[str], object]) -> None:
        """
        Args:
            checkpoint: the name of the newest one that can be resumed from, None without any.
            step: the one at which the run begins.
            tell: is given `sentence` now, and whenever it changes.
        """
        self._checkpoint, self._saved, self._step = checkpoint, step, step
        self._tell = tell
        tell(self.sentence())

    def note_step(self, step: int) -> None:
        """So many steps are done."""
        self._step = step

    def note_saved(self, name: str) -> None:
        """A checkpoint has appeared; one of weights alone changes nothing."""
        match = NAME.fullmatch(name)
        if match is not None and match[1] == "step":
            self._checkpoint, self._saved = name, int(match[2])
            self._tell(self.sentence())

    def sentence(self) -> str:
        """What the same command does next."""
        return resume_sentence(self._checkpoint)

    def loss(self) -> str:
        """What is lost if the run ends at once."""
        return loss_sentence(self._checkpoint, self._step - self._saved)


def resume_sentence(checkpoint: str | None) -> str:
    """What the same command does after a fault; checkpoint: the newest one, None without any."""
    if checkpoint is None:
        return "There is no checkpoint yet: the same command starts from the beginning"
    return f"The same command resumes from {checkpoint}"


def loss_sentence(checkpoint: str | None, steps: int) -> str:
    """What a run has lost that ended at once, so many steps after its newest checkpoint."""
    number, verb = ("1 step", "is") if steps == 1 else (f"{steps:,} steps", "are")
    if steps <= 0:
        lost = "no step is lost"
    elif checkpoint is None:
        lost = f"{number} {verb} lost, as there is no checkpoint yet"
    else:
        lost = f"{number} since {checkpoint} {verb} lost"
    then = f"resumes from {checkpoint}" if checkpoint else "starts from the beginning"
    return f"{lost}; the same command {then}"
