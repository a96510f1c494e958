"""Random numbers of a closure: the same at every evaluation of a point, and none taken from the program around it."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _States(NamedTuple):
    """Of every generator that can be known: torch's on the CPU and on the device, Python's, numpy's, explicit ones."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any
    explicit: dict[int, Tensor]


class Randomness:
    """Keeps what a closure draws at one point, section by section: the closure at one batch, the reading of a batch.

    A section that is entered for the first time goes on where the one before it ended, the first of all where the
    program stands; entered again, it starts from the same numbers. After each the program finds its generators as they
    were. A generator that is given to functions of torch is kept likewise from its first use on; those of other
    libraries' objects (numpy.random.Generator) cannot be known.

    Args:
        device: of the parameters. foreign: whether Python's and numpy's generators are kept, which takes longer than
            a small closure; not so for one that is known to leave them alone.
    """

    def __init__(self, device: torch.device, *, foreign: bool = True) -> None:
        self._foreign = foreign
        self._module = torch.get_device_module(device) if device.type not in ("cpu", "meta") else None
        self._device = device
        self._starts: dict[Hashable, _States] = {}
        self._last: _States | None = None
        self._explicit: dict[int, torch.Generator] = {}

    def _states(self) -> _States:
        numpy = sys.modules.get("numpy") if self._foreign else None
        return _States(
            torch.get_rng_state(),
            None if self._module is None else self._module.get_rng_state(self._device),
            random.getstate() if self._foreign else None,
            None if numpy is None else numpy.random.get_state(),
            {key: generator.get_state() for key, generator in self._explicit.items()},
        )

    @contextlib.contextmanager
    def own_section(self, key: Hashable) -> Iterator[Callable[[torch.Generator], None]]:
        """Draw within as the program does: its generators go on, or back to where they were if something is raised."""
        start = self._states()
        self._starts[key] = start

        def meet(generator: torch.Generator) -> None:
            if id(generator) not in self._explicit:
                start.explicit[id(generator)] = generator.get_state()
                self._explicit[id(generator)] = generator

        try:
            yield meet
        except BaseException:
            self._set(start, self._states(), {})
            raise

    def is_untouched(self, key: Hashable) -> bool:
        """Tell whether Python's and numpy's generators are where a section began, and no explicit one was met."""
        start, now = self._starts[key], self._states()
        alike = now.numpy is None if start.numpy is None else _alike(start.numpy, now.numpy)
        return self._foreign and not self._explicit and start.python == now.python and alike

    def _set(self, states: _States, now: _States, met: dict[int, torch.Generator]) -> None:
        """Go from the states `now` to others."""
        if not torch.equal(states.cpu, now.cpu):
            torch.set_rng_state(states.cpu)
        if self._module is not None and states.device is not None:
            self._module.set_rng_state(states.device, self._device)
        if states.python is not None and states.python != now.python:
            random.setstate(states.python)
        if states.numpy is not None and not _alike(states.numpy, now.numpy):
            sys.modules["numpy"].random.set_state(states.numpy)
        for key, state in states.explicit.items():
            (self._explicit.get(key) or met[key]).set_state(state)

    @contextlib.contextmanager
    def section(self, key: Hashable) -> Iterator[Callable[[torch.Generator], None]]:
        """Draw within; yields what is to be told of each explicit generator, before it is used."""
        outside = self._states()
        start = self._starts.get(key)
        first = start is None
        if start is None:
            start = outside if self._last is None else self._last
            self._starts[key] = start._replace(explicit={**outside.explicit, **start.explicit})
        if start is not outside:
            self._set(start, outside, {})
        met: dict[int, torch.Generator] = {}

        def meet(generator: torch.Generator) -> None:
            known = id(generator)
            if known in self._explicit or known in met:
                return
            state = generator.get_state()
            outside.explicit[known] = state
            if first:
                self._explicit[known] = generator
                self._starts[key].explicit[known] = state
            else:
                met[known] = generator

        try:
            yield meet
        finally:
            now = self._states()
            if first:
                self._last = now
            self._set(outside, now, met)


def _alike(a: Any, b: Any) -> bool:
    """Tell whether two states of numpy's global generator are the same."""
    return b is not None and a[2:] == b[2:] and bool((a[1] == b[1]).all())


class Meeting(TorchFunctionMode):
    """Tells of every generator that is given to a function of torch."""

    def __init__(self, meet: Callable[[torch.Generator], None]) -> None:
        super().__init__()
        self._meet = meet

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.look(args, kwargs)
        return func(*args, **kwargs)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find generators among the arguments of a call."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Generator):
                self._meet(x)
