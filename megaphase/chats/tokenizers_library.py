"""The `tokenizers` library's tokenizer of a directory, with the control tokens, as transformers
loads it."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Encoder

from megaphase.chats.template_files import CONFIG_NAME, read_special_tokens
from megaphase.tokenizer import RECORD_NAME, TOKENIZER_JSON_NAME, Tokenizer
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles
from megaphase.utils.errors import InputError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_encoder(tokenizer: Tokenizer, *, trims_offsets: bool) -> Any:
    """Return an encoder that encodes control tokens in texts.

    trims_offsets: whether tokens' offsets leave out white space if tokenizer.json says so.

    Raises InputError if tokenizer_config.json names a token that the tokenizer does not have.
    """
    encoder = Encoder.from_file(str(tokenizer.path / TOKENIZER_JSON_NAME))
    encoder.no_truncation()
    encoder.no_padding()
    _add_tokens(encoder, tokenizer)
    if not trims_offsets:
        # One that does nothing: older versions of the library do not take None.
        encoder.post_processor = processors.ByteLevel(trim_offsets=False)
    return encoder


def check_keeps_control_tokens(tokenizer: Tokenizer) -> None:
    """Raise InputError if transformers splits the control tokens that a chat template writes."""
    # Of tokenizers that were made here, `convert to-hf` leaves the key out.
    is_own = (tokenizer.path / RECORD_NAME).is_file()
    if not is_own and HuggingFaceFiles(tokenizer.path).config.get("split_special_tokens"):
        problem = "split_special_tokens: with it transformers splits control tokens of chats, too"
        raise InputError(tokenizer.path / CONFIG_NAME, problem, "leave it out")


def _add_tokens(encoder: Any, tokenizer: Tokenizer) -> None:
    """Add the tokens that the other files name, or describe otherwise than tokenizer.json does."""
    config = HuggingFaceFiles(tokenizer.path).config
    described = config.get("added_tokens_decoder") or {}
    added = [
        AddedToken(**{key: token[key] for key in ("content", *_FLAGS) if key in token})
        for _, token in sorted(described.items(), key=lambda item: int(item[0]))
    ]
    known = {repr(each) for each in encoder.get_added_tokens_decoder().values()}
    new = [each for each in added if repr(each) not in known]
    texts = {each.content for each in encoder.get_added_tokens_decoder().values()}
    texts |= {each.content for each in new}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    named = [*read_special_tokens(tokenizer.path).values()]
    named += [each for each in more if isinstance(each, str)] if isinstance(more, list) else []
    new += [AddedToken(text, special=True) for text in dict.fromkeys(named) if text not in texts]
    encoder.add_tokens(new)
    for each in new:
        if encoder.token_to_id(each.content) >= tokenizer.vocab_size:
            problem = f"names the token {each.content!r}, which {TOKENIZER_JSON_NAME} does not have"
            raise InputError(tokenizer.path / CONFIG_NAME, problem, "put back the model's own")
