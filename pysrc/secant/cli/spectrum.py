"""`python -m secant spectrum`: the eigenvalues of the Hessian and the GGN, before and after training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import secant
from secant.benchmarks import digits, machine
from secant.benchmarks.report import Table, duration
from secant.cli import console
from secant.curvature import GGN, Estimate, Hessian, LinearOperator, SpectralDensity

#: Random vectors, products with each, extreme eigenvalues shown, and products with each probe of a quick run.
PROBES, STEPS, EXTREMES, QUICK_STEPS = 6, 50, 3, 12
#: Iterations of L-BFGS between the two points.
ITERATIONS = 60
#: Relative accuracy of the extreme eigenvalues.
TOLERANCE = 1e-3


class Found(NamedTuple):
    """What was found out about one operator at one point.

    largest, smallest: extreme eigenvalues, from the outside inwards; the smallest of the Hessian only. seconds: of
    `products` products.
    """

    point: str
    matrix: str
    mode: str
    spectrum: SpectralDensity
    largest: list[float]
    smallest: list[float]
    trace: Estimate
    seconds: float
    products: int


class _Counted(LinearOperator):
    """Counts products for the progress bar."""

    def __init__(self, operator: LinearOperator, tick: Callable[[int], None]) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self.operator, self.tick, self.count = operator, tick, 0

    def _rows(self, vectors: Tensor) -> Tensor:
        self.tick(len(vectors))
        self.count += len(vectors)
        return self.operator._rows(vectors)


def operators(task: digits.Task) -> dict[str, Hessian | GGN]:
    """Make the Hessian of the objective, cross-entropy + L2 / 2 |w|^2, and the GGN of its cross-entropy."""
    x, y = task.data.train_x, task.data.train_y

    def outputs_and_loss() -> tuple[Tensor, Tensor]:
        outputs = task.net(x)
        return outputs, nn.functional.cross_entropy(outputs, y)

    return {"Hessian": Hessian(task.loss, task.params), "GGN": GGN(outputs_and_loss, task.params)}


def examine(point: str, name: str, operator: Hessian | GGN, tick: Callable[[int], None], *, quick: bool) -> Found:
    """Estimate spectrum, extremes and trace of one operator."""
    start = time.perf_counter()
    counted = _Counted(operator, tick)
    probes, steps, k = (2, QUICK_STEPS, 1) if quick else (PROBES, STEPS, EXTREMES)
    spectrum = counted.spectrum(probes, steps=steps)
    most = 10 * k if quick else None
    wanted = ("LA", "SA") if name == "Hessian" else ("LA",)  # the GGN of this loss has none below zero
    ends = {which: counted.eigs(k, which, tol=TOLERANCE, max_iter=most).values for which in wanted}
    largest = ends["LA"].flip(0).tolist()
    return Found(
        point, name, operator.mode, spectrum, largest, ends["SA"].tolist() if "SA" in ends else [], spectrum.trace(),
        time.perf_counter() - start, counted.count,
    )  # fmt: skip


def _trained(task: digits.Task) -> None:
    optimizer = secant.optim.LBFGS(
        task.params, max_iter=ITERATIONS, max_eval=10 * ITERATIONS, history_size=digits.HISTORY,
        line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    optimizer.step(task.closure(optimizer))


def _with_error(x: Estimate, scale: float = 1.0, unit: str = "") -> str:
    return f"{scale * x.value:.3g} ± {scale * x.stderr:.2g}{unit}"


def table(found: list[Found], about: str) -> Table:
    """Tabulate the figures, one row per operator and point."""
    rows = [
        (
            one.point, one.matrix, "  ".join(f"{x:.3g}" for x in one.largest),
            "  ".join(f"{x:.2g}" for x in one.smallest) or "-", _with_error(one.trace),
            _with_error(one.spectrum.negative_share(), 100.0, "%"), f"{duration(one.seconds / one.products)}",
        )
        for one in found
    ]  # fmt: skip
    columns = ("point", "matrix", "largest eigenvalues", "smallest", "trace", "negative curvature", "a product")
    return Table(
        f"Spectra of {about}", columns, rows,
        ("Negative curvature: the negative eigenvalues' share of the sum of all magnitudes. The Hessian is that of the "
         "objective with its L2 penalty, the GGN that of the cross-entropy.",),
    )  # fmt: skip


def draw(path: Path, found: list[Found], losses: dict[str, float], footer: str) -> None:
    """Draw a panel per point, the Hessian and the GGN in each, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from secant.benchmarks.plot import INK, SECANT, TORCH

    colors = {"Hessian": TORCH, "GGN": SECANT}
    figure = Figure(figsize=(9.6, 7.8), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(losses), 1, sharey=True)
    figure.subplots_adjust(left=0.095, right=0.975, top=0.91, bottom=0.115, hspace=0.4)
    for ax, (point, loss) in zip(axes, losses.items(), strict=True):
        hessian, ggn = (one for one in found if one.point == point)
        for one, height in ((hessian, 0.95), (ggn, 0.89)):
            color = colors[one.matrix]
            one.spectrum.plot(ax=ax, label=one.matrix, color=color, alpha=0.18)
            ends = ax.secant_scale.forward(torch.tensor([*one.largest, *one.smallest], dtype=torch.float64)).tolist()
            ax.plot(ends, [height] * len(ends), "v", color=color, markersize=5, transform=ax.get_xaxis_transform())
        below = (
            f"loss {loss:.2g}; eigenvalues of the Hessian from {min(hessian.smallest):.2g} to "
            f"{max(hessian.largest):.2g}, of the GGN to {max(ggn.largest):.2g}"
        )
        title = f"{point.capitalize()}: {_sentence(found, point)}"
        for text, above, size, weight, ink in ((title, 24, 12, "bold", INK), (below, 8, 9.5, "normal", "#5a5a5a")):
            ax.annotate(
                text, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points", fontsize=size,
                fontweight=weight, color=ink, va="bottom",
            )  # fmt: skip
        ax.legend(
            loc="upper right", bbox_to_anchor=(1, 0.86), frameon=False, fontsize=10, labelcolor="linecolor",
            handlelength=1.2,
        )  # fmt: skip
    axes[0].set_xlabel("")
    figure.text(0.02, 0.02, footer, fontsize=8, color="#7a7a7a", wrap=True)
    figure.savefig(path)


def _sentence(found: list[Found], point: str) -> str:
    (hessian,) = (one for one in found if one.point == point and one.matrix == "Hessian")
    share = hessian.spectrum.negative_share()
    return f"{100 * share.value:.2g}% of the Hessian's curvature is negative"


def as_json(found: list[Found], about: dict[str, Any], losses: dict[str, float]) -> dict[str, Any]:
    """Plain data: per operator the figures of the table, nodes and weights."""
    return {
        "machine": about,
        "losses": losses,
        "spectra": [
            {
                "point": one.point,
                "matrix": one.matrix,
                "mode": one.mode,
                "n": one.spectrum.n,
                "largest": one.largest,
                "smallest": one.smallest,
                "trace": one.trace._asdict(),
                "negative_share": one.spectrum.negative_share()._asdict(),
                "seconds": one.seconds,
                "products": one.products,
                "nodes": one.spectrum.nodes.tolist(),
                "weights": one.spectrum.weights.tolist(),
            }
            for one in found
        ],
    }


def run(device: torch.device, *, plot_path: Path | None, json_path: Path | None, quick: bool = False) -> dict[str, Any]:
    """Examine the demo's network at its initial point and after training, print the table, write what is asked for.

    Args:
        device: where. plot_path, json_path: files to write. quick: a rough look, to see that it runs.

    Returns:
        The plain data, as `as_json`.
    """
    model = digits.MODELS[-1]
    task = digits.Task(model, digits.load(device))
    found: list[Found] = []
    losses: dict[str, float] = {}
    # About as many products as it will take: the extremes need as many again as a third of the probes.
    expected = 4 * ((2 * QUICK_STEPS + 20) if quick else (PROBES * STEPS + 2 * STEPS))
    done = 0
    with console.progress("spectra") as advance:
        for point in ("at the initial point", "after training"):
            if losses:
                _trained(task)
            losses[point] = float(task.loss().detach())
            for name, operator in operators(task).items():

                def tick(count: int, text: str = f"{name} {point}") -> None:
                    nonlocal done
                    done += count
                    advance(min(done / expected, 0.99), text)

                found.append(examine(point, name, operator, tick, quick=quick))
    parameters = found[0].spectrum.n
    about = machine.describe(device)
    console.show(table(found, f"{model.name}, {parameters:,} parameters, {len(task.data.train_x):,} digits"))
    if plot_path is not None:
        probes, steps = found[0].spectrum.nodes.shape
        footer = (
            f"{model.name}, {parameters:,} parameters, {len(task.data.train_x):,} digits. Lanczos quadrature: {probes} "
            f"vectors, {steps} products each.\nTriangles: extreme eigenvalues. {machine.summary(about)}"
        )
        draw(plot_path, found, losses, footer)
        print(f"Wrote {plot_path}.")
    result = as_json(found, about, losses)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Wrote {json_path}.")
    return result
