"""One evaluation of a closure: gradients on, attention differentiable twice, parameters replaced when asked."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from secant._errors import SecantWarning

_FUSED = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")


class _Watch(TorchFunctionMode):
    """Sees every call of torch in a closure: replaces tensors by others, and notices attention.

    The parameters of a closure are captured by it, so that there is no argument through which others could be passed;
    but each use of one is an argument of some call.
    """

    def __init__(self, substitutes: Mapping[int, Tensor] | None) -> None:
        super().__init__()
        self.substitutes, self.attention = substitutes, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention or (
            func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True)
        ):
            self.attention = True
        if self.substitutes:
            table = self.substitutes
            args, kwargs = tree_map_only(Tensor, lambda x: table.get(id(x), x), (args, kwargs))
        return func(*args, **kwargs)


class Evaluator:
    """A closure at one batch that can be evaluated again with the same random numbers.

    Args:
        closure: without arguments.
        device: of the parameters, whose generator is kept too.
        warn: called when attention had to leave its fused kernel.
    """

    def __init__(self, closure: Callable[[], Any], device: torch.device, warn: Callable[[], None]) -> None:
        self.closure, self.device, self.warn = closure, device, warn
        self._random: tuple[Tensor, Tensor | None] | None = None

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if self._random is None:
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            torch.set_rng_state(self._random[0])
            if self._random[1] is not None:
                torch.cuda.set_rng_state(self._random[1], self.device)
            yield

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """What the closure returns; dropout and sampling repeat those of the first evaluation.

        Args:
            substitutes: tensors to use in place of those with these ids.
        """
        watch = _Watch(substitutes)
        fused = any(getattr(torch.backends.cuda, name, lambda: False)() for name in _FUSED)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._same_random_numbers(),
            sdpa_kernel(SDPBackend.MATH),
            watch,
        ):
            result = self.closure()
        if watch.attention and fused:
            self.warn()
        return result


def warn_of_attention(op: str) -> None:
    """The fused kernels have no second derivative (pytorch/pytorch#116350, #117974, #128971)."""
    warnings.warn(
        f"{op}: scaled_dot_product_attention runs its 'math' implementation here: the fused kernels cannot be "
        "differentiated twice. To choose it yourself, and silence this, take the products within "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
        SecantWarning,
        stacklevel=2,
    )
