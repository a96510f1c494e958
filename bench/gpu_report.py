"""The report of a run of `make gpu`, in Markdown and as a picture, and the table of README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_results import family_data
from gpu_run import FAMILIES

#: What others say of their own software on their own machines: cited, never measured here, never asserted.
PUBLISHED = Path(__file__).with_name("published")
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def _word(status: int | str) -> str:
    return "ok" if status == 0 else "STOPPED, out of time" if status == "time" else f"FAILED ({status})"


def _ours(rows: Sequence[dict[str, Any]], n: int, theirs: dict[str, Any], note: str) -> float | None:
    """Find the seconds of a step of what `auto` takes on the problem of a published figure."""
    want = ("step", n, theirs["history"], 0, theirs["dtype"], theirs["dtype"], "backend", note)
    keys = ("op", "n", "m", "batch", "dtype", "storage", "kind", "note")
    return next((row["median"] for row in rows if tuple(row.get(key) for key in keys) == want), None)


def published(result: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Put published figures of another project beside our times of the same problems, in Markdown."""
    rows = (family_data(result, "lbfgs") or {}).get("rows", [])
    gpu = result["machine"].get("gpu") if result["device"] == "cuda" else None

    def ours(n: int, note: str) -> str:
        seconds = _ours(rows, n, theirs, note)
        return "not measured" if gpu is None or seconds is None else f"{seconds * 1e3:.3g}"

    lines, sources = [], []
    for number, table in enumerate(theirs["tables"], 1):
        sources.append(f"* [{number}] {table['version']}: {table['source']}")
        for figure in table["milliseconds"]:
            n = theirs["unknowns_per_atom"] * figure["atoms"]
            numbers = (f"{figure['calls']:.2f}", ours(n, ""), f"{figure['graph']:.2f}", ours(n, "graph replay"))
            lines.append((f"{figure['atoms']:,}", f"{n:,}", f"[{number}]", *numbers))
    columns = ("atoms", "n", "source", "theirs, calls, ms", "ours, calls", "theirs, graph, ms", "ours, graph")
    return "\n".join(
        [
            f"{theirs['project']}. Their GPU: {theirs['gpu']}; ours: {gpu or 'none'}. Two machines and two programs: "
            f"cited, not measured here. {theirs['dtype']}, {theirs['history']} pairs. {theirs['method']}",
            "",
            _table(columns, lines),
            "",
            *sources,
        ]
    )


def occupancy_tables(result: dict[str, Any]) -> list[str]:
    """Show registers, shared memory and occupancy of the kernels of the benchmark, a table a family, in Markdown."""
    data = result.get("occupancy")
    if not data:
        return []
    own = result["device"] == "cuda"
    parts = [
        "## Registers, shared memory, occupancy",
        "",
        f"Of {data['architecture']}{'' if own else ', by counting alone: there is no GPU here'}; registers and static "
        f"shared memory from {data['registers']}. blocks: that a multiprocessor holds, by NVIDIA's documented limits"
        f"{'; driver: by cudaOccupancyMaxActiveBlocksPerMultiprocessor; achieved: by ncu' if own else ''}.",
        "",
    ]
    columns = ("kernel", "of", "threads", "registers", "shared, static + dynamic", "blocks", "occupancy", "limit")
    for family, rows in data["families"].items():
        lines = []
        for row in rows:
            counted = (result.get("ncu") or {}).get(row["kernel"], {})
            more = f" and {len(row['cases']) - 1} more" if len(row["cases"]) > 1 else ""
            share = "-" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
            line = [
                f"`{row['kernel']}`", row["cases"][0] + more, row["threads"], row["registers"],
                f"{row['static']} + {row['dynamic']:,}", _or_dash(row["blocks"]), share, row["limit"] or "-",
            ]  # fmt: skip
            if own:
                achieved = counted.get("achieved")
                line += [_or_dash(row["driver_blocks"]), "-" if achieved is None else f"{achieved / 100:.0%}"]
            lines.append(line)
        parts += [f"### {family}", "", _table((*columns, "driver", "achieved") if own else columns, lines), ""]
    return parts


def _or_dash(x: object) -> str:
    return "-" if x is None else str(x)


def report(result: dict[str, Any]) -> str:
    """Write the run in Markdown."""
    parts = [f"# {result['machine'].get('gpu') or 'Rehearsal without a GPU'}", ""]
    units = {key: "Tflop/s" if key.startswith("matmul") else "TB/s" for key in result["rates"] or {}}
    rates = [(f"{key}, {unit}", f"{result['rates'][key] / 1e12:.3g}") for key, unit in units.items()]
    parts += [_table(("machine", ""), [*result["machine"].items(), *rates]), ""]
    rows = [
        (
            stage,
            one["command"][:60],
            _word(one["status"]),
            f"{one['seconds']:.0f}",
        )
        for stage, outcomes in result["stages"].items()
        for one in outcomes
    ]
    parts += ["## Stages", "", _table(("stage", "command", "", "seconds"), rows), ""]
    tests = result["tests"]
    if tests is not None:
        parts += [f"## Tests: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed", ""]
        parts += [f"* {name}" for name in tests["failed"]] + [""]
        if tests.get("reasons"):
            parts += [_table(("skipped because", "tests"), list(tests["reasons"].items())), ""]
    if result["bars"]:
        parts += ["## Bars", "", _table(("measure", "bar", "measured", ""), result["bars"]), ""]
    late = [line for f in FAMILIES for line in (result["bench"].get(f) or {}).get("left_out", [])]
    if late:
        parts += ["## Not measured, for time", ""] + [f"* {line}" for line in late] + [""]
    parts += occupancy_tables(result)
    for path in sorted(PUBLISHED.glob("*.json")):
        parts += ["## Published by others", "", published(result, json.loads(path.read_text())), ""]
    lost = [line for family in FAMILIES for line in (family_data(result, family) or {}).get("lost", [])]
    if lost:
        parts += ["## Where secant loses", ""] + [f"* {line}" for line in lost] + [""]
    return "\n".join(parts)


def draw_roofline(path: Path, result: dict[str, Any]) -> bool:
    """Draw every measured kernel as a point under the roofs of the run; False when there is nothing to draw."""
    from secant.benchmarks import roofline

    dots = [x for f in FAMILIES for x in roofline.dots((family_data(result, f) or {}).get("rows", []))]
    if not dots or not result["rates"]:
        return False
    facts = result["machine"]
    where = facts.get("gpu") or f"a rehearsal on {facts['system']}"
    footer = f"{where}, driver {facts.get('driver')}, torch {facts.get('torch')}"
    roofline.save(path, dots, result["rates"], "Operations and bytes of every kernel", footer)
    return True


def fill_readme(result: dict[str, Any], readme: Path) -> None:
    """Replace what stands between the markers of README.md by the bars of a run on a GPU.

    Raises:
        ValueError: the run is a rehearsal, or README.md has no markers.
    """
    if result["device"] != "cuda" or result["quick"] or not result["machine"].get("gpu"):
        raise ValueError("a rehearsal measures nothing: expected the result.json of a run on a GPU")
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme.name}: expected the markers {BEGIN} and {END}")
    facts = result["machine"]
    title = f"{facts['gpu']}, driver {facts.get('driver')}, torch {facts.get('torch')}; `make gpu` prints it."
    table = _table(("measure", "bar", "measured", ""), result["bars"])
    head, rest = text.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{title}\n\n{table}\n{END}{rest.split(END)[1]}")
