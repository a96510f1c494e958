"""What `make gpu` runs: build, test, measure and profile on a machine with a GPU, and write one report of it.

    python bench/gpu.py --out FOLDER [--stage build,test,bench,profile] [--family lbfgs,blocks,hvp]

Nothing is downloaded. Every stage runs in processes of its own with a time limit, whatever became of the others; the
exit status says whether all of them succeeded. The folder gets result.json, report.md, the pictures, and the logs.
`--device cpu --quick` rehearses all of it on a machine without a GPU: small inputs, no GPU tests, nothing claimed.
`--readme result.json` writes the table of a run into README.md, between its markers; `--propose-defaults result.json`
prints the entries of `secant.defaults` that follow from it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from secant.defaults import Default

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "test", "bench", "profile")
FAMILIES = ("lbfgs", "blocks", "hvp")
#: Seconds that a stage may take, its commands together; less than nine minutes in all, which fewer stages share.
LIMITS = {"build": 180, "test": 170, "bench": 140, "profile": 50}
SMALLEST, OCCUPANCY = (Path(__file__).with_name(name) for name in ("gpu_smallest.py", "occupancy.py"))
#: What others say of their own software on their own machines: cited, never measured here, never asserted.
PUBLISHED = Path(__file__).with_name("published")
BEGIN, END = "<!-- gpu table -->", "<!-- end of gpu table -->"


class Outcome(NamedTuple):
    """How a command of a stage ended: status 0, another exit status, or "time" when it was stopped."""

    command: str
    status: int | str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether it succeeded."""
        return self.status == 0


class Run(NamedTuple):
    """What was asked for."""

    out: Path
    stages: tuple[str, ...]
    families: tuple[str, ...]
    device: str
    quick: bool
    deadlines: dict[str, float]

    def left(self, stage: str) -> float:
        """Seconds that a stage has left; they run from when it is first asked."""
        now = time.perf_counter()
        scale = sum(LIMITS.values()) / sum(LIMITS[each] for each in self.stages)
        return self.deadlines.setdefault(stage, now + scale * LIMITS[stage]) - now

    def call(
        self, stage: str, *command: str, log: str, env: dict[str, str] | None = None, share: float = 1.0
    ) -> Outcome:
        """Run a command to its end or to that of its stage, or of a share of what is left; its output goes to a log."""
        [found] = self.together(stage, {log: command}, env=env, share=share)
        return found

    def together(
        self,
        stage: str,
        commands: dict[str, Sequence[str]],
        *,
        env: dict[str, str] | None = None,
        each: dict[str, dict[str, str]] | None = None,
        share: float = 1.0,
    ) -> list[Outcome]:
        """Run commands side by side, by the name of their log; `each`: what is added to the environment of one."""
        start = time.perf_counter()
        deadline = start + max(1.0, share * self.left(stage))
        running: dict[str, subprocess.Popen[bytes] | None] = {}
        for log, command in commands.items():
            with (self.out / log).open("a") as file:
                added = {**(env or {}), **(each or {}).get(log, {})}
                try:
                    running[log] = subprocess.Popen(
                        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **added}
                    )
                except OSError as error:
                    file.write(f"{error}\n")
                    running[log] = None
        found = []
        for log, process in running.items():
            status: int | str = 127
            if process is not None:
                try:
                    status = process.wait(max(0.1, deadline - time.perf_counter()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    status = "time"
            command = commands[log]
            name = " ".join((Path(command[0]).name, *command[1:]))
            found.append(Outcome(name, status, time.perf_counter() - start))
        return found


def build(run: Run) -> list[Outcome]:
    """In place, without isolation and without dependencies."""
    if run.device == "cpu":
        return []  # a rehearsal uses what is built
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    return [run.call("build", *pip, log="build.log", env={"SECANT_CUDA": "1"} | _only_this_architecture())]


def _only_this_architecture() -> dict[str, str]:
    """For CMakeLists.txt: code for the GPU that is here and no other; nothing where the compiler might not know it."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    majors = {line.strip().split(".")[0] for line in found}
    return {"SECANT_CUDA_ARCHITECTURES": f"sm_{majors.pop()}0"} if majors in ({"8"}, {"9"}) else {}


#: What the name or the folder of a test of a family has in it.
WORDS = {"lbfgs": ("two_loop", "history", "lbfgs"), "blocks": ("blocks",), "hvp": ("hvp", "curvature", "glm")}


def _test_files(folder: str) -> list[str]:
    """The files below a folder with tests for a GPU; others are not even imported: they need packages of their own."""
    found = []
    for path in sorted((ROOT / folder).rglob("test_*.py")):
        text = path.read_text()
        if "pytest.mark.gpu" in text or "triton_runner.make_tests" in text:
            found.append(str(path.relative_to(ROOT)))
    return found


def _other_files(families: Sequence[str]) -> list[str]:
    """Those outside of `tests/kernels` that touch these families; what is of no family touches all."""
    found = []
    for path in _test_files("tests"):
        parts = Path(path).with_suffix("").parts[1:]
        of = [family for family, words in WORDS.items() if any(word in part for word in words for part in parts)]
        if parts[0] != "kernels" and (not of or set(of) & set(families)):
            found.append(path)
    return found


#: Processes that share the tests of a family on a backend: those that compile every kernel as they go are many.
PARTS = {("blocks", "nvrtc"): 4, ("blocks", "triton"): 4}
#: Seconds that the last tests to begin, and the writing of the results, may take beyond the deadline for beginning.
GRACE = 25


def _pytest_runs(run: Run) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments of pytest, part of the tests): the backends of each family apart, and those of no family.

    The tests that fill the memory run one after the other, in a process of their own.
    """
    if run.device == "cpu":
        selected = ["tests/test_backends.py", "tests/gpu/test_whole_iterations.py"]
        return {"rehearsal": (["-m", "not gpu and not slow", *selected], "0/1")}
    large = "2_to_the_31"
    chosen = {"cuda": "not nvrtc and not triton", "nvrtc": "nvrtc", "triton": "triton"}
    files = {family: _test_files(f"tests/kernels/{family}") for family in run.families}
    files["rest"] = _other_files(run.families)
    runs = {}
    for family, paths in files.items():
        for backend, words in chosen.items():
            parts = PARTS.get((family, backend), 1)
            for part in range(parts):
                arguments = ["-m", "gpu", "-k", f"{words} and not {large}", *paths]
                runs[f"{family}-{backend}" + (f"-{part}" if parts > 1 else "")] = (arguments, f"{part}/{parts}")
    return runs | {"large": (["-m", "gpu", "-k", large, *(path for paths in files.values() for path in paths)], "0/1")}


def test(run: Run) -> list[Outcome]:
    """The tests marked `gpu` (a rehearsal: some that need none), and compute-sanitizer where it is found, together."""
    deadline = time.time() + run.left("test") - GRACE
    path = os.pathsep.join(x for x in (str(SMALLEST.parent), os.environ.get("PYTHONPATH", "")) if x)
    common = {"PYTHONPATH": path, "SECANT_TEST_DEADLINE": str(deadline), "OMP_NUM_THREADS": "1"}
    commands: dict[str, Sequence[str]] = {}
    each: dict[str, dict[str, str]] = {}
    for name, (selected, part) in _pytest_runs(run).items():
        junit = f"--junitxml={run.out.resolve() / f'tests-{name}.xml'}"
        options = ("-q", "-p", "gpu_pytest", "-p", "no:cacheprovider", "-o", f"junit_suite_name={name}", junit)
        commands[f"tests-{name}.log"] = (sys.executable, "-m", "pytest", *options, *selected)
        each[f"tests-{name}.log"] = {"SECANT_TEST_PART": part}
    sanitizer = shutil.which("compute-sanitizer")
    if run.device == "cuda" and sanitizer is not None:
        for tool in ("memcheck", "racecheck"):
            for backend in ("cuda", "triton", "nvrtc"):
                words = (sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SMALLEST), backend)
                commands[f"{tool}-{backend}.log"] = words
                # Each tensor an allocation of its own, so that reading past one is seen.
                each[f"{tool}-{backend}.log"] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = run.together("test", commands, env=common, each=each)
    names = [log.removesuffix(".log") for log in commands]
    # Where a family has no test for what was asked, pytest exits with 5.
    return [
        x._replace(command=name, status=0 if x.status == 5 else x.status) for name, x in zip(names, found, strict=True)
    ]


def bench(run: Run) -> list[Outcome]:
    """The benchmarks of each family, one process after the other, and the demo.

    Each family gets an equal share of what the stage has left, begins no case near its end, and writes what it has; the
    demo gets a fifth of such a share.
    """
    commands = []
    missing = [name for name in ("matplotlib", "sklearn", "rich") if importlib.util.find_spec(name) is None]
    for family in run.families:
        files = [f"--json={run.out.resolve() / family}.json"]
        if "matplotlib" not in missing:
            files.append(f"--plot={run.out.resolve() / family}.png")
        commands.append((family, ["bench", "--device", run.device, "--family", family, *files]))
    if "lbfgs" in run.families and not missing:
        commands.append(("demo", ["demo", "--device", run.device, f"--output={run.out.resolve() / 'demo.png'}"]))
    found = []
    weights = [0.2 if name == "demo" else 1.0 for name, _ in commands]
    for number, (name, words) in enumerate(commands):
        share = weights[number] / sum(weights[number:])
        limit = [] if name == "demo" else ["--seconds", f"{0.75 * share * run.left('bench'):.0f}"]
        quick = ["--quick"] if run.quick else []
        command = (sys.executable, "-m", "secant", *words, *limit, *quick)
        done = run.call("bench", *command, log=f"{name}.log", share=share)
        found.append(done._replace(command=" ".join([name, *limit, *quick])))
    if missing:
        found.append(
            Outcome(
                f"no {'picture' if 'matplotlib' in missing else 'demo'}: {', '.join(missing)} not installed", 0, 0.0
            )
        )
    return found


#: What `machine.rates` measures, as JSON.
RATES = """
import json, sys, torch
from secant.benchmarks import machine
print(json.dumps(machine.rates(torch.device(sys.argv[1]), small=sys.argv[1] == "cpu")))
"""


#: What ncu counts for each launch: warps in use over those that there could be, on average; and registers.
COUNTERS = {
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved",
    "launch__registers_per_thread": "registers",
}


def profile(run: Run) -> list[Outcome]:
    """What the machine gives, what a multiprocessor holds of each kernel, and what ncu counts where it is found."""
    python = sys.executable
    found = [
        run.call("profile", python, "-c", RATES, run.device, log="rates.log")._replace(command="rates"),
        run.call("profile", python, str(OCCUPANCY), run.device, log="occupancy.log")._replace(command="occupancy"),
    ]
    ncu = shutil.which("ncu")
    if run.device == "cuda" and ncu is not None:
        ours = ("--kernel-name", f"regex:^({'|'.join(FAMILIES)})_")
        command = (
            ncu,
            "--csv",
            "--clock-control",
            "none",
            "--metrics",
            ",".join(COUNTERS),
            *ours,
            python,
            str(OCCUPANCY),
            "run",
        )
        found.append(run.call("profile", *command, log="ncu.csv")._replace(command="ncu"))
    return found


def counters(path: Path) -> dict[str, dict[str, float]]:
    """Kernel -> the largest of each of `COUNTERS` over its launches, from what ncu printed; empty without it."""
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
    """GPU, driver and versions, as far as they can be had."""
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
    """Counts, failures and reasons of the skips of all JUnit files of a folder, or None when there is none."""
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
    """(measure, bar, measured, verdict) of every family that was measured."""
    found = []
    word = {None: "not measured", True: "met", False: "NOT MET"}
    for family in FAMILIES:
        for bar in (family_data(result, family) or {}).get("bars", []):
            sign, value = "≥" if bar["at_least"] else "≤", bar["measured"]
            measured = "-" if value is None else f"{value:.3g}"
            found.append((bar["measure"], f"{sign} {bar['target']:.3g}", measured, word[bar["met"]]))
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def _word(status: int | str) -> str:
    return "ok" if status == 0 else "STOPPED, out of time" if status == "time" else f"FAILED ({status})"


def family_data(result: dict[str, Any], family: str) -> dict[str, Any] | None:
    """What the benchmark of a family wrote: rows, bars, what it loses; None when it was not run or did not end."""
    data = result["bench"].get(family)
    return None if data is None else data["families"].get(family)


def _ours(rows: Sequence[dict[str, Any]], n: int, theirs: dict[str, Any], note: str) -> float | None:
    """Seconds of a step of what `auto` takes on the problem of a published figure."""
    want = ("step", n, theirs["history"], 0, theirs["dtype"], theirs["dtype"], "backend", note)
    keys = ("op", "n", "m", "batch", "dtype", "storage", "kind", "note")
    return next((row["median"] for row in rows if tuple(row.get(key) for key in keys) == want), None)


def published(result: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Published figures of another project beside our times of the same problems, in Markdown."""
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
    """Registers, shared memory and occupancy of the kernels of the benchmark, a table a family, in Markdown."""
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
    """The run in Markdown."""
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

    points = [x for f in FAMILIES for x in roofline.points((family_data(result, f) or {}).get("rows", []))]
    if not points or not result["rates"]:
        return False
    facts = result["machine"]
    where = facts.get("gpu") or f"a rehearsal on {facts['system']}"
    footer = f"{where}, driver {facts.get('driver')}, torch {facts.get('torch')}"
    roofline.save(path, points, result["rates"], "Operations and bytes of every kernel", footer)
    return True


def collect(run: Run, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Everything of a run as plain data."""
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


#: Op of a benchmark -> functions of the contract that it stands for; eigenvectors and their functions are one kernel.
FUNCTIONS = {
    "direction": ("update",),
    "step": ("update",),
    "block_inv": ("inv",),
    "block_solve": ("solve",),
    "block_eigh": ("eigh", "abs_inv", "inv_root"),
}
#: What `auto` may take.
BACKENDS = ("cuda", "triton", "nvrtc", "cpu")
#: How much faster, in geometric mean, another backend has to be to take the place of the one in the table.
MARGIN = 1.05
Times = dict[str, dict[tuple[Any, ...], float]]


def _times(family: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, Times]]:
    """Function -> size -> backend -> case -> seconds, of the rows that backends measured."""
    keys = ("op", "assume", "n", "m", "d", "k", "batch", "dtype", "storage", "note")
    found: dict[str, dict[int, Times]] = {}
    for row in rows:
        if row["kind"] != "backend" or row["by"] not in BACKENDS or not row["median"]:
            continue
        case = tuple(row.get(key) for key in keys)
        for function in FUNCTIONS.get(row["op"], (row["op"],)):
            of_size = found.setdefault(function, {}).setdefault(row["d" if family == "hvp" else "n"], {})
            of_size.setdefault(row["by"], {})[case] = row["median"]
    return found


def _best(times: Times, held: str) -> str:
    """The backend to take at a size: the one that is held, unless another is `MARGIN` faster on the cases of both."""
    best, gain = held, MARGIN
    for name, own in times.items():
        shared = own.keys() & times.get(held, {}).keys()
        ratio = math.exp(sum(math.log(times[held][x] / own[x]) for x in shared) / len(shared)) if shared else 0.0
        if held not in times and len(own) == max(map(len, times.values())):
            return name  # what is held was not measured, or was wrong
        if name != held and ratio >= gain:
            best, gain = name, ratio
    return best


def propose(result: dict[str, Any], source: str) -> list[Default]:
    """Entries of `secant.defaults` for the device of a run, from its times.

    A size that lies between two measured ones goes with the nearer, on a logarithmic scale. An op that was not measured
    keeps what the table has for any.

    Raises:
        ValueError: the run is a rehearsal, or did not test what it measured, or tests failed.
    """
    from secant import defaults

    device, tests = result["device"], result["tests"]
    if result["quick"] or (device == "cuda" and not result["machine"].get("gpu")):
        raise ValueError("a rehearsal measures nothing: expected the result.json of a run on a GPU")
    if not tests or tests["failed"]:
        raise ValueError(f"no defaults from a run whose tests failed or did not run: {tests and tests['failed'][:3]}")
    found = []
    for family in FAMILIES:
        data = family_data(result, family)
        if data is None:
            continue
        [rest] = defaults.entries(device, family)[defaults.ANY]
        found.append(rest)
        for function, by_size in _times(family, data["rows"]).items():
            chosen: list[tuple[int, str]] = []  # the largest size of each run of sizes with one backend
            for size, times in sorted(by_size.items()):
                held = defaults.find(device, family, function, size)
                assert held is not None
                best = _best(times, held.backend)
                if chosen and chosen[-1][1] == best:
                    chosen[-1] = (size, best)
                    continue
                if chosen:
                    chosen[-1] = (math.isqrt(chosen[-1][0] * size), chosen[-1][1])
                chosen.append((size, best))
            *bounded, (_, last) = chosen
            limits: list[tuple[int | None, str]] = [*bounded, (None, last)]
            found += [defaults.Default(device, family, function, *limit, source) for limit in limits]
    return found


def _choices(name: str, allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(x for x in text.split(",") if x)
        if wrong := [x for x in found if x not in allowed]:
            raise argparse.ArgumentTypeError(f"{name}: expected some of {','.join(allowed)}, got {wrong[0]!r}")
        return found or allowed

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all of them succeeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--stage", type=_choices("stage", STAGES), default=STAGES, help=",".join(STAGES))
    parser.add_argument("--family", type=_choices("family", FAMILIES), default=FAMILIES, help=",".join(FAMILIES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--quick", action="store_true", help="small inputs, to see that it runs")
    parser.add_argument("--readme", type=Path, metavar="RESULT", help="fill the table of README.md from a result.json")
    parser.add_argument(
        "--propose-defaults", type=Path, metavar="RESULT", help="print entries of secant.defaults from a result.json"
    )
    args = parser.parse_args(arguments)
    if args.propose_defaults is not None:
        for entry in propose(json.loads(args.propose_defaults.read_text()), str(args.propose_defaults)):
            print(f"    Default({', '.join(map(json.dumps, entry)).replace('null', 'None')}),")
        return 0
    if args.readme is not None:
        fill_readme(json.loads(args.readme.read_text()), ROOT / "README.md")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.stage, args.family, args.device, args.quick, {})
    for log in (*args.out.glob("*.log"), *args.out.glob("tests-*.xml"), *args.out.glob("ncu.csv")):
        log.unlink()  # of an earlier run
    work = {"build": build, "test": test, "bench": bench, "profile": profile}
    outcomes: dict[str, list[Outcome]] = {}
    for stage in STAGES:
        if stage in run.stages:
            outcomes[stage] = work[stage](run)
            for one in outcomes[stage]:
                print(
                    f"{stage:8} {'ok' if one.good else one.status!s:>5} {one.seconds:6.1f} s  {one.command[:90]}",
                    flush=True,
                )
    result = collect(run, outcomes)
    (run.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (run.out / "report.md").write_text(report(result))
    try:
        draw_roofline(run.out / "roofline.png", result)
    except ImportError:
        print("No picture: matplotlib is not installed.")
    print(f"Wrote {run.out / 'report.md'} and result.json.")
    return 0 if all(one.good for found in outcomes.values() for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
