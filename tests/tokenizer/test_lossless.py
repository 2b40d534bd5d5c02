"""Tokenizers trained on text without spaces, on code, on odd spaces lose nothing of a text."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_support import write_jsonl
from existing_tokenizers import train_model
from extended_tokenizers import extend
from hf_tokenizer_support import Pair, assert_same, pair_of
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from megaphase.data_tools.commands import data_app
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


def sentences(first: int, last: int, between: str = "") -> list[str]:
    """Return sentences of random words of these characters."""
    dice = random.Random(first)
    characters = [chr(number) for number in range(first, last)]
    words = ["".join(dice.choices(characters, k=dice.randint(1, 4))) for _ in range(200)]
    return [between.join(dice.choices(words, k=12)) for _ in range(200)]


CHINESE = sentences(0x4E00, 0x4E40)
SAMPLES = {
    # One space in 6,000 characters: sentencepiece ignores such rare characters.
    "chinese": [*CHINESE, "\u4e00 \u4e01"],
    "thai": sentences(0x0E01, 0x0E3A),
    "code": [f"def {name}:\n    if x:\n\t\treturn\r\n" for name in sentences(0x61, 0x70, "_")],
    "space-symbol": sentences(0x61, 0x6A, "\u2581"),
    "ideographic-space": sentences(0x3042, 0x3070, "\u3000"),
}
FRAGMENTS = [
    *(" ", "  ", "   ", "\u2581", " \u2581", "\u2581 ", "\n", "\t", "\r\n", "\0", "\x85"),
    *("\u00a0", "\u3000", "\u2009", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\ufffd"),
    *("<eod>", "<unk>", "<0x20>", "<fr>", "<b>", "a b", "\u4e00\u4e01", "\u0e01\u0e33", "e\u0301"),
    *("return x", "12", "\U0001f600", "\u2585", "\u202e", "\U0010ffff"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=9).map(
    "".join
)
PAIRS: dict[tuple[str, str], Pair] = {}


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[*SAMPLES, "thai extended", "code extended"])
def pair(
    request: pytest.FixtureRequest, algorithm: str, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    key = request.param, algorithm
    if key not in PAIRS:
        folder = tmp_path_factory.mktemp("-".join(key).replace(" ", "-"))
        sample, *extended = request.param.split()
        source = {"xx": [write_jsonl(folder / "xx.jsonl", SAMPLES[sample])]}
        train_tokenizer(
            source,
            folder / "tok",
            vocab_size=350,
            model_type=algorithm,  # type: ignore[arg-type]
            tags=("fr",),
            reserved_tags=0,
            user_symbols=("<b>",),
        )
        made = extend(folder / "tok", folder / "new") if extended else folder / "tok"
        PAIRS[key] = pair_of(made, folder / "hf")
    return PAIRS[key]


@cache
def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.token_bytes()


@given(text=TEXTS)
def test_every_text_comes_back_and_its_bytes_are_counted(pair: Pair, text: str) -> None:
    native = pair.native
    ids = native.encode(text)
    assert native.decode(ids) == text
    assert token_bytes(native)[ids].sum() == len(text.encode())
    assert pair.reference.decode(ids) == text


@given(text=TEXTS)
def test_what_is_written_for_transformers_gives_the_same_ids(pair: Pair, text: str) -> None:
    # Segmentations with the same score do not matter here, see tokenizer_json.py.
    if pair.native.record.algorithm == "bpe":
        assert_same(pair, text)
    else:
        reference = pair.reference(text).input_ids
        assert pair.native.decode(reference) == text
        assert len(reference) == len(pair.native.encode(text))


def test_the_space_the_newline_and_the_tab_are_always_pieces(pair: Pair) -> None:
    for character in " \n\t":
        (token,) = pair.native.encode(character)
        assert pair.native.token_bytes()[token] == 1
        assert not pair.native.is_spelled()[token]


def test_a_corpus_of_such_text_is_shown_as_it_was(tmp_path: Path) -> None:
    text = " 一丁 ▁丂\u3000 "
    source = write_jsonl(tmp_path / "zh.jsonl", [text, *CHINESE])
    train_tokenizer({"zh": [source]}, tmp_path / "tok", vocab_size=350, reserved_tags=0)
    manifest = tokenize([source], tmp_path / "tok", tmp_path / "zh", workers=1)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    tokens = sum(map(len, tokenizer.encode_batch([text, *CHINESE])))
    assert manifest.tokens == tokens + 201
    arguments = ["inspect", str(tmp_path / "zh"), "--document", "0", "--tokenizer"]
    result = CliRunner().invoke(data_app, [*arguments, str(tmp_path / "tok")])
    assert text in result.stdout


LOSSLESS = {
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
}


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_that_spells_spaces_in_bytes_is_refused(tmp_path: Path, model_type: str) -> None:
    texts = CHINESE
    path = train_model(
        tmp_path / "a.model", texts=texts, vocab_size=350, model_type=model_type, **LOSSLESS
    )
    # Otherwise the ids of both would be the same.
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.encode(" ") == model.encode("▁")
    with pytest.raises(InputError) as error:
        Tokenizer.load(path)
    assert str(error.value) == (
        f"{path}: has no piece for the space, so a space would be decoded as U+2581; "
        "make the tokenizer with `megaphase tokenizer train`"
    )


def test_a_model_without_bytes_takes_a_space_as_any_unknown_character(tmp_path: Path) -> None:
    options = {**LOSSLESS, "byte_fallback": False}
    path = train_model(
        tmp_path / "a.model", texts=CHINESE, vocab_size=90, model_type="bpe", **options
    )
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode(" ") == tokenizer.encode("\u0e01")
    assert tokenizer.token_bytes()[tokenizer.encode(" ")].tolist() == [0]
