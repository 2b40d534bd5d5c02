"""Remove the inputs of a merge when its result is whole, also where an earlier run was stopped
before it had removed them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from megaphase.corpus import Manifest
from megaphase.corpus.manifest import MANIFEST_SUFFIX, FileRecord, Suffix, corpus_file
from megaphase.data_tools.corpora.merge import merge, remove_files
from megaphase.data_tools.shards import existing_shards
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json, real_path
from megaphase.utils.json_models import read_record, write_record


def merge_and_remove(
    prefixes: Sequence[Path] | None,
    out: Path,
    *,
    drop_duplicates: bool = False,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Merge corpora, see `merge`, and remove them when the result is whole; where a killed run of
    the same job had come so far, only the removal is left to do.

    prefixes: None: all shards of `out`.
    """
    names = None if prefixes is None else [str(real_path(prefix)) for prefix in prefixes]
    job = hash_json({"inputs": names, "dedup": drop_duplicates, "shuffle": shuffle_seed})
    # Of a removal that was stopped, a part of the shards may be left, or none.
    shards = existing_shards(out, may_be_none=True) if prefixes is None else []
    merged = merged_before(job, out, shards)
    if merged is not None:
        return merged
    return merge_for_job(
        job,
        existing_shards(out) if prefixes is None else prefixes,
        out,
        drop_duplicates=drop_duplicates,
        shuffle_seed=shuffle_seed,
        overwrite=overwrite,
        console=console,
    )


def merged_before(job: str, out: Path, shards: Sequence[Path] = ()) -> Manifest | None:
    """Return the manifest of `out` if a run of the same job had merged it and was stopped in the
    removal of its inputs, which is then completed; else None.

    shards: corpora that must have been among the inputs.
    """
    due = DueRemoval.found(job, shards, out)
    if due is None:
        return None
    due.carry_out(out)
    return Manifest.read(out)


def merge_for_job(
    job: str,
    inputs: Sequence[Path],
    out: Path,
    *,
    drop_duplicates: bool,
    shuffle_seed: int | None,
    overwrite: bool,
    console: Console | None,
) -> Manifest:
    """Merge corpora, see `merge`, and remove those that nobody replaced meanwhile.

    job: by which `merged_before` will know the result.
    """
    removed = [prefix for prefix in map(real_path, inputs) if prefix != real_path(out)]
    # Read now, so that none is removed that takes an input's place meanwhile.
    files = {str(prefix): Manifest.read(prefix).files for prefix in removed}
    manifest = merge(
        inputs,
        out,
        drop_duplicates=drop_duplicates,
        shuffle_seed=shuffle_seed,
        overwrite=overwrite,
        before_publishing=lambda result: DueRemoval(
            job=job, result=_digest(result), inputs=files
        ).write(out),
        console=console,
    )
    merged_before(job, out)
    return manifest


class DueRemoval(BaseModel):
    """`.NAME.removal.json` beside the result of a merge: what is to be removed when it is whole.

    It is written before the result gets its name, and removed after the inputs.

    Attributes:
        job: digest of the merge's arguments.
        result: digest of the result's manifest; this record means nothing next to another corpus.
        inputs: the files of the corpora to be removed, by absolute prefix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    result: str
    inputs: dict[str, dict[Suffix, FileRecord]]

    @classmethod
    def found(cls, job: str, shards: Sequence[Path], out: Path) -> Self | None:
        """Return the record that a run of the same job left beside its result `out`, or None.

        None, too, if an input was replaced meanwhile, or if one of the `shards` that are there was
        not among the inputs.
        """
        if not _place(out).is_file():
            return None
        try:
            record = read_record(_place(out), cls, "")
            result = Manifest.read(out)
        except InputError:
            return None  # the merge was stopped before the result was whole
        same = record.job == job and record.result == _digest(result)
        known = all(str(real_path(shard)) in record.inputs for shard in shards)
        return record if same and known and record._inputs_are_the_same() else None

    def _inputs_are_the_same(self) -> bool:
        """Whether those inputs that still have a manifest are those that were merged."""
        return all(
            Manifest.read(prefix).files == files
            for prefix, files in self.inputs.items()
            if corpus_file(prefix, MANIFEST_SUFFIX).exists()
        )

    def write(self, out: Path) -> None:
        """Store the record beside the merge's result."""
        write_record(_place(out), self)

    def carry_out(self, out: Path) -> None:
        """Remove the inputs, and then the record."""
        for prefix, files in self.inputs.items():
            remove_files(Path(prefix), files)
        _place(out).unlink(missing_ok=True)


def _place(out: Path) -> Path:
    return out.with_name(f".{out.name}.removal.json")


def _digest(manifest: Manifest) -> str:
    return hash_json(manifest.model_dump(mode="json"))
