"""On a real GPU: the three GPU backends within the bounds of the oracle, in graphs, on other streams, never syncing."""

from __future__ import annotations

import hvp_checks as checks
import pytest
import torch
from hvp_oracle import BF16, F16, F32, F64, LOSSES, Problem

from triton_runner import watched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda", 0)
DTYPES = [F32, F64, BF16, F16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "d"), [(1, 1), (777, 17), (3000, 256), (1001, 785), (300, 3000), (50, 9000), (40, 17000), (20, 100_000)]
)
def test_functions_of_x(backend, n, d, dtype):
    for k in (1, 3, 8, 16, 64):
        checks.glm_hvp(backend, n, d, k, dtype, k == 3, DEVICE)
    for loss in LOSSES:
        checks.glm_value_grad(backend, n, d, dtype, loss, loss == "poisson", loss != "huber", DEVICE)
    for k in (2, 10, 100) if d < 5000 else (3,):
        checks.softmax(backend, n, d, k, dtype, k == 10, k == 2, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (70_000, 5), (300, 1000), (40, 16384), (40, 50_304), (5, 300_000)])
def test_cross_entropy(backend, rows, size, dtype):
    for pad in (0, 3):
        for given in (False, True):
            checks.cross_entropy(backend, rows, size, dtype, given, pad, DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k1", "k2"), [(1, 1, 1, 1), (130, 65, 40, 33), (10_000, 256, 256, 64), (256, 64, 20_000, 20_000)]
)
def test_paired_matmul(backend, m, n, k1, k2, dtype):
    checks.paired_matmul(backend, m, n, k1, k2, dtype, DEVICE)
    checks.paired_matmul(backend, m, n, k1, None, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (530, 65), (20_000, 30), (3500, 449), (300, 2000)])
def test_gram(backend, m, n, dtype):
    for layout in ("rows", "columns", "spread"):
        checks.gram(backend, m, n, dtype, layout, layout != "rows", layout == "columns", run=512, device=DEVICE)
    checks.gram_of_odd_entries(backend, dtype, DEVICE)


@pytest.mark.parametrize(("d", "k"), [(5, 1), (33, 3), (785, 1), (1027, 16)])
def test_rows_may_be_strided_and_repeated(backend, d, k):
    for dtype in (F32, F64, BF16):
        checks.strides(backend, 9, d, k, dtype, DEVICE)


def test_extremes(backend):
    for dtype in (F32, F64):
        checks.large_logits(backend, dtype, DEVICE)
        checks.tails(backend, dtype, DEVICE)
        checks.not_finite(backend, dtype, DEVICE)
        checks.classes_out_of_range(backend, dtype, DEVICE)
    checks.not_a_number(backend, DEVICE)
    for dtype in (BF16, F16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        checks.rounding_to_half(backend, dtype, bits[bits.isfinite()].float(), DEVICE)
    checks.many_rows(backend, 20_000_000, DEVICE)


def test_more_than_2_to_the_31_elements(backend):
    n, d = 2**20 + 3, 2**11
    if torch.cuda.mem_get_info(DEVICE)[0] < 3 * n * d * 2:
        pytest.skip("not enough memory on the device")
    x = torch.ones(n, d, dtype=BF16, device=DEVICE)
    x[-1] = 2
    out = torch.full((d, 1), float("nan"), device=DEVICE)
    backend.glm_hvp(x, torch.ones(d, 1, device=DEVICE), torch.ones(n, device=DEVICE), 0.0, out)
    torch.testing.assert_close(out, torch.full_like(out, (n - 1) * d + 4 * d), rtol=1e-6, atol=0)


def calls(name: str):
    """(inputs that may change between replays, f(inputs) -> outputs) of each op."""
    problem = Problem(3000, 300, F32, 3)
    logits = torch.randn(300, 5000)
    inputs = {
        "glm_hvp": (problem.x, problem.v, problem.weight),
        "glm_hvp of long rows": (torch.randn(30, 20_000), torch.randn(20_000, 3), torch.rand(30)),
        "glm_value_grad": (problem.x, problem.binary, problem.v[:, 0].contiguous()),
        "softmax_hvp": (problem.x, problem.v, problem.probs),
        "softmax_value_grad": (problem.x, problem.classes, problem.v),
        "cross_entropy_hvp": (logits, torch.randn_like(logits)),
        "paired_matmul": (torch.randn(64, 3000), torch.randn(3000, 64)),
        "gram": (torch.randn(3000, 64), torch.randn(3000)),
    }[name]
    placed = [x.to(DEVICE) for x in inputs]

    def call(backend):
        v = placed[-1]
        grad, value = torch.full_like(v, float("nan")), torch.full((), float("nan"), dtype=F64, device=DEVICE)
        if name.startswith("glm_hvp"):
            x, v, weight = placed
            grad = torch.full_like(v, float("nan"))
            backend.glm_hvp(x, v, weight, 0.1, grad)
            return (grad,)
        if name == "glm_value_grad":
            weight = torch.full_like(placed[1], float("nan"))
            backend.glm_value_grad(*placed, "logistic", 1.0, None, 0.1, value, grad, weight)
            return value, grad, weight
        if name == "softmax_hvp":
            grad = torch.full_like(placed[1], float("nan"))
            backend.softmax_hvp(*placed, None, 0.1, grad)
            return (grad,)
        if name == "softmax_value_grad":
            probs = torch.full((3000, 3), float("nan"), device=DEVICE)
            backend.softmax_value_grad(*placed, None, 0.1, value, grad, probs)
            return value, grad, probs
        if name == "cross_entropy_hvp":
            backend.cross_entropy_hvp(*placed, None, grad)
            return (grad,)
        out = torch.full((64, 64), float("nan"), device=DEVICE)
        if name == "gram":
            backend.gram(*placed, False, out)
            return (out,)
        backend.paired_matmul(*placed, *[None] * 6, out)
        return (out,)

    return placed, call


NAMES = ["glm_hvp", "glm_hvp of long rows", "glm_value_grad", "softmax_hvp", "softmax_value_grad", "cross_entropy_hvp",
         "paired_matmul", "gram"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_graph_replay(backend, name):
    """Captured once, replayed on other data; and the same bits again and again."""
    placed, call = calls(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(backend)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(backend)
    placed[0].mul_(0.5)
    expected = call(backend)
    for _ in range(3):
        graph.replay()
        for x, y in zip(results, expected, strict=True):
            assert not x.isnan().any()
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_no_synchronisation_and_another_stream(backend, name):
    placed, call = calls(name)
    expected = call(backend)
    kept = placed[0].clone()
    placed[0].zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with watched(DEVICE), torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        placed[0].copy_(kept)  # a kernel on another stream would find zeros
        results = call(backend)
    torch.cuda.current_stream().wait_stream(side)
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)
