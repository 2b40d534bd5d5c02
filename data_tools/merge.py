"""Several corpora of one tokenizer to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from megaphase.corpus import Corpus, CorpusWriter, DocumentBatch, Manifest
from megaphase.data_tools.progress import reading_progress
from megaphase.data_tools.verify import verify
from megaphase.errors import InputError

_BATCH_TOKENS = 1 << 20


def merge(
    prefixes: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Write the documents of all corpora, in order, into the corpus with the prefix `out`.

    The result is what tokenizing all the sources at once would have given. Each corpus is
    verified first. Memory does not grow with the corpora's tokens.

    Raises InputError where a corpus is damaged, stands twice, or was made with another tokenizer
    than the first, or `out` exists. Nothing is left behind then.
    """
    if not prefixes:
        raise InputError("", "no corpus was given", "name at least one prefix")
    corpora = [Corpus.open(prefix) for prefix in prefixes]
    _check_distinct(prefixes)
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.manifest.tokenizer_hash != first.manifest.tokenizer_hash:
            problem = f"was made with another tokenizer than {first.prefix}"
            raise InputError(corpus.prefix, problem, "tokenize it again with the same one")
    writer = CorpusWriter(
        out,
        tokenizer_hash=first.manifest.tokenizer_hash,
        vocab_size=first.manifest.vocab_size,
        eod=first.manifest.eod,
        sources=list(chain.from_iterable(corpus.manifest.sources for corpus in corpora)),
        overwrite=overwrite,
    )
    for prefix in prefixes:
        verify(prefix, console)
    total_bytes = sum(corpus.tokens.nbytes for corpus in corpora)
    with writer, reading_progress(console, "merging", total_bytes) as advance:
        for batch in chain.from_iterable(map(_batches, corpora)):
            writer.add_batch(batch)
            advance(batch.tokens.nbytes, batch.tokens.nbytes)
    assert writer.manifest is not None
    return writer.manifest


def _check_distinct(prefixes: Sequence[Path]) -> None:
    seen = set()
    for prefix in prefixes:
        if prefix.resolve() in seen:
            raise InputError(prefix, "the corpus stands twice", "name it once")
        seen.add(prefix.resolve())


def _batches(corpus: Corpus) -> Iterator[DocumentBatch]:
    """All documents, some at a time; the corpus's own figures are counted with the first."""
    start = 0
    while start < len(corpus.lengths):
        lengths = corpus.lengths[start : start + _BATCH_TOKENS]
        ends = np.cumsum(lengths, dtype=np.int64)
        count = max(int(np.searchsorted(ends, _BATCH_TOKENS, side="right")), 1)
        first_token = int(corpus.byte_offsets[start]) // corpus.tokens.itemsize
        yield DocumentBatch(
            tokens=corpus.tokens[first_token : first_token + int(ends[count - 1])],
            lengths=lengths[:count],
            hashes=corpus.hashes[start : start + count],
            text_bytes=corpus.manifest.text_bytes if start == 0 else 0,
            skipped_empty=corpus.manifest.skipped_empty if start == 0 else 0,
            skipped_wrong=corpus.manifest.skipped_wrong if start == 0 else 0,
        )
        start += count
