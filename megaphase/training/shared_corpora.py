"""The corpora of a run with several processes, each file of which is read by one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megaphase.config.run import RunConfig
from megaphase.corpus import Corpus
from megaphase.corpus.integrity import check_files
from megaphase.corpus.manifest import MANIFEST_SUFFIX, Manifest, corpus_file
from megaphase.distributed.all_ranks import gather_from_all_ranks, on_first_rank, run_on_all_ranks
from megaphase.distributed.dist_env import global_rank, local_rank, share_of_node, world_size
from megaphase.plan.spec import open_corpora
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_json


def open_verified_corpora(config: RunConfig) -> dict[Path, Corpus]:
    """Open the corpora of all tasks, by prefix, and compare their files with the manifests, see
    `megaphase.corpus.integrity`; called by all ranks.

    Rank 0 reads manifests and headers. The other files that are compared are divided among all
    ranks if all nodes have the same ones on a shared file system, otherwise among the ranks of each
    node.

    Raises:
        InputError: a corpus is missing, or one of its files was altered; on every rank.
    """
    own: dict[Path, Corpus] = {}

    def open_on_first_rank() -> dict[Path, Manifest]:
        own.update(open_corpora(config))
        return {prefix: corpus.manifest for prefix, corpus in own.items()}

    manifests = on_first_rank(open_on_first_rank)
    shared = _all_nodes_have_the_same(manifests)
    share = (global_rank(), world_size()) if shared else share_of_node()

    def open_and_compare() -> dict[Path, Corpus]:
        corpora = own
        if not corpora:
            checked = shared or local_rank() > 0
            corpora = {
                prefix: Corpus.of_checked(prefix, manifest) if checked else _same(prefix, manifest)
                for prefix, manifest in manifests.items()
            }
        check_files(list(corpora.values()), *share)
        return corpora

    # No process uses a file in which another one has found a fault.
    return run_on_all_ranks(open_and_compare)


def _same(prefix: Path, manifest: Manifest) -> Corpus:
    """Open the corpus that this node has, which must be that of rank 0."""
    corpus = Corpus.open(prefix)
    if corpus.manifest != manifest:
        raise InputError(
            corpus_file(prefix, MANIFEST_SUFFIX),
            f"is another one for rank {global_rank()} than for rank 0",
            "copy the same corpus to every node",
        )
    return corpus


def _all_nodes_have_the_same(manifests: Mapping[Path, Manifest]) -> bool:
    """Return whether the files of corpora are the very same for the first rank of every node: with
    equal sizes, inode numbers, and times of their last change, which no copy keeps."""
    mine = None
    if local_rank() == 0:
        try:
            files = [
                corpus_file(prefix, suffix).stat()
                for prefix, manifest in manifests.items()
                for suffix in (MANIFEST_SUFFIX, *manifest.files)
            ]
            mine = hash_json([[each.st_size, each.st_ino, each.st_ctime_ns] for each in files])
        except OSError:
            mine = f"rank {global_rank()} lacks one"
    return len({found for found in gather_from_all_ranks(mine) if found is not None}) == 1
