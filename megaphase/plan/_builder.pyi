"""The plan builder's inner loops, in C++ (csrc/). Lengths are int32 or int64, slots uint32 or
uint64, tasks uint16 or uint32, tokens uint16 or int32; no array is converted or copied."""

import numpy as np

LARGEST_TOTAL_WEIGHT: int

class EarliestDeadlineFirst:
    def __init__(self, weights: list[int]) -> None: ...
    @property
    def position(self) -> int: ...
    @property
    def counts(self) -> list[int]: ...

def fill_blend(
    blend: EarliestDeadlineFirst, tasks: np.ndarray, counts: np.ndarray, block: int
) -> None: ...
def phase_ordinals(
    tasks: np.ndarray, counts: np.ndarray, block: int, first: int, ordinals: np.ndarray
) -> None: ...
def count_documents(
    lengths: np.ndarray, hashes: np.ndarray, threshold: int, held_out: bool
) -> tuple[int, int]: ...
def fill_epoch(
    lengths: np.ndarray,
    hashes: np.ndarray,
    threshold: int,
    held_out: bool,
    key: int,
    epoch: int,
    seq_len: int,
    slots: np.ndarray,
    offsets: np.ndarray,
) -> None: ...
def shuffle_samples(
    ordinals: np.ndarray, samples_per_epoch: int, window: int, key: int
) -> np.ndarray: ...
def read_samples(
    tokens: np.ndarray,
    byte_offsets: np.ndarray,
    lengths: np.ndarray,
    hashes: np.ndarray,
    threshold: int,
    held_out: bool,
    key: int,
    epochs: np.ndarray,
    slots: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    filler: int,
    ignored: int,
) -> None: ...
