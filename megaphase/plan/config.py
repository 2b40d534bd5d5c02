"""The `tasks` and `batch` sections of a run file."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megaphase.config.fields import Count, FilePath, FractionAbove0, ProperFraction, Section, Word


class TaskConfig(Section):
    """One training distribution: what it teaches and where its corpus lies (PREFIX of .bin/.idx).

    kind: texts of a language, or pairs for translation.
    attend_across_documents: whether the documents of a sample see each other; by default those of
    an lm task do, translation pairs do not.
    held_out: fraction of its documents that is held out; by default `validation.fraction`.
    subsample: fraction of the others that is trained on; by default all.
    role is any word, such as `high` or `low`, by which a mixture's `over` can name several tasks.
    """

    corpus: FilePath
    kind: Literal["lm", "translation"] = "lm"
    attend_across_documents: bool | None = None
    held_out: ProperFraction | None = None
    subsample: FractionAbove0 | None = None
    role: Word | None = None

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


class BatchConfig(Section):
    """samples: global batch of an optimizer step; micro: samples of one forward pass per rank."""

    samples: Annotated[Count, Field(le=1 << 24)]
    micro: Annotated[Count, Field(le=1 << 16)] = 1

    @model_validator(mode="after")
    def _micro_divides(self) -> Self:
        if self.samples % self.micro:
            raise ValueError(f"micro ({self.micro}) does not divide samples ({self.samples})")
        return self
