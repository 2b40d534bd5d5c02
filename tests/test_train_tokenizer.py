"""Training a tokenizer: it serves every language, depends on its input only, and says what is
wrong with that."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from data_support import (
    children_of,
    files_of,
    is_running,
    make_tokenizer,
    start_python,
    wait_until,
    write_jsonl,
)

from megaphase.data_tools.artificial_languages import write_languages
from megaphase.data_tools.text import Reading
from megaphase.data_tools.text_sample import (
    Survey,
    sample_sentences,
    sentences_of,
    survey_language,
    uses_per_sentence,
)
from megaphase.data_tools.train_tokenizer import train_tokenizer
from megaphase.errors import InputError
from megaphase.tokenizer import Tokenizer


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
    with pytest.raises(InputError, match=r"a\.jsonl: no text of 'xx' to train on"):
        train_tokenizer({"xx": [path]}, tmp_path / "tok", vocab_size=300)
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        train_tokenizer({"xx": [tmp_path / "none.txt"]}, tmp_path / "tok", vocab_size=300)
    with pytest.raises(InputError, match="--input: no text was given"):
        train_tokenizer({}, tmp_path / "tok", vocab_size=300)


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

    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"tok: holds other files, as notes\.txt"):
        train_tokenizer({"a": [path]}, out, vocab_size=300, overwrite=True)
    with pytest.raises(InputError, match=r"a\.jsonl: exists and is not a directory"):
        train_tokenizer({"a": [path]}, path, vocab_size=300, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


TRAINING = """if True:
    import sys
    from pathlib import Path
    from megaphase.data_tools.train_tokenizer import train_tokenizer
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
    _, errors = main.communicate(timeout=60)
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
