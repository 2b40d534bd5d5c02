"""A GPT and its training in plain torch, in float64, as a reference for the engine.

Written from the papers, one head and one formula at a time. It shares only the names and shapes of
the parameters with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class PlainShape:
    layers: int
    heads: int
    kv_heads: int
    layernorm: bool = False
    gelu: bool = False
    eps: float = 1e-5
    rotary_base: float = 10_000.0
    geglu: bool = False
    zero_centered: bool = False
    multiplier: float = 1.0
    softcap: float | None = None
    windows: tuple[int | None, ...] = (None,)  # of the blocks, repeated
    window_base: float | None = None  # of the positions where there is a window, if another one
    score_scale: float | None = None  # None: 1 / √size
    score_cap: float | None = None
    erf: bool = False
    xielu: bool = False
    rotary_dim: int | None = None
    parallel: bool = False


class PlainGPT:
    """Weights by name; a missing `positions` means rotary, a missing `head.weight` tied."""

    def __init__(self, weights: dict[str, Tensor], shape: PlainShape) -> None:
        self.weights = {name: each.double().requires_grad_() for name, each in weights.items()}
        self.shape = shape

    def losses(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return nats per token, [batch, seq]; 0 where the target is IGNORED.

        documents: if given, they are computed separately, each as its own row.
        """
        if documents is not None:
            return self._losses_apart(tokens, targets, documents)
        logits = self.logits(tokens)
        real = targets != IGNORED
        chosen = logits.gather(-1, targets.where(real, 0).unsqueeze(-1)).squeeze(-1)
        return torch.where(real, self.log_sums(logits) - chosen, 0.0)

    def log_sums(self, logits: Tensor) -> Tensor:
        """The logarithms of the sums of exponentials, [batch, seq]."""
        return logits.exp().sum(-1).log()

    def _losses_apart(self, tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        rows = []
        for row in range(len(tokens)):
            lengths = documents[row].unique_consecutive(return_counts=True)[1].tolist()
            parts = zip(tokens[row].split(lengths), targets[row].split(lengths), strict=True)
            rows.append(torch.cat([self.losses(t[None], u[None])[0] for t, u in parts]))
        return torch.stack(rows)

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, seq, vocab]"""
        embedding = self.weights["embedding.weight"]
        x = embedding[tokens] * self.shape.multiplier
        if "positions" in self.weights:
            x = x + self.weights["positions"][: tokens.shape[1]]
        x = self.dropped(x, "embedding")
        for layer in range(self.shape.layers):
            attention, mlp = f"blocks.{layer}.attention", f"blocks.{layer}.feed_forward"
            window = self.shape.windows[layer % len(self.shape.windows)]
            added = self._attention(self._norm(x, f"{attention}_norm"), attention, window)
            before, x = x, x + self.dropped(added, attention)
            entering = before if self.shape.parallel else x
            x = x + self.dropped(self._mlp(self._norm(entering, f"{mlp}_norm"), mlp), mlp)
        logits = self._norm(x, "norm") @ self.weights.get("head.weight", embedding).T
        cap = self.shape.softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def dropped(self, x: Tensor, place: str) -> Tensor:
        """Return x, [batch, seq, hidden]; overridden by models with dropout."""
        return x

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if self.shape.layernorm:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.shape.eps).sqrt()
        weight = self.weights[f"{name}.weight"] + (1 if self.shape.zero_centered else 0)
        return x * weight + self.weights.get(f"{name}.bias", 0.0)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _attention(self, x: Tensor, name: str, window: int | None) -> Tensor:
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        size = x.shape[-1] // heads
        parts = self._linear(x, f"{name}.qkv").split(size, dim=-1)
        queries = parts[:heads]
        keys, values = parts[heads : heads + kv_heads], parts[heads + kv_heads :]
        places = torch.arange(x.shape[1])
        distance = places.unsqueeze(1) - places
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        base = self.shape.rotary_base
        if window is not None and self.shape.window_base is not None:
            base = self.shape.window_base
        results = []
        for head, query in enumerate(queries):
            group = head // (heads // kv_heads)
            scores = self._rotate(query, base) @ self._rotate(keys[group], base).transpose(1, 2)
            scores = scores * (self.shape.score_scale or 1 / math.sqrt(size))
            if (cap := self.shape.score_cap) is not None:
                scores = cap * (scores / cap).tanh()
            scores = scores.masked_fill(unseen, -math.inf)
            results.append(scores.softmax(-1) @ values[group])
        return self._linear(torch.cat(results, -1), f"{name}.out")

    def _rotate(self, x: Tensor, base: float) -> Tensor:
        """Rotate [batch, seq, size]: entries i and i + size / 2 are a complex number."""
        if "positions" in self.weights:
            return x
        width = self.shape.rotary_dim or x.shape[-1]
        x, rest = x[..., :width], x[..., width:]
        half = width // 2
        speeds = base ** (-torch.arange(half).double() / half)
        angles = torch.arange(x.shape[1]).double().unsqueeze(1) * speeds
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat([turned.real, turned.imag, rest], -1)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        up = self._linear(x, f"{name}.up")
        if self.shape.xielu:
            return self._linear(self._xielu(up, name), f"{name}.down")
        if self.shape.erf:
            return self._linear(up * (1 + torch.erf(up / math.sqrt(2))) / 2, f"{name}.down")
        if self.shape.gelu:
            return self._linear(_gelu(up), f"{name}.down")
        gate, up = up[..., : up.shape[-1] // 2], up[..., up.shape[-1] // 2 :]
        opened = _gelu(gate) if self.shape.geglu else gate / (1 + (-gate).exp())
        return self._linear(opened * up, f"{name}.down")

    def _xielu(self, x: Tensor, name: str) -> Tensor:
        """Huang and Schlag 2024, section 3.2, with beta 0.5."""
        above, below = (
            (1 + self.weights[f"{name}.xielu.alpha_{sign}"].exp()).log() for sign in ("p", "n")
        )
        exponential = x.clamp(max=0).exp() - 1
        return torch.where(x > 0, above * x**2, (0.5 + below) * (exponential - x)) + 0.5 * x


def _gelu(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + inner.tanh())


class PlainAdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) after clipping by norm."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.weights = weights
        self.betas, self.eps, self.decay, self.clip = betas, eps, decay, clip
        self.steps = 0
        self.first = {name: torch.zeros_like(each) for name, each in weights.items()}
        self.second = {name: torch.zeros_like(each) for name, each in weights.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> float:
        """Update the weights in place; return the norm of all gradients before clipping."""
        norm = math.sqrt(sum(float(each.pow(2).sum()) for each in gradients.values()))
        scale = min(1.0, self.clip / (norm + 1e-6))
        self.steps += 1
        for name, weight in self.weights.items():
            gradient = gradients[name] * scale
            self.first[name] = self._average(0, self.first[name], gradient)
            self.second[name] = self._average(1, self.second[name], gradient**2)
            first = self.first[name] / (1 - self.betas[0] ** self.steps)
            second = self.second[name] / (1 - self.betas[1] ** self.steps)
            if weight.dim() == 2:
                weight -= rate * self.decay * weight
            weight -= rate * first / (second.sqrt() + self.eps)
        return norm

    def _average(self, moment: int, old: Tensor, new: Tensor) -> Tensor:
        return self.betas[moment] * old + (1 - self.betas[moment]) * new
