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
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from secant._errors import SecantWarning
from secant.curvature import _norms
from secant.curvature._random import Meeting, Randomness

Method = TypeVar("Method", bound=Callable[..., Any])
#: Fused kernels of attention: whether each may be used, and the function that decides so.
_FUSED = [
    (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"))
    for name in ("flash", "mem_efficient", "cudnn")
    if hasattr(torch.backends.cuda, f"enable_{name}_sdp")
]


class _Watch(Meeting):
    """Sees every call of torch in a closure: replaces tensors by others, and notices attention and generators.

    The parameters of a closure are captured by it, so that there is no argument through which others could be passed;
    but each use of one is an argument of some call.

    Args:
        substitutes: tensors to use in place of those with these ids. meet: told of generators. in_parts: see
            `Evaluator`. statistics: whether normalisations update their running statistics.
    """

    def __init__(
        self,
        substitutes: Mapping[int, Tensor] | None,
        meet: Callable[[torch.Generator], None],
        *,
        in_parts: bool,
        statistics: bool,
    ) -> None:
        super().__init__(meet)
        self.substitutes, self.in_parts, self.statistics = substitutes, in_parts, statistics
        self.attention = self.backward = self.norms = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention or (
            func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True)
        ):
            self.attention = True
        elif func is Tensor.backward:
            self.backward = True
        self.look(args, kwargs)
        if self.substitutes:
            table = self.substitutes
            args, kwargs = tree_map_only(Tensor, lambda x: table.get(id(x), x), (args, kwargs))
        if func in _norms.PARTS:
            self.norms = True
            in_parts = self.in_parts or _norms.is_differentiated((*args, *kwargs.values()))
            if in_parts:
                func = _norms.PARTS[func]
            elif not self.statistics:
                func = _norms.FUSED.get(func, func)
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
        self.called_backward = False
        self.watched = True
        self.is_quiet = False
        self._params = {id(p) for p in params}
        self._before: Buffers | None = None

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """Return what the closure does; dropout and sampling repeat those of the first evaluation.

        Args:
            substitutes: tensors to use in place of those with these ids.
        """
        return self._evaluate(substitutes)

    def _evaluate(self, substitutes: Mapping[int, Tensor] | None, *, write: bool = False) -> Any:
        """Evaluate the closure.

        Args:
            write: whether this is an evaluation of the program itself: its generators go on, and modules in training
                keep what they write into their buffers.
        """
        key = ("closure", self.key)
        section = self.randomness.own_section if write else self.randomness.section
        buffers = _own_buffers(self._params, self._before, write=write)
        if write and not self.watched and not is_transformed():
            with torch.enable_grad(), section(key), buffers, _plain_attention():
                return self.closure()
        with (
            torch.enable_grad(),
            section(key) as meet,
            buffers,
            _plain_attention() as fused,
            _Watch(substitutes, meet, in_parts=self.in_parts, statistics=write) as watch,
        ):
            result = self.closure()
        self.called_backward |= watch.backward
        if write:
            seen = watch.attention or watch.backward or watch.norms
            self.is_quiet = not seen and self.randomness.is_untouched(key)
        if watch.attention and fused:
            self.warn()
        return result


def is_transformed() -> bool:
    """Tell whether a derivative is being taken around: by a transform of torch.func or by forward mode."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


@contextlib.contextmanager
def _plain_attention() -> Iterator[bool]:
    """Have attention run its implementation in parts, and tell whether it might have run a fused one."""
    enabled = [enable for is_enabled, enable in _FUSED if is_enabled()]
    math = torch.backends.cuda.math_sdp_enabled()
    try:
        for enable in enabled:
            enable(False)
        if not math:
            torch.backends.cuda.enable_math_sdp(True)
        yield bool(enabled)
    finally:
        for enable in enabled:
            enable(True)
        if not math:
            torch.backends.cuda.enable_math_sdp(False)


class KeptEvaluator(Evaluator):
    """An evaluator whose first evaluation is the one that the program makes anyway, and is made once.

    It leaves the program's generators where the closure has brought them, and buffers as modules in training wrote
    them. Asked again, it gives what was returned, graph and all; only with substitutes, or where normalisations have to
    be made in parts, the closure is evaluated again, from the same random numbers and buffers, and leaves no trace.

    Attributes:
        watched: whether the first evaluation is watched; not so where others were found quiet before. is_quiet: whether
            one that was watched had nothing to watch for: no attention, normalisation, call of backward, generator of
            its own, and nothing drawn from Python's or numpy's.
    """

    _results: dict[bool, Any]

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """Return what the closure does, or did."""
        if substitutes is not None:
            return self._evaluate(substitutes)
        if self._before is None:
            self._before, self._results = {}, {}
            self._results[self.in_parts] = self._evaluate(None, write=True)
        elif self.in_parts not in self._results:
            self._results[self.in_parts] = self._evaluate(None)
        return self._results[self.in_parts]


class Adapted(Evaluator):
    """Reads something of the results of another evaluator."""

    def __init__(self, evaluator: Evaluator, read: Callable[[Any], Any]) -> None:
        self._evaluator, self._read = evaluator, read
        self.key, self.randomness = evaluator.key, evaluator.randomness

    @property
    def in_parts(self) -> bool:
        """Return that of the other evaluator."""
        return self._evaluator.in_parts

    @in_parts.setter
    def in_parts(self, value: bool) -> None:
        self._evaluator.in_parts = value

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """Return what is read."""
        with torch.enable_grad():
            return self._read(self._evaluator(substitutes))


class Remembered(Adapted):
    """Keeps what another evaluator found first, graph and all, for all that is asked at one point."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator, lambda result: result)
        self._found: dict[bool, Any] = {}

    def __call__(self, substitutes: Mapping[int, Tensor] | None = None) -> Any:
        """Return what the closure does, or did."""
        if substitutes is not None:
            return super().__call__(substitutes)
        if self.in_parts not in self._found:
            self._found[self.in_parts] = super().__call__()
        return self._found[self.in_parts]


#: Buffers by their ids, and what they held before a point.
Buffers = dict[int, tuple[Tensor, Tensor]]


@contextlib.contextmanager
def _own_buffers(kept: Collection[int], before: Buffers | None, *, write: bool) -> Iterator[None]:
    """Give every module in training that is called within copies of its buffers, and its own back at the end.

    What it writes there (running statistics, counts, the vectors of a spectral norm) is then gone, or copied into its
    own with `write`; a graph that holds such a copy stays right. A copy rather than the old values written back: those
    would be a change in place.

    Args:
        kept: ids of buffers to leave alone. before: what the copies are made of, and where a buffer is entered that is
            not in it; None: of the buffers as they are.
    """
    thread, changed = threading.get_ident(), []
    copies: dict[int, Tensor] = {}
    seen: set[int] = set()

    def copy_of(buffer: Tensor) -> Tensor:
        if before is not None:
            old = before.setdefault(id(buffer), (buffer, buffer.clone() if write else buffer))
            return copies.setdefault(id(buffer), old[1].clone())
        return copies.setdefault(id(buffer), buffer.clone())

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
            module._buffers[name] = copy_of(buffer)

    handle = nn.modules.module.register_module_forward_pre_hook(lend)
    done = False
    try:
        yield
        done = True
    finally:
        handle.remove()
        for module, name, buffer in changed:
            now = module._buffers.get(name)
            if write and done and now is not copies[id(buffer)]:
                continue  # the module has put another tensor there
            module._buffers[name] = buffer
            if write and done:
                with torch.no_grad():
                    buffer.copy_(copies[id(buffer)])


#: What there is to enter where the caller's state is plain already.
NOTHING = contextlib.nullcontext()


def plain(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Enter the state in which products are made, whatever the caller's: no inference mode, no autocast."""
    autocast = torch.is_autocast_enabled("cpu") or (device.type != "cpu" and torch.is_autocast_enabled(device.type))
    return _plain(device) if autocast or torch.is_inference_mode_enabled() else NOTHING


@contextlib.contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def within_plain(device: torch.device, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a product that is made within `plain`."""

    def call(v: Tensor) -> Tensor:
        with plain(device):
            return product(v)

    return call


def plainly(method: Method) -> Method:
    """Run a method of an operator within `plain`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with plain(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, call)


def warn_of_attention(op: str) -> None:
    """Warn that fused kernels have no second derivative (pytorch/pytorch#116350, #117974, #128971)."""
    warnings.warn(
        f"{op}: scaled_dot_product_attention runs its 'math' implementation here: the fused kernels cannot be "
        "differentiated twice. To choose it yourself, and silence this, take the products within "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
        SecantWarning,
        stacklevel=2,
    )
