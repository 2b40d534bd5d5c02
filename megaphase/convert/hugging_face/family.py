"""What a family of Hugging Face models is: its table, and what is read from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from megaphase.convert.hugging_face.config_file import ConfigFile
from megaphase.convert.hugging_face.config_keys import Key
from megaphase.convert.parameter_mapping import ParameterMapping
from megaphase.distributed.sharding import ParameterLayout
from megaphase.model.parameters import parameter_layouts
from megaphase.model.shape import NOT_ARCHITECTURE, GPTShape

HEAD = "lm_head.weight"
# Tensors that some versions of transformers store but none needs: angles and causal masks.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
_NAME = re.compile(
    r"(?:blocks\.(?P<block>\d+)\.)?(?P<module>[a-z_.]+?)(?:\.(?P<kind>weight|bias))?"
)


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        title: its name.
        model_type: its model_type in config.json.
        architecture: its class in transformers.
        options: options that all of its models have, by their name in GPTShape.
        derived: further ones that follow from the rest of a shape.
        keys: how each key of config.json is read and written.
        harmless: further keys that change no logits, and why.
        written: further keys that are written.
        always_biased: whether all linear layers have biases.
        heads_divide: whether transformers wants hidden to be a multiple of the heads in any case.
        prefix: prefix of all tensors except the output projection's.
        blocks: the name of the list of blocks.
        modules: the family's modules by Megaphase's; one module may be split into several. A
            parameter that is neither weight nor bias is named whole.
        transposed: modules in a block whose weights are stored as [inputs, outputs].
        interleaved: whether queries, keys and values are, see `convert.qkv_order`.
        constants: scalars that are stored in every block beside the parameters.
        head: the name of the output projection's weight.
    """

    title: str
    model_type: str
    architecture: str
    options: Mapping[str, Any]
    keys: Mapping[str, Key]
    prefix: str
    blocks: str
    modules: Mapping[str, tuple[str, ...]]
    derived: Mapping[str, Callable[[GPTShape], Any]] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    always_biased: bool = False
    heads_divide: bool = False
    transposed: frozenset[str] = frozenset()
    interleaved: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    head: str = HEAD

    @property
    def grouped(self) -> bool:
        """Whether there may be fewer heads of keys and values than of queries."""
        return any("kv_heads" in key.fields for key in self.keys.values())

    def faults(self, shape: GPTShape) -> list[str]:
        """Return a shape's options that no model of this family has, as `model.KEY: VALUE`."""
        free = {each for key in self.keys.values() for each in key.fields} | NOT_ARCHITECTURE
        if self.always_biased:
            free |= {"bias"}
        if shape.position == "learned":
            free |= {"rotary_base"}  # which then means nothing
        wanted = {
            each.name: self.options.get(each.name, each.default)
            for each in fields(GPTShape)
            if each.name not in free
        }
        if wanted.get("kv_heads") is MISSING:  # of the sizes, the only one it may not have
            wanted["kv_heads"] = shape.heads
        nearest = self.completed(replace(shape, **wanted))
        wrong = [key for key in wanted if getattr(shape, key) != getattr(nearest, key)]
        if self.heads_divide and shape.hidden % shape.heads:
            wrong.append("heads")
        if not wrong:  # of the values that its options can have
            again = self.shape(ConfigFile.of(self.config(shape))).architecture()
            known = self.expressed(shape).architecture()
            if shape.position == "learned":
                again["rotary_base"] = known["rotary_base"]
            wrong = [key for key in {**known, **again} if known.get(key) != again.get(key)]
        return [f"model.{key}: {getattr(shape, key)}" for key in wrong]

    def shape(self, config: ConfigFile) -> GPTShape:
        """Return the shape of a model.

        Raises:
            InputError: a value is not supported, or two keys contradict each other.
        """
        options: dict[str, Any] = dict(self.options)
        names: dict[str, str] = {}
        for name, key in self.keys.items():
            for option, value in key.read(name, config).items():
                if option in names and options[option] != value:
                    problem = f"is {json.dumps(options[option])}, and {name} is not"
                    raise config.refusal(names[option], problem)
                options[option] = value
                names[option] = name
        options.setdefault("kv_heads", options["heads"])
        if self.always_biased:
            options["bias"] = True
        return self.completed(GPTShape(**options))

    def completed(self, shape: GPTShape) -> GPTShape:
        """Return a shape with the options that follow from the others."""
        return replace(shape, **{name: of(shape) for name, of in self.derived.items()})

    def config(self, shape: GPTShape) -> dict[str, Any]:
        """Return the architecture's keys of config.json."""
        written: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
        }
        for name, key in self.keys.items():
            written |= key.write(name, shape)
        written |= {"initializer_range": shape.init_std, "use_cache": True}
        return {**written, **self.written}

    def expressed(self, shape: GPTShape) -> GPTShape:
        """Return the same model with the biases that this family has; added ones are 0."""
        return replace(shape, bias=True) if self.always_biased else shape

    def mappings(self, shape: GPTShape) -> dict[str, ParameterMapping]:
        """Return the mapping of every parameter of an expressed shape, by name, in the model's
        order."""
        layouts = parameter_layouts(shape, 1)
        return {name: self._mapping(name, layout, shape) for name, layout in layouts.items()}

    def stored_constants(self, shape: GPTShape) -> dict[str, float]:
        """Return the scalars that are stored beside the parameters, by name."""
        return {
            f"{self.prefix}{self.blocks}.{block}.{name}": value
            for block in range(shape.layers)
            for name, value in self.constants.items()
        }

    def canonical(self, name: str) -> str:
        """Return a tensor's name in the whole model; in a base model, a part of it is missing."""
        if name in (HEAD, self.head):  # the first of these is its name while a model is in memory
            return self.head
        return name if name.startswith(self.prefix) else self.prefix + name

    def _mapping(self, name: str, layout: ParameterLayout, shape: GPTShape) -> ParameterMapping:
        found = _NAME.fullmatch(name)
        assert found is not None
        block, module, kind = found.group("block", "module", "kind")
        if module == "head":
            return ParameterMapping(name, (self.head,), layout.shape[:1])
        place = self.prefix if block is None else f"{self.prefix}{self.blocks}.{block}."
        suffix = "" if kind is None else f".{kind}"
        foreign = tuple(f"{place}{each}{suffix}" for each in self.modules[module])
        rows = layout.segments if len(foreign) > 1 else layout.shape[:1]
        return ParameterMapping(
            name,
            foreign,
            rows,
            transposed=kind == "weight" and module in self.transposed,
            interleaved=shape if self.interleaved and module == "attention.qkv" else None,
        )


def is_buffer(name: str) -> bool:
    """Return whether a tensor is not a parameter, but computed from the config by transformers."""
    return _BUFFERS.search(name) is not None
