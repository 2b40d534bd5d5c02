"""The bytes of a token, and the ids that encode bytes, also within a character."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_support import write_jsonl
from existing_tokenizers import TEXTS, llama_directory, t5_directory
from tokenizer_json_kinds import KINDS

from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Extends, Tokenizer, pieces_replaced
from megaphase.utils.errors import InputError


def own_directory(folder: Path) -> Path:
    source = write_jsonl(folder / "text.jsonl", TEXTS * 20)
    train_tokenizer({"xx": [source]}, folder / "tok", vocab_size=360, reserved_tags=2)
    return folder / "tok"


EVERY: dict[str, Callable[[Path], Path]] = {
    **KINDS, "t5": t5_directory, "llama2": llama_directory, "own": own_directory
}  # fmt: skip


@pytest.fixture(scope="module", params=list(EVERY))
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.load(EVERY[request.param](tmp_path_factory.mktemp(request.param)))


def test_spellings_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        spelled = [tokenizer.spelling(token) for token in ids]
        assert list(map(len, spelled)) == sizes[ids].tolist()
        assert b"".join(spelled).decode().removeprefix(" ") == tokenizer.decode(ids)
    assert tokenizer.spelling(tokenizer.eod) == b""


def test_the_ids_of_a_spelling_are_those_inside_a_text(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("fox jumps fox jumps fox")
    word = tokenizer.encode_spelling(b" jumps")
    places = [n for n in range(len(whole)) if whole[n : n + len(word)] == word]
    assert len(places) == 2
    assert b"".join(map(tokenizer.spelling, tokenizer.encode_spelling(b"  ox"))) == b"  ox"


def test_parts_of_characters_have_ids(tokenizer: Tokenizer) -> None:
    if tokenizer.record.algorithm != "byte-level bpe":
        pytest.skip("its tokens are whole characters")
    for part in ("क".encode()[1:], "🜁".encode()[:3], "é".encode()[1:] + b"a"):
        ids = tokenizer.encode_spelling(part)
        assert b"".join(map(tokenizer.spelling, ids)) == part


def test_a_tokenizer_that_extends_none_replaces_no_pieces(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="does not extend another tokenizer; make it with"):
        pieces_replaced(tokenizer, tokenizer)
    extends = Extends(tokenizer_hash="0", vocab_size=7)
    other = Tokenizer.load(tokenizer.path)
    other.record = other.record.model_copy(update={"extends": extends})
    with pytest.raises(InputError, match="extends another tokenizer than"):
        pieces_replaced(other, tokenizer)
