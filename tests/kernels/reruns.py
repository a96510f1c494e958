"""Test files that run themselves again, in a process of another kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def in_instruction_set(file: str, isa: str) -> None:
    """The whole file where SECANT_ISA chooses the kernels of a CPU."""
    if os.environ.get("SECANT_ISA"):
        return  # that process
    done = _run("-x", file, SECANT_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]


def under_address_sanitizer(file: str, names: Iterable[str]) -> None:
    """Tests of the stand-in where out-of-bounds accesses of tensors, shared memory and stacks are fatal."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no AddressSanitizer runtime")
    done = _run(
        *(f"{file}::{name}" for name in names),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
        SECANT_STANDIN_FLAGS="-fsanitize=address -g",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
