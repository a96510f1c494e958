"""Normalisations by the statistics of their own input, from operations whose derivatives of every order are right.

torch 2.13 takes mean and variance for constants where it differentiates the backward pass of layer_norm and batch_norm
for the second time, and in part of the forward mode: wrong by tens of percent, and not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def _wide(x: Tensor) -> Tensor:
    """Half precisions are normalised in float32, as torch does; autocast does so for layer_norm."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        y = y * _wide(weight).reshape(shape)
    return y if bias is None else y + _wide(bias).reshape(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    y = _normalised(_wide(input), list(range(-len(shape), 0)), eps)
    y = _scaled(y, weight, bias, shape)
    return y if _autocast(input) else y.to(input.dtype)


def _per_channel(input: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    channels = [1, -1] + [1] * (input.dim() - 2)
    return _scaled(_normalised(_wide(input), dims, eps), weight, bias, channels).to(input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or input.numel() <= input.shape[1]:  # one value per channel: torch has the error for it
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _per_channel(input, [i for i in range(input.dim()) if i != 1], weight, bias, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _per_channel(input, list(range(2, input.dim())), weight, bias, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


#: The same functions in parts. Under batch statistics the running ones are neither read nor written.
PARTS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
}


def _without_running(func: Callable[..., Tensor], names: Sequence[str], flag: str) -> Callable[..., Tensor]:
    """Wrap a kernel of torch so that it leaves running statistics as they are where those of the input are used."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get(flag, flag == "use_input_stats"):
            given |= {"running_mean": None, "running_var": None}
        first = [given.pop(name) for name in names[: len(args)]]
        return func(*first, **given)

    return call


_STATISTICS, _AFFINE, _REST = ["running_mean", "running_var"], ["weight", "bias"], ["momentum", "eps"]
FUSED: dict[Any, Callable[..., Tensor]] = {
    func: _without_running(func, ["input", *middle, flag, *_REST, *last], flag)
    for func, middle, flag, last in (
        (F.batch_norm, _STATISTICS + _AFFINE, "training", []),
        (F.instance_norm, _STATISTICS + _AFFINE, "use_input_stats", []),
        (torch.batch_norm, _AFFINE + _STATISTICS, "training", ["cudnn_enabled"]),
        (torch.instance_norm, _AFFINE + _STATISTICS, "use_input_stats", ["cudnn_enabled"]),
    )
}


def is_differentiated(args: Sequence[Any]) -> bool:
    """Tell whether a derivative is being taken around this call: by a transform of torch.func or by forward mode."""
    for x in args:
        if isinstance(x, Tensor) and (
            torch._C._functorch.is_gradtrackingtensor(x)
            or torch._C._functorch.is_batchedtensor(x)
            or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None)
        ):
            return True
    return False
