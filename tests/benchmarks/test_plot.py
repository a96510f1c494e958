from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

import itertools

from matplotlib.image import imread

from secant.benchmarks import plot
from secant.benchmarks.case import Row
from secant.benchmarks.families.lbfgs import Case
from secant.benchmarks.plot import Curve, Panel, Series
from secant.benchmarks.timing import Timing

LINES = [
    Series("slow", plot.TORCH, [1000, 10_000, 100_000], [3e-4, 5e-4, 2e-3]),
    Series("fast", plot.SECANT, [1000, 10_000, 100_000], [1e-5, 5e-5, 4e-4]),
]
LIMIT = Series("limit", plot.GREY, [1000, 100_000], [4e-6, 4e-4])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0.5, 50))
def test_labels_are_moved_apart_in_order(positions, gap):
    moved = plot._spread(positions, gap)
    by_height = sorted(moved)
    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in itertools.pairwise(by_height))
    order = sorted(range(len(positions)), key=positions.__getitem__)
    assert [moved[i] for i in order] == by_height
    assert sum(moved) == pytest.approx(sum(positions), abs=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0.5, 50))
def test_labels_stay_within_limits(positions, gap):
    low, high = -200.0, -200.0 + max(gap * len(positions), 300.0)
    moved = plot._spread(positions, gap, low, high)
    by_height = sorted(moved)
    assert by_height[0] >= low - 1e-6
    assert by_height[-1] <= high + 1e-6
    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in itertools.pairwise(by_height))
    order = sorted(range(len(positions)), key=positions.__getitem__)
    assert [moved[i] for i in order] == by_height


def test_labels_that_do_not_touch_stay():
    assert plot._spread([30.0, 0.0, 10.0], 10.0) == [30.0, 0.0, 10.0]


def check_picture(path):
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 800
    assert pixels.std() > 0.02
    return pixels


def colours(pixels, colour):
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (abs(pixels - rgb).max(-1) < 0.02).sum()


def test_demo_picture(tmp_path):
    curves = [
        Curve("torch", plot.TORCH, [0.1, 0.2, 0.5], [2.0, 3.0, 0.1]),
        Curve("secant", plot.SECANT, [0.1, 0.3], [2.0, 0.1]),
    ]
    losses = [(Panel("a", "b"), curves), (Panel("c", "d"), curves)]
    raced = [plot.raced("torch LBFGS", [(0.1, 1.0), (2.0, 0.1)]), plot.raced("LBFGS", [(0.1, 1.0), (0.2, 1e-3)])]
    plot.save_demo(tmp_path / "x.png", (Panel("g", "h"), raced), losses, Panel("e", "f"), LINES, LIMIT, "footer")
    pixels = check_picture(tmp_path / "x.png")
    third = pixels.shape[1] // 3
    for colour in (plot.TORCH, plot.SECANT):  # both optimizers in the middle, both kernels on the right
        assert colours(pixels[:, third : 2 * third], colour) > 200
        assert colours(pixels[:, 2 * third :], colour) > 200
    for colour in (plot.TORCH, plot.BF16):  # the race on the left
        assert colours(pixels[:, :third], colour) > 200


def test_picture_of_races(tmp_path):
    """A panel for each problem, a line for each optimizer, labelled; the longest run of one that has several errors."""
    from secant.benchmarks.families.residuals import Fit

    rows = []
    for op in ("a", "b"):
        for target, end in ((1e-2, 0.5), (1e-3, 2.0)):
            rows.append(Row(Fit(op, target), "LBFGS", "backend", None, 1e-4, target, curve=((0.1, 1.0), (end, 1e-4))))
        rows.append(Row(Fit(op, 1e-2), "Adam", "peer", None, 0.1, 1e-2, curve=((0.1, 1.0), (30.0, 0.1))))
    plot.save_family(tmp_path / "x.png", rows, None, "footer")
    pixels = imread(tmp_path / "x.png")[..., :3]
    half = pixels.shape[1] // 2
    for colour in (plot.BF16, plot.COLORS["Adam"][0]):
        assert colours(pixels[:, :half], colour) > 200
        assert colours(pixels[:, half:], colour) > 200


def test_family_picture(tmp_path):
    """A column for cases that differ in size, with a curve for each name; a dot for each peer of the others."""

    def rows(case, kind="peer", **seconds):
        return [Row(case, name, kind, Timing((x,)), 0.0, 1.0) for name, x in seconds.items()]

    found = []
    for n, slow in ((1000, 3.0), (10_000, 5.0)):
        found += rows(Case("two_loop", n), "backend", cpu=slow * 1e-5)
        found += rows(Case("two_loop", n), eager=slow * 1e-4, compact=slow * 2e-4)
    for op, seconds in (("direction", {"compiled": 3e-3, "compact": 7e-4}), ("step", {"eager bmm": 5e-3})):
        case = Case(op, 64, batch=100)
        found += rows(case, "backend", cpu=1e-3) + rows(case, **seconds)
    plot.save_family(tmp_path / "x.png", found, 1e10, "footer")
    pixels = check_picture(tmp_path / "x.png")
    half = pixels.shape[1] // 2
    upper = pixels[: pixels.shape[0] * 4 // 5]  # above the legend
    for name in ("cpu", "eager", "compact"):
        assert colours(upper[:, :half], plot.COLORS[name][0]) > 50
    for name in ("compiled", "compact", "eager bmm"):
        assert colours(upper[:, half:], plot.COLORS[name][0]) > 50
    assert colours(upper[:, half:], plot.COLORS["cpu"][0]) == 0
