"""Rotary positions in config.json.

Version 4 of transformers has rope_theta and rope_scaling, version 5 rope_parameters.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from megaphase.convert.hugging_face.config_file import ConfigFile, is_positive
from megaphase.convert.hugging_face.config_keys import FULL, SLIDING
from megaphase.model.config import RotaryConfig, RotaryScalingConfig
from megaphase.model.shape import GPTShape

_LENGTH = "original_max_position_embeddings"
# The keys of each type of scaling in config.json, with the names of the options that they set.
_KEYS: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        _LENGTH: "original_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        _LENGTH: "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
_EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_REMEDY = "copy the model again, or use another one"


@dataclass(frozen=True)
class Rope:
    """The keys of rotary positions, under the name rope_parameters.

    Attributes:
        default_base: the base in transformers without a key.
        default: the dictionary in transformers without any.
        base_key: the key of the base in version 4.
        part_key: there the key of the part of each head that is rotated; None: always all of it.
        default_part: that part without a key.
    """

    default_base: float = 10_000.0
    default: Mapping[str, Any] = field(default_factory=dict)
    base_key: str = "rope_theta"
    part_key: str | None = None
    default_part: float = 1.0

    @property
    def fields(self) -> tuple[str, ...]:
        return ("rotary_base", "rotary_scaling", *(("rotary_dim",) if self.part_key else ()))

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        base, part = config.number(self.base_key, self.default_base), self.default_part
        if self.part_key is not None:
            part = config.number(self.part_key, part)
        length = config.get(_LENGTH)
        found: RotaryScalingConfig | None = None
        # As in transformers, the older key counts where both are there.
        given = {key: config.get(key) for key in (name, "rope_scaling")}
        if not any(given.values()):
            given[name] = dict(self.default)
        for key, rope in given.items():
            if not rope:
                continue
            config.refuse_if(key, not isinstance(rope, dict))
            base, part = (
                _number(key, rope, inner, config, before)
                for inner, before in (("rope_theta", base), ("partial_rotary_factor", part))
            )
            config.refuse_if(key, part != self.default_part and self.part_key is None)
            found = _scaling(key, rope, config, length)
        # Beside the keys that count there may be others, which must say the same.
        for key, value in (("rope_theta", base), ("partial_rotary_factor", part)):
            if key != self.base_key:
                config.refuse_if(key, config.get(key) not in (None, value))
        options = {"rotary_base": base, "rotary_scaling": found}
        return options | ({} if self.part_key is None else {"rotary_dim": _width(part, config)})

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        dictionary = _dictionary(shape.rotary)
        written: dict[str, Any] = {
            self.base_key: shape.rotary_base,
            "rope_scaling": _older(dictionary),
            name: dictionary,
        }
        if self.part_key is not None:
            written[self.part_key] = part = _part(shape)
            written[name]["partial_rotary_factor"] = part
        return written


def _number(key: str, rope: dict[str, Any], inner: str, config: ConfigFile, before: float) -> float:
    """A positive number of a dictionary; as before where it has none."""
    value = rope.get(inner)
    if value is None:
        return before
    config.refuse_if(key, not is_positive(value))
    return float(value)


def _width(part: float, config: ConfigFile) -> int:
    """How many dimensions of a head are rotated."""
    head = config.size("hidden_size") // config.size("num_attention_heads")
    width = int(head * part)
    if part > 1 or width < 2 or width % 2:
        problem = (
            f"is {part}, and of a head's {head} dimensions (hidden_size / num_attention_heads) "
            f"{width} cannot be rotated in pairs"
        )
        raise config.refusal("partial_rotary_factor", problem)
    return width


def _part(shape: GPTShape) -> float:
    """The part of a head that is rotated, of which transformers rounds the width down."""
    part = shape.rotary_size / shape.head_size
    if int(shape.head_size * part) < shape.rotary_size:
        part = math.nextafter(part, 1.0)
    return part


@dataclass(frozen=True)
class RopeOfKinds:
    """The keys of rotary positions of layers with and without a sliding window, under the name
    rope_parameters.

    Attributes:
        full_base, sliding_base: the bases in transformers without a key.
        older_base: the key of the sliding layers' base in version 4 of transformers; None: there it
            was that of all layers.
    """

    full_base: float
    sliding_base: float
    older_base: str | None = None
    fields: tuple[str, ...] = ("rotary_base", "rotary_scaling", "sliding_rotary")

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        given, older = config.get(name) or {}, config.get("rope_scaling") or {}
        config.refuse_if("rope_scaling", not isinstance(older, dict))
        kinds = (FULL, SLIDING)
        config.refuse_if(name, not isinstance(given, dict) or not {*given} <= {*kinds})
        dictionaries = [given.get(kind) or {} for kind in kinds]
        config.refuse_if(name, not all(isinstance(each, dict) for each in dictionaries))
        part = config.get("partial_rotary_factor")
        config.refuse_if("partial_rotary_factor", part not in (None, 1))
        full, sliding = dictionaries[0] | older, dictionaries[1]
        base = config.number("rope_theta", self.full_base)
        sliding_base = self.sliding_base
        if self.older_base is not None:
            sliding_base = config.number(self.older_base, self.sliding_base)
        elif sliding.get("rope_theta") is None:
            # Version 4 has this base in all layers, version 5 its default in the sliding ones.
            config.refuse_if("rope_theta", base != sliding_base)
        return {
            "rotary_base": _base(name, full, config, base),
            "rotary_scaling": _scaling(name, full, config, None),
            "sliding_rotary": RotaryConfig(
                base=_base(name, sliding, config, sliding_base),
                scaling=_scaling(name, sliding, config, None),
            ),
        }

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        full, sliding = _dictionary(shape.rotary), _dictionary(shape.sliding_rotary or shape.rotary)
        written = {"rope_theta": shape.rotary_base, "rope_scaling": _older(full)}
        if self.older_base is not None:
            written[self.older_base] = sliding["rope_theta"]
        return written | {name: {FULL: full, SLIDING: sliding}}


def _dictionary(rotary: RotaryConfig) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_type": "default"}
    if rotary.scaling is not None:
        kind = rotary.scaling.type
        values = {key: getattr(rotary.scaling, own) for key, own in _KEYS[kind].items()}
        written = {"rope_type": kind} | values
    return written | {"rope_theta": rotary.base}


def _older(written: dict[str, Any]) -> dict[str, Any] | None:
    """The same as version 4 of transformers has it."""
    if written["rope_type"] == "default":
        return None
    return {key: value for key, value in written.items() if key != "rope_theta"}


def _base(key: str, rope: dict[str, Any], config: ConfigFile, default: float) -> float:
    """The base in a dictionary of config.json."""
    config.refuse_if(key, rope.get("partial_rotary_factor") not in (None, 1))
    return _number(key, rope, "rope_theta", config, default)


def _scaling(
    key: str, rope: dict[str, Any], config: ConfigFile, length: Any
) -> RotaryScalingConfig | None:
    """The scaling in a dictionary of config.json; None for the type `default`.

    length: original_max_position_embeddings beside the dictionary, which transformers prefers.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    config.refuse_if(key, not isinstance(kind, str))
    numbers = [each for each in rope.values() if isinstance(each, int | float)]
    config.refuse_if(key, not all(abs(each) <= sys.float_info.max for each in numbers))
    given = {k: v for k, v in rope.items() if v is not None and k not in _EVERYWHERE}
    if kind == "default":
        config.refuse_if(key, bool(given))
        return None
    if kind not in _KEYS:
        supported = f"megaphase has {', '.join(('default', *_KEYS))}"
        raise config.refusal(key, f"is {json.dumps(rope)}", f"{supported}; use another model")
    if kind == "yarn":
        given = _with_attention_factor(key, given, config)
    if _LENGTH in _KEYS[kind]:
        given[_LENGTH] = length or given.get(_LENGTH) or config.size("max_position_embeddings")
    else:
        given.pop(_LENGTH, None)  # transformers reads it for no such type
    for each in given:
        if each not in _KEYS[kind]:
            problem = f"is {json.dumps(rope)}, and {kind} has no {each} that megaphase knows"
            raise config.refusal(key, problem)
    named = {_KEYS[kind][key]: value for key, value in given.items()}
    values = {
        k: float(v) if type(v) is int and k != "original_seq_len" else v for k, v in named.items()
    }
    try:
        return RotaryScalingConfig.model_validate({"type": kind} | values)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise config.refusal(key, f"is {json.dumps(rope)}: {reason}", _REMEDY) from None


def _with_attention_factor(key: str, given: dict[str, Any], config: ConfigFile) -> dict[str, Any]:
    """YaRN's keys with the attention factor that transformers infers from others."""
    given = dict(given)
    scale, all_dim = given.pop("mscale", 0), given.pop("mscale_all_dim", 0)
    factor: Any = given.get("factor")
    numbers = all(isinstance(each, int | float) for each in (scale, all_dim, factor))
    config.refuse_if(key, not numbers or factor < 1)
    if scale and all_dim and "attention_factor" not in given:
        logarithm = 0.1 * math.log(factor)
        given["attention_factor"] = (scale * logarithm + 1.0) / (all_dim * logarithm + 1.0)
    return given
