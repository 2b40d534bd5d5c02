"""`megaphase tokenizer train --library tokenizers`: a byte-level BPE that transformers reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_support import write_jsonl
from existing_tokenizers import STRANGE, TEXTS
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from megaphase.cli import app
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Text = dict[str, list[Path]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    made = write_languages(folder, seed=5, languages={"large": 200_000, "small": 10_000})
    files = {name: [path] for name, path in made.items()}
    return files | {"real": [write_jsonl(folder / "real.jsonl", TEXTS * 10)]}


@pytest.fixture(scope="module")
def tok(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tok"
    train_tokenizer(
        text, out, vocab_size=600, library="tokenizers", tags=("fr", "hi"), reserved_tags=3,
        user_symbols=["<mask>", "<|x|>"],
    )  # fmt: skip
    return out


def test_the_directory_is_whole_and_the_same_each_time(text: Text, tok: Path) -> None:
    again = tok.with_name("again")
    train_tokenizer(
        text, again, vocab_size=600, library="tokenizers", tags=("fr", "hi"), reserved_tags=3,
        user_symbols=["<mask>", "<|x|>"],
    )  # fmt: skip
    names = ["megaphase_tokenizer.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tok.iterdir()) == names
    for name in names:
        assert (tok / name).read_bytes() == (again / name).read_bytes()


def test_its_record(tok: Path) -> None:
    native = Tokenizer.load(tok)
    record = native.record
    assert (record.library, record.algorithm) == ("tokenizers", "byte-level bpe")
    assert (record.vocab_size, record.eod, record.bos) == (600, 0, None)
    assert record.tags == {"fr": 1, "hi": 2}
    assert record.reserved_tags == [3, 4, 5]
    assert list(record.languages) == ["large", "small", "real"]
    assert record.languages["large"].held_out
    assert native.encode("a<mask>b")[1] == 6
    assert native.token_bytes()[6] == len("<mask>")


def test_transformers_gives_the_same_ids(tok: Path) -> None:
    import transformers

    native = Tokenizer.load(tok)
    reference = transformers.AutoTokenizer.from_pretrained(tok)
    assert reference.eos_token_id == native.eod
    for each in (*TEXTS, *STRANGE, "<eod> <fr> <reserved_0> <mask>"):
        assert native.encode(each) == reference.encode(each)
        assert native.decode(native.encode(each)) == each


@given(sample=st.text(max_size=60))
def test_any_text_comes_back(tok: Path, sample: str) -> None:
    native = LOADED.setdefault(tok, Tokenizer.load(tok))
    ids = native.encode(sample)
    assert native.decode(ids) == sample
    assert native.token_bytes()[ids].sum() == len(sample.encode())


LOADED: dict[Path, Tokenizer] = {}


def test_a_higher_temperature_serves_the_small_language_better(text: Text, tmp_path: Path) -> None:
    both = {name: text[name] for name in ("large", "small")}
    plain, smooth = (
        train_tokenizer(
            both, tmp_path / f"{t}", vocab_size=600, library="tokenizers", temperature=t
        ).languages["small"]
        for t in (1.0, 3.3)
    )
    assert smooth.bytes_per_token > 1.1 * plain.bytes_per_token


def test_digits_are_split_where_asked(text: Text, tmp_path: Path) -> None:
    digits = write_jsonl(tmp_path / "a.jsonl", ["in 1984 and 1984 and 1984"] * 300)
    for split in (True, False):
        out = tmp_path / f"{split}"
        train_tokenizer(
            text | {"digits": [digits]}, out, vocab_size=600, library="tokenizers",
            split_digits=split, temperature=3.3,
        )  # fmt: skip
        assert (len(Tokenizer.load(out).encode("1984")) == 4) == split


@pytest.mark.parametrize(
    ("size", "message"),
    [(200, r"200 has no room for the bytes, tags .*; choose 273 or more"),
     (90_000, r"90,000 is more than this text supports; give more text or choose \d+ or less")],
)  # fmt: skip
def test_a_vocabulary_that_does_not_fit_is_refused(
    text: Text, tmp_path: Path, size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer(text, tmp_path / "tok", vocab_size=size, library="tokenizers")


def test_a_changed_file_is_refused(text: Text, tok: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    for path in tok.iterdir():
        content = path.read_text().replace('"<mask>"', '"<musk>"')
        (tmp_path / "tok" / path.name).write_text(content)
    with pytest.raises(InputError, match=r"is not the tokenizer that megaphase_tokenizer\.json"):
        Tokenizer.load(tmp_path / "tok")


def test_the_command(text: Text, tmp_path: Path) -> None:
    arguments = ["tokenizer", "train", "--input", f"a={text['large'][0]}", "--vocab-size", "400"]
    arguments += ["--library", "tokenizers", "--out", str(tmp_path / "tok")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "400 tokens in" in result.stdout
    shown = CliRunner().invoke(app, ["tokenizer", "inspect", str(tmp_path / "tok")]).stdout
    assert "byte-level bpe" in shown
    wrong = [*arguments, "--overwrite", "--model-type", "unigram"]
    result = CliRunner().invoke(app, wrong)
    assert "--model-type: the tokenizers library trains bpe here" in str(result.exception)
