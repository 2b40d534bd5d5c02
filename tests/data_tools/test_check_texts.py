"""The arguments `LANGUAGE=FILE`, and the texts on which an extended vocabulary is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_support import make_tokenizer, write_jsonl

from megaphase.data_tools.options import by_language
from megaphase.data_tools.text import Reading
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.vocabulary.check import check_texts
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_language_may_have_several_files() -> None:
    arguments = ["en=a.txt", "hi=c=d.txt", "en=b.txt"]
    assert by_language(arguments, "--input") == {"en": ["a.txt", "b.txt"], "hi": ["c=d.txt"]}


@pytest.mark.parametrize("argument", ["en", "=a.txt", "en="])
def test_an_argument_of_another_form_is_refused(argument: str, tok: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_texts(["en=a.txt", argument], Tokenizer.load(tok), Reading())
    assert str(caught.value) == f"--check: '{argument}' is not LANGUAGE=FILE; write en=en.jsonl.gz"


def test_the_files_and_corpora_of_a_language_are_one_text(tok: Path, tmp_path: Path) -> None:
    base = Tokenizer.load(tok)
    one, two, three = (
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} first", f"{name} second"])
        for name in ("one", "two", "three")
    )
    corpus = tmp_path / "corpus"
    tokenize([two], tok, corpus, workers=1)
    arguments = [f"en={corpus}", f"en={three}", f"hi={corpus}", f"en={one}"]
    texts = check_texts(arguments, base, Reading())
    assert list(texts) == ["en", "hi"]
    assert texts["en"][:4] == ["three first", "three second", "one first", "one second"]
    assert texts["en"][4:] == texts["hi"] == ["two first", "two second"]


def test_of_all_files_of_a_language_16_kib_are_taken(tok: Path, tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", ["a" * 10_000]),
        write_jsonl(tmp_path / "b.jsonl", ["b" * 10_000]),
    ]
    texts = check_texts([f"en={file}" for file in files], Tokenizer.load(tok), Reading())
    assert texts == {"en": ["a" * 10_000, "b" * 6_384]}


def test_a_file_given_twice_and_one_without_text_are_refused(tok: Path, tmp_path: Path) -> None:
    base, empty = Tokenizer.load(tok), tmp_path / "empty.txt"
    empty.write_text("\n")
    other = write_jsonl(tmp_path / "other.jsonl", [""])
    with pytest.raises(InputError, match=f"{empty}: is given twice; leave one out"):
        check_texts([f"en={empty}", f"en={empty}"], base, Reading())
    with pytest.raises(InputError, match=f"{empty}, {other}: no text of 'en'; give a file"):
        check_texts([f"en={empty}", f"en={other}"], base, Reading())
