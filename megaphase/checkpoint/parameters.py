"""Store weights and optimizer state in a checkpoint so that any layout can read them.

Every rank writes its pieces into a file `shard-RRRRR.safetensors`. A piece is a range of elements
of a parameter (split by tensor parallelism, flattened, and divided among the data-parallel ranks
by ZeRO), stored for each kind as a tensor `KIND/NAME`. `parameters.json` records their positions:

    tensor       the tensor-parallel size
    kinds        `weight` (fp32 master), what the optimizer stores, such as `exp_avg`, and
                 `average` if an average of the weights has begun
    parameters   by name: `shape` of the whole; `dim` along which it is split and `segments` that
                 are split separately (see ParameterLayout); `kinds` where it has not all of them
                 `exp_avg_sq_row` and `exp_avg_sq_col` of a matrix, of as many elements as it has
                 rows and columns, are whole in the file with its first element of tensor rank 0
    shards       by file: its `tensor_rank`, and its `pieces`: by name, the first element and the
                 one after the last in the flattened tensor-parallel shard
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megaphase.checkpoint.hashed_reading import HashedReading, Place, in_file_order
from megaphase.checkpoint.state import AVERAGE, COLUMNS, ROWS
from megaphase.checkpoint.tensor_file import TensorFile
from megaphase.distributed.sharding import ParameterLayout
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json

INDEX_FILE = "parameters.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
RANDOM = "random/"  # prefix of tensors that are no parameters: states of random generators


# The kinds of tensors of each parameter: the same of all, or by name.
Kinds = Sequence[str] | Mapping[str, Sequence[str]]


def kinds_of(kinds: Kinds, name: str) -> Sequence[str]:
    """Return those of one parameter."""
    return kinds[name] if isinstance(kinds, Mapping) else kinds


def all_kinds(kinds: Kinds) -> list[str]:
    """Return the kinds that any parameter has, without repetition."""
    by_name = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return list(dict.fromkeys(chain.from_iterable(by_name)))


def factor_layout(kind: str, layout: ParameterLayout) -> ParameterLayout | None:
    """Return the layout of the means of a matrix's rows or columns; None for all other kinds."""
    if kind not in (ROWS, COLUMNS):
        return None
    return ParameterLayout((layout.shape[0 if kind == ROWS else 1],))


def has_factors(tensor_rank: int, piece: Piece) -> bool:
    """Whether the file with this piece of a matrix holds the means of its rows and columns."""
    return tensor_rank == 0 and piece.start == 0 and piece.stop > 0


def shard_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"shard-{rank:05d}.safetensors"


def tensor_name(kind: str, parameter: str) -> str:
    """Return the name of a piece's tensor in a shard file."""
    return f"{kind}/{parameter}"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter's flattened tensor-parallel shard."""

    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """The content of one rank's file."""

    tensor_rank: int
    pieces: Mapping[str, Piece]


def index_json(
    tensor_size: int,
    kinds: Kinds,
    layouts: Mapping[str, ParameterLayout],
    shards: Mapping[str, Shard],
) -> dict[str, Any]:
    """Return the content of `parameters.json`."""
    every = all_kinds(kinds)
    own = {name: list(kinds_of(kinds, name)) for name in layouts}
    return {
        "tensor": tensor_size,
        "kinds": every,
        "parameters": {
            name: asdict(layout) | ({} if own[name] == every else {"kinds": own[name]})
            for name, layout in layouts.items()
        },
        "shards": {
            file: {
                "tensor_rank": shard.tensor_rank,
                "pieces": {name: [piece.start, piece.stop] for name, piece in shard.pieces.items()},
            }
            for file, shard in shards.items()
        },
    }


class StoredParameters:
    """Reads any range of elements of any parameter, as any layout splits it.

    At most one whole parameter is in memory at a time. `whole` may be called by several threads.

    Attributes:
        tensor_size: tensor-parallel size of the layout with which it was written.
        kinds: the tensors stored of any parameter.
        kinds_by_name: those of each parameter.
        layouts: the layout of every parameter, in the model's order.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            InputError: `parameters.json` is missing or damaged.
        """
        self._folder = folder
        try:
            index = read_json(folder / INDEX_FILE)
            self.tensor_size: int = index["tensor"]
            self.kinds: tuple[str, ...] = tuple(index["kinds"])
            self.kinds_by_name: dict[str, tuple[str, ...]] = {
                name: tuple(f.get("kinds", self.kinds)) for name, f in index["parameters"].items()
            }
            self.layouts = {
                name: ParameterLayout(tuple(f["shape"]), f["dim"], tuple(f["segments"]))
                for name, f in index["parameters"].items()
            }
            self.shards = {
                file: Shard(
                    shard["tensor_rank"],
                    {name: Piece(*piece) for name, piece in shard["pieces"].items()},
                )
                for file, shard in index["shards"].items()
            }
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise InputError(folder / INDEX_FILE, problem, "use another checkpoint") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(folder / INDEX_FILE, "is damaged", "use another checkpoint") from None
        self._pieces: dict[tuple[str, int], list[tuple[Piece, str]]] = defaultdict(list)
        for file, shard in self.shards.items():
            for name, piece in shard.pieces.items():
                self._pieces[name, shard.tensor_rank].append((piece, file))
        self._open = cache(lambda file: TensorFile(folder / file))
        self._last_cut: tuple[tuple[object, ...], Tensor] | None = None
        self._weight = WEIGHT  # the stored kind that is read as the weight

    def of_average(self) -> Self:
        """Return the same parameters with the stored average as their weights, without moments.

        Raises:
            InputError: none is stored.
        """
        if AVERAGE not in self.kinds:
            raise InputError(
                self._folder, "holds no average of the weights", "take the weights, or another one"
            )
        other = copy(self)
        other.kinds = (WEIGHT,)
        other.kinds_by_name = dict.fromkeys(self.layouts, other.kinds)
        other._weight, other._last_cut = AVERAGE, None
        return other

    def check(self, layouts: Mapping[str, ParameterLayout]) -> None:
        """Reject a model whose parameters differ from the stored ones.

        Raises:
            InputError: names the first parameter that is missing, unknown or of another shape.
        """
        for name, layout in layouts.items():
            if name not in self.layouts:
                raise InputError(self._folder, f"has no parameter {name}", "check model")
            found, wanted = self.layouts[name].shape, layout.shape
            if found != wanted:
                raise InputError(
                    self._folder,
                    f"{name} has the shape {list(found)}, this model needs {list(wanted)}",
                    "check model and tokenizer",
                )
        for name in self.layouts.keys() - layouts.keys():
            raise InputError(self._folder, f"this model has no parameter {name}", "check model")

    def check_pieces(self) -> None:
        """Reject shards that do not contain exactly the tensors that `parameters.json` records.

        Raises:
            InputError: names the first tensor that is missing, unknown, duplicate or of another
                size.
        """
        for file in self.shards:
            self._check_file(file)
        for name, layout in self.layouts.items():
            for rank in range(1 if layout.dim is None else self.tensor_size):
                self._check_whole(name, rank, layout.shard_numel(self.tensor_size))

    def read(
        self, name: str, kind: str, layout: ParameterLayout, rank: int, size: int, piece: Piece
    ) -> Tensor:
        """Read elements of a parameter's shard for tensor-parallel rank `rank` of `size`.

        layout: the layout of the reader, with the shape of the stored one. Returns fp32 [elements].
        """
        stored = self.layouts[name]
        if stored.dim is None:
            return self._stored(name, kind, 0, piece)
        if size == self.tensor_size and layout == stored:
            return self._stored(name, kind, rank, piece)
        return self._cut(name, kind, layout, rank, size)[piece.start : piece.stop]

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a whole parameter without padding, in its own shape; every byte is read once."""
        hashing = [
            (reading, tensor)
            for file, tensor in self._tensors_of(name, kind)
            if (reading := self._open(file).hashing) is not None
        ]
        try:
            return self._whole(name, kind)
        except BaseException:
            for reading, _ in hashing:
                reading.give_up()
            raise
        finally:
            for reading, tensor in hashing:
                reading.done(tensor)

    def places_in(self, order: Sequence[tuple[str, str]]) -> dict[str, list[Place]]:
        """Return by file the tensors that `whole` reads for names and kinds in this order, as far
        as they follow each other in the file."""
        found: dict[str, list[Place]] = {file: [] for file in self.shards}
        for turn, (name, kind) in enumerate(order):
            if name in self.layouts and kind in self.kinds_by_name[name]:
                for file, tensor in self._tensors_of(name, kind):
                    found[file].append(self._open(file).place(tensor, turn))
        return {file: in_file_order(places) for file, places in found.items()}

    def hash_by(self, readings: Mapping[str, HashedReading]) -> None:
        """Let these compute the hashes of the files by whose names they are given, while `whole`
        reads them."""
        for file in self.shards:
            self._open(file).hashing = readings.get(file)

    def _tensors_of(self, name: str, kind: str) -> Iterator[tuple[str, str]]:
        """Yield file and name of each tensor of a parameter's kind."""
        factor = factor_layout(kind, self.layouts[name]) is not None
        stored = tensor_name(self._weight if kind == WEIGHT else kind, name)
        for rank in range(1 if self.layouts[name].dim is None or factor else self.tensor_size):
            for piece, file in self._pieces[name, rank]:
                if not factor or has_factors(rank, piece):
                    yield file, stored

    def _whole(self, name: str, kind: str) -> Tensor:
        layout, size = self.layouts[name], self.tensor_size
        factor = factor_layout(kind, layout)
        if factor is not None:
            return self._factor(name, kind, factor.numel)
        if layout.is_whole(size):
            return self._stored(name, kind, 0, Piece(0, layout.numel)).view(layout.shape)
        if layout.dim == 0:
            return self._whole_of_rows(name, kind)
        shape, numel = layout.shard_shape(size), layout.shard_numel(size)
        parts = (self._stored(name, kind, r, Piece(0, numel)).view(shape) for r in range(size))
        return layout.unshard(parts, size)

    def _factor(self, name: str, kind: str, numel: int) -> Tensor:
        found = torch.empty(numel)
        for piece, file in self._pieces[name, 0]:
            if has_factors(0, piece):
                self._open(file).read_into(tensor_name(kind, name), 0, found)
                return found
        raise self._missing(f"{kind} of {name} is")

    def _whole_of_rows(self, name: str, kind: str) -> Tensor:
        """Return a parameter that is split between rows; read each range into its place."""
        layout = self.layouts[name]
        whole = torch.empty(layout.shape)
        for rank in range(self.tensor_size):
            for run in layout.runs(rank, self.tensor_size):
                rows = run.of_whole(whole, 0)
                row = rows[0].numel()
                self._read_into(name, kind, rank, run.in_shard * row, rows.view(-1))
        return whole

    def _cut(self, name: str, kind: str, layout: ParameterLayout, rank: int, size: int) -> Tensor:
        """Return a parameter as another layout splits it, flattened; cached until the next one."""
        key = (name, kind, layout, rank, size)
        if self._last_cut is None or self._last_cut[0] != key:
            self._last_cut = None
            cut = layout.shard(self.whole(name, kind), rank, size)
            self._last_cut = key, cut.reshape(-1)
        return self._last_cut[1]

    def _stored(self, name: str, kind: str, tensor_rank: int, wanted: Piece) -> Tensor:
        found = torch.empty(wanted.stop - wanted.start)
        self._read_into(name, kind, tensor_rank, wanted.start, found)
        return found

    def _read_into(self, name: str, kind: str, tensor_rank: int, first: int, out: Tensor) -> None:
        """Read elements from `first` on of a rank's flattened shard, as many as `out` [elements]
        has."""
        missing = out.numel()
        for piece, file in self._pieces[name, tensor_rank]:
            start, stop = max(piece.start, first), min(piece.stop, first + out.numel())
            if start < stop:
                part = out[start - first : stop - first]
                stored = tensor_name(self._weight if kind == WEIGHT else kind, name)
                self._open(file).read_into(stored, start - piece.start, part)
                missing -= stop - start
        if missing:
            raise self._missing(f"{missing:,} elements of {kind} of {name} are")

    def _check_file(self, file: str) -> None:
        shard, path = self.shards[file], self._folder / file
        known = {}
        for name, piece in shard.pieces.items():
            for kind in self.kinds_by_name[name]:
                factor = factor_layout(kind, self.layouts[name])
                if factor is None:
                    known[tensor_name(kind, name)] = piece.stop - piece.start
                elif has_factors(shard.tensor_rank, piece):
                    known[tensor_name(kind, name)] = factor.numel
        stored = self._open(file).kinds
        found = {name: kind for name, kind in stored.items() if not name.startswith(RANDOM)}
        for name, numel in known.items():
            if name not in found:
                raise InputError(path, f"has no tensor {name}", "use another checkpoint")
            if (found[name].dtype, found[name].numel) != (torch.float32, numel):
                raise InputError(
                    path,
                    f"{name} has {found[name].numel:,} elements of {found[name].dtype}, not "
                    f"{numel:,} of fp32",
                    "use another checkpoint",
                )
        for name in found.keys() - known.keys():
            raise InputError(path, f"{name} is not in {INDEX_FILE}", "use another checkpoint")

    def _check_whole(self, name: str, rank: int, numel: int) -> None:
        end = 0
        for piece, file in sorted(self._pieces[name, rank], key=lambda found: found[0].start):
            if piece.start < end:
                raise InputError(
                    self._folder / file,
                    f"elements of {name} from {piece.start:,} on are also in another shard",
                    "use another checkpoint",
                )
            if piece.start > end:
                break
            end = piece.stop
        if end != numel:
            raise self._missing(f"element {end:,} of {name}, tensor-parallel rank {rank}, is")

    def _missing(self, what: str) -> InputError:
        problem = f"{what} in none of its shards"
        return InputError(self._folder, problem, "use another checkpoint")
