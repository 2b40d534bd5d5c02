"""Small corpora and run files for the plan's tests, and a slow reference for a plan's content.

The reference shares no code with the package: it is written from the headers in csrc/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.corpus.format import token_dtype
from megaphase.plan import _builder
from megaphase.plan.build import ensure_built
from megaphase.plan.dataset import Batch, read_samples
from megaphase.plan.index import block_size, task_dtype
from megaphase.plan.mixture import integer_weights
from megaphase.plan.plan import Plan
from megaphase.plan.spec import PlanSpec, plan_spec
from megaphase.plan.stream import Stream

TOKENIZER_HASH = "0123"
MASK = 2**64 - 1
LARGEST = _builder.LARGEST_TOTAL_WEIGHT


@dataclass(frozen=True)
class FakeTokenizer:
    """Everything that a plan needs from a tokenizer."""

    fingerprint: str = TOKENIZER_HASH
    vocab_size: int = 96
    bos: int | None = None
    adds_bos: bool = False


@dataclass(frozen=True)
class Documents:
    """The content of a corpus, in which every token occurs once."""

    lengths: list[int]
    hashes: list[int]
    first_token: int

    def tokens(self, document: int) -> list[int]:
        start = self.first_token + sum(self.lengths[:document])
        return list(range(start, start + self.lengths[document]))

    def held_out(self, fraction: float) -> list[bool]:
        return [each < int(Fraction(str(fraction)) * 2**64) for each in self.hashes]

    def on_side(self, side: str, fraction: float, subsample: float = 1.0) -> list[bool]:
        held_out = self.held_out(fraction)
        if side == "held out":
            return held_out
        threshold = int(Fraction(str(fraction)) * 2**64)
        end = threshold + Fraction(str(subsample)) * (2**64 - threshold)
        return [
            not held and each + 1 <= end for held, each in zip(held_out, self.hashes, strict=True)
        ]


def write_corpus(
    prefix: Path,
    lengths: list[int],
    *,
    seed: int = 0,
    first_token: int = 0,
    vocab_size: int = 60000,
) -> Documents:
    """Write a corpus whose tokens count up from `first_token`, with random document hashes."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(lengths), dtype=np.uint64)
    tokens = np.arange(first_token, first_token + sum(lengths)).astype(token_dtype(vocab_size))
    with CorpusWriter(
        prefix, tokenizer_hash=TOKENIZER_HASH, vocab_size=vocab_size, eod=0
    ) as writer:
        text_bytes = [3 * length for length in lengths]
        writer.add_batch(DocumentBatch.of(tokens, np.array(lengths), hashes, text_bytes))
    return Documents(lengths, [int(each) for each in hashes], first_token)


def random_lengths(documents: int, longest: int, seed: int) -> list[int]:
    """Return lengths in [1, longest], both shorter and longer than a sample."""
    return np.random.default_rng(seed).integers(1, longest + 1, documents).tolist()


def write_run(folder: Path, corpora: list[str], **changes: Any) -> RunConfig:
    """Write a run file over corpora in `folder`; `changes` replace top-level keys."""
    data: dict[str, Any] = {
        "seed": 7,
        "output": "run",
        "tokenizer": "tok",
        "tasks": {name: {"corpus": name} for name in corpora},
        "model": {"preset": "gpt-3m", "seq_len": 8},
        "batch": {"samples": 4},
        "phases": [phase("pretrain", 10, {"rates": {corpora[0]: 1.0}})],
        "validation": {"fraction": 0.2},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(data | changes, sort_keys=False))
    return load_run_file(path)


def phase(name: str, steps: int, mixture: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "steps": steps, "mixture": mixture, "learning_rate": {"peak": 1e-3}}


PLAN_PHASES = [
    phase("one", 12, {"rates": {"en": 0.75, "hi": 0.25}}),
    phase("two", 8, {"temperature": 3.3}),
]


def write_three_tasks(folder: Path) -> tuple[RunConfig, dict[str, Documents]]:
    """Write a run with PLAN_PHASES over three small corpora."""
    written = {
        name: write_corpus(
            folder / name, random_lengths(40 - 10 * i, 30, i), seed=i, first_token=i * 9000
        )
        for i, name in enumerate(["en", "hi", "no"])
    }
    return write_run(folder, list(written), phases=PLAN_PHASES), written


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def spec_of(config: RunConfig, used: Mapping[str, int] | None = None) -> PlanSpec:
    return plan_spec(config, FakeTokenizer(), used)  # type: ignore[arg-type]


def build_plan(config: RunConfig, used: Mapping[str, int] | None = None) -> Plan:
    spec = spec_of(config, used)
    return Plan(spec, ensure_built(spec, config.output))


def read_held_out(stream: Stream, task: int, samples: int, pad_token_id: int) -> Batch:
    """Return the first `samples` samples of a stream, such as a held-out one, or all if there are
    fewer."""
    starts = stream.first_starts(min(samples, stream.samples_per_epoch))
    return read_samples(stream, task, starts, pad_token_id, len(starts))


def as_rows(batch: Batch) -> list[tuple]:
    """Return (task, tokens...) of every row."""
    return [
        (task, *inputs, *targets)
        for task, inputs, targets in zip(
            batch.tasks.tolist(), batch.inputs.tolist(), batch.targets.tolist(), strict=True
        )
    ]


def derived_key(*parts: object) -> int:
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_mix(state: int) -> tuple[int, int]:
    """(new state, word)"""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    word = state
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return state, word ^ (word >> 31)


def member_key(family: int, member: int) -> int:
    _, word = split_mix(family)
    return split_mix(word ^ member)[1]


def permutation(size: int, key: int) -> list[int]:
    """Return the keyed permutation of range(size)."""
    return images(size, key, list(range(size)))


def images(size: int, key: int, positions: list[int]) -> list[int]:
    """Return the images of some positions under the keyed permutation of range(size)."""
    bits = max(1, (size - 1).bit_length())
    mask, shift = 2**bits - 1, max(1, bits // 2)
    rounds = []
    for _ in range(4):
        key, low = split_mix(key)
        key, multiplier = split_mix(key)
        rounds.append((low & mask, multiplier | 1))
    rotation = split_mix(key)[1] % size

    def image(word: int) -> int:
        while True:
            for low, multiplier in rounds:
                word = ((word ^ low) * multiplier) & mask
                word ^= word >> shift
            if word < size:
                return (word + rotation) % size

    return [image(position) for position in positions]


@dataclass(frozen=True)
class ReferenceStream:
    """A stream's samples, computed whole epochs at a time."""

    task: str
    documents: Documents
    seq_len: int
    fraction: float
    seed: int = 7
    side: str = "training"
    window: int = 1 << 16
    subsample: float = 1.0

    def in_token_order(self, epoch: int) -> list[list[int]]:
        """Return all samples of an epoch, each of seq_len + 1 tokens or, at the end, fewer."""
        family = derived_key(self.seed, "documents", self.side, self.task)
        order = permutation(len(self.documents.lengths), member_key(family, epoch))
        here = self.documents.on_side(self.side, self.fraction, self.subsample)
        joined = [
            token
            for document in order
            if here[document]
            for token in self.documents.tokens(document)
        ]
        starts = range(0, len(joined) - 1, self.seq_len)
        return [joined[start : start + self.seq_len + 1] for start in starts]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return all samples of an epoch by ordinal."""
        samples = self.in_token_order(epoch)
        family = member_key(derived_key(self.seed, "samples", self.side, self.task), epoch)
        shuffled = []
        for number, start in enumerate(range(0, len(samples), self.window)):
            part = samples[start : start + self.window]
            order = permutation(len(part), member_key(family, number))
            shuffled += [part[i] for i in order]
        return shuffled

    def first(self, ordinals: int) -> list[list[int]]:
        """Return the samples with the ordinals [0, ordinals)."""
        samples: list[list[int]] = []
        epoch = 0
        while len(samples) < ordinals:
            samples += self.epoch(epoch)
            epoch += 1
        return samples[:ordinals]


def blend(weights: list[int], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (task of every slot, counts before every block)."""
    block = block_size(len(weights))
    tasks = np.zeros(samples, task_dtype(len(weights)))
    counts = np.zeros((-(-samples // block), len(weights)), np.int64)
    _builder.DeadlineBlend(weights).fill(tasks, counts, block)
    return tasks, counts


def blend_of_rates(rates: list[Fraction], samples: int) -> np.ndarray:
    return blend(integer_weights(rates, samples, LARGEST), samples)[0]


def normalised(weights: list[int]) -> list[Fraction]:
    total = sum(weights)
    return [Fraction(weight, total) for weight in weights]
