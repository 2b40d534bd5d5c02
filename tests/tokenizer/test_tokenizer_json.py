"""A tokenizer.json gives the ids of transformers, exact byte counts, and no control token."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from existing_tokenizers import STRANGE, TEXTS, write_json
from extended_tokenizers import extend
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_json_kinds import DECOMPOSED, KINDS, TEKKEN, byte_level_bpe, llama3, qwen3

from megaphase.tokenizer import Tokenizer
from megaphase.tokenizer.spelling import BYTE_OF
from megaphase.utils.errors import InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CODE = "def f(x):\n\treturn x  # ok\r\n\r\n    if x:\n        pass\n"
HOSTILE = (
    "<|endoftext|> <|end_of_text|><|eot_id|> </s><s> <eos> <bos><pad> <unk> <|im_end|>x [INST] "
    "<|reserved_special_token_0|> <unused0> <SPECIAL_20> ▁ <0x41>"
)
PLAIN = (*TEXTS, CODE, "", " ", "  two   spaces ", "\n\n\n", "日本語 😀 ﬁ ①", "1984 12345", "а́б")
# End of document, BOS, whether every document begins with it, normalization.
EXPECTED = {
    "gpt2": ("<|endoftext|>", "<|endoftext|>", False, []),
    "gpt_neox": ("<|endoftext|>", "<|endoftext|>", False, ["NFC"]),
    "olmo2": ("<|endoftext|>", "<|endoftext|>", False, []),
    "llama3": ("<|end_of_text|>", "<|begin_of_text|>", True, []),
    "llama3_instruct": ("<|end_of_text|>", "<|begin_of_text|>", True, []),
    "qwen3": ("<|endoftext|>", None, False, ["NFC"]),
    "apertus": ("</s>", "<s>", True, []),
    "gemma3": ("<eos>", "<bos>", True, []),
    "mistral": ("</s>", "<s>", True, ["a space before the text"]),
}


class Loaded(NamedTuple):
    name: str
    folder: Path
    native: Tokenizer
    reference: Any


@pytest.fixture(scope="module", params=[*KINDS, *(f"{name} extended" for name in KINDS)])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    import transformers

    name, *extended = request.param.split()
    folder = KINDS[name](tmp_path_factory.mktemp(name))
    if extended:
        folder = extend(folder, tmp_path_factory.mktemp("extended"))
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return Loaded(name, folder, Tokenizer.load(folder), reference)


def reference_ids(kind: Loaded, text: str) -> list[int]:
    return kind.reference.encode(text, add_special_tokens=False, split_special_tokens=True)


def normalized(kind: Loaded, text: str) -> str:
    if kind.native.record.normalization == ["NFC"]:
        return unicodedata.normalize("NFC", text)
    # As in sentencepiece models, the character for the space in pieces is a space.
    return text if "byte-level" in kind.native.record.algorithm else text.replace("▁", " ")


def test_the_ids_and_texts_are_those_of_transformers(kind: Loaded) -> None:
    assert kind.native.vocab_size == len(kind.reference)
    for text in (*PLAIN, DECOMPOSED):
        ids = kind.native.encode(text)
        assert ids == reference_ids(kind, text), text
        assert kind.native.decode(ids) == kind.reference.decode(ids, skip_special_tokens=True)
        assert kind.native.decode(ids) == normalized(kind, text)
    assert kind.native.encode_batch(PLAIN) == [kind.native.encode(text) for text in PLAIN]


def test_the_record_says_what_is_followed(kind: Loaded) -> None:
    eod, bos, adds_bos, normalization = EXPECTED[kind.name]
    record, vocabulary = kind.native.record, kind.reference.get_vocab()
    assert kind.native.eod == record.eod == vocabulary[eod]
    assert record.bos == (None if bos is None else vocabulary[bos])
    assert (record.adds_bos, record.normalization) == (adds_bos, normalization)
    assert record.library == "tokenizers"
    assert record.library_version
    assert kind.native.piece(record.eod) == eod
    template = kind.name in ("llama3", "llama3_instruct", "apertus", "gemma3", "mistral")
    assert record.left_out == (["TemplateProcessing"] if template else [])


def test_text_never_becomes_a_control_token(kind: Loaded) -> None:
    native = kind.native
    control = {native.eod, native.record.bos, *native.tags.values(), *native.reserved_tags}
    special = {i for i, token in kind.reference.added_tokens_decoder.items() if token.special}
    special.discard(kind.reference.get_vocab().get("<unk>"))
    every = [HOSTILE, *kind.reference.get_vocab()]
    for text in (*every, *(f"a {text}\n" for text in every)):
        ids = set(native.encode(text))
        assert not ids & control
        assert not ids & special
        assert native.decode(native.encode(text)) == normalized(kind, text)
    sizes = native.token_bytes()
    assert sizes.shape == (native.vocab_size,)
    assert not sizes[sorted(special | (control - {None}))].any()
    ids = native.encode(TEXTS[0])
    assert native.decode([*native.tags.values(), *ids, native.eod]) == TEXTS[0]


def test_reserved_and_added_tokens_are_tags(kind: Loaded) -> None:
    native, vocabulary = kind.native, kind.reference.get_vocab()
    reserved = {
        "llama3": [f"<|reserved_special_token_{n}|>" for n in range(4)],
        "llama3_instruct": [f"<|reserved_special_token_{n}|>" for n in range(4)],
        "apertus": [f"<SPECIAL_{n}>" for n in range(20, 25)],
        "gemma3": ["<unused0>", "<unused1>"],
    }
    expected = [vocabulary[text] for text in reserved.get(kind.name, [])]
    assert list(native.reserved_tags) == sorted(expected)
    if kind.name == "qwen3":
        ids = {name: vocabulary[f"<{name}>"] for name in ("|im_start|", "|im_end|")}
        assert native.tags == ids
        [think] = native.encode("<think>")
        assert native.token_bytes()[think] == len("<think>")
        assert native.decode([think]) == "<think>"


LOADED: dict[str, Tokenizer] = {}
ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from([*STRANGE, *TEXTS, HOSTILE, CODE, DECOMPOSED])).map("".join),
    st.text(alphabet=st.sampled_from("aé é ा̀ก一😀\n\t ▁<|>'sS1"), max_size=40),
)


@given(text=ANY_TEXT)
@settings(max_examples=150)
def test_any_text_comes_back_with_its_bytes(kind: Loaded, text: str) -> None:
    native = kind.native
    ids = native.encode(text)
    expected = normalized(kind, text)
    assert native.decode(np.array(ids, np.int32)) == expected
    prefix = "a space before the text" in native.record.normalization and bool(text)
    assert native.token_bytes()[ids].sum() == len(expected.encode()) + prefix
    assert native.exact_bytes == ("byte-level" in native.record.algorithm
                                  and not native.record.normalization)  # fmt: skip
    for count in range(1, min(len(ids), 6)):
        assert expected.startswith(native.decode(ids[:count], whole=True))


@given(text=ANY_TEXT)
@settings(max_examples=100)
def test_any_text_has_the_ids_of_transformers(kind: Loaded, text: str) -> None:
    if kind.native.decode([]) == "" and not any(mark in text for mark in "<[|▁"):
        assert kind.native.encode(text) == reference_ids(kind, text)


def test_a_long_text_in_parts_is_the_same(kind: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join([*PLAIN, *TEXTS, HOSTILE]) * 3
    whole = kind.native.encode(text)
    monkeypatch.setattr("megaphase.tokenizer.tokenizers_backend._LONG_TEXT", 40)
    assert kind.native.encode_batch([text, "short", text]) == [
        whole, kind.native.encode("short"), whole
    ]  # fmt: skip
    assert kind.native.encode("x" * 100) == reference_ids(kind, "x" * 100)


def test_half_a_character_is_left_out(kind: Loaded) -> None:
    ids = kind.native.encode("a 🜁")
    assert kind.native.decode(ids[:-1]).endswith("\ufffd")
    assert kind.native.decode(ids[:-1], whole=True).strip() == "a"
    assert kind.native.decode(ids, whole=True) == "a 🜁"


def test_it_pickles_as_its_directory(kind: Loaded) -> None:
    pickled = pickle.dumps(kind.native)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.record == kind.native.record
    assert again.encode(TEXTS[3]) == kind.native.encode(TEXTS[3])


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    edit(whole)
    write_json(path, whole)
    return folder


def test_parts_that_depend_on_more_than_the_text_are_left_out(tmp_path: Path) -> None:
    plain = Tokenizer.load(llama3(tmp_path / "plain"))
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}  # fmt: skip

    def edit(whole: dict[str, Any]) -> None:
        whole["model"]["dropout"] = 0.5
        whole |= {"truncation": truncation, "padding": padding}

    other = Tokenizer.load(edited(llama3(tmp_path / "other"), edit))
    assert other.record.left_out == ["truncation", "padding", "dropout", "TemplateProcessing"]
    assert other.encode_batch(TEXTS) == plain.encode_batch(TEXTS)
    assert other.fingerprint == plain.fingerprint


def test_the_fingerprint_follows_the_ids(tmp_path: Path) -> None:
    prints = [Tokenizer.load(make(tmp_path / name)).fingerprint for name, make in KINDS.items()]
    # The same ids with the same token at a document's end.
    assert prints[3] == prints[4]
    assert len(set(prints)) == len(prints) - 1
    folder = edited(llama3(tmp_path / "a"), lambda whole: whole["model"]["merges"].pop())
    assert Tokenizer.load(folder).fingerprint not in prints


def test_control_tokens_that_merges_make_are_not_made(tmp_path: Path) -> None:
    folder = KINDS["mistral"](tmp_path)

    def edit(whole: dict[str, Any]) -> None:
        vocabulary = whole["model"]["vocab"]
        for piece in ("<", "s", ">", "s>"):
            vocabulary.setdefault(piece, 1000 + len(vocabulary))
        whole["model"]["merges"] = [["s", ">"], ["<", "s>"], *whole["model"]["merges"]]

    native = Tokenizer.load(edited(folder, edit))
    assert native.record.bos not in native.encode("a<s>b <s>")
    assert native.decode(native.encode("a<s>b <s>")) == "a<s>b <s>"


def test_eod_may_come_from_the_models_configuration(tmp_path: Path) -> None:
    folder = qwen3(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"has no token that can end a document; name an eos_tok"):
        Tokenizer.load(folder)
    token = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][0]["id"]
    write_json(folder / "config.json", {"eos_token_id": [token, token + 1]})
    assert Tokenizer.load(folder).eod == token
    write_json(folder / "generation_config.json", {"eos_token_id": token + 2})
    assert Tokenizer.load(folder).eod == token + 2


def test_a_list_of_ranks_for_tiktoken_is_left_aside(tmp_path: Path) -> None:
    folder = llama3(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert Tokenizer.load(folder).record.library == "tokenizers"


def tekken(folder: Path) -> Path:
    """Make a directory like Mistral's, with a tekken.json alone."""
    folder.mkdir()
    vocabulary = byte_level_bpe(TEKKEN).get_vocab()
    merged = [text for text in sorted(vocabulary, key=vocabulary.__getitem__) if len(text) > 1]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(map(BYTE_OF.__getitem__, text)) for text in merged]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    config = {"pattern": TEKKEN, "num_vocab_tokens": len(tokens), "version": "v7",
              "default_vocab_size": len(tokens) + 6, "default_num_special_tokens": 6}  # fmt: skip
    write_json(
        folder / "tekken.json",
        {"config": config,
         "vocab": [{"rank": rank, "token_bytes": base64.b64encode(token).decode()}
                   for rank, token in enumerate(tokens)],
         "special_tokens": [{"rank": rank, "token_str": name, "is_control": True}
                            for rank, name in enumerate(names)]},
    )  # fmt: skip
    return folder


def test_a_tekken_file_is_used_by_way_of_a_tokenizer_json(tmp_path: Path) -> None:
    folder = tekken(tmp_path / "mistral")
    import transformers

    message = r"tekken\.json: is used by way of a tokenizer\.json; write it"
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.load(folder)
    remedy = str(error.value).partition("transformers 5: ")[2]
    subprocess.run([sys.executable, "-c", remedy], check=True)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    native = Tokenizer.load(folder)
    assert (native.eod, native.record.bos) == (2, 1)
    for text in (*PLAIN, HOSTILE):
        assert native.decode(native.encode(text)) == text
        if "<" not in text and "[" not in text:
            assert native.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_ranks_for_tiktoken_without_a_tokenizer_json_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"IQ== 0\nIg== 1\n")
    message = rf"{name}: is a list of ranks for tiktoken, used by way of a tokenizer.json; copy the"
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=message):
            Tokenizer.load(path)


def keeping(expression: str) -> dict[str, Any]:
    """A pre-tokenizer that removes what the expression does not match."""
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": True}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda it: it["model"].update(type="WordPiece"), "is of the kind WordPiece"),
        (lambda it: it["model"].update(type="Unigram"), "is of the kind Unigram"),
        (lambda it: it["model"].update(end_of_word_suffix="</w>"), "its end_of_word_suffix '</w>'"),
        (lambda it: it.update(pre_tokenizer={"type": "WhitespaceSplit"}),
         "its pre-tokenizer WhitespaceSplit drops white space"),
        (lambda it: it.update(pre_tokenizer=keeping(r"\p{L}+")),
         "its pre-tokenizer Split drops white space"),
        (lambda it: it.update(pre_tokenizer=keeping("(")), "the tokenizers library cannot read it"),
        (lambda it: it["model"]["vocab"].pop("Ċ"), "has no token for the byte 0x0A, so"),
        (lambda it: it["model"]["merges"].append(["xyz", "zyx"]), "the tokenizers library cannot"),
        (lambda it: it.update(added_tokens=[{"id": 7}]), "its tokens are not in the format"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = edited(llama3(tmp_path), edit)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("said", [True, False])
def test_a_space_before_texts_is_that_of_tokenizer_json(tmp_path: Path, said: bool) -> None:
    """tokenizer_config.json is not followed in a sequence, as in every release of transformers, and
    must not say otherwise where they differ."""
    config = {"add_prefix_space": said}
    folder = llama3(tmp_path / "sequence")
    before = Tokenizer.load(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    text = "def f(x):\n\treturn x[0]"
    assert Tokenizer.load(folder).encode(text) == before.encode(text)
    assert Tokenizer.load(folder).fingerprint == before.fingerprint
    for own in (True, False):
        step = {"type": "ByteLevel", "add_prefix_space": own, "trim_offsets": True}
        alone = edited(llama3(tmp_path / f"{own}"), lambda it, x=step: it.update(pre_tokenizer=x))
        path = alone / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if own is said:
            tokenizer = Tokenizer.load(alone)
            assert tokenizer.piece(tokenizer.encode("hello")[0]).startswith("▁") is own
            continue
        message = rf"add_prefix_space: is {str(said).lower()}, but tokenizer.json has"
        with pytest.raises(InputError, match=message):
            Tokenizer.load(alone)


def test_a_tokenizer_json_alone_is_refused(tmp_path: Path) -> None:
    path = llama3(tmp_path) / "tokenizer.json"
    with pytest.raises(InputError, match="does not say which token ends a document; give the dir"):
        Tokenizer.load(path)
