"""The tokens with which a turn of a conversation ends, at which generation stops beside EOD."""

from __future__ import annotations

from megaphase.chats.encoder import ChatEncoder
from megaphase.tokenizer import Tokenizer
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles, tag_name
from megaphase.utils.errors import InputError
from megaphase.utils.set_aside import say_on_standard_error


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the token with which the tokenizer's chat template ends the assistant's turns, and the
    `eos_token` of its files; without EOD, so that most tokenizers have none.

    A chat template that cannot be used is left out, and a line on standard error says so: a model
    of texts does without.
    """
    if not tokenizer.path.is_dir():
        return frozenset()
    try:
        chats = ChatEncoder.find(tokenizer)
    except InputError as error:
        say_on_standard_error(f"Warning: {error}; conversations cannot be rendered until then")
        chats = None
    files = HuggingFaceFiles(tokenizer.path)
    named, text = None, files.special_token("eos_token")
    if text is not None:  # without a tokenizer.json, it is a tag
        named = (files.pieces | files.added_tokens).get(text, tokenizer.tags.get(tag_name(text)))
    found = {named, None if chats is None else chats.turn_end}
    return frozenset(token for token in found if token not in (None, tokenizer.eod))
