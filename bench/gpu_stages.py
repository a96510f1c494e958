"""The stages of `make gpu`: build, test, bench and profile, each a few commands in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_run import BENCHMARKS, FAMILIES, ROOT, WITHOUT, Outcome, Run

SMALLEST, OCCUPANCY = (Path(__file__).with_name(name) for name in ("gpu_smallest.py", "occupancy.py"))


def build(run: Run) -> list[Outcome]:
    """Build in place, without isolation and without dependencies."""
    if run.device == "cpu":
        return []  # a rehearsal uses what is built
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".")
    return [run.call("build", *pip, log="build.log", env={"SECANT_CUDA": "1"} | _only_this_architecture())]


def _only_this_architecture() -> dict[str, str]:
    """Ask CMakeLists.txt for code for the GPU that is here alone; for nothing where the compiler may not know it."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    majors = {line.strip().split(".")[0] for line in found}
    return {"SECANT_CUDA_ARCHITECTURES": f"sm_{majors.pop()}0"} if majors in ({"8"}, {"9"}) else {}


#: What the name or the folder of a test of a family has in it.
WORDS = {
    "lbfgs": ("two_loop", "history", "lbfgs"),
    "blocks": ("blocks",),
    "hvp": ("hvp", "curvature", "glm"),
    "precond": ("minibatch",),
    "search": ("minimize",),
}


def _test_files(folder: str) -> list[str]:
    """List the files below a folder with tests for a GPU; others are not imported: they need packages of their own."""
    found = []
    for path in sorted((ROOT / folder).rglob("test_*.py")):
        text = path.read_text()
        if "pytest.mark.gpu" in text or "triton_runner.make_tests" in text:
            found.append(str(path.relative_to(ROOT)))
    return found


def _other_files(families: Sequence[str]) -> list[str]:
    """List those outside of the folders of families that touch these; what is of no family touches all."""
    found = []
    for path in _test_files("tests"):
        parts = Path(path).with_suffix("").parts[1:]
        of = [family for family, words in WORDS.items() if any(word in part for word in words for part in parts)]
        apart = parts[0] == "kernels" and parts[1] in FAMILIES
        if not apart and (not of or set(of) & set(families)):
            found.append(path)
    return found


#: Processes that share the tests of a family on a backend: those that compile every kernel as they go are many.
PARTS = {("blocks", "nvrtc"): 4, ("blocks", "triton"): 4}
#: Seconds that the last tests to begin, and the writing of the results, may take beyond the deadline for beginning.
GRACE = 25


def _pytest_runs(run: Run) -> dict[str, tuple[list[str], str]]:
    """List name -> (arguments of pytest, part of the tests): the backends of each family apart, and those of none.

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
    """Run the tests marked `gpu` (a rehearsal: some that need none), and compute-sanitizer where it is found."""
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
    """Run the benchmarks of each family, one process after the other, and the demo.

    Each family gets an equal share of what the stage has left, begins no case near its end, and writes what it has; the
    demo gets a fifth of such a share.
    """
    commands = []
    missing = [name for name in ("matplotlib", "sklearn", "rich") if importlib.util.find_spec(name) is None]
    for family in run.families:
        files = [f"--json={run.out.resolve() / family}.json"]
        if "matplotlib" not in missing:
            files.append(f"--plot={run.out.resolve() / family}.png")
        name = BENCHMARKS.get(family, family)
        words = ["bench", "--device", run.device, "--family", name, "--without", *WITHOUT[family]]
        commands.append((family, [*words, *files]))
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
    """Measure what the machine gives, what a multiprocessor holds of each kernel, and what ncu counts."""
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
