"""Cases of a Triton backend, which run in a process of their own: interpreted on the CPU, or compiled on a GPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so one process cannot do both. A family has a script of cases,

    TRITON_INTERPRET=1 python SCRIPT --device cpu [NAME ...]

which prints one JSON object per case, its name and the traceback of its failure or null; and a test file, in which
`make_tests` makes every case a test.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch


class Cases:
    """The cases of a script by name, and the names of those that are slow and of those that need a GPU."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[], None]] = {}
        self.slow: set[str] = set()
        self.gpu_only: set[str] = set()

    def case(
        self, *params: Any, slow: bool = False, gpu: bool = False
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register a function as one case, or as one for each of `params`, tuples of arguments."""

        def register(f: Callable[..., None]) -> Callable[..., None]:
            for args in params or ((),):
                values = [str(a).removeprefix("torch.") for a in args]
                name = f.__name__ + (f"[{'-'.join(values)}]" if values else "")
                assert name not in self.calls
                self.calls[name] = lambda args=args: f(*args)
                if slow:
                    self.slow.add(name)
                if gpu:
                    self.gpu_only.add(name)
            return f

        return register

    def names(self, device: str) -> list[str]:
        """Of the cases for a device."""
        return [name for name in self.calls if device == "cuda" or name not in self.gpu_only]

    def run(self, device: torch.device, names: list[str]) -> None:
        """Run the named cases, all for the device when there are none, and print what came of them."""
        torch.set_num_threads(1)
        if device.type == "cpu":
            _quicken()
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of infinite and missing numbers
        for name in names or self.names(device.type):
            failure, start = None, time.perf_counter()
            try:
                self.calls[name]()
            except Exception:
                failure = traceback.format_exc()
            seconds = time.perf_counter() - start
            print(json.dumps({"name": name, "failure": failure, "seconds": round(seconds, 2)}), flush=True)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[None]:
    """What is called within may not synchronise, on a GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def arguments() -> tuple[torch.device, list[str]]:
    """The device under test and the names of cases, from the command line of a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    return options.device, options.names


def _quicken() -> None:
    """Skip what the interpreter repeats at every call of a function within a kernel, 4 ms: it patches the language."""
    from triton.runtime.interpreter import InterpretedFunction

    patched = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("secant.kernels."):
            return self.rewrite()(*args, **kwargs)
        return patched(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def _parameters(cases: Cases, device: str) -> list:
    gpu_marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    return [
        pytest.param(name, marks=gpu_marks * (device == "cuda") + [pytest.mark.slow] * (name in cases.slow))
        for name in cases.names(device)
    ]


def make_tests(script: ModuleType) -> tuple[Callable[..., None], Callable[..., None]]:
    """`test_cpu` and `test_cuda` of a script, by these names: a test per case of its `CASES`.

    One process per device runs the cases that the session has selected for it.
    """
    found: dict[tuple[str, str], str | None] = {}
    late: set[tuple[str, str]] = set()  # there was no time for them

    def run(device: str, request: pytest.FixtureRequest) -> None:
        names = [
            item.callspec.params["name"]
            for item in request.session.items
            if item.path == request.path and item.originalname == f"test_{device}"
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if device == "cpu" else dict(os.environ)
        command = [sys.executable, script.__file__, "--device", device, *names]
        limit = float(os.environ.get("SECANT_TEST_DEADLINE", "inf")) - time.time()  # of `make gpu`
        try:
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=None if limit == math.inf else limit
            )
            printed = ran.stdout
            died = f"the process ended before this case, with status {ran.returncode}:\n{ran.stderr[-4000:]}"
            found.update({(device, name): died for name in names})
        except subprocess.TimeoutExpired as stopped:
            printed = (stopped.stdout or b"").decode()
            late.update((device, name) for name in names)
        whole = printed[: printed.rfind("\n") + 1]  # a case may have been cut off as it printed
        found.update({(device, line["name"]): line["failure"] for line in map(json.loads, whole.splitlines())})

    def test_of(device: str) -> Callable[..., None]:
        @pytest.mark.timeout(600)
        @pytest.mark.parametrize("name", _parameters(script.CASES, device))
        def test(name, request):
            if (device, name) not in found and (device, name) not in late:
                run(device, request)
            if (device, name) not in found:
                pytest.skip("out of time")
            failure = found[device, name]
            if failure is not None:
                pytest.fail(failure, pytrace=False)

        return test

    return test_of("cpu"), test_of("cuda")


def check_available(backend: ModuleType) -> None:
    """In this process, which does not interpret, only a GPU will do."""
    if torch.cuda.is_available():
        assert backend.available() is None
    else:
        assert backend.available() == "no CUDA device is present and TRITON_INTERPRET=1 is not set"


def check_supports(backend: ModuleType, dtypes: tuple[torch.dtype, ...], names: str) -> None:
    """Of all dtypes `dtypes` and no other, which the refusal `names`; a CPU only for the interpreter."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        reason = backend.supports(torch.device("cuda"), dtype)
        assert reason is None if dtype in dtypes else names in reason
    assert "TRITON_INTERPRET=1" in backend.supports(torch.device("cpu"), torch.float32)
