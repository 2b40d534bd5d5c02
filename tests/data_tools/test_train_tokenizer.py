"""Training a tokenizer: it serves every language, depends only on its input, and explains invalid
input."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from data_support import (
    LIMIT_SECONDS,
    children_of,
    files_of,
    is_running,
    make_tokenizer,
    start_python,
    wait_until,
    write_jsonl,
)
from typer.testing import CliRunner

from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenizers.commands import tokenizer_app
from megaphase.data_tools.tokenizers.fertility import badly_served, fertility_table
from megaphase.data_tools.tokenizers.sample import (
    Survey,
    sample_sentences,
    sentences_of,
    survey_language,
    uses_per_sentence,
)
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Fertility, Tokenizer
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("languages")
    written = write_languages(folder, seed=5, languages={"large": 300_000, "small": 12_000})
    return {name: [path] for name, path in written.items()}


def test_the_same_input_gives_the_same_tokenizer(tmp_path: Path) -> None:
    first, second = make_tokenizer(tmp_path / "a"), make_tokenizer(tmp_path / "b")
    for name in ("tokenizer.model", "megaphase_tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert files_of(first) == ["megaphase_tokenizer.json", "tokenizer.model"]
    assert files_of(tmp_path / "a") == ["text", "tok"]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_temperature_serves_the_small_language_better(
    text: dict[str, list[Path]], tmp_path: Path, model_type: str
) -> None:
    fertility = {}
    for temperature in (1.0, 3.3):
        record = train_tokenizer(
            text,
            tmp_path / f"{temperature}",
            vocab_size=600,
            model_type=model_type,  # type: ignore[arg-type]
            temperature=temperature,
        )
        assert record.algorithm == model_type
        assert record.vocab_size == 600
        fertility[temperature] = record.languages
    assert fertility[3.3]["small"].bytes_per_token > 1.1 * fertility[1.0]["small"].bytes_per_token
    assert fertility[3.3]["large"].bytes_per_token > 0.8 * fertility[1.0]["large"].bytes_per_token


def test_fertility_is_measured_on_text_that_was_kept_out(
    text: dict[str, list[Path]], tmp_path: Path
) -> None:
    record = train_tokenizer(text, tmp_path / "tok", vocab_size=600)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    held_out = survey_language("large", text["large"], Reading()).held_out
    tokens = sum(len(tokenizer.encode(sentence)) for sentence in held_out)
    words = sum(len(sentence.split()) for sentence in held_out)
    size = sum(len(sentence.encode()) for sentence in held_out)

    measured = record.languages["large"]
    assert measured.held_out
    assert measured.sample_bytes == size
    assert measured.bytes_per_token == pytest.approx(size / tokens)
    assert measured.tokens_per_word == pytest.approx(tokens / words)
    assert not set(held_out) & set(sample_sentences("large", text["large"], Reading(), 1.0, seed=0))


def test_shares_are_smoothed_and_bounded() -> None:
    surveys = {
        "large": Survey(characters=900_000, sentences=9_000),
        "small": Survey(characters=100_000, sentences=2_000),
    }
    assert uses_per_sentence(surveys, 1.0, 10**9) == pytest.approx({"large": 1.0, "small": 1.0})
    # 900,000 ** ½ : 100,000 ** ½ is 3 : 1.
    smoothed = uses_per_sentence(surveys, 2.0, 10**9)
    assert smoothed == pytest.approx({"large": 750 / 900, "small": 250 / 100})
    bounded = uses_per_sentence(surveys, 2.0, 1_250)
    assert bounded["small"] / bounded["large"] == pytest.approx(3.0)
    assert bounded["small"] * 2_000 + bounded["large"] * 9_000 == pytest.approx(1_250)


@pytest.mark.parametrize("uses", [0.25, 1.0, 2.5])
def test_sentences_are_used_as_often_as_asked(tmp_path: Path, uses: float) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i} a\n\n{i} b" for i in range(2_000)])
    survey = survey_language("a", [path], Reading())
    assert survey.sentences + len(survey.held_out) == 4_000
    sample = list(sample_sentences("a", [path], Reading(), uses, seed=1))
    assert len(sample) == pytest.approx(uses * survey.sentences, rel=0.1)
    counts = {sentence: sample.count(sentence) for sentence in sample[:200]}
    assert max(counts.values()) <= int(uses) + 1
    assert sample == list(sample_sentences("a", [path], Reading(), uses, seed=1))
    if uses % 1:
        assert sample != list(sample_sentences("a", [path], Reading(), uses, seed=2))


def test_long_lines_are_cut_and_blank_ones_left_out() -> None:
    text = "x" * 2_500 + "\n \n\nend"
    assert [len(sentence) for sentence in sentences_of(text)] == [1024, 1024, 452, 3]


def test_a_tiny_language_is_measured_on_its_training_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["some words to learn from, some more words"])
    record = train_tokenizer({"a": [path]}, tmp_path / "tok", vocab_size=290)
    assert not record.languages["a"].held_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 50}, r"--vocab-size: 50 has no room .*; choose 3\d\d or more"),
        ({"vocab_size": 90_000}, r"--vocab-size: 90,000 is more than .*; give more .* or less"),
        ({"tags": ("a b",)}, r"--tag: 'a b' has spaces, < or >"),
        ({"tags": ("a", "a")}, r"--tag: the name 'a' is taken"),
        ({"tags": ("eod",)}, r"--tag: the name 'eod' is taken"),
        ({"tags": ("reserved_1",)}, r"--tag: the name 'reserved_1' is taken"),
        ({"reserved_tags": -1}, r"--reserved-tags: -1 is too small; give 0 or more"),
        ({"user_symbols": ("a b",)}, r"--user-symbol: 'a b' is empty or has a space"),
        ({"user_symbols": ("",)}, r"--user-symbol: '' is empty or has a space"),
        ({"user_symbols": ("a", "a")}, r"--user-symbol: 'a' is a token already; leave it out"),
        ({"user_symbols": ("<fr>",), "tags": ("fr",)}, r"--user-symbol: '<fr>' is a token alread"),
        ({"user_symbols": ("<0x0A>",)}, r"--user-symbol: '<0x0A>' is a token already"),
        ({"user_symbols": ("\n",)}, r"--user-symbol: '\\n' is a token already"),
        ({"max_sentences": 0}, r"--max-sentences: 0 is too small"),
        ({"temperature": 0.5}, r"--temperature: 0\.5 is too small"),
        ({"reading": Reading("body")}, r"large\.jsonl:1: the key 'body' is missing"),
    ],
)
def test_wrong_arguments_are_named(
    text: dict[str, list[Path]], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    arguments = {"vocab_size": 600, **options}
    with pytest.raises(InputError, match=message):
        train_tokenizer(text, tmp_path / "tok", **arguments)  # type: ignore[arg-type]
    assert files_of(tmp_path) == []


def test_the_sizes_that_errors_name_work(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i} words make {i * 7} texts" for i in range(99)])

    def remedy(vocab_size: int) -> int:
        with pytest.raises(InputError) as error:
            train_tokenizer({"a": [path]}, tmp_path / "tok", vocab_size=vocab_size)
        return int("".join(filter(str.isdigit, error.value.remedy)))

    for size in (remedy(10), remedy(50_000)):
        record = train_tokenizer({"a": [path]}, tmp_path / "tok", vocab_size=size, overwrite=True)
        assert record.vocab_size == size


def test_a_language_without_text_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", " \n "])
    with pytest.raises(InputError, match=r"a\.jsonl: no text of 'xx'; give files that hold text"):
        train_tokenizer({"xx": [path]}, tmp_path / "tok", vocab_size=300)
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        train_tokenizer({"xx": [tmp_path / "none.txt"]}, tmp_path / "tok", vocab_size=300)
    with pytest.raises(InputError, match="--input: no text was given"):
        train_tokenizer({}, tmp_path / "tok", vocab_size=300)


@pytest.mark.parametrize("text", ["\0", "\u2585", "<eod>", "<fr><fr>"])
def test_text_of_nothing_that_sentencepiece_trains_on_is_refused(tmp_path: Path, text: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [text] * 20)
    with pytest.raises(InputError, match="--input: the text is too small to make pieces from"):
        train_tokenizer({"a": [path]}, tmp_path / "tok", vocab_size=300, tags=("fr",))


def test_only_a_tokenizer_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["some words to learn from, some more words"])
    out = tmp_path / "tok"
    out.mkdir()
    train_tokenizer({"a": [path]}, out, vocab_size=290)
    before = (out / "tokenizer.model").read_bytes()
    with pytest.raises(InputError, match="tok: exists already; pass --overwrite"):
        train_tokenizer({"a": [path]}, out, vocab_size=291)
    assert (out / "tokenizer.model").read_bytes() == before
    train_tokenizer({"a": [path]}, out, vocab_size=291, overwrite=True)
    assert Tokenizer.load(out).vocab_size == 291
    link = tmp_path / "link"
    link.symlink_to(out)
    train_tokenizer({"a": [path]}, link, vocab_size=292, overwrite=True)
    assert Tokenizer.load(out).vocab_size == 292
    assert link.is_symlink()
    assert not list(tmp_path.glob(".*"))
    out.rename(tmp_path / ".tok.removed")  # as if the call had been killed between two renames
    with pytest.raises(InputError, match="tok: exists already; pass --overwrite"):
        train_tokenizer({"a": [path]}, out, vocab_size=293)
    assert Tokenizer.load(out).vocab_size == 292

    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"tok: contains other files, such as notes\.txt"):
        train_tokenizer({"a": [path]}, out, vocab_size=300, overwrite=True)
    with pytest.raises(InputError, match=r"a\.jsonl: exists and is not a directory"):
        train_tokenizer({"a": [path]}, path, vocab_size=300, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


TRAINING = """if True:
    import sys
    from pathlib import Path
    from megaphase.data_tools.tokenizers.train import train_tokenizer
    train_tokenizer({"a": [Path(sys.argv[1])]}, Path(sys.argv[2]), vocab_size=9_000)
"""


@pytest.mark.parametrize(
    ("whom", "how", "message"),
    [
        ("all", signal.SIGINT, "KeyboardInterrupt"),
        ("training", signal.SIGKILL, "RunError: a worker process was killed by SIGKILL"),
    ],
)
def test_training_stops_at_once_and_leaves_nothing(
    tmp_path: Path, whom: str, how: signal.Signals, message: str
) -> None:
    dice = random.Random(0)
    words = ("".join(dice.choices("abcdefghijkl ", k=90)) for _ in range(15_000))
    path = write_jsonl(tmp_path / "a.jsonl", words)
    main = start_python(TRAINING, path, tmp_path / "tok")
    # The resource tracker is a child too.
    wait_until(lambda: len(children_of(main.pid)) == 2)
    started = children_of(main.pid)
    if whom == "all":
        os.killpg(main.pid, how)
    else:
        os.kill(started[-1], how)
    _, errors = main.communicate(timeout=LIMIT_SECONDS)
    assert errors.splitlines()[-1].rpartition("errors.")[2].startswith(message)
    wait_until(lambda: not any(map(is_running, started)))
    assert files_of(tmp_path) == ["a.jsonl"]


def test_the_chatter_of_sentencepiece_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_record_is_readable_json(tmp_path: Path) -> None:
    record = json.loads((make_tokenizer(tmp_path) / "megaphase_tokenizer.json").read_text())
    assert list(record["tags"]) == ["fr", "hi"]
    assert len(record["reserved_tags"]) == 3
    assert record["languages"]["aa"]["bytes_per_token"] > 1


def test_user_symbols_are_never_cut(tmp_path: Path) -> None:
    symbols = ("<|im_start|>", "a,b", "\n\n", "größer", "12")
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijkl", k=4)) for _ in range(300)]
    texts = [f"{word} größer als a,b\n\nund <|im_start|> {word}s" for word in words]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    train_tokenizer({"a": [path]}, tmp_path / "tok", vocab_size=340, user_symbols=symbols)
    tokenizer = Tokenizer.load(tmp_path / "tok")
    for symbol in symbols:
        (token,) = tokenizer.encode(symbol)
        text = f"x{symbol}{symbol} 9"
        assert tokenizer.encode(text).count(token) == 2
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.token_bytes()[token] == len(symbol.encode())
    assert not set(symbols) & set(tokenizer.tags)


@pytest.mark.parametrize("split_digits", [True, False])
def test_digits_are_split_unless_told_otherwise(tmp_path: Path, split_digits: bool) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["in 1984 and 1985"] * 200)
    train_tokenizer(
        {"a": [path]}, tmp_path / "tok", vocab_size=290, model_type="bpe", split_digits=split_digits
    )
    assert (len(Tokenizer.load(tmp_path / "tok").encode("1984")) == 4) == split_digits


def run_tokenizer(*arguments: object) -> str:
    result = CliRunner().invoke(tokenizer_app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_pairs_are_trained_on_by_a_template(tmp_path: Path) -> None:
    numbers = ["".join(random.Random(i).choices("abcdefgh", k=4)) for i in range(300)]
    pairs = [{"src": f"{number} houses", "tgt": f"{number} Häuser"} for number in numbers]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts = [f"{pair['src']}\n{pair['tgt']}" for pair in pairs]
    options = ["--vocab-size", 300, "--reserved-tags", 0]
    run_tokenizer(
        "train", "--input", f"a={path}", "--template", r"{src}\n{tgt}", *options,
        "--out", tmp_path / "tok",
    )  # fmt: skip
    write_jsonl(tmp_path / "joined.jsonl", texts)
    run_tokenizer(
        "train", "--input", f"a={tmp_path / 'joined.jsonl'}", *options, "--out", tmp_path / "same"
    )
    fingerprint = Tokenizer.load(tmp_path / "tok").fingerprint
    assert fingerprint == Tokenizer.load(tmp_path / "same").fingerprint


def test_alpha_is_one_over_the_temperature(text: dict[str, list[Path]], tmp_path: Path) -> None:
    folder = text["large"][0].parent
    inputs = ["--input", f"large={folder}/l*.jsonl", "--input", f"small={folder}/small.jsonl"]
    same = ["train", *inputs, "--vocab-size", 500, "--out"]
    run_tokenizer(*same, tmp_path / "a", "--alpha", 0.25)
    run_tokenizer(*same, tmp_path / "b", "--temperature", 4)
    run_tokenizer(*same, tmp_path / "c", "--alpha", 0)
    prints = [Tokenizer.load(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(
        InputError, match="--alpha: cannot be combined with --temperature; give one of"
    ):
        run_tokenizer(*same, tmp_path / "d", "--alpha", 0.5, "--temperature", 2)
    with pytest.raises(InputError, match=r"--alpha: 2\.0 is not between 0 and 1"):
        run_tokenizer(*same, tmp_path / "d", "--alpha", 2)


def test_text_that_is_read_twice_does_not_come_from_a_pipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="standard input: the text is read more than once; write"):
        run_tokenizer("train", "--input", "a=-", "--vocab-size", 300, "--out", tmp_path / "tok")


def test_inspect_measures_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    tok = make_tokenizer(tmp_path)
    known, strange = ["some plain words, and some more"] * 9, ["日本語の文章を書きます"] * 9
    write_jsonl(tmp_path / "en.jsonl", known)
    write_jsonl(tmp_path / "ja.jsonl", strange)
    inputs = ["--input", f"en={tmp_path / 'en.jsonl'}", "--input", f"ja={tmp_path / 'ja.jsonl'}"]
    shown = run_tokenizer("inspect", tok / "tokenizer.model", *inputs)
    tokenizer = Tokenizer.load(tok)
    lines = shown.splitlines()
    for what in ("unigram", "<eod> (0)", "fr (", "reserved_0 (", tokenizer.fingerprint):
        assert what in shown, what
    # The worst served language comes first; it consists of bytes only.
    assert [line.split()[1] for line in lines if " kB of text" in line] == ["ja", "en"]
    row = next(line for line in lines if line.split()[1:2] == ["ja"]).replace("│", " ").split()
    assert (row[1], row[3]) == ("1.00", "100.0%")
    assert lines[-1].startswith("Badly served: ja")
    assert lines[-1].endswith(". `megaphase tokenizer extend` adds tokens for a language.")
    own = run_tokenizer("inspect", tok, *inputs).splitlines()
    assert own[-1].startswith("Badly served: ja")
    assert own[-1].endswith(". More of its text, a smaller --alpha or a larger --vocab-size helps.")
    tokens = sum(map(len, map(tokenizer.encode, known)))
    row = next(line for line in lines if line.split()[1:2] == ["en"]).replace("│", " ").split()
    assert row[1] == f"{sum(map(len, known)) / tokens:.2f}"
    write_jsonl(tmp_path / "none.jsonl", [" "])
    with pytest.raises(InputError, match=r"none\.jsonl: no text of 'xx'; give files that hold"):
        run_tokenizer("inspect", tok, "--input", f"xx={tmp_path / 'none.jsonl'}")
    # Without text, what the record says.
    assert "held-out text" in run_tokenizer("inspect", tok)
    assert "kB of" not in run_tokenizer("inspect", tok / "tokenizer.model")


def fertility(
    tokens_per_word: float, *, bytes_per_token: float = 4.0, spelled: float = 0.0
) -> Fertility:
    return Fertility(
        bytes_per_token=bytes_per_token,
        tokens_per_word=tokens_per_word,
        spelled=spelled,
        sample_bytes=9_000,
        held_out=True,
    )


def test_a_well_served_language_is_no_warning() -> None:
    # Three bytes per letter do not make a language well served, nor one byte badly.
    languages = {
        "en": fertility(1.5),
        "hi": fertility(1.6, bytes_per_token=9),
        "fi": fertility(2.9),
    }
    assert badly_served(languages) == []
    languages |= {"fr": fertility(3.1), "ka": fertility(4.0, spelled=0.3)}
    assert badly_served(languages) == ["ka", "fr"]
    # Without spaces, a sentence is a word.
    chinese = {"zh": fertility(30), "ja": fertility(50, spelled=0.06)}
    assert badly_served({**languages, **chinese}) == ["ja", "ka", "fr"]
    assert badly_served({"a": fertility(9)}) == badly_served({}) == []
    rows = fertility_table({**languages, **chinese})
    assert list(rows.columns[0].cells) == ["ja", "ka", "fr", "fi", "hi", "en", "zh"]
    assert list(rows.columns[2].cells)[-2:] == ["1.50", "no spaces"]
