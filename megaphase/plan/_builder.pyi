"""The plan builder's inner loops, in C++ (csrc/). Lengths are int32 or int64, starts uint32 or
uint64, tasks uint16 or uint32, tokens uint16 or int32; no array is converted or copied."""

import numpy as np

LARGEST_TOTAL_WEIGHT: int

class WrongTokensError(ValueError):
    """`args`: the tokens [first, last) of the .bin are altered, or not in the vocabulary."""

class DeadlineBlend:
    def __init__(self, weights: list[int]) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def counts(self) -> list[int]: ...
    def fill(self, tasks: np.ndarray, counts: np.ndarray, block: int) -> None: ...

class RandomBlend:
    def __init__(self, weights: list[int], key: int) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def counts(self) -> list[int]: ...
    def fill(self, tasks: np.ndarray, counts: np.ndarray, block: int) -> None: ...

class PiecewiseDeadlineBlend:
    """bounds: uint64 [pieces + 1]; weights: uint64 [tasks, pieces]; csrc/piecewise_blend.hpp."""

    def __init__(self, bounds: np.ndarray, weights: np.ndarray) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def counts(self) -> list[int]: ...
    def fill(self, tasks: np.ndarray, counts: np.ndarray, block: int) -> None: ...

class PiecewiseRandomBlend:
    def __init__(self, bounds: np.ndarray, weights: np.ndarray, key: int) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def counts(self) -> list[int]: ...
    def fill(self, tasks: np.ndarray, counts: np.ndarray, block: int) -> None: ...

class StreamWalk:
    @property
    def at_end(self) -> bool: ...
    def fill(self, starts: np.ndarray, documents: int) -> int: ...

class StreamPartWalk:
    @property
    def at_end(self) -> bool: ...
    def fill(self, parts: np.ndarray, documents: int) -> int: ...

class Stream:
    def __init__(
        self,
        tokens: np.ndarray,
        byte_offsets: np.ndarray,
        lengths: np.ndarray,
        hashes: np.ndarray,
        first_hash: int,
        last_hash: int,
        key: int,
        seq_len: int,
        tag: int | None = None,
        blocks: np.ndarray | None = None,
        vocab_size: int = ...,
        bos: int | None = None,
        is_target: np.ndarray | None = None,
    ) -> None: ...
    def with_seq_len(self, seq_len: int) -> Stream: ...
    def totals(self) -> tuple[int, int]: ...
    def walk(self, epoch: int, like: StreamWalk | None = None) -> StreamWalk: ...
    def part_walk(self, epoch: int, ranges: list[tuple[int, int]]) -> StreamPartWalk: ...
    def read_parts(
        self,
        parts: np.ndarray,
        sizes: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
        ignored: int,
        documents: np.ndarray | None = None,
    ) -> None: ...
    def pieces(self, epoch: int, slot: int, offset: int) -> list[tuple[int, int, int]]: ...
    def read(
        self,
        starts: np.ndarray,
        samples_per_epoch: int,
        numbers: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
        ignored: int,
        documents: np.ndarray | None = None,
    ) -> None: ...
    def pack(self, spans: np.ndarray) -> tuple[np.ndarray, int]: ...
    def packed_pieces(self, spans: np.ndarray, start: np.ndarray) -> list[tuple[int, int, int]]: ...
    def read_packed(
        self,
        spans: np.ndarray,
        starts: np.ndarray,
        rows: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
        ignored: int,
        documents: np.ndarray | None = None,
    ) -> None: ...
    def pieces_of_tokens(
        self, epoch: int, slot: int, offset: int, tokens: int
    ) -> list[tuple[int, int, int]]: ...
    def read_fragments(
        self,
        starts: np.ndarray,
        starts_per_epoch: int,
        fragments: np.ndarray,
        inputs: np.ndarray,
        targets: np.ndarray,
        filler: int,
        ignored: int,
        documents: np.ndarray | None = None,
    ) -> None: ...

def pack_parts(parts: np.ndarray, seq_len: int, bos: bool) -> tuple[np.ndarray, np.ndarray]: ...
def phase_ordinals(
    tasks: np.ndarray, counts: np.ndarray, block: int, first: int, ordinals: np.ndarray
) -> None: ...
def shuffle_samples(
    ordinals: np.ndarray, samples_per_epoch: int, window: int, key: int
) -> np.ndarray: ...
