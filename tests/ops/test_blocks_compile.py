"""The registered ops of the `blocks` family, and the public functions under torch.compile."""

from __future__ import annotations

import pytest
import torch

from block_examples import general, indefinite, spd, vectors
from secant.ops import block_abs_inv, block_eigh, block_inv, block_inv_root, block_solve

F32 = torch.float32
lam = vectors(4, dtype=F32).abs()
b = vectors(4, 3, dtype=F32)

CASES = {
    "inv": (lambda a: block_inv(a), spd),
    "inv, number": (lambda a: block_inv(a, damping=0.5), spd),
    "inv, tensor": (lambda a: block_inv(a, damping=("scale", lam)), spd),
    "inv, general": (lambda a: block_inv(a, assume="general"), general),
    "solve": (lambda a: block_solve(a, b, damping=lam), spd),
    "solve, matrices": (lambda a: block_solve(a, a @ a, damping=0.1), spd),
    "solve, vectors": (lambda a: block_solve(a, b[:3], vector=True), lambda n, dtype: spd(n, 1, dtype=dtype)),
    "solve, one matrix": (lambda a: block_solve(a[:3], b[:3], vector=False), spd),
    "solve, general": (lambda a: block_solve(a, b, assume="general"), general),
    "eigh": (lambda a: (lambda w, v, info: (w, v.abs(), info))(*block_eigh(a)), indefinite),
    "abs_inv": (lambda a: block_abs_inv(a, floor=0.5), indefinite),
    "abs_inv, tensor": (lambda a: block_abs_inv(a, floor=lam + 0.1), indefinite),
    "inv_root": (lambda a: block_inv_root(a, 4, damping=lam), spd),
    "inv_root, clamped": (lambda a: block_inv_root(a, 2, damping=("max", 0.1)), spd),
}
every = pytest.mark.parametrize("name", CASES)


@every
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_compiles_in_one_graph(name, turned):
    f, make = CASES[name]
    a = make(4, dtype=F32)
    if turned:
        a = a.mT.contiguous().mT
    torch.compiler.reset()
    compiled = torch.compile(lambda a: tuple(x + 0 for x in f(a * 2)), fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(a), f(a * 2), strict=True):
        assert torch.equal(x, y)


@every
def test_the_backward_pass_compiles(name):
    f, make = CASES[name]
    a = make(4, dtype=F32)
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda a: (f(a)[0] ** 2).sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    (f(y)[0] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5 * float(y.grad.abs().max()))


def test_compiled_out():
    def f(a, b):
        x, info = block_inv(a, out=a)
        y, codes = block_solve(x, b, out=b)
        return y + 1, info + codes

    a, right = spd(4, dtype=F32), b.clone()
    want = f(a.clone(), right.clone())
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    ours, theirs = a.clone(), right.clone()
    for x, y in zip(compiled(ours, theirs), want, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(ours, block_inv(a)[0])
    assert torch.equal(theirs + 1, want[0])


def test_dynamic_batches():
    torch.compiler.reset()
    compiled = torch.compile(lambda a: block_inv(a * 2)[0] + 1, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 7, 9):
        a = spd(batch, dtype=F32)
        assert torch.equal(compiled(a), block_inv(a * 2)[0] + 1)


def opcheck_cases():
    ops = torch.ops.secant
    a, g, s = spd(4, dtype=F32), general(4, dtype=F32), indefinite(4, dtype=F32)
    out, info = torch.empty_like(a), torch.empty(4, dtype=torch.int32)
    for assume, x in ((True, a), (False, g)):
        yield ops.block_inv, (x, None, None, False, assume, out, info)
        yield ops.block_inv, (x, lam, None, True, assume, out, info)
        yield ops.block_solve, (x, x.clone(), None, 0.5, False, assume, out, info)
    yield ops.block_eigh, (s, torch.empty(4, 3), out, info)
    yield ops.block_eigh, (s, torch.empty(4, 3), out, info, torch.eye(3).expand(4, 3, 3))
    yield ops.block_abs_inv, (s, None, 0.5, out, info)
    yield ops.block_inv_root, (a, 4, lam, None, False, out, info)
    yield ops.block_inv_root, (a, 4, lam, None, False, out, info, True)


@pytest.mark.parametrize(("op", "args"), list(opcheck_cases()), ids=lambda x: getattr(x, "__name__", ""))
def test_opcheck(op, args):
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("name", ["inv", "inv, number", "inv, general", "solve, matrices", "eigh", "abs_inv"])
def test_fake_tensors_have_the_right_shapes(name):
    f, make = CASES[name]
    a = make(4, dtype=F32)
    want = f(a)
    traced = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="fake")(a)
    for x, y in zip(traced(a), want, strict=True):
        assert torch.equal(x, y)
