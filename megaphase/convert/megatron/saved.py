"""What a conversion needs of a Megatron-LM checkpoint, whatever its format."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.megatron.names import MegatronParameter


class SavedModel(Protocol):
    """An open checkpoint; its tensors stay in the files until they are read.

    Attributes:
        folder: of the iteration.
        path: the file that contains the arguments.
        args: of the run.
        iteration: after which it was written.
        tensor: number of ranks over which each sharded parameter is stored; 1 where parameters
            are stored as one.
        layout: how the run was distributed, in words.
        kinds: precision and shape of the tensors, by the names in Megatron Core: those of the
            first of these ranks.
    """

    folder: Path
    path: Path
    args: Namespace
    iteration: Any
    tensor: int
    layout: str
    kinds: Mapping[str, TensorKind]

    def check(self, parameters: Collection[MegatronParameter]) -> None:
        """Compare names and shapes with those of a model.

        Raises:
            InputError: names the first tensor that differs.
        """
        ...

    def read(self, parameter: MegatronParameter) -> Tensor:
        """Return a whole parameter, fp32, with the rows in Megatron-LM's order, without padding;
        called by several threads.

        Raises:
            InputError: it cannot be read, or ranks have different copies.
        """
        ...

    def verify(self, console: Console | None) -> int:
        """Compare the stored checksums with the files; return the number of files.

        Raises:
            InputError: names the first file that is damaged.
        """
        ...
