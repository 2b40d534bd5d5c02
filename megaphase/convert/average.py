"""Average the weights of several checkpoints: of one run, or of the ends of several runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.state import TOKENIZER_HASH
from megaphase.convert.checkpoint_writer import portable_form, write_checkpoint
from megaphase.convert.hugging_face.from_hf import TOKENIZER_FOLDER
from megaphase.convert.hugging_face.tokenizer import copy_tokenizer
from megaphase.convert.output import new_folder
from megaphase.convert.source import Source, open_source, state_of_weights
from megaphase.convert.source_tokenizer import shared_tokenizer
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weights import Weights, fp32_bytes, in_model_order
from megaphase.distributed.sharding import ParameterLayout
from megaphase.tokenizer import MODEL_NAME, Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import remove_directory

FEWEST = 2
LEAST, MOST = 1e-6, 1e6  # of a checkpoint's weight


class MeanOfWeights:
    """The weighted mean of the weights of models of one shape, fp32, without moments.

    Each parameter is read from one model after the other, so that two of its copies are in memory.
    """

    kinds: Sequence[str] = (WEIGHT,)

    def __init__(self, weights: Sequence[Weights], shares: Sequence[float]) -> None:
        """shares: of each model in the mean, above 0."""
        self.layouts: Mapping[str, ParameterLayout] = weights[0].layouts
        self._weights, self._shares = weights, shares

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous."""
        mean = self._weights[0].whole(name, kind)
        total = self._shares[0]
        # A running mean, which leaves elements that are equal in all models as they are.
        for weights, share in zip(self._weights[1:], self._shares[1:], strict=True):
            total += share
            mean.lerp_(weights.whole(name, kind), share / total)
        return mean


def average(
    texts: Sequence[str],
    shares: Sequence[float] | None,
    out: Path,
    *,
    of_averages: bool = False,
    workers: int,
    console: Console | None = None,
) -> Source:
    """Write the mean of the weights of checkpoints of any layouts as the portable checkpoint `out`.

    Args:
        texts: RUN@NAME or a path for each.
        shares: of each in the mean, relative to their sum; equal by default.
        of_averages: take the average that each of them holds as its weights.

    Returns the checkpoint whose state the result has: that of the largest step, of several the
    last.

    Raises:
        InputError: one is damaged or is there twice; their models or tokenizers differ.
    """
    if len(texts) < FEWEST:
        raise InputError("CKPT", "is a single checkpoint", "give two or more")
    shares = _checked(shares, len(texts))
    sources = [open_source(text, average=of_averages) for text in texts]
    for number, source in enumerate(sources):
        _check_same(sources[0], source)
        if source.folder in [each.folder for each in sources[:number]]:
            problem = f"is {source.folder}, which is there twice"
            raise InputError(texts[number], problem, "leave it out once; --weights sets its weight")
    newest = max(reversed(sources), key=lambda source: int(source.state["step"]))
    state = state_of_weights(newest.state) | {"averaged": _record(sources, shares)}
    weights = MeanOfWeights([source.weights for source in sources], shares)
    needed, tokenizer = fp32_bytes(newest.shape), shared_tokenizer(sources)
    first, *others = sources
    order = in_model_order(weights, (WEIGHT,))
    with (
        new_folder(out, needed) as folder,
        verified_meanwhile(
            first, needed, order=order, others=others, workers=workers, console=console
        ) as advance,
    ):
        form = portable_form(newest.shape)
        write_checkpoint(
            folder, weights, (WEIGHT,), form, state, order=order, workers=workers, advance=advance
        )
        copied = tokenizer is not None and _copied(tokenizer, folder / TOKENIZER_FOLDER)
    if not copied and console is not None:
        text = "without a tokenizer, which is not known of all sources: give it with --tokenizer"
        console.print(text, markup=False, soft_wrap=True)
    return newest


def _copied(tokenizer: Tokenizer, folder: Path) -> bool:
    """Copy a tokenizer, and return whether the copy is the same one: a `.model` given alone is used
    as it is, which a folder's is not."""
    folder.mkdir()
    if tokenizer.path.is_file():
        shutil.copyfile(tokenizer.path, folder / MODEL_NAME)
    else:
        copy_tokenizer(tokenizer.path, folder)
    with suppress(InputError):
        if Tokenizer.load(folder).fingerprint == tokenizer.fingerprint:
            return True
    remove_directory(folder)
    return False


def _checked(shares: Sequence[float] | None, checkpoints: int) -> Sequence[float]:
    if shares is None:
        return [1.0] * checkpoints
    if len(shares) != checkpoints:
        problem = f"has {len(shares):,} numbers for {checkpoints:,} checkpoints"
        raise InputError("--weights", problem, "give one for each")
    for share in shares:
        if not LEAST <= share <= MOST:  # nor not a number
            problem = f"{share:g} is not from {LEAST:g} to {MOST:g}"
            raise InputError("--weights", problem, "they are relative to their sum")
    return shares


def _check_same(one: Source, other: Source) -> None:
    """Refuse models whose weights do not mean the same.

    Rotary positions leave seq_len free; the result has that of the checkpoint whose state it has.
    """
    first, second = one.shape.architecture(), other.shape.architecture()
    may_differ = {"seq_len"} if one.shape.position == "rotary" else set()
    for key in {**first, **second}:
        wanted, found = first.get(key), second.get(key)
        if wanted != found and key not in may_differ:
            name = "vocabulary" if key == "vocab" else f"model.{key}"
            raise InputError(
                other.folder,
                f"{name} is {_shown(found)}, but {one.folder} has {_shown(wanted)}",
                "average checkpoints of one model",
            )
    hashes = {each.state.get(TOKENIZER_HASH) for each in (one, other)} - {None}
    if len(hashes) > 1:
        raise InputError(
            other.folder,
            f"was trained with another tokenizer than {one.folder}",
            "average checkpoints with one tokenizer",
        )


def _shown(option: Any) -> str:
    return "none" if option is None else str(option)


def _record(sources: Sequence[Source], shares: Sequence[float]) -> list[dict[str, Any]]:
    total = math.fsum(shares)
    return [
        {"checkpoint": str(source.folder), "step": source.state["step"], "share": share / total}
        for source, share in zip(sources, shares, strict=True)
    ]
