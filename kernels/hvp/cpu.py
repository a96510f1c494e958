"""Launchers of the C++ kernels: the contract of `reference.py` on SIMD kernels. CPU tensors only.

`threads` overrides the number chosen by size (0), for benchmarks and tests. The steps of the R-operator are matrix
products of torch, which no kernel of ours would beat here.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from secant import _cpu
except ImportError as error:  # a source tree that was never built, or a SECANT_ISA that this machine has not
    _cpu = None
    _reason = f"the extension module secant._cpu cannot be imported: {error}"

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LOSSES = {"squared": 0, "logistic": 1, "poisson": 2, "huber": 3}
_GLM_HVP, _GLM_VALUE_GRAD, _SOFTMAX_HVP, _SOFTMAX_VALUE_GRAD = range(4)


def available() -> str | None:
    """Return None when the extension is built, else why it cannot be imported."""
    return None if _cpu is not None else _reason


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None for CPU tensors of float32, float64, bfloat16 or float16."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, got {device}"
    return None if dtype in _TYPES else f"X of float32, float64, bfloat16 or float16, got {dtype}"


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def glm_hvp(x: Tensor, v: Tensor, weight: Tensor, l2: float, out: Tensor, *, threads: int = 0) -> None:
    """See `reference.glm_hvp`."""
    _cpu.hvp_rows(
        _TYPES[x.dtype], _GLM_HVP, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), v.shape[1],
        v.shape[0] > x.shape[1], v.data_ptr(), weight.data_ptr(), 0, l2, 0, 0.0, out.data_ptr(), 0, 0, threads,
    )  # fmt: skip


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
    _cpu.hvp_rows(
        _TYPES[x.dtype], _GLM_VALUE_GRAD, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), 1,
        coef.shape[0] > x.shape[1], coef.data_ptr(), target.data_ptr(), _address(sample_weight), l2, _LOSSES[loss],
        delta, grad.data_ptr(), value.data_ptr(), weight.data_ptr(), threads,
    )  # fmt: skip


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
    _cpu.hvp_rows(
        _TYPES[x.dtype], _SOFTMAX_HVP, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), v.shape[1],
        v.shape[0] > x.shape[1], v.data_ptr(), probs.data_ptr(), _address(sample_weight), l2, 0, 0.0, out.data_ptr(),
        0, 0, threads,
    )  # fmt: skip


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
    _cpu.hvp_rows(
        _TYPES[x.dtype], _SOFTMAX_VALUE_GRAD, x.shape[0], x.shape[1], x.data_ptr(), x.stride(0), coef.shape[1],
        coef.shape[0] > x.shape[1], coef.data_ptr(), target.data_ptr(), _address(sample_weight), l2, 0, 0.0,
        grad.data_ptr(), value.data_ptr(), probs.data_ptr(), threads,
    )  # fmt: skip


def cross_entropy_hvp(logits: Tensor, u: Tensor, lse: Tensor | None, out: Tensor, *, threads: int = 0) -> None:
    """See `reference.cross_entropy_hvp`."""
    _cpu.hvp_cross_entropy(
        _TYPES[logits.dtype], logits.shape[0], logits.shape[1], logits.data_ptr(), logits.stride(0), u.data_ptr(),
        u.stride(0), _address(lse), out.data_ptr(), threads,
    )  # fmt: skip


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


def csr_glm_hvp(
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    d: int,
    v: Tensor,
    weight: Tensor,
    l2: float,
    out: Tensor,
    *,
    threads: int = 0,
) -> None:
    """See `reference.csr_glm_hvp`."""
    _cpu.hvp_sparse(
        _TYPES[values.dtype], _GLM_HVP, len(crow) - 1, d, crow.data_ptr(), col.data_ptr(), values.data_ptr(),
        crow.dtype is torch.int64, v.shape[1], v.shape[0] > d, v.data_ptr(), weight.data_ptr(), 0, l2, 0, 0.0,
        out.data_ptr(), 0, 0, threads,
    )  # fmt: skip


def csr_glm_value_grad(
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    d: int,
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
    """See `reference.csr_glm_value_grad`."""
    _cpu.hvp_sparse(
        _TYPES[values.dtype], _GLM_VALUE_GRAD, len(crow) - 1, d, crow.data_ptr(), col.data_ptr(), values.data_ptr(),
        crow.dtype is torch.int64, 1, coef.shape[0] > d, coef.data_ptr(), target.data_ptr(), _address(sample_weight),
        l2, _LOSSES[loss], delta, grad.data_ptr(), value.data_ptr(), weight.data_ptr(), threads,
    )  # fmt: skip
