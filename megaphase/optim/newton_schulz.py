"""The nearest semi-orthogonal matrix, roughly, by Newton–Schulz iterations (Jordan et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

# Chosen by Jordan for a steep slope at zero: singular values end between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


def orthogonalized(matrix: Tensor, iterations: int) -> Tensor:
    """Return U Vᵀ of the singular-value decomposition U S Vᵀ, roughly; 0 for 0.

    matrix: [rows, columns], of any floating type, in which it computes.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(iterations):
        square = x @ x.mT
        polynomial = torch.addmm(square, square, square, beta=_B, alpha=_C)
        x = torch.addmm(x, polynomial, x, beta=_A)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def flops(rows: int, columns: int, iterations: int) -> int:
    """Return the floating-point operations of `orthogonalized`."""
    short, long = sorted((rows, columns))
    return iterations * (4 * short * short * long + 2 * short**3)
