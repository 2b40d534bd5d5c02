"""Convert a Megaphase checkpoint to a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megaphase.chats.template import ChatTemplate
from megaphase.chats.turn_ends import turn_ends
from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.hugging_face.config_file import CONFIG_FILE
from megaphase.convert.hugging_face.families import family_for
from megaphase.convert.hugging_face.family import Family
from megaphase.convert.hugging_face.forced_class import OtherClass, class_to_load
from megaphase.convert.hugging_face.tokenizer import write_hf_tokenizer
from megaphase.convert.hugging_face.weights import INDEX_SUFFIX, SAFETENSORS_FILE
from megaphase.convert.output import new_folder
from megaphase.convert.parameter_mapping import ParameterMapping
from megaphase.convert.source import Precision, open_source
from megaphase.convert.source_tokenizer import check_tokenizer_known, load_tokenizer
from megaphase.convert.tensor_files import TensorFiles
from megaphase.convert.verification import verified_meanwhile
from megaphase.convert.weights import (
    Weights,
    WithZeroBiases,
    as_dtype,
    in_model_order,
    read_each,
)
from megaphase.model.parameters import parameter_count
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, read_json

_METADATA = {"format": "pt"}  # required by transformers


@dataclass(frozen=True)
class Written:
    """The result of an export.

    Attributes:
        family: of the model.
        shape: as config.json describes it.
        chat_ends: the tokens at which generation stops; None if there is no chat template.
        yarn_positions: the max_position_embeddings with which transformers computes the model's
            rotary positions, in 4.51 as in later versions; None without YaRN.
        tokenizer_class: the class of transformers that gives the tokenizer's ids, where
            AutoTokenizer would not; else None.
    """

    family: Family
    shape: GPTShape
    chat_ends: list[str] | None = None
    yarn_positions: int | None = None
    other_class: OtherClass | None = None


def to_hf(
    text: str,
    out: Path,
    *,
    precision: Precision | None,
    tokenizer: Path | None,
    max_shard_bytes: int,
    workers: int,
    console: Console | None = None,
    no_tokenizer: bool = False,
    max_positions: int | None = None,
    average: bool = False,
) -> Written:
    """Write the checkpoint RUN@NAME, or at a path, as the model directory `out`.

    Args:
        precision: of the weights; the run's by default.
        tokenizer: by default that of the run, or of the imported model.
        no_tokenizer: write none.
        max_positions: how many tokens the model's configuration allows a text to have, with rotary
            positions; by default the seq_len of the phase that wrote the checkpoint, and with YaRN
            its factor times the original length.
        average: write the average of the weights that the checkpoint holds.

    Raises:
        InputError: the checkpoint is damaged, no family supports its model, its tokenizer is not
            known, or the model's positions are learned and `max_positions` is given.
    """
    if not no_tokenizer:
        check_tokenizer_known(text, tokenizer)
    source = open_source(text, average=average)
    whole = source.shape.with_all_positions()
    family = family_for(whole, source.folder)
    shape = family.expressed(whole)
    yarn_positions = _yarn_positions(shape)
    described = shape if yarn_positions is None else replace(shape, seq_len=yarn_positions)
    if max_positions is not None:
        if shape.position != "rotary":
            problem = f"the model has learned positions, {shape.seq_len:,} of them"
            raise InputError("--max-positions", problem, "leave it out")
        described = replace(shape, seq_len=max_positions)
    dtype = source.dtype(precision)
    words = None if no_tokenizer else load_tokenizer(source, tokenizer)
    turns: frozenset[int] = frozenset()
    other_class: OtherClass | None = None
    weights = WithZeroBiases(source.weights, shape)
    nbytes = dtype.itemsize * parameter_count(shape)
    with new_folder(out, nbytes) as folder:
        order = in_model_order(weights, (WEIGHT,))
        with verified_meanwhile(
            source, nbytes, order=order, workers=workers, console=console
        ) as advance:
            _write_weights(
                folder,
                weights,
                order,
                family.mappings(shape),
                family.stored_constants(shape),
                dtype,
                max_shard_bytes,
                workers=workers,
                advance=advance,
            )
        tokens: dict[str, int | list[int] | None] = {"bos_token_id": None, "eos_token_id": None}
        if words is not None:
            write_hf_tokenizer(words, folder, max_length=described.seq_len)
            other_class = class_to_load(folder, family.model_type)
            turns = turn_ends(words)
            tokens = {"bos_token_id": _bos(folder, words), "eos_token_id": _ends(words, turns)}
        _write_configs(folder, family.config(described), dtype, tokens)
        has_template = words is not None and ChatTemplate.find(folder) is not None
    ends = [words.piece(each) for each in (words.eod, *sorted(turns))] if words else []
    chat_ends = ends if has_template else None
    return Written(family, described, chat_ends, yarn_positions, other_class)


def _yarn_positions(shape: GPTShape) -> int | None:
    """Return max_position_embeddings of a model with YaRN: 4.51 of transformers computes the factor
    from it, as max_position_embeddings / original_max_position_embeddings; later versions read it.
    """
    scaling = shape.rotary_scaling
    if scaling is None or scaling.type != "yarn" or scaling.original_seq_len is None:
        return None
    return max(round(scaling.factor * scaling.original_seq_len), 1)


def _write_weights(
    folder: Path,
    weights: Weights,
    order: Sequence[tuple[str, str]],
    mappings: Mapping[str, ParameterMapping],
    constants: Mapping[str, float],
    dtype: torch.dtype,
    max_shard_bytes: int,
    *,
    workers: int,
    advance: Callable[[int], object],
) -> None:
    kinds = {
        foreign_name: TensorKind(dtype, shape)
        for name, mapping in mappings.items()
        for foreign_name, shape in mapping.foreign_shapes(weights.layouts[name].shape).items()
    }
    kinds |= {name: TensorKind(dtype, ()) for name in constants}
    contents = _shards(kinds, max_shard_bytes)
    places = {name: file for file, tensors in contents.items() for name in tensors}
    files = TensorFiles(folder, contents, _METADATA)

    def write(name: str, kind: str, whole: Tensor) -> None:
        for foreign_name, part in mappings[name].split(whole).items():
            files.write(places[foreign_name], as_dtype(foreign_name, part, dtype).contiguous())
            advance(kinds[foreign_name].nbytes)

    try:
        read_each(weights, order, write, workers=workers)
        for name, value in constants.items():
            files.write(places[name], torch.tensor(value, dtype=dtype))
    finally:
        files.close()
    if len(contents) > 1:
        total = sum(kind.nbytes for kind in kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        atomic_write_json(folder / f"{SAFETENSORS_FILE}{INDEX_SUFFIX}", index)


def _shards(kinds: Mapping[str, TensorKind], max_bytes: int) -> dict[str, dict[str, TensorKind]]:
    """Return the tensors of every file, in order; one larger than max_bytes has its own file."""
    shards: list[dict[str, TensorKind]] = [{}]
    size = 0
    for name, kind in kinds.items():
        if shards[-1] and size + kind.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = kind
        size += kind.nbytes
    if len(shards) == 1:
        return {SAFETENSORS_FILE: shards[0]}
    stem, suffix = SAFETENSORS_FILE.split(".")
    count = len(shards)
    return {
        f"{stem}-{number:05d}-of-{count:05d}.{suffix}": shard
        for number, shard in enumerate(shards, 1)
    }


def _write_configs(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype,
    tokens: dict[str, int | list[int] | None],
) -> None:
    name = str(dtype).removeprefix("torch.")
    # The first of these names is that of version 5 of transformers, the second that of version 4.
    # Without the key, some classes have a token for padding, whose embedding would not be trained.
    kinds = {"pad_token_id": None, "dtype": name, "torch_dtype": name}
    atomic_write_json(folder / CONFIG_FILE, config | tokens | kinds)
    atomic_write_json(folder / "generation_config.json", tokens)


def _bos(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that is the bos_token of the tokenizer in a folder."""
    if tokenizer.record.library == "tokenizers":
        return tokenizer.record.bos
    text = read_json(folder / "tokenizer_config.json").get("bos_token")
    if isinstance(text, dict):
        text = text["content"]
    return next((i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == text), None)


def _ends(tokenizer: Tokenizer, turns: frozenset[int]) -> int | list[int]:
    """Return the ids at which generation stops: EOD and, where there are others, the tokens that
    end a turn."""
    return [tokenizer.eod, *sorted(turns)] if turns else tokenizer.eod
