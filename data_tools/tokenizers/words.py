"""Cut encoded text into words, which are sequences of pieces that may be merged with each other."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

import tokenizers
from sentencepiece import SentencePieceProcessor

from megaphase.tokenizer import SPACE_SYMBOL

Words = Counter[tuple[str, ...]]

_BATCH = 1000
_BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
# Within words: they join characters of Indic and Arabic scripts, and of emoji.
_JOINERS = "\u200c\u200d"


def words_of_pre_tokenizer(
    encoder: tokenizers.Tokenizer, sentences: Iterable[str]
) -> Counter[tuple[str, ...]]:
    """Return the words into which a tokenizer's own pre-tokenizer cuts text."""
    words: Words = Counter()
    for batch in _batches(sentences):
        for encoding in encoder.encode_batch(batch, add_special_tokens=False):
            begin, places = 0, encoding.word_ids
            pieces = encoding.tokens
            for end in range(1, len(pieces) + 1):
                if end == len(pieces) or places[end] != places[begin]:
                    if end > begin + 1:
                        words[tuple(pieces[begin:end])] += 1
                    begin = end
    return words


def words_of_characters(
    encoder: tokenizers.Tokenizer | SentencePieceProcessor,
    sentences: Iterable[str],
    vocabulary: Collection[str],
    unmerged: Collection[str],
) -> tuple[Counter[tuple[str, ...]], set[str]]:
    """Return the words of a model whose pieces are characters: cut before spaces and between
    letters and other characters; digits are not merged.

    Args:
        vocabulary: the texts of all pieces.
        unmerged: pieces that are never merged with others.

    Returns:
        The words, and the characters in them that are absent from the vocabulary.
    """
    words: Words = Counter()
    absent: set[str] = set()
    for batch in _batches(sentences):
        for pieces in _pieces_of(encoder, batch):
            spelled = list(_with_characters(pieces, vocabulary, absent))
            cut = map(tuple, _cut(spelled, unmerged))
            words.update(word for word in cut if len(word) > 1 or word[0] in absent)
    return words, absent


def _pieces_of(
    encoder: tokenizers.Tokenizer | SentencePieceProcessor, texts: list[str]
) -> Iterable[Sequence[str]]:
    if isinstance(encoder, SentencePieceProcessor):
        encoded: list[list[str]] = encoder.encode(texts, out_type=str, num_threads=1)
        return encoded
    return (it.tokens for it in encoder.encode_batch(texts, add_special_tokens=False))


def _with_characters(
    pieces: Sequence[str], vocabulary: Collection[str], absent: set[str]
) -> Iterator[str]:
    """Yield the pieces, with characters instead of their bytes or of an unknown piece."""
    spelled = bytearray()
    for piece in (*pieces, ""):
        if piece in _BYTE_PIECES and piece in vocabulary:
            spelled.append(_BYTE_PIECES[piece])
            continue
        for character in (spelled.decode("utf-8", "ignore"), "" if piece in vocabulary else piece):
            absent.update(character)
            yield from character
        spelled.clear()
        if piece and piece in vocabulary:
            yield piece


def _cut(pieces: Sequence[str], unmerged: Collection[str]) -> Iterator[list[str]]:
    """Yield the words."""
    word: list[str] = []
    kind = ""
    for piece in pieces:
        first, last = _kinds(piece)
        alone = piece in unmerged or first == "number"
        if word and (alone or piece.startswith(SPACE_SYMBOL) or kind not in ("", first)):
            yield word
            word = []
        word.append(piece)
        kind = "alone" if alone else last
    if word:
        yield word


def _kinds(piece: str) -> tuple[str, str]:
    """Return whether a piece begins and ends with letters, numbers or others; nothing for
    spaces."""
    text = piece.lstrip(SPACE_SYMBOL)
    return (_kind(text[0]), _kind(text[-1])) if text else ("", "")


def _kind(character: str) -> str:
    if character in _JOINERS:
        return "letter"
    category = unicodedata.category(character)[0]
    return {"L": "letter", "M": "letter", "N": "number"}.get(category, "other")


def _batches(sentences: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(sentences)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
