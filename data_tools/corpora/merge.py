"""Merge several corpora that were made with one tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from megaphase.corpus import Corpus, CorpusWriter, DocumentBatch, Manifest
from megaphase.corpus.manifest import (
    MANIFEST_SUFFIX,
    SKIPPED_SUFFIX,
    SOURCES_SUFFIX,
    corpus_file,
)
from megaphase.corpus.origins import Origins
from megaphase.corpus.writer import write_errors
from megaphase.data_tools.corpora.duplicates import find_duplicates
from megaphase.data_tools.corpora.shuffle import is_sorted_on_disk, shuffled
from megaphase.data_tools.corpora.verify import Advance, checked_batches, size_of
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import real_path
from megaphase.utils.open_files import allow_many_open_files
from megaphase.utils.progress import reading_progress

_FILES_OF_A_CORPUS = 8  # at most, that are open at a time
_READ_DOCUMENTS = 1 << 20  # at a time


def merge(
    prefixes: Sequence[Path],
    out: Path,
    *,
    drop_duplicates: bool = False,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    before_publishing: Callable[[Manifest], object] = lambda _: None,
    console: Console | None = None,
) -> Manifest:
    """Write the documents of all corpora, in order, into the corpus with the prefix `out`.

    The result equals that of tokenizing all the sources at once. Each corpus is verified while it
    is read. Memory does not grow with the corpora.

    Args:
        drop_duplicates: whether to leave out a document that repeats an earlier one.
        shuffle_seed: put the documents into a random order that depends only on this seed.
        before_publishing: see CorpusWriter.

    Raises InputError, and leaves nothing behind, if a corpus is damaged, is named twice, was made
    with another tokenizer or holds another kind of documents than the first; if conversations
    have different chat templates; if shards of a corpus are missing; or if `out` exists. Raises
    RunError if the disk has too little space, before anything but keys of documents is written.
    """
    if not prefixes:
        raise InputError("", "no corpus was given", "name at least one prefix")
    _check_distinct(prefixes)
    manifests = [Manifest.read(prefix) for prefix in prefixes]
    _check_alike(prefixes, manifests)
    _check_shards(prefixes, manifests)
    allow_many_open_files(_FILES_OF_A_CORPUS * len(prefixes))
    # A shard may contain no documents, and an empty corpus cannot be opened.
    corpora = [
        Corpus.open(prefix)
        for prefix, manifest in zip(prefixes, manifests, strict=True)
        if manifest.documents or not manifest.shard
    ]
    first = manifests[0]
    names = _sources(manifests)
    writer = CorpusWriter(
        out,
        tokenizer_hash=first.tokenizer_hash,
        vocab_size=first.vocab_size,
        eod=first.eod,
        sources=names,
        kind=first.kind,
        tag=first.tag,
        # If one of them is not known, the template of all is not.
        chat_template=first.chat_template
        if all(manifest.chat_template == first.chat_template for manifest in manifests)
        else None,
        turn_end=first.turn_end if len({each.turn_end for each in manifests}) == 1 else None,
        with_origins=any(SOURCES_SUFFIX in manifest.files for manifest in manifests),
        overwrite=overwrite,
        before_publishing=before_publishing,
    )
    size = sum(map(size_of, corpora))
    with writer, write_errors(out), reading_progress(console, "merging", size) as advance:
        batches = _checked(corpora, names, lambda size: advance(size, size))
        needed, tokens = size, sum(corpus.tokens.nbytes for corpus in corpora)
        if drop_duplicates:
            is_duplicate = find_duplicates(corpora, out.parent)
            writer.count_skipped(duplicates=int(is_duplicate.sum()))
            batches = _without(is_duplicate, batches)
            needed = tokens = _bytes_of_tokens(corpora, is_duplicate)
        if shuffle_seed is not None:
            needed += tokens if is_sorted_on_disk(tokens) else 0
            batches = shuffled(batches, tokens, shuffle_seed, out.parent)
        _check_space(out, needed)
        for batch in batches:
            writer.add_batch(batch)
        for prefix, manifest in zip(prefixes, manifests, strict=True):
            _take_over_skipped(prefix, manifest, writer)
    assert writer.manifest is not None
    return writer.manifest


def _bytes_of_tokens(corpora: Sequence[Corpus], drop: np.ndarray) -> int:
    """Return the size of the documents' tokens without the documents marked in `drop`."""
    size = first = 0
    for corpus in corpora:
        for start in range(0, len(corpus.lengths), _READ_DOCUMENTS):
            lengths = corpus.lengths[start : start + _READ_DOCUMENTS]
            kept = ~drop[first : first + len(lengths)]
            size += int(lengths[kept].sum(dtype=np.int64)) * corpus.tokens.itemsize
            first += len(lengths)
    return size


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise RunError(
            f"{out}: the corpus needs {needed / 1e9:,.3f} GB, the disk has {free / 1e9:,.3f} GB "
            "left; make room or choose another --out"
        )


def remove_files(prefix: Path, suffixes: Iterable[str]) -> None:
    """Remove the manifest and the data files of a corpus that have these suffixes."""
    for suffix in (MANIFEST_SUFFIX, *suffixes):
        corpus_file(prefix, suffix).unlink(missing_ok=True)


def _sources(manifests: Sequence[Manifest]) -> list[str]:
    """The names of the sources: of shards those of all, as they are, since each lists them all and
    two may have one name; else every name once."""
    jobs = {None if each.shard is None else each.shard.job for each in manifests}
    if len(jobs) == 1 and None not in jobs:
        return manifests[0].sources
    return list(dict.fromkeys(chain.from_iterable(each.sources for each in manifests)))


def _checked(
    corpora: Sequence[Corpus], names: Sequence[str], advance: Advance
) -> Iterator[DocumentBatch]:
    """Yield all documents with their source files renumbered to indices into `names`; either all
    of them have origins or none has."""
    numbers = {name: number for number, name in enumerate(names)}
    with_origins = any(corpus.origins is not None for corpus in corpora)
    for corpus in corpora:
        sources = corpus.manifest.sources
        # Two sources of a name are told apart by their places, which are the same in all shards.
        own = range(len(names)) if sources == names else [numbers[name] for name in sources]
        here = np.array(own, np.uint32)
        for batch in checked_batches(corpus, advance):
            if not with_origins:
                yield batch
            elif batch.origins is None:
                yield replace(batch, origins=Origins.unknown(len(batch.lengths)))
            else:
                yield replace(batch, origins=batch.origins.renumbered(here))


def _without(drop: np.ndarray, batches: Iterator[DocumentBatch]) -> Iterator[DocumentBatch]:
    """Drop the documents that are marked in `drop`, bool [documents of all batches]."""
    first = 0
    for batch in batches:
        dropped = np.asarray(drop[first : first + len(batch.lengths)])
        first += len(batch.lengths)
        yield batch.select(~dropped) if dropped.any() else batch


def _take_over_skipped(prefix: Path, manifest: Manifest, writer: CorpusWriter) -> None:
    """Copy a corpus's record of skipped documents: their number, and the list of invalid ones."""
    writer.count_skipped(empty=manifest.skipped_empty, duplicates=manifest.skipped_duplicates)
    if SKIPPED_SUFFIX in manifest.files:
        with open(corpus_file(prefix, SKIPPED_SUFFIX), "rb") as lines:
            for line in lines:
                writer.add_skipped(line)


def _check_distinct(prefixes: Sequence[Path]) -> None:
    seen = set()
    for prefix in prefixes:
        if real_path(prefix) in seen:
            raise InputError(prefix, "the corpus is named twice", "name it once")
        seen.add(real_path(prefix))


def _check_alike(prefixes: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.tokenizer_hash != first.tokenizer_hash:
            problem = f"was made with another tokenizer than {prefixes[0]}"
            raise InputError(prefix, problem, "tokenize it again with the same one")
        if manifest.dtype != first.dtype:
            problem = f"its tokens are {manifest.dtype}, those of {prefixes[0]} {first.dtype}"
            raise InputError(prefix, problem, "tokenize both with the same tokenizer")
        if (manifest.kind, manifest.tag) != (first.kind, first.tag):
            problem = f"holds {_kind(manifest)}, {prefixes[0]} {_kind(first)}"
            raise InputError(prefix, problem, "keep them as two tasks")
    _check_templates(prefixes, manifests)


def _check_templates(prefixes: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    found: dict[str, Path] = {}  # by template; corpora of earlier versions have no record of it
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.chat_template is not None:
            found.setdefault(manifest.chat_template, prefix)
    if len(found) > 1:
        first, second, *_ = found.values()
        problem = f"its conversations have another chat template than those of {first}"
        raise InputError(second, problem, "tokenize both with the same one")


def _kind(manifest: Manifest) -> str:
    if manifest.kind == "chat":
        return "conversations"
    return "texts" if manifest.tag is None else f"translation pairs with the tag {manifest.tag}"


def _check_shards(prefixes: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raise InputError unless all shards of a corpus are merged together, in order."""
    expected = None
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        shard = manifest.shard
        if expected and shard != expected:
            problem = f"shard {expected.number} of {expected.of} is expected here"
            raise InputError(prefix, problem, "name all shards of one tokenization in their order")
        if shard and not expected and shard.number != 0:
            problem = f"is shard {shard.number} of {shard.of}, and the ones before it are missing"
            raise InputError(prefix, problem, "name all shards, in their order")
        expected = None
        if shard and shard.number + 1 < shard.of:
            expected = shard.model_copy(update={"number": shard.number + 1})
    if expected:
        where = corpus_file(prefixes[-1], MANIFEST_SUFFIX)
        problem = f"shard {expected.number} of {expected.of} is missing after it"
        raise InputError(where, problem, "name all shards, in their order")
