"""Give a checkpoint's model rows for the tokens of an extended tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.state import NEW_TOKENS, TOKENIZER_HASH
from megaphase.convert.checkpoint_writer import portable_form, write_checkpoint
from megaphase.convert.hugging_face.from_hf import TOKENIZER_FOLDER
from megaphase.convert.hugging_face.tokenizer import copy_tokenizer
from megaphase.convert.output import new_folder
from megaphase.convert.source import Source
from megaphase.convert.source_tokenizer import other_tokenizer
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weight_import import foreign_state, write_model_section
from megaphase.convert.weights import Weights, fp32_bytes
from megaphase.model.parameters import parameter_layouts, parameter_specs
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer, pieces_replaced
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.seeds import derive_key

Init = Literal["mean", "random"]

_TOKENS_AT_A_TIME = 64
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class NewTokens:
    """The ids that an extended tokenizer has beyond its base.

    Attributes:
        first: the first of them, and the number of the base's.
        replaced: for each new id, the base's ids of the text that it encodes, at least one.
    """

    first: int
    replaced: Sequence[Sequence[int]]

    @property
    def stop(self) -> int:
        """The id after the last one."""
        return self.first + len(self.replaced)


class ExtendedWeights:
    """Weights of a model whose vocabulary has rows for new tokens, fp32, without moments.

    All other rows are those of the given weights, bit for bit.
    """

    kinds: Sequence[str] = (WEIGHT,)

    def __init__(
        self, weights: Weights, shape: GPTShape, tokens: NewTokens, init: Init, seed: int
    ) -> None:
        """
        Args:
            weights: of the model before.
            shape: of the model with the new tokens.
            init: `mean`: a new row is the mean of the rows of the tokens that it replaces.
                `random`: it is drawn from a normal distribution with mean and standard deviation,
                column by column, of the base's rows.
            seed: of the random rows, which depend on nothing else but the parameter's name and the
                base's rows.
        """
        self.layouts = parameter_layouts(shape, 1)
        self._weights, self._tokens, self._init, self._seed = weights, tokens, init, seed
        self._of_vocab = {n for n, spec in parameter_specs(shape).items() if spec.padded}

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous."""
        before = self._weights.whole(name, kind)
        if name not in self._of_vocab:
            return before
        first, stop = self._tokens.first, self._tokens.stop
        whole = before.new_empty(self.layouts[name].shape)
        whole[: len(before)] = before
        del before
        if self._init == "mean":
            for start, rows in self._means(whole[:first]):
                whole[start : start + len(rows)] = rows
        else:
            whole[first:stop] = _random_like(
                whole[:first], stop - first, derive_key(self._seed, "new tokens", name)
            )
        return whole

    def _means(self, base: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the first id and the rows of some new tokens after the other."""
        replaced = self._tokens.replaced
        for start in range(0, len(replaced), _TOKENS_AT_A_TIME):
            some = replaced[start : start + _TOKENS_AT_A_TIME]
            ids = torch.tensor([token for tokens in some for token in tokens])
            counts = torch.tensor([len(tokens) for tokens in some])
            number = torch.arange(len(some)).repeat_interleave(counts)
            sums = torch.zeros(len(some), base.shape[1], dtype=torch.float64)
            sums.index_add_(0, number, base[ids].double())
            yield self._tokens.first + start, (sums / counts.unsqueeze(1)).float()


def _random_like(base: Tensor, rows: int, key: int) -> Tensor:
    """Return rows from a normal distribution with the mean and variance of the base's columns."""
    total = torch.zeros(base.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in base.split(_ROWS_AT_A_TIME):
        total += part.double().sum(0)
    mean = total / len(base)
    for part in base.split(_ROWS_AT_A_TIME):
        squares += (part.double() - mean).square().sum(0)
    std = (squares / len(base)).sqrt()
    generator = torch.Generator("cpu")
    generator.manual_seed(key >> 1)
    values = torch.randn(rows, base.shape[1], generator=generator)
    return values.mul_(std.float()).add_(mean.float())


def new_tokens(source: Source, base: Tokenizer, extended: Tokenizer) -> NewTokens:
    """Return the new tokens of the tokenizer that extends a checkpoint's.

    Raises:
        InputError: `extended` extends another tokenizer than `base`, or the checkpoint was made
            with another one than `base`.
    """
    made_with = source.state.get(TOKENIZER_HASH)
    copied = source.folder / TOKENIZER_FOLDER
    if made_with is None and copied.is_dir():  # imports of earlier versions do not record it
        made_with = Tokenizer.load(copied).fingerprint
    if made_with is not None and made_with != base.fingerprint:
        raise other_tokenizer(source, base, made_with)
    replaced = pieces_replaced(extended, base)
    if not replaced:
        raise InputError(extended.path, f"has no more tokens than {base.path}", "add some")
    return NewTokens(base.vocab_size, replaced)


def extended_shape(shape: GPTShape, tokens: NewTokens) -> GPTShape:
    """Return the shape with rows for the new tokens; rows beyond the base's are taken first."""
    return replace(shape, vocab=max(shape.vocab, tokens.stop))


def write_extended(
    source: Source,
    tokens: NewTokens,
    out: Path,
    *,
    init: Init,
    seed: int,
    tokenizer: Tokenizer,
    workers: int,
    console: Console | None = None,
) -> str:
    """Write a portable checkpoint of weights alone with rows for the new tokens, as `out`.

    Args:
        tokenizer: the extended one, which is copied.

    Returns the run file's section for the model, YAML.

    Raises:
        InputError: the checkpoint is damaged, or `out` exists.
    """
    shape = extended_shape(source.shape, tokens)
    weights = ExtendedWeights(source.weights, shape, tokens, init, seed)
    state = _state(source, shape, tokens, tokenizer, init)
    nbytes = fp32_bytes(shape)
    with new_folder(out, nbytes) as folder:
        with verified_meanwhile(source, nbytes, workers=workers, console=console) as advance:
            write_checkpoint(
                folder,
                weights,
                (WEIGHT,),
                portable_form(shape),
                state,
                workers=workers,
                advance=advance,
            )
        (folder / TOKENIZER_FOLDER).mkdir()
        copy_tokenizer(tokenizer.path, folder / TOKENIZER_FOLDER)
        return write_model_section(folder, shape)


def _state(
    source: Source, shape: GPTShape, tokens: NewTokens, tokenizer: Tokenizer, init: Init
) -> dict[str, Any]:
    """Return state.json of the extended model, which no run has trained yet.

    The samples that the run has used are left out: with another tokenizer, texts are cut into
    other samples.
    """
    before = source.state
    origin = {
        "format": "megaphase, extended vocabulary",
        "path": str(real_path(source.folder)),
        "step": before.get("step"),
        "phase": before.get("phase_name"),
        "vocab": source.shape.vocab,
        "new_rows": init,
    }
    facts = {
        TOKENIZER_HASH: tokenizer.fingerprint,
        NEW_TOKENS: [tokens.first, tokens.stop],
        "precision": before.get("precision"),
    }
    return foreign_state(shape, origin) | {k: v for k, v in facts.items() if v is not None}
