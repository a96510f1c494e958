"""`python -m secant bench`: the kernels against every peer, the optimizers, and the bars."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from secant.benchmarks import machine, report
from secant.benchmarks.case import Case, Row, no_compile
from secant.benchmarks.families import NAMES as FAMILIES
from secant.benchmarks.families import Choice, Family, load
from secant.benchmarks.measure import fits
from secant.cli import console

#: Of the seconds of a family, what a GPU is timed for: nothing else runs there, and its calls are short.
GPU_SHARE, QUICK_SECONDS = 0.25, 0.02
C = TypeVar("C")


class Budget:
    """Time to begin cases in, and what was left out when it was over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    def order(self, cases: Sequence[C], kind: Callable[[C], object]) -> list[C]:
        """Keep the order; where time may run out, put the first of every kind first, then the second of every kind."""
        if math.isinf(self._end):
            return list(cases)
        seen: Counter[object] = Counter()
        ranked = []
        for case in cases:
            ranked.append((seen[kind(case)], case))
            seen[kind(case)] += 1
        return [case for _, case in sorted(ranked, key=lambda item: item[0])]

    def allows(self, label: str, *, first: bool) -> bool:
        """Say whether to begin a case; the first of a list always, so that there is something to show."""
        if first or time.perf_counter() < self._end:
            return True
        self.left_out.append(label)
        return False


def measure_family(
    family: Family,
    device: torch.device,
    budget: Budget,
    *,
    quick: bool,
    full: bool,
    choice: Choice | None = None,
    without: Collection[str] = (),
) -> list[Row]:
    """Measure every group of cases that there is memory and time for, of a choice if there is one."""

    def wanted(case: Case, name: str) -> bool:
        return name not in without and (not quick or no_compile(case, name))

    seconds = QUICK_SECONDS if quick else family.seconds * (GPU_SHARE if device.type == "cuda" else 1.0)
    rows: list[Row] = []
    with console.progress(family.title.lower()) as advance:
        done, count = 0, 1

        def within(share: float, label: str) -> None:
            """Show how far a group is."""
            advance((done + share) / count, label)

        if family.choose is not None:
            family = family.choose(
                (choice or Choice())._replace(allows=lambda label: budget.allows(label, first=False), advance=within)
            )
        groups = budget.order(family.groups(device, quick=quick, full=full), lambda cases: cases[0].kind)
        count = max(1, len(groups))
        for i, cases in enumerate(groups):
            done = i
            label = cases[0].label
            if not fits(cases, device):
                print(f"Left out, for memory: {label}.")
                continue
            if not budget.allows(label, first=not rows):
                continue
            rows += family.measure(cases, device, seconds=seconds, wanted=wanted)
            advance((i + 1) / len(groups), label)
    return rows


def run(
    device: torch.device,
    *,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool = False,
    families: Sequence[str] = FAMILIES,
    full: bool = False,
    seconds: float = math.inf,
    choice: Choice | None = None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Run the benchmarks, print the tables, and write what is asked for.

    Args:
        device: where. json_path, plot_path: files to write; with several families, the first has the picture
            of this name and each other one goes to *-family; the roofline of all goes to *-roofline.
        quick: small inputs, short samples, no torch.compile. families: of `FAMILIES`. full: every size.
        seconds: no case begins later than this after the start; what is left out is printed, and in the data.
        choice: of tasks, optimizers and starts, for a family with many runs, of which no run begins later either.
        without: contenders that are left out, by their names in the tables.

    Returns:
        The plain data: "machine", "rates", "families" with what `report.as_json` returns of each, and "left_out".
    """
    about, budget = machine.describe(device), Budget(seconds)
    print(f"{machine.summary(about)}; table of choices in force: {about['choices']}")
    result: dict[str, Any] = {"machine": about, "rates": machine.rates(device, small=quick), "families": {}}
    lost: list[str] = []
    for name in families:
        family = load(name)
        first = machine.bandwidth(device)
        rows = measure_family(family, device, budget, quick=quick, full=full, choice=choice, without=without)
        best = max(first, machine.bandwidth(device))  # the better of before and after: a disturbance only takes
        about["bandwidth_method"], rate = best.method, best.bytes_per_second
        bars = family.bars(rows, device, rate)
        for table in family.tables(family.title, rows, rate, bars):
            console.show(table)
        if bars:
            console.show(report.bars_table(bars, f"Bars: {family.title.lower()}"))
        if plot_path is not None:
            from secant.benchmarks import plot

            # The first has the name that was given.
            path = plot_path if name == families[0] else plot_path.with_stem(f"{plot_path.stem}-{name}")
            plot.save_family(path, rows, rate, machine.summary(about))
            print(f"Wrote {path}.")
        result["families"][name] = report.as_json(rows, bars, rate)
        lost += result["families"][name]["lost"]
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
        dots = roofline.dots(roofline.rows_of(result))
        if dots:
            roofline.save(roof, dots, result["rates"], "Operations and bytes of every kernel", machine.summary(about))
            print(f"Wrote {roof}.")
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"Wrote {json_path}.")
    return result
