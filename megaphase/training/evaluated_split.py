"""The splits of the documents that `megaphase evaluate` measures."""

from __future__ import annotations

from enum import StrEnum


class EvaluatedSplit(StrEnum):
    """TRAINING: a sample of the documents that are trained on."""

    VALIDATION = "validation"
    TEST = "test"
    TRAINING = "training"
