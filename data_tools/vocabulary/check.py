"""The texts on which a model is compared before and after its vocabulary is extended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from rich.table import Table

from megaphase.corpus import Corpus
from megaphase.data_tools.options import by_language
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
    """Return the first 16 KiB of text of each language of `LANGUAGE=FILE`.

    A file may be a corpus's prefix. The text of a language with several files is that of one after
    the other, corpora last.

    base: the tokenizer of corpora, whose text is decoded.

    Raises:
        InputError: an argument is of another form, a file cannot be read or has no text, or a
            corpus is of another tokenizer.
    """
    named = by_language(arguments, "--check")
    files = {
        language: expand_inputs([name for name in names if not _is_corpus(name)])
        for language, names in named.items()
    }
    check_options(chain(*files.values()), reading)
    texts: dict[str, list[str]] = {}
    for language, names in named.items():
        corpora = (_of_corpus(Path(name), base) for name in names if _is_corpus(name))
        texts[language] = list(_first(chain(_of_files(files[language], reading), *corpora)))
        if not texts[language]:
            where = ", ".join(names)
            raise InputError(where, f"no text of {language!r}", "give a file that holds text")
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
