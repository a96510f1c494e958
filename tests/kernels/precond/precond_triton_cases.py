"""Cases that `test_precond_triton.py` runs in a process of their own: see `triton_runner.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from secant.kernels.precond import triton as kernels

import precond_cases as precond
from precond_cases import BF16, F16, F32, F64, RULES
from triton_runner import Cases, arguments, watched

CASES = Cases()
case = CASES.case

device = torch.device("cpu")
NAMES = tuple(RULES)
#: Tiles within the kernels, and one beyond them.
LARGER = (((70, 90), 1, 1, "lr"), ((30, 70), 1, 2, "lr"))


class backend:
    """The backend under test, which on a GPU may not synchronise."""

    @staticmethod
    def step(*args: Any) -> None:
        with watched(device):
            kernels.step(*args)

    @staticmethod
    def newton_schulz(*args: Any) -> None:
        with watched(device):
            kernels.newton_schulz(*args)

    @staticmethod
    def newton_inv_root(*args: Any) -> None:
        with watched(device):
            kernels.newton_inv_root(*args)


@case(
    *((name, F32, F32) for name in NAMES),
    ("adam", F64, F64),
    ("soap", F64, F64),
    ("adam", F32, BF16),
    ("adam", F64, BF16),
    ("soap", BF16, F32),
)
def step(name: str, dtype: torch.dtype, storage: torch.dtype) -> None:
    precond.compare(backend, dtype, storage, RULES[name], device=device)


@case(
    *((name, dtype, storage) for name in NAMES for dtype, storage in ((F16, F32), (BF16, BF16), (F64, BF16))), slow=True
)
def step_of_other_dtypes(name: str, dtype: torch.dtype, storage: torch.dtype) -> None:
    precond.compare(backend, dtype, storage, RULES[name], device=device)


@case(("columns",), ("spread",))
def step_of_any_strides(order: str) -> None:
    precond.compare(backend, F32, F32, RULES["adam"], device=device, order=order)


@case(("adam",), ("soap",))
def step_of_large_tiles(name: str) -> None:
    precond.compare(backend, F32, F32, RULES[name], device=device, shapes=LARGER)


@case()
def rate_on_the_device() -> None:
    for dtype in (F32, F64):
        precond.compare(backend, F32, F32, RULES["adam"], device=device, lr=torch.tensor(2.0**-7, dtype=dtype))


@case(("adam", F32), ("soap", F32), ("none", F64), ("rms", F16))
def bad_gradients(name: str, dtype: torch.dtype) -> None:
    precond.bad_tiles(backend, dtype, RULES[name], device=device)


@case()
def bad_roots() -> None:
    precond.bad_steps(backend, device=device)


@case(("adam", F32), ("soap", F64))
def two_phases(name: str, dtype: torch.dtype) -> None:
    precond.two_phases(backend, dtype, RULES[name], device=device)


@case(("adam",), ("sgd",), ("soap",))
def zeros(name: str) -> None:
    precond.zeros(backend, F32, RULES[name], device=device)


@case(("adam",), ("soap",))
def no_eps(name: str) -> None:
    precond.without_eps(backend, F32, RULES[name], device=device)


@case()
def lengths_of_grafted_steps() -> None:
    precond.fixed_length(backend, device=device)


SIZES = ((1, 1, 1), (3, 5, 9), (2, 33, 17), (1, 64, 128))


@case(*((*size, dtype) for size in SIZES for dtype in (F32, F64)),
      (2, 9, 5, BF16), (1, 5, 40, F16), (2, 70, 66, F32))  # fmt: skip
def newton_schulz(batch: int, m: int, n: int, dtype: torch.dtype) -> None:
    precond.newton_schulz(backend, batch, m, n, dtype, device=device)


@case()
def newton_schulz_of_odd_matrices() -> None:
    precond.odd_matrices(backend, device=device)


ROOTS = ((1, 1, 1), (3, 5, 5), (2, 9, 3), (1, 33, 40))


@case(*((*size, 2, F32) for size in ROOTS), (2, 30, 30, 4, F32), (2, 17, 9, 1, F32), (2, 20, 7, 4, F64),
      (2, 9, 9, 2, BF16), (1, 5, 5, 4, F16))  # fmt: skip
def newton_inv_root(batch: int, n: int, rank: int, p: int, dtype: torch.dtype) -> None:
    precond.newton_inv_root(backend, batch, n, rank, p, dtype, device=device)


@case()
def newton_inv_root_of_odd_matrices() -> None:
    precond.odd_roots(backend, device=device)


if __name__ == "__main__":
    device, names = arguments()
    CASES.run(device, names)
