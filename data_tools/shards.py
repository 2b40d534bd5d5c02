"""Shards of one tokenization job, for machines that share the work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megaphase.corpus.manifest import MANIFEST_SUFFIX
from megaphase.data_tools.text import InputPath, size_on_disk
from megaphase.utils.errors import InputError

MOST_SHARDS = 99_999


@dataclass(frozen=True)
class ShardChoice:
    """Shard `number` (from 0) of `of` shards; each covers an equal share of the bytes on disk.

    by_file: it has whole files, about as many bytes as the others; none is without a file while
        another has two.
    """

    number: int
    of: int
    by_file: bool = False

    @classmethod
    def parse(cls, text: str) -> ShardChoice:
        """Parse text such as `3/64`; raise InputError if it is not valid."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 0 <= int(found[1]) < int(found[2]) <= MOST_SHARDS:
            remedy = "give I/N with I from 0 to N - 1, such as 3/64"
            raise InputError("--shard", f"{text!r} is not a valid shard", remedy)
        if int(found[2]) == 1:
            raise InputError("--shard", f"{text} is the whole corpus", "leave it out")
        return cls(int(found[1]), int(found[2]))

    def prefix(self, out: Path) -> Path:
        """Return the prefix of this shard of the corpus `out`, or `out` for the whole corpus."""
        if self.of == 1:
            return out
        return out.with_name(f"{out.name}.shard-{self.number:05d}-of-{self.of:05d}")


WHOLE = ShardChoice(0, 1)


@dataclass(frozen=True)
class FilePart:
    """Bytes [begin, end) of a file on disk; `end` None means the end of the file."""

    file: int
    begin: int
    end: int | None


def parts_of(paths: Sequence[InputPath], shard: ShardChoice) -> Iterator[FilePart]:
    """Yield the parts of the files that belong to a shard, in order."""
    sizes = [size_on_disk(path) for path in paths]
    if shard.by_file:
        for file, number in enumerate(_shards_of_files(sizes, shard.of)):
            if number == shard.number:
                yield FilePart(file, 0, None)
        return
    total = sum(sizes)
    low, high = (total * number // shard.of for number in (shard.number, shard.number + 1))
    for file, (size, ends) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        begins = ends - size
        # Standard input has no size.
        if (begins < high and ends > low) or shard == WHOLE:
            end = None if high >= ends else high - begins
            yield FilePart(file, max(low - begins, 0), end)


def _shards_of_files(sizes: Sequence[int], of: int) -> Iterator[int]:
    """Yield the shard of every file, in ascending order: that of its middle byte, if no shard is
    thereby left without a file."""
    total = max(1, sum(sizes))
    shard = -1
    for file, (size, ends) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        of_middle = (2 * ends - size) * of // (2 * total)
        least = of - (len(sizes) - file)  # what follows then suffices for the shards that follow
        shard = min(max(of_middle, least, shard, 0), shard + 1, of - 1)
        yield shard


def begun_shards(prefix: Path) -> set[tuple[int, int]]:
    """Return (I, N) of the shards of a corpus that are there or have been begun."""
    name = rf"\.?{re.escape(prefix.name)}\.shard-(\d+)-of-(\d+)(\.draft|{MANIFEST_SUFFIX})"
    found = (re.fullmatch(name, path.name) for path in prefix.parent.glob("*"))
    return {(int(match[1]), int(match[2])) for match in found if match}


def refuse_other_shards(out: Path, of: int) -> None:
    """Raise InputError if shards of `out` are there that belong to a division into another
    number."""
    for path in existing_shards(out, may_be_none=True):
        if not path.name.endswith(f"-of-{of:05d}"):
            problem = f"is there, and belongs to a division by another number than {of:,}"
            raise InputError(path, problem, "remove those shards, or divide as they are")


def existing_shards(out: Path, *, may_be_none: bool = False) -> list[Path]:
    """Return the prefixes of the existing shards of the corpus `out`, in order.

    Raises InputError if there is none, or if they belong to divisions into different numbers.
    """
    pattern = re.compile(rf"{re.escape(out.name)}\.shard-(\d+)-of-(\d+){MANIFEST_SUFFIX}")
    names = sorted(path.name for path in out.parent.glob("*.json"))
    found = [match for match in map(pattern.fullmatch, names) if match]
    if not found and may_be_none:
        return []
    if not found:
        problem = f"no {out.name}.shard-… was found next to it"
        raise InputError(out, problem, "make them with `megaphase data tokenize --shard I/N`")
    if len({match[2] for match in found}) > 1:
        counts = " and ".join(sorted({str(int(match[2])) for match in found}))
        problem = f"there are shards of a division by {counts} next to it"
        raise InputError(out, problem, "remove those that are not wanted")
    return [out.with_name(match[0].removesuffix(MANIFEST_SUFFIX)) for match in found]
