"""Warnings of validation losses that are measured on few documents."""

from __future__ import annotations

import numpy as np
from plan_support import phase, random_lengths, spec_of, write_corpus, write_run

from megaphase.plan.held_out_noise import MOST_WARNINGS, held_out_warnings


def warnings(folder, documents, **settings):
    """Return the warnings of a run with a task of as many documents for each number."""
    tasks = {f"task{i}": number for i, number in enumerate(documents)}
    for seed, (name, number) in enumerate(tasks.items()):
        if not (folder / f"{name}.json").exists():
            write_corpus(folder / name, random_lengths(number, 30, seed), seed=seed)
    phases = [phase("only", 2, {"temperature": 1.0})]
    config = write_run(folder, list(tasks), phases=phases, **settings)
    spec = spec_of(config)
    return held_out_warnings(config, spec), spec


def test_few_held_out_documents_are_warned_of_with_a_fraction_that_holds_out_more(tmp_path):
    validation = {"fraction": 0.05, "samples": 10**6}
    [found], spec = warnings(tmp_path, [1000, 4000], validation=validation)
    count = spec.held_out["task0"].documents
    assert 20 < count < 80
    assert spec.held_out["task1"].documents >= 100
    assert found.startswith(f"task0: its validation loss is of only {count} documents (±0.")
    assert found.endswith(
        " nats, the standard error); tasks.task0.held_out: 0.1 would hold out about 100 of 1,000"
    )
    assert warnings(tmp_path, [1000], validation=validation | {"fraction": 0.15})[0] == []


def test_a_large_part_of_a_task_is_never_proposed(tmp_path):
    [found], _ = warnings(tmp_path, [60], validation={"fraction": 0.3, "samples": 1000})
    assert "held_out" not in found
    [found], _ = warnings(tmp_path, [60], validation={"fraction": 0.1, "samples": 1000})
    assert "tasks.task0.held_out: 0.2 would hold out about 12 of 60" in found


def test_where_documents_are_left_more_samples_are_proposed(tmp_path):
    [found], spec = warnings(tmp_path, [2000], validation={"fraction": 0.2, "samples": 10})
    measured = int(found.split(" of only ")[1].split()[0])
    assert measured < spec.held_out["task0"].documents
    asked = -(-10 * 100 // measured)
    assert found.endswith(f"; validation.samples: {asked:,} would measure more")


def test_of_many_tasks_those_with_the_fewest_documents_are_named(tmp_path):
    numbers = np.linspace(100, 40, MOST_WARNINGS + 2, dtype=int).tolist()
    found, _ = warnings(tmp_path, numbers, validation={"fraction": 0.2, "samples": 10**4})
    assert len(found) == MOST_WARNINGS + 1
    assert found[-1].startswith("the validation losses of 2 more tasks are of fewer than 100 docu")
    counts = [int(each.split(" of only ")[1].split()[0]) for each in found[:-1]]
    assert counts == sorted(counts)


def test_one_document_tells_nothing_of_another(tmp_path):
    [found], _ = warnings(tmp_path, [900], validation={"fraction": 0.2, "samples": 1})
    assert "of only 1 document; how much another one would change the loss is unknown" in found
