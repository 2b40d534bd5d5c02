"""Conversations as tokens, with a mark for each token of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megaphase.chats.control_tokens import ControlTokens
from megaphase.chats.template import ASSISTANT, ChatError, ChatTemplate, Message, RenderedChat
from megaphase.chats.template_files import has_template
from megaphase.chats.tokenizers_library import load_encoder
from megaphase.tokenizer import TOKENIZER_JSON_NAME, Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json

_INSTRUCTIONS = frozenset(("system", "developer"))  # roles that ask nothing


_CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Question"},
    {"role": ASSISTANT, "content": "Answer"},
)
# The markers of most templates: <user>, <|im_start|>.
_MARK = re.compile(r"<[^\s<>]{1,40}>")


class EncodedChat(NamedTuple):
    """A conversation.

    Attributes:
        tokens: int32 [tokens], with the BOS that the template writes first, if it does, and the
            EOD that ends it.
        targets: u8 [tokens], 1 where a token belongs to an answer.
        prompt: what comes before the first answer to a message, or, where there is none, all of
            it; from this the hash is computed, in UTF-8.
        text_bytes: size of all messages in bytes of UTF-8.
    """

    tokens: np.ndarray
    targets: np.ndarray
    prompt: bytes
    text_bytes: int


class _Example(NamedTuple):
    """What a template makes of a short conversation.

    Attributes:
        turn_end: the control token that ends the answer, or follows it; None if there is none.
        is_trained: whether it belongs to the answer.
        plain: texts in angle brackets that are several tokens.
    """

    turn_end: int | None
    is_trained: bool
    plain: list[str]


@dataclass(frozen=True)
class ChatEncoder:
    """Renders conversations by the template of a Hugging Face tokenizer, and tokenizes them."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @classmethod
    def load(cls, tokenizer: Tokenizer) -> ChatEncoder:
        """Raises InputError if the tokenizer has no tokenizer.json or no chat template, or its
        files are damaged or contradict each other."""
        if not (tokenizer.path / TOKENIZER_JSON_NAME).is_file():
            problem = f"has no {TOKENIZER_JSON_NAME}, by which conversations are tokenized"
            remedy = (
                "make one with `megaphase tokenizer train --library tokenizers --chat`, or take "
                "the directory of a Hugging Face model with a chat template"
            )
            raise InputError(tokenizer.path, problem, remedy)
        return cls._opened(tokenizer)

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> ChatEncoder | None:
        """Like `load`, but return None if there is no tokenizer.json or no chat template."""
        has_json = (tokenizer.path / TOKENIZER_JSON_NAME).is_file()
        return cls._opened(tokenizer) if has_json and has_template(tokenizer.path) else None

    @classmethod
    def _opened(cls, tokenizer: Tokenizer) -> ChatEncoder:
        encoder = cls(tokenizer, ChatTemplate.load(tokenizer.path))
        _ = encoder._encoder
        return encoder

    @property
    def turn_end(self) -> int | None:
        """The control token with which the template ends every turn of the assistant; None if it
        ends them with none."""
        return None if self._example is None else self._example.turn_end

    @property
    def fingerprint(self) -> str:
        """Of what determines the tokens beside the tokenizer. Where that puts BOS before texts,
        earlier versions left out the template's, so their corpora have another one."""
        own = self.template.fingerprint
        return hash_json([own, "with BOS"]) if self.tokenizer.adds_bos else own

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "template": self.template}

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Return a conversation's tokens.

        Raises ChatError if it has no answer, the template refuses it, its answers cannot be found,
        or a control token comes from a message, not from the template.
        """
        rendered = self.template.render(messages)
        ids, targets = self._marked(rendered)
        self._control_tokens.check(messages, ids)
        if not targets.any():
            if any(message["role"] == ASSISTANT for message in messages):
                raise ChatError("the chat template gives the assistant no token in it")
            raise ChatError("no message is of the role 'assistant'")
        if not len(ids) or ids[-1] != self.tokenizer.eod:
            ids = np.append(ids, np.int32(self.tokenizer.eod))
            targets = np.append(targets, np.uint8(0))
        if messages[-1]["role"] == ASSISTANT and self._ends_with_eod:
            # Where no other token says it, EOD says that the answer has ended.
            targets[-1] = 1
        size = sum(len(each["content"].encode()) for each in messages)
        return EncodedChat(ids, targets, _prompt(messages), size)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation and of the template's prompt for an answer.

        Raises ChatError if the last message is the assistant's, the template refuses them, or a
        control token comes from a message, not from the template.
        """
        if messages[-1]["role"] == ASSISTANT:
            raise ChatError("the last message is the assistant's, so there is nothing to answer")
        text = self.template.render_text(messages, prompt=True)
        encoded = self._encoder.encode(text, add_special_tokens=False)
        ids = np.array(encoded.ids, np.int32)
        self._control_tokens.check(messages, ids, prompt=True)
        found: list[int] = ids.tolist()
        return found

    def remarks(self) -> list[str]:
        """Return what is unusual about the template and should be known before it is used."""
        example = self._example
        if example is None:
            return ["the template refuses a question with an answer, so its marks are not known"]
        remarks = []
        if example.plain:
            remarks.append(
                f"the template writes {', '.join(example.plain)}, which the tokenizer does not "
                "have as a control token and splits into ordinary ones"
            )
        if example.turn_end is None:
            remarks.append(
                "the template ends the assistant's turns with no control token: the EOD after the "
                "last one is trained, too, where generation stops"
            )
        elif not example.is_trained:
            piece = self.tokenizer.piece(example.turn_end)
            remarks.append(
                f"{piece}, which ends the assistant's turns, is outside of the template's "
                "{% generation %} block: a model does not learn to stop"
            )
        return remarks

    @property
    def _ends_with_eod(self) -> bool:
        return self._example is not None and self._example.turn_end is None

    @cached_property
    def _example(self) -> _Example | None:
        """What the template makes of a short conversation; None if it refuses that."""
        for messages in (_CONVERSATION[1:], _CONVERSATION):
            try:
                rendered = self.template.render(messages)
                ids, targets = self._marked(rendered)
            except ChatError:
                continue
            if targets.any():
                return self._described(rendered.text, ids, targets)
        return None

    def _described(self, text: str, ids: np.ndarray, targets: np.ndarray) -> _Example:
        controls = self._control_tokens.is_control
        inside = [int(each) for each in ids[targets == 1]]
        while inside and not controls[inside[-1]] and not self._encoder.decode(inside[-1:]).strip():
            inside.pop()
        after = ids[np.flatnonzero(targets)[-1] + 1 :].tolist()
        is_trained = bool(inside) and bool(controls[inside[-1]])
        last = inside[-1:] if is_trained else [each for each in after[:1] if controls[each]]
        marks = dict.fromkeys(_MARK.findall(text))
        plain = [each for each in marks if len(self._ids_of(each)) > 1]
        return _Example(last[0] if last else None, is_trained, plain)

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def _marked(self, rendered: RenderedChat) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a rendered conversation, int32, and the marks of answers, u8."""
        encoded = self._encoder.encode(rendered.text, add_special_tokens=False)
        ids = np.array(encoded.ids, np.int32)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        targets = np.zeros(len(ids), np.uint8)
        for begin, end in rendered.answers:
            if rendered.is_marked:
                first, last = _marked_tokens(encoded, begin, end, len(rendered.text))
            else:
                first, last = self._tokens_of(rendered.text, begin, end, ids, offsets)
            targets[first : last + 1] = 1
        return ids, targets

    def _tokens_of(
        self, text: str, begin: int, end: int, ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[int, int]:
        """Return the first and the last token of an answer, without white space after the control
        token that ends it; ids int [tokens], offsets [tokens, 2]."""
        if begin == end:
            return 0, -1
        is_control = self._control_tokens.is_control
        first = int(np.searchsorted(offsets[:, 1], begin, side="right"))
        if first < len(ids) and offsets[first, 0] < begin and is_control[ids[first]]:
            first += 1  # the control token before the answer takes the white space after it
        before_space = begin + len(text[begin:end].rstrip())
        for each in (before_space, end):
            last = int(np.searchsorted(offsets[:, 0], each, side="left")) - 1
            if last >= first and is_control[ids[last]]:
                break
        return first, last

    @cached_property
    def _encoder(self) -> Any:  # the library has no types
        # Where the template marks answers itself, their tokens are found as transformers does.
        return load_encoder(self.tokenizer, trims_offsets=self.template.compiled.marks_answers)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.template, self._encoder)


def _marked_tokens(encoded: Any, begin: int, end: int, size: int) -> tuple[int, int]:
    """Return the first and the last token of a {% generation %} block as transformers finds them;
    size: of the text, in characters.

    Raises ChatError where it finds none: it then marks nothing, or everything up to the end.
    """
    if begin == end == size:
        return 0, -1
    first = encoded.char_to_token(begin)
    last = encoded.char_to_token(end - 1) if end else None
    if first is None or not last:
        problem = "transformers finds no token for the first or the last character of an answer"
        remedy = 'white space has one with "trim_offsets": false in tokenizer.json'
        raise ChatError(f"{problem}, so it would mark others; {remedy}")
    return first, last


def _prompt(messages: Sequence[Message]) -> bytes:
    asked = (
        number
        for number, message in enumerate(messages)
        if message["role"] == ASSISTANT
        and any(each["role"] not in {*_INSTRUCTIONS, ASSISTANT} for each in messages[:number])
    )
    first = next(asked, len(messages))
    prompt = [[each["role"], each["content"]] for each in messages[:first]]
    return json.dumps(prompt, ensure_ascii=False).encode()
