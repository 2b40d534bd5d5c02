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
        return {name: shape.head_size if self.field == "head_dim" else getattr(shape, self.field)}


@dataclass(frozen=True)
class Fixed:
    """A key that must have one of a few values, of which the first is written.

    Attributes:
        default: the value in transformers without the key.
    """

    allowed: tuple[Any, ...]
    default: Any
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
        return {name: self.allowed[0]}


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


@dataclass(frozen=True)
class OnEveryLayer:
    """A list with the same value for all layers, or no list."""

    value: str
    fields: tuple[str, ...] = ()

    def read(self, name: str, config: ConfigFile) -> dict[str, Any]:
        found = config.get(name)
        config.refuse_if(
            name, found is not None and (type(found) is not list or set(found) != {self.value})
        )
        return {}

    def write(self, name: str, shape: GPTShape) -> dict[str, Any]:
        return {name: [self.value] * shape.layers}
