"""`megaphase tokenizer extend`: old ids and old encodings stay, new tokens are used."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from data_support import write_jsonl
from existing_tokenizers import STRANGE, TEXTS, train_model
from extended_tokenizers import ADDED, BASES, NEW_TEXTS, extend, new_files
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.convert.hugging_face.tokenizer import take_tokenizer, write_hf_tokenizer
from megaphase.data_tools.tokenizers.extend import extend_tokenizer
from megaphase.data_tools.tokenizers.merges import learn_pieces
from megaphase.tokenizer import Tokenizer, pieces_replaced
from megaphase.utils.errors import InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MIXED = [*STRANGE, *TEXTS, *(text for texts in NEW_TEXTS.values() for text in texts[:4])]
ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(MIXED), max_size=4).map(" ".join),
    st.text(alphabet=st.sampled_from("aeoszćłὴα क一😀\n\t ▁<|>'sS1"), max_size=30),
)


class Both(NamedTuple):
    name: str
    base: Tokenizer
    new: Tokenizer

    @property
    def texts(self) -> list[str]:
        """Return texts without names of control tokens; for Llama's class, which adds no space
        before a space, without those that begin with one."""
        first = " " if self.name == "llama2_json" else "<"
        return [text for text in MIXED if "<" not in text and not text.startswith(first)]

    @property
    def for_transformers(self) -> bool:
        return (self.new.path / "tokenizer.json").exists()


@pytest.fixture(scope="module", params=list(BASES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp(request.param)
    base = BASES[request.param](folder / "base")
    return Both(request.param, Tokenizer.load(base), Tokenizer.load(extend(base, folder)))


def test_old_ids_stay_and_new_ones_follow(both: Both) -> None:
    base, new = both.base, both.new
    size = base.vocab_size
    assert new.vocab_size == size + ADDED
    extends = new.record.extends
    assert extends is not None
    assert (extends.tokenizer_hash, extends.vocab_size) == (base.fingerprint, size)
    for key in ("eod", "bos", "adds_bos", "normalization", "tags", "reserved_tags", "algorithm"):
        assert getattr(new.record, key) == getattr(base.record, key)
    assert [new.spelling(token) for token in range(size)] == [
        base.spelling(token) for token in range(size)
    ]
    spellings = [new.spelling(token) for token in range(size, size + ADDED)]
    assert len({*spellings, b""}) == ADDED + 1
    assert new.fingerprint != base.fingerprint
    assert not {base.spelling(token) for token in range(size)} & set(spellings)


@given(text=ANY_TEXT)
@settings(max_examples=150)
def test_without_a_new_token_the_encoding_is_the_old_one(both: Both, text: str) -> None:
    old, new = both.base.encode(text), both.new.encode(text)
    if max(new, default=0) < both.base.vocab_size:
        assert new == old
    else:
        assert new != old
    assert both.new.decode(new) == both.base.decode(old) or not both.new.byte_fallback
    control = {new_id for new_id in range(both.new.vocab_size) if not both.new.spelling(new_id)}
    assert not control & set(new) or not both.new.byte_fallback
    sizes = both.new.token_bytes()
    if both.new.byte_fallback:
        assert sizes[new].sum() == both.base.token_bytes()[old].sum()


def test_new_text_has_fewer_tokens(both: Both) -> None:
    for texts in NEW_TEXTS.values():
        before = sum(map(len, both.base.encode_batch(texts)))
        after = both.new.encode_batch(texts)
        assert sum(map(len, after)) < 0.65 * before
    used = Counter(token for texts in NEW_TEXTS.values() for ids in both.new.encode_batch(texts)
                   for token in ids)  # fmt: skip
    size = both.base.vocab_size
    assert sum(token >= size for token in used) > 0.2 * ADDED


def test_the_pieces_replaced_spell_the_new_token(both: Both) -> None:
    replaced = pieces_replaced(both.new, both.base)
    matches = places = 0
    assert len(replaced) == ADDED
    for token, ids in enumerate(replaced, both.base.vocab_size):
        assert ids
        assert max(ids) < both.base.vocab_size
        if both.base.byte_fallback:
            assert len(ids) > 1
            assert b"".join(map(both.base.spelling, ids)) == both.new.spelling(token)
    # A new token inside a text: they are the old tokens at its place.
    sizes = both.new.token_bytes()
    for text in NEW_TEXTS["pl"][:20]:
        old, new = both.base.encode(text), both.new.encode(text)
        ends, starts = np.cumsum(sizes[old]), np.cumsum(sizes[new]) - sizes[new]
        for token, start in zip(new, starts.tolist(), strict=True):
            if token >= both.base.vocab_size:
                ids = replaced[token - both.base.vocab_size]
                at = np.searchsorted(ends, start, side="right")
                matches += old[at : at + len(ids)] == ids
                places += 1
    assert places
    # A unigram model may choose other pieces where words meet.
    assert matches == places or both.base.record.algorithm == "unigram"


def test_transformers_gives_the_same_ids(both: Both) -> None:
    import transformers

    if not both.for_transformers:
        pytest.skip("the base is not a directory for transformers")
    reference = transformers.AutoTokenizer.from_pretrained(both.new.path)
    assert len(reference) == both.new.vocab_size
    for text in both.texts:
        ids = reference.encode(text, add_special_tokens=False)
        assert ids == both.new.encode(text), text
    added = reference.get_added_vocab()
    assert max(added.values()) < both.base.vocab_size
    for name in ("eos_token", "bos_token"):
        if token := getattr(reference, name):
            expected = {"eos_token": both.new.eod, "bos_token": both.new.record.bos}[name]
            if both.name != "llama3_instruct":
                assert reference.convert_tokens_to_ids(token) == expected


def test_transformers_adds_what_it_added(both: Both) -> None:
    import transformers

    if not both.for_transformers or both.base.path.is_file() or not (
        both.base.path / "tokenizer.json"
    ).exists():  # fmt: skip
        pytest.skip("the base has no tokenizer.json")
    before = transformers.AutoTokenizer.from_pretrained(both.base.path)
    after = transformers.AutoTokenizer.from_pretrained(both.new.path)
    special = "".join(str(token) for token in before.all_special_tokens)
    for text in (*TEXTS, f"{TEXTS[0]}{special} x"):
        new = after(text).input_ids
        if max(new) < both.base.vocab_size:
            assert new == before(text).input_ids
    assert type(after) is type(before)


def test_export_keeps_it(both: Both, tmp_path: Path) -> None:
    import transformers

    write_hf_tokenizer(both.new, tmp_path, max_length=512)
    again = Tokenizer.load(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in MIXED:
        ids = both.new.encode(text)
        assert again.encode(text) == ids
        if text in both.texts:
            assert reference.encode(text, add_special_tokens=False) == ids
    assert again.record == both.new.record
    taken = tmp_path / "taken"
    taken.mkdir()
    assert take_tokenizer(tmp_path, taken) == []
    assert Tokenizer.load(taken).record == both.new.record


def test_the_result_depends_on_the_text_alone(both: Both, tmp_path: Path) -> None:
    again = extend(both.base.path, tmp_path)
    names = sorted(path.name for path in both.new.path.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (both.new.path / name).read_bytes()


def test_an_end_of_document_from_the_models_configuration_is_kept(tmp_path: Path) -> None:
    base = BASES["qwen3"](tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    eod = json.loads((base / "tokenizer.json").read_text())["added_tokens"][1]["id"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": eod}))
    new = Tokenizer.load(extend(base, tmp_path))
    assert (new.eod, new.tags) == (eod, Tokenizer.load(base).tags)
    write_hf_tokenizer(new, tmp_path, max_length=512)
    assert Tokenizer.load(tmp_path).record == new.record


def test_bos_of_a_sentencepiece_model_stays_in_transformers(tmp_path: Path) -> None:
    import transformers

    base = BASES["llama2"](tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    new = Tokenizer.load(extend(base, tmp_path))
    exported = tmp_path / "exported"
    exported.mkdir()
    write_hf_tokenizer(new, exported, max_length=512)
    assert json.loads((exported / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert new.adds_bos
    assert Tokenizer.load(exported).record == new.record
    before = transformers.AutoTokenizer.from_pretrained(base)
    compared = 0
    for folder in (new.path, exported):
        after = transformers.AutoTokenizer.from_pretrained(folder)
        for text in (text for text in TEXTS if text and "<" not in text):
            ids = new.encode(text)
            assert after(text).input_ids == [new.bos, *ids]
            assert after(text, add_special_tokens=False).input_ids == ids
            if max(ids) < new.vocab_size - ADDED and not text.startswith(" "):
                assert before(text).input_ids == after(text).input_ids
                compared += 1
        assert after("a", "b").input_ids == [*after("a").input_ids, *after("b").input_ids]
    assert compared


def test_tokens_that_older_files_add_keep_their_ids(tmp_path: Path) -> None:
    base = BASES["llama2"](tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    size = Tokenizer.load(base).vocab_size
    added = {"<end>": size + 3, "<|im_start|>": size}  # with a gap
    (base / "added_tokens.json").write_text(json.dumps(added))
    (base / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}}')
    old, new = Tokenizer.load(base), Tokenizer.load(extend(base, tmp_path))
    assert new.eod == old.eod == size + 3
    assert new.tags == old.tags
    assert new.vocab_size == size + 4 + ADDED
    assert new.record.extends is not None
    assert new.record.extends.vocab_size == size + 4
    assert new.encode_batch(TEXTS[:3]) == old.encode_batch(TEXTS[:3])


@pytest.mark.parametrize("name", ["llama3", "mistral", "own_unigram", "own_bpe"])
def test_an_extended_one_can_be_extended(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    first = extend(base, tmp_path / "first", add=60)
    second = Tokenizer.load(extend(first, tmp_path / "second", add=30))
    middle = Tokenizer.load(first)
    assert second.record.extends is not None
    assert second.record.extends.tokenizer_hash == middle.fingerprint
    assert second.vocab_size == Tokenizer.load(base).vocab_size + 90
    for text in MIXED:
        ids = second.encode(text)
        if max(ids, default=0) < middle.vocab_size:
            assert ids == middle.encode(text)


def naive_merges(words: dict[tuple[str, ...], int], taken: set[str]) -> list[str]:
    """Learn merges by counting all pairs anew at every step."""
    found: list[str] = []
    while True:
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for left, right in pairwise(word):
                if left + right not in taken:
                    counts[left + right] += count
        if not counts or max(counts.values()) < 2:
            return found
        best = min(counts, key=lambda text: (-counts[text], text))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            pieces: list[str] = []
            place = 0
            while place < len(word):
                joined = "".join(word[place : place + 2])
                if place + 1 < len(word) and joined == best:
                    pieces.append(joined)
                    place += 2
                else:
                    pieces.append(word[place])
                    place += 1
            merged[tuple(pieces)] += count
        found.append(best)
        taken, words = taken | {best}, dict(merged)


@given(
    words=st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "ab", "c", "ba"]), min_size=2, max_size=7).map(tuple),
        st.integers(1, 5), max_size=12,
    )
)  # fmt: skip
def test_merges_are_those_of_counting_anew(words: dict[tuple[str, ...], int]) -> None:
    taken = {"a", "b", "ab", "c", "ba", "bab"}
    assert [piece.text for piece in learn_pieces(words, (), taken)] == naive_merges(words, taken)


def test_characters_come_before_their_merges() -> None:
    words = {("▁", "я", "б"): 5, ("я", "б", "a"): 4, ("ю",): 1}
    learnt = list(learn_pieces(words, {"я", "б", "ю"}, {"▁", "a"}))
    assert [piece.text for piece in learnt[:3]] == ["б", "я", "яб"]
    assert learnt[0].pairs == []
    assert learnt[2].pairs == [("я", "б")]
    assert "ю" not in [piece.text for piece in learnt]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tokenizer", "extend", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """Run the command, which refuses something; return what it says."""
    result = run(*arguments)
    assert isinstance(result.exception, InputError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def options(folder: Path) -> list[str]:
    return [part for language, [path] in new_files(folder).items()
            for part in ("--input", f"{language}={path}")]  # fmt: skip


def test_the_command_prints_before_and_after(tmp_path: Path) -> None:
    base = BASES["own_bpe"](tmp_path)
    old = write_jsonl(tmp_path / "old.jsonl", TEXTS)
    result = run(base, *options(tmp_path), "--check", f"old={old}", "--add", 40,
                 "--out", tmp_path / "new")  # fmt: skip
    assert result.exit_code == 0, result.output
    size = Tokenizer.load(base).vocab_size
    assert f"{size + 40} tokens in {tmp_path / 'new'}, new from id {size} on" in result.stdout
    said = r"All [1-9]\d* texts without a new token are encoded as before; \d+ texts compared"
    assert re.search(said, result.stdout)
    rows = [line for line in result.stdout.splitlines() if re.match("│ (el|pl|old) ", line)]
    assert len(rows) == 3
    assert rows[2].count("100.0%") == 2
    record = json.loads((tmp_path / "new" / "megaphase_tokenizer.json").read_text())
    assert list(record["languages"]) == ["el", "pl", "old"]
    assert record["extends"]["vocab_size"] == size
    problem = refusal(base, *options(tmp_path), "--add", 40, "--out", tmp_path / "new")
    assert "exists already; pass --overwrite" in problem
    repeated = run(base, *options(tmp_path), "--add", 41, "--out", tmp_path / "new", "--overwrite")
    assert repeated.exit_code == 0
    assert Tokenizer.load(tmp_path / "new").vocab_size == size + 41


@pytest.mark.parametrize("name", ["own_unigram", "own_bpe", "llama3", "gemma3"])
def test_more_tokens_than_the_text_has_are_refused(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    problem = refusal(base, *options(tmp_path), "--add", 5000, "--out", tmp_path / "new")
    found = re.search(r"--add: 5,000 is more than this text supports, which uses ([\d,]+) new "
                      r"tokens; give more text or choose a smaller number", problem)  # fmt: skip
    assert found
    assert not (tmp_path / "new").exists()
    if name != "own_unigram":
        extend(base, tmp_path, add=int(found[1].replace(",", "")))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    base = BASES["own_bpe"](tmp_path)
    inputs = new_files(tmp_path)
    word = train_model(tmp_path / "word.model", vocab_size=60, model_type="word")
    for arguments, message in (
        ({"checks": {"el": inputs["el"]}}, "--check: 'el' is also given with --input; leave one"),
        ({"out": base, "overwrite": True}, "--out: .* is the tokenizer to extend; choose another"),
        ({"base_path": word}, "word.model: its algorithm is word; give a unigram or BPE tokenizer"),
        ({"inputs": {}}, "--input: no text was given"),
        ({"base_path": tmp_path / "none"}, "no such file"),
    ):
        given_ = {"base_path": base, "inputs": inputs, "out": tmp_path / "new", "add": 9}
        with pytest.raises(InputError, match=message):
            extend_tokenizer(**(given_ | arguments))
    new = tmp_path / "new"
    problem = refusal(base, *options(tmp_path), "--check", "x", "--add", 3, "--out", new)
    assert problem.startswith("--check: 'x' is not LANGUAGE=FILE")
    assert not new.exists()


def test_no_text_becomes_an_end_of_document_that_is_a_users_symbol(tmp_path: Path) -> None:
    model = train_model(tmp_path / "hf" / "tokenizer.model", vocab_size=520, model_type="bpe",
                        byte_fallback=True, user_defined_symbols=["<end>"])  # fmt: skip
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    base, new = Tokenizer.load(model.parent), Tokenizer.load(extend(model.parent, tmp_path))
    assert base.eod == new.eod == 3  # after <unk>, <s> and </s>
    assert new.encode("a<end>b") == base.encode("a<end>b")
    assert new.eod not in new.encode("a<end>b")


def test_a_piece_that_old_merges_do_not_make_is_not_made_by_new_ones(tmp_path: Path) -> None:
    from hf_tokenizer_support import model_of

    # "abc" has no two parts, so text never becomes it.
    pieces = {"a": -5, "b": -6, "c": -7, "▁": -8, "abc": -1, "d": -9}
    base = model_of(tmp_path / "a.model", pieces, "BPE")
    texts = ["ab abc abd bc"] * 20
    out = tmp_path / "new"
    extend_tokenizer(base, {"xx": [write_jsonl(tmp_path / "x.jsonl", texts)]}, out, add=3)
    new, old = Tokenizer.load(out), Tokenizer.load(base)
    for text in ("abc", "abcd", "a bc ab", "bcd"):
        ids = new.encode(text)
        assert max(ids) >= old.vocab_size or ids == old.encode(text)
        assert old.encode("abc")[0] != 7
    spellings = {new.spelling(token) for token in range(old.vocab_size, new.vocab_size)}
    assert not spellings & {b"ab", b"bc"}
    assert np.array_equal(new.token_bytes()[: old.vocab_size], old.token_bytes())
