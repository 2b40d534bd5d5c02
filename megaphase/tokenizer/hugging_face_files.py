"""Read what the files of a Hugging Face directory say about its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from megaphase.tokenizer.record import TOKENIZER_JSON_NAME
from megaphase.utils.errors import InputError, file_fault
from megaphase.utils.files import read_json

# Classes of transformers that begin every text with BOS unless `add_bos_token` is false.
_CLASSES_WITH_BOS = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"}
# Tokens that models are published with for users to give a meaning, marked as special or not.
RESERVED = re.compile(
    r"<unused_?\d+>|<\|?reserved_[a-z_]*\d+\|?>|<\|extra_\d+\|>|<SPECIAL_\d+>|<\|unused_?\d+\|>"
)
# Tokens that end a turn of a dialogue: chat models name them as eos_token.
_TURN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<end_of_turn>"),
        *("<|assistant_end|>", "<|end|>", "<|return|>", "<|END_OF_TURN_TOKEN|>"),
        "<|end_of_turn|>",
    )
)
_DOCUMENT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>", "<EOS_TOKEN>")
CONFIG_NAME, _SPECIAL_TOKENS_NAME = "tokenizer_config.json", "special_tokens_map.json"
_REMEDY = "copy the tokenizer again"
_LONGEST = 100  # characters of a value in a message
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class HuggingFaceFiles:
    """The information about the tokenizer in a Hugging Face directory, apart from the model.

    Attributes:
        config: the content of tokenizer_config.json.
        whole: the content of tokenizer.json; empty if there is no such file.
        added_tokens: the id of each token added to the model's, or named among them.
        special: those of them that are marked as special in one of the files.
        pieces: the ids that tokenizer.json assigns to the pieces; empty if there is no such file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_object(directory / CONFIG_NAME)
        self.whole = read_object(directory / TOKENIZER_JSON_NAME)
        self._special_tokens = read_object(directory / _SPECIAL_TOKENS_NAME)
        self.added_tokens: dict[str, int] = {}
        self.special: set[str] = set()
        self.pieces: dict[str, int] = {}
        try:
            self._read_tokens()
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = "its tokens are not in the format of transformers"
            raise InputError(directory, problem, _REMEDY) from None
        for key in ("normalizer", "pre_tokenizer", "post_processor"):
            if not _is_part(self.whole.get(key)):
                problem = "is not in the format of the tokenizers library"
                raise InputError(f"{directory / TOKENIZER_JSON_NAME}: {key}", problem, _REMEDY)

    def _read_tokens(self) -> None:
        for text, token in read_object(self.directory / "added_tokens.json").items():
            self.added_tokens[text] = int(token)
        for token, described in (self.config.get("added_tokens_decoder") or {}).items():
            self._add(described, int(token))
        for described in self.whole.get("added_tokens") or []:
            self._add(described, int(described["id"]))
        for values in (self.config, self._special_tokens):
            self.special |= {*_texts_of(values.get("additional_special_tokens"))}
            self.special |= {*_texts_of(values.get("extra_special_tokens"))}
        vocabulary = (self.whole.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, dict):
            self.pieces = vocabulary
        else:
            self.pieces = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        if not all(type(number) is int for number in self.pieces.values()):
            raise TypeError

    def _add(self, described: dict[str, Any], token: int) -> None:
        text = described["content"]
        if not isinstance(text, str):
            raise TypeError
        self.added_tokens[text] = token
        if described.get("special"):
            self.special.add(text)

    def special_token(self, name: str) -> str | None:
        """Return the text of a special token such as `eos_token`.

        Raises InputError if it is neither a text nor an object with one.
        """
        for file, values in (
            (CONFIG_NAME, self.config),
            (_SPECIAL_TOKENS_NAME, self._special_tokens),
        ):
            if token := values.get(name):
                text = token.get("content") if isinstance(token, dict) else token
                if not isinstance(text, str):
                    raise self._wrong_value(file, name, token, "the text of a token")
                return text
        return None

    def roles(self) -> dict[str, str]:
        """Return the text of every special token that has a role, by its role, such as `bos`."""
        named = {role: self.special_token(f"{role}_token") for role in ROLES}
        return {role: text for role, text in named.items() if text is not None}

    def document_end(self, control: Container[str]) -> str | None:
        """Return the text of the token that ends a document: `eos_token`, or where that is the end
        of a turn, as chat models have it, the end of a text, if it is one of the control tokens."""
        text = self.special_token("eos_token")
        if text not in _TURN_ENDS:
            return text
        return next((each for each in _DOCUMENT_ENDS if each in control), text)

    def adds_bos(self) -> bool:
        """Return whether the files say that the tokenizer begins every text with BOS.

        tokenizer_config.json says it before the post-processor of tokenizer.json does, and that
        before the default of the tokenizer's class.
        """
        if (said := self.config.get("add_bos_token")) is not None:
            if not isinstance(said, bool):
                raise self._wrong_value(CONFIG_NAME, "add_bos_token", said, "true or false")
            return said
        if self.whole:
            bos = self.special_token("bos_token")
            return any(
                first == bos for step in processors(self.whole) for first in _first_tokens(step)
            )
        return self._name_in(CONFIG_NAME, "tokenizer_class").removesuffix("Fast") in (
            _CLASSES_WITH_BOS
        )

    def id_in_config(self, key: str) -> int | None:
        """Return a token's id from generation_config.json or config.json, the first if several."""
        for name in ("generation_config.json", "config.json"):
            value = read_object(self.directory / name).get(key)
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int):
                return value
        return None

    @property
    def class_name(self) -> str:
        """Return the tokenizer's class or, if it is not named, the model type."""
        named = self._name_in(CONFIG_NAME, "tokenizer_class")
        return named or self._name_in("config.json", "model_type")

    def _name_in(self, file: str, key: str) -> str:
        """Return a name from a file; empty where it has none."""
        value = read_object(self.directory / file).get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong_value(file, key, value, "a name")
        return value or ""

    def _wrong_value(self, file: str, key: str, value: Any, wanted: str) -> InputError:
        problem = f"is {json.dumps(value)[:_LONGEST]}, not {wanted}"
        return InputError(f"{self.directory / file}: {key}", problem, _REMEDY)


def _texts_of(tokens: Any) -> Iterator[str]:
    """Yield the texts of a list of tokens, or of the values of an object with names for them."""
    for token in tokens.values() if isinstance(tokens, dict) else tokens or ():
        yield token["content"] if isinstance(token, dict) else token


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except OSError as error:
        raise file_fault(path, error, _REMEDY) from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", _REMEDY)
    return value


def steps_of(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, sequences resolved."""
    if not part:
        return []
    for key in ("normalizers", "pretokenizers", "processors"):
        if part.get("type") == "Sequence" and key in part:
            return [step for each in part[key] for step in steps_of(each)]
    return [part]


def processors(whole: dict[str, Any]) -> list[dict[str, Any]]:
    return steps_of(whole.get("post_processor"))


def _first_tokens(processor: dict[str, Any]) -> Iterator[str]:
    """Yield the special token that a post-processor puts before a text."""
    template = processor.get("single") or []
    if template and "SpecialToken" in template[0]:
        yield template[0]["SpecialToken"]["id"]
    if "cls" in processor:
        yield processor["cls"][0]


def _is_part(part: Any) -> bool:
    """Return whether a value of tokenizer.json is a normalizer, pre-tokenizer or post-processor."""
    try:
        steps = steps_of(part)
        firsts = [first for step in steps for first in _first_tokens(step)]
        return all(isinstance(each, str) for each in (*(step["type"] for step in steps), *firsts))
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def tag_name(text: str) -> str:
    """Return the name of the tag that is a token with this text."""
    return text.removeprefix("<").removesuffix(">")
