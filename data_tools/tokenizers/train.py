"""Train a tokenizer that serves several languages."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import sentencepiece
from rich.console import Console

from megaphase.chats.default_template import CHAT_TAGS, CHAT_TEMPLATE
from megaphase.chats.template_files import MORE_TEMPLATES, TEMPLATE_NAME
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.text import (
    STDIN,
    InputPath,
    Reading,
    check_text_file,
    display_name,
    size_on_disk,
)
from megaphase.data_tools.tokenizers.byte_level import (
    CONFIG_NAME,
    train_byte_level,
    write_byte_level,
)
from megaphase.data_tools.tokenizers.extended_files import COPIED_NAMES
from megaphase.data_tools.tokenizers.fertility import measure_fertility
from megaphase.data_tools.tokenizers.sample import (
    Survey,
    sample_sentences,
    survey_language,
    uses_per_sentence,
)
from megaphase.tokenizer import (
    MODEL_NAME,
    RECORD_NAME,
    SPACE_SYMBOL,
    TOKENIZER_JSON_NAME,
    SentencePieceBackend,
    Tokenizer,
    TokenizerRecord,
)
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import (
    atomic_write_json,
    directory_written_aside,
    hash_file,
    real_path,
    removal_path,
    remove_directory,
)
from megaphase.utils.progress import reading_progress

ModelType = Literal["unigram", "bpe"]
Library = Literal["sentencepiece", "tokenizers"]

EOD_PIECE = "<eod>"
UNKNOWN_PIECE = "<unk>"

# Each has its own token and is never merged with other characters.
_WHITESPACE_PIECES = ("\n", "\t")
_TAG_NAME = re.compile(r"[^\s<>]+")
# A symbol must not contain a space: in pieces, a space is written as U+2581.
_NO_SYMBOL = re.compile(rf"[ {SPACE_SYMBOL}]")
_TAKEN_TAG_NAME = re.compile(r"eod|unk|reserved_\d+|0x[0-9A-F]{2}")

# The number of threads changes the order of sentencepiece's sums, and thus the vocabulary.
_TRAINING_THREADS = 16
# From this size on, sentencepiece's suffix array needs 64-bit indices.
_LARGE_CHARACTERS = 1 << 30


@dataclass(frozen=True)
class TrainingJob:
    """The arguments of the training process."""

    inputs: Mapping[str, Sequence[InputPath]]
    uses: Mapping[str, float]
    reading: Reading
    seed: int
    characters: int
    vocab_size: int
    library: Library
    model_type: ModelType
    tag_pieces: Sequence[str]
    user_symbols: Sequence[str]
    split_digits: bool


def train_tokenizer(
    inputs: Mapping[str, Sequence[InputPath]],
    out: Path,
    *,
    vocab_size: int,
    library: Library = "sentencepiece",
    model_type: ModelType | None = None,
    reading: Reading = Reading(),  # noqa: B008
    tags: Sequence[str] = (),
    reserved_tags: int = 16,
    user_symbols: Sequence[str] = (),
    chat: bool = False,
    split_digits: bool = True,
    max_sentences: int = 2_000_000,
    temperature: float = 3.3,
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> TokenizerRecord:
    """Train a tokenizer on the text of several languages and write its directory.

    So that low-resource languages get their part of the vocabulary, a language with n characters
    of text makes up a share p ∝ n^(1/temperature) of the training text: random sentences of the
    larger languages are left out, and sentences of the smaller ones are repeated. Text is not
    normalized, and characters outside the vocabulary are spelled in bytes, so encoding is
    lossless. The result depends only on the arguments and the text.

    Args:
        inputs: text files of each language, see `megaphase.data_tools.text`.
        out: the directory to write.
        vocab_size: number of ids, of which EOD, unknown, newline, tab, tags and bytes take
            260 + len(tags) + reserved_tags + len(user_symbols), 3 less in a byte-level BPE.
        library: "sentencepiece", or "tokenizers" for a byte-level BPE, whose directory
            `transformers` reads as it is.
        model_type: "unigram" or "bpe"; by default unigram with sentencepiece.
        reading: how the files' records become documents; not as pairs.
        tags: names of task tags; each gets a control token that no text encodes to.
        reserved_tags: number of control tokens to reserve for later tags.
        user_symbols: texts that get one token each, are never split and never merged with others.
        chat: whether to add the control tokens of conversations, and a chat template for them;
            with "tokenizers" alone.
        split_digits: whether every digit is its own token.
        max_sentences: maximum number of training lines, all languages together; bounds the memory.
        temperature: 1 keeps the languages' shares of the text; a higher one makes them more equal.
        seed: determines the choice of sentences.
        overwrite: whether an existing tokenizer may be replaced.
        console: where to show progress; None: do not show it.

    Raises InputError if an input or argument is invalid, or the text is too small or too varied
    for the vocabulary; RunError if the training process is killed.
    """
    check_inputs(inputs)
    if chat:
        if library != "tokenizers":
            problem = "conversations are tokenized with a tokenizer.json, which sentencepiece lacks"
            raise InputError("--chat", problem, "add --library tokenizers")
        tags = [*tags, *CHAT_TAGS]
    if library == "tokenizers" and model_type == "unigram":
        remedy = "leave it out, or use --library sentencepiece"
        raise InputError("--model-type", "the tokenizers library trains bpe here", remedy)
    for option, value, least in (
        ("--reserved-tags", reserved_tags, 0),
        ("--max-sentences", max_sentences, 1),
        ("--temperature", temperature, 1),
    ):
        if not value >= least:  # NaN is not
            raise InputError(option, f"{value} is too small", f"give {least} or more")
    _check_tags(tags)
    _check_user_symbols(user_symbols, tags)
    check_out(out, overwrite)
    surveys = survey_languages(inputs, reading, console)
    job = TrainingJob(
        inputs=inputs,
        uses=uses_per_sentence(surveys, temperature, max_sentences),
        reading=reading,
        seed=seed,
        characters=sum(survey.characters for survey in surveys.values()),
        vocab_size=vocab_size,
        library=library,
        model_type=model_type or "unigram",
        tag_pieces=[_tag_piece(tag) for tag in (*tags, *_reserved(reserved_tags))],
        user_symbols=user_symbols,
        split_digits=split_digits,
    )
    with console.status("training the tokenizer") if console else nullcontext():
        model = _train_in_process(job)
    with tokenizer_written_aside(out, overwrite) as aside:
        if library == "tokenizers":
            write_byte_level(aside, model.decode(), EOD_PIECE, CHAT_TEMPLATE if chat else None)
            tokenizer = Tokenizer.load(aside)
        else:
            tokenizer = _write_model(aside, model, job.model_type, tags, reserved_tags)
        record = _write_record(aside, tokenizer, surveys)
    return record


def check_inputs(inputs: Mapping[str, Sequence[InputPath]]) -> None:
    """Raise InputError unless there is text, in files that can be read twice."""
    if not inputs:
        raise InputError("--input", "no text was given", "pass --input LANGUAGE=FILE")
    for path in chain.from_iterable(inputs.values()):
        if path == STDIN:
            problem = "the text is read more than once"
            raise InputError(display_name(path), problem, "write it to a file first")
        check_text_file(path)


def _check_tags(tags: Sequence[str]) -> None:
    for i, tag in enumerate(tags):
        if not _TAG_NAME.fullmatch(tag):
            raise InputError("--tag", f"{tag!r} has spaces, < or >", "give a plain name like fr")
        if _TAKEN_TAG_NAME.fullmatch(tag) or tag in tags[:i]:
            raise InputError("--tag", f"the name {tag!r} is taken", "choose another")


def _check_user_symbols(symbols: Sequence[str], tags: Sequence[str]) -> None:
    for i, symbol in enumerate(symbols):
        if not symbol or _NO_SYMBOL.search(symbol):
            problem = f"{symbol!r} is empty or has a space"
            raise InputError("--user-symbol", problem, "give text without a space")
        name = symbol.removeprefix("<").removesuffix(">")
        is_control = symbol == _tag_piece(name) and (
            name in tags or _TAKEN_TAG_NAME.fullmatch(name) is not None
        )
        if is_control or symbol in symbols[:i] or symbol in _WHITESPACE_PIECES:
            raise InputError("--user-symbol", f"{symbol!r} is a token already", "leave it out")


@contextmanager
def tokenizer_written_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory, which takes the place of `out` when the block ends without an
    error; see `check_out`. A link keeps leading there."""
    out = real_path(out)
    old = removal_path(out)
    if old.exists() and not out.exists():  # an earlier call was killed between two renames
        os.rename(old, out)
    try:
        with directory_written_aside(out) as aside:
            yield aside
            check_out(out, overwrite)  # again: training takes a while
            if out.exists():
                remove_directory(old)
                os.rename(out, old)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    remove_directory(old)


def check_out(out: Path, overwrite: bool) -> None:
    """Replace a tokenizer only with `overwrite`, and anything else never."""
    if not out.is_dir():
        if out.exists():
            raise InputError(out, "exists and is not a directory", "choose another --out")
        return
    names = {path.name for path in out.iterdir()}
    known = {MODEL_NAME, RECORD_NAME, TOKENIZER_JSON_NAME, CONFIG_NAME, TEMPLATE_NAME}
    if RECORD_NAME in names:  # it may extend a tokenizer of a Hugging Face directory
        known.update((*COPIED_NAMES, MORE_TEMPLATES))
    if names - known:
        other = min(names - known)
        raise InputError(out, f"contains other files, such as {other}", "choose another --out")
    if names and not overwrite:
        raise InputError(out, "exists already", "pass --overwrite or choose another --out")


def survey_languages(
    inputs: Mapping[str, Sequence[InputPath]], reading: Reading, console: Console | None
) -> dict[str, Survey]:
    """Read the text of every language once."""
    total_bytes = sum(size_on_disk(path) for path in chain.from_iterable(inputs.values()))
    with reading_progress(console, "reading", total_bytes) as advance:
        return {
            language: survey_language(language, files, reading, advance)
            for language, files in inputs.items()
        }


def _train_in_process(job: TrainingJob) -> bytes:
    """Train in a separate process: sentencepiece cannot be interrupted, and the system may kill it
    when memory runs out."""
    try:
        (model,) = ordered_map(train_model, [job], workers=1)
    except RuntimeError as error:
        raise explained(error, job.vocab_size) from None
    return model


def train_model(job: TrainingJob) -> bytes:
    """Train and return the bytes of a sentencepiece model or a tokenizer.json."""
    if job.library == "tokenizers":
        control = [EOD_PIECE, *job.tag_pieces]
        whole = train_byte_level(
            _sentences(job), job.vocab_size, control, job.user_symbols, job.split_digits
        )
        return whole.encode()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(job),
        model_writer=model,
        model_type=job.model_type,
        vocab_size=job.vocab_size,
        # Lossless: decoding restores every character.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        # If it were not a piece, byte fallback would spell it, and decode a space as U+2581.
        required_chars=SPACE_SYMBOL,
        split_digits=job.split_digits,
        eos_id=0,
        eos_piece=EOD_PIECE,
        unk_id=1,
        unk_piece=UNKNOWN_PIECE,
        bos_id=-1,
        pad_id=-1,
        control_symbols=list(job.tag_pieces),
        user_defined_symbols=[*_WHITESPACE_PIECES, *job.user_symbols],
        num_threads=_TRAINING_THREADS,
        train_extremely_large_corpus=job.characters > _LARGE_CHARACTERS,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences(job: TrainingJob) -> Iterator[str]:
    return chain.from_iterable(
        sample_sentences(language, files, job.reading, job.uses[language], job.seed)
        for language, files in job.inputs.items()
    )


def explained(error: RuntimeError, vocab_size: int) -> InputError | RunError:
    """Translate sentencepiece's error to an error about the command's options."""
    message = " ".join(str(error).split())
    where, asked = "--vocab-size", f"{vocab_size:,}"
    if found := re.search(r"too high .* value <= (\d+)", message):
        most = int(found[1])
        problem = f"{asked} is more than this text supports"
        return InputError(where, problem, f"give more text or choose {most} or less")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        least = int(found[1])
        problem = f"{asked} has no room for the bytes, tags and characters of this text"
        return InputError(where, problem, f"choose {least} or more")
    if re.search(r"all_chars_count|!(seed_)?sentence(s_|pieces)\.empty", message):
        problem = "the text is too small to make pieces from"
        return InputError("--input", problem, "give more text")
    return RunError(f"sentencepiece failed: {message}")


def _write_model(
    directory: Path,
    model: bytes,
    model_type: ModelType,
    tags: Sequence[str],
    reserved_tags: int,
) -> Tokenizer:
    """Write a sentencepiece model and return the tokenizer."""
    path = directory / MODEL_NAME
    path.write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    record = TokenizerRecord(
        library_version=sentencepiece.__version__,
        algorithm=model_type,
        vocab_size=processor.get_piece_size(),
        eod=processor.piece_to_id(EOD_PIECE),
        tags={tag: processor.piece_to_id(_tag_piece(tag)) for tag in tags},
        reserved_tags=[processor.piece_to_id(_tag_piece(tag)) for tag in _reserved(reserved_tags)],
        tokenizer_hash=hash_file(path),
        languages={},
    )
    return Tokenizer(SentencePieceBackend(processor, record), record, directory)


def _write_record(
    directory: Path, tokenizer: Tokenizer, surveys: Mapping[str, Survey]
) -> TokenizerRecord:
    """Measure how well the tokenizer serves each language, and write its record."""
    languages = {
        name: measure_fertility(tokenizer, survey.evaluation_text, held_out=bool(survey.held_out))
        for name, survey in surveys.items()
    }
    record = tokenizer.record.model_copy(update={"languages": languages})
    atomic_write_json(directory / RECORD_NAME, record.model_dump())
    return record


def _tag_piece(tag: str) -> str:
    return f"<{tag}>"


def _reserved(count: int) -> list[str]:
    return [f"reserved_{i}" for i in range(count)]
