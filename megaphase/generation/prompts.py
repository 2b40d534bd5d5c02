"""Read prompts and conversations from files of JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaphase.chats.encoder import ChatEncoder
from megaphase.chats.messages import MESSAGES_REMEDY, messages_fault
from megaphase.chats.template import ChatError
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_file
from megaphase.utils.locale_settings import is_utf8

STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class Conversation:
    """Messages to be answered, and their file and line."""

    messages: list[dict[str, Any]]
    where: str

    def shown(self) -> str:
        """Return the last message and the beginning of the answer's line, for people."""
        last = self.messages[-1]
        return f"{last['role']}: {last['content']}\nassistant: "


def read_prompts(path: Path, key: str) -> list[str]:
    """Return the string under `key` of every line, a JSON object; `-` is standard input.

    Raises:
        InputError: names the file and the first invalid line.
    """
    prompts = [_prompt(line, key, where) for where, line in _lines(path, "--input")]
    if not prompts:
        raise InputError(path, "contains no prompts", f'give lines like {{"{key}": "text"}}')
    return prompts


def read_conversations(path: Path, key: str) -> list[Conversation]:
    """Return the messages under `key` of every line, a JSON object; `-` is standard input.

    Raises:
        InputError: names the file and the first invalid line.
    """
    found = [_conversation(line, key, where) for where, line in _lines(path, "--messages")]
    if not found:
        raise InputError(path, "contains no conversations", f'give lines like {{"{key}": [...]}}')
    return found


def asked(questions: Sequence[str], system: str | None) -> list[Conversation]:
    """Return a conversation of each question, after the system's message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        Conversation([*first, {"role": "user", "content": question}], f"prompt {number}")
        for number, question in enumerate(questions, 1)
    ]


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer
) -> list[list[int]]:
    """Return the tokens of each conversation with the prompt for an answer; they begin with BOS if
    the template writes it.

    Raises:
        InputError: the tokenizer has no chat template, or that refuses a conversation.
    """
    encoder, prompts = ChatEncoder.load(tokenizer), []
    for each in conversations:
        try:
            prompts.append(encoder.encode_prompt(each.messages))
        except ChatError as error:
            raise InputError(each.where, str(error), "change the messages") from None
    return prompts


def spelled_control_token(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[int, str] | None:
    """Return the number, from 1, of the first text that spells a control token, which it does not
    become, and that token."""
    controls = [tokenizer.piece(int(i)) for i in np.flatnonzero(tokenizer.token_bytes() == 0)]
    for number, text in enumerate(texts, 1):
        if found := next((piece for piece in controls if piece in text), None):
            return number, found
    return None


def _lines(path: Path, option: str) -> Iterator[tuple[str, bytes]]:
    """Yield file and number of every line that is not blank, and the line."""
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else read_file(path, pipes=True)
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", f"check {option}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _conversation(line: bytes, key: str, where: str) -> Conversation:
    try:
        messages = json.loads(line)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = f"is not a JSON object with messages under {key!r}"
        raise InputError(where, problem, "correct the line, or give --json-key") from None
    if fault := messages_fault(messages):
        raise InputError(where, f"the key {key!r} holds {fault}", MESSAGES_REMEDY)
    return Conversation(messages, where)


def _prompt(line: bytes, key: str, where: str) -> str:
    try:
        prompt = json.loads(line)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        problem = f"is not a JSON object with a string under {key!r}"
        raise InputError(where, problem, "correct the line, or give --json-key")
    if not is_utf8(prompt):
        problem = "contains a lone surrogate, which is not a character"
        raise InputError(where, problem, "correct the line")
    return prompt
