"""Write weights trained by another program as a checkpoint from which a run can start."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.state import CHECKPOINT_FORMAT, TOKENIZER_HASH
from megaphase.convert.checkpoint_writer import portable_form, write_checkpoint
from megaphase.convert.weights import Weights, fp32_bytes
from megaphase.model.shape import GPTShape
from megaphase.training.train_state import TrainState
from megaphase.utils.files import atomic_write_text
from megaphase.utils.progress import bytes_progress

_MODEL_FILE = "model.yaml"


def write_foreign(
    folder: Path,
    weights: Weights,
    shape: GPTShape,
    origin: dict[str, Any],
    *,
    workers: int,
    console: Console | None,
    tokenizer_hash: str | None = None,
) -> None:
    """Write a portable checkpoint of weights alone, at step 0, into an empty folder.

    weights: their layouts are those of `parameter_layouts(shape, 1)`. origin: information about
    their source, such as `{"format": "Hugging Face", "path": ...}`. tokenizer_hash: the fingerprint
    of their tokenizer, None if it is not known.
    """
    form = portable_form(shape)
    state = foreign_state(shape, origin)
    if tokenizer_hash is not None:
        state[TOKENIZER_HASH] = tokenizer_hash
    with bytes_progress(console, "writing", fp32_bytes(shape)) as advance:
        write_checkpoint(
            folder,
            weights,
            (WEIGHT,),
            form,
            state,
            workers=workers,
            advance=advance,
        )


def write_model_section(folder: Path, shape: GPTShape) -> str:
    """Write the run file's section for the model as model.yaml; return its text."""
    section = yaml.safe_dump({"model": shape.architecture()}, sort_keys=False)
    atomic_write_text(folder / _MODEL_FILE, section)
    return section


def foreign_state(shape: GPTShape, origin: dict[str, Any]) -> dict[str, Any]:
    """Return state.json of a model that no run has trained yet."""
    return {
        "format": CHECKPOINT_FORMAT,
        "origin": origin,
        "model": shape.architecture(),
        "position": asdict(TrainState(0, 0, 0, 0, ())),
        "step": 0,
        "phase_name": None,
        "used": {},
        "streams": {},
        "optimizer_steps": 0,
    }
