"""Split a corpus into a part for training and a held-out part."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megaphase.corpus import Corpus, CorpusWriter, Manifest
from megaphase.corpus.manifest import SOURCES_SUFFIX
from megaphase.data_tools.corpora.verify import checked_batches, size_of
from megaphase.plan.split import held_out_hashes
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path
from megaphase.utils.progress import reading_progress


def split(
    prefix: Path,
    train: Path,
    held_out: Path,
    fraction: float,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Manifest, Manifest]:
    """Write the documents whose hash is below the `fraction` of all hashes into `held_out`.

    These are the documents that training with this `validation.fraction` or `held_out` holds out.
    The order of the documents is kept, and the corpus is verified while it is read.

    Returns the manifests of `train` and `held_out`. Raises InputError, and leaves neither behind,
    if the corpus is damaged, a part would be empty, or one of them exists.
    """
    if not 0 < fraction < 1:
        raise InputError("--fraction", f"{fraction:g} is not between 0 and 1", "give, say, 0.01")
    places = [real_path(path) for path in (prefix, train, held_out)]
    if len(set(places)) < len(places):
        problem = "--train, --held-out and the corpus must be three different prefixes"
        raise InputError(prefix, problem, "choose other prefixes")
    corpus = Corpus.open(prefix)
    writers = [_writer(corpus, path, overwrite) for path in (train, held_out)]
    hashes = held_out_hashes(fraction)
    with (
        writers[0],
        writers[1],
        reading_progress(console, "splitting", size_of(corpus)) as advance,
    ):
        for batch in checked_batches(corpus, lambda size: advance(size, size)):
            is_held_out = hashes.holds(batch.hashes)
            writers[0].add_batch(batch.select(~is_held_out))
            writers[1].add_batch(batch.select(is_held_out))
        _check_parts(writers, prefix, fraction)
    manifests = [writer.manifest for writer in writers]
    assert manifests[0] is not None
    assert manifests[1] is not None
    return manifests[0], manifests[1]


def _check_parts(writers: list[CorpusWriter], prefix: Path, fraction: float) -> None:
    """Raise InputError if a part is empty, before either is published."""
    documents = [writer.documents for writer in writers]
    if 0 in documents:
        part = "holds out none" if documents[1] == 0 else "holds out all"
        problem = f"{fraction:g} {part} of the {sum(documents):,} documents of {prefix}"
        raise InputError("--fraction", problem, "raise it" if documents[1] == 0 else "lower it")


def _writer(corpus: Corpus, out: Path, overwrite: bool) -> CorpusWriter:
    manifest = corpus.manifest
    return CorpusWriter(
        out,
        tokenizer_hash=manifest.tokenizer_hash,
        vocab_size=manifest.vocab_size,
        eod=manifest.eod,
        sources=manifest.sources,
        kind=manifest.kind,
        tag=manifest.tag,
        chat_template=manifest.chat_template,
        turn_end=manifest.turn_end,
        with_origins=SOURCES_SUFFIX in manifest.files,
        overwrite=overwrite,
    )
