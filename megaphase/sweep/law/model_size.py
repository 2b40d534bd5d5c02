"""The size of a model, from the section `model` of a run file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from megaphase.config.run import RunConfig
from megaphase.model.config import ModelConfig

ANY_VOCABULARY = 1024


def parameters_without_vocabulary(model: Mapping[str, Any]) -> int:
    """Return the trainable parameters without embeddings and output projection, which is all that
    does not depend on the vocabulary.

    Raises:
        InputError: the section is invalid.
    """
    return _count(json.dumps(dict(model), sort_keys=True))


@cache
def _count(model: str) -> int:
    from megaphase.model.parameters import parameter_count
    from megaphase.model.presets import build_shape

    def count(vocabulary: int) -> int:
        section = ModelConfig.model_validate({**json.loads(model), "vocab": vocabulary})
        return parameter_count(build_shape(RunConfig.model_construct(model=section), 1))

    # What depends on the vocabulary is in proportion to it.
    return 2 * count(ANY_VOCABULARY) - count(2 * ANY_VOCABULARY)
