"""The `tasks` section of a run file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from megaphase.config.fields import (
    Count,
    FilePath,
    FractionAbove0,
    PositiveOrZero,
    ProperFraction,
    Section,
    Word,
)


class TaskConfig(Section):
    """A task is one training distribution: a language, a translation pair, or conversations."""

    corpus: FilePath | None = None
    """Prefix of the corpus: `data/en` for `data/en.bin`, `data/en.idx` …; required, except
    where `tokens` is given in its place."""
    tokens: Count | None = None
    """Tokens of a text that does not exist yet, for planning alone: `megaphase plan` then shows
    tokens, rates, epochs, memory and time, and training refuses the run file. Where there is no
    tokenizer either, `model.vocab` gives its size."""
    kind: Literal["lm", "translation", "chat"] = "lm"
    """`lm`: the corpus holds texts, and the loss is taken on every token. `translation`: it holds
    pairs of a source and a target, several of which fill a sample, and the loss is taken on the
    targets alone. `chat`: it holds conversations, packed likewise, and the loss is taken on the
    assistant's turns alone. The corpus must be of this kind."""
    attend_across_documents: bool | None = None
    """Whether tokens attend to the other documents of their sample; if left out, `true` for `lm`
    and `false` otherwise. With `false` every document gets the attention and the loss that
    it would get alone in a row: positions count from its start, and its first token is no
    target."""
    held_out: ProperFraction | None = None
    """Fraction of the task's documents that is held out of training; `validation.fraction` if left
    out."""
    test: ProperFraction | None = None
    """Fraction of the task's documents in the test split; `test.fraction` if left out."""
    subsample: FractionAbove0 | None = None
    """Fraction of the documents neither held out nor in the test split that is trained on; all of
    them if left out. It makes a task smaller without another corpus: the held-out documents stay
    the same, and a smaller subsample is part of a larger one."""
    role: Word | None = None
    """Any word, such as `high` or `low`, by which `mixture.over`, `monitor.tasks` and
    `overfit.tasks` can name several tasks."""

    loss_weight: PositiveOrZero = 1.0
    """Weight of the task's losses in training, in place of or beside its sampling rate. The loss of
    a step is the sum over its tokens of weight times loss, divided by the sum of their weights, so
    only the ratios of the tasks' weights matter. A task with weight 0 is sampled and measured, and
    trains nothing; a weight above 0 must be at least 10⁻⁶ of the largest of a task that the same
    phase samples. Losses are reported and validated without weights."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if (self.corpus is None) == (self.tokens is None):
            raise ValueError(
                "corpus is missing; add it, or tokens to plan before there is text"
                if self.corpus is None
                else "give either corpus or tokens"
            )
        return self

    @property
    def attends_across_documents(self) -> bool:
        """`attend_across_documents`, or what the kind of task has where it is left out."""
        if self.attend_across_documents is None:
            return self.kind == "lm"
        return self.attend_across_documents

    @property
    def trained_on(self) -> float:
        """The fraction of the documents that are not held out which is trained on."""
        return 1.0 if self.subsample is None else self.subsample
