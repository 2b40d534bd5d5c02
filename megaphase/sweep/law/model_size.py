"""The parameters of a model, from the section `model` of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from megaphase.config.run import RunConfig
from megaphase.model.config import ModelConfig
from megaphase.utils.files import hash_json

ANY_VOCABULARY = 1024


class ModelSizes(NamedTuple):
    """Trainable parameters.

    without_vocabulary: without embeddings and output projection, all that depends on the
        vocabulary. all: None if the run file leaves the vocabulary to the tokenizer.
    """

    without_vocabulary: int
    all: int | None


def model_sizes(model: Mapping[str, Any]) -> ModelSizes:
    """Return the sizes of a model.

    Raises:
        InputError: the section is invalid.
    """
    key = hash_json(dict(model))
    if key not in _known():
        _known()[key] = _count(model)
    return _known()[key]


@cache
def _known() -> dict[str, ModelSizes]:
    return {}


def _count(model: Mapping[str, Any]) -> ModelSizes:
    from megaphase.model.parameters import parameter_count
    from megaphase.model.presets import build_shape

    def count(vocabulary: int) -> int:
        section = ModelConfig.model_validate({**model, "vocab": vocabulary})
        return parameter_count(build_shape(RunConfig.model_construct(model=section), 1))

    vocabulary = model.get("vocab")
    first, second = count(ANY_VOCABULARY), count(2 * ANY_VOCABULARY)
    without = 2 * first - second  # the rest is in proportion to the vocabulary
    return ModelSizes(without, None if vocabulary is None else count(vocabulary))
