"""Control tokens that a sentencepiece model has among its symbols for text, as Gemma's has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from existing_tokenizers import TEXTS, train_model, write_json
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megaphase.chats.turn_ends import turn_ends
from megaphase.convert.hugging_face.tokenizer import write_hf_tokenizer
from megaphase.data_tools.tokenizers.extend import extend_tokenizer
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

TURNS, UNUSED, ORDINARY = ("<start_of_turn>", "<end_of_turn>"), ("<unused0>", "<unused1>"), "<b>"
SPELLED = [
    *(*TURNS, *UNUSED, "<eos>", "x<end_of_turn>y", "<start_of_turn>user\nHi<end_of_turn>\n"),
    *("<end_of_turn", "<<end_of_turn>>", "a <unused0> b", "<unused0><unused1>"),
]


def directory(folder: Path, algorithm: str, **config: Any) -> Path:
    """Make a directory like Gemma's."""
    train_model(
        folder / "tokenizer.model",
        vocab_size=560, model_type=algorithm, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=[*UNUSED, *TURNS, ORDINARY],
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    described = {
        str(model.piece_to_id(text)): {"content": text, "special": text in TURNS}
        for text in (*TURNS, *UNUSED)
    }
    roles = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": described, **roles, **config},
    )  # fmt: skip
    return folder


def without_control(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Return the model without the pieces that are control tokens."""
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if piece.piece in (*TURNS, *UNUSED):
            piece.type = ModelProto.SentencePiece.UNUSED
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_text_never_becomes_a_control_token(algorithm: str, tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", algorithm)
    native, reference = Tokenizer.load(folder), without_control(folder)
    turns = {text.strip("<>"): reference.piece_to_id(text) for text in TURNS}
    reserved = [reference.piece_to_id(text) for text in UNUSED]
    assert turns.items() <= native.tags.items()
    assert list(native.reserved_tags) == reserved
    control = {*turns.values(), *reserved, native.eod}
    for text in (*SPELLED, *TEXTS, "a <b> c"):
        ids = native.encode(text)
        assert not control & {*ids}
        assert ids == reference.encode(text)
        assert native.decode(ids) == text
    assert reference.piece_to_id(ORDINARY) in native.encode("a <b> c")
    assert not native.token_bytes()[list(control)].any()
    assert native.decode([*control, *native.encode("a"), *control]) == "a"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_a_list_of_special_tokens_names_them_too(name: str, key: str, tmp_path: Path) -> None:
    """As older releases of transformers wrote it, without added_tokens_decoder."""
    folder = directory(tmp_path / "gemma", "bpe", added_tokens_decoder={})
    assert not Tokenizer.load(folder).tags
    path = folder / name
    config = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, config | {key: [TURNS[0], {"content": TURNS[1]}]})
    native, reference = Tokenizer.load(folder), without_control(folder)
    assert native.tags == {text.strip("<>"): reference.piece_to_id(text) for text in TURNS}
    text = "a <start_of_turn>b"
    assert native.encode(text) == reference.encode(text)
    assert native.decode(native.encode(text)) == text


def test_no_text_ends_a_document(tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", "bpe", eos_token="<unused1>")
    native = Tokenizer.load(folder)
    assert native.piece(native.eod) == "<unused1>"
    assert native.eod not in native.encode("a<unused1>b")


def test_the_end_of_a_turn_is_no_end_of_a_document(tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", "bpe", eos_token="<end_of_turn>")
    native = Tokenizer.load(folder)
    assert native.piece(native.eod) == "<eos>"
    assert [native.piece(each) for each in turn_ends(native)] == ["<end_of_turn>"]
    # Also where nothing but eos_token names it.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]
    write_json(path, config)
    assert Tokenizer.load(folder).eod == native.eod
    assert turn_ends(Tokenizer.load(folder)) == turn_ends(native)
    # Yi's and EuroLLM's: added to a model like Llama's, or a symbol of it.
    for number, end in enumerate(("<|im_end|>", "<|END_OF_TURN_TOKEN|>")):
        yi = tmp_path / f"yi-{number}"
        train_model(yi / "tokenizer.model", vocab_size=400, byte_fallback=True,
                    user_defined_symbols=[end])  # fmt: skip
        write_json(yi / "tokenizer_config.json", {"eos_token": end})
        chat = Tokenizer.load(yi)
        assert chat.piece(chat.eod) == "</s>"
        assert [chat.piece(each) for each in turn_ends(chat)] == [end]
    # A vocabulary without the end of a text ends documents with it.
    train_model(tmp_path / "x" / "tokenizer.model", vocab_size=400, byte_fallback=True,
                eos_piece="[end]", user_defined_symbols=["<|im_end|>"])  # fmt: skip
    write_json(tmp_path / "x" / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    chat = Tokenizer.load(tmp_path / "x")
    assert chat.piece(chat.eod) == "<|im_end|>"


def test_the_fingerprint_tells_them_apart(tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", "bpe")
    alone = Tokenizer.load(folder / "tokenizer.model")
    native = Tokenizer.load(folder)
    assert alone.encode("<end_of_turn>") != native.encode("<end_of_turn>")
    assert alone.fingerprint != native.fingerprint


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_extended_and_exported(algorithm: str, tmp_path: Path) -> None:
    import transformers

    base = directory(tmp_path / "gemma", algorithm)
    (tmp_path / "text.txt").write_text("\n".join(["garbitzaile bat etorri da"] * 60))
    extend_tokenizer(base, {"eu": [tmp_path / "text.txt"]}, tmp_path / "more", add=1)
    native, extended = Tokenizer.load(base), Tokenizer.load(tmp_path / "more")
    for text in SPELLED:
        assert extended.encode(text) == native.encode(text)
    # Without a class, the tokenizer.json is made from the model.
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    write_json(base / "tokenizer_config.json", config)
    (tmp_path / "hf").mkdir()
    write_hf_tokenizer(Tokenizer.load(base), tmp_path / "hf", max_length=99)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = Tokenizer.load(tmp_path / "hf")
    for text in (*SPELLED, *TEXTS):
        assert reference(text).input_ids == native.encode(text) == again.encode(text)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"zakurra": 560}, "merges": []}},
         "has 'zakurra', to which its model tokenizer.model encodes no text; remove tokenizer.model"
         ", so that tokenizer.json is read"),
        ("added_tokens.json", {"zakurra": 560, "katua": 561, "<|im_start|>": 562},
         "has 'zakurra' and 1 more token, to which its model tokenizer.model encodes no text; save"
         " it once more with transformers, which writes tokenizer.json, and remove tokenizer"),
    ],
)  # fmt: skip
def test_words_that_the_model_does_not_know_are_not_passed_over(
    file: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = directory(tmp_path / "gemma", "bpe")
    write_json(folder / file, change)
    with pytest.raises(InputError, match=re.escape(named)):
        Tokenizer.load(folder)


def test_control_tokens_that_were_added_are_tags(tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", "bpe")
    write_json(folder / "added_tokens.json", {"<|im_start|>": 560, "[PAD]": 561})
    assert Tokenizer.load(folder).tags["[PAD]"] == 561


def test_templates_in_files_of_their_own_come_along(tmp_path: Path) -> None:
    folder = directory(tmp_path / "gemma", "bpe")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    out = tmp_path / "hf"
    out.mkdir()
    write_hf_tokenizer(Tokenizer.load(folder), out, max_length=64)
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
