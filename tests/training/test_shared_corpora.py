"""Corpora that another rank has checked are opened without reading them again."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from plan_support import write_three_tasks

from megaphase.corpus import Corpus
from megaphase.plan.spec import open_corpora
from megaphase.training import shared_corpora
from megaphase.training.shared_corpora import open_verified_corpora
from megaphase.utils.errors import InputError
from megaphase.utils.files import with_hash


@pytest.fixture
def config(tmp_path):
    return write_three_tasks(tmp_path)[0]


def as_rank(monkeypatch, rank: int, local_rank: int, manifests: dict, same: bool) -> list[tuple]:
    """Let this process be a rank of 4 on 2 nodes, to which rank 0 sends the manifests; return the
    shares of the files that it compares."""
    shares: list[tuple] = []
    replaced = {
        "on_first_rank": lambda action: manifests,
        "gather_from_all_ranks": lambda mine: [mine or "one", None, "one" if same else "two", None],
        "run_on_all_ranks": lambda action: action(),
        "global_rank": lambda: rank,
        "local_rank": lambda: local_rank,
        "world_size": lambda: 4,
        "share_of_node": lambda: (local_rank, 2),
        "check_files": lambda corpora, *share: shares.append(share),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(shared_corpora, name, function)
    return shares


def manifests_of(config) -> dict:
    return {prefix: corpus.manifest for prefix, corpus in open_corpora(config).items()}


@pytest.mark.parametrize("same", [True, False], ids=["one file system", "a copy on each node"])
def test_corpora_are_those_that_were_checked(config, monkeypatch, same):
    expected = open_corpora(config)
    shares = as_rank(monkeypatch, 3, 1, manifests_of(config), same)
    with monkeypatch.context() as unread:
        unread.setattr(Corpus, "open", lambda prefix: pytest.fail(f"{prefix} is checked again"))
        opened = open_verified_corpora(config)
    assert shares == [(3, 4) if same else (1, 2)]
    assert opened.keys() == expected.keys()
    for prefix, corpus in opened.items():
        for field in fields(Corpus):
            one, other = (getattr(each, field.name) for each in (corpus, expected[prefix]))
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        assert np.array_equal(corpus.sums, expected[prefix].sums)
        assert corpus.fingerprint == expected[prefix].fingerprint


def test_documents_of_several_sequences_are_read(config, monkeypatch):
    """What rank 0 sends does not say where such documents begin."""
    [prefix, *_] = manifests = manifests_of(config)
    record = manifests[prefix].files[".idx"]
    more = record.model_copy(update={"bytes": record.bytes + 12})
    files = manifests[prefix].files | {".idx": more}
    assert isinstance(Corpus.of_checked(prefix, manifests[prefix]), Corpus)
    opened = []
    monkeypatch.setattr(Corpus, "open", opened.append)
    Corpus.of_checked(prefix, manifests[prefix].model_copy(update={"files": files}))
    assert opened == [prefix]


def test_nodes_with_other_corpora_are_refused(config, monkeypatch):
    manifests = manifests_of(config)
    [prefix, *_] = manifests
    path = prefix.with_name(f"{prefix.name}.json")
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "hash"}
    path.write_text(json.dumps(with_hash(content | {"sources": ["another"]})))
    as_rank(monkeypatch, 2, 0, manifests, same=False)
    with pytest.raises(
        InputError, match="is another one for rank 2 than for rank 0; copy the same"
    ):
        open_verified_corpora(config)


def test_files_of_two_nodes_are_the_same_only_if_they_are_no_copies(config, monkeypatch, tmp_path):
    manifests = manifests_of(config)
    found = []
    monkeypatch.setattr(shared_corpora, "gather_from_all_ranks", lambda mine: [*found, mine])
    assert shared_corpora._all_nodes_have_the_same(manifests)
    monkeypatch.setattr(
        shared_corpora, "gather_from_all_ranks", lambda mine: found.append(mine) or [mine]
    )
    shared_corpora._all_nodes_have_the_same(manifests)
    monkeypatch.setattr(shared_corpora, "gather_from_all_ranks", lambda mine: [*found, mine])
    assert shared_corpora._all_nodes_have_the_same(manifests)
    [prefix, *_] = manifests
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").unlink()
    prefix.with_suffix(".bin").write_bytes(content)
    assert not shared_corpora._all_nodes_have_the_same(manifests)
    prefix.with_suffix(".bin").unlink()
    assert not shared_corpora._all_nodes_have_the_same(manifests)
