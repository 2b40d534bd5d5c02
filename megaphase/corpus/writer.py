"""Write a corpus atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megaphase.corpus.batch import DocumentBatch
from megaphase.corpus.block_sums import BlockSums
from megaphase.corpus.format import (
    HASH_DTYPE,
    LENGTH_DTYPE,
    SUM_DTYPE,
    document_hash,
    token_dtype,
    write_index,
)
from megaphase.corpus.manifest import (
    BLOCKS_SUFFIX,
    DATA_SUFFIXES,
    IDS_SUFFIX,
    MANIFEST_SUFFIX,
    SKIPPED_SUFFIX,
    SOURCES_SUFFIX,
    TARGETS_SUFFIX,
    CorpusKind,
    Manifest,
    ShardOf,
)
from megaphase.corpus.manifest import corpus_file as file_of
from megaphase.corpus.origins import Origins
from megaphase.corpus.staging import Figures, StagedCorpus
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import fsync_path, make_directory, real_path

_LENGTHS_NAME = "lengths"
_WRITTEN_AS_IT_COMES = (
    ".bin",
    ".hash",
    ".sum",
    BLOCKS_SUFFIX,
    SKIPPED_SUFFIX,
    _LENGTHS_NAME,
)
_NOT_IN_EVERY_CORPUS = (SKIPPED_SUFFIX, SOURCES_SUFFIX, IDS_SUFFIX, TARGETS_SUFFIX)
CORPUS_SUFFIXES = (MANIFEST_SUFFIX, *DATA_SUFFIXES, BLOCKS_SUFFIX, *_NOT_IN_EVERY_CORPUS)


class CorpusWriter:
    """Context manager that writes a corpus's files and, as the commit point, `PREFIX.json`.

    The files are written in a staging folder, hashed while they are written, and renamed when the
    block ends. If the block raises, nothing is left behind, except for the folder if a `job` has
    saved its state. Memory does not grow with the number of documents.

    Raises InputError if files with the prefix exist and `overwrite` is not set, if they cannot be
    created, if another process writes them, or, at the end, if no document was added; RunError if
    the disk is full.

    Attributes:
        dtype: dtype of the stored tokens: u16 for a vocabulary below 65,500, else i32.
        resumed: the note of the last `save` of a killed writer of the same job, or None.
        saved_documents: number of documents that a killed writer of the same job would keep.
        manifest: the result, set when the block has ended or, if only the renaming of the files
            was missing, at its start; no documents may be added then.
    """

    def __init__(
        self,
        prefix: Path | str,
        *,
        tokenizer_hash: str,
        vocab_size: int,
        eod: int,
        sources: Sequence[str] = (),
        kind: CorpusKind | None = None,
        tag: int | None = None,
        chat_template: str | None = None,
        turn_end: int | None = None,
        job: str = "",
        shard: ShardOf | None = None,
        with_origins: bool = False,
        may_be_empty: bool = False,
        overwrite: bool = False,
        before_publishing: Callable[[Manifest], object] = lambda _: None,
    ) -> None:
        """
        Args:
                kind: of the documents; translation where there is a tag, and lm otherwise, if not
                    given. Batches of chats have targets.
                tag: for translation pairs, the token between source and target.
                chat_template: for chats, the digest of the template that rendered them.
                turn_end: for chats, the token that ends the assistant's turns.
                job: identifies what is written, so that the work of a killed writer can be resumed.
                shard: identifies the shard, if the corpus is a shard of another one.
                with_origins: whether to store the documents' origins, as far as batches have them.
                may_be_empty: whether to write a corpus without documents, instead of raising.
                before_publishing: called when everything is written and on disk, but has not got
                    its name.
        """
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self.manifest: Manifest | None = None
        self.resumed: Any = None
        self.saved_documents = 0
        self._fixed: dict[str, Any] = {
            "tokenizer_hash": tokenizer_hash,
            "vocab_size": vocab_size,
            "eod": eod,
            "dtype": self.dtype.name,
            "sources": list(sources),
            "kind": kind or ("lm" if tag is None else "translation"),
            "tag": tag,
            "chat_template": chat_template,
            "turn_end": turn_end,
            "shard": shard,
        }
        self._eod = eod
        self._may_be_empty, self._with_origins = may_be_empty, with_origins
        self._with_targets = kind == "chat"
        self._before_publishing = before_publishing
        self._figures = Figures()
        self._staged = StagedCorpus(self.prefix, job)
        if not overwrite and not self._staged.finished_manifest():
            refuse_existing(self.prefix)

    @property
    def documents(self) -> int:
        """Number of documents added so far."""
        return self._figures.documents

    def __enter__(self) -> CorpusWriter:
        make_directory(self.prefix.parent)
        with ExitStack() as opened:
            try:
                opened.enter_context(self._staged)
                state = self._staged.state
                if state:
                    self.resumed, self._figures = state.note, state.figures
                if state and state.manifest:
                    self._publish(state.manifest)
                else:
                    more = [SOURCES_SUFFIX, IDS_SUFFIX] if self._with_origins else []
                    more += [TARGETS_SUFFIX] if self._with_targets else []
                    for suffix in (*_WRITTEN_AS_IT_COMES, *more):
                        self._staged.open(suffix)
                    self._block_sums = BlockSums.at_end_of(self._staged.files[".bin"].path)
            except OSError as error:
                problem = f"cannot be written ({error.strerror})"
                raise InputError(self.prefix, problem, "choose another --out") from None
            self.saved_documents = self._figures.documents
            self._opened = opened.pop_all()
        return self

    def add_document(self, tokens: Sequence[int] | np.ndarray, text: str) -> None:
        """Add one document: its tokens [n], without EOD, and its text."""
        utf8 = text.encode()
        stored = np.empty(len(tokens) + 1, dtype=self.dtype)
        stored[:-1] = tokens
        stored[-1] = self._eod
        hashes = np.frombuffer(document_hash(utf8), dtype=HASH_DTYPE)
        self.add_batch(DocumentBatch.of(stored, np.array([len(stored)]), hashes, [len(utf8)]))

    def add_batch(self, batch: DocumentBatch) -> None:
        """Add documents whose tokens are already joined, EODs included."""
        if not len(batch.lengths) == len(batch.hashes) == len(batch.sums):
            found = f"{len(batch.lengths)} lengths, {len(batch.hashes)} hashes"
            raise ValueError(f"{found}, {len(batch.sums)} sums")
        if int(batch.lengths.sum(dtype=np.int64)) != len(batch.tokens):
            raise ValueError(f"lengths do not sum to the {len(batch.tokens)} tokens")
        if self._with_targets != (batch.targets is not None):
            raise ValueError("batches of chats, and no others, have targets")
        files = self._staged.files
        tokens = np.ascontiguousarray(batch.tokens, dtype=self.dtype).view(np.uint8)
        with write_errors(self.prefix):
            files[".bin"].write(tokens)
            files[BLOCKS_SUFFIX].write(self._block_sums.add(tokens))
            for name, array, dtype in (
                (".hash", batch.hashes, HASH_DTYPE),
                (".sum", batch.sums, SUM_DTYPE),
                (_LENGTHS_NAME, batch.lengths, LENGTH_DTYPE),
            ):
                files[name].write(np.ascontiguousarray(array, dtype=dtype).view(np.uint8))
            if batch.targets is not None:
                files[TARGETS_SUFFIX].write(np.ascontiguousarray(batch.targets, dtype=np.uint8))
            if self._with_origins:
                origins = batch.origins or Origins.unknown(len(batch.lengths))
                stored = origins.stored(files[IDS_SUFFIX].size)
                files[SOURCES_SUFFIX].write(stored.view(np.uint8))
                files[IDS_SUFFIX].write(np.ascontiguousarray(origins.ids))
        figures = self._figures
        figures.documents += len(batch.lengths)
        figures.tokens += len(batch.tokens)
        figures.text_bytes += batch.text_bytes

    def count_skipped(self, *, empty: int = 0, duplicates: int = 0) -> None:
        """Count documents that were left out; see Manifest."""
        self._figures.skipped_empty += empty
        self._figures.skipped_duplicates += duplicates

    def add_skipped(self, line: bytes) -> None:
        """Count a document that could not be read, and add its line to `.skipped.jsonl`."""
        with write_errors(self.prefix):
            self._staged.files[SKIPPED_SUFFIX].write(line)
        self._figures.skipped_wrong += 1

    def save(self, note: Any) -> None:
        """Flush the added documents to disk; if killed later, a writer of the same job resumes from
        here, with `note` as `resumed`."""
        with write_errors(self.prefix):
            self._staged.save(self._figures, note)
        self.saved_documents = self._figures.documents

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._opened:
            if kind is None and self.manifest is None:
                with write_errors(self.prefix):
                    self._commit()

    def _commit(self) -> None:
        if self._figures.documents == 0 and not self._may_be_empty:
            skipped = self._skipped_in_words()
            self._staged.discard()
            raise InputError(
                self.prefix, f"the corpus would be empty{skipped}", "give files that hold text"
            )
        self._staged.files[BLOCKS_SUFFIX].write(self._block_sums.end())
        lengths_file = self._staged.files.pop(_LENGTHS_NAME)
        lengths_file.record()
        lengths_file.close()
        write_index(self._staged.open(".idx").write, self.dtype, _mapped_lengths(lengths_file.path))
        if not self._figures.skipped_wrong:
            self._staged.files.pop(SKIPPED_SUFFIX).close()
        records = {suffix: file.record() for suffix, file in self._staged.files.items()}
        files = {suffix: records[suffix] for suffix in sorted(records)}
        manifest = Manifest(**self._fixed, **self._figures.model_dump(), files=files)
        self._staged.save(self._figures, None, manifest)
        self._before_publishing(manifest)
        self._publish(manifest)

    def _skipped_in_words(self) -> str:
        """Return how many documents could not be read, and why the first of them; or nothing."""
        count = self._figures.skipped_wrong
        if not count:
            return ""
        file = self._staged.files[SKIPPED_SUFFIX]
        file.record()
        with open(file.path, encoding="utf-8") as lines:
            first = json.loads(next(lines))
        all_of = f"all {count:,} documents were" if count > 1 else "the only document was"
        return f": {all_of} skipped, the first because {first['where']} {first['problem']}"

    def _publish(self, manifest: Manifest) -> None:
        """Rename the files to their final names, even if a killed writer renamed some of them."""
        # An old manifest must never exist next to new data.
        file_of(self.prefix, MANIFEST_SUFFIX).unlink(missing_ok=True)
        fsync_path(self.prefix.parent)
        for suffix in _NOT_IN_EVERY_CORPUS:
            if suffix not in manifest.files:
                file_of(self.prefix, suffix).unlink(missing_ok=True)
        try:
            for suffix in manifest.files:
                # A file that is missing here was already renamed.
                with suppress(FileNotFoundError):
                    os.replace(self._staged.folder / suffix, file_of(self.prefix, suffix))
            fsync_path(self.prefix.parent)
            manifest.write(self.prefix)
        except BaseException:
            if not self._staged.job:
                for suffix in manifest.files:
                    file_of(self.prefix, suffix).unlink(missing_ok=True)
            raise
        self._staged.discard()
        self.manifest = manifest


@contextmanager
def write_errors(prefix: Path) -> Iterator[None]:
    """Turn OSErrors into a RunError that names the corpus."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{prefix}: cannot be written ({error.strerror})") from None


def _mapped_lengths(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, LENGTH_DTYPE)
    return np.memmap(path, dtype=LENGTH_DTYPE, mode="r")


def refuse_existing(prefix: Path) -> None:
    """Raise InputError if a file of the corpus exists, even an incomplete one."""
    for suffix in CORPUS_SUFFIXES:
        path = file_of(prefix, suffix)
        if os.path.lexists(path):
            raise InputError(path, "exists already", "pass --overwrite or choose another --out")


def refuse_own_input(prefix: Path, inputs: Iterable[object]) -> None:
    """Raise InputError if a file of the corpus would take the place of one of its inputs, of which
    those that are paths are files."""
    own = {real_path(file_of(prefix, suffix)) for suffix in CORPUS_SUFFIXES}
    for path in inputs:
        if isinstance(path, Path) and real_path(path) in own:
            problem = "is a text to be read, and the corpus would take its place"
            raise InputError(path, problem, "choose another --out")
