"""How torch sees an op: whole in a compiled graph, by a schema under a tensor subclass, as a launch in eager calls.

A public function is marked `whole`: torch.compile puts one call of it into its graph and does not look inside. What is
inside runs as in eager mode, on the tensors that the compiler traces with, so that derivatives of either mode, batches
and checks are those of the eager function, and an autograd function may define `jvp` and `vmap` (torch.compile itself
traces none that does, and drops the derivative of one under a torch.func transform). What remains in the compiled graph
are the schemas of `Kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from secant import backends

P = ParamSpec("P")
R = TypeVar("R")

_lib = torch.library.Library("secant", "FRAGMENT")
#: Arguments behind which nothing hides: tensors with memory of their own kind, and what is no tensor.
_KNOWN = {Tensor, torch.nn.Parameter, type(None), float, int, bool, str}


def _are_known(args: tuple[Any, ...]) -> bool:
    """Tell whether nothing hides behind these arguments, or behind the members of those that are lists."""
    return _KNOWN.issuperset(map(type, args)) or all(
        _KNOWN.issuperset(map(type, x)) if type(x) is list else type(x) in _KNOWN for x in args
    )


def _dense(x: Tensor) -> Tensor:
    """Return a tensor itself, or a contiguous copy of what it stands for."""
    return x.resolve_neg().contiguous() if x.is_neg() or not x.is_contiguous() else x


def at_trace_time(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that a compiler calls while it traces, and takes the result of for a constant."""
    # What torch.compiler.assume_constant_result does, which imports the compiler (1.5 s).
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def whole(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function whose calls a compiler takes as they are. Its arguments are tensors, constants, or tuples."""

    @at_trace_time
    def admit() -> None:
        torch.compiler.allow_in_graph(function)

    outside = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            if any(isinstance(x, Tensor) and x.layout is not torch.strided for x in args):
                return outside(*args, **kwargs)  # no compiler takes sparse rows
            admit()
        return function(*args, **kwargs)

    return call


_held: dict[int, Any] = {}


@at_trace_time
def hold(x: Any) -> int:
    """Name a constant that a graph cannot carry, such as a function, by a number that it can. It is kept for good."""
    _held[id(x)] = x
    return id(x)


def held(key: int) -> Any:
    """Return what `hold` gave that name to."""
    return _held[key]


def _no_op(*args: Any) -> None:
    """Do nothing, as the fake implementation: every result is written into an argument."""


class Kernel:
    """A function of a family's contract (`kernels/<family>/reference.py`) on its way to the backend that serves it.

    Args:
        family: such as "blocks".
        method: of the contract.
        schema: of the registered op, without "-> ()": results are written into arguments.
        settle: for who calls the registered op itself, and compilers, which may hand over other strides than they
            traced: from its arguments to those of the contract's layout. It may raise.
        contract: from the arguments of the op to those of the method.
        vector: places of the argument whose device and dtype choose the backend, and of what does where that is None;
            of a list the first member does.
    """

    def __init__(
        self,
        family: str,
        method: str,
        schema: str,
        *,
        settle: Callable[..., tuple[Any, ...]] | None = None,
        contract: Callable[..., tuple[Any, ...]] | None = None,
        vector: tuple[int, int] = (0, 0),
    ) -> None:
        self.family, self.method, self.name = family, method, schema.partition("(")[0]
        self._settle, self._contract = settle, contract
        self._vector, self._other = vector
        _lib.define(f"{schema} -> ()")
        for key in ("CPU", "CUDA"):
            _lib.impl(self.name, self._op, key)
        torch.library.register_fake(f"secant::{self.name}", _no_op, lib=_lib)
        self.registered: Callable[..., None] = getattr(torch.ops.secant, self.name)
        arguments = self.registered.default._schema.arguments
        self.arguments = [x.name for x in arguments]
        self._written = [i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write]

    def _op(self, *args: Any) -> None:
        laid = list(args if self._settle is None else self._settle(*args))
        for place in self._written:  # a kernel writes one entry behind the other
            if isinstance(x := args[place], list):
                laid[place] = [_dense(y) for y in x]
            elif x is not None and (x.is_neg() or not x.is_contiguous()):
                laid[place] = _dense(x)
        self.launch(*laid)
        for place in self._written:
            if isinstance(args[place], list):
                for to, x in zip(args[place], laid[place], strict=True):
                    if x is not to:
                        to.copy_(x)
            elif laid[place] is not args[place]:
                args[place].copy_(laid[place])

    def launch(self, *args: Any) -> None:
        """Launch: arguments in the layout of the contract, all of them plain."""
        vector = args[self._vector]
        if vector is None:
            vector = args[self._other]
        elif type(vector) is list:
            vector = vector[0]
        backend = backends.resolve(self.family, vector.device, vector.dtype)
        getattr(backend, self.method)(*(args if self._contract is None else self._contract(*args)))

    def __call__(self, *args: Any) -> None:
        """Launch; through the registered op where a compiler or a tensor subclass has to see the call."""
        if torch.compiler.is_dynamo_compiling() or not _are_known(args):
            self.registered(*args)
        else:
            self.launch(*args)
