"""Write a Megaphase checkpoint for another layout, or in the portable form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megaphase.checkpoint.parameters import (
    WEIGHT,
    Kinds,
    StoredParameters,
    all_kinds,
    factor_layout,
)
from megaphase.checkpoint.state import ADAMW, OPTIMIZER
from megaphase.convert.checkpoint_writer import Form, form_for, portable_form, write_checkpoint
from megaphase.convert.output import new_folder
from megaphase.convert.partition import Layout, check_tensor_size
from megaphase.convert.source import Source, open_source, state_of_weights
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weights import FP32_BYTES, in_model_order
from megaphase.distributed.sharding import ParameterLayout


def reshape(
    text: str,
    out: Path,
    layout: Layout | None,
    *,
    weights_only: bool,
    average: bool = False,
    workers: int,
    console: Console | None = None,
) -> None:
    """Write the checkpoint RUN@NAME, or at a path, as `out`; portable if no layout is given.

    average: write the average that the checkpoint holds as the weights, without optimizer state.

    Raises:
        InputError: the checkpoint is damaged, or its model cannot be split like this.
    """
    source = open_source(text, average=average)
    form = _form(source, layout)
    kinds: Kinds = (WEIGHT,) if weights_only else source.weights.kinds_by_name
    state = state_of_weights(source.state) if weights_only else source.state
    order = _order(source.weights, kinds)
    needed = sum(_bytes_of(source.weights.layouts[name], kind) for name, kind in order)
    with (
        new_folder(out, needed) as folder,
        verified_meanwhile(
            source, needed, order=order, workers=workers, console=console
        ) as advance,
    ):
        write_checkpoint(
            folder, source.weights, kinds, form, state, order=order, workers=workers,
            advance=advance,
        )  # fmt: skip


def _order(weights: StoredParameters, kinds: Kinds) -> list[tuple[str, str]]:
    """Return all names and kinds in the order in which most bytes of the files are read one after
    the other: parameter by parameter, as this module's files have them, or kind by kind, as the
    trainer's do."""
    by_name = in_model_order(weights, kinds)
    number = {kind: i for i, kind in enumerate(all_kinds(kinds))}
    by_kind = sorted(by_name, key=lambda each: number[each[1]])
    return max(by_name, by_kind, key=lambda order: _bytes_in_order(weights, order))


def _bytes_of(layout: ParameterLayout, kind: str) -> int:
    """In fp32; of the factors of a moment (Adafactor), not of the whole."""
    return FP32_BYTES * (factor_layout(kind, layout) or layout).numel


def _bytes_in_order(weights: StoredParameters, order: Sequence[tuple[str, str]]) -> int:
    files = weights.places_in(order).values()
    return sum(place.end - place.begin for places in files for place in places)


def _form(source: Source, layout: Layout | None) -> Form:
    if layout is None:
        return portable_form(source.shape)
    check_tensor_size(source.shape, layout.tensor)
    return form_for(source.shape, layout, source.state.get(OPTIMIZER, ADAMW))
