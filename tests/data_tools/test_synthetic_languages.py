"""The demo's languages: deterministic, of the requested sizes, alike in structure, not in words."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from megaphase.data_tools.synthetic.languages import DEFAULT_LANGUAGES, write_languages
from megaphase.data_tools.synthetic.lexicon import Lexicon
from megaphase.data_tools.synthetic.world import Dice, World, Zipf
from megaphase.utils.errors import InputError

LANGUAGES = {"aa": 60_000, "bb": 60_000, "cc": 20_000, "dd": 20_000, "ee": 20_000}


def read(path: Path) -> list[dict[str, str]]:
    # Not splitlines, which splits at more characters than JSONL.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def words_of(path: Path) -> list[str]:
    text = "\n".join(row["text"] for row in read(path))
    return text.replace(",", " ").replace(".", " ").split()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_languages(tmp_path_factory.mktemp("languages"), seed=7, languages=LANGUAGES)


def test_the_same_seed_gives_the_same_files(paths: dict[str, Path], tmp_path: Path) -> None:
    again = write_languages(tmp_path, seed=7, languages=LANGUAGES)
    other = write_languages(tmp_path / "other", seed=8, languages=LANGUAGES)
    for name, path in paths.items():
        assert path.name == f"{name}.jsonl"
        assert again[name].read_bytes() == path.read_bytes() != other[name].read_bytes()


def test_the_text_is_the_same_everywhere(paths: dict[str, Path]) -> None:
    """Golden: a change of the generator, or of its dependencies, changes every demo."""
    digest = hashlib.blake2b(paths["aa"].read_bytes(), digest_size=16).hexdigest()
    assert digest == "03d41d944f7c397abfa7adb85ef36f88"


def test_sizes_are_as_asked(paths: dict[str, Path]) -> None:
    for name, path in paths.items():
        rows = read(path)
        sizes = [len(row["text"].encode()) for row in rows]
        assert sum(sizes) - sizes[-1] < LANGUAGES[name] <= sum(sizes)
        assert [row["id"] for row in rows] == [f"{name}-{i}" for i in range(len(rows))]
        assert len({row["text"] for row in rows}) == len(rows)


def test_a_language_does_not_depend_on_the_sizes_of_the_others(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    again = write_languages(tmp_path, seed=7, languages={"aa": 10, "bb": 60_000})
    assert again["bb"].read_bytes() == paths["bb"].read_bytes()
    assert len(read(again["aa"])) == 1


def test_the_default_is_two_with_much_and_two_with_little_text() -> None:
    assert list(DEFAULT_LANGUAGES.values()) == [1_500_000, 1_500_000, 300_000, 300_000]


def test_no_two_of_the_first_four_languages_share_a_word(paths: dict[str, Path]) -> None:
    vocabularies = [set(words_of(paths[name])) for name in ("aa", "bb", "cc", "dd")]
    assert len(set.union(*vocabularies)) == sum(map(len, vocabularies))
    assert all(len(vocabulary) > 300 for vocabulary in vocabularies)


def test_words_are_frequent_as_in_languages(paths: dict[str, Path]) -> None:
    counts = [count for _, count in Counter(words_of(paths["aa"])).most_common()]
    assert sum(counts[:20]) > 0.2 * sum(counts)
    assert sum(count == 1 for count in counts) > 0.2 * len(counts)


def test_a_topic_lasts_for_a_document(paths: dict[str, Path]) -> None:
    """Two halves of a document share more words than halves of different documents."""
    halves = []
    for row in read(paths["aa"]):
        words = row["text"].replace(",", "").replace(".", "").split()
        halves.append((set(words[: len(words) // 2]), set(words[len(words) // 2 :])))
    same = sum(len(first & second) for first, second in halves)
    shifted = zip(halves, halves[1:] + halves[:1], strict=True)
    different = sum(len(first & second) for (first, _), (_, second) in shifted)
    assert same > 2 * different


def test_a_first_word_of_a_pair_calls_for_its_second(paths: dict[str, Path]) -> None:
    lexicon = Lexicon.invent(7, "aa", 0)
    framed = 0
    for row in read(paths["aa"]):
        for sentence in row["text"].partition("\n")[2].split(". "):
            words = sentence.rstrip(".").split()
            for first, second in lexicon.pairs:
                framed += words[0] == first
                assert (words[0] == first) == (second in words)
    assert framed > 50


def test_verbs_agree_with_a_subject_before_a_relative_clause(paths: dict[str, Path]) -> None:
    lexicon = Lexicon.invent(7, "aa", 0)
    endings = {
        stem + tense + ending: form
        for stem in lexicon.verbs
        for tense in lexicon.tense
        for form, ending in enumerate(lexicon.agreement)
    }
    seen = 0
    for row in read(paths["aa"]):
        for sentence in row["text"].partition("\n")[2].split(". "):
            # subject ", relative ... verb ...," verb
            parts = sentence.split(", ")
            if len(parts) != 3 or parts[1].split()[0] not in lexicon.relatives:
                continue
            form = lexicon.relatives.index(parts[1].split()[0])
            inner, outer = parts[1].split()[1], parts[2].rstrip(".").split()[0]
            assert endings[inner] == endings[outer] == form
            seen += 1
    assert seen > 30


def test_word_orders_differ() -> None:
    lexicons = [Lexicon.invent(7, "x", number) for number in range(4)]
    orders = {(lexicon.verb_last, lexicon.adjective_first) for lexicon in lexicons}
    assert len(orders) == 4


def test_no_word_has_two_meanings() -> None:
    lexicon = Lexicon.invent(7, "x", 0)
    words = [
        *lexicon.nouns, *lexicon.verbs, *lexicon.adjectives, *lexicon.adverbs,
        *lexicon.prepositions, *lexicon.determiners, *lexicon.pronouns, *lexicon.relatives,
        *(word for pair in lexicon.pairs for word in pair),
    ]  # fmt: skip
    assert len(set(words)) == len(words)


def test_zipf_draws_small_numbers_most() -> None:
    zipf, dice = Zipf(4), Dice(0, "x")
    counts = Counter(zipf.draw(dice) for _ in range(20_000))
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert [counts[i] / 20_000 for i in range(4)] == pytest.approx(
        [1 / (i + 1) / total for i in range(4)], abs=0.015
    )


def test_the_world_is_the_same_for_all_languages() -> None:
    assert World.build(7) == World.build(7) != World.build(8)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be created"):
        write_languages(tmp_path / "file", seed=1)
