"""Operations between the matrix products: compiled as eager, saved or recomputed, or by apex."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_support import VOCAB, global_batch, run_config
from plain_gpt import PlainGPT, PlainShape
from rounding import FP32_ROUNDOFF, assert_close
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megaphase.distributed import cross_entropy
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.layer_builder import LayerBuilder
from megaphase.distributed.linear import ColumnParallelLinear
from megaphase.distributed.process_grid import ProcessGrid
from megaphase.distributed.tensor_region import TensorRegion
from megaphase.model.attention_rule import AttentionRule
from megaphase.model.document_mask import (
    DocumentBounds,
    _Masked,
    attend_before,
    attend_within,
    own_document_mask,
)
from megaphase.model.gpt import GPT
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.ops import rms_norm
from megaphase.ops.attention import attention
from megaphase.ops.kernels import EAGER, Kernels
from megaphase.ops.matmul import matmul
from megaphase.optim.optimizer import build_optimizer
from megaphase.training.backends import Backends, choose_backends, precision_warning
from megaphase.utils.errors import InputError

ALONE = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # one process needs no groups
H100_SHARED_MEMORY = 232_448  # bytes for one program
GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}

GEMMA = {
    "activation": "geglu",
    "zero_centered_norms": True,
    "embedding_multiplier": 2.0,
    "logit_softcap": 2.0,
}
XIELU = {"activation": "xielu", "rotary_dim": 4}


def shape_of(**changes: Any) -> GPTShape:
    return replace(build_shape(run_config(), VOCAB), init_std=0.2, **changes)


def build(shape: GPTShape, kernels: Kernels = EAGER) -> GPT:
    return GPT(shape, Initializer(1, torch.float32), ALONE, kernels=kernels)


def gradients(model: GPT) -> dict[str, Tensor]:
    """Return the gradients of the summed losses of a batch, by parameter."""
    batch = global_batch(0)
    model.train().zero_grad()
    total, _ = model(batch.inputs, batch.targets)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, what=name)


def plain_gradients(shape: GPTShape) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in build(shape).named_parameters()}
    kinds = PlainShape(
        shape.layers,
        shape.heads,
        shape.kv_heads,
        geglu=shape.activation == "geglu",
        xielu=shape.activation == "xielu",
        zero_centered=bool(shape.zero_centered_norms),
        multiplier=shape.embedding_multiplier or 1.0,
        softcap=shape.logit_softcap,
        rotary_dim=shape.rotary_dim,
    )
    plain = PlainGPT(weights, kinds)
    batch = global_batch(0)
    plain.losses(batch.inputs, batch.targets).sum().backward()
    return {name: p.grad for name, p in plain.weights.items() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param(GEMMA, marks=pytest.mark.slow), XIELU],
    ids=["llama", "gemma", "xielu"],
)
def test_compiled_kernels_compute_what_plain_torch_does(changes: dict[str, Any]) -> None:
    shape = shape_of(**changes)
    found = gradients(build(shape, Kernels(compiled=True)))
    assert_all_close(found, plain_gradients(shape))


# Formulas for a GPU alone: the same sums in another form.


@pytest.mark.parametrize(
    "formula", [rms_norm._gradients_in_one_pass, rms_norm._gradients_by_halves]
)
@pytest.mark.parametrize("has_residual_gradient", [True, False])
def test_gradients_of_the_norm_in_one_pass_are_the_same(
    formula: Callable[..., tuple[Tensor, Tensor]], has_residual_gradient: bool
) -> None:
    torch.manual_seed(1)
    grad_total, grad, total = (torch.randn(2, 24, 48) for _ in range(3))
    inputs = (grad_total if has_residual_gradient else None, grad, total, torch.rand(2, 24, 1))
    weight = torch.randn(48)
    for_total, for_weight = formula(*inputs, weight)
    expected_total, expected_weight = rms_norm._gradients(*inputs, weight)
    assert torch.equal(for_total, expected_total)
    assert_close(for_weight, expected_weight, what="gradient of the weight")


@pytest.mark.parametrize(
    ("rows", "hidden", "dtype", "formula"),
    [
        (8192, 2048, torch.bfloat16, rms_norm._gradients_in_one_pass),
        (4096, 5120, torch.bfloat16, rms_norm._gradients_in_one_pass),
        (4096, 4096, torch.bfloat16, rms_norm._gradients_by_halves),  # as many rows as columns
        (2048, 2048, torch.bfloat16, rms_norm._gradients),  # each half would have too few rows
        (512, 5120, torch.bfloat16, rms_norm._gradients),  # too few rows
        (8192, 5120, torch.float32, rms_norm._gradients),  # more than the shared memory
        (8192, 4096, torch.float32, rms_norm._gradients_in_one_pass),
        (8192, 12288, torch.bfloat16, rms_norm._gradients),  # more than the registers
    ],
)
def test_the_form_of_the_norms_gradients_follows_their_size(
    rows: int, hidden: int, dtype: torch.dtype, formula: Callable[..., Any]
) -> None:
    total, weight = (
        torch.empty(size, dtype=dtype, device="meta") for size in [(rows, hidden), hidden]
    )
    assert rms_norm.gradients_formula(total, total, weight, H100_SHARED_MEMORY) is formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_loss_by_comparison_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    logits, columns = (3 * torch.randn(64, 100)).to(dtype), torch.randint(100, (64, 1))
    inputs = logits, logits.amax(-1).float(), torch.rand(64, 1), columns, torch.rand(64, 1) > 0.3
    expected = cross_entropy._gradient(*inputs)
    assert torch.equal(cross_entropy._gradient_by_comparison(*inputs), expected)


# Memory saved for the backward pass.


def kept_bytes(shape: GPTShape, monkeypatch: Any) -> int:
    """Return the bytes that autograd saves in addition to weights, every storage once."""
    model, memories = build(shape), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(kept: Any) -> Any:
        if isinstance(kept, Tensor):
            storage = kept.untyped_storage()
            memories[storage.data_ptr()] = storage.nbytes()
        return kept

    def inner(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        return saved_tensors_hooks(lambda tensor: note(pack(tensor)), unpack)

    monkeypatch.setattr("megaphase.ops.recompute.saved_tensors_hooks", inner)
    batch = global_batch(0)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        alive = model.train()(batch.inputs, batch.targets)
    assert alive[0].requires_grad
    return sum(size for memory, size in memories.items() if memory not in weights)


@pytest.mark.parametrize("changes", [{}, GPT2], ids=["llama", "gpt2"])
def test_selective_checkpointing_keeps_less_and_changes_nothing(
    changes: dict[str, Any], monkeypatch: Any
) -> None:
    whole, selective = (
        shape_of(**changes, activation_checkpointing=which) for which in ("none", "selective")
    )
    tokens = global_batch(0).inputs.numel()
    # The input of both projections into a half of a block, and of the one out of its second half.
    spared = tokens * whole.layers * (2 * whole.hidden + whole.ffn) * 4
    assert kept_bytes(whole, monkeypatch) - kept_bytes(selective, monkeypatch) == spared
    found, expected = gradients(build(selective)), gradients(build(whole))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# Products of bf16.


def test_products_of_bf16_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn((64, 64), generator=generator).bfloat16() for _ in range(2))
    exact = a.double() @ b.double()
    # Half a unit of the last of 8 bits, and what summing in fp32, in any order, may add.
    summing = 64 * FP32_ROUNDOFF * (a.double().abs() @ b.double().abs())
    assert ((matmul(a, b).double() - exact).abs() <= exact.abs() * 2**-8 + summing).all()


# Attention computed document by document.


def attend_by_loops(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor, longest: int, __: int,
    *, scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Compute what torch's varlen_attn, which needs a GPU, is documented to compute."""
    assert window_size[1] == 0  # none after
    assert q.shape[-1] % 8 == 0
    assert bounds.dtype == torch.int32
    out = torch.empty_like(q)
    for first, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        assert end - first <= longest
        for here in range(first, end):
            seen = slice(
                first if window_size[0] < 0 else max(first, here - window_size[0]), here + 1
            )
            scores = torch.einsum("hd,thd->ht", q[here], k[seen]) * (scale or q.shape[-1] ** -0.5)
            out[here] = torch.einsum("ht,thd->hd", scores.softmax(-1), v[seen])
    return out


@pytest.mark.parametrize(("kv_heads", "size"), [(1, 8), (4, 8), (2, 12)])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (1, None), (3, None), (3, 0.7)])
def test_documents_one_by_one_attend_as_masked_ones(
    monkeypatch: Any, kv_heads: int, size: int, window: int | None, scale: float | None
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_by_loops)
    monkeypatch.setattr("megaphase.model.document_mask.takes_bounds", lambda *_: True)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((3, 6, heads, size), generator=generator).transpose(1, 2)
        for heads in (4, kv_heads, kv_heads)
    )
    rule = AttentionRule(window, scale)
    expected = _Masked(own_document_mask(documents, window), rule)(q, k, v)
    assert_close(attend_within(documents, q.dtype, None, rule)(q, k, v), expected)
    whole = _Masked(own_document_mask(torch.zeros_like(documents), window), rule)(q, k, v)
    assert_close(attend_before(documents, q.dtype, rule)(q, k, v), whole)
    bounds = DocumentBounds.of(documents)
    first = 0
    for some in bounds.chunk(2):
        rows = slice(first, first + len(some))
        attend = attend_within(documents[rows], q.dtype, some, rule)
        assert_close(attend(q[rows], k[rows], v[rows]), expected[rows])
        first = rows.stop
    assert first == len(documents)


# The choice of the optimizer, and apex, replaced by classes that follow its documentation.


def apex_modules() -> dict[str, ModuleType]:
    norm, optimizers = ModuleType("apex.normalization.fused_layer_norm"), ModuleType("optimizers")
    called: list[str] = []

    def rms(x: Tensor, weight: Tensor, normalized_shape: list[int], eps: float) -> Tensor:
        called.append("rms")
        return F.rms_norm(x, normalized_shape, weight, eps)

    def layer(
        x: Tensor, weight: Tensor, bias: Tensor, normalized_shape: list[int], eps: float
    ) -> Tensor:
        called.append("layer")
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    class FusedAdam(torch.optim.Optimizer):
        """Counts steps in the group; treats a state with any entry as complete."""

        def __init__(
            self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool
        ) -> None:
            assert adam_w_mode
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                (first, second), count = group["betas"], group["step"]
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(p)
                        state["exp_avg_sq"] = torch.zeros_like(p)
                    state["exp_avg"].lerp_(p.grad, 1 - first)
                    state["exp_avg_sq"].lerp_(p.grad**2, 1 - second)
                    root = (state["exp_avg_sq"] / (1 - second**count)).sqrt() + group["eps"]
                    p *= 1 - group["lr"] * group["weight_decay"]
                    p -= group["lr"] * state["exp_avg"] / (1 - first**count) / root

    norm.fused_rms_norm_affine, norm.fused_layer_norm_affine = rms, layer  # type: ignore[attr-defined]
    norm.called, optimizers.FusedAdam = called, FusedAdam  # type: ignore[attr-defined]
    return {
        "apex": ModuleType("apex"),
        "apex.normalization": ModuleType("apex.normalization"),
        "apex.normalization.fused_layer_norm": norm,
        "apex.optimizers": optimizers,
    }


@pytest.fixture
def apex(monkeypatch: Any) -> dict[str, ModuleType]:
    modules = apex_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.mark.parametrize(("changes", "kind"), [({}, "rms"), (GPT2, "layer")])
def test_norms_by_apex(apex: dict[str, ModuleType], changes: dict[str, Any], kind: str) -> None:
    shape = shape_of(**changes)
    found = gradients(build(shape, Kernels(apex_norm=True)))
    called = apex["apex.normalization.fused_layer_norm"].called
    assert called == [kind] * (2 * shape.layers + 1)
    assert_all_close(found, gradients(build(shape)))


def test_apex_has_no_norm_that_multiplies_by_one_plus_weight(apex: dict[str, ModuleType]) -> None:
    shape = shape_of(zero_centered_norms=True)
    found = gradients(build(shape, Kernels(apex_norm=True)))
    assert apex["apex.normalization.fused_layer_norm"].called == []
    expected = gradients(build(shape))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_apex_s_optimizer_steps_and_forgets_as_torch_s(apex: dict[str, ModuleType]) -> None:
    settings = run_config().optimizer
    build = LayerBuilder(Initializer(1, torch.float32), TensorRegion(ALONE, sequence=False))
    models = [ColumnParallelLinear(3, (2,), bias=True, std=0.5, build=build) for _ in range(2)]
    for parameter in models[0].parameters():
        torch.nn.init.uniform_(parameter, 0.1, 0.5)
    models[1].load_state_dict(models[0].state_dict())
    native, reference = (
        build_optimizer(model, settings, name, torch.float32)
        for model, name in zip(models, ("apex", "torch"), strict=True)
    )
    for step in range(6):
        if step == 3:  # a phase begins
            native.state.clear()
            reference.state.clear()
        for model, optimizer in zip(models, (native, reference), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.zero_grad()
            model(torch.full((1, 3), float(step))).square().sum().backward()
            optimizer.step()
        for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert_close(mine, other)
            assert native.state[mine].keys() == reference.state[other].keys()
            assert native.state[mine]["step"] == reference.state[other]["step"] == step % 3 + 1


def test_what_is_there_is_chosen(monkeypatch: Any) -> None:
    eager, compiled = Backends(EAGER, "torch"), Backends(Kernels(compiled=True), "torch")
    assert choose_backends(run_config()) == eager
    assert choose_backends(parts(kernels="compile")) == compiled
    monkeypatch.setattr("megaphase.training.backends.device", lambda: torch.device("cuda"))
    there: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in there or None)
    assert choose_backends(run_config()) == eager
    there |= {"triton", "apex.normalization", "fused_layer_norm_cuda"}
    # Of both, the norms are compiled: apex's do not compute the residual sum.
    assert choose_backends(run_config()) == compiled
    assert choose_backends(parts(norm="apex")).kernels == Kernels(compiled=True, apex_norm=True)
    assert choose_backends(parts(kernels="eager")).kernels == Kernels(apex_norm=True)
    centered = parts()
    model = centered.model.model_copy(update={"zero_centered_norms": True})
    centered = centered.model_copy(update={"model": model})
    assert choose_backends(centered) == compiled
    asked = centered.parts.model_copy(update={"norm": "apex"})
    with pytest.raises(InputError, match=r"parts\.norm: apex needs norms that are not zero"):
        choose_backends(centered.model_copy(update={"parts": asked}))
    there |= {"apex.optimizers", "amp_C"}
    assert choose_backends(parts(kernels="eager", norm="torch")) == Backends(EAGER, "apex")


def test_capped_scores_on_a_gpu_need_a_compiler(monkeypatch: Any) -> None:
    config = run_config()
    capped = config.model_copy(
        update={"model": config.model.model_copy(update={"attention_softcap": 50.0})}
    )
    choose_backends(capped)
    monkeypatch.setattr("megaphase.training.backends.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.attention_softcap: .* which needs Triton"):
        choose_backends(capped)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_without_a_kernel_for_them(kv_heads: int, monkeypatch: Any) -> None:
    """In fp32 on a GPU keys and values are repeated, so that a fused kernel takes them."""
    asked: list[bool] = []
    inner = F.scaled_dot_product_attention

    def noting(*arguments: Any, enable_gqa: bool, **options: Any) -> Tensor:
        asked.append(enable_gqa)
        return inner(*arguments, enable_gqa=enable_gqa, **options)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, kv_heads, kv_heads)
    )
    expected = attention(q, k, v)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    monkeypatch.setattr("megaphase.ops.attention._has_grouped_kernel", lambda q: False)
    assert_close(attention(q, k, v), expected)
    assert asked == [False]


def parts(**asked: str) -> Any:
    config = run_config()
    return config.model_copy(update={"parts": config.parts.model_copy(update=asked)})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"norm": "apex"}, "parts.norm: apex needs a GPU; build NVIDIA apex"),
        ({"optimizer": "apex"}, "parts.optimizer: apex needs a GPU; build NVIDIA apex"),
        ({"kernels": "compile"}, "parts.kernels: compile needs a compiler (none-such"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: Any, asked: dict[str, str], message: str) -> None:
    monkeypatch.setenv("CXX", "none-such")
    with pytest.raises(InputError) as error:
        choose_backends(parts(**asked))
    assert message in str(error.value)


def test_a_run_says_which_kernels_are_not_torchs_own(monkeypatch: Any) -> None:
    compiled = Backends(Kernels(compiled=True, apex_norm=True), "apex")
    assert Backends(EAGER, "torch").describe() == []
    assert compiled.describe() == [
        "kernels compiled during the first step, which takes longer",
        "norms and optimizer by NVIDIA apex",
    ]
    monkeypatch.setattr("megaphase.training.backends.device", lambda: torch.device("cuda"))
    assert Backends(EAGER, "apex").describe() == [
        "kernels not compiled (parts.kernels), which is slower",
        "optimizer by NVIDIA apex",
    ]


def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of(monkeypatch: Any) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("megaphase.training.backends.device", lambda: cpu)
    for widens in (True, False):
        monkeypatch.setattr("megaphase.training.backends.widens_bf16", {cpu: widens}.get)
        said = precision_warning("bf16")
        assert (said is not None and "no instructions for bf16" in said) is widens
        assert precision_warning("fp32") is None
