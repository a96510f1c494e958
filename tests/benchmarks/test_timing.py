from __future__ import annotations

import contextlib

import pytest
import torch

from secant.benchmarks import timing
from secant.benchmarks.timing import CudaClock, HostClock, Timed, Timing, clock_for, interleaved, replayed


class VirtualClock:
    """Time that passes only where a call says so."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def mark(self):
        return self.now

    def wait(self):
        pass

    def seconds(self, start, end):
        return end - start

    def call(self, name, seconds):
        def run():
            self.now += seconds
            self.log.append(name)

        return run


def test_times_are_per_call_and_in_turns():
    clock = VirtualClock()
    contenders = {
        "a": Timed([clock.call("a", 2.0)]),
        "b": Timed([clock.call("b", 3.0), clock.call("B", 5.0)]),
    }
    times = interleaved(contenders, clock, seconds=0.0)
    assert times["a"].samples == (2.0,) * timing.MIN_ROUNDS
    assert times["b"].samples == (4.0,) * timing.MIN_ROUNDS
    warm_up = 2 * ["a"] + 2 * ["b", "B"]
    assert clock.log == [*warm_up, "a", "b", "B", "b", "B", "a", "a", "b", "B"]


def test_short_calls_are_repeated_until_the_clock_can_tell():
    clock = VirtualClock()
    times = interleaved({"a": Timed([clock.call("a", timing.SAMPLE_SECONDS / 8)])}, clock, seconds=0.0)
    assert len(clock.log) == 2 + 8 * timing.MIN_ROUNDS
    assert times["a"].median == pytest.approx(timing.SAMPLE_SECONDS / 8)


def test_context_is_entered_around_samples_and_not_timed():
    clock = VirtualClock()

    @contextlib.contextmanager
    def around():
        clock.now += 100.0
        clock.log.append("enter")
        yield
        clock.now += 100.0

    times = interleaved({"a": Timed([clock.call("a", 1.0)], around)}, clock, seconds=0.0)
    assert set(times["a"].samples) == {1.0}
    assert clock.log.count("enter") == 2 + timing.MIN_ROUNDS


def test_timing_summary():
    times = Timing((3.0, 1.0, 2.0, 10.0))
    assert (times.median, times.best) == (2.5, 1.0)
    assert times.spread == pytest.approx((4.75 - 1.75) / 2.5)  # quartiles between the samples 1 2 3 10
    assert Timing((3.0,)).spread == 0.0
    assert times.per(2).samples == (1.5, 0.5, 1.0, 5.0)


def test_clock_of_a_device(monkeypatch):
    assert isinstance(clock_for(torch.device("cpu")), HostClock)
    assert isinstance(clock_for(torch.device("cuda", 1)), CudaClock)


def test_host_clock_measures_what_lies_between_the_marks():
    clock = HostClock()
    marks = [clock.mark() for _ in range(3)]
    assert 0 <= clock.seconds(marks[0], marks[1]) <= clock.seconds(marks[0], marks[2])


class FakeEvent:
    """What torch.cuda.Event does, on a counter of milliseconds."""

    now = 0.0

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "stream of cuda:1"
        self.at = FakeEvent.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_cuda_clock_converts_milliseconds_of_events_in_the_current_stream(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = CudaClock(torch.device("cuda", 1))
    start = clock.mark()
    FakeEvent.now += 250.0
    assert clock.seconds(start, clock.mark()) == pytest.approx(0.25)
    clock.wait()
    assert waited == [torch.device("cuda", 1)]


class FakeGraph:
    """Counts replays; what was called during capture is what a replay stands for."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


def test_replay_keeps_the_length_of_a_turn(monkeypatch):
    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    calls = []
    turn = replayed(Timed([lambda: calls.append("x"), lambda: calls.append("y")]), torch.device("cuda"))
    assert calls == ["x", "y"] * 2  # warm-up, and capture
    for call in turn.calls:
        call()
    assert (len(turn.calls), FakeGraph.replays, len(calls)) == (2, 1, 4)
