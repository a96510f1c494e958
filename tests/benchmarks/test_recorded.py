"""The recorded runs: one shape, nothing that contradicts itself, and an index that has them all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from secant.benchmarks.case import Bar, Row
from secant.benchmarks.families import NAMES, blocks, curvature, hvp, lbfgs
from secant.benchmarks.optimizers import OutsideClosure
from secant.benchmarks.report import plain_row
from secant.benchmarks.timing import REPLAY, Timing

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "results"
FILES = sorted(FOLDER.glob("*.json"))
CASES = {"lbfgs": lbfgs.Case, "blocks": blocks.Case, "hvp": hvp.Case, "curvature": curvature.Case}


def case_of(family, row):
    kind = OutsideClosure if row["op"] == "LBFGS" else CASES[family]
    names = kind.__dataclass_fields__
    values = {name: row[name] for name in names if name in row}
    return kind(**{name: getattr(torch, x) if name in ("dtype", "storage") else x for name, x in values.items()})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_have_the_shape_of_today_and_follow_from_their_times(path):
    data = json.loads(path.read_text())
    assert data.keys() <= {"machine", "rates", "families", "left_out"}
    assert data["families"].keys() <= set(NAMES)
    for name, family in data["families"].items():
        assert family.keys() == {"bandwidth", "rows", "bars", "lost"}
        for row in family["rows"]:
            case = case_of(name, row)
            timing = None if row["median"] is None else Timing((row["median"],))
            own = Row(case, row["by"], row["kind"], timing, row["error"], row["tolerance"], row["note"], row["timed"])
            want = plain_row([], own, family["bandwidth"])
            assert row.keys() - case.parameters().keys() == want.keys() - case.parameters().keys()
            for key in ("label", "unit", "bytes", "flops"):
                assert row[key] == want[key], key
            for key in ("bytes_per_second", "bandwidth_fraction"):
                assert row[key] == pytest.approx(want[key]), key
            assert row["median"] is None or row["min"] is None or row["min"] <= row["median"]
            peers = [x for x in family["rows"] if x["kind"] == "peer" and x["label"] == row["label"] and x["median"]]
            if row["kind"] == "backend" and REPLAY not in [row["note"], *(x["note"] for x in peers)]:
                ratios = {x["by"]: x["median"] / row["median"] for x in peers}
                assert row["speedup_over"] == pytest.approx(ratios)
        for bar in family["bars"]:
            assert bar["met"] == Bar("", bar["target"], bar["at_least"], bar["measured"]).met


def test_the_index_has_every_file():
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\S+)\]\(\1\)", text, flags=re.M)) == {path.name for path in FILES}
