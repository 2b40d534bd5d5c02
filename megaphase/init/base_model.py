"""The model of the run file: a preset, sizes for a number of parameters, or a published one."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaphase.checkpoint.names import find_checkpoint
from megaphase.checkpoint.state import NEW_TOKENS, STATE_FILE, TOKENIZER_HASH, read_state
from megaphase.convert.hugging_face.config import read_config
from megaphase.convert.hugging_face.config_file import CONFIG_FILE
from megaphase.convert.hugging_face.from_hf import TOKENIZER_FOLDER
from megaphase.model.parameters import parameter_sizes
from megaphase.model.presets import PRESETS, default_ffn
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.validation_errors import hint

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kmbt]?)", re.IGNORECASE)
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
LEAST, MOST = 1e5, 2e12
BEYOND = 1.25  # how far the size that is asked for may be from that of the model, as a factor
AUTO = "auto"
# Layers and hidden sizes from which sizes for a number of parameters are chosen, and the width of a
# head below and from a hidden size on.
LAYERS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 40, 48, 60, 80, 96, 120)
HEAD, WIDE_HEAD, WIDE, MOST_HIDDEN = 64, 128, 2048, 1 << 14
# hidden / layers of a small and of a large model, and the numbers of parameters.
THIN, THICK = (32.0, 1e6), (128.0, 1e10)


@dataclass(frozen=True)
class BaseModel:
    """The model that the phases begin with.

    Attributes:
        section: keys of the run file's `model` section, without seq_len.
        shape: its seq_len is the published model's, or any.
        name: what it is called in messages.
        checkpoint: what `megaphase train --from` is given; None if training begins from scratch.
        first: commands that have to be run before.
        new_tokens: whether its vocabulary was extended.
        note: a warning, if it is much larger than it was meant to be.
    """

    section: dict[str, Any]
    shape: GPTShape
    name: str
    checkpoint: str | None = None
    first: list[str] = field(default_factory=list)
    new_tokens: bool = False
    note: str = ""

    @property
    def parameters(self) -> int:
        """All parameters, embeddings included."""
        return count_parameters(self.shape)


def count_parameters(shape: GPTShape) -> int:
    """Return the number of parameters of a model, embeddings included."""
    return sum(parameter_sizes(shape, 1).values())


def preset_model(name: str, vocab: int) -> BaseModel:
    """Return the model of a preset."""
    return BaseModel({"preset": name}, _shape(PRESETS[name], vocab), name)


def _shape(sizes: dict[str, int], vocab: int) -> GPTShape:
    return GPTShape(
        vocab=vocab,
        seq_len=2,
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        kv_heads=sizes["heads"],
        ffn=sizes["ffn"],
    )


def named_model(answer: str, vocab: int) -> BaseModel:
    """Return the model of a preset's name, or of a number of parameters such as 500m or 1.3b.

    vocab: tokens of the vocabulary.

    Raises:
        InputError: it is neither.
    """
    text = answer.strip().lower()
    for name in (text, f"gpt-{text}"):
        if name in PRESETS:
            return preset_model(name, vocab)
    match = SIZE.fullmatch(text)
    if match is None:
        remedy = hint(answer, PRESETS, "the presets are")
        raise InputError(
            f"--model {answer}", "is no preset and no size", f"{remedy}; a size is 500m or 1.3b"
        )
    wanted = float(match[1]) * UNITS[match[2].lower()]
    if not LEAST <= wanted <= MOST:
        raise InputError(
            f"--model {answer}", "is no size of a model", f"give {LEAST:,.0f} to {MOST:,.0f}"
        )
    sizes = min(_choices(), key=lambda sizes: _distance(sizes, vocab, wanted))
    model = BaseModel(dict(sizes), _shape(sizes, vocab), answer)
    has, largest = model.parameters, max(_total(each, vocab) for each in _choices())
    if wanted > largest * BEYOND:
        problem = f"the largest model that is chosen has {largest / 1e9:,.0f} billion parameters"
        raise InputError(f"--model {answer}", problem, "give a smaller size")
    if has > wanted * BEYOND:
        note = f"the model has {has:,} parameters, not {answer}: {vocab:,} tokens need as many"
        return replace(model, note=note)
    return model


def _choices() -> Iterator[dict[str, int]]:
    for layers in LAYERS:
        for hidden in range(HEAD, MOST_HIDDEN + 1, HEAD):
            head = WIDE_HEAD if hidden >= WIDE else HEAD
            heads, left = divmod(hidden, head)
            # So that tensor parallelism can share them.
            if left or heads % (1 if hidden < 1024 else 4 if hidden < 4096 else 8):
                continue
            ffn = default_ffn(hidden, "swiglu")
            yield {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}


def _distance(sizes: dict[str, int], vocab: int, wanted: float) -> float:
    """Return how far sizes are from a number of parameters, and from usual proportions."""
    hidden, layers = sizes["hidden"], sizes["layers"]
    (thin, small), (thick, large) = THIN, THICK
    along = min(max(math.log(wanted / small) / math.log(large / small), 0.0), 1.0)
    usual = thin * (thick / thin) ** along
    return abs(math.log(_total(sizes, vocab) / wanted)) + 0.03 * abs(
        math.log(hidden / layers / usual)
    )


def _total(sizes: dict[str, int], vocab: int) -> int:
    """Return the number of weights of matrices, embeddings included."""
    hidden = sizes["hidden"]
    return sizes["layers"] * (4 * hidden**2 + 3 * hidden * sizes["ffn"]) + 2 * vocab * hidden


def published_model(answer: str, tokenizer: Tokenizer) -> BaseModel:
    """Return the model of a checkpoint that `convert from-hf` or `extend-vocab` wrote, or of the
    directory of a Hugging Face model, which then has to be converted first.

    tokenizer: that of the corpora.

    Raises:
        InputError: it is no such model, or the corpora have another tokenizer.
    """
    folder = Path(answer)
    where = f"--checkpoint {answer}"
    if (folder / CONFIG_FILE).is_file() and not (folder / STATE_FILE).is_file():
        return _from_hugging_face(folder, tokenizer, where)
    checkpoint = find_checkpoint(answer)
    try:
        state = read_state(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(where, f"cannot be read ({error})", "convert the model again") from None
    if state.get("used"):
        raise InputError(
            where,
            "is the checkpoint of a run, whose tasks and seed must stay the same",
            "copy that run's file, leave out the phases that are done, and train with --from",
        )
    try:
        shape = GPTShape.from_architecture(state["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(where, f"its model cannot be read ({error})", "convert again") from None
    known = state.get(TOKENIZER_HASH)
    if known is not None and known != tokenizer.fingerprint:
        raise _other_tokenizer(where, f"{answer}/{TOKENIZER_FOLDER}")
    _check_vocabulary(where, shape, tokenizer, answer)
    return _published(shape, answer, answer, [], NEW_TOKENS in state)


def _from_hugging_face(folder: Path, tokenizer: Tokenizer, where: str) -> BaseModel:
    _, shape = read_config(folder)
    base = f"{folder.name or 'model'}-base"
    convert = f"megaphase convert from-hf {shlex.quote(str(folder))} --out {shlex.quote(base)}"
    try:
        own: Tokenizer | None = Tokenizer.load(folder)
    except InputError:  # it has none that can be compared
        own = None
    if own is not None and own.vocab_size > shape.vocab:
        own_copy = shlex.quote(f"{base}/{TOKENIZER_FOLDER}")
        raise InputError(
            where,
            f"its tokenizer has {own.vocab_size:,} tokens, the model {shape.vocab:,} rows",
            f"run `{convert}`, tokenize the corpora with {own_copy}, which has those of the model, "
            f"and give --checkpoint {shlex.quote(base)}",
        )
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        if tokenizer.vocab_size > own.vocab_size:
            raise _not_extended(where, convert, base, tokenizer)
        raise _other_tokenizer(where, str(folder))
    if tokenizer.vocab_size > shape.vocab:
        raise _not_extended(where, convert, base, tokenizer)
    return _published(shape, folder.name, base, [convert], False)


def _published(
    shape: GPTShape, name: str, checkpoint: str, first: list[str], new_tokens: bool
) -> BaseModel:
    section = {key: value for key, value in shape.architecture().items() if key != "seq_len"}
    # The function that the weights compute, with all its options, and no preset.
    return BaseModel(section, shape, name, checkpoint, first, new_tokens)


def _check_vocabulary(where: str, shape: GPTShape, tokenizer: Tokenizer, base: str) -> None:
    if tokenizer.vocab_size > shape.vocab:
        raise _not_extended(where, None, base, tokenizer)


def _not_extended(where: str, convert: str | None, base: str, tokenizer: Tokenizer) -> InputError:
    base, words = shlex.quote(base), shlex.quote(str(tokenizer.path))
    extend = f"megaphase convert extend-vocab {base} --tokenizer {words} --out extended"
    commands = " && ".join([*([convert] if convert else []), extend])
    return InputError(
        where,
        "has no rows for all tokens of the corpora, whose tokenizer is an extended one",
        f"run `{commands}`, then give --checkpoint extended",
    )


def _other_tokenizer(where: str, own: str) -> InputError:
    return InputError(
        where,
        "the corpora were tokenized with another tokenizer than the model's",
        f"tokenize them again: megaphase data tokenize … --tokenizer {shlex.quote(own)}",
    )


def with_length(shape: GPTShape, seq_len: int) -> GPTShape:
    """Return the shape with another sequence length."""
    return replace(shape, seq_len=seq_len)
