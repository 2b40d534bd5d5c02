"""Text to tokens and back: nothing is lost, and no text encodes to a control token."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_support import VOCAB_SIZE, make_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

import megaphase.tokenizer.tokenizer as tokenizer_module
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

# Text in which characters that tokenizers tend to lose or confuse are likely.
DIFFICULT = (
    "", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\0", "\u00a0", "\u2028", "\ufeff", "\u200b",
    "▁", "<eod>", "<unk>", "<fr>", "<s>", "<0x0A>", "👩‍👩‍👧", "e\u0301", "é", "ﬁ", "Ⅷ", "հայ",
    "日本", "\U0010ffff", "0123", "word",
)  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(DIFFICULT), st.text(max_size=8))).map("".join)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "tok"))


@given(text=TEXTS)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(TEXTS, max_size=4))
def test_a_batch_gives_what_single_texts_give(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    arrays = tokenizer.encode_arrays(texts)
    assert [array.tolist() for array in arrays] == expected
    assert all(array.dtype == np.int32 for array in arrays)


@given(text=TEXTS)
def test_text_never_encodes_to_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    control = {tokenizer.eod, *tokenizer.tags.values(), *tokenizer.reserved_tags}
    ids = tokenizer.encode(text)
    assert not control & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_control_tokens_are_distinct_and_leave_no_trace(tokenizer: Tokenizer) -> None:
    control = [tokenizer.eod, *tokenizer.tags.values(), *tokenizer.reserved_tags]
    assert len(set(control)) == 1 + 2 + 3
    assert list(tokenizer.tags) == ["fr", "hi"]
    assert tokenizer.decode(control) == ""
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([tokenizer.tags["fr"], *ids, tokenizer.eod]) == "one two"


def test_newline_and_tab_have_their_own_tokens(tokenizer: Tokenizer) -> None:
    newline, tab = tokenizer.encode("\n"), tokenizer.encode("\t")
    assert len(newline) == len(tab) == 1
    assert tokenizer.encode("\n\n\t") == newline * 2 + tab


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert "\ufffd" in tokenizer.decode(ids[:2])


def test_decoding_takes_an_array_of_any_integers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "one two"


def test_a_tokenizer_of_facts_reads_no_file_before_it_converts_a_text(
    tokenizer: Tokenizer, monkeypatch
) -> None:
    facts = pickle.loads(pickle.dumps(tokenizer.facts()))
    with monkeypatch.context() as unread:
        unread.setattr(tokenizer_module, "_read", lambda path: pytest.fail(f"{path} is read"))
        same = Tokenizer.of_facts(facts)
        for name in ("path", "vocab_size", "eod", "bos", "adds_bos", "tags", "fingerprint"):
            assert getattr(same, name) == getattr(tokenizer, name)
        assert same.byte_fallback == tokenizer.byte_fallback
        assert same.exact_bytes == tokenizer.exact_bytes
        assert (same.token_bytes() == tokenizer.token_bytes()).all()
    text = "two words"
    assert same.encode(text) == tokenizer.encode(text)
    assert same.decode(same.encode(text)) == text


def test_a_tokenizer_pickles_as_its_directory(tokenizer: Tokenizer) -> None:
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).encode("one two") == tokenizer.encode("one two")


def test_the_record_says_what_the_tokenizer_is(directory: Path, tokenizer: Tokenizer) -> None:
    record = json.loads((directory / "megaphase_tokenizer.json").read_text())
    assert record["vocab_size"] == tokenizer.vocab_size == VOCAB_SIZE
    assert record["eod"] == tokenizer.eod
    assert record["tokenizer_hash"] == tokenizer.fingerprint
    assert list(record["languages"]) == ["aa", "bb"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such file or directory; give another, or"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_text("{}\n")
    names = r"megaphase_tokenizer\.json, tokenizer\.json, tokenizer\.model, spiece\.model, "
    with pytest.raises(InputError, match=f"{tmp_path}: has none of {names}.*; give the directory"):
        Tokenizer.load(tmp_path)


def test_a_missing_model_is_named(copy: Path) -> None:
    (copy / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.model: no such file"):
        Tokenizer.load(copy)


@pytest.mark.parametrize("change", [b"x", b""])
def test_an_altered_model_is_found(copy: Path, change: bytes) -> None:
    model = copy / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1] + change)
    with pytest.raises(InputError, match=r"tokenizer\.model: is not the model that"):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", VOCAB_SIZE + 1, "vocab_size is 701, the model's 700"),
        ("eod", "x", "eod: Input should be a valid integer"),
        ("version", 2, "version: Input should be 1"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("eod", 100, "eod: 100 is not a control token of the model, or is given twice"),
        ("eod", -1, "eod: -1 is not a control token of the model"),
        (
            "tags",
            {"fr": 1 << 63},
            r"tags\.fr: 9223372036854775808 is not a control token of the model",
        ),
        ("tags", {"fr": 0}, r"tags\.fr: 0 is not a control token of the model, or is given twice"),
        ("reserved_tags", [700], r"reserved_tags\.0: 700 is not a control token of the model"),
    ],
)
def test_a_wrong_record_names_the_field(copy: Path, key: str, value: object, message: str) -> None:
    path = copy / "megaphase_tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.load(copy)
    assert str(error.value).startswith(str(path))


def test_a_record_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "megaphase_tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="Invalid JSON"):
        Tokenizer.load(copy)


@given(
    parts=st.lists(
        st.sampled_from(["one", "two ", " vier", "  ", "\n", "日本", "▁", "x" * 15, " "])
    ),
)
def test_a_long_text_in_parts_is_the_same(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    # A text is cut between two words if there is a space among the first 40 characters of a part.
    assume(" " * 8 not in text and max(map(len, text.split(" "))) <= 31)
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaphase.tokenizer.sentencepiece_backend._LONG_TEXT", 40)
        assert tokenizer.encode(text) == whole
        other = tokenizer.encode("a b")
        assert tokenizer.encode_batch(["a b", text, "a b"]) == [other, whole, other]


def test_a_long_text_without_spaces_comes_back(tokenizer: Tokenizer) -> None:
    text = "日本" * 600_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
