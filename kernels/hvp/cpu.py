"""Launchers of the C++ kernels: the contract of `reference.py` on SIMD kernels. CPU tensors only.

`threads` overrides the number chosen by size (0), for benchmarks and tests. The steps of the R-operator are matrix
products of torch, which no kernel of ours would beat here.
"""

from __future__ import annotations

import torch
from secant.kernels._cpu_support import address, shortcut
from secant.kernels._cpu_support import available as available
from secant.kernels._cpu_support import extension as _cpu
from secant.kernels.hvp import LOSSES, rows
from torch import Tensor

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: Whether x may be a torch.sparse_csr tensor.
SPARSE_ROWS = True
_NAMES = ("glm_hvp", "glm_value_grad", "softmax_hvp", "softmax_value_grad")
_GLM_HVP, _GLM_VALUE_GRAD, _SOFTMAX_HVP, _SOFTMAX_VALUE_GRAD = range(len(_NAMES))


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32, float64, bfloat16 or float16."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _TYPES else f"X of float32, float64, bfloat16 or float16, got {dtype}"


def _rows(
    op: int,
    x: Tensor,
    v: Tensor,
    row: Tensor,
    sample_weight: Tensor | None,
    l2: float,
    out: Tensor,
    threads: int,
    value: Tensor | None = None,
    row_out: Tensor | None = None,
    loss: str = "squared",
    delta: float = 1.0,
) -> None:
    """Describe a pass over the rows of x, dense or sparse: see struct HvpRows."""
    n, d = x.shape
    if x.layout is torch.sparse_csr:
        crow, col, stored = rows.parts(_NAMES[op], "x", x)
        stride, wide, entries = 0, (crow.dtype is torch.int64, col.dtype is torch.int64), len(col)
    else:
        crow, col, stored, stride, wide, entries = None, None, x, x.stride(0), (False, False), 0
    wrong = _cpu.hvp_rows(
        _TYPES[x.dtype], op, n, d, stored.data_ptr(), stride, address(crow), address(col), *wide, entries,
        v.shape[1] if v.dim() == 2 else 1, v.shape[0] > d, v.data_ptr(), row.data_ptr(), address(sample_weight), l2,
        LOSSES.index(loss), delta, out.data_ptr(), address(value), address(row_out), threads,
    )  # fmt: skip
    if wrong >= 0:
        raise rows.bad_row(_NAMES[op], "x", x, wrong)


#: glm_plain(op, x, v, row, sample_weight, l2, intercept, loss, delta, out, value, row_out) -> bool: `glm_hvp` (op 0,
#: the last two None) for one vector, `glm_value_grad` (op 1, row = target), with the checks of the public functions
#: but those of the numbers l2, loss (an index of LOSSES) and delta. x is dense.
glm_plain = shortcut("hvp_glm_plain")


def glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor, *, threads: int = 0) -> None:
    """See `reference.glm_hvp`."""
    _rows(_GLM_HVP, x, v, weight, None, l2, out, threads)


def glm_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    loss: str,
    delta: float,
    sample_weight: Tensor | None,
    l2: float,
    value: Tensor,
    grad: Tensor,
    weight: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.glm_value_grad`."""
    _rows(_GLM_VALUE_GRAD, x, coef, target, sample_weight, l2, grad, threads, value, weight, loss, delta)


def softmax_hvp(
    x: Tensor,
    v: Tensor,
    probs: Tensor,
    sample_weight: Tensor | None,
    l2: float,
    out: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.softmax_hvp`."""
    _rows(_SOFTMAX_HVP, x, v, probs, sample_weight, l2, out, threads)


def softmax_value_grad(
    x: Tensor,
    target: Tensor,
    coef: Tensor,
    sample_weight: Tensor | None,
    l2: float,
    value: Tensor,
    grad: Tensor,
    probs: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.softmax_value_grad`."""
    _rows(_SOFTMAX_VALUE_GRAD, x, coef, target, sample_weight, l2, grad, threads, value, probs)


def cross_entropy_hvp(logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor, *, threads: int = 0) -> None:
    """See `reference.cross_entropy_hvp`."""
    _cpu.hvp_cross_entropy(
        _TYPES[logits.dtype], logits.shape[0], logits.shape[1], logits.data_ptr(), logits.stride(0), u.data_ptr(),
        u.stride(0), address(lse), out.data_ptr(), threads,
    )  # fmt: skip


def gram(x: Tensor, weight: Tensor | None, accumulate: bool, out: Tensor, *, threads: int = 0) -> None:
    """See `reference.gram`."""
    _cpu.hvp_gram(
        _TYPES[x.dtype], *x.shape, x.data_ptr(), *x.stride(), address(weight), accumulate, out.data_ptr(), threads
    )


def paired_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    out: Tensor,
) -> None:
    """See `reference.paired_matmul`."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)
    if c is not None and e is not None:
        out.addmm_(c, e)
    if scale is not None:
        out.mul_(scale)
    if p is not None and q is not None:
        out.addcmul_(p, q)
