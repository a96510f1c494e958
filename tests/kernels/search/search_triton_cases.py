"""Cases that `test_search_triton.py` runs in a process of their own: see `triton_runner.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from secant.kernels.search import triton as kernels

import search_cases as search
from search_cases import F32, F64
from triton_runner import Cases, arguments, watched

CASES = Cases()
case = CASES.case

device = torch.device("cpu")


class backend:
    """The backend under test, which on a GPU may not synchronise."""

    @staticmethod
    def advance(*args: Any) -> None:
        with watched(device):
            kernels.advance(*args)

    @staticmethod
    def begin(*args: Any) -> None:
        with watched(device):
            kernels.begin(*args)


@case(*((dtype, seed) for dtype in (F32, F64) for seed in (0, 1)))
def a_call(dtype: torch.dtype, seed: int) -> None:
    rule = search.RULE._replace(ftol=0.1 * seed)
    search.advance(backend, 1500, 3, dtype, seed=seed, rule=rule, device=device)
    search.begin(backend, 1500, 3, dtype, seed=seed, rule=rule, first=seed == 0, device=device)


@case()
def steps_of_the_generator() -> None:
    search.steps_of_the_generator(backend, search.SETTINGS[::20], device=device)


@case()
def random_lines() -> None:
    search.random_lines(backend, 30, device=device)


@case()
def every_size() -> None:
    search.sizes(backend, 1030 if device.type == "cuda" else 64, device=device)


@case()
def some_rows() -> None:
    search.some_rows(backend, device=device)


@case()
def statuses() -> None:
    search.limits(backend, device=device)


@case()
def long_slopes() -> None:
    search.long_slopes(backend, device, 5000 if device.type == "cuda" else 300)


@case()
def neighbours() -> None:
    search.neighbours(backend, device=device)


if __name__ == "__main__":
    device, names = arguments()
    CASES.run(device, names)
