"""Matrix products on the CPU against products in fp64, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megaphase.ops.matmul as matmul_module
from megaphase.ops.matmul import linear, matmul


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_module, "prefers_onednn", lambda _: request.param)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 300])
@pytest.mark.parametrize("width", [0, 1, 48])
def test_products_are_those_of_fp64(rows: int, width: int) -> None:
    weight = random(width, 40)
    for a, b in (
        (random(rows, 40), weight.t()),
        (random(rows, width), weight),
        (random(40, rows).t(), weight.t()),
        (random(3, rows, 40), weight.t()),
        (random(rows, 3, 40).transpose(0, 1), weight.t()),
    ):
        product = matmul(a, b)
        assert product.shape == (*a.shape[:-1], b.shape[1])
        torch.testing.assert_close(product, (a.double() @ b.double()).float(), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_has_the_gradients_of_fp64(dtype: torch.dtype) -> None:
    x, weight, grad = random(2, 64, 40).to(dtype), random(48, 40).to(dtype), random(2, 64, 48)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [each.detach().to(dtype).requires_grad_() for each in (x, weight)]
        y = linear(*inputs) if dtype != torch.float64 else inputs[0] @ inputs[1].t()
        return y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))

    tolerance = 2e-5 if dtype == torch.float32 else 0.3  # the spacing of bf16 sums: 0.25
    for found, expected in zip(gradients(dtype), gradients(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("library")
def test_what_is_not_finite_stays_so() -> None:
    a = random(64, 40)
    a[3, 5], a[9, 1] = torch.inf, torch.nan
    finite = matmul(a, random(40, 48)).isfinite().all(1)
    assert (~finite).nonzero().flatten().tolist() == [3, 9]


@pytest.mark.usefixtures("library")
def test_a_second_derivative_is_refused_where_it_would_be_wrong() -> None:
    x, weight = random(64, 40).requires_grad_(), random(48, 40).requires_grad_()
    (first,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    if matmul_module.prefers_onednn(x.device):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    else:
        first.sum().backward()
