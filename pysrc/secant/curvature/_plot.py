"""The picture of a spectral density. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

if TYPE_CHECKING:
    from secant.curvature._spectrum import SpectralDensity

INK, GREY, BLUE = "#222222", "#8a8a8a", "#0072B2"
#: Standard deviation of the smoothing, in decades; fewest eigenvalues per decade that are drawn.
WIDTH, FLOOR = 0.06, 0.1


class Scale:
    """x to asinh(x / 2t) / log 10: about sign(x) log10(|x| / t) where |x| > t, and linear near zero."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Value to place."""
        return torch.asinh(x / (2 * self.threshold)) / math.log(10)

    def ticks(self, low: float, high: float) -> list[float]:
        """Zero, and the powers of ten outside the threshold, at most about five a side."""
        found = [0.0]
        for sign, end in ((1, high), (-1, -low)):
            if end > self.threshold:
                powers = range(math.ceil(math.log10(self.threshold)), math.floor(math.log10(end)) + 1)
                step = math.ceil(len(powers) / 5) if powers else 1
                found += [sign * 10.0**k for k in reversed(powers[::-1][::step])]
        return sorted(found)


def _number(x: float) -> str:
    if x == 0:
        return "0"
    power = round(math.log10(abs(x)))
    sign = "−" if x < 0 else ""
    return f"{sign}{abs(x):g}" if -3 <= power <= 3 else f"{sign}$10^{{{power}}}$"


def draw(
    spectrum: SpectralDensity,
    path: str | Path | None,
    ax: Axes | None,
    label: str | None,
    threshold: float | None,
    style: dict[str, Any],
) -> Axes:
    """See `SpectralDensity.plot`."""
    if ax is None:
        figure = Figure(figsize=(8, 4.5), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
        figure.subplots_adjust(left=0.1, right=0.97, top=0.95, bottom=0.13)
    low, high = spectrum.range
    scale = getattr(ax, "secant_scale", None) or Scale(threshold or 1e-2 * max(abs(low), abs(high), 1e-30))
    ax.secant_scale = scale  # type: ignore[attr-defined]  # the next curve goes on the same axis
    places = scale.forward(spectrum.nodes).reshape(1, -1)
    weights = spectrum.n * spectrum.weights.reshape(1, -1) / len(spectrum.nodes)
    ends = scale.forward(torch.tensor([low, high], dtype=torch.float64)) + torch.tensor([-0.45, 0.45])
    at = torch.linspace(float(ends[0]), float(ends[1]), 1500, dtype=torch.float64)
    bells = torch.exp(-0.5 * ((at.unsqueeze(1) - places) / WIDTH).square()) / (WIDTH * math.sqrt(2 * math.pi))
    curve = (bells * weights).sum(1)
    drawn: dict[str, Any] = {"color": BLUE, "alpha": 0.25, "linewidth": 0} | style
    ax.fill_between(at.numpy(), FLOOR, curve.clamp(min=FLOOR).numpy(), **drawn)
    ax.plot(at.numpy(), curve.clamp(min=FLOOR).numpy(), color=drawn["color"], linewidth=1.6, label=label)
    _dress(ax, scale, spectrum, float(curve.max()))
    if path is not None:
        ax.get_figure(root=True).savefig(path)  # type: ignore[union-attr]
    return ax


def _dress(ax: Axes, scale: Scale, spectrum: SpectralDensity, top: float) -> None:
    low, high = (min(a, b) if i == 0 else max(a, b) for i, (a, b) in enumerate(
        zip(getattr(ax, "secant_range", spectrum.range), spectrum.range, strict=True)
    ))  # fmt: skip
    ticks = scale.ticks(low, high)
    places = scale.forward(torch.tensor(ticks, dtype=torch.float64)).tolist()
    ax.xaxis.set_major_locator(FixedLocator(places))
    names = dict(zip((round(p, 9) for p in places), ticks, strict=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda p, _: _number(names.get(round(p, 9), 0.0))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yscale("log")
    ax.set_ylim(FLOOR, max(2 * top, ax.get_ylim()[1] if hasattr(ax, "secant_range") else 0.0))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=9.5, labelcolor=INK, color=GREY, length=3)
    ax.grid(axis="y", color="#ebebeb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.secant_range = (low, high)  # type: ignore[attr-defined]
    ax.set_xlabel("eigenvalue", fontsize=10, color=INK)
    ax.set_ylabel("eigenvalues per decade", fontsize=10, color=INK)
