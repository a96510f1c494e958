"""Registered ops as somebody calls them who passes `secant.ops` by: no kernel sees what does not fit.

Each tensor of a valid call in turn is given one entry more a side, or another dtype: an error, of the dtype by name.
"""

import pytest
import torch

from secant import InverseHessian, LBFGSHistory

OP = torch.ops.secant
F32, F64 = torch.float32, torch.float64
N, B = 5, 3


def blocks(n=N):
    x = torch.randn(B, n, n, generator=torch.Generator().manual_seed(0))
    return x @ x.mT + torch.eye(n)


def calls():
    a, out, info, lam = blocks(), torch.empty(B, N, N), torch.empty(B, dtype=torch.int32), torch.rand(B)
    basis, values = torch.eye(N).repeat(B, 1, 1), torch.empty(B, N)
    right = torch.randn(B, N, 2)
    history, dense = LBFGSHistory(N, 4), InverseHessian(N)
    batch = LBFGSHistory(N, 4, batch=B)
    v, w = torch.randn(N), torch.randn(B, N)
    t = torch.ones(1, dtype=F64)
    pairs, many = torch.randn(4, N), torch.randn(B, 4, N)
    return {
        "block_inv": (OP.block_inv, (a, lam, None, False, True, out, info)),
        "block_solve": (OP.block_solve, (a, right, lam, None, False, True, torch.empty_like(right), info)),
        "block_eigh": (OP.block_eigh, (a, values, out, info, basis)),
        "block_abs_inv": (OP.block_abs_inv, (a, lam, None, out, info, basis)),
        "block_inv_root": (OP.block_inv_root, (a, 2, lam, None, False, out, info, False, basis)),
        "two_loop": (OP.lbfgs_two_loop, (v, pairs, pairs.clone(), None, torch.empty(N))),
        "two_loop of a batch": (OP.lbfgs_two_loop, (w, many, many.clone(), None, torch.empty(B, N))),
        "update": (
            OP.lbfgs_update,
            (*history._state, v, v.clone(), v.clone(), v.clone(), t, 1e-7, torch.empty(N), torch.empty(N)),
        ),
        "update of a batch": (
            OP.lbfgs_update,
            (*batch._state, w, w.clone(), w.clone(), None, t, 1e-7, torch.empty(B, N), torch.empty(B, N)),
        ),
        "dense update": (
            OP.lbfgs_dense_update,
            (*dense._state, v, v.clone(), v.clone(), v.clone(), t, 1e-7, 1, torch.empty(N), torch.empty(N)),
        ),
        "newton_schulz": (OP.newton_schulz, (a, 5, 3.4, -4.8, 2.0, 1e-7, out)),
        "newton_inv_root": (OP.newton_inv_root, (a, 2, 1e-4, 30, 1e-4, out, info)),
    }


CALLS = calls()
PLACES = [
    (name, place, op.default._schema.arguments[place].name)
    for name, (op, args) in CALLS.items()
    for place, x in enumerate(args)
    if isinstance(x, torch.Tensor)
]


def with_(args, place, x):
    return (*args[:place], x, *args[place + 1 :])


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_is_taken(name):
    op, args = CALLS[name]
    op(*(x.clone() if isinstance(x, torch.Tensor) else x for x in args))


@pytest.mark.parametrize(("name", "place", "argument"), PLACES)
def test_a_size_that_does_not_fit(name, place, argument):
    op, args = CALLS[name]
    x = args[place]
    larger = torch.ones([n + 1 for n in x.shape] or [2], dtype=x.dtype)
    with pytest.raises(ValueError, match=f"{op._qualified_op_name.partition('::')[2]}: "):
        op(*with_(args, place, larger))


@pytest.mark.parametrize(("name", "place", "argument"), PLACES)
def test_a_dtype_that_does_not_fit(name, place, argument):
    op, args = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b.*expected"):
        op(*with_(args, place, args[place].to(torch.complex64)))


@pytest.mark.parametrize("name", ["block_inv", "block_solve"])
def test_blocks_larger_than_a_kernel_has_room_for(name):
    op, args = CALLS[name]
    a, out = blocks(65), torch.empty(B, 65, 65)
    with pytest.raises(ValueError, match="a: expected blocks of at most 64 rows, got 65"):
        op(*((a, *args[1:5], out, args[6]) if name == "block_inv" else (a, a, *args[2:6], out, args[7])))


@pytest.mark.parametrize("name", ["block_eigh", "block_abs_inv", "block_inv_root"])
def test_eigenproblems_larger_than_a_kernel_has_room_for(name):
    op, args = CALLS[name]
    n = 129
    sizes = {(B, N, N): torch.empty(B, n, n), (B, N): torch.empty(B, n)}
    grown = [sizes.get(tuple(x.shape), x) if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(ValueError, match="a: expected blocks of at most 128 rows, got 129"):
        op(blocks(n), *grown[1:])


def test_outputs_without_what_is_put_there():
    op, args = CALLS["update"]
    with pytest.raises(ValueError, match="out: expected a tensor where there is no pair"):
        op(*with_(args, 7, None))
    with pytest.raises(ValueError, match="s, y: expected both or neither"):
        op(*with_(args, 9, None))
    with pytest.raises(ValueError, match="grad, s: expected one of them"):
        op(*args[:7], None, None, None, None, *args[11:13], None, None)
