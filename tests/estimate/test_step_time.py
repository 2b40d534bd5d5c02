"""The estimate of a step's time, compared with manual calculations and general properties."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaphase.distributed.costs import Work
from megaphase.estimate.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    Ring,
    Traffic,
    data_ring,
    data_traffic,
    tensor_backward,
    tensor_forward,
    tensor_ring,
)
from megaphase.estimate.flops import backward_work, forward_work, recomputed_work
from megaphase.estimate.hardware import Hardware
from megaphase.estimate.setup import Setup
from megaphase.estimate.step_time import PARTS, step_time
from megaphase.model.parameters import parameter_count, parameter_sizes, train_flops_per_token
from megaphase.model.shape import GPTShape

REPOSITORY = Path(__file__).resolve().parents[2]
H100 = Hardware("H100", False, 1000e12, 0.5, 3000e9, 8, 450e9, 50e9)
SLOW = replace(H100, peak_flops=1.0)  # everything that can be hidden is
FAST = replace(H100, peak_flops=1e30)  # nothing is hidden
SMALL = GPTShape(vocab=97, seq_len=16, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
# Two ranks share the model; 2 samples of 16 tokens at a time.
PAIR = Setup(SMALL, 2, 4, 1, False, True, micro=2, accumulation=3, overlap=False)
IN_TURN = replace(PAIR, overlap=True)
GPT_13B = GPTShape(
    vocab=64_000, seq_len=4096, layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13696
)
BIG = Setup(GPT_13B, 4, 16, 3, True, True, micro=1, accumulation=16)


def test_products_are_those_of_the_layers():
    # Each rank has, of a block, 16 + 8 + 8 rows of 32 for heads, 16 columns of 32 behind them, 48
    # rows of 32 and 24 columns of 32 in the feed-forward layer; of the head 49 rows.
    block, head = 32 * 32 + 16 * 32 + 48 * 32 + 24 * 32, 49 * 32
    forward, backward = forward_work(PAIR), backward_work(PAIR)
    assert forward.matrices == 2 * 32 * (2 * block + head)
    assert backward.matrices == 2 * forward.matrices


def test_windows_leave_out_the_keys_before_them():
    """Token i of 16 attends to min(i + 1, 4) keys; counted with half a diagonal, as without one."""
    sliding = replace(PAIR, shape=replace(SMALL, sliding_window=4))
    share = (4 * 16 - 4 * 4 / 2) / (16 * 16 / 2)
    assert forward_work(sliding).attention == forward_work(PAIR).attention * share
    assert backward_work(sliding).attention == backward_work(PAIR).attention * share
    every_second = replace(sliding.shape, attention_pattern=("sliding", "full"))
    half = replace(PAIR, shape=every_second)
    assert forward_work(half).attention == forward_work(PAIR).attention * (1 + share) / 2
    assert train_flops_per_token(SMALL) - train_flops_per_token(every_second) == 3 * 4 * 32 * 12
    # A mask leaves nothing out.
    assert forward_work(replace(sliding, bf16=False)).attention == 2 * forward_work(PAIR).attention


def test_attention_computes_half_of_the_square_forward_and_five_products_backward():
    # 2 samples, 2 heads of this rank, 8 wide: scores, and their product with the values.
    square = 2 * 2 * (2 * 16 * 16 * 8) * 2
    assert forward_work(PAIR).attention == 2 * square / 2
    assert backward_work(PAIR).attention == 2.5 * forward_work(PAIR).attention
    # Documents are taken one by one, and up to the whole row each; elsewhere they are masked.
    apart = replace(PAIR, masked=True)
    assert forward_work(apart).attention == 2 * square / 2
    assert forward_work(replace(apart, bf16=False)).attention == 2 * square


def test_bytes_past_memory():
    stream = 32 * 32 * 2
    heads, up, down = (32 * width * 2 for width in (16 + 8 + 8, 48, 24))
    block = 2 * 4 * stream + 2 * heads + up + down
    assert forward_work(PAIR).elementwise == 2 * block + 4 * stream
    back = 2 * 4 * stream + 2 * heads + 2 * up + down
    loss = 4 * (32 * 49 * 2)
    gradients = sum(parameter_sizes(SMALL, 2).values()) * (2 + 8)
    assert backward_work(PAIR).elementwise == 2 * back + 4 * stream + loss + gradients
    # The gradients of two halves: of 32 rows of 32, 16 columns, 48 rows and 24 columns.
    summed = 3 * 2 * 2 * (32 * 32 + 16 * 32 + 48 * 32 + 24 * 32)
    assert backward_work(IN_TURN).elementwise == backward_work(PAIR).elementwise + summed


def checkpointed(mode: str) -> Setup:
    return replace(PAIR, shape=replace(SMALL, activation_checkpointing=mode))


def test_selective_recomputation_is_of_norms_and_activation_functions():
    again = recomputed_work(checkpointed("selective"))
    assert (again.matrices, again.attention) == (0, 0)
    assert again.elementwise == 2 * 2 * (32 * 32 * 2) + 32 * (48 + 24) * 2
    assert recomputed_work(PAIR) == Work()


def test_full_recomputation_is_a_forward_pass_of_the_blocks():
    full = checkpointed("full")
    assert backward_work(full).matrices - backward_work(PAIR).matrices == (
        forward_work(PAIR).matrices - 2 * 32 * 49 * 32
    )


def test_the_products_of_all_ranks_are_the_model_flops():
    every = forward_work(BIG) + backward_work(BIG)
    model = BIG.tokens * (train_flops_per_token(GPT_13B) - 12 * 40 * 5120 * 4096)
    assert every.matrices * BIG.tensor == model


def test_a_ring_within_a_node():
    found = Ring(4, 4, H100).collective(ALL_REDUCE, 1e9)
    assert found.sent == 2 * 3 / 4 * 1e9
    assert found.seconds == pytest.approx(8.4e-6 + 6 * 3.4e-6 + 1.5e9 / (0.8 * 450e9))
    assert Ring(1, 1, H100).collective(ALL_REDUCE, 1e9) == Traffic()


def test_a_ring_across_nodes_shares_the_links_of_its_ranks():
    all_of_two = Ring(16, 8, H100)
    found = all_of_two.collective(ALL_GATHER, 16e9)
    assert found.sent == 15e9
    assert found.seconds == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15e9 / (0.8 * 400e9))
    assert Ring(16, 4, H100).bandwidth == 0.8 * 200e9
    assert Ring(16, 1, H100).bandwidth == 0.8 * 50e9


@pytest.mark.parametrize(
    ("tensor", "data", "of_tensor", "of_data"),
    [
        (1, 4, (1, 1), (4, 4)),
        (2, 32, (2, 2), (32, 4)),
        (8, 8, (8, 8), (8, 1)),
        (16, 4, (16, 8), (4, 1)),
    ],
)
def test_tensor_parallel_ranks_are_neighbours(tensor, data, of_tensor, of_data):
    setup = replace(BIG, tensor=tensor, data=data)
    ring = tensor_ring(setup, H100)
    assert (ring.size, ring.in_node) == of_tensor
    ring = data_ring(setup, H100)
    assert (ring.size, ring.in_node) == of_data


def test_tensor_parallel_volume():
    whole = 32 * 32 * 2  # bytes of one tensor of the residual stream
    loss = (1 + 2) * 32 * 4
    # Of 2 ranks an all-reduce sends each byte once: two a block and the embedding; then the head.
    assert tensor_forward(PAIR, H100).sent == (2 * 2 + 1) * whole + loss
    assert tensor_backward(PAIR, H100).sent == (2 * 2 + 1) * whole
    # A half for each all-gather and reduce-scatter, and backward two more a block.
    along = replace(PAIR, sequence=True)
    norms = 5 * 32 * 2
    assert tensor_forward(along, H100).sent == (4 * 2 + 2) * whole / 2 + loss
    assert tensor_backward(along, H100).sent == (6 * 2 + 2) * whole / 2 + norms
    assert tensor_backward(replace(PAIR, tensor=1), H100) == Traffic()


def test_backward_collectives_hide_behind_the_products_of_their_layer():
    hidden, plain = (tensor_backward(PAIR, each).seconds for each in (SLOW, FAST))
    reduced = tensor_ring(PAIR, H100).collective(ALL_REDUCE, 32 * 32 * 2).seconds
    assert hidden == pytest.approx(reduced)  # that of the head
    assert plain == pytest.approx(reduced * 5)


@pytest.mark.parametrize("sequence", [False, True])
def test_halves_hide_all_but_what_is_sent_at_the_edges_of_a_block(sequence):
    setup, ring = replace(IN_TURN, sequence=sequence), tensor_ring(PAIR, H100)
    whole, rounds = 32 * 32 * 2, REDUCE_SCATTER if sequence else ALL_REDUCE
    gathered = [ring.collective(ALL_GATHER, size).seconds for size in (whole, whole / 2)]
    summed = [ring.collective(rounds, size).seconds for size in (whole, whole / 2)]
    losses = sum(ring.collective(ALL_REDUCE, n * 32 * 4).seconds for n in (1, 2))
    if not sequence:
        gathered = [0, 0]
    outside = summed[0] + gathered[0] + losses  # embedding, head
    hidden, plain = (tensor_forward(setup, each).seconds for each in (SLOW, FAST))
    assert hidden == pytest.approx(2 * (gathered[1] + summed[1]) + outside)
    assert plain == pytest.approx(8 * (gathered[1] + summed[1]) + outside)
    assert (
        tensor_forward(setup, H100).sent == tensor_forward(replace(setup, overlap=False), H100).sent
    )


def test_a_single_sample_has_no_halves():
    single = replace(IN_TURN, micro=1)
    assert tensor_forward(single, SLOW) == tensor_forward(replace(single, overlap=False), SLOW)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_zero_s_volume(accumulation):
    setup = Setup(GPT_13B, 1, 8, 0, False, True, micro=1, accumulation=accumulation)
    share = 7 / 8 * parameter_count(GPT_13B)
    expected = {0: 8, 1: 6, 2: 4 * accumulation + 2}
    for zero, each in expected.items():
        assert sent_by(replace(setup, zero=zero)) == pytest.approx(share * each), zero


def sent_by(setup: Setup) -> float:
    """Return the bytes that data-parallel ranks send in a step."""
    traffic = data_traffic(setup, H100)
    return ((traffic.forward + traffic.backward) * setup.accumulation + traffic.end).sent


@pytest.mark.parametrize("accumulation", [1, 4])
def test_zero_3_gathers_once_what_it_keeps_and_what_is_near_the_loss(accumulation):
    setup = Setup(GPT_13B, 1, 8, 3, False, True, micro=1, accumulation=accumulation)
    every, norms = parameter_count(GPT_13B), 81 * 5120
    # The embedding of 64,000 rows and blocks of 4 * 5120 ** 2 + 3 * 5120 * 13696 elements.
    rows, block = 64_000 * 5120, 4 * 5120**2 + 3 * 5120 * 13696
    # Embedding, head and three blocks, because two blocks and the head are below a billion.
    near = 2 * rows + 3 * block
    gathered = norms + accumulation * (2 * (every - norms) - near)
    assert sent_by(setup) == pytest.approx(7 / 8 * 2 * (gathered + accumulation * every))
    kept = every + accumulation * every
    assert sent_by(replace(setup, keep_gathered=1.0)) == pytest.approx(7 / 8 * 2 * kept)
    half = norms + rows + (every // 2 - norms - rows) // block * block
    gathered = half + accumulation * (2 * (every - half) - (near - rows))
    assert sent_by(replace(setup, keep_gathered=0.5)) == pytest.approx(
        7 / 8 * 2 * (gathered + accumulation * every)
    )


def test_what_is_sent_along_is_waited_for_where_it_takes_longer():
    assert Traffic(5, 3.0).behind(2.0) == Traffic(5, 1.0)
    assert Traffic(5, 3.0).behind(4.0) == Traffic(5, 0.0)
    assert Traffic(5, 3.0).behind(4.0, pieces=6) == Traffic(5, 0.5)


def test_a_step_is_the_sum_of_its_parts():
    found = step_time(PAIR, H100)
    work = (forward_work(PAIR) + backward_work(PAIR)) * 3
    assert tuple(found.seconds_by) == PARTS
    assert found.seconds_by["matrices"] == pytest.approx(work.matrices / 500e12)
    assert found.seconds_by["attention"] == pytest.approx(work.attention / 350e12)
    assert found.seconds_by["elementwise"] == pytest.approx(work.elementwise / 2700e9)
    both = tensor_forward(PAIR, H100) + tensor_backward(PAIR, H100)
    assert found.seconds_by["tensor"] == pytest.approx(3 * both.seconds)
    assert found.seconds_by["data"] == pytest.approx(data_traffic(PAIR, H100).end.seconds)
    own = sum(parameter_sizes(SMALL, 2).values()) / 4
    assert found.seconds_by["optimizer"] == pytest.approx(own * 42 / 2700e9)
    assert found.tokens == 2 * 3 * 4 * 16
    flops = found.tokens * train_flops_per_token(SMALL)
    assert found.mfu == pytest.approx(flops / found.seconds / (8 * 1000e12))


setups = st.builds(
    Setup,
    shape=st.sampled_from(
        [GPT_13B, replace(GPT_13B, activation_checkpointing="full"), replace(GPT_13B, layers=1)]
    ),
    tensor=st.sampled_from([2, 4]),
    data=st.sampled_from([1, 4, 32]),
    zero=st.sampled_from([0, 1, 2, 3]),
    sequence=st.booleans(),
    bf16=st.booleans(),
    micro=st.sampled_from([2, 4]),
    accumulation=st.sampled_from([2, 8]),
    masked=st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(setups)
def test_of_any_layout(setup):
    here = step_time(setup, H100)
    assert min(here.seconds_by.values()) >= 0
    assert 0 < here.mfu < H100.efficiency + 0.1  # causal attention does half of what is counted
    wider = step_time(replace(setup, tensor=2 * setup.tensor, data=setup.data), H100)
    assert wider.sent_by["tensor"] > here.sent_by["tensor"]
    assert wider.sent_by["data"] < here.sent_by["data"] or setup.data == 1
    for slower in (
        replace(H100, network=H100.network / 2),
        replace(H100, node_link=H100.node_link / 2),
        replace(H100, efficiency=H100.efficiency / 2),
        replace(H100, memory_bandwidth=H100.memory_bandwidth / 2),
        replace(H100, gpus_per_node=4),
    ):
        assert step_time(setup, slower).seconds >= here.seconds * (1 - 1e-9)
    if setup.zero >= 2:
        larger = step_time(setup.with_micro(2 * setup.micro), H100)
        assert larger.sent_by["data"] <= here.sent_by["data"]


@pytest.fixture
def scaling(monkeypatch):
    """benchmarks/scaling.py, which makes the tables of docs/scaling.md."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("scaling")


def test_the_tables_of_the_page_are_what_the_code_gives(scaling):
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    assert scaling.with_tables(page) == page, "python benchmarks/scaling.py --write docs/scaling.md"


def test_the_run_files_of_the_page_fit_their_gpus(scaling):
    for name in scaling.RUNS:
        setup, _ = scaling.run_setup(name)
        assert scaling.fits(setup, scaling.CARD.memory_gb)
