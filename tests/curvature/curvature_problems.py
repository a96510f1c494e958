"""Networks, losses and the dense matrices that products are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softplus-3": lambda: nn.Softplus(3.0, 1.0),
    "sin": lambda: Sin(),
    "sin-30": lambda: Sin(3.0),
}


class Sin(nn.Module):
    """sin(frequency x), the second with a node for the multiple."""

    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x if self.frequency == 1.0 else self.frequency * x)


class Residual(nn.Module):
    """No chain of layers: goes through autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x + torch.tanh(self.inner(x)))


class Transformer(nn.Module):
    """One block of self-attention over (batch, tokens) of 11 symbols."""

    def __init__(self, width: int = 8, heads: int = 2, *, norm: bool = True) -> None:
        super().__init__()
        self.embed, self.heads = nn.Embedding(11, width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return self.head(x + self.mlp(x))


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """4-5-6-3, with layers that do nothing in evaluation, and a layer without bias."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 5), activation(), nn.Dropout(0.3), nn.Linear(5, 6, bias=False), activation(),
        nn.Identity(), nn.Linear(6, 3),
    )  # fmt: skip
    return net.double().eval()


def cnn() -> nn.Sequential:
    """Of 1 x 5 x 5 images, three classes."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(12, 3))
    return net.double()


def data(n: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, 2, 2) and labels of three classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 2, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def flat(parts: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    pairs = zip(parts, params, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def dense_hessian(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Row by row, by double backward."""
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True), params)
    rows = [torch.autograd.grad(g, params, retain_graph=True, allow_unused=True) for g in gradient]
    return torch.stack([flat(row, params) for row in rows])


def dense_jacobian(outputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """(outputs, parameters), row by row."""
    rows = [torch.autograd.grad(x, params, retain_graph=True, allow_unused=True) for x in outputs.reshape(-1)]
    return torch.stack([flat(row, params) for row in rows])


def dense(operator: object) -> Tensor:
    """An operator as a matrix."""
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((got - want).abs().max() / want.abs().max())


#: Both sides are sums of at most some hundreds of terms in float64, each within an epsilon or two.
ROUNDING = 1e-13
