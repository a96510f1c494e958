"""A small call of every kernel on every GPU backend, for tools that make a program a hundred times slower."""

from __future__ import annotations

import torch

import secant
from secant import backends, ops

DEVICE = torch.device("cuda")


def lbfgs() -> None:
    """Flat and batched directions, pairs appended and stepped with."""
    for shape in ((33,), (3, 33)):
        g = torch.randn(shape, device=DEVICE)
        s = torch.randn(*shape[:-1], 3, 33, device=DEVICE)
        ops.two_loop(g, s, s * 2)
    history = secant.LBFGSHistory(33, 3, device=DEVICE)
    s = torch.randn(33, device=DEVICE)
    history.append(s, s * 2)
    history.direction(s)


def blocks() -> None:
    """Each scheme: a thread, a part of a warp, a warp, two warps a matrix."""
    for n in (3, 9, 17, 33):
        a = torch.randn(3, n, n, device=DEVICE)
        a = a @ a.mT + n * torch.eye(n, device=DEVICE)
        for assume in ("spd", "general"):
            ops.block_inv(a, assume=assume)
            ops.block_solve(a, a[..., 0], assume=assume)
        ops.block_eigh(a)
        ops.block_inv_root(a, 4)
        ops.block_abs_inv(a, floor=0.1)


def hvp() -> None:
    """One vector and several, the losses, rows of logits, and the step of a layer."""
    x, w = torch.randn(50, 37, device=DEVICE), torch.rand(50, device=DEVICE)
    for k in (1, 5):
        v = torch.randn(37, k, device=DEVICE)
        ops.glm_hvp(x, v, w)
        ops.softmax_hvp(x, v, torch.softmax(torch.randn(50, k, device=DEVICE), -1))
        ops.softmax_value_grad(x, torch.zeros(50, dtype=torch.int64, device=DEVICE), v)
    for loss in ("squared", "logistic", "poisson", "huber"):
        ops.glm_value_grad(x, w, v[:, 0].contiguous(), loss=loss)
    ops.cross_entropy_hvp(x, x)
    ops.paired_matmul(x, v, x, v, scale=torch.rand(50, 5, device=DEVICE))


def main() -> None:
    """Every family on every backend that is there."""
    for name in ("cuda", "triton", "nvrtc"):
        for family, calls in (("lbfgs", lbfgs), ("blocks", blocks), ("hvp", hvp)):
            if isinstance(backends.load(family, name), str):
                continue
            with secant.use_backend(name):
                calls()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
