"""Read a tokenizer.json, the format of the Hugging Face `tokenizers` library.

The library's own way of handling control tokens is not used: it would find them in texts. They are
taken out of what the library is given, so that no text can encode to one; apart from that, a text's
ids are those of the file. Truncation, padding, dropout and the post-processor (which adds BOS or
EOS) are not used either.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megaphase.tokenizer.hugging_face_files import (
    CONFIG_NAME,
    RESERVED,
    HuggingFaceFiles,
    processors,
    steps_of,
    tag_name,
)
from megaphase.tokenizer.record import (
    RECORD_NAME,
    REMEDY,
    SPACE_SYMBOL,
    TOKENIZER_JSON_NAME,
    TokenizerRecord,
)
from megaphase.tokenizer.spelling import BYTE_OF
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json

# Pre-tokenizers that drop white space, so that texts would not come back.
_LOSSY = frozenset(("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"))
_EVERY_KIND_OF_CHARACTER = "".join(map(chr, (*range(1, 0x3400), *range(0x1F300, 0x1F700))))
# Bytes that UTF-8 never has.
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))

BYTE_LEVEL = "byte-level bpe"

_REMEDY = "give a byte-level BPE or BPE with byte fallback, or a directory with a tokenizer.model"


@dataclass(frozen=True)
class EncodingModel:
    """What encodes.

    Attributes:
        encoder: the library's tokenizer, without control tokens.
        vocabulary: the text of each token in the vocabulary, by its id, control tokens included.
        bytes_of: the bytes that each token stands for; not of control tokens.
        byte_fallback: whether characters outside the vocabulary are spelled in bytes.
        exact_bytes: whether a text's bytes are those of its tokens.
    """

    encoder: tokenizers.Tokenizer
    vocabulary: dict[int, str]
    bytes_of: dict[int, bytes]
    byte_fallback: bool
    exact_bytes: bool


def read_tokenizer_json(directory: Path) -> tuple[EncodingModel, TokenizerRecord]:
    """Load the tokenizer.json of a Hugging Face directory.

    Raises InputError if it is damaged, is of a kind with which texts would not come back or whose
    encoding cannot be followed, or there is no EOD.
    """
    return _TokenizerJson(directory, HuggingFaceFiles(directory)).load()


def read_own_json(
    directory: Path, record: TokenizerRecord
) -> tuple[EncodingModel, TokenizerRecord]:
    """Load the tokenizer.json of a directory made by Megaphase.

    Raises InputError as `read_tokenizer_json`, or if the file is not the one that the record
    describes or the record names tokens that it does not have.
    """
    if not (directory / TOKENIZER_JSON_NAME).is_file():
        raise InputError(directory / TOKENIZER_JSON_NAME, "no such file", REMEDY)
    # EOD is the record's: `eos_token` may be the end of a turn, as chat models name it there.
    files = _TokenizerJson(directory, HuggingFaceFiles(directory), record.eod)
    model, found = files.load()
    path = directory / RECORD_NAME
    if found.tokenizer_hash != record.tokenizer_hash:
        problem = f"is not the tokenizer that {RECORD_NAME} describes"
        raise InputError(directory / TOKENIZER_JSON_NAME, problem, REMEDY)
    controls = {found.eod, *files.control.values()}
    named = [record.eod, *record.tags.values(), *record.reserved_tags]
    if record.vocab_size != found.vocab_size or not controls.issuperset(named):
        raise InputError(path, "names tokens that the tokenizer does not have", REMEDY)
    if len(set(named)) < len(named):
        raise InputError(path, "gives a token two roles", REMEDY)
    return model, record


class _TokenizerJson:
    """A tokenizer.json with what the other files of its directory say about its tokens."""

    def __init__(self, directory: Path, files: HuggingFaceFiles, eod: int | None = None) -> None:
        """eod: the id that ends a document, where it does not depend on the files."""
        self._given_eod = eod
        self.path = directory / TOKENIZER_JSON_NAME
        self.directory = directory
        self.files = files
        self.whole = files.whole
        self.model: dict[str, Any] = self.whole.get("model") or {}
        self._check_model()
        self.roles = files.roles()
        self.unknown: str | None = self.model.get("unk_token")
        special = {*files.special, *self.roles.values()}
        self.control = {
            text: token
            for text, token in files.added_tokens.items()
            if text != self.unknown and (text in special or RESERVED.fullmatch(text))
        }
        # Some files name a token of the vocabulary as EOS or BOS without adding it.
        for text in self.roles.values():
            if text != self.unknown and text in files.pieces:
                self.control.setdefault(text, files.pieces[text])

    def load(self) -> tuple[EncodingModel, TokenizerRecord]:
        """Return the encoding model and the record."""
        eod = self._eod()
        parts = self._encoding_parts()
        try:
            encoder = tokenizers.Tokenizer.from_str(_json_text(parts))
        except Exception as error:  # the library raises plain Exceptions
            problem = f"the tokenizers library cannot read it: {error}"
            raise InputError(self.path, problem, "copy the tokenizer again") from None
        vocabulary = {token: text for text, token in self.files.pieces.items()}
        vocabulary |= {token: text for text, token in self.files.added_tokens.items()}
        bytes_of = self._bytes_of(vocabulary)
        normalization = _normalization(parts["normalizer"])
        adds_space = _adds_space(encoder, bytes_of)
        if adds_space:
            normalization = [*normalization, "a space before the text"]
        self._check_lossless(bytes_of, vocabulary)
        model = EncodingModel(
            encoder,
            vocabulary,
            bytes_of,
            byte_fallback=self._byte_level or bool(self.model.get("byte_fallback")),
            exact_bytes=self._byte_level and not normalization,
        )
        return model, self._record(parts, eod, normalization, max(vocabulary) + 1)

    def _check_model(self) -> None:
        """Raise InputError unless a text's ids depend on it alone and it comes back from them."""
        kind = self.model.get("type") or ("BPE" if "merges" in self.model else None)
        unknown, merges = self.model.get("unk_token"), self.model.get("merges") or []
        is_model = (
            isinstance(self.model.get("vocab"), (dict, list))
            and isinstance(unknown, str | None)
            and isinstance(merges, list)
            and all(_is_merge(merge) for merge in merges)
        )
        if not is_model or kind is None:
            raise InputError(self.path, "is not a tokenizer", "copy the tokenizer again")
        if kind != "BPE":
            raise InputError(self.path, f"is of the kind {kind}, which is not supported", _REMEDY)
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                problem = f"its {key} {self.model[key]!r} hides where texts have spaces"
                raise InputError(self.path, problem, _REMEDY)
        for step in steps_of(self.whole.get("pre_tokenizer")):
            if step["type"] in _LOSSY or _removes_text(step):
                problem = f"its pre-tokenizer {step['type']} drops white space"
                raise InputError(self.path, problem, _REMEDY)

    @property
    def _byte_level(self) -> bool:
        steps = (
            *steps_of(self.whole.get("normalizer")),
            *steps_of(self.whole.get("pre_tokenizer")),
        )
        return any(step["type"] == "ByteLevel" for step in steps)

    def _eod(self) -> int:
        """Return the id of the model's own end-of-document token."""
        given = self._given_eod
        if given is not None and given in self.control.values():
            return given
        text = self.files.document_end(self.control)
        if text is not None and text in self.control:
            return self.control[text]
        token = None if text is not None else self.files.id_in_config("eos_token_id")
        known = {*self.files.pieces.values(), *self.files.added_tokens.values()}
        if token is None or token not in known:
            remedy = "name an eos_token in tokenizer_config.json"
            raise InputError(self.directory, "has no token that can end a document", remedy)
        texts = {**self.files.pieces, **self.files.added_tokens}
        self.control.setdefault(next(t for t, i in texts.items() if i == token), token)
        return token

    def _bos(self) -> int | None:
        text = self.roles.get("bos")
        return None if text is None else self.control.get(text)

    def _encoding_parts(self) -> dict[str, Any]:
        """Return the JSON of the tokenizer without control tokens and non-local parts."""
        gone = {*self.control, self.unknown}
        vocabulary = {t: i for t, i in self.model["vocab"].items() if t not in self.control}
        added = [
            token for token in self.whole.get("added_tokens") or [] if token["content"] not in gone
        ]
        # The library takes an added token's id from the vocabulary, and else counts on.
        vocabulary |= {token["content"]: token["id"] for token in added}
        model = self.model | {"type": "BPE", "dropout": None, "vocab": vocabulary}
        merges = [_pair(merge) for merge in self.model.get("merges") or []]
        model["merges"] = [pair for pair in merges if not gone & {*pair, "".join(pair)}]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": self.whole.get("normalizer"),
            "pre_tokenizer": self._pre_tokenizer(),
            "post_processor": None,
            "decoder": None,
            "model": model,
        }

    def _pre_tokenizer(self) -> Any:
        """Return the pre-tokenizer, of which tokenizer_config.json must not say otherwise:
        transformers 4 follows that, transformers 5 does not; in a sequence neither does."""
        whole, said = self.whole.get("pre_tokenizer"), self.files.config.get("add_prefix_space")
        if said is not None and whole and whole["type"] == "ByteLevel":
            own = whole.get("add_prefix_space", True)
            if bool(said) is not own:
                raise InputError(
                    f"{self.directory / CONFIG_NAME}: add_prefix_space",
                    f"is {json.dumps(said)}, but {TOKENIZER_JSON_NAME} has {json.dumps(own)}, "
                    "and versions of transformers differ in which they follow",
                    "make both what the model was trained with",
                )
        return whole

    def _bytes_of(self, vocabulary: dict[int, str]) -> dict[int, bytes]:
        no_text = {*self.control.values(), self.model["vocab"].get(self.unknown)}
        added = set(self.files.added_tokens)
        return {
            token: self._bytes_of_piece(text, added=text in added)
            for token, text in vocabulary.items()
            if token not in no_text
        }

    def _bytes_of_piece(self, piece: str, *, added: bool) -> bytes:
        if self._byte_level:
            if added:
                return piece.encode()
            try:
                return bytes(map(BYTE_OF.__getitem__, piece))
            except KeyError:
                return piece.encode()
        if self.model.get("byte_fallback") and _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE_SYMBOL, " ").encode()

    def _check_lossless(self, bytes_of: dict[int, bytes], vocabulary: dict[int, str]) -> None:
        """Raise InputError if the library would drop characters, or spell a space as U+2581."""
        if not self._byte_level and SPACE_SYMBOL not in self.model["vocab"]:
            problem = "has no piece for the space, so a space would be decoded as U+2581"
            raise InputError(self.path, problem, REMEDY)
        if self.unknown is not None and not self.model.get("byte_fallback"):
            return
        spelled = {
            bytes_of[token]
            for token, text in vocabulary.items()
            if token in bytes_of and (self._byte_level or _BYTE_PIECE.fullmatch(text))
        }
        missing = [
            byte
            for byte in range(256)
            if byte not in _NEVER_IN_UTF8 and bytes([byte]) not in spelled
        ]
        if missing:
            problem = f"has no token for the byte 0x{missing[0]:02X}, so texts would lose it"
            raise InputError(self.path, problem, _REMEDY)

    def _record(
        self, parts: dict[str, Any], eod: int, normalization: list[str], vocab_size: int
    ) -> TokenizerRecord:
        roles = {eod, *(self.control.get(text) for text in self.roles.values())}
        free = sorted((i, text) for text, i in self.control.items() if i not in roles)
        reserved = [i for i, text in free if RESERVED.fullmatch(text)]
        determines = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer")}
        hashed = {
            "library": "tokenizers", "eod": eod, "control": self.control, "model": parts["model"],
            **determines,
        }  # fmt: skip
        return TokenizerRecord(
            library="tokenizers",
            library_version=tokenizers.__version__,
            algorithm=BYTE_LEVEL if self._byte_level else "bpe",
            vocab_size=vocab_size,
            eod=eod,
            bos=self._bos(),
            adds_bos=self._bos() is not None and self.files.adds_bos(),
            normalization=normalization,
            left_out=self._left_out(),
            tags={tag_name(text): i for i, text in free if i not in reserved},
            reserved_tags=reserved,
            tokenizer_hash=hash_json(hashed),
            languages={},
        )

    def _left_out(self) -> list[str]:
        """Return the parts of the file that are not used."""
        names = [name for name in ("truncation", "padding") if self.whole.get(name)]
        if self.model.get("dropout"):
            names.append("dropout")
        kinds = {step["type"] for step in processors(self.whole)} - {"ByteLevel"}
        return names + sorted(kinds)


def _json_text(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _removes_text(step: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer's step drops characters.

    One with `invert` removes what its expression does not match, which is nothing where it matches
    everything, as in OLMo's tokenizers.
    """
    if step.get("behavior") != "Removed":
        return False
    parts = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": step}
    try:
        encoder = tokenizers.Tokenizer.from_str(_json_text(parts))
    except Exception:
        return False  # what is wrong with it is said when all of it is read
    assert encoder.pre_tokenizer is not None
    found = encoder.pre_tokenizer.pre_tokenize_str(_EVERY_KIND_OF_CHARACTER)
    kept = sum(int(end) - int(start) for _, (start, end) in found)
    return kept < len(_EVERY_KIND_OF_CHARACTER)


def _normalization(part: Any) -> list[str]:
    """Return the names of the steps that change a text; writing a space as U+2581 does not."""
    names = []
    for step in steps_of(part):
        if step["type"] == "ByteLevel" or (step["type"], step.get("content")) == (
            "Replace",
            SPACE_SYMBOL,
        ):
            continue
        if step["type"] == "Prepend":
            continue  # a space before the text, see _adds_space
        names.append(step["type"])
    return names


def _adds_space(encoder: tokenizers.Tokenizer, bytes_of: dict[int, bytes]) -> bool:
    ids = encoder.encode("a").ids
    return bool(ids) and bytes_of.get(ids[0], b"").startswith(b" ")


def _is_merge(merge: Any) -> bool:
    return isinstance(merge, str) or (
        isinstance(merge, list) and len(merge) == 2 and all(isinstance(each, str) for each in merge)
    )


def _pair(merge: Any) -> list[str]:
    """Return the two pieces of a merge, which older files write with a space between them."""
    if isinstance(merge, str):
        first, _, second = merge.partition(" ")
        return [first, second]
    return list(merge)


_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
