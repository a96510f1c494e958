"""The roofline: operations and bytes of a case, its place in the picture, and the roofs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from secant.benchmarks import machine, report, roofline
from secant.benchmarks.case import Row
from secant.benchmarks.families import blocks, hvp, lbfgs
from secant.benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
F32, F64 = torch.float32, torch.float64
RATES = {"bandwidth": 1e9, "matmul_float32": 8e9, "matmul_float64": 4e9}


class Counted(float):
    """A number that counts the additions, subtractions and products made with it; exponentials count as one."""

    made = 0

    def _do(self, other, name):
        Counted.made += 1
        return Counted(getattr(float(self), name)(float(other)))

    def __add__(self, other):
        return self._do(other, "__add__")

    def __sub__(self, other):
        return self._do(other, "__sub__")

    def __mul__(self, other):
        return self._do(other, "__mul__")


def dot(x, y):
    total = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        total = total + a * b
    return total


def counted(call) -> int:
    Counted.made = 0
    call()
    return Counted.made


def numbers(*shape):
    return [Counted(i + 1.0) for i in range(shape[0])] if len(shape) == 1 else [numbers(shape[1])] * shape[0]


def test_operations_of_the_recursion():
    """Counted while they are made; a sum of n products takes n - 1 additions, so that short of 2 n by one each."""
    n, m = 40, 3
    g, s, y = numbers(n), numbers(m, n), numbers(m, n)

    def recursion(q):
        for i in range(m):
            a = dot(s[i], q)
            q = [x - a * b for x, b in zip(q, y[i], strict=True)]
        r = [Counted(2.0) * x for x in q]
        for i in range(m):
            b = dot(y[i], r)
            r = [x + b * c for x, c in zip(r, s[i], strict=True)]

    made = counted(lambda: recursion(g))
    assert lbfgs.Case("direction", n, m).flops == made + 2 * m
    of_pairs = counted(lambda: ([dot(s[i], y[i]) for i in range(m)], dot(y[0], y[0])))
    assert lbfgs.Case("two_loop", n, m).flops == made + 2 * m + of_pairs + m + 1
    new_pair = counted(lambda: ([a - b for a, b in zip(g, g, strict=True)], [x * Counted(2) for x in g]))
    products = counted(lambda: (dot(g, g), dot(g, g), dot(g, g)))
    assert lbfgs.Case("step", n, m).flops == made + 2 * m + new_pair + products + 3
    assert lbfgs.Case("direction", n, m, batch=7).flops == 7 * lbfgs.Case("direction", n, m).flops


def test_operations_of_products():
    n, d, k = 5, 30, 4
    x, v, w = numbers(n, d), numbers(k, d), numbers(n)

    def glm():
        out = numbers(k, d)
        for row, weight in zip(x, w, strict=True):
            for j in range(k):
                z = weight * dot(row, v[j])
                out[j] = [a + z * b for a, b in zip(out[j], row, strict=True)]

    case = hvp.Case("glm_hvp", n, d, k)
    assert case.flops == counted(glm) + n * k
    assert hvp.Case("softmax_hvp", n, d, k).flops == case.flops + 3 * n * k
    assert hvp.Case("cross_entropy_hvp", n, d).flops == 6 * n * d


def test_operations_of_blocks():
    """The leading terms of LAPACK's: Cholesky and LU counted while they are made."""
    n = 30
    a = [[Counted(100.0 if i == j else 1.0) for j in range(n)] for i in range(n)]

    def lu(only_lower):
        for k in range(n):
            for i in range(k + 1, n):
                for j in range(k + 1, i + 1 if only_lower else n):
                    a[i][j] = a[i][j] - a[i][k] * a[k][j]

    for assume, only_lower in (("spd", True), ("general", False)):
        factor = counted(lambda only_lower=only_lower: lu(only_lower))
        solve = blocks.Case("block_solve", assume, n, 1).flops
        assert solve - 2 * n**2 == pytest.approx(factor, rel=2 / n)
        assert blocks.Case("block_inv", assume, n, 1).flops == pytest.approx(3 * (solve - 2 * n**2))
    assert blocks.Case("block_eigh", "symmetric", n, 1).flops == 9 * n**3


def test_a_row_has_the_counts_of_its_case():
    cases = (lbfgs.Case("step", 30, 4, 2, F64, F64), blocks.Case("block_inv", "spd", 6, 9, F32))
    for case in (*cases, hvp.Case("softmax_hvp", 20, 5, 3, torch.bfloat16)):
        row = json.loads(json.dumps(report.plain_row([], Row(case, "cpu", "backend", Timing((2.0,)), 0.0, 1.0), None)))
        assert (row["flops"], row["bytes"]) == (case.flops, case.nbytes)
        [point] = roofline.dots([row])
        assert point[3:] == (case.flops / case.nbytes, case.flops / 2.0)
        names = {"dtype", "storage"} & row.keys()
        dtypes = {name: getattr(torch, row[name]) for name in names}
        again = {name: row[name] for name in case.parameters()} | dtypes
        assert type(case)(**again) == case


def test_points_are_what_backends_measured():
    row = {"op": "two_loop", "by": "cpu", "kind": "backend", "dtype": "float64", "flops": 12, "bytes": 4, "median": 2.0}
    others = ({"by": "reference"}, {"by": "secant"}, {"kind": "peer"}, {"median": None})
    assert roofline.dots([row, *(row | other for other in others)]) == [roofline.Dot("two_loop", "cpu", True, 3, 6)]


def test_the_picture_has_roofs_and_points(tmp_path):
    """The memory's line has the slope of the bandwidth, and turns into the highest roof where the two meet."""
    pytest.importorskip("matplotlib")
    from matplotlib import figure

    drawn = []
    original = figure.Figure.savefig
    found = [roofline.Dot(op, "cuda", op == "step", 2.0**i, 1e8) for i, op in enumerate(roofline.COLORS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, path: (drawn.append(self), original(self, path)))
        roofline.save(tmp_path / "a.png", found, RATES, "title", "footer")
        roofline.save(tmp_path / "b.png", found, {"bandwidth": 1e9}, "title", "footer")
    assert (tmp_path / "a.png").stat().st_size > 20_000
    first, second = (figure.axes[0] for figure in drawn)
    memory, *tops = [line for line in first.lines if len(line.get_xdata()) == 2]
    (x0, x1), (y0, y1) = memory.get_xdata(), memory.get_ydata()
    assert y0 / x0 == pytest.approx(1e9)
    assert (x1, y1) == (pytest.approx(8.0), pytest.approx(8e9))
    assert [line.get_ydata()[0] for line in tops] == [8e9, 4e9]
    assert [line.get_xdata()[0] for line in tops] == [pytest.approx(8.0), pytest.approx(4.0)]
    assert len([line for line in second.lines if len(line.get_xdata()) == 2]) == 1
    shown = {(line.get_xdata()[0], line.get_ydata()[0]) for line in first.lines if len(line.get_xdata()) == 1}
    assert shown == {(point.intensity, point.rate) for point in found}
    for ax in (first, second):
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        texts = [text.get_window_extent() for text in ax.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
        assert "per second" in ax.get_ylabel()


def test_rates_of_this_machine():
    found = machine.rates(torch.device("cpu"), small=True)
    assert set(found) == {"bandwidth", "read_by_sum", *roofline.ROOFS}
    assert all(1e6 < rate < 1e15 for rate in found.values())


def test_recorded_results_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    files = sorted((ROOT / "bench/results").glob("cpu-xeon-*.json"))
    assert files
    picture = tmp_path / "roofline.png"
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(picture), *map(str, files)])
    seen = []
    monkeypatch.setattr(roofline, "save", lambda path, found, rates, *words: seen.append((path, found, rates, words)))
    runpy.run_path(str(ROOT / "bench/roofline.py"), run_name="__main__")
    [(path, found, rates, words)] = seen
    assert path == picture
    assert {point.op for point in found} == set(roofline.COLORS)
    known = [family["bandwidth"] for path in files for family in json.loads(path.read_text())["families"].values()]
    assert rates["bandwidth"] >= max(x for x in known if x)
    assert "Xeon" in words[1]
