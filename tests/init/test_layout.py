"""The layouts that `megaphase init` chooses, and the models that it makes of a size."""

import pytest

from megaphase.estimate.memory import estimate
from megaphase.estimate.step_time import step_time
from megaphase.estimate.suggestions import GB, fits, layouts
from megaphase.init.base_model import count_parameters, named_model, with_length
from megaphase.init.layout import GPUs, find_layout, need_more
from megaphase.utils.errors import InputError

VOCAB = 32_000


@pytest.mark.parametrize(
    ("size", "card", "count", "per_node"),
    [
        ("gpt-14m", "l4", 1, 1),
        ("gpt-350m", "a100-40gb", 6, 6),
        ("1.3b", "h100-sxm", 16, 8),
        ("gpt-13b", "a100-80gb", 32, 8),
        ("30b", "h100-sxm", 64, 8),
        ("70b", "h200-sxm", 24, 8),
    ],
)
def test_a_layout_fits_and_is_about_the_quickest(size, card, count, per_node):
    gpus = GPUs(card, count, per_node)
    shape = with_length(named_model(size, VOCAB).shape, 2048)
    found = find_layout(shape, gpus, 16 * count, masked=False)
    setup = found.setup
    assert fits(setup, gpus.memory_gb)
    assert found.memory == estimate(setup).total
    assert setup.tensor * setup.data == count
    assert setup.samples == 16 * count
    assert per_node % setup.tensor == 0
    # No other grid and stage with the same micro-batch and recomputation is much quicker.
    quickest = min(
        step_time(other, gpus.hardware).seconds
        for other in layouts(setup)
        if fits(other, gpus.memory_gb) and other.zero > 0
    )
    assert found.step_seconds <= 1.1 * quickest


def test_offload_is_the_last_resort():
    shape = with_length(named_model("30b", VOCAB).shape, 2048)
    few = find_layout(shape, GPUs("a100-80gb", 4, 4), 64, masked=False)
    assert few is not None
    assert few.setup.offload == "cpu"
    assert find_layout(shape, GPUs("l4", 1, 1), 64, masked=False) is None
    assert "does not fit 1 × L4" in str(need_more(shape, GPUs("l4", 1, 1), "a model"))


@pytest.mark.parametrize("size", ["300k", "20m", "500m", "1.3e9", "3b", "8b", "70b", "400b"])
def test_a_model_of_a_size(size):
    model = named_model(size, VOCAB)
    number = {"300k": 3e5, "20m": 2e7, "500m": 5e8, "1.3e9": 1.3e9, "3b": 3e9, "8b": 8e9,
              "70b": 7e10, "400b": 4e11}[size]  # fmt: skip
    # The embeddings alone are the least.
    least = 2 * VOCAB * 64
    assert count_parameters(model.shape) == pytest.approx(max(number, least), rel=0.1)
    assert model.shape.hidden % model.shape.heads == 0
    if number >= 1e9:
        assert model.shape.heads % 4 == model.shape.ffn % 8 == 0


def test_a_size_that_no_model_has():
    with pytest.raises(InputError, match=r"^--model 500b: the largest model .* has 38\d billion"):
        named_model("500b", VOCAB)
    assert named_model("400b", VOCAB).note == ""
    small = named_model("300k", VOCAB)
    assert small.note.startswith(f"the model has {small.parameters:,} parameters, not 300k:")


def test_names_of_presets_come_first():
    for name in ("gpt-1.3b", "1.3b", "GPT-1.3B"):
        assert named_model(name, VOCAB).section == {"preset": "gpt-1.3b"}


@pytest.mark.parametrize("answer", ["gpt-2b", "", "big", "1.3q", "1e40", "12", "nan"])
def test_what_is_no_model(answer):
    with pytest.raises(InputError, match="--model"):
        named_model(answer, VOCAB)


def test_memory_is_counted_as_the_plan_counts_it():
    assert GPUs("h100-sxm", 8, 8).memory_gb * GB == 80 * 2**30
