"""The tokenizer of a Hugging Face directory: transformers gives the same ids as Megaphase."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from data_support import CORPORA, files_of, write_jsonl
from existing_tokenizers import TEXTS, llama_directory, t5_directory, train_model, write_json
from hf_tokenizer_support import (
    CODE,
    HARD,
    LOOKS_LIKE_CONTROL,
    Pair,
    assert_same,
    assert_same_ids,
    model_of,
    pair_of,
)
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizer_json_kinds import qwen3

from megaphase.chats.turn_ends import turn_ends
from megaphase.convert.hugging_face.tokenizer import take_tokenizer, write_hf_tokenizer
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import RECORD_NAME, Tokenizer
from megaphase.utils.errors import InputError

LANGUAGES = ("en", "fr", "de", "hi", "eu")
FRAGMENTS = [*"  \n\t▁<>éa\u0301", "  ", "0x", "the", *LOOKS_LIKE_CONTROL]
ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=12).map("".join),
)

MARKED = {"tags": ("fr", "hi"), "user_symbols": ("<b>",)}
KINDS = {
    # With "<" in the vocabulary, with tags, and with symbols of the user.
    "unigram": {"vocab_size": 400, "model_type": "unigram", **MARKED},
    "bpe": {"vocab_size": 400, "model_type": "bpe", **MARKED},
    # With nothing.
    "unigram-plain": {"vocab_size": 340, "model_type": "unigram", "reserved_tags": 0},
    "bpe-plain": {"vocab_size": 340, "model_type": "bpe", "reserved_tags": 0},
}
PAIRS: dict[str, Pair] = {}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind = request.param
    if kind not in PAIRS:
        folder = tmp_path_factory.mktemp(kind)
        texts = TEXTS * 20 + ([] if kind.endswith("plain") else [CODE] * 20)
        source = {"xx": [write_jsonl(folder / "xx.jsonl", texts)]}
        train_tokenizer(source, folder / "tok", **KINDS[kind])
        PAIRS[kind] = pair_of(folder / "tok", folder / "hf")
    return PAIRS[kind]


def test_every_text_has_the_same_ids(pair: Pair) -> None:
    for text in HARD:
        assert_same(pair, text)
        assert pair.reference.decode(pair.native.encode(text)) == text
    assert pair.reference(HARD).input_ids == pair.native.encode_batch(HARD)


@given(text=ANY_TEXT)
def test_any_text_has_the_same_ids(pair: Pair, text: str) -> None:
    assert_same(pair, text)


def test_a_text_that_is_encoded_in_parts_has_the_same_ids(pair: Pair) -> None:
    if pair.native.record.algorithm == "bpe":
        assert_same(pair, " ".join(TEXTS) * 1500)


def test_the_roles_of_tokens(pair: Pair) -> None:
    native, reference = pair.native, pair.reference
    assert len(reference) == native.vocab_size
    assert (reference.eos_token_id, reference.eos_token) == (native.eod, "<eod>")
    assert (reference.unk_token, reference.bos_token, reference.pad_token) == ("<unk>", None, None)
    for name, token in native.tags.items():
        assert reference.convert_tokens_to_ids(f"<{name}>") == token
    special = [*native.tags.values(), *native.reserved_tags, native.eod]
    ids = native.encode("x y")
    assert reference.decode([*special, *ids, *special], skip_special_tokens=True) == "x y"
    # As text they are ordinary by default.
    names = reference.decode(special)
    assert not set(special) & set(reference(names).input_ids)
    assert reference(names, split_special_tokens=False).input_ids == special


def test_megaphase_reads_what_it_wrote(pair: Pair, tmp_path: Path) -> None:
    native, again = pair.native, Tokenizer.load(pair.folder)
    assert again.record == native.record
    for name in files_of(pair.folder):
        if name != RECORD_NAME:
            (tmp_path / name).write_bytes((pair.folder / name).read_bytes())
    # Like any Hugging Face directory, if the record is lost.
    without = Tokenizer.load(tmp_path)
    assert (without.eod, without.vocab_size) == (native.eod, native.vocab_size)
    assert without.fingerprint == native.fingerprint
    assert without.tags.items() >= native.tags.items()
    assert without.encode_batch(HARD) == native.encode_batch(HARD)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_same_beside_a_model_and_after_saving(
    pair: Pair, tmp_path: Path, model_type: str
) -> None:
    import transformers

    for name in files_of(pair.folder):
        (tmp_path / name).write_bytes((pair.folder / name).read_bytes())
    write_json(tmp_path / "config.json", {"model_type": model_type})
    beside = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert beside(HARD).input_ids == pair.native.encode_batch(HARD)
    beside.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(HARD).input_ids == pair.native.encode_batch(HARD)


def test_neither_transformers_nor_tokenizers_is_needed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_hf_tokenizer(pair.native, tmp_path, max_length=77)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 77
    assert files_of(tmp_path) == files_of(pair.folder)


def float32_cannot_tell(model: SentencePieceProcessor, a: list[int], b: list[int]) -> bool:
    """Return whether two segmentations of a text have the same score to the seventh digit."""
    score_a, score_b = (sum(map(model.get_score, ids)) for ids in (a, b))
    return abs(score_b - score_a) < 1e-6 * abs(score_a)


@pytest.mark.skipif(not CORPORA.exists(), reason="../shared/corpora is not there")
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_real_text_in_five_languages(kind: str, tmp_path: Path) -> None:
    documents = {}
    for language in LANGUAGES:
        with gzip.open(CORPORA / f"{language}.jsonl.gz", "rt") as file:
            documents[language] = [json.loads(line)["text"] for line in islice(file, 80)]
    inputs = {
        language: [write_jsonl(tmp_path / f"{language}.jsonl", texts[:40])]
        for language, texts in documents.items()
    }
    train_tokenizer(inputs, tmp_path / "tok", vocab_size=3000, model_type=kind, tags=LANGUAGES)
    pair = pair_of(tmp_path / "tok", tmp_path / "hf")
    model = SentencePieceProcessor(model_file=str(tmp_path / "tok" / "tokenizer.model"))
    differing = 0
    for whole in documents.values():
        lines = [line for text in whole for line in text.split("\n")][:1500]
        assert len(lines) > 400
        texts = [*whole, *lines]
        for text, native, reference in zip(
            texts, pair.native.encode_batch(texts), pair.reference(texts).input_ids, strict=True
        ):
            assert pair.reference.decode(native) == text
            if reference != native:
                differing += 1
                assert kind == "unigram"
                assert float32_cannot_tell(model, native, reference)
    # In 5,000 texts and more.
    assert differing <= 5


@pytest.mark.parametrize("model_type", ["UNIGRAM", "BPE"])
def test_models_with_random_pieces(model_type: str, tmp_path: Path) -> None:
    random = Random(7)
    differing = 0
    for number in range(15):
        letters = ["a", "b", "s", "u", *random.sample(["<", ">", "/", "▁"], number % 5)]
        pieces = list(letters)
        for _ in range(number):
            piece = random.choice(pieces) + random.choice(pieces)
            if piece not in pieces and len(piece) < 9:
                pieces.append(piece)
        # Scores that do not depend on length: no training would produce them.
        scores = {piece: -random.uniform(1, 9) for piece in pieces}
        path = model_of(tmp_path / f"{number}.model", scores, model_type, ("<b>", "aba"))
        pair = pair_of(path, tmp_path / str(number))
        parts = [*pieces, "c", "d", "<", ">", "<s>", "</s>", "<unk>", "<b>", "aba", " "]
        texts = ["".join(random.choices(parts, k=random.randrange(1, 12))) for _ in range(60)]
        for native, reference in zip(
            pair.native.encode_batch(texts), pair.reference(texts).input_ids, strict=True
        ):
            differing += native != reference
            # The same pieces in another order have the same score.
            assert sorted(native) == sorted(reference)
    # In 900 texts.
    assert differing <= (5 if model_type == "UNIGRAM" else 0)


def test_a_name_of_unknown_characters_only(tmp_path: Path) -> None:
    pair = pair_of(model_of(tmp_path / "a.model", {"a": -1.0}), tmp_path / "hf")
    assert_same_ids(pair, "a<?>a")
    # Still not the control token.
    assert pair.native.encode("a<s>a") == [3, 0, 3]
    assert pair.reference("a<s>a").input_ids == [3, 0, 0, 3]


def test_runs_of_a_character_may_be_cut_in_another_order(tmp_path: Path) -> None:
    scores = {"▁": -3.1, "▁▁": -4.7, "▁▁▁": -5.3, "a": -7.9}
    pair = pair_of(model_of(tmp_path / "runs.model", scores), tmp_path / "hf")
    for text in ("a" * before + " " * n + "a" for before in range(9) for n in range(2, 30)):
        assert sorted(pair.reference(text).input_ids) == sorted(pair.native.encode(text))


def test_where_scores_tie_in_float32_the_cut_may_differ(tmp_path: Path) -> None:
    scores = {"x": -10.0, "a": -5.0, "b": -9.0, "c": -5.0, "ab": -4.99998, "bc": -5.0}
    pair = pair_of(model_of(tmp_path / "tie.model", scores), tmp_path / "hf")
    assert_same(pair, "abc")
    assert_same(pair, "x" * 20 + "abc")
    # The sum is -10,000 before the place, of which float32 has no fifth decimal.
    text = "x" * 1000 + "abc"
    assert [pair.native.piece(token) for token in pair.native.encode(text)[-2:]] == ["a", "bc"]
    assert pair.reference.tokenize(text)[-2:] == ["ab", "c"]
    model = SentencePieceProcessor(model_file=str(tmp_path / "tie.model"))
    assert float32_cannot_tell(model, pair.native.encode(text), pair.reference(text).input_ids)


FOREIGN: dict[str, dict[str, Any]] = {
    "identity": {"model_type": "unigram", "vocab_size": 300, "normalization_rule_name": "identity"},
    "normalized": {"model_type": "unigram", "vocab_size": 300},
    "normalized-bpe": {"model_type": "bpe", "vocab_size": 300, "pad_id": 3},
    "bytes": {"vocab_size": 560, "byte_fallback": True, "control_symbols": ["<tag>"]},
}


@pytest.mark.parametrize("name", ["llama", "t5", *FOREIGN])
def test_a_model_alone(name: str, tmp_path: Path) -> None:
    if name == "llama":
        path = llama_directory(tmp_path / "a") / "tokenizer.model"
    elif name == "t5":
        path = t5_directory(tmp_path / "a") / "spiece.model"
    else:
        path = train_model(tmp_path / "a" / "a.model", **FOREIGN[name])
    pair = pair_of(path, tmp_path / "hf")
    unknown = pair.reference.unk_token_id
    for text in HARD:
        if "\u0301" in text and name in ("t5", "normalized", "normalized-bpe", "bytes"):
            continue
        ids = pair.native.encode(text)
        assert pair.reference(text).input_ids == ids
        if unknown not in ids:
            assert pair.reference.decode(ids, skip_special_tokens=True) == pair.native.decode(ids)
    model = SentencePieceProcessor(model_file=str(path))
    reference = pair.reference
    for token, number in (
        (reference.bos_token_id, model.bos_id()),
        (reference.pad_token_id, model.pad_id()),
    ):
        assert token == (None if number < 0 else number)
    again = Tokenizer.load(pair.folder)
    assert again.record == pair.native.record
    assert files_of(pair.folder) == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


def test_where_normalizing_differs(tmp_path: Path) -> None:
    path = train_model(tmp_path / "a" / "a.model", **FOREIGN["bytes"])
    pair = pair_of(path, tmp_path / "hf")
    assert_same(pair, "ﬁ e\u0301")
    # `tokenizers` loses the combining mark.
    assert (
        pair.reference("ﬁ\u0301").input_ids
        == pair.native.encode("ﬁ")
        != pair.native.encode("ﬁ\u0301")
    )


@pytest.mark.parametrize("make", [llama_directory, t5_directory])
def test_a_hugging_face_directory_is_copied(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "model.safetensors").touch()
    pair = pair_of(source, tmp_path / "hf")
    assert len(files_of(pair.folder)) == 2
    for name in files_of(pair.folder):
        assert (pair.folder / name).read_bytes() == (source / name).read_bytes()
    for text in TEXTS:
        assert pair.reference.encode(text, add_special_tokens=False) == pair.native.encode(text)
    assert Tokenizer.load(pair.folder).record == pair.native.record


def test_a_directory_that_names_no_class_is_written_anew(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "source")
    write_json(source / "tokenizer_config.json", {"eos_token": "<tag>"})
    pair = pair_of(source, tmp_path / "hf")
    assert pair.reference.eos_token == "<tag>"
    assert pair.reference(HARD).input_ids == pair.native.encode_batch(HARD)
    assert Tokenizer.load(pair.folder).record == pair.native.record

    added = {str(pair.native.vocab_size): {"content": "<new>", "special": True}}
    write_json(source / "tokenizer_config.json", {"added_tokens_decoder": added})
    message = r"has tokens beyond its sentencepiece model's .*; name it in tokenizer_config\.json"
    assert_refused(source, message, tmp_path / "empty")


def assert_refused(path: Path, message: str, folder: Path) -> None:
    tokenizer = Tokenizer.load(path)
    folder.mkdir()
    with pytest.raises(InputError, match=message) as error:
        write_hf_tokenizer(tokenizer, folder, max_length=8)
    assert error.value.where == str(path)
    assert not files_of(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "word"}, "its algorithm is word"),
        ({"model_type": "char"}, "its algorithm is char"),
        ({"treat_whitespace_as_suffix": True}, "it writes spaces otherwise than in front of"),
        ({"control_symbols": ["§"]}, "its control token '§' is a single character"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["<b>"]},
            "it adds or removes spaces and",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options = {"vocab_size": 200, "model_type": "unigram", **options}
    path = train_model(tmp_path / "a" / "a.model", **options)
    assert_refused(path, message, tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pieces.add(piece="zz", type=5), "its piece 'zz' is marked as unused"),
        (lambda model: model.pieces.add(piece="a " * 9), "two of its pieces differ in a space"),
        (lambda model: model.pieces.add(piece="aé"), "its piece 'aé' has a character that is no"),
        (
            lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.BPE),
            "two of its merges have the same score",
        ),
    ],
)
def test_an_unusual_model_is_refused(
    change: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    pieces = {"a": -1.0, "b": -1.0, "aa": -2.0, "ab": -2.0, "▁": -1.0, "a▁" * 9: -3.0}
    path = model_of(tmp_path / "a.model", pieces)
    model = ModelProto.FromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())
    assert_refused(path, message, tmp_path / "empty")


@pytest.mark.parametrize("make", [llama_directory, t5_directory])
def test_a_tokenizer_is_taken(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    for name in ("config.json", "model.safetensors", "README.md"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    folder = tmp_path / "taken"
    folder.mkdir()
    assert take_tokenizer(source, folder) == []
    names = files_of(folder)
    assert "chat_template.jinja" in names
    assert "tokenizer_config.json" in names
    assert not {"config.json", "model.safetensors", "README.md"} & set(names)
    assert Tokenizer.load(folder).record == Tokenizer.load(source).record


def test_what_was_written_is_taken_back(pair: Pair, tmp_path: Path) -> None:
    assert take_tokenizer(pair.folder, tmp_path) == []
    assert Tokenizer.load(tmp_path).record == pair.native.record


def test_where_there_is_no_tokenizer_nothing_is_taken(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "taken"
    source.mkdir()
    folder.mkdir()
    assert take_tokenizer(source, folder) is None
    write_json(source / "tokenizer.json", {})
    write_json(source / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer; copy"):
        take_tokenizer(source, folder)
    assert not files_of(folder)


def test_a_tokenizer_that_megaphase_cannot_use_is_not_taken(tmp_path: Path) -> None:
    source, folder = llama_directory(tmp_path / "source"), tmp_path / "taken"
    folder.mkdir()
    write_json(source / "tokenizer_config.json", {})
    write_json(source / "config.json", {"model_type": "xlm-roberta"})
    with pytest.raises(InputError, match=re.escape("xlm-roberta numbers the tokens differently")):
        take_tokenizer(source, folder)
    assert not files_of(folder)


def test_a_chat_template_that_cannot_be_used_is_said_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = qwen3(tmp_path / "qwen")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")
    out = tmp_path / "taken"
    out.mkdir()
    assert take_tokenizer(folder, out) == []
    said = f"Warning: {folder}/chat_template.jinja: "
    assert capsys.readouterr().err.startswith(said)
    tokenizer = Tokenizer.load(out)
    assert [tokenizer.piece(each) for each in turn_ends(tokenizer)] == ["<|im_end|>"]
