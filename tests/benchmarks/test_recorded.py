"""The recorded runs: one shape, nothing that contradicts itself, and an index that has them all."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from secant.benchmarks.case import Bar, Case, Row
from secant.benchmarks.families import NAMES, load
from secant.benchmarks.report import plain_row
from secant.benchmarks.timing import REPLAY, Timing

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = sorted(FOLDER.glob("*.json"))
#: What `plain_row` writes besides the parameters of the case.
ABOUT = {
    "label", "unit", "by", "kind", "timed", "median", "min", "spread", "bytes", "flops", "bytes_per_second",
    "bandwidth_fraction", "of_limit", "error", "tolerance", "note", "speedup_over",
}  # fmt: skip
#: What it writes of some rows.
SOME = {"curve", "figures"}


def kinds(base=Case):
    """List our classes of cases, but for the abstract ones."""
    below = [kind for one in base.__subclasses__() if one.__module__.startswith("secant.") for kind in kinds(one)]
    return below if inspect.isabstract(base) else [base, *below]


def case_of(row):
    """Make the case of the one class that has these fields; its op or its label says the rest."""
    names = row.keys() - ABOUT - SOME
    [kind] = [kind for kind in kinds() if {field.name for field in dataclasses.fields(kind)} == names]
    values = {name: tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names}
    return kind(**{name: getattr(torch, x) if name in ("dtype", "storage") else x for name, x in values.items()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_have_the_shape_of_today_and_follow_from_their_times(path):
    data = json.loads(path.read_text())
    for name in NAMES:
        load(name)
    assert data.keys() <= {"machine", "rates", "families", "left_out"}
    assert data["families"].keys() <= set(NAMES)
    for family in data["families"].values():
        assert family.keys() == {"bandwidth", "rows", "bars", "lost"}
        for row in family["rows"]:
            case = case_of(row)
            timing = None if row["median"] is None else Timing((row["median"],))
            own = Row(
                case, row["by"], row["kind"], timing, row["error"], row["tolerance"], row["note"], row["timed"],
                row.get("curve", ()), row.get("figures", {}),
            )  # fmt: skip
            want = plain_row([], own, family["bandwidth"])
            assert row.keys() == want.keys()
            assert want.keys() - case.parameters().keys() - SOME == ABOUT
            for key in ("label", "unit", "bytes", "flops"):
                assert row[key] == want[key], key
            for key in ("bytes_per_second", "bandwidth_fraction"):
                assert row[key] == pytest.approx(want[key]), key
            assert row["median"] is None or row["min"] is None or row["min"] <= row["median"]
            peers = [x for x in family["rows"] if x["kind"] == "peer" and x["label"] == row["label"] and x["median"]]
            if row["kind"] == "backend" and REPLAY not in [row["note"], *(x["note"] for x in peers)]:
                ratios = {x["by"]: x["median"] / row["median"] for x in peers if row["median"]}
                assert row["speedup_over"] == pytest.approx(ratios)
        for bar in family["bars"]:
            assert bar["met"] == Bar("", bar["target"], bar["at_least"], bar["measured"]).met


def test_the_index_has_every_file():
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\S+)\]\(\1\)", text, flags=re.M)) == {path.name for path in FILES}
