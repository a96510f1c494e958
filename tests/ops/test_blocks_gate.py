"""The public functions of `secant.ops.blocks`: shapes, strides, dtypes, outputs, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secant
from block_examples import F64, general, indefinite, spd, tolerance, vectors
from secant.ops import block_abs_inv, block_eigh, block_function, block_inv, block_inv_root, block_solve

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, F64, *HALF)

#: Every function as (blocks) -> results, with the blocks that it takes.
FUNCTIONS = {
    "inv": (lambda a: block_inv(a), spd),
    "inv, damped": (lambda a: block_inv(a, damping=("scale", 0.5)), spd),
    "inv, general": (lambda a: block_inv(a, assume="general"), general),
    "solve": (lambda a: block_solve(a, torch.ones(a.shape[:-1], dtype=a.dtype)), spd),
    "solve, general": (
        lambda a: block_solve(a, torch.ones(*a.shape[:-1], 2, dtype=a.dtype), assume="general"),
        general,
    ),
    "eigh": (lambda a: block_eigh(a), indefinite),
    "abs_inv": (lambda a: block_abs_inv(a, floor=0.5), indefinite),
    "inv_root": (lambda a: block_inv_root(a, 4, damping=0.5), spd),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty hands out NaN (and the largest int32), so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    assert torch.empty(1, dtype=torch.int32).item() == torch.iinfo(torch.int32).max
    yield
    torch.use_deterministic_algorithms(False)


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for x, y in zip(left, right, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 33, 64])
def test_against_torch_in_float64(n, dtype):
    near = tolerance(n, dtype)
    kinds = {"spd": spd(5, n=n, dtype=dtype), "general": general(5, n=n, dtype=dtype)}
    for assume, a in kinds.items():
        exact = a.double()
        if assume == "spd":
            exact = exact.tril() + exact.tril(-1).mT
        x, info = block_inv(a, assume=assume)
        assert x.dtype is dtype
        assert info.dtype is torch.int32
        assert info.tolist() == [0] * 5
        torch.testing.assert_close(x.double(), torch.linalg.inv(exact), **near)
        for k in (1, 3, 10):
            b = vectors(5, n, k, dtype=dtype)
            x, info = block_solve(a, b, assume=assume)
            assert not info.any()
            scale = max(1.0, math.sqrt(n)) * 4  # |x| <= |b| here, and |b| <= 4 sqrt(n)
            near_x = {"rtol": near["rtol"], "atol": near["atol"] * scale}
            torch.testing.assert_close(x.double(), torch.linalg.solve(exact, b.double()), **near_x)
    a = indefinite(5, n=n, dtype=dtype)
    exact = a.double().tril() + a.double().tril(-1).mT
    w, _, info = block_eigh(a)
    assert not info.any()
    want, q = torch.linalg.eigh(exact)
    eps = torch.finfo(dtype).eps
    # Weyl: an eigenvalue errs by the norm of the residual, 30 n eps ||A||_1 at most; ||A||_1 <= 3 sqrt(n).
    torch.testing.assert_close(w.double(), want, rtol=0, atol=30 * n * eps * 3 * math.sqrt(n))
    x, info = block_abs_inv(a, floor=0.5)
    assert not info.any()
    assert torch.equal(x, x.mT)
    # An error e of the eigenpairs moves max(|w|, 1/2)^-1 by e / floor^2 at most.
    near_x = {"rtol": near["rtol"], "atol": near["atol"] * 10 + 2 * eps}
    torch.testing.assert_close(x.double(), (q / want.abs().clamp(min=0.5)[:, None]) @ q.mT, **near_x)
    a = kinds["spd"]
    want, q = torch.linalg.eigh(a.double().tril() + a.double().tril(-1).mT)
    for p in (1, 2, 4):
        x, info = block_inv_root(a, p, damping=1.0)
        assert not info.any()
        assert torch.equal(x, x.mT)
        torch.testing.assert_close(x.double(), (q * ((want + 1) ** (-1 / p))[:, None]) @ q.mT, **near_x)


@every
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_any_batch_shape(name, batch):
    f, make = FUNCTIONS[name]
    a = make(*batch)
    results = f(a)
    assert results[-1].shape == batch
    flat = f(a.reshape(-1, 3, 3))
    same(results, tuple(x.reshape(y.shape) for x, y in zip(flat, results, strict=True)))


@every
def test_any_strides(name):
    f, make = FUNCTIONS[name]
    a = make(4, 6, n=5)
    wide = torch.full((4, 6, 10, 10), math.nan, dtype=F64)
    wide[..., ::2, ::2] = a
    padded = torch.full((4, 6, 7, 5), math.nan, dtype=F64)
    padded[..., :5, :] = a
    views = {
        "transposed blocks": a.mT.contiguous().mT,
        "permuted batch": a.transpose(0, 1).contiguous().transpose(0, 1),
        "every other entry": wide[..., ::2, ::2],
        "padded blocks": padded[..., :5, :],
        "blocks first": a.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    }
    want = f(a)
    for view in views.values():
        assert not view.is_contiguous()
        same(f(view), want)
    same(f(a[:, ::2]), tuple(x[:, ::2] for x in want))
    same(f(a[1].flip(0)), tuple(x[1].flip(0) for x in want))
    same(f(a[1, 2].expand(3, 5, 5)), tuple(x[1, 2].expand(3, *x.shape[2:]) for x in want))
    negative = torch._neg_view(-a)
    assert negative.is_neg()
    same(f(negative), want)


@every
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (0, 64, 64)])
def test_empty_batches(name, shape):
    f, _ = FUNCTIONS[name]
    a = torch.empty(shape)
    *results, info = f(a)
    assert info.shape == shape[:-2]
    assert all(x.shape[: len(shape) - 2] == shape[:-2] for x in results)


@pytest.mark.parametrize("batch", [65_535, 65_536, 65_537])
def test_large_batches(batch):
    some = spd(1024, n=2, dtype=torch.float32)
    a = some.repeat(65, 1, 1)[:batch]
    for f in (
        lambda a: block_inv(a),
        lambda a: block_inv(a, assume="general"),
        lambda a: block_solve(a, a[..., 0]),
        lambda a: block_eigh(a),
        lambda a: block_abs_inv(a, floor=2.0),
        lambda a: block_inv_root(a, 2),
    ):
        for few, many in zip(f(some), f(a), strict=True):
            assert torch.equal(many, few.repeat(65, *[1] * (few.dim() - 1))[:batch])


def test_which_right_hand_sides_are_vectors():
    a = spd(4, 3)  # (4, 3, 3, 3)
    for shape in ((3,), (4, 3, 3), (4, 3, 3, 1), (4, 3, 3, 5), (3, 2), (1, 3, 3, 2), (2, 1, 1, 3, 2), (4, 3, 3, 0)):
        b = vectors(*shape)
        x, info = block_solve(a, b)
        want = torch.linalg.solve(a, b)  # (4, 3, 3) is a vector a block, (3, 2) a matrix for all
        assert x.shape == want.shape
        torch.testing.assert_close(x, want, **tolerance(3, F64))
        assert info.shape == torch.broadcast_shapes((4, 3), () if b.dim() == 1 or b.shape == (4, 3, 3) else shape[:-2])
        assert not info.any()
    x, info = block_solve(a[0, 0], vectors(7, 3, 2))
    torch.testing.assert_close(x, torch.linalg.solve(a[0, 0], vectors(7, 3, 2)), **tolerance(3, F64))
    assert info.shape == (7,)
    strided = vectors(3, 4, 3, 2).permute(1, 0, 2, 3)
    same(block_solve(a, strided), block_solve(a, strided.contiguous()))
    same(block_solve(a, strided.mT.contiguous().mT), block_solve(a, strided.contiguous()))


def test_vector_says_what_the_right_hand_side_holds():
    """(n, n) for n blocks, (m, n) shared by m blocks where m is n: by the shape vectors, by the flag what it says."""
    a = spd(3)
    b = vectors(3, 3)
    columns, info = block_solve(a, b, vector=False)  # one matrix for all blocks
    assert columns.shape == (3, 3, 3)
    assert info.shape == (3,)
    torch.testing.assert_close(columns, torch.linalg.solve(a, b.expand(3, 3, 3)), **tolerance(3, F64))
    each, _ = block_solve(a, b, vector=True)
    torch.testing.assert_close(each, torch.linalg.solve(a, b[..., None])[..., 0], **tolerance(3, F64))
    same(block_solve(a, b), block_solve(a, b, vector=True))
    same(block_solve(a, vectors(3, 3, 2)), block_solve(a, vectors(3, 3, 2), vector=False))
    # Vectors with batch dimensions that broadcast, which no shape can tell from matrices.
    wide = spd(4, 1)
    x, info = block_solve(wide, b, vector=True)
    assert x.shape == (4, 3, 3)
    assert info.shape == (4, 3)
    torch.testing.assert_close(x, torch.linalg.solve(wide, b[..., None])[..., 0], **tolerance(3, F64))
    x, _ = block_solve(wide, b, vector=False, assume="general")
    torch.testing.assert_close(x, torch.linalg.solve(wide, b), **tolerance(3, F64))
    x, _ = block_solve(a[0], b[0], vector=True)
    assert x.shape == (3,)
    x, _ = block_solve(a[0], b[:, :1], vector=False)
    assert x.shape == (3, 1)
    out = torch.full((3, 3, 3), math.nan, dtype=F64)
    assert block_solve(a, b.expand(3, 3, 3).contiguous(), vector=False, out=out)[0] is out
    assert torch.equal(out, columns)
    rows = torch.full((3, 3), math.nan, dtype=F64)
    block_solve(a, b, vector=True, out=rows)
    assert torch.equal(rows, each)


def test_no_right_hand_side_still_gives_codes():
    a = spd(3)
    a[1] = 0
    x, info = block_solve(a, torch.empty(3, 3, 0, dtype=F64))
    assert x.shape == (3, 3, 0)
    assert info.tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_every_form_of_damping(dtype, scaled):
    a = spd(2, 3, dtype=dtype)
    amounts = (
        0.5,
        1,
        torch.tensor(0.5),
        torch.tensor([0.5, 0.0, 2.0]),
        vectors(2, 1).abs(),
        vectors(2, 3).abs().float(),
    )
    for amount in amounts:
        given = ("scale", amount) if scaled else amount
        shift = torch.as_tensor(amount, dtype=F64).to(torch.float32 if dtype is not F64 else F64).double().expand(2, 3)
        diagonal = a.double().diagonal(dim1=-2, dim2=-1)
        factor = diagonal if scaled else torch.ones_like(diagonal)
        damped = a.double() + torch.diag_embed(factor * shift[..., None])
        near = tolerance(3, dtype)
        before = a.clone()
        x, info = block_inv(a, damping=given)
        assert not info.any()
        torch.testing.assert_close(x.double(), torch.linalg.inv(damped), **near)
        x, _ = block_inv(a, damping=given, assume="general")
        torch.testing.assert_close(x.double(), torch.linalg.inv(damped), **near)
        x, _ = block_solve(a, a[..., 0], damping=given)
        want = torch.linalg.solve(damped, a[..., 0].double())
        torch.testing.assert_close(x.double(), want, rtol=near["rtol"], atol=10 * near["atol"])
        x, _ = block_inv_root(a, 1, damping=given)
        torch.testing.assert_close(x.double(), torch.linalg.inv(damped), rtol=near["rtol"], atol=10 * near["atol"])
        assert torch.equal(a, before)


def test_floor_per_block():
    a = indefinite(2, 3)
    floor = torch.tensor([[0.1, 1.0, 5.0]])
    together, info = block_abs_inv(a, floor=floor)
    assert not info.any()
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], block_abs_inv(a[i, j], floor=float(floor[0, j]))[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_floors_that_are_none(n, backend):
    """No positive finite number: -2 and NaN in that block alone, also where the block would not need the floor."""
    floors = torch.tensor([0.5, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e-3, math.nan])
    a = torch.diag(torch.arange(1.0, n + 1)).repeat(8, 1, 1)
    a[7, n - 1, 0] = math.nan
    with secant.use_backend(backend):
        x, info = block_abs_inv(a, floor=floors)
        assert info.tolist() == [0, -2, -2, -2, -2, -2, 0, -1]
        assert x[info != 0].isnan().all()
        want = torch.diag(1 / torch.arange(1.0, n + 1))
        torch.testing.assert_close(x[info == 0], want.expand(2, n, n), rtol=4 * torch.finfo(x.dtype).eps, atol=0)
        y = a[:7].clone().requires_grad_()
        (g,) = torch.autograd.grad(block_abs_inv(y, floor=floors[:7])[0].sum(), y)
    assert g[1:6].isnan().all()
    assert g[[0, 6]].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_dampings_that_are_none(n, backend):
    """A negative one is subtracted; one that is not finite makes its own block bad; each as documented."""
    a = 2 * torch.eye(n).repeat(6, 1, 1)
    shift = torch.tensor([-1.0, -3.0, math.nan, math.inf, -math.inf, 0.0])
    eye = torch.eye(n)
    with secant.use_backend(backend):
        for scaled, left in ((False, [1.0, -1.0]), (True, [-2.0, -6.0])):
            damping = ("scale", shift - 1) if scaled else shift
            x, info = block_inv(a, damping=damping, assume="general")
            assert info.tolist() == [0, 0, 1, 1, 1, 0 if not scaled else 1]
            torch.testing.assert_close(x[:2], torch.stack([eye / k for k in left]), rtol=1e-6, atol=0)
            assert x[2:5].isnan().all()
            _, info = block_inv(a, damping=damping)
            assert info.tolist() == [0 if not scaled else 1, 1, 1, 1, 1, 0 if not scaled else 1]
            _, info = block_solve(a, a, damping=damping)
            assert info.tolist() == [0 if not scaled else 1, 1, 1, 1, 1, 0 if not scaled else 1]
            x, info = block_inv_root(a, 2, damping=damping)
            assert info.tolist() == [0 if not scaled else n, n, -1, -1, -1, 0 if not scaled else n]
            x, info = block_function(a, "abs", damping=damping)
            assert info.tolist() == [0, 0, -1, -1, -1, 0]
            torch.testing.assert_close(x[:2], torch.stack([eye * abs(k) for k in left]), rtol=1e-6, atol=0)
            assert x[2:5].isnan().all()


def hostile(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Blocks of every size that the dtype has, graded, singular, of one number, and with entries that are none."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    low, high = math.log10(info.tiny), math.log10(info.max)
    made = []
    for _ in range(4):
        x = torch.randn(n, n, generator=generator, dtype=F64)
        s = x @ x.mT / n + 0.1 * torch.eye(n, dtype=F64)
        size = 10 ** (low + (high - low) * float(torch.rand((), generator=generator)))
        d = 10 ** ((high - low) / 2.2 * (torch.rand(n, generator=generator, dtype=F64) - 0.5))
        spoilt = s.clone()
        spoilt[n // 2, 0] = (math.nan, math.inf, -math.inf)[seed % 3]
        column = x[:, :1]
        made += [s * size, (x + x.mT) * size, s * d.sqrt()[:, None] * d.sqrt(), torch.diag(d), spoilt, 0 * s]
        made += [column @ column.mT, torch.full_like(s, info.max), torch.full_like(s, info.smallest_normal * info.eps)]
    return torch.stack(made).to(dtype)


HOSTILE = {
    "inv": lambda a: block_inv(a),
    "inv, general": lambda a: block_inv(a, assume="general"),
    "solve": lambda a: block_solve(a, torch.ones(a.shape[:-1], dtype=a.dtype)),
    "eigh": lambda a: block_eigh(a),
    "abs_inv": lambda a: block_abs_inv(a, floor=1e-3),
    "inv_root": lambda a: block_inv_root(a, 4),
    "function": lambda a: block_function(a, "log"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("n", [1, 2, 5, 9, 24, 33])
def test_hostile_contents(name, n):
    """A code and NaN all over, or neither; the same alone; no code differs from the reference's but by rounding."""
    f = HOSTILE[name]
    for dtype in (torch.float32, F64):
        a = hostile(n, dtype, n)
        *results, info = f(a)
        largest = float(torch.finfo(dtype).max)
        for x in results:
            failed = x.isnan().flatten(1).any(1)
            assert x[info != 0].isnan().all() or name == "eigh"
            # Only an inverse that overflows may be infinite, and NaN, without a code.
            tiny = a.double().abs().flatten(1).amax(1) < 64 * n / largest
            graded = torch.arange(len(a)) % 9 == 2
            assert not (failed & (info == 0) & ~tiny & ~graded).any()
        for i in range(len(a)):
            alone = f(a[i : i + 1])
            for x, y in zip(alone, (*results, info), strict=True):
                assert torch.equal(torch.nan_to_num(x[0]), torch.nan_to_num(y[i])) or name == "function"
        with secant.use_backend("reference"):
            codes = f(a)[-1]
        regular = torch.arange(len(a)) % 9 <= 5  # the others are singular but for rounding, or overflow in float32
        assert torch.equal((codes != 0)[regular], (info != 0)[regular]), name


def test_out():
    a, b = spd(2, 3), vectors(2, 3, 3)
    for assume in ("spd", "general"):
        want, codes = block_inv(a, assume=assume)
        out = torch.full_like(a, math.nan)
        x, info = block_inv(a, assume=assume, out=out)
        assert x is out
        same((x, info), (want, codes))
        wide = torch.full((2, 3, 3, 6), math.nan, dtype=F64)
        block_inv(a, assume=assume, out=wide[..., ::2])
        assert torch.equal(wide[..., ::2], want)
        assert wide[..., 1::2].isnan().all()
        x = a.clone()
        assert block_inv(x, assume=assume, out=x)[0] is x
        assert torch.equal(x, want)
        turned = a.mT.clone(memory_format=torch.contiguous_format).mT
        block_inv(turned, assume=assume, out=turned)
        assert torch.equal(turned, want)

        want, codes = block_solve(a, b, assume=assume)
        out = torch.full_like(b, math.nan)
        x, info = block_solve(a, b, assume=assume, out=out)
        assert x is out
        same((x, info), (want, codes))
        x = b.clone()
        block_solve(a, x, assume=assume, out=x)
        assert torch.equal(x, want)
        two = torch.full((2, 3, 3, 2), math.nan, dtype=F64)
        block_solve(a, b, assume=assume, out=two[..., 0])
        assert torch.equal(two[..., 0], want)
        assert two[..., 1].isnan().all()
    one = b[0, 0].clone()
    x, _ = block_solve(a, one, out=torch.empty_like(b))
    same((x,), block_solve(a, one)[:1])


def bad_calls():
    a, b = torch.eye(3).repeat(4, 1, 1), torch.ones(4, 3)

    def solve(a):
        return block_solve(a, b)

    for f, name in (
        (block_inv, "block_inv"),
        (solve, "block_solve"),
        (block_eigh, "block_eigh"),
        (lambda a: block_abs_inv(a, floor=1.0), "block_abs_inv"),
        (lambda a: block_inv_root(a, 2), "block_inv_root"),
    ):
        yield f"{name} list", lambda f=f: f([1.0]), TypeError, f"{name}: a: expected a torch.Tensor, got list"
        yield f"{name} int", lambda f=f: f(a.int()), TypeError, f"{name}: a: expected dtype float32 or float64"
        yield f"{name} complex", lambda f=f: f(a.cfloat()), TypeError, "complex is not supported"
        yield f"{name} sparse", lambda f=f: f(a.to_sparse()), ValueError, f"{name}: a: expected a dense (strided)"
        yield (
            f"{name} vector",
            lambda f=f: f(a[0, 0]),
            ValueError,
            f"{name}: a: expected square blocks, shape (..., n, n)",
        )
        yield (
            f"{name} oblong",
            lambda f=f: f(a[:, :2]),
            ValueError,
            "square blocks, shape (..., n, n), got shape (4, 2, 3)",
        )
        largest = 64 if f in (block_inv, solve) else 128
        for n in (0, largest + 1):
            yield (
                f"{name} {n}",
                lambda f=f, n=n: f(torch.ones(2, n, n)),
                ValueError,
                f"{name}: a: expected blocks of 1 to {largest}",
            )
    for f in (block_inv, lambda a, **kw: block_solve(a, b, **kw)):
        yield "assume", lambda f=f: f(a, assume="pd"), ValueError, "assume: expected 'spd' or 'general', got 'pd'"
    for f in (block_inv, lambda a, **kw: block_solve(a, b, **kw), lambda a, **kw: block_inv_root(a, 2, **kw)):
        for amount in (-1.0, math.nan, math.inf, "x", ("scale", -1.0), ("scale", None)):
            yield (
                f"damping {amount}",
                lambda f=f, d=amount: f(a, damping=d),
                ValueError,
                "damping: expected a finite number",
            )
        for amount in (("diag", 1.0), ("scale",), ("scale", 1.0, 2.0)):
            yield (
                f"damping {amount}",
                lambda f=f, d=amount: f(a, damping=d),
                ValueError,
                "damping: expected a number, a t",
            )
        for shape in ((3,), (2, 4), (4, 1)):
            yield (
                f"damping of shape {shape}",
                lambda f=f, s=shape: f(a, damping=torch.ones(s)),
                ValueError,
                f"damping: expected a number per block, of a shape that broadcasts to (4,), got shape {shape}",
            )
        yield "damping int", lambda f=f: f(a, damping=torch.ones(4).int()), TypeError, "damping: expected dtype float32"
        yield (
            "damping device",
            lambda f=f: f(a, damping=torch.ones(4, device="meta")),
            ValueError,
            "expected device cpu",
        )
    for floor in (0, -1.0, math.nan, math.inf, "x", None):
        yield (
            f"floor {floor}",
            lambda v=floor: block_abs_inv(a, floor=v),
            ValueError,
            "floor: expected a positive finite",
        )
    yield "floor shape", lambda: block_abs_inv(a, floor=torch.ones(3)), ValueError, "floor: expected a number per block"
    yield (
        "floor grad",
        lambda: block_abs_inv(a, floor=torch.ones(4, requires_grad=True)),
        ValueError,
        "floor: expected a tensor that does not require grad",
    )
    for amount in (0.0, -1.0, math.nan, math.inf, "x", None):
        yield (
            f"relative damping {amount}",
            lambda d=amount: block_inv_root(a, 2, damping=("max", d)),
            ValueError,
            "block_inv_root: damping: expected ('max', a positive finite number",
        )
    yield "relative damping", lambda: block_inv(a, damping=("max", 0.1)), ValueError, "damping: expected a number, a t"
    for f in (
        block_eigh,
        lambda a, **kw: block_abs_inv(a, floor=1.0, **kw),
        lambda a, **kw: block_inv_root(a, 2, **kw),
    ):
        yield (
            "vectors",
            lambda f=f: f(a, vectors=a[:2]),
            ValueError,
            "vectors: expected shape (4, 3, 3), as a, got",
        )
        yield "dtype of vectors", lambda f=f: f(a, vectors=a.half()), TypeError, "vectors: expected dtype float32"
    for p in (0, 3, -1, 2.0, "2", None):
        yield f"p {p}", lambda p=p: block_inv_root(a, p), ValueError, "block_inv_root: p: expected 1, 2 or 4"
    for flag in (0, 1, "vector", torch.tensor(True)):
        yield (
            f"vector {flag!r}",
            lambda v=flag: block_solve(a, b, vector=v),
            ValueError,
            "block_solve: vector: expected True, False or None, got ",
        )
    for shape in ((), (2,), (4, 3, 2)):
        yield (
            f"vectors of shape {shape}",
            lambda s=shape: block_solve(a, torch.ones(s), vector=True),
            ValueError,
            f"block_solve: b: expected vectors, shape (..., 3), for a of shape (4, 3, 3), got shape {shape}",
        )
    for shape in ((), (3,), (4, 2)):
        yield (
            f"matrices of shape {shape}",
            lambda s=shape: block_solve(a, torch.ones(s), vector=False),
            ValueError,
            f"block_solve: b: expected matrices, shape (..., 3, k), for a of shape (4, 3, 3), got shape {shape}",
        )
    yield "b list", lambda: block_solve(a, [1.0]), TypeError, "block_solve: b: expected a torch.Tensor, got list"
    yield "b dtype", lambda: block_solve(a, b.double()), TypeError, "block_solve: b: expected dtype float32"
    yield "b device", lambda: block_solve(a, b.to("meta")), ValueError, "block_solve: b: expected device cpu"
    for shape in ((), (4,), (4, 2), (4, 2, 3)):
        yield (
            f"b of shape {shape}",
            lambda s=shape: block_solve(a, torch.ones(s)),
            ValueError,
            f"b: expected shape (3,), (4, 3) or (..., 3, k) for a of shape (4, 3, 3), got shape {shape}",
        )
    yield (
        "b batch",
        lambda: block_solve(a, torch.ones(5, 3, 2)),
        ValueError,
        "batch dimensions that broadcast with (4,)",
    )
    for f in (block_inv, lambda a, **kw: block_solve(a, a.clone(), **kw)):
        yield "out shape", lambda f=f: f(a, out=torch.empty(4, 3)), ValueError, "out: expected shape (4, 3, 3)"
        yield "out dtype", lambda f=f: f(a, out=a.double()), TypeError, "out: expected dtype float32"
        yield "out device", lambda f=f: f(a, out=a.to("meta")), ValueError, "out: expected device cpu"
        yield "out list", lambda f=f: f(a, out=[1.0]), TypeError, "out: expected a torch.Tensor"
        one = torch.empty(3, 3).expand(4, 3, 3)
        yield "out expanded", lambda f=f, o=one: f(a, out=o), ValueError, "out: expected an address of its own for each"
    yield "out turned", lambda: block_inv(a, out=a.mT), ValueError, "out: expected a itself or no overlap with it"
    yield "out shifted", lambda: shifted(block_inv), ValueError, "out: expected a itself or no overlap with it"
    yield "out in a", lambda: block_solve(a, a.clone(), out=a), ValueError, "out: expected no overlap with a"
    yield (
        "b shifted",
        lambda: shifted(lambda x, out: block_solve(a, x, out=out)),
        ValueError,
        "out: expected b itself or no overlap with it",
    )
    memory = torch.ones(4, 3, 3)
    yield (
        "out over damping",
        lambda: block_inv(a, damping=memory[:, 0, 0], out=memory),
        ValueError,
        "out: expected no overlap with damping",
    )
    grad = torch.eye(3, requires_grad=True)
    yield (
        "grad",
        lambda: block_inv(grad, out=torch.empty(3, 3)),
        ValueError,
        "out: expected None when an argument is being",
    )
    yield (
        "out grad",
        lambda: block_inv(a, out=a.clone().requires_grad_()),
        ValueError,
        "out: expected None when an argum",
    )
    yield "solve grad", lambda: block_solve(a[0], grad, out=torch.empty(3, 3)), ValueError, "out: expected None when an"


def shifted(f):
    line = torch.ones(5, 3, 3)
    return f(line[:4], out=line[1:])


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_scalar_on_the_device_is_a_damping():
    a = spd(4)
    same(block_inv(a, damping=torch.tensor(0.5, dtype=F64)), block_inv(a, damping=0.5))


def test_an_explicit_backend():
    a = spd(4)
    with secant.use_backend("reference"):
        want = block_inv(a)[0]
    torch.testing.assert_close(block_inv(a)[0], want, **tolerance(3, F64))
    with secant.use_backend("cuda"), pytest.raises(secant.BackendError, match=r"'cuda' was chosen for secant\.blocks"):
        block_inv(a)


def bad_blocks(n: int, dtype: torch.dtype) -> Tensor:
    zero, negative, nan, inf = torch.zeros(n, n), -torch.eye(n), torch.eye(n), torch.eye(n)
    nan[n - 1, 0], inf[n // 2, 0] = math.nan, math.inf
    last = torch.eye(n)
    last[n - 1, n - 1] = 0
    return torch.stack([zero, negative, nan, inf, last]).to(dtype)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 17])
def test_bad_blocks_poison_only_themselves(name, n, dtype):
    f, make = FUNCTIONS[name]
    good = make(21, n=n, dtype=dtype)
    clean = f(good)
    assert not clean[-1].any()
    bad = bad_blocks(n, dtype)
    where = torch.tensor([0, 3, 8, 9, 25])
    rest = torch.tensor([i for i in range(26) if i not in where.tolist()])
    mixed = torch.empty(26, n, n, dtype=dtype)
    mixed[where], mixed[rest] = bad, good
    results = f(mixed)
    same(tuple(x[rest] for x in results), clean)
    failed = results[-1][where] != 0
    assert failed[2]  # NaN: in every function
    assert failed[3]  # Inf
    for x in results[:-1]:
        assert x[where][failed].isnan().all()
        assert x[where][~failed].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_earlier_vectors(dtype):
    """Any strides; the results are those without, to rounding, and in transformed calls the same."""
    a = indefinite(7, n=5, dtype=dtype)
    w, v, _ = block_eigh(a)
    warm = block_eigh(a, vectors=v.mT.contiguous().mT)
    near = tolerance(5, dtype)
    torch.testing.assert_close(warm[0], w, **near)
    x = block_abs_inv(a, floor=0.5, vectors=v)[0]
    torch.testing.assert_close(x, block_abs_inv(a, floor=0.5)[0], **near)
    x = block_inv_root(a, 2, damping=("max", 0.1), vectors=v)[0]
    torch.testing.assert_close(x, block_inv_root(a, 2, damping=("max", 0.1))[0], **near)
    got = torch.func.vmap(lambda a, v: block_eigh(a, vectors=v)[0])(a, v)
    torch.testing.assert_close(got, w, **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 6, 17])
def test_clamped_roots_beside_bad_blocks(n, dtype):
    """Codes count what was clamped and take nothing away; a block that has no result has a code below zero."""
    good, bad = spd(21, n=n, dtype=dtype), bad_blocks(n, dtype)
    clean, info = block_inv_root(good, 2, damping=("max", 0.1))
    assert not info.any()
    x, info = block_inv_root(torch.cat([bad, good]), 2, damping=("max", 0.1))
    same((x[5:], info[5:]), (clean, torch.zeros_like(info[5:])))
    assert info[:5].tolist() == [0, n, -1, -1, 0]
    assert x[2:4].isnan().all()
    assert not x[:2].any()
    want = (torch.arange(n) < n - 1).double() * 1.1**-0.5 + (torch.arange(n) == n - 1).double() * 0.1**-0.5
    if n > 1:
        torch.testing.assert_close(x[4].double(), torch.diag(want), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_codes_are_those_of_torch():
    for n in (1, 2, 3, 5, 8, 20):
        generator = torch.Generator().manual_seed(n)
        a = spd(40, n=n, dtype=F64)
        for i in range(0, 40, 2):  # a negative diagonal entry, or a row and column of zeros
            k = int(torch.randint(n, (), generator=generator))
            if i % 4:
                a[i, k, k] = -1
            else:
                a[i, k], a[i, :, k] = 0, 0
        assert torch.equal(block_inv(a)[1], torch.linalg.cholesky_ex(a).info)
        assert torch.equal(block_solve(a, a[..., 0])[1], torch.linalg.cholesky_ex(a).info)
        a = general(40, n=n, dtype=F64)
        for i in range(0, 40, 2):
            a[i, :, int(torch.randint(n, (), generator=generator))] = 0
        assert torch.equal(block_inv(a, assume="general")[1], torch.linalg.inv_ex(a).info)
        assert torch.equal(block_solve(a, a[..., 0], assume="general")[1], torch.linalg.inv_ex(a).info)


def test_tiny_and_huge_blocks_need_no_jitter():
    for dtype in (torch.float32, F64):
        eye, eps = torch.eye(5, dtype=dtype), torch.finfo(dtype).eps
        for scale in (1e-8, 1e-30, 1e30):
            for assume in ("spd", "general"):
                x, info = block_inv(scale * eye, assume=assume)
                assert info == 0
                want = (1 / (scale * eye.double().diagonal().to(dtype).double())).mean()
                assert (x.double() - want * eye).abs().max() <= 4 * eps * want  # 4 ulp
        swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
        assert torch.equal(block_inv(swap, assume="general")[0], swap)
        d = torch.tensor([1e-20, 1e18, 1e-5, 2e3], dtype=dtype)
        x, info = block_inv(torch.diag(d))
        assert info == 0
        torch.testing.assert_close(x.diagonal().double(), 1 / d.double(), rtol=4 * eps, atol=0)


@every
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 40), seed=st.integers(0, 2**20), half=st.booleans())
def test_a_permuted_batch_gives_permuted_bits(name, n, batch, seed, half):
    f, make = FUNCTIONS[name]
    a = make(batch, n=n, dtype=torch.bfloat16 if half else torch.float32, seed=seed)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    same(f(a[order]), tuple(x[order] for x in f(a)))
    keep = order[: (batch + 1) // 2]
    same(f(a[keep]), tuple(x[keep] for x in f(a)))


def test_larger_eigenproblems(monkeypatch):
    """100 rows on the CPU, with derivatives; a backend that ends at 64 says so, and so does the op."""
    a = indefinite(2, n=100)
    w, v, info = block_eigh(a)
    assert not info.any()
    torch.testing.assert_close((v * w[:, None, :]) @ v.mT, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(block_abs_inv(a, floor=1e-3)[0], (v / w.abs()[:, None, :]) @ v.mT, rtol=0, atol=1e-11)
    p = spd(2, n=100)
    root = block_inv_root(p, 2)[0]
    torch.testing.assert_close(root @ root @ p, torch.eye(100, dtype=F64).expand(2, 100, 100))
    torch.testing.assert_close(block_function(p, "sqrt")[0] @ block_function(p, "sqrt")[0], p)
    leaf = p[0].clone().requires_grad_()
    block_eigh(leaf)[0].log().sum().backward()
    torch.testing.assert_close(leaf.grad, torch.linalg.inv(p[0]))
    monkeypatch.delattr(secant.backends.load("blocks", "cpu"), "EIGEN_N")
    for call in (
        lambda: block_eigh(a),
        lambda: block_abs_inv(a, floor=1.0),
        lambda: block_inv_root(a, 2),
        lambda: block_function(a, "abs"),
    ):
        with pytest.raises(secant.BackendError, match=r"block_\w+: backend 'cpu' finds .* of at most 64 rows, got 100"):
            call()
    assert not block_eigh(a[:, :64, :64])[2].any()
