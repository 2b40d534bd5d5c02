"""The texts on which a model is compared before and after its vocabulary is extended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from rich.table import Table

from megaphase.corpus import Corpus
from megaphase.data_tools.text import (
    InputPath,
    Reading,
    check_options,
    display_name,
    expand_inputs,
    read_chunks,
)
from megaphase.data_tools.text.records import read_documents
from megaphase.generation.text_loss import TextLoss
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

CHECKED_BYTES = 1 << 14
_COLUMNS = (
    "bits per byte before",
    "after",
    "after, new tokenizer",
    "tokens, old tokenizer",
    "tokens, new tokenizer",
)
_CAPTION = (
    "Before and after: the same text in the old tokenizer's tokens; new tokenizer: the text in its "
    "tokens. The tokens are those of the text, not of the vocabulary."
)


def check_texts(
    arguments: Sequence[str], base: Tokenizer, reading: Reading
) -> dict[str, list[str]]:
    """Return the first 16 KiB of text of each `LANGUAGE=FILE`; a file may be a corpus's prefix.

    base: the tokenizer of corpora, whose text is decoded.

    Raises:
        InputError: an argument is of another form, a file cannot be read or has no text, or a
            corpus is of another tokenizer.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        language, equals, file = argument.partition("=")
        if not (language and equals and file):
            problem = f"{argument!r} is not LANGUAGE=FILE"
            raise InputError("--check", problem, "write en=en.jsonl.gz")
        if language in named:
            raise InputError("--check", f"{language!r} is given twice", "leave one out")
        named[language] = file
    files = {file: expand_inputs([file]) for file in named.values() if not _is_corpus(file)}
    check_options(chain(*files.values()), reading)
    texts: dict[str, list[str]] = {}
    for language, file in named.items():
        paths = files.get(file)
        documents = _of_corpus(Path(file), base) if paths is None else _of_files(paths, reading)
        texts[language] = list(_first(documents))
        if not texts[language]:
            raise InputError(file, f"no text of {language!r}", "give a file that holds text")
    return texts


def _is_corpus(name: str) -> bool:
    return Path(f"{name}.idx").is_file()


def _of_files(files: Sequence[InputPath], reading: Reading) -> Iterator[str]:
    for chunk in chain.from_iterable(read_chunks(path, reading) for path in files):
        for document in read_documents(chunk, reading):
            assert isinstance(document, str)
            yield document


def _of_corpus(prefix: Path, base: Tokenizer) -> Iterator[str]:
    corpus = Corpus.open(prefix)
    if corpus.manifest.tokenizer_hash != base.fingerprint:
        problem = f"was tokenized with another tokenizer than {base.path}"
        raise InputError(display_name(prefix), problem, "give the text instead")
    for number in range(len(corpus.lengths)):
        yield base.decode(corpus.document(number))


def _first(documents: Iterator[str]) -> Iterator[str]:
    """Yield documents that are not empty up to `CHECKED_BYTES` bytes, of which the last is cut."""
    left = CHECKED_BYTES
    for document in documents:
        text = document.encode()[:left].decode(errors="ignore")
        if text:
            yield text
        left -= len(text.encode())
        if left <= 0 or text != document:
            return


def check_table(
    before: Mapping[str, TextLoss],
    after: Mapping[str, TextLoss],
    extended: Mapping[str, TextLoss],
) -> Table:
    """Return a table of the losses in bits per byte and the tokens, with a row per language.

    Args:
        before: of the model as it was.
        after: of the model with the new rows, on the same tokens.
        extended: of the model with the new rows, on the new tokenizer's tokens.
    """
    table = Table(
        title="Bits per byte before and after the extension",
        title_justify="left",
        caption=_CAPTION,
        caption_justify="left",
    )
    table.add_column("text")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name, old in before.items():
        new = extended[name]
        losses = (f"{each.bits_per_byte:.4f}" for each in (old, after[name], new))
        table.add_row(name, *losses, f"{old.tokens:,}", f"{new.tokens:,}")
    return table
