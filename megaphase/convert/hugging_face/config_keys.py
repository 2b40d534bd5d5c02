"""The keys of config.json, as the table of a family describes them: each is read from a file and
written for a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megaphase.convert.hugging_face.config_file import ConfigFile
from megaphase.model.shape import GPTShape


class Key(Protocol):
    """A key of config.json, or several that belong together.

    Attributes:
        fields: the options of GPTShape that it determines.
    """

    @property
    def fields(self) -> tuple[str, ...]: ...

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        """Return options of GPTShape.

        Raises:
            InputError: the value is none that megaphase's model can have.
        """
        ...

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        """Return keys of config.json."""
        ...


# Of options that are None where they follow from others: the property of GPTShape.
_WRITTEN_OUT = {"head_dim": "head_size", "ffn_bias": "has_ffn_bias"}


@dataclass(frozen=True)
class Option:
    """A key that holds an option of GPTShape.

    Attributes:
        field: the option.
        default: the value in transformers without the key, or a function of the file that returns
            it; None: the key is required.
        optional: the option is None without the key.
    """

    field: str
    kind: Literal["size", "number", "flag"] = "size"
    default: Any = None
    optional: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        if self.optional and config.get(name) is None:
            return {}
        default = self.default(config) if callable(self.default) else self.default
        reader: Callable[[str, Any], Any] = getattr(config, self.kind)
        return {self.field: reader(name, default)}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        value = getattr(shape, _WRITTEN_OUT.get(self.field, self.field))
        return {name: bool(value) if self.kind == "flag" else value}


@dataclass(frozen=True)
class NumberOrNone:
    """A key that holds a number, or null where the model has no such option.

    Attributes:
        default: the value in transformers without the key.
    """

    field: str
    default: float | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        found = config.get(name, self.default)
        return {self.field: None if found is None else config.number(name, found)}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        return {name: getattr(shape, self.field)}


@dataclass(frozen=True)
class QueryScalar:
    """A whole number; scores are divided by its square root."""

    default: int = 256
    fields: tuple[str, ...] = ("attention_scale",)

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        return {"attention_scale": config.size(name, self.default) ** -0.5}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        scale = shape.attention_scale
        return {name: shape.head_size if scale is None else max(round(scale**-2), 1)}


@dataclass(frozen=True)
class Fixed:
    """A key that must have one of a few values, of which the first is written.

    Attributes:
        default: the value in transformers without the key.
        written: whether the key is; not one of published files that transformers does not have.
    """

    allowed: tuple[Any, ...]
    default: Any
    written: bool = True
    fields: tuple[str, ...] = ()

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        # As in transformers, null is the value None where a key may be None.
        found = config.get(name, self.default)
        if found is None and None not in self.allowed:
            found = self.default
        config.refuse_if(
            name,
            not any(found is a or (found == a and type(found) is type(a)) for a in self.allowed),
        )
        return {}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        return {name: self.allowed[0]} if self.written else {}


def unread(value: Any) -> Fixed:
    """A key of published files that transformers ignores; only the value that is true of the
    model is accepted.
    """
    return Fixed((value,), value, written=False)


@dataclass(frozen=True)
class NoRopeLayers:
    """A list with 0 for the layers without rotary positions, or without a list their interval."""

    fields: tuple[str, ...] = ("no_rotary_interval",)

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        layers, found = config.size("num_hidden_layers"), config.get(name)
        interval = config.size("no_rope_layer_interval", 4)
        if found is not None:
            config.refuse_if(name, type(found) is not list or len(found) < layers)
            interval = found.index(0) + 1 if 0 in found else layers + 1
            wanted = [int((layer + 1) % interval != 0) for layer in range(layers)]
            config.refuse_if(name, found[:layers] != wanted)
        return {"no_rotary_interval": interval}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        interval = shape.no_rotary_interval or shape.layers + 1
        layers = [int(shape.has_rotary(block)) for block in range(shape.layers)]
        return {name: layers, "no_rope_layer_interval": interval}


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Window:
    """The size of a sliding window in tokens, and which layers have it.

    Attributes:
        slides: whether a layer, counted from 0, has it in a file without layer_types; None: all
            have it, and there is no such key.
        switched: whether use_sliding_window must be true.
        default: the size in transformers without the key.
    """

    slides: Callable[[ConfigFile, int], bool] | None = None
    switched: bool = False
    default: int | None = 4096
    fields: tuple[str, ...] = ("sliding_window", "attention_pattern")

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        window = config.get(name, self.default)
        config.refuse_if(name, window is not None and (type(window) is not int or window < 1))
        if self.slides is None:
            return {"sliding_window": window}
        layers, types = config.size("num_hidden_layers"), config.get("layer_types")
        used = window is not None
        if self.switched:
            used = config.flag("use_sliding_window", False) and used
        sliding = [self.slides(config, layer) for layer in range(layers)]
        if types is not None:
            known = type(types) is list and len(types) == layers and {*types} <= {SLIDING, FULL}
            config.refuse_if("layer_types", not known)
            sliding = [each == SLIDING for each in types]
            config.refuse_if("layer_types" if self.switched else name, any(sliding) and not used)
        elif self.switched:
            sliding = [each and used for each in sliding]
        config.refuse_if(name, any(sliding) and not used)
        if not any(sliding):
            return {}
        pattern = ["sliding" if each else "full" for each in sliding]
        return {"sliding_window": window, "attention_pattern": pattern}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        written: dict[str, Any] = {name: shape.sliding_window}
        if self.slides is not None:
            layers = range(shape.layers)
            written["layer_types"] = [SLIDING if shape.slides(i) else FULL for i in layers]
        if self.switched:
            written["use_sliding_window"] = shape.sliding_window is not None
        return written
