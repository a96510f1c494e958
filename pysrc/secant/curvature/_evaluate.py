"""One evaluation of a closure: gradients on, attention differentiable twice, parameters replaced when asked."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from secant._errors import SecantWarning
from secant.curvature import _norms
from secant.curvature._random import Meeting, Randomness

Method = TypeVar("Method", bound=Callable[..., Any])
_FUSED = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "cudnn_sdp_enabled")


class _Watch(Meeting):
    """Sees every call of torch in a closure: replaces tensors by others, and notices attention and generators.

    The parameters of a closure are captured by it, so that there is no argument through which others could be passed;
    but each use of one is an argument of some call.
    """

    def __init__(
        self, substitutes: Mapping[int, Tensor] | None, meet: Callable[[torch.Generator], None], *, in_parts: bool
    ) -> None:
        super().__init__(meet)
        self.substitutes, self.in_parts, self.attention = substitutes, in_parts, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention or (
            func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True)
        ):
            self.attention = True
        self.look(args, kwargs)
        if self.substitutes:
            table = self.substitutes
            args, kwargs = tree_map_only(Tensor, lambda x: table.get(id(x), x), (args, kwargs))
        if func in _norms.PARTS:
            in_parts = self.in_parts or _norms.is_differentiated((*args, *kwargs.values()))
            func = _norms.PARTS[func] if in_parts else _norms.FUSED.get(func, func)
        return func(*args, **kwargs)


class Evaluator:
    """A closure at one batch that can be evaluated again with the same random numbers.

    Args:
        closure: without arguments.
        key: of the batch.
        randomness: of the point.
        params: of the operator; buffers that are among them are left alone.
        warn: called when attention had to leave its fused kernel.
        in_parts: whether normalisations are made of operations that can be differentiated three times.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        key: Hashable,
        randomness: Randomness,
        params: Collection[Tensor],
        warn: Callable[[], None],
        *,
        in_parts: bool = False,
    ) -> None:
        self.closure, self.key, self.randomness, self.warn, self.in_parts = closure, key, randomness, warn, in_parts
        self._params = {id(p) for p in params}

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """What the closure returns; dropout and sampling repeat those of the first evaluation.

        Args:
            substitutes: tensors to use in place of those with these ids.
        """
        fused = any(getattr(torch.backends.cuda, name, lambda: False)() for name in _FUSED)
        with (
            torch.enable_grad(),
            self.randomness.section(("closure", self.key)) as meet,
            _own_buffers(self._params),
            sdpa_kernel(SDPBackend.MATH),
            _Watch(substitutes, meet, in_parts=self.in_parts) as watch,
        ):
            result = self.closure()
        if watch.attention and fused:
            self.warn()
        return result


@contextlib.contextmanager
def _own_buffers(kept: Collection[int]) -> Iterator[None]:
    """Give every module in training that is called within copies of its buffers, and its own back at the end.

    What it writes there (running statistics, counts, the vectors of a spectral norm) is then gone; a graph that holds
    such a copy stays right. A copy rather than the old values written back: those would be a change in place.
    """
    thread, changed = threading.get_ident(), []
    copies: dict[int, Tensor] = {}
    seen: set[int] = set()

    def lend(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        if not module.training or id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            return
        seen.add(id(module))
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.requires_grad or id(buffer) in kept:
                continue
            changed.append((module, name, buffer))
            module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())

    handle = nn.modules.module.register_module_forward_pre_hook(lend)
    try:
        yield
    finally:
        handle.remove()
        for module, name, buffer in changed:
            module._buffers[name] = buffer


_NOTHING = contextlib.nullcontext()


def plain(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The state in which products are made, whatever the caller's: no inference mode, no autocast."""
    autocast = torch.is_autocast_enabled("cpu") or (device.type != "cpu" and torch.is_autocast_enabled(device.type))
    return _plain(device) if autocast or torch.is_inference_mode_enabled() else _NOTHING


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def plainly(method: Method) -> Method:
    """Run a method of an operator within `plain`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with plain(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, call)


def warn_of_attention(op: str) -> None:
    """The fused kernels have no second derivative (pytorch/pytorch#116350, #117974, #128971)."""
    warnings.warn(
        f"{op}: scaled_dot_product_attention runs its 'math' implementation here: the fused kernels cannot be "
        "differentiated twice. To choose it yourself, and silence this, take the products within "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
        SecantWarning,
        stacklevel=2,
    )
