"""Times of several callables on the same input, taken in turns, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

#: Calls are repeated within a sample until it lasts this long, so that reading the clock costs nothing.
SAMPLE_SECONDS = 2e-3
MAX_REPEATS = 10_000
MIN_ROUNDS, MAX_ROUNDS = 3, 50

#: Note of a row whose calls were replayed from a CUDA graph.
REPLAY = "graph replay"

K = TypeVar("K")


class Clock(Protocol):
    """Marks points in the order of the work, and says how far apart they were once that work is done."""

    def mark(self) -> Any:
        """Return a point between what was asked for before and after."""

    def wait(self) -> None:
        """Return when all work asked for is done."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks, after `wait`."""


class HostClock:
    """For work that is done when the call returns."""

    def mark(self) -> float:
        """Return the time now."""
        return time.perf_counter()

    def wait(self) -> None:
        """Wait until all work asked for is done."""

    def seconds(self, start: float, end: float) -> float:
        """Take the time between two marks, after `wait`."""
        return end - start


class CudaClock:
    """Events in the current stream of a device: what the GPU saw, without a synchronisation between the marks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """Return an event in the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Synchronise the device."""
        torch.cuda.synchronize(self.device)

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Time between the events."""
        return start.elapsed_time(end) * 1e-3


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Timed(NamedTuple):
    """Something to time.

    calls: made one after the other, together one turn; the state they leave is the one they started from (a direction
    that alternates, buffers that take turns). around: entered around each sample, outside the time. inside: seconds of
    the last sample, by the clock, that are not to be counted; such calls move a state along, one turn a sample.
    """

    calls: Sequence[Callable[[], object]]
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    inside: Callable[[Clock], float] | None = None


class Timing(NamedTuple):
    """Seconds per call, one number per sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median sample."""
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        """Return the shortest sample."""
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Return the distance of the quartiles relative to the median; 0 for fewer than two samples."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median

    def per(self, count: int) -> Timing:
        """Return the timing of one of `count` parts."""
        return Timing(tuple(x / count for x in self.samples))


def _sample(timed: Timed, repeats: int, clock: Clock) -> float:
    with timed.around():
        start = clock.mark()
        for _ in range(repeats):
            for call in timed.calls:
                call()
        end = clock.mark()
        clock.wait()
    spent = clock.seconds(start, end) - (timed.inside(clock) if timed.inside is not None else 0.0)
    return spent / (repeats * len(timed.calls))


def _repeats(timed: Timed, clock: Clock) -> int:
    """Count the turns that fit a sample; the two turns that find out are the warm-up."""
    _sample(timed, 1, clock)
    turn = _sample(timed, 1, clock) * len(timed.calls)
    return 1 if timed.inside is not None else min(MAX_REPEATS, math.ceil(SAMPLE_SECONDS / max(turn, 1e-9)))


def interleaved(contenders: dict[K, Timed], clock: Clock, *, seconds: float) -> dict[K, Timing]:
    """Time the contenders in turns, A B C, C B A, A B C, so that a disturbance meets all of them.

    Args:
        contenders: by name.
        clock: of the device they run on.
        seconds: to spend on it all, roughly; at least `MIN_ROUNDS` rounds are made whatever they take.

    Returns:
        The timings by name, with the same number of samples each.
    """
    repeats = {name: _repeats(timed, clock) for name, timed in contenders.items()}
    samples: dict[K, list[float]] = {name: [] for name in contenders}
    order, deadline = list(contenders), time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name in order:
            samples[name].append(_sample(contenders[name], repeats[name], clock))
        order.reverse()
    return {name: Timing(tuple(x)) for name, x in samples.items()}


def replayed(timed: Timed, device: torch.device) -> Timed:
    """Make the same calls replays of one CUDA graph: no time of the host in it.

    Raises:
        RuntimeError: the calls cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with timed.around(), torch.cuda.stream(stream):  # warm-up off the default stream, as capture asks
        for call in timed.calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with timed.around(), torch.cuda.graph(graph):
        for call in timed.calls:
            call()
    # One replay stands for all calls of a turn: the others are empty, so that a turn keeps its length.
    return Timed([graph.replay, *[_nothing] * (len(timed.calls) - 1)])


def has_graphs(device: torch.device) -> bool:
    """Say whether calls there can be replayed from a CUDA graph."""
    return device.type == "cuda"


def captured(timed: Timed, device: torch.device) -> Timed | str:
    """Do as `replayed`, or say why not; what a library may not do in a graph is its own affair."""
    try:
        return replayed(timed, device)
    except Exception as failure:
        torch.cuda.synchronize(device)
        return f"not captured: {type(failure).__name__}"


def _nothing() -> None:
    """Do what a graph replay has already done."""
