"""Checks of arguments and tables of options: one form of error, on every floor of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

REAL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
LARGEST = 2**63 - 1  # what a kernel's integers hold


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which kernels compute what is of this one."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def fail(op: str, name: str, expected: str, got: object) -> ValueError:
    """Make an argument error in its one form: op, argument, what was expected, what came."""
    return ValueError(f"{op}: {name}: expected {expected}, got {got}")


def describe(x: object) -> str:
    """Describe a tensor by shape, dtype and device, anything else by its type."""
    if isinstance(x, Tensor):
        if x.is_nested:
            return f"a nested tensor, {x.dtype}, on {x.device}"
        return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"
    return f"{type(x).__name__} {show(x)}"


def show(x: object) -> str:
    """`repr` of anything, in a length that a message can bear."""
    try:
        text = repr(x)
    except ValueError:  # Python does not write out integers of more than 4300 digits
        return "of more digits than Python writes"
    return text if len(text) <= 80 else text[:60] + "..."


def as_number(x: object) -> float | None:
    """Return a real number, neither bool nor tensor, as a float; None for anything else, and for what is too large."""
    if not isinstance(x, (float, int, Real)) or isinstance(x, bool):
        return None
    try:
        return float(x)
    except OverflowError:
        return None


def number(
    op: str,
    name: str,
    value: object,
    expected: str = "a finite number",
    accept: Callable[[float], bool] = math.isfinite,
) -> float:
    """Return `value` as a float: a real number, neither bool nor tensor, that `accept` takes."""
    x = as_number(value)
    if x is None or not accept(x):
        raise fail(op, name, expected, describe(value))
    return x


def positive(op: str, name: str, value: object, expected: str = "a finite number > 0") -> float:
    """Return `value` as a float in (0, inf)."""
    return number(op, name, value, expected, lambda x: 0.0 < x < math.inf)


def nonnegative(op: str, name: str, value: object, expected: str = "a finite number >= 0") -> float:
    """Return `value` as a float in [0, inf)."""
    return number(op, name, value, expected, lambda x: 0.0 <= x < math.inf)


def integer(op: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int of [low, high]; a bool is none."""
    if is_integer(value, low, LARGEST if high is None else high):
        return int(value)  # type: ignore[call-overload]
    if is_integer(value, LARGEST + 1, math.inf):
        raise fail(op, name, "an integer of at most 63 bits", show(value))
    raise fail(op, name, f"an integer, {low}{f' to {high}' if high is not None else ' or more'}", show(value))


def tensor(
    op: str, name: str, x: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> Tensor:
    """Check that `x` is a strided tensor of an allowed dtype, on `device` when that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise fail(op, name, "a dense (strided) tensor", "a nested tensor")
    if x.layout is not torch.strided:
        raise fail(op, name, "a dense (strided) tensor", f"layout {x.layout}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        kind = " (complex is not supported: pass torch.view_as_real)" if x.dtype.is_complex else ""
        raise TypeError(f"{op}: {name}: expected dtype {allowed}, got {x.dtype}{kind}")
    if device is not None and x.device != device:
        raise fail(op, name, f"device {device}, like the first argument", x.device)
    if x.is_meta:
        raise fail(op, name, "a tensor with memory (for shapes alone, use FakeTensorMode)", "device meta")
    return x


def shaped(op: str, name: str, x: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Check that `x` is a dense tensor of exactly this shape, dtype and device."""
    x = tensor(op, name, x, (dtype,), device)
    if x.shape != shape:
        raise fail(op, name, f"shape {shape}", f"shape {tuple(x.shape)}")
    return x


def shapes(
    op: str,
    expected: Iterable[tuple[str, Tensor | None, str, torch.dtype]],
    device: torch.device,
    sizes: dict[str, int] | None = None,
) -> dict[str, int]:
    """Check tensors whose sizes have to agree, for a kernel that trusts them.

    Args:
        expected: of each its name, itself, its shape and dtype. A shape has a letter a dimension, the same for the same
            size; of a small letter the size is not 0; "?" behind it: None may stand there.
        device: where all of them are. sizes: by letter, those that are known before.

    Returns:
        The sizes by letter.
    """
    found = dict(sizes or {})
    for name, x, shape, dtype in expected:
        letters = shape.removesuffix("?")
        if x is None and letters != shape:
            continue
        x = tensor(op, name, x, (dtype,), device)
        fits = x.dim() == len(letters)
        for letter, size in zip(letters, x.shape, strict=False):
            fits &= found.setdefault(letter, size) == size and (size > 0 or letter.isupper())
        if not fits:
            known = ", ".join(f"{letter} = {size}" for letter, size in found.items() if letter in letters)
            raise fail(op, name, f"shape ({', '.join(letters)}) with {known}", f"shape {tuple(x.shape)}")
    return found


class Option(NamedTuple):
    """What an option may be: in words, and as a predicate that never raises."""

    expected: str
    accept: Callable[[Any], bool]


def is_number(x: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Tell whether `x` is a real number, no bool, with low <= x < high and finite in double precision."""
    value = as_number(x)
    return value is not None and low <= value < high and math.isfinite(value)


def is_integer(x: object, low: int, high: float = LARGEST) -> bool:
    """Tell whether `x` is an integer of [low, high], no bool."""
    return isinstance(x, Integral) and not isinstance(x, bool) and low <= int(x) <= high


def number_from(low: float, high: float = math.inf, expected: str = "") -> Option:
    """Accept a real number of [low, high)."""
    words = f"a finite number >= {low:g}" if math.isinf(high) else f"a number in [{low:g}, {high:g})"
    return Option(expected or words, lambda x: is_number(x, low, high))


def positive_number() -> Option:
    """Accept a real number of (0, inf)."""
    return Option("a finite number > 0", lambda x: is_number(x, 0.0) and x > 0.0)


def integer_from(low: int, high: int | None = None) -> Option:
    """Accept an integer of [low, high]."""
    words = f"an integer >= {low}" if high is None else f"an integer, {low} to {high}"
    return Option(words, lambda x: is_integer(x, low, LARGEST if high is None else high))


def one_of(*choices: object) -> Option:
    """Accept one of these; an array, which equals none of them as a whole, is not."""
    words = " or ".join(filter(None, [", ".join(map(repr, choices[:-1])), repr(choices[-1])]))
    return Option(words, lambda x: any(x is c or (isinstance(x, str) and x == c) for c in choices))


def flag() -> Option:
    """Accept True or False."""
    return Option("True or False", lambda x: isinstance(x, bool))


def or_none(option: Option) -> Option:
    """Accept None besides."""
    return Option(f"None or {option.expected}", lambda x: x is None or option.accept(x))


def options(op: str, table: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Check every option of a table.

    Raises:
        ValueError: for the first one that is not what it may be.
    """
    for name, option in table.items():
        if not option.accept(given[name]):
            raise fail(op, name, option.expected, show(given[name]))
