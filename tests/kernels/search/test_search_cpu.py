"""The CPU kernels of line searches, and the reference, against each other and the generator."""

from __future__ import annotations

import pytest
from secant.kernels.search import contract, cpu, reference

import search_cases as search
from search_cases import F32, F64
from secant import Status
from secant.solvers import line_search

BACKENDS = pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])


@BACKENDS
def test_steps_are_those_of_the_generator(backend):
    search.steps_of_the_generator(backend)


@BACKENDS
def test_random_lines(backend):
    search.random_lines(backend)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_a_call_is_that_of_the_reference(dtype, seed):
    rule = search.RULE._replace(ftol=0.1 * (seed % 2))
    search.advance(cpu, 4000, 3, dtype, seed=seed, rule=rule)
    search.begin(cpu, 4000, 3, dtype, seed=seed, rule=rule, first=seed % 2 == 0)


def test_every_size():
    search.sizes(cpu)


def test_rows():
    search.some_rows(cpu)
    search.some_rows(reference)


def test_statuses():
    search.limits(cpu)


def test_long_slopes():
    search.long_slopes(cpu)
    search.long_slopes(reference)


@BACKENDS
def test_neighbours_change_no_bit(backend):
    search.neighbours(backend)


def test_threads_change_no_bit():
    for threads in (1, 2, 3, 7):
        search.advance(cpu, 1001, 10, F64, threads=threads)
        search.begin(cpu, 1001, 10, F64, threads=threads)


def test_numbers_are_those_of_the_other_floors():
    """Kernels import nothing from above."""
    for name in ("CONVERGED", "SMALL_CHANGE", "MAX_ITER", "MAX_EVAL", "STALLED", "NO_DESCENT"):
        assert getattr(contract, name) == Status[name]
    assert contract.RUNNING not in list(Status)
    assert contract.MAX_BLIND == line_search._MAX_BLIND_TRIALS
