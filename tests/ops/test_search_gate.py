"""`BatchedSearch`: what it refuses, how torch sees it, and whole runs on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.search.contract import COUNTS, NUMBERS, RUNNING, Rule, Search

import secant
from secant import Status
from secant.ops import BatchedSearch
from secant.solvers.batched_lbfgs import batched_lbfgs

F32, F64 = torch.float32, torch.float64
OP = torch.ops.secant
RULE = Rule(1e-4, 0.9, 1e-9, 25, 1e-16, 1e-5, 0.0, 100, 100)
SCALES = torch.arange(1.0, 6.0, dtype=F64)


def quadratic(x, scales=SCALES):
    """Values and gradients of (s_j x_j^2 / 2, summed)."""
    scales = scales[: x.shape[1]].to(x.dtype)
    return (scales * x * x).sum(1) / 2, scales * x


def made(b=6, n=3, dtype=F64, **options):
    x = torch.randn(b, n, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    return BatchedSearch(x, *quadratic(x), **options)


def descend(search, rows=None):
    """A round of steepest descent."""
    trial = search.trial if rows is None else search.trial[rows]
    search.advance(*quadratic(trial), rows)
    search.d.copy_(-search.g)
    wide = search.g.double()
    search.begin(-(wide * wide).sum(1), wide.abs().amax(1), rows=rows)


x, v = torch.ones(4, 3), torch.ones(4)
WRONG = [
    (lambda: BatchedSearch([1.0], v, x), TypeError, "BatchedSearch: x: expected a torch.Tensor, got list"),
    (lambda: BatchedSearch(x.half(), v, x), TypeError, "BatchedSearch: x: expected dtype float32 or float64"),
    (lambda: BatchedSearch(x[0], v, x), ValueError, r"BatchedSearch: x: expected shape \(B, n\), not empty"),
    (lambda: BatchedSearch(x[:0], v[:0], x[:0]), ValueError, r"x: expected shape \(B, n\), not empty"),
    (lambda: BatchedSearch(x, v[:3], x), ValueError, r"value: expected shape \(4,\), got shape \(3,\)"),
    (lambda: BatchedSearch(x, v, x.double()), TypeError, "grad: expected dtype float32"),
    (lambda: BatchedSearch(x, v, x, c1=0.0), ValueError, r"c1: expected a number in \(0, 1\), got float 0.0"),
    (lambda: BatchedSearch(x, v, x, c1=0.5, c2=0.4), ValueError, r"c2: expected a number in \(c1, 1\)"),
    (lambda: BatchedSearch(x, v, x, max_trials=0), ValueError, "max_trials: expected an integer, 1 or more, got 0"),
    (lambda: BatchedSearch(x, v, x, gtol=-1.0), ValueError, "gtol: expected a finite number >= 0"),
    (lambda: BatchedSearch(x, v, x, max_iter=True), ValueError, "max_iter: expected an integer"),
    (lambda: made().advance(v, x), ValueError, r"advance: value: expected shape \(6,\)"),
    (lambda: made().advance(torch.ones(6).long(), x), TypeError, "advance: value: expected dtype float32 or float64"),
    (lambda: made().advance(torch.ones(6), torch.ones(6, 3)), TypeError, "advance: grad: expected dtype float64"),
    (lambda: made().advance(v, x, torch.ones(4)), TypeError, "advance: rows: expected dtype int64"),
    (lambda: made().advance(v, x, torch.ones(4, 1).long()), ValueError, r"advance: rows: expected shape \(b,\)"),
    (lambda: made().begin(torch.ones(6), torch.ones(6)), TypeError, "begin: slope: expected dtype float64"),
    (lambda: made().begin(torch.ones(6).double(), torch.ones(5).double()), ValueError, "begin: g_max: expected shape"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steepest_descent_converges(backend, dtype):
    with secant.use_backend(backend):
        search = made(dtype=dtype, gtol=1e-4)
        for _ in range(300):
            descend(search)
    assert search.status.tolist() == [Status.CONVERGED] * 6
    assert float(search.g.abs().max()) <= 1e-4
    assert torch.equal(search.value, quadratic(search.x)[0].double())
    assert torch.equal(search.trial, search.x)
    assert torch.equal(search.step, torch.zeros(6, dtype=F64))
    assert bool((search.nfev > search.nit).all())


def test_what_is_wrong_at_the_start_is_a_status():
    x = torch.zeros(5, 2, dtype=F64)
    g = torch.ones(5, 2, dtype=F64)
    value = torch.ones(5, dtype=F64)
    value[0], g[1, 1], g[2] = torch.nan, torch.inf, 1e-9
    search = BatchedSearch(x, value, g)
    assert search.status.tolist() == [Status.NOT_FINITE] * 2 + [Status.CONVERGED] + [RUNNING] * 2
    assert search.nfev.tolist() == [1] * 5
    assert torch.equal(search.trial[3:], -0.5 * g[3:])  # 1 / |g|_1
    assert torch.equal(search.trial[:3], x[:3])
    assert not search.g[:2].any()


def test_some_rows_are_the_same_as_all_of_them():
    whole, parts = made(), made()
    for _ in range(4):
        descend(whole)
        parts.advance(*quadratic(parts.trial[[4, 0, 2]]), torch.tensor([4, 0, 2]))
        parts.advance(*quadratic(parts.trial[[5, 1, 3]]), torch.tensor([5, 1, 3]))
        parts.d.copy_(-parts.g)
        parts.begin(-(parts.g * parts.g).sum(1), parts.g.abs().amax(1), rows=torch.tensor([0, 1, 2, 3, 4, 5, 17, -3]))
        for y, z in zip(whole._search, parts._search, strict=True):
            assert torch.equal(y, z)


def test_a_part_goes_on_as_it_would_have():
    whole = made()
    descend(whole)
    places = torch.tensor([5, 0])
    part = whole.take(places)
    for _ in range(5):
        descend(whole)
        descend(part)
    for name in ("x", "g", "value", "status", "nit", "nfev", "trial", "step"):
        assert torch.equal(getattr(whole, name)[places], getattr(part, name)), name


def test_a_function_may_return_its_argument():
    """The gradient of |x|^2 / 2 is x; and it may be a view that lies elsewhere."""
    found = []
    for copied in (True, False):
        search = BatchedSearch(
            torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([12.5, 2.5]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
        )
        for _ in range(3):
            grad = search.trial.clone() if copied else search.trial
            search.advance((search.trial * search.trial).sum(1) / 2, grad)
            search.d.copy_(-search.g)
            search.begin(-(search.g.double() ** 2).sum(1), search.g.double().abs().amax(1))
        found.append(search)
    assert all(map(torch.equal, found[0]._search[:6], found[1]._search[:6]))


def test_inputs_of_any_strides():
    def run(change):
        search = made()
        value, grad = quadratic(search.trial)
        search.advance(change(value), change(grad))
        return search._search

    plain = run(lambda y: y)
    for change in (lambda y: torch.stack((y, y), -1)[..., 0], lambda y: torch._neg_view(-y)):
        for y, z in zip(plain, run(change), strict=True):
            assert torch.equal(y, z)
    floats = made()
    value, grad = quadratic(floats.trial)
    floats.advance(value.float().double(), grad)
    other = made()
    other.advance(value.float(), grad)
    assert torch.equal(floats._search.numbers, other._search.numbers)


def test_autograd_learns_of_a_round():
    search = made()
    leaf = torch.ones(3, dtype=F64, requires_grad=True)
    saved = (search.trial * leaf).sum()
    descend(search)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def op_args(name, dtype=F64):
    search = made(dtype=dtype)._search
    value, grad = quadratic(search.trial)
    one = torch.ones(6, dtype=F64)
    brought = (value.double(), grad, None) if name == "search_advance" else (-one, one, 0.5 * one, torch.tensor([4, 1]))
    return (*search, *brought, *RULE)


@pytest.mark.parametrize("name", ["search_advance", "search_begin"])
def test_opcheck(name):
    for dtype in (F32, F64):
        torch.library.opcheck(getattr(OP, name).default, op_args(name, dtype))


@pytest.mark.parametrize("name", ["search_advance", "search_begin"])
def test_the_registered_op_takes_what_lies_anyhow_and_refuses_the_rest(name):
    op, plain, spread = getattr(OP, name), op_args(name), op_args(name)
    op(*plain)
    spread = [torch.stack((y, y), -1)[..., 0] if isinstance(y, torch.Tensor) else y for y in spread]
    op(*spread)
    for y, z in zip(plain[:8], spread[:8], strict=True):
        assert torch.equal(y, z)
    for i in range(8):
        wrong = list(op_args(name))
        wrong[i] = wrong[i][..., :-1].clone() if wrong[i].dim() < 2 else wrong[i][:-1].clone()
        with pytest.raises(ValueError, match=f"{name}: .*: expected shape"):
            op(*wrong)


def test_names_of_rows():
    search = made()._search
    assert search._fields == Search._fields
    assert search.numbers.shape == (len(NUMBERS), 6)
    assert search.counts.shape == (len(COUNTS), 6)


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_a_round_compiles_in_one_graph():
    def program(*args):
        state = [y + 0 for y in args[:8]]
        OP.search_advance(*state, *args[8:])
        return state

    args = op_args("search_advance")
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for y, z in zip(compiled(*args), program(*args), strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_look_of_the_host_now_and_then_changes_no_result(dtype):
    """What has stopped is evaluated on, for nothing."""
    start = torch.randn(40, 4, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)

    def evaluate(x, index):
        rows.append(len(x))
        return quadratic(x - index[:, None].to(x.dtype) / 40)

    rows: list[int] = []
    often = batched_lbfgs(evaluate, start, gtol=1e-4)
    assert sum(rows) == int(often.nfev.sum())
    rows.clear()
    seldom = batched_lbfgs(evaluate, start, gtol=1e-4, check_every=5)
    assert sum(rows) > int(seldom.nfev.sum())
    for y, z in zip(often, seldom, strict=True):
        assert torch.equal(y, z)


def test_every_backend_takes_the_same_steps():
    """With slopes that are one product each, the CPU kernels and the reference agree to the bit through whole runs."""
    start = torch.linspace(-3.0, 3.0, 50, dtype=F64)[:, None]

    def evaluate(x, index):
        y = x[:, 0] - index / 25
        return y**4 - y * y + y, (4 * y**3 - 2 * y + 1)[:, None]

    def run(backend):
        value, g = evaluate(start, torch.arange(50))
        search = BatchedSearch(start, value, g, gtol=1e-6, max_nfev=200)
        with secant.use_backend(backend):
            for _ in range(40):
                search.advance(*evaluate(search.trial, torch.arange(50)))
                search.d.copy_(-search.g / 4)
                search.begin(-(search.g[:, 0] ** 2) / 4, search.g[:, 0].abs())
        return search

    for y, z in zip(run("cpu")._search[:6], run("reference")._search[:6], strict=True):
        assert torch.equal(y, z)
