"""What went wrong inside autograd, in the words of the caller."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from secant.curvature import _graph

_NO_DERIVATIVE = re.compile(r"derivative for '?([\w:.]+)'? is not implemented")
_NO_FORWARD = re.compile(r"forward AD with ([\w:.]+) that does not support it")


def reason(op: str, mode: str, error: Exception, nodes: Sequence[Any]) -> str:
    """Say in one sentence which operation is at fault, where it can be known.

    Args:
        nodes: of the graph, when there is one; they name the custom functions.
    """
    text = str(error)
    if text.startswith(f"{op}: "):  # in these words already
        return text
    if match := _NO_DERIVATIVE.search(text):
        return f"{op}: mode '{mode}': {match[1]} has no derivative of the order that is needed"
    if match := _NO_FORWARD.search(text):
        return f"{op}: mode '{mode}': {match[1]} has no forward-mode derivative"
    if "once_differentiable" in text:
        names = ", ".join(_graph.custom_functions(nodes, once=True)) or "a torch.autograd.Function"
        return f"{op}: mode '{mode}': {names}: its backward is marked once_differentiable, so there is no second one"
    if "double backward" in text and "compile" in text:
        return f"{op}: mode '{mode}': what torch.compile made has no double backward: use the module without it"
    if "jvp" in text and "Function" in text:
        names = ", ".join(_graph.custom_functions(nodes)) or "a torch.autograd.Function"
        return f"{op}: mode '{mode}': {names} has no jvp, which forward mode needs"
    if "backward through the graph a second time" in text:
        return f"{op}: closure: expected no call of backward in it (it frees the graph)"
    if "modified by an inplace operation" in text:
        return f"{op}: something that the graph of this point holds was changed in place: call refresh()"
    return f"{op}: mode '{mode}': {text.splitlines()[0] if text else type(error).__name__}"


def asymmetric(op: str, mode: str, asymmetry: float, nodes: Sequence[Any]) -> str:
    """Say that products are not symmetric, and what the cause may be."""
    found = _graph.survey([(node, 0) for node in nodes if node is not None], {})
    names = ", ".join(found.unreliable or _graph.custom_functions(nodes) or found.higher) or "one of its operations"
    return (
        f"{op}: mode '{mode}': u.H v and v.H u differ by {asymmetry:.1e} of |H v|: the derivative of {names} is wrong "
        "(a torch.autograd.Function that detaches, or a fused layer that torch differentiates wrongly)"
    )


@contextlib.contextmanager
def explained(op: str, mode: str, nodes: Sequence[Any] = ()) -> Iterator[None]:
    """Raise what torch raises within, with `reason`."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(reason(op, mode, error, nodes)) from error
