"""Test files that run themselves again, in a process of another kind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest


def run_again(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own, whose variables of the environment differ."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def under_address_sanitizer(file: str, names: Iterable[str]) -> None:
    """Tests of the stand-in where out-of-bounds accesses of tensors, shared memory and stacks are fatal."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("g++ has no AddressSanitizer runtime")
    done = run_again(
        *(f"{file}::{name}" for name in names),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0",
        SECANT_STANDIN_FLAGS="-fsanitize=address -g",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
