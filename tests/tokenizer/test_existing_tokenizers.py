"""Existing tokenizers are used as they are: their ids are those of transformers and sentencepiece,
and every command works with them."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_support import make_tokenizer
from existing_tokenizers import (
    STRANGE,
    TEXTS,
    llama_directory,
    t5_directory,
    train_model,
    write_json,
)
from hypothesis import given
from hypothesis import strategies as st

from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_directory(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_directory(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_ids_are_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    import transformers

    folder = request.getfixturevalue(name)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    native = Tokenizer.load(folder)
    assert (native.vocab_size, native.eod) == (len(reference), reference.eos_token_id)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False)
        assert native.encode(text) == expected
        assert native.decode(expected) == reference.decode(expected)
    for added, token in reference.get_added_vocab().items():
        if added not in reference.all_special_tokens[:3]:
            assert native.tags.get(added.strip("<>"), token) == token


def test_what_transformers_saves_is_read_again(t5: Path, tmp_path: Path) -> None:
    import transformers

    reference = transformers.AutoTokenizer.from_pretrained(t5)
    reference.add_special_tokens({"additional_special_tokens": ["<fr>", "<eu>"]})
    reference.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "spiece.model").write_bytes((t5 / "spiece.model").read_bytes())
    native = Tokenizer.load(tmp_path / "saved")
    assert native.vocab_size == len(reference)
    assert native.tags["fr"] == reference.convert_tokens_to_ids("<fr>")
    assert native.tags["eu"] == reference.convert_tokens_to_ids("<eu>")
    assert native.encode(TEXTS[3]) == reference.encode(TEXTS[3], add_special_tokens=False)


def test_a_slow_tokenizer_of_transformers_agrees(tmp_path: Path) -> None:
    import transformers

    model = train_model(
        tmp_path / "slow" / "spiece.model", vocab_size=300, bos_id=2, eos_id=1, pad_id=0, unk_id=3
    )
    reference = transformers.BertGenerationTokenizer(str(model))
    reference.save_pretrained(tmp_path / "slow")
    native = Tokenizer.load(tmp_path / "slow")
    assert native.eod == reference.eos_token_id == 1
    for text in (*TEXTS, *STRANGE):
        if "<" not in text:
            assert native.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_added_and_control_tokens_become_tags(name: str, request: pytest.FixtureRequest) -> None:
    native = Tokenizer.load(request.getfixturevalue(name))
    if name == "t5":
        size = native.vocab_size - 5
        assert native.tags == {f"extra_id_{4 - i}": size + i for i in range(5)}
    else:
        assert list(native.tags) == ["tag"]
    assert native.byte_fallback == (name == "llama")
    assert native.record.algorithm == {"t5": "unigram", "llama": "bpe"}[name]
    # They are skipped, and have no bytes.
    ids = native.encode(TEXTS[0])
    assert native.decode([*native.tags.values(), *ids, native.eod]) == TEXTS[0]
    sizes = native.token_bytes()
    assert sizes.shape == (native.vocab_size,)
    assert not sizes[[native.eod, *native.tags.values()]].any()


@pytest.mark.parametrize("name", ["t5", "llama"])
@given(text=st.one_of(st.sampled_from(STRANGE), st.text(max_size=20), st.just("a▁b")))
def test_any_text_encodes_without_control_tokens(
    name: str, text: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    native = LOADED.setdefault(name, Tokenizer.load(folder))
    ids = native.encode(text)
    assert not {native.eod, *native.tags.values()} & set(ids)
    assert native.encode_arrays([text, "x"])[0].tolist() == ids
    assert isinstance(native.decode(np.array(ids)), str)


LOADED: dict[str, Tokenizer] = {}


def test_a_model_alone_is_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    alone = Tokenizer.load(llama / "tokenizer.model")
    in_folder = Tokenizer.load(llama)
    assert alone.encode(TEXTS[2]) == in_folder.encode(TEXTS[2])
    assert (alone.eod, alone.tags, alone.vocab_size) == (2, in_folder.tags, in_folder.vocab_size)
    # The same ids, so corpora of one fit the other.
    assert alone.fingerprint == in_folder.fingerprint
    pickled = pickle.dumps(alone)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).encode("one two") == alone.encode("one two")


def test_the_model_of_one_of_ours_gives_the_same(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    native, alone = Tokenizer.load(folder), Tokenizer.load(folder / "tokenizer.model")
    assert (alone.eod, alone.fingerprint) == (native.eod, native.fingerprint)
    assert alone.encode("  ▁<eod> 😀") == native.encode("  ▁<eod> 😀")
    assert alone.tags["fr"] == native.tags["fr"]


def test_fingerprints_differ_where_the_ids_do(t5: Path, llama: Path, tmp_path: Path) -> None:
    prints = {Tokenizer.load(path).fingerprint for path in (t5, llama, t5 / "spiece.model")}
    assert len(prints) == 3
    config = json.loads((llama / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {**config, "eos_token": "<tag>"})
    other_eod = Tokenizer.load(tmp_path)
    assert other_eod.eod == Tokenizer.load(llama).tags["tag"]
    assert other_eod.fingerprint not in prints


def test_older_files_name_the_tokens_too(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama / "tokenizer.model").read_bytes())
    size = Tokenizer.load(llama).vocab_size
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": size + 1, "<|im_start|>": size})
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    native = Tokenizer.load(tmp_path)
    # The end of a turn does not end a document.
    assert (native.vocab_size, native.eod) == (size + 2, 2)
    assert (native.tags["|im_start|"], native.tags["|im_end|"]) == (size, size + 1)
    assert native.token_bytes()[size:].tolist() == [0, 0]


def copied(source: Path, folder: Path, config: dict[str, object]) -> Path:
    (folder / "sentencepiece.bpe.model").write_bytes((source / "tokenizer.model").read_bytes())
    write_json(folder / "tokenizer_config.json", config)
    return folder


XLM_R_TOKENS = {"0": {"content": "<s>"}, "1": {"content": "<pad>"}, "2": {"content": "</s>"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "XLMRobertaTokenizer numbers the tokens"),
        ({"tokenizer_class": "NllbTokenizerFast"}, "NllbTokenizerFast numbers the tokens"),
        ({"tokenizer_class": "PegasusTokenizer"}, "PegasusTokenizer numbers the tokens"),
        ({"tokenizer_class": "New", "added_tokens_decoder": XLM_R_TOKENS}, "New numbers the tok"),
        ({"tokenizer_class": "AlbertTokenizer"}, "AlbertTokenizer changes the text before its"),
        ({"tokenizer_class": "T5Tokenizer", "do_lower_case": True}, "T5Tokenizer changes the text"),
        ({"add_prefix_space": False}, "its add_prefix_space is false, but its sentencepiece model"),
        ({"added_tokens_decoder": {"x": 1}}, "its tokens are not in the format of transformers"),
    ],
)
def test_other_ids_than_the_models_are_refused(
    llama: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    folder = copied(llama, tmp_path, config)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(f"{folder}: ")
    # The model itself may be given instead.
    assert Tokenizer.load(folder / "sentencepiece.bpe.model").eod == 2


def test_a_class_named_in_the_models_configuration_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path, {})
    write_json(folder / "config.json", {"model_type": "xlm-roberta"})
    with pytest.raises(InputError, match="xlm-roberta numbers the tokens differently"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_tokenizer_json_with_other_numbers_is_refused(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    folder = copied(llama, tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]

    def vocabulary(order: Callable[[list[str]], list[str]]) -> object:
        ordered = order(pieces)
        if kind == "bpe":
            return {piece: i for i, piece in enumerate(ordered)}
        return [[piece, 0.0] for piece in ordered]

    write_json(folder / "tokenizer.json", {"model": {"vocab": vocabulary(list)}})
    assert Tokenizer.load(folder).vocab_size == len(pieces)
    shifted = vocabulary(lambda ordered: ["<pad>", *ordered])
    write_json(folder / "tokenizer.json", {"model": {"vocab": shifted}})
    with pytest.raises(InputError, match="PreTrainedTokenizerFast numbers the tokens differently"):
        Tokenizer.load(folder)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", {})
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer; copy"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"tokenizer\.model: is not a sentencepiece model; give"):
        Tokenizer.load(tmp_path)
    without = train_model(tmp_path / "a" / "a.model", vocab_size=300, eos_id=-1)
    with pytest.raises(InputError, match=r"a\.model: the model has no symbol that can end a doc"):
        Tokenizer.load(without)
    without.rename(tmp_path / "a" / "tokenizer.model")
    with pytest.raises(InputError, match=r"has no token that can end a document; name an eos_tok"):
        Tokenizer.load(tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is not a JSON object"):
        Tokenizer.load(tmp_path / "a")
