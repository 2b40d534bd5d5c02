"""Text files to one corpus, with several processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

from rich.console import Console

from megaphase.corpus import CorpusWriter, Manifest
from megaphase.data_tools.chunk_encoder import ChunkEncoder
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.progress import reading_progress
from megaphase.data_tools.skipped import SkippedDocuments
from megaphase.data_tools.text_files import check_text_file, read_chunks
from megaphase.errors import InputError
from megaphase.tokenizer import Tokenizer


def tokenize(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    out: Path,
    *,
    json_key: str = "text",
    workers: int,
    skip_wrong: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Tokenize the documents of `inputs`, in order, into the corpus with the prefix `out`.

    The files are the same for every number of workers. Memory does not grow with the input.

    Args:
        inputs: text files, see `megaphase.data_tools.text_files`.
        tokenizer_dir: made by `megaphase tokenizer train`.
        out: prefix of the corpus's files.
        json_key: which string of a JSON object is the text.
        workers: most processes that encode; this one reads and writes.
        skip_wrong: whether a document that cannot be read is left out, and written to
            `PREFIX.skipped.jsonl`, instead of ending it all.
        overwrite: whether an existing corpus may be replaced.
        console: where to show progress; nothing is shown without one.

    Raises InputError where an input or the tokenizer is wrong, no input holds text, or the corpus
    exists; RunError where a worker is killed or the disk is full. Nothing is left behind then.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    if not inputs:
        raise InputError("", "no text file was given", "name at least one")
    if workers < 1:
        raise InputError("--workers", f"{workers} is no number of processes", "give 1 or more")
    for path in inputs:
        check_text_file(path)
    writer = CorpusWriter(
        out,
        tokenizer_hash=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        sources=[path.name for path in inputs],
        overwrite=overwrite,
    )
    chunks = chain.from_iterable(read_chunks(path) for path in inputs)
    encoded = ordered_map(ChunkEncoder(tokenizer, json_key, skip_wrong), chunks, workers)
    total_bytes = sum(path.stat().st_size for path in inputs)
    progress = reading_progress(console, "tokenizing", total_bytes)
    with SkippedDocuments(out) as skipped, writer, closing(encoded), progress as advance:
        for chunk in encoded:
            writer.add_batch(chunk.batch)
            skipped.add(chunk.wrong)
            advance(chunk.file_bytes, chunk.batch.text_bytes)
    assert writer.manifest is not None
    return writer.manifest
