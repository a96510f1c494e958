"""What the stages of `make gpu` left in their folder, as plain data."""

from __future__ import annotations

import csv
import json
import platform
import re
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_run import BENCHMARKS, FAMILIES, Outcome, Run
from gpu_stages import COUNTERS


def counters(path: Path) -> dict[str, dict[str, float]]:
    """Read kernel -> the largest of each of `COUNTERS` over its launches, from what ncu printed; empty without it."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        name, key = (row.get("Kernel Name") or "").split("(")[0], COUNTERS.get(row.get("Metric Name") or "")
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if key is not None:
            of_kernel = found.setdefault(name, {})
            of_kernel[key] = max(value, of_kernel.get(key, value))
    return found


def machine_facts() -> dict[str, Any]:
    """Collect GPU, driver and versions, as far as they can be had."""
    facts: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        facts["gpu"], facts["driver"], facts["memory"] = (part.strip() for part in line.split(","))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        facts["gpu"] = None
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=20).stdout
        facts["nvcc"] = re.findall(r"release ([\d.]+)", text)[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        facts["nvcc"] = None
    from importlib import metadata

    for package in ("secant", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numpy"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def tests_of(folder: Path) -> dict[str, Any] | None:
    """Count tests, failures and reasons of the skips of all JUnit files of a folder; None when there is none."""
    cases, read = [], 0
    for path in sorted(folder.glob("tests-*.xml")):
        try:
            cases += list(ET.parse(path).getroot().iter("testcase"))
        except (OSError, ET.ParseError):
            continue
        read += 1
    if not read:
        return None
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons = Counter((skip.get("message") or "")[:150] for case in cases if (skip := case.find("skipped")) is not None)
    skipped = sum(reasons.values())
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "skipped": skipped, "failed": failed, "reasons": dict(reasons.most_common())}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _last_line(path: Path) -> Any:
    try:
        return json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None


def bars_of(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """List (measure, bar, measured, verdict) of every family that was measured."""
    found = []
    word = {None: "not measured", True: "met", False: "NOT MET"}
    for family in FAMILIES:
        for bar in (family_data(result, family) or {}).get("bars", []):
            sign, value = "≥" if bar["at_least"] else "≤", bar["measured"]
            measured = "-" if value is None else f"{value:.3g}"
            found.append((bar["measure"], f"{sign} {bar['target']:.3g}", measured, word[bar["met"]]))
    return found


def family_data(result: dict[str, Any], family: str) -> dict[str, Any] | None:
    """Return rows, bars and losses of the benchmark of a family; None when it was not run or did not end."""
    data = result["bench"].get(family)
    return None if data is None else data["families"].get(BENCHMARKS.get(family, family))


def collect(run: Run, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Collect everything of a run as plain data."""
    result: dict[str, Any] = {
        "machine": machine_facts(),
        "device": run.device,
        "quick": run.quick,
        "stages": {stage: [one._asdict() for one in found] for stage, found in outcomes.items()},
        "rates": _last_line(run.out / "rates.log"),
        "occupancy": _last_line(run.out / "occupancy.log"),
        "ncu": counters(run.out / "ncu.csv"),
        "tests": tests_of(run.out),
        "bench": {family: _json(run.out / f"{family}.json") for family in run.families},
    }
    result["bars"] = bars_of(result)
    return result
