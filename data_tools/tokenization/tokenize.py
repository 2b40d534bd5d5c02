"""Tokenize text files to one corpus with several processes; a killed run can be resumed."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from megaphase.chats.encoder import ChatEncoder
from megaphase.chats.tokenizers_library import check_keeps_control_tokens
from megaphase.corpus import CorpusWriter, Manifest
from megaphase.corpus.manifest import ShardOf, corpus_file
from megaphase.corpus.staging import saved_documents
from megaphase.corpus.writer import CORPUS_SUFFIXES, refuse_existing, refuse_own_input
from megaphase.data_tools.corpora.input_removal import merge_for_job, merged_before
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.shards import WHOLE, ShardChoice, begun_shards, parts_of
from megaphase.data_tools.text import (
    CHUNK_BYTES,
    STDIN,
    InputPath,
    Reading,
    TextChunk,
    TextPosition,
    TextRange,
    can_be_ranged,
    check_reading,
    check_text_file,
    identity,
    ranges_of,
    read_chunks,
    size_on_disk,
)
from megaphase.data_tools.text.chunks import NoDocumentEnd
from megaphase.data_tools.text.prefetch import prefetched
from megaphase.data_tools.tokenization.chunk_encoder import ChunkEncoder
from megaphase.data_tools.tokenization.readers import reader_count, tokenize_parts
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import hash_json, remove_directory
from megaphase.utils.progress import Advance, reading_progress

# After this much text per worker, the output is flushed to disk and the progress is recorded.
SAVE_BYTES_PER_WORKER = 8 << 20
RANGE_BYTES = CHUNK_BYTES
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Tokenization:
    """The input and the options that determine a corpus.

    Attributes:
        tokenizer: made by `megaphase tokenizer train`, or an existing one.
        reading: how the files' records become documents.
        tag: for translation pairs, the id of the token between source and target.
        shard: the part of the files to tokenize.
        chats: encodes conversations, where `reading` reads them.
    """

    inputs: Sequence[InputPath]
    tokenizer: Tokenizer
    reading: Reading
    tag: int | None
    shard: ShardChoice
    chats: ChatEncoder | None

    @property
    def job(self) -> str:
        """A digest of everything but the shard, including the files' paths, sizes and change
        times, of remote ones their versions."""
        files = [identity(path) for path in self.inputs if path != STDIN]
        reading = asdict(self.reading)
        if self.chats is None:
            del reading["messages"]  # so that jobs begun before there were chats stay what they are
            template: dict[str, object] = {}
        else:
            chats = self.chats.template
            template = {"template": chats.text, "special_tokens": dict(chats.special_tokens)}
            if self.tokenizer.adds_bos:
                template["keeps_bos"] = True  # jobs of earlier versions left it out
        return hash_json(
            {
                "files": files,
                "tokenizer": self.tokenizer.fingerprint,
                "reading": reading,
                "tag": self.tag,
                **template,
                # By another number than in earlier versions, which gave readers other files.
                **({"by_file": 2} if self.shard.by_file else {}),
            }
        )

    @property
    def shard_record(self) -> ShardOf:
        """The record of this shard for the manifest."""
        return ShardOf(job=self.job, number=self.shard.number, of=self.shard.of)

    @property
    def shard_job(self) -> str:
        """A digest of everything, by which a killed writer's work is known; empty if the input
        cannot be read again."""
        return hash_json(self.shard_record.model_dump()) if self.can_be_resumed else ""

    @property
    def can_be_resumed(self) -> bool:
        """Whether the input can be read again."""
        return STDIN not in self.inputs


def tokenize(
    inputs: Sequence[InputPath],
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

    The result is the same for any number of workers, and for a run that was killed and started
    again: it resumes, and repeats at most 12 MB of text per worker. Memory does not grow with the
    input.

    Args:
        inputs: text files, see `megaphase.data_tools.text`.
        tokenizer_dir: made by `megaphase tokenizer train`, or a sentencepiece model.
        out: prefix of the corpus's files; that of a shard is `shard.prefix(out)`.
        reading: how the files' records become documents.
        tag: name of the token between the source and the target of translation pairs.
        workers: the maximum number of worker processes; this one reads and writes.
        shard: the part of the input to tokenize.
        drop_duplicates, shuffle_seed: see `merge`; the tokens are then written twice.
        skip_wrong: leave out documents that cannot be read, and list them in
            `PREFIX.skipped.jsonl`, instead of stopping at the first one.
        overwrite: whether an existing corpus may be replaced.
        console: where to show progress; None: do not show it.

    Raises InputError if an input or the tokenizer is invalid, no input contains text, or the
    corpus exists; RunError if a worker is killed or the disk is full. Only a hidden folder is left
    behind then, from which the same call resumes.
    """
    if workers < 1:
        raise InputError("--workers", f"{workers} is not a number of processes", "give 1 or more")
    for prefix in (out, shard.prefix(out)):
        refuse_own_input(prefix, inputs)
    tokenization = check_tokenization(inputs, tokenizer_dir, reading, tag, shard)
    if tokenization.chats is not None and console:
        for remark in tokenization.chats.remarks():
            where = tokenization.chats.template.source
            console.print(
                f"Warning: {where}: {remark}", soft_wrap=True, highlight=False, markup=False
            )
    in_order = not drop_duplicates and shuffle_seed is None
    if shard != WHOLE:
        if not in_order:
            problem = "--dedup and --shuffle need all shards"
            raise InputError("--shard", problem, "pass them to `megaphase data merge`")
        prefix = shard.prefix(out)
        if _is_whole(prefix, tokenization) and not overwrite:
            return Manifest.read(prefix)
        return _encode(tokenization, prefix, True, workers, skip_wrong, overwrite, console)
    prefix = out.with_name(f".{out.name}.unordered")
    job = hash_json([tokenization.job, drop_duplicates, shuffle_seed])
    if tokenization.can_be_resumed and (found := merged_before(job, out)):
        return found
    wanted = reader_count(inputs, workers)
    readers = _readers_begun(tokenization, out if in_order else prefix, prefix, wanted)
    if in_order and readers == 1:
        found = _encode(tokenization, out, False, workers, skip_wrong, overwrite, console)
        _remove_other_parts(prefix)
        return found
    if not overwrite:
        refuse_existing(out)
    at_once = min(readers, workers)
    part = partial(
        _encode_part, inputs, tokenizer_dir, reading, tag, prefix, workers // at_once, skip_wrong
    )
    if readers == 1:
        parts = [prefix]
        if not _is_whole(prefix, tokenization):
            _encode(tokenization, prefix, True, workers, skip_wrong, True, console)
    else:
        parts = [ShardChoice(number, readers).prefix(prefix) for number in range(readers)]
        tokenize_parts(part, readers, at_once, sum(map(size_on_disk, inputs)), console)
    _remove_other_parts(prefix, kept=parts)
    return merge_for_job(
        job,
        parts,
        out,
        drop_duplicates=drop_duplicates,
        shuffle_seed=shuffle_seed,
        overwrite=overwrite,
        console=console,
    )


def _readers_begun(tokenization: Tokenization, whole: Path, prefix: Path, wanted: int) -> int:
    """Return with how many readers to go on: with those of a killed run of the same job, since the
    parts of one number are of no use to another; with the `wanted` ones if none has saved text.

    whole: prefix of what one reader writes; prefix: of the parts that several write.
    """
    documents = Counter({wanted: 0})
    documents[1] += _saved_documents(tokenization, whole)
    for number, of in begun_shards(prefix):
        shard = ShardChoice(number, of, by_file=True)
        part = replace(tokenization, shard=shard)
        documents[of] += _saved_documents(part, shard.prefix(prefix))
    return max(documents, key=lambda readers: (documents[readers], readers == wanted))


def _saved_documents(tokenization: Tokenization, prefix: Path) -> int:
    if _is_whole(prefix, tokenization):
        return Manifest.read(prefix).documents
    return saved_documents(prefix, tokenization.shard_job)


def _remove_other_parts(prefix: Path, kept: Sequence[Path] = ()) -> None:
    """Remove what a killed run of another job left behind; kept: whole parts of this one."""
    files = {corpus_file(part, suffix) for part in kept for suffix in CORPUS_SUFFIXES}
    for path in prefix.parent.glob(f"{glob.escape(prefix.name)}.*"):
        if path not in files:
            path.unlink(missing_ok=True)
    for draft in prefix.parent.glob(f".{glob.escape(prefix.name)}.*draft"):
        remove_directory(draft)


def _encode_part(
    inputs: Sequence[InputPath],
    tokenizer_dir: Path,
    reading: Reading,
    tag: str | None,
    prefix: Path,
    workers: int,
    skip_wrong: bool,
    shard: ShardChoice,
    advance: Advance,
) -> None:
    """Tokenize a shard, unless that has been done, to the corpus with the prefix of that shard."""
    tokenization = check_tokenization(inputs, tokenizer_dir, reading, tag, shard)
    place = shard.prefix(prefix)
    if not _is_whole(place, tokenization):
        _encode(
            tokenization, place, True, workers, skip_wrong, True, None, nullcontext(advance)
        )  # fmt: skip


def check_tokenization(
    inputs: Sequence[InputPath],
    tokenizer_dir: Path,
    reading: Reading,
    tag: str | None,
    shard: ShardChoice,
) -> Tokenization:
    """Check everything that can be checked without reading text; raises InputError as
    `tokenize`."""
    if not inputs:
        raise InputError("", "no text file was given", "name at least one")
    for path in inputs:
        check_text_file(path)
    if shard != WHOLE and STDIN in inputs:
        raise InputError("--shard", "standard input cannot be divided", "write it to a file first")
    tokenizer = Tokenizer.load(tokenizer_dir)
    chats = None
    if reading.messages is not None:
        chats = ChatEncoder.load(tokenizer)
        check_keeps_control_tokens(tokenizer)
    return Tokenization(inputs, tokenizer, reading, _tag_id(tokenizer, reading, tag), shard, chats)


def _tag_id(tokenizer: Tokenizer, reading: Reading, tag: str | None) -> int | None:
    if reading.pair is None:
        if tag is not None:
            remedy = "leave it out, or give --source-key and --target-key"
            raise InputError("--tag", "only translation pairs have a tag", remedy)
        return None
    known = ", ".join(tokenizer.tags) or "none"
    remedy = f"the tokenizer's tags are {known}; `megaphase tokenizer train --tag` makes them"
    if tokenizer.reserved_tags:
        remedy += f", and reserved_0 to reserved_{len(tokenizer.reserved_tags) - 1} are free"
    if tag is None:
        raise InputError("--tag", "translation pairs need a tag for the target", remedy)
    reserved = {f"reserved_{i}": token for i, token in enumerate(tokenizer.reserved_tags)}
    ids = tokenizer.tags | reserved
    if tag not in ids:
        raise InputError("--tag", f"the tokenizer has no tag {tag!r}", remedy)
    return ids[tag]


def _is_whole(prefix: Path, tokenization: Tokenization) -> bool:
    """Return whether this part has already been tokenized."""
    try:
        shard = Manifest.read(prefix).shard
    except InputError:
        return False
    return tokenization.can_be_resumed and shard == tokenization.shard_record


def _encode(
    tokenization: Tokenization,
    prefix: Path,
    is_part: bool,
    workers: int,
    skip_wrong: bool,
    overwrite: bool,
    console: Console | None,
    progress: AbstractContextManager[Advance] | None = None,
) -> Manifest:
    """Write the corpus with this prefix, and resume if an earlier run of the same job was killed.

    Args:
        is_part: whether the manifest records which shard the corpus is.
        progress: yields the function to which progress is reported; shown on the console if not
            given.
    """
    shard = tokenization.shard
    writer = CorpusWriter(
        prefix,
        tokenizer_hash=tokenization.tokenizer.fingerprint,
        vocab_size=tokenization.tokenizer.vocab_size,
        eod=tokenization.tokenizer.eod,
        sources=["standard input" if path == STDIN else path.name for path in tokenization.inputs],
        kind=None if tokenization.chats is None else "chat",
        tag=tokenization.tag,
        chat_template=None if tokenization.chats is None else tokenization.chats.fingerprint,
        turn_end=None if tokenization.chats is None else tokenization.chats.turn_end,
        job=tokenization.shard_job,
        shard=tokenization.shard_record if is_part else None,
        with_origins=True,
        may_be_empty=shard != WHOLE,
        overwrite=overwrite,
    )
    encoder = ChunkEncoder(
        tokenization.tokenizer,
        tokenization.reading,
        tokenization.tag,
        skip_wrong,
        tokenization.chats,
    )
    total_bytes = sum(map(size_on_disk, tokenization.inputs)) // shard.of
    try:
        with writer, progress or reading_progress(console, "tokenizing", total_bytes) as advance:
            if writer.manifest is None:
                _write(writer, tokenization, encoder, workers, advance)
    except (InputError, RunError, KeyboardInterrupt) as error:
        if writer.saved_documents:
            skipped = skip_wrong or isinstance(error, NoDocumentEnd)
            _raise_with_resume_hint(error, writer.saved_documents, console, skipped=skipped)
        raise
    assert writer.manifest is not None
    return writer.manifest


def _raise_with_resume_hint(
    error: InputError | RunError | KeyboardInterrupt,
    documents: int,
    console: Console | None,
    *,
    skipped: bool,
) -> None:
    """Raise the error again with the number of saved documents; after Ctrl-C, print it.

    skipped: whether --on-error skip would not help.
    """
    if isinstance(error, InputError) and skipped:
        raise error
    saved = f"{documents:,} documents are tokenized and saved"
    if isinstance(error, InputError):
        go_on = "if a document is the cause, the same command with --on-error skip resumes there"
        raise InputError(error.where, error.problem, f"{error.remedy}; {saved}: {go_on}") from None
    if isinstance(error, RunError):
        raise RunError(f"{error}; {saved}: the same command resumes there") from None
    if console:
        console.print(f"{saved}: the same command resumes there", soft_wrap=True, highlight=False)


def _write(
    writer: CorpusWriter,
    tokenization: Tokenization,
    encoder: ChunkEncoder,
    workers: int,
    advance: Advance,
) -> None:
    note = writer.resumed or {"file": 0, "offset": 0, "line": 1, "file_bytes": 0}
    done_bytes = note["file_bytes"]
    advance(done_bytes, 0)
    unsaved = 0
    chunks = _chunks(tokenization, note, with_lines=encoder.skip_wrong)
    if tokenization.can_be_resumed:  # from a pipe, a thread could wait forever
        chunks = prefetched(chunks, _CHUNKS_AHEAD)
    with closing(chunks), closing(ordered_map(encoder, chunks, workers)) as encoded:
        for chunk in encoded:
            writer.add_batch(chunk.documents.batch)
            writer.count_skipped(empty=chunk.documents.empty)
            for line in chunk.wrong:
                writer.add_skipped(line)
            text_bytes = chunk.documents.batch.text_bytes
            advance(chunk.file_bytes, text_bytes)
            done_bytes += chunk.file_bytes
            unsaved += text_bytes
            if unsaved >= SAVE_BYTES_PER_WORKER * workers and tokenization.can_be_resumed:
                place = {"file": chunk.file, **asdict(chunk.end), "file_bytes": done_bytes}
                writer.save(place)
                unsaved = 0


def _chunks(
    tokenization: Tokenization, resume_at: dict[str, int], *, with_lines: bool
) -> Generator[tuple[int, TextChunk | TextRange], None, None]:
    """Yield the chunks of all files' parts, each with the file's index, from `resume_at` on.

    Of plain text files they are ranges of bytes, which workers read by themselves; with_lines: of
    no file, so that the numbers of lines are known everywhere.
    """
    for part in parts_of(tokenization.inputs, tokenization.shard):
        if part.file < resume_at["file"]:
            continue
        here = part.file == resume_at["file"]
        start = TextPosition(resume_at["offset"], resume_at["line"]) if here else TextPosition()
        path = tokenization.inputs[part.file]
        if isinstance(path, Path) and can_be_ranged(path) and not with_lines:
            check_text_file(path)
            check_reading(path, tokenization.reading)
            for each in ranges_of(path, max(part.begin, start.offset), part.end, RANGE_BYTES):
                yield part.file, each
            continue
        for chunk in read_chunks(
            path, tokenization.reading, start=start, begin=part.begin, end=part.end
        ):
            yield part.file, chunk
