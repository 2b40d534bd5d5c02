"""`PREFIX.json`: the properties of a corpus, and digests with which altered files are found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json
from megaphase.utils.json_models import read_record, write_record

DATA_SUFFIXES = (".bin", ".idx", ".hash", ".sum")
BLOCKS_SUFFIX = ".blocks"
TARGETS_SUFFIX = ".targets"  # of chats alone
SKIPPED_SUFFIX = ".skipped.jsonl"
SOURCES_SUFFIX, IDS_SUFFIX = ".sources", ".ids"  # see megaphase.corpus.origins
MANIFEST_SUFFIX = ".json"

CorpusKind = Literal["lm", "translation", "chat"]
Count = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
# The suffixes are used in file names.
Suffix = Annotated[str, Field(pattern=r"\A(\.[a-z]+)+\z")]


def corpus_file(prefix: Path | str, suffix: str) -> Path:
    """Return `PREFIX` + suffix; the prefix may contain dots."""
    return Path(f"{prefix}{suffix}")


class FileRecord(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Count
    hash: str


class ShardOf(BaseModel):
    """Identifies a corpus as one shard of another one.

    Attributes:
        job: digest of the text files and options; the same for all shards of one corpus.
        number: index of the shard, from 0.
        of: number of shards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    number: Count
    of: Count


class Manifest(BaseModel):
    """The properties of a corpus.

    Attributes:
        tokenizer_hash: digest of the `tokenizer.model` that made the tokens.
        vocab_size: number of token ids; all tokens are below it.
        eod: the id that ends each document.
        dtype: numpy's name for the dtype of the tokens in the .bin: uint16 or int32.
        documents: number of documents; texts without a token are not stored.
        skipped_empty: number of texts without a token.
        skipped_wrong: number of documents that were left out because they could not be read.
        skipped_duplicates: number of documents left out because they repeat an earlier one.
        tokens: number of tokens, EODs included.
        text_bytes: size of the documents' UTF-8 text in bytes.
        files: size and digest of each data file, and of `.blocks`, `.targets`, `.sources`, `.ids`
            and `.skipped.jsonl` if they exist, by suffix.
        sources: names of the files that contained the text.
        kind: `lm` if a document is a text; `translation` if it is a source, the tag and a target,
            and `.hash` stores the digest of the source alone; `chat` if it is a conversation: then
            `.targets` marks the tokens of the assistant, and `.hash` stores the digest of what
            precedes its first answer.
        tag: the token between source and target; None if the kind is another.
        chat_template: of chats, the digest of the template that rendered them; None in corpora of
            earlier versions.
        turn_end: of chats, the control token with which the chat template ends the assistant's
            turns; None if it has none, and in corpora of earlier versions.
        shard: identifies the shard, if the corpus is a shard of another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    tokenizer_hash: str
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31, strict=True)]
    eod: TokenId
    dtype: Literal["uint8", "int8", "int16", "uint16", "int32", "int64"]
    documents: Count
    skipped_empty: Count = 0
    skipped_wrong: Count = 0
    skipped_duplicates: Count = 0
    tokens: Count
    text_bytes: Count
    files: dict[Suffix, FileRecord]
    sources: list[str]
    kind: CorpusKind = "lm"
    tag: TokenId | None = None
    chat_template: str | None = None
    turn_end: TokenId | None = None
    shard: ShardOf | None = None

    @property
    def fingerprint(self) -> str:
        """A digest that changes with any byte of the corpus."""
        suffixes = (*DATA_SUFFIXES, TARGETS_SUFFIX)
        return hash_json({s: self.files[s].hash for s in suffixes if s in self.files})

    @classmethod
    def read(cls, prefix: Path | str) -> Manifest:
        """Read `PREFIX.json`; raise InputError if it is missing, damaged or altered."""
        path = corpus_file(prefix, MANIFEST_SUFFIX)
        if not path.is_file():
            raise InputError(path, "no such file", _remedy_for_missing(Path(prefix)))
        manifest = read_record(path, cls, "tokenize again")
        needed = (*DATA_SUFFIXES, TARGETS_SUFFIX) if manifest.kind == "chat" else DATA_SUFFIXES
        missing = [suffix for suffix in needed if suffix not in manifest.files]
        if missing:
            raise InputError(path, f"files: {missing[0]} is not listed", "tokenize again")
        return manifest

    def write(self, prefix: Path | str) -> None:
        """Write `PREFIX.json` atomically."""
        write_record(corpus_file(prefix, MANIFEST_SUFFIX), self)


def _remedy_for_missing(prefix: Path) -> str:
    if prefix.suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX):
        return f"give the corpus's prefix, {prefix.with_suffix('')}"
    if corpus_file(prefix, ".bin").exists():
        return "without it the corpus is incomplete: tokenize again"
    return "make the corpus with `megaphase data tokenize`"
