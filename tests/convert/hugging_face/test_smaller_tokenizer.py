"""Models with fewer rows than their published tokenizer has tokens, as Gemma 3's of text alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from existing_tokenizers import TEXTS, llama_directory, train_model, write_json
from hf_support import export, make_transformers_model
from run_support import TEXT_BYTES, run_settings, write_run_file
from tokenizer_json_kinds import gemma3
from warm_commands import run, run_well

from megaphase.convert.hugging_face.from_hf import Taken, from_hf
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.tokenizer import Tokenizer

IMAGE = "<image_soft_token>"
DESCRIBED = {
    "content": IMAGE, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
    "special": True,
}  # fmt: skip
SEQ_LEN = 32


def gemma(folder: Path, kind: str) -> Path:
    """Make a model whose files name a token for which it has no row, as the published ones do."""
    import transformers

    if kind == "json":
        gemma3(folder)
    else:
        train_model(
            folder / "tokenizer.model",
            vocab_size=520, model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3,
            pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
            byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
            normalization_rule_name="identity", user_defined_symbols=["<mask>"],
        )  # fmt: skip
        roles = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk")}
        write_json(folder / "tokenizer_config.json", roles | {"add_bos_token": True})
    rows = Tokenizer.load(folder).vocab_size
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"image_token": IMAGE, "extra_special_tokens": {"image_token": IMAGE}}
    if kind == "sentencepiece":
        named |= {"tokenizer_class": "GemmaTokenizer"}
        named |= {"added_tokens_decoder": {str(rows): DESCRIBED}}
    write_json(folder / "tokenizer_config.json", config | named)
    write_json(folder / "added_tokens.json", {IMAGE: rows})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<eos>", "image_token": IMAGE})
    if kind == "json":
        whole = json.loads((folder / "tokenizer.json").read_text())
        whole["added_tokens"].append({"id": rows, **DESCRIBED})
        write_json(folder / "tokenizer.json", whole)
    model = transformers.Gemma3TextConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
        max_position_embeddings=128, sliding_window=16,
    )  # fmt: skip
    make_transformers_model(model).save_pretrained(folder)
    return folder


def taken(directory: Path, out: Path) -> Taken:
    return from_hf(directory, out, trust_pickle=False, workers=1)


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_export_has_the_ids_of_the_published_tokenizer(kind: str, tmp_path: Path) -> None:
    import transformers

    directory = gemma(tmp_path / "gemma", kind)
    published = transformers.AutoTokenizer.from_pretrained(directory)
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    assert published.convert_tokens_to_ids(IMAGE) == rows
    result = taken(directory, tmp_path / "base")
    assert list(result.left_out) == [IMAGE]
    native = Tokenizer.load(tmp_path / "base" / "tokenizer")
    assert native.vocab_size == rows
    exported = transformers.AutoTokenizer.from_pretrained(
        export(tmp_path / "base", tmp_path / "hf", None)
    )
    assert len(exported) == rows
    assert max(exported(f"a {IMAGE} b").input_ids) < rows
    for text in TEXTS:
        ids = published(text).input_ids
        assert exported(text).input_ids == ids
        assert [native.bos, *native.encode(text)] == ids
    for file in (tmp_path / "hf").glob("*token*.json"):
        assert IMAGE not in file.read_text()


def test_every_command_works_with_such_a_model(tmp_path: Path) -> None:
    import transformers

    directory, base = gemma(tmp_path / "gemma", "json"), tmp_path / "base"
    result = run("convert", "from-hf", directory, "--out", base)
    assert result.returncode == 0
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    assert f"the model has {rows:,} rows and none for them: {IMAGE}. No text" in result.stderr
    model = yaml.safe_load((base / "model.yaml").read_text())["model"] | {"seq_len": SEQ_LEN}
    texts = write_languages(tmp_path / "text", seed=5, languages=TEXT_BYTES)
    for name, text in texts.items():
        out = tmp_path / "data" / name
        run_well("data", "tokenize", text, "--tokenizer", base / "tokenizer", "--out", out)
    settings = run_settings(tmp_path, model=model, tokenizer=str(base / "tokenizer"))
    settings["phases"] = [settings["phases"][1] | {"steps": 2, "optimizer_state": "reset"}]
    run_file = write_run_file(tmp_path, settings)
    run_well("plan", run_file)
    run_well("train", run_file, "--from", base)
    run_well("generate", base, "--prompt", "The quick", "--max-tokens", 2)
    more = ("--input", f"x={next(iter(texts.values()))}", "--add", 5)
    run_well("tokenizer", "extend", base / "tokenizer", *more, "--out", tmp_path / "tok")
    extended = tmp_path / "extended"
    run_well(
        "convert", "extend-vocab", base, "--tokenizer", tmp_path / "tok", "--out", extended
    )  # fmt: skip
    run_well("convert", "to-hf", f"{tmp_path / 'run'}@latest", "--out", tmp_path / "trained")
    run_well("convert", "to-hf", extended, "--out", tmp_path / "larger")
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(each).get_input_embeddings().weight
        for each in (directory, tmp_path / "larger")
    )
    assert torch.equal(after[:rows], before)
    assert len(after) == rows + 5
    assert after.isfinite().all()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "larger")
    assert len(words) == rows + 5


def test_a_token_that_text_encodes_to_is_not_left_out(tmp_path: Path) -> None:
    directory = gemma(tmp_path / "gemma", "json")
    path = directory / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"].append({**DESCRIBED, "content": "<table>s", "special": False})
    whole["added_tokens"][-1]["id"] = len(whole["model"]["vocab"]) + 100
    write_json(path, whole)
    result = taken(directory, tmp_path / "base")
    assert result.tokenizer is None
    assert "rows, and its token '<table>s'," in result.why_no_tokenizer
    assert "cannot be left out; use the tokenizer with which" in result.why_no_tokenizer
    assert not (tmp_path / "base" / "tokenizer").exists()


def refused(directory: Path, rows: int, out: Path) -> str:
    """Return why the tokenizer beside a Llama with so many rows is not taken."""
    import transformers

    model = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    make_transformers_model(model).save_pretrained(directory)
    return taken(directory, out).why_no_tokenizer


def test_pieces_and_ends_of_documents_are_not_left_out(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "llama")
    size = Tokenizer.load(directory).vocab_size
    problem = refused(directory, size - 1, tmp_path / "a")
    assert f"has {size} tokens, the model only {size - 1} rows, and its token" in problem
    config = json.loads((directory / "tokenizer_config.json").read_text())
    write_json(directory / "added_tokens.json", {"<end>": size, "[PAD]": size + 1})
    write_json(directory / "tokenizer_config.json", {**config, "eos_token": "<end>"})
    assert "its token '<end>'" in refused(directory, size, tmp_path / "b")
    # The token for padding, which was added afterwards.
    write_json(directory / "tokenizer_config.json", {**config, "pad_token": "[PAD]"})
    result = taken(directory, tmp_path / "c")
    assert list(result.left_out) == ["<end>", "[PAD]"]
    assert Tokenizer.load(tmp_path / "c" / "tokenizer").vocab_size == size


def test_init_says_what_to_do_first(tmp_path: Path) -> None:
    directory = gemma(tmp_path / "gemma", "json")
    texts = write_languages(tmp_path / "text", seed=5, languages={"a": 9000, "b": 9000})
    for name, text in texts.items():
        run_well("data", "tokenize", text, "--tokenizer", directory, "--out", tmp_path / name)
    result = run(
        "init", tmp_path / "run.yaml", "--corpus", tmp_path / "a", "--corpus", tmp_path / "b",
        "--low", "b", "--checkpoint", directory, "--tokenizer", directory, "--card", "cpu",
        "--hours", 1,
    )  # fmt: skip
    assert result.returncode == 2
    assert "rows; run `megaphase convert from-hf" in result.stderr
    assert "tokenize the corpora with gemma-base/tokenizer" in result.stderr
