"""A small call of every kernel on a GPU backend, for tools that make a program a hundred times slower.

    python bench/gpu_smallest.py [cuda triton nvrtc]

On `cuda`, which has every kernel compiled already, each kernel of the planners is launched: what was not is an error.
The other two, which compile at the first call, make the calls in float32 alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from secant.kernels import _cuda_driver
from secant.kernels.blocks import plan as blocks_plan
from secant.kernels.hvp import plan as hvp_plan
from secant.kernels.precond import plan as precond_plan
from secant.kernels.search import plan as search_plan

import secant
from secant import backends, ops
from secant.ops.precond import ADAM, NONE, Rule

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
GPU = torch.device("cuda")
NAMES = ("cuda", "triton", "nvrtc")
#: An n of each scheme of the blocks: a thread, parts of a warp, a warp, two warps a matrix.
SIZES = (3, 9, 17, 33)


def kernels() -> list[str]:
    """List the names of all CUDA kernels, of every family."""
    kinds = ("update_block", "update_warp", "panel_dots", "panel_line", "two_loop_block", "two_loop_warp")
    lbfgs = [f"lbfgs_{k}_{t}_{h}" for k in kinds for t in ("f32", "f64") for h in ("f32", "f64", "bf16")]
    return [*lbfgs, *blocks_plan.kernels(), *hvp_plan.kernels(), *precond_plan.kernels(), *search_plan.kernels()]


def lbfgs(device: torch.device, *, every: bool) -> None:
    """Call flat and batched directions, short and over all multiprocessors, pairs appended and stepped with."""
    many = torch.cuda.get_device_properties(device).multi_processor_count + 1 if device.type == "cuda" else 200
    for dtype in (F32, F64) if every else (F32,):
        for storage in (F32, F64, BF16) if every else (F32,):
            for shape in ((33,), (20_000,), (many, 33)):
                g = torch.randn(shape, device=device, dtype=dtype)
                s = torch.randn(*shape[:-1], 3, shape[-1], device=device, dtype=storage)
                ops.two_loop(g, s, s * 2)
                batch = shape[0] if len(shape) == 2 else None
                history = secant.LBFGSHistory(
                    shape[-1], 3, batch=batch, dtype=dtype, device=device, storage_dtype=storage
                )
                history.append(g, g * 2)
                history.direction(g)
                history.step(g, -g, g.clone(), 0.5)


def blocks(device: torch.device, *, every: bool) -> None:
    """Call each function of the blocks, of one n for each kernel."""
    sizes = sorted({*SIZES, *range(1, 9), *(w for widths in blocks_plan.WIDTHS.values() for w in widths)})
    for dtype in (F32, F64) if every else (F32,):
        for n in sizes if every else SIZES:
            a = torch.randn(3, n, n, device=device, dtype=dtype)
            a = a @ a.mT + n * torch.eye(n, device=device, dtype=dtype)
            for assume in ("spd", "general"):
                ops.block_inv(a, assume=assume)
                ops.block_solve(a, a[..., 0], assume=assume)
            ops.block_eigh(a)
            ops.block_inv_root(a, 4)
            ops.block_abs_inv(a, floor=0.1)


def hvp(device: torch.device, *, every: bool) -> None:
    """Call rows and vectors of each shape of the tile, the losses, rows of logits, and the step of a layer."""
    widths = [1, 300, 1500, 5000, 17_000] if every else [37]
    for dtype in (F32, F64, BF16, F16) if every else (F32,):
        wide = dtype if dtype is F64 else F32
        for d in widths:
            x = torch.randn(40, d, device=device).to(dtype)
            w, classes = torch.rand(40, device=device, dtype=wide), torch.zeros(40, dtype=torch.int64, device=device)
            for k in (1, 4, 8, 16):
                v = torch.randn(d, k, device=device, dtype=wide) / d**0.5
                ops.glm_hvp(x, v, w)
                if k > 1:
                    ops.softmax_hvp(x, v, torch.softmax(torch.randn(40, k, device=device, dtype=wide), -1))
                    ops.softmax_value_grad(x, classes, v)
            for loss in ("squared", "logistic", "poisson", "huber", "gamma", "tweedie"):
                ops.glm_value_grad(x, w, v[:, 0].contiguous(), loss=loss)
            ops.cross_entropy_hvp(x, x)
        if dtype is wide:
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((40, 3000), (3000, 50)))
            ops.paired_matmul(a, b, a, b, scale=torch.rand(40, 50, device=device, dtype=dtype))
            ops.gram(a)
            ops.gram(b)


def precond(device: torch.device, *, every: bool) -> None:
    """Call steps of tiles and of vectors with both kinds of state, orthogonalisation and roots."""
    rules = [Rule(0.9, 0.95, 0.95, 1e-8, 0.1, graft, rotate, False) for graft, rotate in ((ADAM, False), (NONE, True))]
    for dtype in (F32, F64, BF16, F16) if every else (F32,):
        for storage in (None, BF16) if every else (None,):
            params = [torch.randn(shape, device=device).to(dtype) for shape in ((33, 20), (7,))]
            states = [ops.Tiles.new_state(p, dtype=storage) for p in params]
            for state in states:
                state["step"] += 1
            tiles = ops.Tiles(params, states)
            for rule in rules:
                tiles.step([torch.randn_like(p) for p in params], lr=0.1, rule=rule)
        x = torch.randn(3, 20, 20, device=device).to(dtype)
        ops.newton_schulz(x)
        for p in (1, 2, 4):
            ops.newton_inv_root(x @ x.mT, p)


def search(device: torch.device, *, every: bool) -> None:
    """Call a round of searches, of each number of threads a problem."""
    for dtype in (F32, F64) if every else (F32,):
        for n in (3, 33, 70):
            x = torch.randn(50, n, device=device, dtype=dtype)
            found = ops.BatchedSearch(x, x.square().sum(1) / 2, x)
            for rows in (None, torch.arange(0, 50, 3, device=device)):
                trial = found.trial if rows is None else found.trial[rows]
                found.advance(trial.square().sum(1) / 2, trial, rows)
                g = found.g.double()
                found.begin(-g.square().sum(1), g.abs().amax(1), rows=rows)


FAMILIES = {"lbfgs": lbfgs, "blocks": blocks, "hvp": hvp, "precond": precond, "search": search}


def watch() -> set[str]:
    """Collect the names of the kernels that the `cuda` backend launches from here on."""
    seen: set[str] = set()
    original: Any = _cuda_driver.AheadOfTime.launch

    def launch(self: Any, item: Any, *rest: Any) -> None:
        seen.add(item.kernel)
        original(self, item, *rest)

    _cuda_driver.AheadOfTime.launch = launch  # type: ignore[method-assign]
    return seen


def main(names: list[str]) -> int:
    """Call every family on every backend that is there; 1 when a kernel of `cuda` was not launched."""
    seen, whole = watch(), True
    for name in names:
        for family, calls in FAMILIES.items():
            reason = backends.load(family, name)
            if isinstance(reason, str):
                print(f"{family} on {name}: {reason}")
                whole = whole and name != "cuda"
                continue
            with secant.use_backend(name):
                calls(GPU, every=name == "cuda")
    torch.cuda.synchronize()
    missing = sorted(set(kernels()) - seen) if "cuda" in names and whole else []
    print(f"{len(seen)} kernels launched ahead of time", *(f"not launched: {name}" for name in missing), sep="\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(NAMES)))
