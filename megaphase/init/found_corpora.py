"""The corpora that the answers name, and the tokenizer that made them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaphase.corpus import Corpus
from megaphase.corpus.manifest import DATA_SUFFIXES, MANIFEST_SUFFIX, Manifest, corpus_file
from megaphase.tokenizer import Tokenizer
from megaphase.tokenizer.record import TOKENIZER_JSON_NAME
from megaphase.utils.errors import InputError, RunError
from megaphase.utils.files import real_path
from megaphase.utils.names import check_name, shown
from megaphase.utils.paths import expanded_path

WILDCARDS = re.compile(r"[*?\[]")
NAMED = re.compile(r"([^=/*?\[\]]+)=(.+)")
# How far above the corpora, and in how many directories, their tokenizer is looked for.
LEVELS_ABOVE, MOST_TRIED = 3, 50
# A task with at most this fraction of the tokens of the largest one is taken for low-resource.
LOW_FRACTION = 0.1


@dataclass(frozen=True)
class FoundCorpus:
    """A corpus and the name of the task that is made of it."""

    name: str
    prefix: Path
    manifest: Manifest


def find_corpora(given: Sequence[str], say: list[str]) -> list[FoundCorpus]:
    """Return the corpora of all prefixes and globs, each of which may be named: NAME=PREFIX.

    say: gets a line for every kind of corpus that a glob finds and that is left out.

    Raises:
        InputError: there is none, one is damaged, or two have the same name.
    """
    found: dict[str, FoundCorpus] = {}
    for each in given:
        for name, prefix in _prefixes(each, say):
            corpus = FoundCorpus(name, prefix, Corpus.open(prefix).manifest)
            other = found.get(name)
            if other is not None and real_path(other.prefix) != real_path(prefix):
                raise InputError(
                    f"--corpus {each}",
                    f"{other.prefix} and {prefix} would both be the task {name}",
                    "name them: --corpus NAME=PREFIX",
                )
            found[name] = corpus
    hashes = {each.manifest.tokenizer_hash for each in found.values()}
    if len(hashes) > 1:
        first = next(iter(found.values()))
        differing = next(
            each
            for each in found.values()
            if each.manifest.tokenizer_hash != first.manifest.tokenizer_hash
        )
        raise InputError(
            "--corpus",
            f"{first.prefix} and {differing.prefix} were tokenized with different tokenizers",
            "tokenize all with the same one",
        )
    return list(found.values())


def _prefixes(given: str, say: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and prefix of every corpus that an answer names."""
    where = f"--corpus {given}"
    match = NAMED.fullmatch(given)
    name, text = (match[1], match[2]) if match else (None, given)
    try:
        path = str(expanded_path(text))
        if not WILDCARDS.search(text):
            prefix = _without_suffix(Path(path))
            yield _checked(name or prefix.name, where), prefix
            return
        paths = glob.glob(path, recursive=True)
        paths += glob.glob(f"{path}{MANIFEST_SUFFIX}", recursive=True)
    except ValueError as error:
        raise InputError(where, str(error)) from None
    if name is not None:
        raise InputError(where, "a name goes with one corpus", "leave it out, or give a prefix")
    prefixes = sorted({_without_suffix(Path(each)) for each in paths})
    there = [each for each in prefixes if corpus_file(each, MANIFEST_SUFFIX).is_file()]
    there = [each for each in there if corpus_file(each, ".idx").is_file()]
    shards = [each for each in there if Manifest.read(each).shard is not None]
    if shards:
        say.append(f"{given}: {len(shards)} shards left out; `megaphase data merge` joins them")
    whole = [each for each in there if each not in shards]
    if not whole:
        raise InputError(
            where, "no corpus is found", "give prefixes that `megaphase data tokenize` wrote"
        )
    for prefix in whole:
        yield _checked(prefix.name, where), prefix


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (*DATA_SUFFIXES, MANIFEST_SUFFIX) else path


def _checked(name: str, where: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        remedy = "name the task: --corpus NAME=PREFIX"
        raise InputError(where, f"{shown(name)} is no name of a task ({error})", remedy) from None


def suggested_low(corpora: Sequence[FoundCorpus]) -> list[str]:
    """Return the tasks with few tokens beside the largest one; conversations are none of them."""
    texts = [each for each in corpora if each.manifest.kind != "chat"]
    most = max((each.manifest.tokens for each in texts), default=0)
    return [each.name for each in texts if each.manifest.tokens <= LOW_FRACTION * most]


def find_tokenizer(corpora: Sequence[FoundCorpus], near: Sequence[Path]) -> Path | None:
    """Return the tokenizer with which the corpora were made, if it lies near them, else None.

    near: further directories to look at.
    """
    wanted = corpora[0].manifest.tokenizer_hash
    for folder in _candidates([*near, *_around(corpora[0].prefix)]):
        try:
            if Tokenizer.load(folder).fingerprint == wanted:
                return folder
        except (InputError, RunError, OSError):  # another user's file, too
            continue
    return None


def _around(prefix: Path) -> Iterator[Path]:
    """Yield the directories above a corpus, and those in them."""
    above = [real_path(prefix.parent), *real_path(prefix.parent).parents][:LEVELS_ABOVE]
    for folder in above:
        yield folder
        try:
            # A link in a circle is no directory, and must not end the search.
            yield from sorted(p for p in folder.iterdir() if os.path.isdir(p))
        except OSError:
            continue


def _candidates(folders: Sequence[Path]) -> Iterator[Path]:
    tried = 0
    for folder in dict.fromkeys(folders):
        try:
            has_model = any(
                each.name == TOKENIZER_JSON_NAME or each.name.endswith(".model")
                for each in os.scandir(folder)
            )
        except OSError:
            continue
        if has_model:
            yield folder
            tried += 1
        if tried == MOST_TRIED:
            return
