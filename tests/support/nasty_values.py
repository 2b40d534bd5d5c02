"""Run files with every key, and with values that nobody should write."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from megaphase.config.run import RunConfig

Place = tuple[str | int, ...]

NUMBERS = [
    0, 1, -1, 2, 3, 7, 10**12, 10**15, 10**16, 10**30, 10**400, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, -(2**63), 0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 1e-9, 1e-320, 5e-324, 1e12, 1e25, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), True, False, None,
]  # fmt: skip
TEXTS = [
    "", "  ", "a", "1", "1e-3", "true", "yes", "null", "~", "[", "{", "*", "&a", "en", "hi", "low",
    "mean", "none", "a/b", ".", "..", ".x", "-x", "~/x", "~nosuchuser/x", "/", "/dev/null",
    "latest", "best-hi", "step-00000001", "\0", "a\0b", "\n", "a\nb", "\t", "\x1b[31m", "é",
    "हिन्दी", "٣", "²", "\u202eabc", "😀", "\ud800", "\udcff", "x" * 101, "x" * 300, "x" * 100_000,
    "a/" * 3_000,
]  # fmt: skip
COLLECTIONS: list[Any] = [
    [], [[]], [None], [1], [True, False], [1.0, 2.0], [0.9, 1.0], [0.9, -1], ["hi"], ["en", "en"],
    ["nope"], ["x" * 5000] * 3, [[[[[[[[[[1]]]]]]]]]], {}, {"a": 1}, {"": 1}, {1: 2}, {None: None},
    {True: 1}, {"en": 1}, {"en": 0, "hi": 0}, {"en": 1e-320, "hi": 1}, {"en": 1e308, "hi": 1e308},
    {"hi": 10**400}, {"en": float("nan")}, {"a": {"b": {"c": {}}}}, {"x" * 5000: 1},
    {"from": 5, "to": 1}, {"from": 0.01, "to": 1e6, "shape": "cosine"}, {"from": 1, "to": True},
    {"en": {"from": 0.5, "to": 0}, "hi": {"from": 0.5, "to": 1, "shape": "cosine"}},
    {"en": {"from": 1e-320, "to": 1}, "hi": {"from": 1, "to": 1e-320}}, {"en": {"from": {}}},
    {"en": {"corpus": "en"}}, {"steps": 1}, {"zero": True}, {"peak": 1e-3}, {"proportional": 1},
    b"x", b"\xff", {1, 2}, set(), (1, 2), ("en",), datetime.date(2020, 1, 1),
    datetime.datetime(2020, 1, 1, 1, 1),
]  # fmt: skip


def all_keys() -> dict[str, Any]:
    """Return a valid run file over the corpora en and hi with every kind of key."""
    tasks = {
        name: {
            "corpus": name, "kind": "lm", "attend_across_documents": True, "held_out": 0.2,
            "subsample": 0.5, "role": "low",
        }
        for name in ("en", "hi")
    }  # fmt: skip
    schedule = {
        "schedule": "wsd", "peak": 1e-3, "final": 1e-4, "warmup_steps": 2, "decay_steps": 3,
        "steps": 20, "first_step": 0,
    }  # fmt: skip
    overfit = {"tasks": ["hi"], "patience": 3, "min_gain": 0.0, "when": "all"}
    return {
        "seed": 7,
        "output": "run",
        "tokenizer": "tok",
        "tasks": tasks,
        "model": {
            "seq_len": 8, "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64,
            "vocab": 100, "norm": "rmsnorm", "position": "rotary", "activation": "gelu",
            "tied_embeddings": True, "bias": False, "rotary_base": 1e4, "norm_eps": 1e-5,
            "init_std": 0.02, "dropout": 0.1, "activation_checkpointing": "none",
        },
        "parallel": {
            "tensor": 1, "sequence": False, "overlap": True, "zero": 3, "offload": "nvme",
            "offload_parameters": "none", "offload_folder": "nvme", "keep_gathered": 0.5,
            "secondary_partition": None,
        },
        "precision": "bf16",
        "batch": {"samples": 4, "micro": 1},
        "optimizer": {
            "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0,
        },
        "parts": {"kernels": "auto", "norm": "auto", "optimizer": "auto"},
        "phases": [
            {
                "name": "one",
                "steps": 10,
                "mixture": {"rates": {"en": 0.5, "hi": 0.5}, "max_epochs": 100.0},
                "order": "balanced",
                "optimizer_state": "reset",
                "learning_rate": schedule,
                "stop": {"overfit": overfit, "loss": {"hi": 2.5}},
            },
            {
                "name": "two",
                "epochs": {"hi": 2.0},
                "mixture": {"temperature": 3.3, "over": ["en", "hi"]},
                "learning_rate": {"peak": 1e-3},
            },
            {
                "name": "three",
                "tokens": 800,
                "mixture": {"unimax": True, "over": "low", "max_epochs": 50.0},
                "learning_rate": {"peak": 1e-3},
            },
        ],
        "validation": {"every_steps": 5, "samples": 10, "fraction": 0.2},
        "monitor": {"tasks": ["hi", "en"], "weights": {"hi": 1.0}, "min_gain": 0.1},
        "checkpoint": {"every_steps": 4, "keep": 2, "asynchronous": True},
        "logging": {"every_steps": 5, "tensorboard": True},
        "hardware": {
            "card": "h100-sxm", "peak_tflops": 100.0, "efficiency": 0.5, "memory_gb_per_s": 100.0,
            "gpus_per_node": 8, "node_link_gb_per_s": 10.0, "network_gbit_per_s": 10.0,
        },
        "faults": RunConfig.model_fields["faults"].default.model_dump(),
    }  # fmt: skip


def bounds(model: type[BaseModel]) -> set[float]:
    """Return the limits of all numbers in a section and its subsections, and their neighbours."""
    found: set[float] = set()
    for field in model.model_fields.values():
        for constraint in _constraints((*field.metadata, field.annotation)):
            found |= {constraint, constraint + 1, constraint - 1}
        for section in _sections(field.annotation):
            found |= bounds(section)
    return found


def _constraints(parts: tuple[Any, ...]) -> Iterator[float]:
    for part in parts:
        for name in ("gt", "ge", "lt", "le"):
            if isinstance(limit := getattr(part, name, None), int | float):
                yield limit
        yield from _constraints((*getattr(part, "metadata", ()), *get_args(part)))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def nasty_values(model: type[BaseModel]) -> list[Any]:
    """What one value of a file of this model is replaced by."""
    return [*NUMBERS, *TEXTS, *COLLECTIONS, *sorted(bounds(model))]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Yield the places of every value below this one."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield (*place, key)
        if isinstance(child, dict | list):
            yield from places(child, (*place, key))


def replaced(content: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """Return a copy with another value at this place."""
    content = copy.deepcopy(content)
    node: Any = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = copy.deepcopy(value)
    return content
