"""The work of one worker of `megaphase data tokenize`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megaphase.chats.encoder import ChatEncoder, EncodedChat
from megaphase.chats.template import ChatError
from megaphase.data_tools.corpora.encoded import EncodedDocuments, join_chats, join_documents
from megaphase.data_tools.text import (
    Chat,
    InvalidDocument,
    Reading,
    SourceTarget,
    TextChunk,
    TextPosition,
    TextRange,
    identified_and_wrong_ones,
    identified_documents,
)
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


@dataclass(frozen=True)
class EncodedChunk:
    """The result of encoding a chunk of a file.

    Attributes:
        file: index of the file.
        end: the position in the file at which the chunk ends.
        file_bytes: bytes on disk that the chunk took.
        wrong: a line of `.skipped.jsonl` for each document that could not be read.
    """

    file: int
    end: TextPosition
    file_bytes: int
    documents: EncodedDocuments
    wrong: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class ChunkEncoder:
    """Tokenizes the documents of a chunk of a text file; pickled as the tokenizer's path.

    A document that cannot be read raises InputError or, with `skip_wrong`, is recorded in the
    result. `tag` is the token between the source and the target of a pair; `chats` encodes
    conversations.
    """

    tokenizer: Tokenizer
    reading: Reading
    tag: int | None = None
    skip_wrong: bool = False
    chats: ChatEncoder | None = None

    def __call__(self, numbered: tuple[int, TextChunk | TextRange]) -> EncodedChunk:
        """Encode a chunk, or the documents of a range, given with the index of its file."""
        file, given = numbered
        chunk = given.chunk(self.reading) if isinstance(given, TextRange) else given
        read = identified_and_wrong_ones if self.skip_wrong else identified_documents
        texts: list[str] = []
        pairs: list[SourceTarget] = []
        conversations: list[EncodedChat] = []
        ids: list[bytes] = []
        wrong: list[bytes] = []
        for found in read(chunk, self.reading):
            if isinstance(found, InvalidDocument):
                wrong.append(_skipped_line(found))
                continue
            document, own_id = found
            if isinstance(document, Chat):
                encoded = self._encode_chat(document)
                if isinstance(encoded, InvalidDocument):
                    wrong.append(_skipped_line(encoded))
                    continue
                conversations.append(encoded)
            elif isinstance(document, SourceTarget):
                pairs.append(document)
            else:
                texts.append(document)
            ids.append(own_id)
        if self.reading.messages is not None:
            documents = join_chats(conversations, self.tokenizer, ids, file)
        elif self.reading.pair is not None:
            documents = self.encode_pairs(pairs, ids, file)
        else:
            documents = self.encode(texts, ids, file)
        return EncodedChunk(file, chunk.end, chunk.file_bytes, documents, wrong)

    def _encode_chat(self, chat: Chat) -> EncodedChat | InvalidDocument:
        """Raises InputError if a conversation cannot be encoded, or returns why."""
        assert self.chats is not None
        try:
            return self.chats.encode(chat.messages)
        except ChatError as error:
            if self.skip_wrong:
                return InvalidDocument(chat.where(), str(error), _text(chat.messages))
            remedy = "mend it, or pass --on-error skip"
            raise InputError(chat.where(), str(error), remedy) from None

    def encode(self, texts: Sequence[str], ids: Sequence[bytes], file: int) -> EncodedDocuments:
        """Tokenize texts with these ids from the file with index `file`."""
        utf8 = [text.encode() for text in texts]
        tokens = self.tokenizer.encode_arrays(texts)
        return join_documents(tokens, utf8, list(map(len, utf8)), self.tokenizer, ids, file)

    def encode_pairs(
        self, pairs: Sequence[SourceTarget], ids: Sequence[bytes], file: int
    ) -> EncodedDocuments:
        """Tokenize pairs as source, tag, target; the document hash is that of the source."""
        assert self.tag is not None
        tag = np.array([self.tag], dtype=np.int32)
        sides = [*(pair.source for pair in pairs), *(pair.target for pair in pairs)]
        encoded = self.tokenizer.encode_arrays(sides)
        both = zip(encoded[: len(pairs)], encoded[len(pairs) :], strict=True)
        tokens = [
            np.concatenate([source, tag, target]) if len(source) and len(target) else source[:0]
            for source, target in both
        ]
        sources = [pair.source.encode() for pair in pairs]
        sizes = [len(pair.source.encode()) + len(pair.target.encode()) for pair in pairs]
        return join_documents(tokens, sources, sizes, self.tokenizer, ids, file)


def _text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as JSON; of what is nested too deeply for that, only roles and contents."""
    try:
        return json.dumps(messages, ensure_ascii=False)
    except RecursionError:
        plain = [{key: message[key] for key in ("role", "content")} for message in messages]
        return json.dumps(plain, ensure_ascii=False)


def _skipped_line(document: InvalidDocument) -> bytes:
    """Return the line of a document in `.skipped.jsonl`."""
    line = f"{json.dumps(asdict(document), ensure_ascii=False)}\n"
    # A lone surrogate, which UTF-8 cannot represent, is written as its escape.
    return line.encode(errors="backslashreplace")
