"""The CPU kernels of preconditioned steps against the reference."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.precond import cpu, reference

from precond_cases import (
    BF16,
    F16,
    F32,
    F64,
    RULE,
    RULES,
    bad_steps,
    bad_tiles,
    compare,
    fixed_length,
    gram_matrices,
    newton_inv_root,
    newton_schulz,
    odd_matrices,
    odd_roots,
    run,
    tensors,
    two_phases,
    without_eps,
    zeros,
)

ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
DTYPES = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)


@ALL
@DTYPES
def test_a_step_is_that_of_the_reference(rule, dtype):
    for storage in (F64 if dtype is F64 else F32, BF16):
        compare(cpu, dtype, storage, rule)


@pytest.mark.parametrize("order", ["columns", "spread"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_any_strides(order, dtype):
    """Transposed tensors and tensors with gaps have the very bits of contiguous ones."""
    for rule in (RULES["adam"], RULES["soap"]):
        given, layout = tensors(dtype, F64 if dtype is F64 else F32, rule)
        plain, _ = run(cpu, given, layout, rule)
        other, _ = run(cpu, given, layout, rule, order=order)
        for members, others in zip(plain, other, strict=True):
            for x, y in zip(members, others, strict=True):
                assert torch.equal(x, y)


@ALL
def test_many_sizes(rule):
    """Every tail of a register in either direction, in one call."""
    shapes = [((m, n), 1, 1, "lr") for m, n in zip(range(1, 40), [(7 * i) % 40 + 1 for i in range(39)], strict=True)]
    compare(cpu, F32, F32, rule, shapes=shapes)
    compare(cpu, F64, F64, rule, shapes=shapes)


def test_large_tiles():
    compare(cpu, F32, F32, RULE, shapes=[((150, 260), 1, 1, "lr"), ((260, 70), 1, 1, "lr")])
    compare(cpu, F32, F32, RULES["soap"], shapes=[((150, 260), 1, 1, "lr")])


@ALL
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_bad_gradients_stay_in_their_tiles(rule, dtype):
    bad_tiles(cpu, dtype, rule)
    bad_tiles(reference, dtype, rule)


def test_bad_roots_cost_a_step():
    bad_steps(cpu)
    bad_steps(reference)


@ALL
def test_two_phases_are_one(rule):
    for dtype in (F32, F64, BF16):
        two_phases(cpu, dtype, rule)
    two_phases(reference, F64, rule)


@ALL
def test_zero_gradients(rule):
    for dtype in (F32, F64):
        zeros(cpu, dtype, rule)
        zeros(reference, dtype, rule)


@ALL
def test_no_eps(rule):
    for dtype in (F32, F64, BF16):
        without_eps(cpu, dtype, rule)


def test_lengths_of_grafted_steps():
    fixed_length(cpu)
    fixed_length(reference)


@ALL
def test_threads_and_neighbours_change_no_bit(rule):
    given, layout = tensors(F32, F32, rule)
    one, _ = run(cpu, given, layout, rule, threads=1)
    for threads in (2, 3, 7):
        more, _ = run(cpu, given, layout, rule, threads=threads)
        for members, others in zip(one, more, strict=True):
            assert all(map(torch.equal, members, others))
    order = list(reversed(range(len(layout))))
    turned = type(given)(*([members[k] for k in order] for members in given))
    other, _ = run(cpu, turned, layout[order], rule)
    for members, others in zip(one, other, strict=True):
        assert all(map(torch.equal, members, reversed(others)))


def test_the_rate_may_be_a_tensor():
    for backend in (cpu, reference):
        given, layout = tensors(F32, F32, RULE)
        number, _ = run(backend, given, layout, RULE, lr=2.0**-7)
        for dtype in (F32, F64):
            tensor, _ = run(backend, given, layout, RULE, lr=torch.tensor(2.0**-7, dtype=dtype))
            assert all(map(torch.equal, number.params, tensor.params))


@DTYPES
def test_newton_schulz(dtype):
    for batch, m, n in (
        (1, 1, 1),
        (3, 5, 9),
        (2, 9, 5),
        (1, 64, 64),
        (2, 33, 17),
        (5, 16, 70),
        (1, 200, 230),
        (1, 230, 200),
    ):
        newton_schulz(cpu, batch, m, n, dtype)


def test_newton_schulz_of_odd_matrices():
    odd_matrices(cpu)
    odd_matrices(reference)


@DTYPES
@pytest.mark.parametrize("p", [1, 2, 4])
def test_newton_inv_root(dtype, p):
    for batch, n, rank in ((1, 1, 1), (3, 5, 5), (2, 9, 3), (4, 16, 16), (1, 33, 40), (2, 64, 20), (1, 100, 100)):
        newton_inv_root(cpu, batch, n, rank, p, dtype)
    newton_inv_root(reference, 3, 9, 5, p, dtype)
    if dtype is F32:
        newton_inv_root(cpu, 2, 200, 200, p, dtype)  # by torch's products


def test_newton_inv_root_of_odd_matrices():
    odd_roots(cpu)
    odd_roots(reference)


def test_threads_and_neighbours_change_no_bit_of_a_root():
    a = gram_matrices(7, 20, 20, F32)
    found = []
    for threads in (1, 2, 3):
        out, info = torch.empty_like(a), torch.empty(7, dtype=torch.int32)
        cpu.newton_inv_root(a, 4, 1e-3, 40, 8.6e-5, out, info, threads=threads)
        found.append(out)
    out, info = torch.empty_like(a[:1]), torch.empty(1, dtype=torch.int32)
    cpu.newton_inv_root(a[3:4].contiguous(), 4, 1e-3, 40, 8.6e-5, out, info)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][3], out[0])
