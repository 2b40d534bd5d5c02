"""`PREFIX.skipped.jsonl`: the documents that were wrong and are not in the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from megaphase.corpus.hashed_file import HashedFile
from megaphase.corpus.manifest import corpus_file
from megaphase.data_tools.text_files import WrongDocument

SKIPPED_SUFFIX = ".skipped.jsonl"


class SkippedDocuments:
    """Context manager that writes the file, one object a line: `where`, `problem` and `text`.

    It appears whole when the block ends, where anything was skipped; an old one is removed where
    nothing was. Where the block raises, all stays as it was.
    """

    def __init__(self, prefix: Path) -> None:
        self.path = corpus_file(prefix, SKIPPED_SUFFIX)
        self._file: HashedFile | None = None

    def add(self, documents: Iterable[WrongDocument]) -> None:
        """Append some documents."""
        for document in documents:
            self._file = self._file or HashedFile(self.path)
            self._file.write(f"{json.dumps(asdict(document), ensure_ascii=False)}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            if kind is None:
                self.path.unlink(missing_ok=True)
        elif kind is None:
            self._file.finish()
            self._file.publish()
        else:
            self._file.discard()
