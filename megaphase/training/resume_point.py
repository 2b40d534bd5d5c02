"""The checkpoint from which a run would resume if it ended now, for the message of its end."""

from __future__ import annotations

from collections.abc import Callable

from megaphase.checkpoint.state import NAME


class ResumePoint:
    """Known on every rank; any thread may ask, as it stays in memory and waits for no disk."""

    def __init__(self, checkpoint: str | None, step: int, tell: Callable[[str], object]) -> None:
        """
        Args:
            checkpoint: the name of the newest one that can be resumed from, None without any.
            step: at which the run starts.
            tell: is given `sentence` now, and whenever it changes.
        """
        self._checkpoint, self._saved, self._step = checkpoint, step, step
        self._tell = tell
        tell(self.sentence())

    def note_step(self, step: int) -> None:
        """Note that so many steps are done."""
        self._step = step

    def note_saved(self, name: str) -> None:
        """Note that a checkpoint was saved; one of weights alone changes nothing."""
        match = NAME.fullmatch(name)
        if match is not None and match[1] == "step":
            self._checkpoint, self._saved = name, int(match[2])
            self._tell(self.sentence())

    def sentence(self) -> str:
        """Return what the same command will do, as a sentence."""
        return resume_sentence(self._checkpoint)

    def loss(self) -> str:
        """The steps that are lost if the run ends now, as a sentence."""
        return loss_sentence(self._checkpoint, self._step - self._saved)


def resume_sentence(checkpoint: str | None) -> str:
    """A sentence that says from where the same command resumes; checkpoint: the newest, or None."""
    if checkpoint is None:
        return "There is no checkpoint yet: the same command starts from the beginning"
    return f"The same command resumes from {checkpoint}"


def loss_sentence(checkpoint: str | None, steps: int) -> str:
    """A sentence about the loss of a run that ended so many steps after its newest checkpoint."""
    number, verb = ("1 step", "is") if steps == 1 else (f"{steps:,} steps", "are")
    if steps <= 0:
        lost = "no step is lost"
    elif checkpoint is None:
        lost = f"{number} {verb} lost, as there is no checkpoint yet"
    else:
        lost = f"{number} since {checkpoint} {verb} lost"
    then = f"resumes from {checkpoint}" if checkpoint else "starts from the beginning"
    return f"{lost}; the same command {then}"
