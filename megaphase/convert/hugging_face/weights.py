"""Read the tensors of a Hugging Face model directory as the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.checkpoint.tensor_file import TensorFile, TensorKind
from megaphase.convert.hugging_face.family import Family, is_buffer
from megaphase.convert.parameter_mapping import check_names
from megaphase.convert.safe_torch_load import check_archive, load_pickle
from megaphase.model.parameters import parameter_layouts
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json

SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

_REMEDY = "download the model again"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FoundTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        read: reads the tensor in its stored form.
    """

    path: Path
    name: str
    kind: TensorKind
    read: Callable[[], Tensor]


def find_tensors(
    directory: Path, open_files: ExitStack, *, trust_pickle: bool
) -> list[FoundTensor]:
    """Return every tensor of a model, from safetensors files or, if there are none, from pickles.

    open_files: closes them.

    Raises:
        InputError: there is no model, a shard is missing or damaged, or differs from the index.
    """
    for file in (SAFETENSORS_FILE, PICKLE_FILE):
        index = directory / f"{file}{INDEX_SUFFIX}"
        if not (directory / file).is_file() and not index.is_file():
            continue
        places = None if (directory / file).is_file() else _places(index)
        files = sorted({file} if places is None else set(places.values()))
        found: list[FoundTensor] = []
        for path in (directory / each for each in files):
            if not path.is_file():
                raise InputError(path, "is missing", _REMEDY)
            if file == SAFETENSORS_FILE:
                found += _of_safetensors(open_files.enter_context(TensorFile(path)))
            else:
                found += _of_pickle(path, trust=trust_pickle)
        if places is not None:
            _check_index(index, places, found)
        return found
    raise InputError(
        directory,
        f"has neither {SAFETENSORS_FILE} nor {PICKLE_FILE}, nor an index of shards",
        "give the directory of a Hugging Face model",
    )


class HuggingFaceWeights:
    """The model's parameters, from the tensors of a model of this family and shape.

    Attributes:
        layouts: of all parameters, in the model's order.
    """

    kinds: Sequence[str] = (WEIGHT,)

    def __init__(
        self, directory: Path, family: Family, shape: GPTShape, found: Sequence[FoundTensor]
    ) -> None:
        """
        Raises:
                    InputError: names the first tensor that is missing, unknown, duplicate, or of
                        another shape or dtype than required by the config.
        """
        self.layouts = parameter_layouts(shape, 1)
        self._mappings = family.mappings(shape)
        self._tensors = _by_canonical_name(family, found)
        wanted: dict[str, tuple[int, ...]] = {}
        for name, mapping in self._mappings.items():
            wanted |= mapping.foreign_shapes(self.layouts[name].shape)
        tied_head = self._tensors.pop(family.head, None) if shape.tied_embeddings else None
        for name, value in family.stored_constants(shape).items():
            if (constant := self._tensors.pop(name, None)) is not None:
                _check_constant(constant, value)
        names = {n if n in wanted else found.name for n, found in self._tensors.items()}
        check_names(directory, wanted, names)
        for name, their_shape in wanted.items():
            _check_kind(self._tensors[name], their_shape)
        if tied_head is not None:
            [embedding] = self._mappings["embedding.weight"].foreign_names
            _check_tied(tied_head, self._tensors[embedding])

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous."""
        return self._mappings[name].join(lambda foreign: self._tensors[foreign].read().float())


def _places(index: Path) -> dict[str, str]:
    """Return the file of every tensor."""
    try:
        places: dict[str, str] = read_json(index)["weight_map"]
        # A name with a folder could point outside the directory.
        if not places or any(Path(file).name != file for file in places.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(index, "is no index of shards", _REMEDY) from None
    return places


def _of_safetensors(file: TensorFile) -> Iterator[FoundTensor]:
    for name, kind in file.kinds.items():
        yield FoundTensor(file.path, name, kind, partial(file.read, name))


def _of_pickle(path: Path, *, trust: bool) -> Iterator[FoundTensor]:
    check_archive(path)
    tensors = load_pickle(path, trust=trust)
    if not isinstance(tensors, dict):
        raise InputError(path, "holds no tensors by name", _REMEDY)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(path, f"{name} is no tensor", _REMEDY)
        kind = TensorKind(tensor.dtype, tuple(tensor.shape))
        yield FoundTensor(path, name, kind, partial(tensor.detach))


def _check_index(index: Path, places: Mapping[str, str], found: Sequence[FoundTensor]) -> None:
    """Reject shards whose tensors are not in the files named by the index."""
    files: dict[str, Path] = {}
    for tensor in found:
        if tensor.name in files:
            problem = f"{tensor.name} is in {files[tensor.name].name}, too"
            raise InputError(tensor.path, problem, _REMEDY)
        files[tensor.name] = tensor.path
    for name, file in places.items():
        if name not in files or files[name].name != file:
            raise InputError(index.parent / file, f"has no tensor {name}", _REMEDY)


def _by_canonical_name(family: Family, found: Sequence[FoundTensor]) -> dict[str, FoundTensor]:
    tensors: dict[str, FoundTensor] = {}
    for tensor in found:
        if is_buffer(tensor.name):
            continue
        name = family.canonical(tensor.name)
        if name in tensors:
            problem = f"{tensor.name} is there as {tensors[name].name}, too"
            raise InputError(tensor.path, problem, _REMEDY)
        tensors[name] = tensor
    return tensors


def _check_kind(tensor: FoundTensor, shape: tuple[int, ...]) -> None:
    kind = tensor.kind
    if kind.shape != shape:
        raise InputError(
            tensor.path,
            f"{tensor.name} has the shape {list(kind.shape)}, config.json wants {list(shape)}",
            _REMEDY,
        )
    if kind.dtype not in _DTYPES:
        raise InputError(
            tensor.path,
            f"{tensor.name} is {str(kind.dtype).removeprefix('torch.')}",
            "give a model of float32, bfloat16 or float16",
        )


def _check_constant(tensor: FoundTensor, value: float) -> None:
    """Reject a scalar that is not one of this family's, rounded to the type of the weights."""
    _check_kind(tensor, ())
    expected = torch.tensor(value, dtype=tensor.kind.dtype)
    if not torch.equal(found := tensor.read(), expected):
        problem = f"{tensor.name} is {found.item()}, and in other models {expected.item()}"
        raise InputError(tensor.path, problem, "megaphase has no such model; use another one")


def _check_tied(head: FoundTensor, embedding: FoundTensor) -> None:
    """Reject a separate output projection if config.json says that it is tied.

    Versions of transformers differ in which of the two they use.
    """
    if head.kind != embedding.kind or not torch.equal(head.read(), embedding.read()):
        raise InputError(
            head.path,
            f"{head.name} is not {embedding.name}, though tie_word_embeddings is true",
            "set tie_word_embeddings in config.json to false, or remove the tensor",
        )
