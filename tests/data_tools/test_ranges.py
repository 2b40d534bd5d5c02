"""Ranges of bytes, which the workers of `data tokenize` read by themselves, and reading ahead."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.data_tools.text import (
    STDIN,
    Reading,
    can_be_ranged,
    ranges_of,
    read_chunks,
    read_documents,
)
from megaphase.data_tools.text.prefetch import prefetched
from megaphase.utils.errors import InputError


@settings(max_examples=80)
@given(
    lines=st.lists(st.sampled_from(["", "a", "bb b", "ccc\r", "d" * 30]), max_size=30),
    range_bytes=st.integers(1, 40),
    name=st.sampled_from(["a.txt", "a.jsonl"]),
    begin=st.integers(0, 60),
    length=st.none() | st.integers(0, 100),
)
def test_ranges_hold_every_document_once(
    lines: list[str], range_bytes: int, name: str, begin: int, length: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("ranges") / name
    as_json = name.endswith(".jsonl")
    path.write_text("\n".join(json.dumps({"text": each}) if as_json else each for each in lines))
    end = None if length is None else begin + length
    whole = [
        text
        for chunk in read_chunks(path, Reading(), begin=begin, end=end)
        for text in read_documents(chunk, Reading())
    ]
    chunks = [each.chunk(Reading()) for each in ranges_of(path, begin, end, range_bytes)]
    assert [text for chunk in chunks for text in read_documents(chunk, Reading())] == whole
    for chunk in chunks:  # resumed after any of them, the rest follows
        rest = [each.chunk(Reading()) for each in ranges_of(path, chunk.end.offset, end, 7)]
        texts = [text for each in rest for text in read_documents(each, Reading())]
        assert texts == whole[len(whole) - len(texts) :]
    done = sum(len(list(read_documents(chunk, Reading()))) for chunk in chunks)
    assert done == len(whole)


def test_a_wrong_line_of_a_range_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(500 * '{"text": "abc"}\n' + "oops\n" + 500 * '{"text": "abc"}\n')
    chunks = (each.chunk(Reading()) for each in ranges_of(path, 0, None, 1000))
    texts = (text for chunk in chunks for text in read_documents(chunk, Reading()))
    with pytest.raises(InputError, match=r"a\.jsonl:501: is not valid JSON"):
        list(texts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jsonl", True), ("a.txt", True), ("a.jsonl.gz", False), ("a.TXT.ZST", False),
     ("a.parquet", False), ("a.arrow", False)],
)  # fmt: skip
def test_plain_files_alone_have_ranges(name: str, expected: bool) -> None:
    assert can_be_ranged(Path(name)) is expected
    assert not can_be_ranged(STDIN)


def test_items_are_computed_ahead_and_in_order() -> None:
    asked, enough = [], threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(100):
            asked.append(number)
            if number == 3:
                enough.set()
            yield number

    found = prefetched(items(), 3)
    assert next(found) == 0
    assert enough.wait(60)
    assert list(islice(found, 9)) == list(range(1, 10))
    found.close()
    assert len(asked) <= 14
    assert list(prefetched(items(), 2)) == list(range(100))


def test_an_error_of_an_item_comes_at_its_turn() -> None:
    closed = []

    def items() -> Generator[int, None, None]:
        try:
            yield 1
            yield 2
            raise InputError("a", "b", "c")
        finally:
            closed.append(Random)

    found = prefetched(items(), 8)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(InputError):
        next(found)
    assert closed
