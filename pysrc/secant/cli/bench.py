"""`python -m secant bench`: the kernels against every peer, the optimizers, and the bars."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from secant.benchmarks import blocks, blocks_report, digits, hvp, lbfgs, machine, report
from secant.benchmarks.lbfgs import Case, Row
from secant.benchmarks.optimizers import outside_per_iteration
from secant.benchmarks.report import Overhead
from secant.benchmarks.timing import REPLAY
from secant.cli import console

#: Seconds of timing per group of cases, and the longest vector of those that GPU users would replay from a graph.
GROUP_SECONDS, GRAPH_N = 2.0, 10**5
#: Seconds of timing per case of the blocks, and of the products.
BLOCK_SECONDS, PRODUCT_SECONDS = 0.4, 1.5
#: Of these seconds, what a GPU is timed for: nothing else runs there, and its calls are short.
GPU_SHARE = 0.25
FAMILIES = ("lbfgs", "blocks", "hvp")
C = TypeVar("C")
#: n, history and line search of the optimizers that are compared.
OVERHEADS = (
    *((n, history, None) for n in (10**3, 10**6) for history in (10, 100)),
    (10**3, 10, "strong_wolfe"),
    (10**6, 10, "strong_wolfe"),
)


class Budget:
    """Time to begin cases in, and what was left out when it was over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    def order(self, cases: Sequence[C], kind: Callable[[C], object]) -> list[C]:
        """The cases as they are; where time may run out, the first of every kind, then the second of every kind."""
        if math.isinf(self._end):
            return list(cases)
        seen: Counter[object] = Counter()
        ranked = []
        for case in cases:
            ranked.append((seen[kind(case)], case))
            seen[kind(case)] += 1
        return [case for _, case in sorted(ranked, key=lambda item: item[0])]

    def allows(self, label: str, *, first: bool) -> bool:
        """Whether to begin a case; the first of a list always, so that there is something to show."""
        if first or time.perf_counter() < self._end:
            return True
        self.left_out.append(label)
        return False


def _seconds(device: torch.device, seconds: float, *, quick: bool) -> float:
    return 0.02 if quick else seconds * (GPU_SHARE if device.type == "cuda" else 1.0)


def measure_rows(device: torch.device, budget: Budget, *, quick: bool) -> list[Row]:
    """Every group of cases; on a GPU the short ones also as graph replays."""
    rows: list[Row] = []

    def wanted(case: Case, name: str) -> bool:
        return not (quick and name == "compiled")  # compiling takes longer than all the rest

    groups = budget.order(
        lbfgs.groups(device, quick=quick), lambda cases: (cases[0].op, cases[0].batch, cases[0].dtype)
    )
    with console.progress("directions") as advance:
        for i, cases in enumerate(groups):
            if not lbfgs.fits(cases, device):
                print(f"Left out, for memory: {cases[0].op} {cases[0].shape}.")
                continue
            if not budget.allows(f"{cases[0].op} {cases[0].shape}", first=not rows):
                continue
            seconds = _seconds(device, GROUP_SECONDS, quick=quick)
            limit = cases[0].op == "two_loop" and not cases[0].batch
            rows += lbfgs.measure(cases, device, seconds=seconds, wanted=wanted, limit=limit)
            if device.type == "cuda" and (cases[0].n <= GRAPH_N or cases[0] in lbfgs.published()):
                rows += lbfgs.measure(cases, device, seconds=seconds, wanted=wanted, graph=True)
            advance((i + 1) / len(groups), f"{cases[0].op} {cases[0].shape}")
    return rows


def measure_overheads(device: torch.device, budget: Budget, *, quick: bool) -> list[Overhead]:
    """Both optimizers, outside the closure."""
    cases, seconds = OVERHEADS[:1] if quick else OVERHEADS, 0.1 if quick else _seconds(device, 2.0, quick=False)
    found = []
    with console.progress("optimizers") as advance:
        for i, (n, history, search) in enumerate(cases):
            if not budget.allows(f"optimizers, n = {n:,}, history {history}", first=False):
                continue
            timings = outside_per_iteration(n, history, device, seconds=seconds, line_search_fn=search)
            found.append(Overhead(n, history, search, timings))
            advance((i + 1) / len(cases), f"n = {n:,}, history {history}")
    return found


def _errors(device: torch.device) -> dict[str, float] | None:
    try:
        return digits.direction_errors(digits.load(device))
    except ImportError:
        return None


def draw(path: Path, rows: Sequence[Row], bandwidth: machine.Bandwidth, about: dict[str, Any]) -> None:
    """Write the picture."""
    from secant.benchmarks import plot

    flat = [row for row in rows if row.case.op == "two_loop" and not row.case.batch and row.note == ""]
    ours = flat[0].name
    names = {"eager": "eager", ours: f"secant ({ours})", "compiled": "compiled", "compact": "compact eager"}
    series = []
    for name, label in names.items():
        points = [(row.case, row.seconds) for row in flat if row.name == name and row.seconds is not None]
        if points:
            color = plot.SECANT if name == ours else plot.PEERS[name]
            series.append(plot.Series(label, color, [case.n for case, _ in points], [seconds for _, seconds in points]))
    cases = list(dict.fromkeys(row.case for row in flat))
    reads = [2 * case.history_bytes / bandwidth.bytes_per_second for case in cases]
    limit = plot.Series("memory limit", plot.GREY, [case.n for case in cases], reads)
    compared = []
    for case in dict.fromkeys(row.case for row in rows):
        row = report.find(rows, case)
        found = report.ratios(rows, row) if row is not None else {}
        if found:
            compared.append((f"{case.op} {case.shape}", found))
    wins = sum(value >= 1 for _, found in compared for value in found.values())
    total = sum(len(found) for _, found in compared)
    plot.save_bench(
        path,
        plot.Panel("two_loop, 10 pairs, float32", "time of a call; dashed: the history read twice from memory"),
        series,
        limit,
        plot.Panel(
            f"Faster than the peer in {wins} of {total}", "how many times longer each peer takes; left of 1 we lose"
        ),
        compared,
        machine.summary(about),
    )


def _run_lbfgs(
    device: torch.device, about: dict[str, Any], plot_path: Path | None, budget: Budget, *, quick: bool
) -> dict[str, Any]:
    first = machine.bandwidth(device)
    rows = measure_rows(device, budget, quick=quick)
    overheads = measure_overheads(device, budget, quick=quick)
    bandwidth = max(first, machine.bandwidth(device))  # the better of before and after: a disturbance only takes
    about |= {"bandwidth": bandwidth.bytes_per_second, "bandwidth_method": bandwidth.method}
    if device.type == "cuda":
        bars = report.gpu_bars(rows, bandwidth.bytes_per_second)
    else:
        bars = report.cpu_bars(rows, overheads, _errors(device))
    tables = (
        report.rows_table(rows, bandwidth.bytes_per_second),
        report.overheads_table(overheads),
        report.bars_table(bars),
    )
    for table in tables:
        console.show(table)
    if plot_path is not None:
        draw(plot_path, rows, bandwidth, about)
        print(f"Wrote {plot_path}.")
    return report.as_json(about, rows, overheads, bars, bandwidth.bytes_per_second)


def measure_blocks(
    cases: Sequence[blocks.Case], device: torch.device, budget: Budget, *, quick: bool
) -> list[blocks.Row]:
    """Every case of the `blocks` family."""
    rows: list[blocks.Row] = []
    with console.progress("blocks") as advance:
        for i, case in enumerate(cases):
            if not budget.allows(f"{case.label}, n = {case.n}, {report.dtype_name(case.dtype)}", first=not rows):
                continue
            rows += blocks.measure(case, device, seconds=_seconds(device, BLOCK_SECONDS, quick=quick))
            advance((i + 1) / len(cases), f"{case.label}, n = {case.n}")
    return rows


def draw_blocks(path: Path, rows: Sequence[blocks.Row], about: dict[str, Any]) -> None:
    """Write the picture of the `blocks` family, of the rows in float32."""
    from secant.benchmarks import plot

    columns = []
    for op, assume in blocks.KINDS:
        chosen = [row for row in rows if row.case[:2] == (op, assume) and row.case.dtype is torch.float32]
        if not chosen:
            continue
        seconds: dict[str, dict[int, float]] = {}
        shares: dict[str, dict[int, float]] = {}
        for row in chosen:
            if row.note == REPLAY:
                continue
            share = blocks_report.of_copy(rows, row)
            if row.seconds is not None:
                seconds.setdefault(row.name, {})[row.case.n] = row.seconds
            if share is not None and row.name != "reference":  # which is far below everything
                shares.setdefault(row.name, {})[row.case.n] = share
        slower = (
            report.ratio(blocks_report.fastest(rows, case), report.find(rows, case))
            for case in dict.fromkeys(row.case for row in chosen)
        )
        found = [x for x in slower if x is not None]
        below = f"the fastest peer takes {min(found):.2g} to {max(found):.2g} times as long" if found else ""
        columns.append(plot.BlockPanels(plot.Panel(chosen[0].case.label, below), seconds, shares))
    elements = max(row.case.batch * row.case.n**2 for row in rows)
    plot.save_blocks(path, columns, f"{machine.summary(about)}; batches of up to {elements:,} elements, float32")


def _run_blocks(
    device: torch.device, about: dict[str, Any], plot_path: Path | None, budget: Budget, *, quick: bool, full: bool
) -> dict[str, Any]:
    cases = blocks.small_cases() if quick else blocks.cases(device, full=full)
    ordered = budget.order(cases, lambda case: (case.op, case.assume))
    rows = measure_blocks(ordered, device, budget, quick=quick)
    console.show(blocks_report.rows_table(rows, device))
    if found := blocks_report.verdicts(rows, device):
        console.show(blocks_report.bars_table(found))
    if plot_path is not None:
        draw_blocks(plot_path, rows, about)
        print(f"Wrote {plot_path}.")
    return blocks_report.as_json(rows, device)


def draw_products(path: Path, rows: Sequence[hvp.Row], bandwidth: float, about: dict[str, Any]) -> None:
    """Write the picture of the `hvp` family."""
    from secant.benchmarks import plot

    shares, compared = [], []
    for case in dict.fromkeys(row.case for row in rows):
        ours = report.find(rows, case)
        if ours is None or ours.bytes_per_second is None:
            continue
        label = f"{case.label}, {report.dtype_name(case.dtype)}"
        shares.append((label, ours.bytes_per_second / bandwidth))
        peers = {row.name: report.ratio(row, ours) for row in rows if row.case == case and row.kind == "peer"}
        compared.append((label, {name: value for name, value in peers.items() if value is not None}))
    found = [value for _, values in compared for value in values.values()]
    plot.save_products(
        path,
        shares,
        plot.Panel("Share of the memory bandwidth", "bytes that must move over time, X counted once"),
        plot.Panel(
            f"Faster than the peer in {sum(value >= 1 for value in found)} of {len(found)}",
            "how many times longer each peer takes; left of 1 we lose",
        ),
        compared,
        machine.summary(about),
    )


def _run_products(
    device: torch.device, about: dict[str, Any], plot_path: Path | None, budget: Budget, *, quick: bool
) -> dict[str, Any]:
    first = machine.bandwidth(device)
    rows: list[hvp.Row] = []
    cases = budget.order(hvp.small_cases(device) if quick else hvp.cases(device), lambda case: case.op)
    with console.progress("products") as advance:
        for i, case in enumerate(cases):
            if not budget.allows(f"{case.label}, {report.dtype_name(case.dtype)}", first=not rows):
                continue
            seconds = _seconds(device, PRODUCT_SECONDS, quick=quick)
            rows += hvp.measure(case, device, seconds=seconds, compiled=not quick)
            advance((i + 1) / len(cases), case.label)
    rate = max(first, machine.bandwidth(device)).bytes_per_second
    bars = hvp.gpu_bars(rows, rate) if device.type == "cuda" else hvp.cpu_bars(rows)
    console.show(hvp.rows_table(rows, rate))
    if bars:
        console.show(report.bars_table(bars, "Bars of the products"))
    if plot_path is not None:
        draw_products(plot_path, rows, rate, about)
        print(f"Wrote {plot_path}.")
    return hvp.as_json(rows, bars) | {"bandwidth": rate}


def run(
    device: torch.device,
    *,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool = False,
    families: Sequence[str] = FAMILIES,
    full: bool = False,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Run the benchmarks, print the tables, and write what is asked for.

    Args:
        device: where. json_path, plot_path: files to write; with several families, the first has the picture
            of this name and each other one goes to *-family; the roofline of all goes to *-roofline.
        quick: small inputs, short samples, no torch.compile. families: of `FAMILIES`. full: every n of the blocks.
        seconds: no case begins later than this after the start; what is left out is printed, and in the data.

    Returns:
        The plain data: "machine", "rates", what `report.as_json` returns, and as "blocks" and "hvp" what the `as_json`
        of each returns.
    """
    about, budget = machine.describe(device), Budget(seconds)
    result: dict[str, Any] = {"machine": about, "rates": machine.rates(device, small=quick)}
    lost: list[str] = []

    def picture(family: str) -> Path | None:
        alone = family == families[0]  # the first has the name that was given
        return plot_path if alone or plot_path is None else plot_path.with_stem(f"{plot_path.stem}-{family}")

    if "lbfgs" in families:
        result |= _run_lbfgs(device, about, picture("lbfgs"), budget, quick=quick)
        lost += result["lost"]
    if "blocks" in families:
        result["blocks"] = _run_blocks(device, about, picture("blocks"), budget, quick=quick, full=full)
        lost += result["blocks"]["lost"]
    if "hvp" in families:
        result["hvp"] = _run_products(device, about, picture("hvp"), budget, quick=quick)
        lost += result["hvp"]["lost"]
    result["left_out"] = budget.left_out
    if budget.left_out:
        print("\n  ".join(["Left out, for time:", *budget.left_out]))
    console.show(
        report.Table("Machine", ("", ""), [(key.replace("_", " "), str(value)) for key, value in about.items()])
    )
    print("\n  ".join(["Where secant loses:", *lost]) if lost else "secant loses nowhere above.")
    if plot_path is not None:
        from secant.benchmarks import roofline

        roof = plot_path.with_stem(f"{plot_path.stem}-roofline")
        points = roofline.points(roofline.rows_of(result))
        roofline.save(roof, points, result["rates"], "Operations and bytes of every kernel", machine.summary(about))
        print(f"Wrote {roof}.")
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Wrote {json_path}.")
    return result
