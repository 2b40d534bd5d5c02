"""Write several files of tensors, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megaphase.checkpoint.tensor_file import TensorKind, TensorWriter


class TensorFiles:
    """safetensors files in a folder; each is open from its first tensor to its last.

    Attributes:
        described: the manifest entries, `bytes` and `hash`, of the finished files.
    """

    def __init__(
        self,
        folder: Path,
        contents: Mapping[str, Mapping[str, TensorKind]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
                contents: for each file, its tensors in the order in which they will be written.
                metadata: strings to store in every file.
        """
        self._folder, self._contents, self._metadata = folder, contents, metadata
        self._left = {file: len(tensors) for file, tensors in contents.items()}
        self._writers: dict[str, TensorWriter] = {}
        self.described: dict[str, dict[str, Any]] = {}
        for file, left in self._left.items():
            (folder / file).parent.mkdir(exist_ok=True)
            if not left:  # as of a rank that holds nothing
                self.described[file] = self._open(file).close()

    def write(self, file: str, *parts: Tensor) -> None:
        """Write the next tensor of a file, in one part or several; see TensorWriter.

        May be called by several threads, for different files.
        """
        if file not in self._writers:
            self._writers[file] = self._open(file)
        for part in parts:
            self._writers[file].write(part)
        self._left[file] -= 1
        if not self._left[file]:
            self.described[file] = self._writers.pop(file).close()

    def close(self) -> None:
        """Abandon files that an error has left unfinished."""
        for writer in self._writers.values():
            writer.abandon()

    def _open(self, file: str) -> TensorWriter:
        contents = self._contents[file]
        return TensorWriter(self._folder / file, contents, self._metadata, direct=True)
