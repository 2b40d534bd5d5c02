"""The messages of a conversation, as they are read from JSON."""

from __future__ import annotations

from typing import Any

from megaphase.utils.json_values import JSON_TYPES, string_fault

MESSAGES_REMEDY = 'write [{"role": "user", "content": "..."}, {"role": "assistant", ...}]'


def messages_fault(messages: Any) -> str | None:
    """Return why a value is not a list of messages, or None."""
    if not isinstance(messages, list):
        return f"{JSON_TYPES.get(type(messages), str(messages))}, not a list of messages"
    if not messages:
        return "no message"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            return f"{JSON_TYPES.get(type(message), str(message))} as message {number}"
        for key in ("role", "content"):
            if key not in message:
                return f"a message {number} without {key!r}"
            if fault := string_fault(message[key]):
                return f"a message {number} whose {key!r} holds {fault}"
    return None
