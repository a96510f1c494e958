"""Every op on every backend: fresh inputs against float64, graphs, compiled programs, more elements than 31 bits count.

On a GPU inputs are drawn anew in each run; SECANT_SEED repeats one. What is not about a GPU is checked on a CPU too,
where the seed is fixed.
"""

from __future__ import annotations

import functools
import math
import os
import random

import pytest
import torch

import secant
from secant import backends, ops
from secant.benchmarks import peers
from secant.benchmarks.case import no_compile
from secant.benchmarks.families import blocks, hvp, lbfgs
from secant.solvers.batched_lbfgs import batched_lbfgs
from triton_runner import watched

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FRESH = random.SystemRandom().getrandbits(31) if torch.cuda.is_available() else 1
SEED = int(os.environ.get("SECANT_SEED") or FRESH)
NAMES = ("cuda", "nvrtc", "triton")
everywhere = pytest.mark.parametrize(
    ("name", "device"), [("cpu", CPU), *(pytest.param(name, GPU, marks=gpu) for name in NAMES)]
)
on_gpus = pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in NAMES])


def use(family, name, device):
    """The context in which a backend serves; skips where it is not to be had."""
    module = backends.load(family, name)
    reason = module if isinstance(module, str) else module.supports(device, F32)
    if reason is not None:
        pytest.skip(f"{family}: {reason}")
    return secant.use_backend(name)


@pytest.fixture
def poisoned():
    """What torch.empty returns is NaN, or the largest integer, so that nothing can rest on what lay there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def spread(x):
    """The same numbers in rows that are further apart than they are long."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), math.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@everywhere
@pytest.mark.parametrize("trial", range(3))
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_directions_of_fresh_inputs(name, device, trial, poisoned):
    draw = random.Random(f"{SEED} lbfgs {trial}")
    dtype, storage = draw.choice([(F32, F32), (F32, BF16), (F64, F64), (F64, F32)])
    n, batch = draw.choice([(draw.randint(1, 600), draw.randint(2, 400)), (2 * draw.randint(100, 40_000) + 1, 0)])
    case = lbfgs.Case("two_loop", n, draw.randint(1, 12), batch, dtype, storage)
    with use("lbfgs", name, device):
        problem = lbfgs.Problem(case, device, draw.getrandbits(31))
        want, amplification = problem.exact(storage, stepped=False)
        got = ops.two_loop(problem.g, spread(problem.s.to(storage)), spread(problem.y.to(storage)))
        norm = functools.partial(torch.linalg.vector_norm, dim=-1)
        error = float((norm(got.double() - want) / norm(want)).max())
        assert error <= peers.tolerance(case.m, amplification, dtype, 0.0), (SEED, case)
        for op in ("direction", "step"):
            found = case.replace(op=op).contenders(problem, lambda case, other: other == name)
            assert found[0].check(problem).excess <= 1, (SEED, case, op)


@everywhere
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_dense_updates_of_fresh_inputs(name, device, dtype, poisoned):
    """Pairs of a quadratic, whose H y = s; and the direction is that of the matrix."""
    draw = random.Random(f"{SEED} dense {dtype}")
    torch.manual_seed(draw.getrandbits(31))
    with use("lbfgs", name, device):
        for n in (draw.randint(1, 64), draw.randint(65, 128), draw.randint(129, 700)):
            h = secant.InverseHessian(n, rule=draw.choice(("bfgs", "ssbroyden")), dtype=dtype, device=device)
            curvature = 1 + torch.rand(n, dtype=F64, device=device)
            for _ in range(4):
                s = torch.randn(n, dtype=dtype, device=device)
                y = (curvature * s).to(dtype)
                assert h.append(s, y) == 1
            g = torch.randn(n, dtype=dtype, device=device)
            d, matrix = h.direction(g).double(), h.matrix().double()
            # H is within 1/2 .. 1 of I, four updates of rank two; n roundings of dot products at most.
            size = (n + 100) * torch.finfo(dtype).eps
            assert float((matrix @ y.double() - s.double()).norm()) <= size * float(s.double().norm()), (SEED, n)
            assert float((matrix @ g.double() + d).norm()) <= size * float(g.double().norm()), (SEED, n)


@everywhere
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("op", "assume"), blocks.KINDS)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_blocks_of_fresh_inputs(name, device, op, assume, dtype, poisoned):
    draw = random.Random(f"{SEED} {op} {assume} {dtype}")
    with use("blocks", name, device):
        for low, high in ((1, 8), (9, 32), (33, 64)):
            case = blocks.Case(op, assume, draw.randint(low, high), draw.randint(1, 150), dtype)
            problem = blocks.Problem(case, device, draw.getrandbits(31))
            a, b = spread(problem.a), spread(problem.b)
            if op == "block_inv":
                answer = ops.block_inv(a, assume=assume)
            elif op == "block_solve":
                answer = ops.block_solve(a, b, assume=assume)
            else:
                answer = ops.block_eigh(a)
            assert problem.worst_ratio(answer) < blocks.THRESHOLD, (SEED, case)
            if op == "block_eigh":  # whose functions are bounded as in test_blocks_gpu.py
                positive = blocks.Problem(case.replace(op="block_inv", assume="spd"), device, draw.getrandbits(31)).a
                for f, x in (
                    (lambda x: ops.block_abs_inv(x, floor=0.5), a),
                    (lambda x: ops.block_inv_root(x, 2), positive),
                ):
                    with secant.use_backend("reference"):
                        exact, codes = f(x.double())
                    got, info = f(x)
                    assert torch.equal(info, codes)
                    largest = torch.linalg.matrix_norm(exact, 2).max()
                    bound = 64 * case.n * torch.finfo(dtype).eps * largest
                    assert (got - exact).abs().max() <= bound, (SEED, case)


@everywhere
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("op", ["glm_hvp", "glm_value_grad", "softmax_hvp", "cross_entropy_hvp"])
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_products_of_fresh_inputs(name, device, op, dtype, poisoned):
    draw = random.Random(f"{SEED} {op} {dtype}")
    with use("hvp", name, device):
        for d in (draw.randint(5, 40), 2 * draw.randint(100, 700) + 1, draw.randint(2000, 4000)):
            k = {"glm_hvp": draw.randint(1, 20), "softmax_hvp": draw.randint(2, 12)}.get(op, 1)
            case = hvp.Case(op, draw.randint(3, 300), d, k, dtype)
            problem = hvp.Problem(case, device, draw.getrandbits(31))
            problem.x = spread(problem.x)
            limit = hvp.TOLERANCE * torch.finfo(case.compute).eps
            if op == "cross_entropy_hvp":
                limit = max(limit, 8 * torch.finfo(dtype).eps)
            call = next(x for x in case.contenders(problem, no_compile) if x.name == name).probe
            assert problem.error(call()) < limit, (SEED, case)


@everywhere
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_searches_of_fresh_inputs(name, device, dtype, poisoned):
    """Minima of convex quartics, which are where the gradient is."""
    draw = random.Random(f"{SEED} search {dtype}")
    torch.manual_seed(draw.getrandbits(31))
    b, n = draw.randint(1, 400), draw.randint(1, 40)
    centers = torch.randn(b, n, dtype=dtype, device=device)

    def evaluate(x, index):
        y = x - centers[index]
        return (y**4 / 4 + y * y / 2).sum(1), y**3 + y

    with use("search", name, device), use("lbfgs", name, device):
        tolerance = 1e-3 if dtype is F32 else 1e-9
        found = batched_lbfgs(evaluate, torch.randn(b, n, dtype=dtype, device=device), gtol=tolerance, max_nfev=500)
        assert bool((found.status == secant.Status.CONVERGED).all()), (SEED, b, n)
        # |g| >= |y| componentwise; of x and the centers the difference has two roundings.
        bound = tolerance + 4 * torch.finfo(dtype).eps * float(centers.abs().max() + 1)
        assert float((found.x - centers).abs().max()) <= bound, (SEED, b, n)


def rademacher(*shape, dtype=F32, device):
    return torch.randint(0, 2, shape, device=device).to(dtype) * 2 - 1


@everywhere
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_layers_and_multinomial_losses_of_fresh_inputs(name, device, dtype, poisoned):
    draw = random.Random(f"{SEED} rest {dtype}")
    torch.manual_seed(draw.getrandbits(31))
    m, n, k = (draw.randint(1, 300) for _ in range(3))
    with use("hvp", name, device):
        # Sums of +-1: exact in any order.
        a, b, c, e = (rademacher(*shape, dtype=dtype, device=device) for shape in ((m, k), (k, n), (m, k), (k, n)))
        assert torch.equal(ops.paired_matmul(a, b, c, e), a @ b + c @ e), (SEED, m, n, k)
        assert torch.equal(ops.gram(a, weight=a[:, 0].contiguous()), a.mT @ (a[:, :1] * a)), (SEED, m, k)
        x, v = torch.randn(m, n, dtype=dtype, device=device), torch.randn(n, 5, dtype=dtype, device=device) / n**0.5
        classes = torch.randint(0, 5, (m,), device=device)
        value, grad, probs = ops.softmax_value_grad(x, classes, v)
        wide = v.double().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x.double() @ wide, classes, reduction="sum")
        (exact,) = torch.autograd.grad(loss, wide)
        limit = hvp.TOLERANCE * torch.finfo(dtype).eps
        assert abs(float(value - loss.detach())) <= limit * m, (SEED, m, n)
        assert float((grad - exact).abs().max()) <= limit * float(exact.abs().max().clamp(min=1)), (SEED, m, n)
        torch.testing.assert_close(probs.sum(1).double(), torch.ones(m, dtype=F64, device=device), rtol=limit, atol=0)


def operands(device):
    """Inputs of every op by its name, and the op as a function of them alone."""
    new = {"device": device}
    g, s = torch.randn(50, **new), torch.randn(4, 50, **new)
    x, w, v = torch.randn(60, 7, **new), torch.rand(60, **new), torch.randn(7, 3, **new)
    a = torch.randn(5, 9, 9, **new)
    a, p = a @ a.mT + torch.eye(9, **new), torch.softmax(torch.randn(60, 3, **new), -1)
    classes = torch.zeros(60, dtype=torch.int64, **new)
    return {
        "two_loop": (lambda g, s: ops.two_loop(g, s, s * 2), (g, s)),
        "block_inv": (lambda a: ops.block_inv(a, damping=0.1), (a,)),
        "block_inv general": (lambda a: ops.block_inv(a, assume="general"), (a,)),
        "block_solve": (lambda a: ops.block_solve(a, a[..., 0]), (a,)),
        "block_eigh": (lambda a: ops.block_eigh(a), (a,)),
        "block_abs_inv": (lambda a: ops.block_abs_inv(a, floor=0.1), (a,)),
        "block_inv_root": (lambda a: ops.block_inv_root(a, 4), (a,)),
        "glm_hvp": (lambda x, v, w: ops.glm_hvp(x, v, w), (x, v, w)),
        "glm_value_grad": (lambda x, w, v: ops.glm_value_grad(x, w, v[:, 0].contiguous(), loss="huber"), (x, w, v)),
        "softmax_hvp": (lambda x, v, p: ops.softmax_hvp(x, v, p), (x, v, p)),
        "softmax_value_grad": (lambda x, v: ops.softmax_value_grad(x, classes, v), (x, v)),
        "cross_entropy_hvp": (lambda x: ops.cross_entropy_hvp(x, x), (x,)),
        "gram": (lambda x, w: ops.gram(x, weight=w), (x, w)),
        "paired_matmul": (lambda x, v, p: ops.paired_matmul(x, v, x, v, scale=p), (x, v, p)),
    }


OPS = tuple(operands(CPU))


def family_of(op):
    return "lbfgs" if op == "two_loop" else "blocks" if op.startswith("block") else "hvp"


def several(x):
    return x if isinstance(x, tuple) else (x,)


@on_gpus
@pytest.mark.parametrize("op", OPS)
def test_a_graph_of_every_op_follows_its_inputs(name, op):
    """Captured once, then replayed on other numbers, with the bits of a call."""
    with use(family_of(op), name, GPU):
        function, inputs = operands(GPU)[op]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = several(function(*inputs))
        for scale in (0.5, 0.25):
            inputs[0].mul_(scale)
            expected = several(function(*inputs))
            graph.replay()
            for x, y in zip(results, expected, strict=True):
                assert torch.equal(x, y)


@on_gpus
@pytest.mark.parametrize("op", OPS)
def test_every_op_compiles_in_one_graph(name, op):
    """As on a CPU, of which see tests/ops."""
    with use(family_of(op), name, GPU):
        function, inputs = operands(GPU)[op]
        torch.compiler.reset()

        def program(*inputs):
            return tuple(x * 2 for x in several(function(*(x + 0 for x in inputs))))

        compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=False)
        for x, y in zip(compiled(*inputs), program(*inputs), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_user_code_around_the_ops(mode):
    """By inductor, in one graph; "reduce-overhead" puts it into a CUDA graph."""
    torch.compiler.reset()

    def newton(x, target, coef):
        _, grad, weight = ops.glm_value_grad(x, target, coef, loss="logistic", l2=1.0)
        hessian = x.T @ (weight[:, None] * x) + torch.eye(x.shape[1], device=x.device)
        step, _ = ops.block_solve(hessian[None], grad[None])
        pairs = torch.stack([step[0], 2 * step[0]])
        return coef - torch.sin(step[0]), ops.two_loop(grad, pairs, 2 * pairs)

    torch.manual_seed(0)
    x, target, coef = (
        torch.randn(200, 6, device=GPU),
        (torch.rand(200, device=GPU) < 0.5).float(),
        torch.zeros(6, device=GPU),
    )
    compiled = torch.compile(newton, fullgraph=True, mode=mode)
    expected = newton(x, target, coef)
    for _ in range(3):
        for got, want in zip(compiled(x, target, coef), expected, strict=True):
            torch.testing.assert_close(got.clone(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("what", ["append", "direction", "step"])
@pytest.mark.parametrize("kind", ["history", "dense"])
def test_no_method_of_what_takes_pairs_synchronises(kind, what):
    history = secant.LBFGSHistory(50, 4, device=GPU) if kind == "history" else secant.InverseHessian(50, device=GPU)
    s = torch.randn(50, device=GPU)
    history.append(s, 2 * s)
    grad, prev, d = s.clone(), -s, s.clone()
    calls = {
        "append": lambda: history.append(s, 2 * s),
        "direction": lambda: history.direction(s),
        "step": lambda: history.step(grad, prev, d, 0.5),
    }
    calls[what]()
    torch.cuda.synchronize()
    with watched(GPU):
        calls[what]()


def enough(gigabytes):
    if torch.cuda.mem_get_info(GPU)[0] < gigabytes * 2**30:
        pytest.skip("not enough memory on the device")


@on_gpus
@pytest.mark.parametrize("method", ["two_loop", "direction"])
def test_directions_of_more_than_2_to_the_31_elements(name, method):
    """Pairs y = 2 s: H g = g / 2 whatever the pairs. An index of 32 bits would read another place, or none."""
    enough(30)
    n, m = 2**29 + 5, 5
    with use("lbfgs", name, GPU):
        g = torch.ones(n, device=GPU)
        g[-3:] = 7
        if method == "two_loop":
            s = torch.empty(m, n, dtype=BF16, device=GPU)
            for i in range(m):
                s[i].fill_(2.0**-i)
                s[i, -1 - i] = 3
            d = ops.two_loop(g, s, s * 2)
        else:
            history = secant.LBFGSHistory(n, m, device=GPU, storage_dtype=BF16)
            for i in range(m):
                row = torch.full((n,), 2.0**-i, device=GPU)
                row[-1 - i] = 3
                history.append(row, 2 * row)
            d = history.direction(g)
        g.mul_(-0.5)
        assert float((d - g).abs().max()) <= 1e-4


@on_gpus
def test_a_triangle_of_more_than_2_to_the_31_elements(name):
    """A pair y = 2 s: H = I / 2, written by the second call, read by the third."""
    enough(16)
    n = 2**16 + 500
    with use("lbfgs", name, GPU):
        h, g = secant.InverseHessian(n, device=GPU), torch.ones(n, device=GPU)
        g[-3:] = 7
        assert h.append(g, 2 * g) == 1
        for _ in range(2):
            assert float((h.direction(g) + g / 2).abs().max()) <= 1e-4


@on_gpus
def test_logits_of_more_than_2_to_the_31_elements(name):
    """Equal logits: p = 1 / V, so that the product is (u - mean u) / V."""
    rows, size = 2**14 + 1, 2**17
    enough(3 * rows * size * 2 / 2**30 + 2)
    with use("hvp", name, GPU):
        logits = torch.zeros(rows, size, dtype=BF16, device=GPU)
        u = torch.zeros(rows, size, dtype=BF16, device=GPU)
        u[-1, -1] = size
        out = ops.cross_entropy_hvp(logits, u)
        assert not bool(out[:-1].any())
        assert float(out[-1, -1]) == pytest.approx(1 - 1 / size, rel=2**-8)
        assert float(out[-1, 0]) == pytest.approx(-1 / size, rel=2**-8)


@on_gpus
@pytest.mark.parametrize("op", ["block_solve", "block_eigh"])
def test_blocks_of_more_than_2_to_the_31_elements(name, op):
    n = 16
    batch = 2**31 // n**2 + 1000
    enough(3 * batch * n * n * 2 / 2**30 + 2)
    with use("blocks", name, GPU):
        torch.manual_seed(SEED)
        few = torch.randn(4, n, n, device=GPU)
        few = (few @ few.mT / n + torch.eye(n, device=GPU)).to(BF16)
        a = torch.empty(batch, n, n, dtype=BF16, device=GPU)
        for i in range(4):
            a[i::4] = few[i]
        call = ops.block_eigh if op == "block_eigh" else lambda a: ops.block_solve(a, a[..., 0].contiguous())
        results, expected = call(a), call(few)
        assert not bool(results[-1].any())
        for i in range(4):
            for x, y in zip(results[:-1], expected[:-1], strict=True):
                for part in (x[i::4][:300], x[i::4][-300:]):
                    assert torch.equal(part, y[i].expand_as(part)), SEED
