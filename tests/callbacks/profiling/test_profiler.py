"""`megaphase train --profile`: interval arithmetic, made-up GPU traces, and real runs over gloo."""

import gzip
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import warm_commands
from callback_support import step_record
from distributed import check, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_support import (
    make_corpora,
    megaphase,
    read_rows,
    run_settings,
    timeless,
    write_run_file,
)

from megaphase.callbacks.profiling.intervals import clipped, exclusive_lengths, merged, spans
from megaphase.callbacks.profiling.kinds import (
    Kind,
    kind_of_kernel,
    kind_of_operator,
    matmul_flops,
    short_name,
)
from megaphase.callbacks.profiling.printing import profile_text
from megaphase.callbacks.profiling.profiler import Profiler
from megaphase.callbacks.profiling.summary import summarize, top_kernels
from megaphase.callbacks.profiling.trace import read_trace
from megaphase.callbacks.throughput import ThroughputReference
from megaphase.utils.errors import InputError, RunError

TICKS = 40
SPANS = st.lists(
    st.tuples(st.integers(0, TICKS - 1), st.integers(0, 9)).map(
        lambda pair: (pair[0], min(TICKS, pair[0] + pair[1]))
    ),
    max_size=8,
)
MILLION = 1e6


def ticks(pairs):
    """Return the ticks that the spans cover, computed slowly."""
    covered = np.zeros(TICKS, bool)
    for start, end in pairs:
        covered[int(start) : int(end)] = True
    return covered


@settings(deadline=None)
@given(SPANS)
def test_merged_spans_cover_the_same_ticks_and_are_apart(pairs):
    found = merged(spans(pairs))
    assert (ticks(found) == ticks(pairs)).all()
    assert (found[1:, 0] > found[:-1, 1]).all()


@settings(deadline=None)
@given(st.lists(SPANS, max_size=4), SPANS)
def test_each_layer_gets_what_none_before_it_covers(layers, windows):
    windows = merged(spans(windows))
    found = exclusive_lengths([clipped(spans(layer), windows) for layer in layers])
    taken, expected = ~ticks(windows), []
    for layer in layers:
        expected.append((ticks(layer) & ~taken).sum())
        taken |= ticks(layer)
    assert found == expected


def event(category, name, start, duration, tid=1, **args):
    return {
        "ph": "X", "cat": category, "name": name, "pid": 7, "tid": tid, "ts": 5e9 + start,
        "dur": duration, "args": args,
    }  # fmt: skip


def launched(number, at, name, start, duration, *, stream=7, category="kernel"):
    """Return a kernel and the call that launched it."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", at, 2, correlation=number),
        event(category, name, start, duration, tid=stream, correlation=number, stream=stream),
    ]


def gpu_events():
    """Return a step of 1,000 µs, as torch writes it for CUDA, with kernels before and after it."""
    return [
        {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "args": {"name": "python"}},
        event("user_annotation", "ProfilerStep#2", 0, 1100),
        event("user_annotation", "training step 3", 50, 1000),
        *launched(1, 10, "an earlier kernel", 20, 25),
        event("cpu_op", "aten::linear", 60, 30),
        event("cpu_op", "aten::mm", 62, 25, **{"Input Dims": [[8, 16], [16, 32]]}),
        *launched(2, 70, "nvjet_tst_128x256", 100, 200),
        *launched(3, 80, "an unknown part of a product", 300, 50),
        event("cpu_op", "aten::scaled_dot_product_attention", 100, 20),
        *launched(4, 105, "void pytorch_flash::flash_fwd_kernel<T>(T)", 320, 80),
        # From 350 on beside the matrix product and attention, to 450 alone, then beside a copy.
        *launched(5, 130, "ncclDevKernel_AllReduce_Sum_bf16", 350, 200, stream=20),
        *launched(6, 140, "Memcpy HtoD", 450, 50, category="gpu_memcpy", stream=21),
        event("user_annotation", "Optimizer.step#FusedAdam.step", 600, 300),
        *launched(7, 610, "void multi_tensor_apply_kernel<M>(int)", 700, 100),
        event("gpu_user_annotation", "Optimizer.step#FusedAdam.step", 700, 100, tid=7),
        *launched(8, 950, "void at::native::elementwise_kernel<2>(int)", 960, 40),
        *launched(9, 1090, "a later kernel", 1095, 5),
    ]


def rank_profile(events, waits=(0.0005,), *, rank=0, peak=None):
    return summarize(
        read_trace(events), waits, rank=rank, file="trace", model_flops=16384, peak_flops=peak
    )


def test_a_gpu_trace_is_shared_out():
    profile = rank_profile(gpu_events(), peak=1e9)
    found = {name: round(MILLION * value, 6) for name, value in asdict(profile.seconds).items()}
    assert found == {
        "matmul": 250,  # both kernels that aten::mm launched: 100 to 350
        "attention": 50,  # 350 to 400
        "optimizer": 300,  # kernels 700 to 800, and the GPU waiting for the host 600 to 900
        "other": 90,  # the copy and the elementwise kernel
        "exposed_communication": 100,  # 400 to 450 and 500 to 550
        "hidden_communication": 100,  # 350 to 400 and 450 to 500
        "idle": 210,  # 50 to 100, 550 to 600, 900 to 960, 1000 to 1050
        "data_wait": 500,
    }
    assert profile.on_gpu
    assert profile.seconds.step == pytest.approx(1500e-6)
    assert profile.floor.matmul_flops == 2 * 8 * 16 * 32
    assert profile.floor.matmul_flops_per_second == pytest.approx(8192 / 250e-6)
    assert profile.floor.seconds == pytest.approx(500e-6)
    assert profile.floor.mfu == pytest.approx(16384 / 1500e-6 / 1e9)
    names = [kernel.name for kernel in profile.kernels]
    assert names[:2] == ["nvjet_tst_128x256", "ncclDevKernel_AllReduce_Sum_bf16"]
    assert len(names) == 7
    assert profile.kernels[0].share == pytest.approx(200 / 1500)


def test_two_steps_give_a_mean_step():
    events = gpu_events()
    second = [{**each, "ts": each["ts"] + 2000} for each in gpu_events() if each["ph"] == "X"]
    for each in second:
        each["args"] = {**each["args"], "correlation": 100 + each["args"].get("correlation", 0)}
    both = rank_profile(events + second, waits=(0.0005, 0.0005))
    one = rank_profile(gpu_events())
    assert asdict(both.seconds) == pytest.approx(asdict(one.seconds))
    assert [kernel.calls for kernel in both.kernels] == [1.0] * 7


def cpu_events():
    """Return a step of 100 µs on the CPU: nested operators, and collectives in gloo's threads."""
    return [
        event("user_annotation", "training step 9", 0, 100),
        event("cpu_op", "aten::linear", 0, 30),
        event("cpu_op", "aten::t", 2, 3),
        event("cpu_op", "aten::addmm", 8, 20, **{"Input Dims": [[4], [2, 3], [3, 4], [], []]}),
        event("cpu_op", "aten::copy_", 10, 5),  # a part of the product
        event("cpu_op", "c10d::allreduce_", 40, 20),  # waits for the one below
        event("user_annotation", "gloo:all_reduce", 42, 13, tid=3),
        event("cpu_op", "aten::copy_", 45, 5, tid=3),  # not one of the step's kernels
        event("cpu_op", "c10d::_allgather_base_", 60, 2),  # overlaps with computation
        event("user_annotation", "gloo:all_gather", 61, 29, tid=3),
        event("user_annotation", "gloo:all_gather", 62, 33, tid=3),
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 65, 15),
        event("cpu_op", "MulBackward0", 66, 13),
        event("cpu_op", "aten::mul", 68, 10),
        event("user_annotation", "Optimizer.step#AdamW.step", 82, 6),
        event("cpu_op", "aten::_fused_adamw_", 83, 4),
    ]


def test_a_cpu_trace_is_shared_out_by_own_time():
    trace = read_trace(cpu_events())
    profile = rank_profile(cpu_events(), waits=(0.0,))
    found = {name: round(MILLION * value, 6) for name, value in asdict(profile.seconds).items()}
    assert found == {
        "matmul": 20,
        "attention": 0,
        "optimizer": 6,
        "other": 20,  # aten::linear's own 7, aten::t's 3, aten::mul's 10
        "exposed_communication": 55 - 16,  # 40 to 95 without aten::mul and the optimizer
        "hidden_communication": 16,
        "idle": 15,
        "data_wait": 0,
    }
    assert not profile.on_gpu
    assert profile.floor.matmul_flops == 2 * 2 * 3 * 4
    own = {kernel.name: round(MILLION * kernel.seconds, 6) for kernel in top_kernels(trace, 1e-4)}
    assert own == {
        "gloo:all_gather": 62, "aten::addmm": 15, "gloo:all_reduce": 13, "aten::mul": 10,
        "aten::linear": 7, "aten::copy_": 5, "aten::_fused_adamw_": 4, "aten::t": 3,
        "Optimizer.step#AdamW.step": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", Kind.MATMUL),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", Kind.ATTENTION),
        ("aten::_cudnn_attention_forward", Kind.ATTENTION),
        ("Optimizer.step#AdamW.step", Kind.OPTIMIZER),
        ("c10d::allreduce_", Kind.COMMUNICATION),
        ("megaphase::anything", Kind.OTHER),
        ("## Call CompiledFxGraph fz72 ##", Kind.OTHER),
        ("MmBackward0", None),
        ("autograd::engine::evaluate_function: MmBackward0", None),
    ],
)
def test_operators_are_told_by_their_names(name, kind):
    assert kind_of_operator(name) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", Kind.MATMUL),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", Kind.MATMUL),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(P)", Kind.MATMUL),
        ("triton_tem_fused_mm_3", Kind.MATMUL),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", Kind.ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", Kind.ATTENTION),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", Kind.COMMUNICATION),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>()", Kind.OPTIMIZER),
        ("triton_poi_fused_mul_silu_0", Kind.OTHER),
        ("triton_red_fused__scaled_dot_product_flash_attention_mm_1", Kind.OTHER),
    ],
)
def test_kernels_are_told_by_their_names(name, kind):
    assert kind_of_kernel(name) is kind


def test_flops_of_matrix_products():
    assert matmul_flops("aten::bmm", [[5, 2, 3], [5, 3, 4]]) == 2 * 5 * 2 * 3 * 4
    assert matmul_flops("aten::baddbmm", [[4], [5, 2, 3], [5, 3, 4], []]) == 2 * 5 * 2 * 3 * 4
    assert matmul_flops("aten::mm", []) == 0
    assert matmul_flops("aten::add", [[2, 3], [3, 4]]) == 0


def test_every_line_fits():
    name = "void at::native::vectorized_elementwise_kernel<4, at::native::Functor<c10::BFloat16>>"
    assert short_name(name + "(int)", 80) == "vectorized_elementwise_kernel<4, Functor<BFloat16>>"
    assert short_name(name, 20) == "vectorized_elementw…"
    events = gpu_events()
    events[6]["name"] = "sm90_xmma_gemm_" * 20
    ranks = [rank_profile(events, peak=1e9), rank_profile(gpu_events(), rank=8)]
    text = profile_text(ranks, range(3, 6), "NVIDIA H100 80GB HBM3", Path("run"))
    assert max(map(len, text.splitlines())) <= 100
    assert "Profile of steps 3 to 5 on rank 0 (NVIDIA H100 80GB HBM3): 1.50 ms a step" in text


class Alone:
    """The control group of a single process."""

    rank, world_size = 0, 1

    def on_first_rank(self, action):
        action()

    def gather(self, fact):
        return [fact]


class Patience:
    """A watchdog that does not bark."""

    def patient(self, where):
        return nullcontext()


def profiler(folder, steps, said):
    return Profiler(
        folder, steps, ThroughputReference((1,), None), Alone(), Patience(), said.append
    )


def profile_step(guard, number):
    guard.on_step_begin(number)
    guard.on_step_end(step_record(number))


def test_a_run_that_ends_early_says_that_there_is_no_profile(tmp_path):
    said = []
    guard = profiler(tmp_path / "profile", 1, said)
    guard.on_run_begin()
    profile_step(guard, 1)
    guard.on_run_end(None)
    assert "no profile" in said[0]


def test_a_run_that_fails_within_a_step_says_nothing_of_its_profile(tmp_path):
    said = []
    guard = profiler(tmp_path / "profile", 1, said)
    guard.on_run_begin()
    guard.on_step_begin(1)
    guard.on_run_end(RunError("a fault"))
    assert said == []


def test_a_profile_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/profile: cannot be created"):
        profiler(tmp_path / "file" / "profile", 1, [])
    folder = tmp_path / "profile"
    guard = profiler(folder, 1, [])
    guard.on_run_begin()
    for number in range(2):
        profile_step(guard, number)
    folder.rmdir()
    with pytest.raises(RunError, match=r"rank-00000\.json\.gz: cannot be"):
        profile_step(guard, 2)
    guard.on_run_end(None)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def small_run(corpora):
    made = run_settings(corpora, parallel={"tensor": 2, "zero": 3}, checkpoint={"every_steps": 100})
    made["phases"][0]["steps"], made["phases"][1]["steps"] = 4, 3
    return made


def train(folder, corpora, *options, **env):
    run_file = write_run_file(folder, small_run(corpora))
    results = launch(megaphase("train", run_file, *options), 2, env=env)
    check(results)
    return results


@pytest.fixture(scope="module")
def profiled(corpora, tmp_path_factory):
    """Make a folder with a profiled run of tensor 2 with ZeRO 3, and its ranks' output.

    Both ranks consider themselves the first of a node, and so write a trace.
    """
    folder = tmp_path_factory.mktemp("profiled")
    return folder, train(folder, corpora, "--profile-steps", 2, LOCAL_RANK="0")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_profiled_run_trains_as_any_other(profiled, corpora, tmp_path):
    result = train(tmp_path, corpora, "--profile-steps", 9)[0]
    assert "nothing is profiled: 7 steps are left, and --profile needs 11" in result.stdout
    assert not (tmp_path / "run" / "profile").exists()
    assert timeless(read_rows(profiled[0] / "run")) == timeless(read_rows(tmp_path / "run"))


@pytest.mark.distributed
def test_the_profile_says_where_the_time_went(profiled):
    folder, results = profiled
    profile = folder / "run" / "profile"
    assert "Profile of steps 3 to 4 on rank 0 (CPU)" in results[0].stdout
    assert "aten::mm" in results[0].stdout
    assert "exposed communication of 2 ranks" in results[0].stdout
    assert not results[0].stderr
    assert not results[1].stdout
    summary = json.loads((profile / "summary.json").read_text())
    assert summary["steps"] == [3, 4]
    assert [rank["trace"] for rank in summary["ranks"]] == [
        "rank-00000.json.gz", "rank-00001.json.gz",
    ]  # fmt: skip
    rows = [row for row in read_rows(folder / "run") if row.get("step") in (3, 4) and "loss" in row]
    waits = [row["data_wait_seconds"] for row in rows]
    assert summary["ranks"][0]["seconds"]["data_wait"] == pytest.approx(sum(waits) / 2)
    for rank in summary["ranks"]:
        times = rank["seconds"]
        assert min(times.values()) >= 0
        assert times["exposed_communication"] > 0
        assert times["matmul"] > 0
        assert times["attention"] > 0
        assert times["optimizer"] > 0
        events = json.loads(gzip.decompress((profile / rank["trace"]).read_bytes()))["traceEvents"]
        assert {each["name"] for each in events if each["name"].startswith("training step")} == {
            "training step 3", "training step 4",
        }  # fmt: skip


@pytest.mark.distributed
def test_a_run_that_goes_on_is_profiled_with_its_matrix_products_counted(profiled):
    """On another layout: one process. The linear layers' products are known from the run file."""
    folder, _ = profiled
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000007")
    out = warm_commands.run_well(
        "train", folder / "run.yaml", "parallel.tensor=1", "parallel.zero=0", "--profile-steps", 1
    )
    assert "Profile of step 7 on rank 0" in out
    profile = folder / "run" / "profile"
    assert [path.name for path in profile.glob("rank-*")] == ["rank-00000.json.gz"]
    summary = json.loads((profile / "summary.json").read_text())
    floor = summary["ranks"][0]["floor"]
    weights = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64) + 500 * 32
    assert floor["matmul_flops"] == 6 * weights * 8 * 32
    assert floor["model_flops"] == floor["matmul_flops"] + 12 * 2 * 32 * 32 * 8 * 32
