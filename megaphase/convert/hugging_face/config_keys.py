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
