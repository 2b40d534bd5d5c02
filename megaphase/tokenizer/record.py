"""The record of a tokenizer: what it is, the ids that have a role, and how well it serves texts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

MODEL_NAME = "tokenizer.model"
TOKENIZER_JSON_NAME = "tokenizer.json"
RECORD_NAME = "megaphase_tokenizer.json"
REMEDY = "make the tokenizer with `megaphase tokenizer train`"

# sentencepiece writes a space as this character, and therefore reads the character as a space.
SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"


class Fertility(BaseModel):
    """Into how many tokens a tokenizer splits one language's text; few bytes per token are bad."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: float
    tokens_per_word: float
    spelled: float | None = None
    """Fraction of the tokens that encode characters missing from the vocabulary, as bytes or
    <unk>."""
    sample_bytes: int
    held_out: bool
    """Whether the sample was held out from the training text."""


class Extends(BaseModel):
    """The tokenizer that another one extends: their ids are the same below `vocab_size`.

    Attributes:
        tokenizer_hash: the fingerprint of the extended tokenizer, the base.
        vocab_size: the base's; the first new id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer_hash: str
    vocab_size: int


class TokenizerRecord(BaseModel):
    """`megaphase_tokenizer.json`, or the equivalent for a tokenizer from elsewhere.

    Attributes:
        library: the library that encodes.
        library_version: its version when the record was made; None in records of an earlier
            version.
        algorithm: the library's name of it: unigram, bpe, word or char; byte-level bpe.
        vocab_size: number of ids, added tokens included.
        eod: the id that ends a document.
        bos: the id that begins a document for models that were trained with one; None if there is
            none.
        adds_bos: whether the model was trained with `bos` before every document, as far as the
            tokenizer's files say.
        normalization: the steps that change a text before it is encoded; empty if there are none.
        left_out: parts of the tokenizer's files that are not used: what they would add does not
            depend on the text alone.
        tags: the id of each named control token.
        reserved_tags: ids of unnamed control tokens, for tags that a later task needs.
        tokenizer_hash: digest of what determines the ids: of a sentencepiece model's file and, if
            EOD or added tokens come from other files, of these too; of a `tokenizer.json`, its
            parts that are used.
        languages: how well each language is served, if Megaphase trained or extended the tokenizer.
        extends: the tokenizer that this one extends, if it does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    library: Literal["sentencepiece", "tokenizers"] = "sentencepiece"
    library_version: str | None = None
    algorithm: str
    vocab_size: int
    eod: int
    bos: int | None = None
    adds_bos: bool = False
    normalization: list[str] = []
    left_out: list[str] = []
    tags: dict[str, int]
    reserved_tags: list[int]
    tokenizer_hash: str
    languages: dict[str, Fertility]
    extends: Extends | None = None
