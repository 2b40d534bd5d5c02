"""Text files to one corpus, with several processes; a killed one goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from megaphase.corpus import CorpusWriter, Manifest
from megaphase.corpus.manifest import ShardOf
from megaphase.corpus.writer import refuse_existing
from megaphase.data_tools.corpora.merge import merge, remove_corpus
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.shards import WHOLE, ShardChoice, parts_of
from megaphase.data_tools.text import (
    STDIN,
    Reading,
    TextChunk,
    TextPosition,
    check_text_file,
    read_chunks,
    size_on_disk,
)
from megaphase.data_tools.tokenization.chunk_encoder import ChunkEncoder
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import hash_json, real_path
from megaphase.utils.progress import Advance, reading_progress

# After so much text a worker, what was done is forced to the disk and noted.
SAVE_BYTES_PER_WORKER = 8 << 20


@dataclass(frozen=True)
class Tokenization:
    """What is to be tokenized, and how; the same always gives the same corpus.

    Attributes:
        tokenizer: made by `megaphase tokenizer train`, or another's.
        reading: how the files' records become documents.
        tag: of translation pairs, the token between source and target.
        shard: the part of the files.
    """

    inputs: Sequence[Path]
    tokenizer: Tokenizer
    reading: Reading
    tag: int | None
    shard: ShardChoice

    @property
    def job(self) -> str:
        """A digest of all this but the shard: the files by place, size and time of change."""
        status = [(str(real_path(path)), path.stat()) for path in self.inputs if path != STDIN]
        return hash_json(
            {
                "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in status],
                "tokenizer": self.tokenizer.fingerprint,
                "reading": asdict(self.reading),
                "tag": self.tag,
            }
        )

    @property
    def shard_record(self) -> ShardOf:
        """What the manifest of this part says."""
        return ShardOf(job=self.job, number=self.shard.number, of=self.shard.of)

    @property
    def can_be_resumed(self) -> bool:
        """Whether the same text can be read again."""
        return STDIN not in self.inputs


def tokenize(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    out: Path,
    *,
    reading: Reading = Reading(),  # noqa: B008
    tag: str | None = None,
    workers: int,
    shard: ShardChoice = WHOLE,
    drop_duplicates: bool = False,
    shuffle_seed: int | None = None,
    skip_wrong: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Tokenize the documents of `inputs`, in order, into the corpus with the prefix `out`.

    The files are the same for every number of workers, and for a run that was killed and started
    again: it goes on where it was, having lost 12 MB of text a worker at most. Memory does not grow
    with the input.

    Args:
        inputs: text files, see `megaphase.data_tools.text`.
        tokenizer_dir: made by `megaphase tokenizer train`, or a sentencepiece model.
        out: prefix of the corpus's files; a shard's is `shard.prefix(out)`.
        reading: how the files' records become documents.
        tag: name of the token between the source and the target of translation pairs.
        workers: most processes that encode; this one reads and writes.
        shard: the part of the input to tokenize.
        drop_duplicates, shuffle_seed: see `merge`; the tokens are then written twice.
        skip_wrong: whether a document that cannot be read is left out, and written to
            `PREFIX.skipped.jsonl`, instead of ending it all.
        overwrite: whether an existing corpus may be replaced.
        console: where to show progress; nothing is shown without one.

    Raises InputError where an input or the tokenizer is wrong, no input holds text, or the corpus
    exists; RunError where a worker is killed or the disk is full. Nothing is left behind then but
    the hidden folder from which the same tokenization goes on.
    """
    if workers < 1:
        raise InputError("--workers", f"{workers} is no number of processes", "give 1 or more")
    what = check_tokenization(inputs, tokenizer_dir, reading, tag, shard)
    in_order = not drop_duplicates and shuffle_seed is None
    if shard != WHOLE:
        if not in_order:
            problem = "a shard knows nothing of the others: it takes no --dedup and no --shuffle"
            raise InputError("--shard", problem, "give these to `megaphase data merge`")
        prefix = shard.prefix(out)
        if _is_whole(prefix, what) and not overwrite:
            return Manifest.read(prefix)
        return _encode(what, prefix, True, workers, skip_wrong, overwrite, console)
    if in_order:
        return _encode(what, out, False, workers, skip_wrong, overwrite, console)
    if not overwrite:
        refuse_existing(out)
    unordered = out.with_name(f".{out.name}.unordered")
    if not _is_whole(unordered, what):
        _encode(what, unordered, True, workers, skip_wrong, True, console)
    manifest = merge(
        [unordered],
        out,
        drop_duplicates=drop_duplicates,
        shuffle_seed=shuffle_seed,
        overwrite=overwrite,
        console=console,
    )
    remove_corpus(unordered)
    return manifest


def check_tokenization(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    reading: Reading,
    tag: str | None,
    shard: ShardChoice,
) -> Tokenization:
    """Check all that can be checked without reading text; see `tokenize`."""
    if not inputs:
        raise InputError("", "no text file was given", "name at least one")
    for path in inputs:
        check_text_file(path)
    if shard != WHOLE and STDIN in inputs:
        raise InputError("--shard", "standard input cannot be divided", "write it to a file first")
    tokenizer = Tokenizer.load(tokenizer_dir)
    return Tokenization(inputs, tokenizer, reading, _tag_id(tokenizer, reading, tag), shard)


def _tag_id(tokenizer: Tokenizer, reading: Reading, tag: str | None) -> int | None:
    if reading.pair is None:
        if tag is not None:
            remedy = "leave it out, or give --source-key and --target-key"
            raise InputError("--tag", "only translation pairs have one", remedy)
        return None
    there = ", ".join(tokenizer.tags) or "none"
    remedy = f"the tokenizer's tags are {there}; `megaphase tokenizer train --tag` makes them"
    if tokenizer.reserved_tags:
        remedy += f", and reserved_0 to reserved_{len(tokenizer.reserved_tags) - 1} are free"
    if tag is None:
        raise InputError("--tag", "translation pairs need the target's tag", remedy)
    reserved = {f"reserved_{i}": token for i, token in enumerate(tokenizer.reserved_tags)}
    ids = tokenizer.tags | reserved
    if tag not in ids:
        raise InputError("--tag", f"the tokenizer has no tag {tag!r}", remedy)
    return ids[tag]


def _is_whole(prefix: Path, what: Tokenization) -> bool:
    """Whether this part was tokenized already."""
    try:
        shard = Manifest.read(prefix).shard
    except InputError:
        return False
    return what.can_be_resumed and shard == what.shard_record


def _encode(
    what: Tokenization,
    prefix: Path,
    is_part: bool,
    workers: int,
    skip_wrong: bool,
    overwrite: bool,
    console: Console | None,
) -> Manifest:
    """Write the corpus with this prefix, from where a killed run of the same was.

    Args:
        is_part: whether the manifest says of what it is a part.
    """
    shard = what.shard
    writer = CorpusWriter(
        prefix,
        tokenizer_hash=what.tokenizer.fingerprint,
        vocab_size=what.tokenizer.vocab_size,
        eod=what.tokenizer.eod,
        sources=["standard input" if path == STDIN else path.name for path in what.inputs],
        tag=what.tag,
        job=hash_json(what.shard_record.model_dump()) if what.can_be_resumed else "",
        shard=what.shard_record if is_part else None,
        with_origins=True,
        may_be_empty=shard != WHOLE,
        overwrite=overwrite,
    )
    encoder = ChunkEncoder(what.tokenizer, what.reading, what.tag, skip_wrong)
    total_bytes = sum(map(size_on_disk, what.inputs)) // shard.of
    try:
        with writer, reading_progress(console, "tokenizing", total_bytes) as advance:
            if writer.manifest is None:
                _write(writer, what, encoder, workers, advance)
    except (InputError, RunError, KeyboardInterrupt) as error:
        if writer.saved_documents:
            _raise_with_resume_hint(error, writer.saved_documents, console)
        raise
    assert writer.manifest is not None
    return writer.manifest


def _raise_with_resume_hint(
    error: InputError | RunError | KeyboardInterrupt, documents: int, console: Console | None
) -> None:
    """Raise the error again with what is saved; say it where Ctrl-C was pressed."""
    saved = f"{documents:,} documents are tokenized and saved"
    if isinstance(error, InputError):
        go_on = "if a document is at fault, the same command with --on-error skip goes on there"
        raise InputError(error.where, error.problem, f"{error.remedy}; {saved}: {go_on}") from None
    if isinstance(error, RunError):
        raise RunError(f"{error}; {saved}: the same command goes on there") from None
    if console:
        console.print(f"{saved}: the same command goes on there", soft_wrap=True, highlight=False)


def _write(
    writer: CorpusWriter, what: Tokenization, encoder: ChunkEncoder, workers: int, advance: Advance
) -> None:
    note = writer.resumed or {"file": 0, "offset": 0, "line": 1, "file_bytes": 0}
    done_bytes = note["file_bytes"]
    advance(done_bytes, 0)
    unsaved = 0
    with closing(ordered_map(encoder, _chunks(what, note), workers)) as encoded:
        for chunk in encoded:
            writer.add_batch(chunk.documents.batch)
            writer.count_skipped(empty=chunk.documents.empty)
            for line in chunk.wrong:
                writer.add_skipped(line)
            text_bytes = chunk.documents.batch.text_bytes
            advance(chunk.file_bytes, text_bytes)
            done_bytes += chunk.file_bytes
            unsaved += text_bytes
            if unsaved >= SAVE_BYTES_PER_WORKER * workers and what.can_be_resumed:
                place = {"file": chunk.file, **asdict(chunk.end), "file_bytes": done_bytes}
                writer.save(place)
                unsaved = 0


def _chunks(what: Tokenization, begin: dict[str, int]) -> Iterator[tuple[int, TextChunk]]:
    """The chunks of all files' parts, each with its file's number, from a saved place on."""
    for part in parts_of(what.inputs, what.shard):
        if part.file < begin["file"]:
            continue
        here = part.file == begin["file"]
        start = TextPosition(begin["offset"], begin["line"]) if here else TextPosition()
        path = what.inputs[part.file]
        for chunk in read_chunks(path, what.reading, start=start, begin=part.begin, end=part.end):
            yield part.file, chunk
