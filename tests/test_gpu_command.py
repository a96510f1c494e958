"""The command behind `make gpu`: its stages, its limits, and what it writes. The stages themselves need a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from secant import defaults
from secant.benchmarks.families import lbfgs

ROOT = Path(__file__).resolve().parents[1]


def load(name, file):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its classes look their module up
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "bench"))  # where the command finds its parts
gpu = load("gpu_command", "gpu")
defaults_of, reports, results, runs_of, stages = (
    sys.modules[f"gpu_{name}"] for name in ("defaults", "report", "results", "run", "stages")
)


def a_run(tmp_path, **changes):
    run = runs_of.Run(tmp_path, runs_of.STAGES, runs_of.FAMILIES, "cpu", True, {})
    return run._replace(**changes)


def written(**families):
    """What `python -m secant bench --json` writes."""
    return {"families": families, "left_out": []}


RESULT = {
    "machine": {"gpu": "H100", "driver": "1.2", "torch": "2.13"},
    "device": "cuda",
    "quick": False,
    "stages": {"test": [{"command": "pytest", "status": 1, "seconds": 3.2}]},
    "rates": {"bandwidth": 3e12, "matmul_float32": 5e13, "matmul_float64": 3e13},
    "tests": {"passed": 7, "skipped": 1, "failed": ["tests.a::test_b"]},
    "bench": {
        "lbfgs": written(
            lbfgs={
                "bars": [{"measure": "two_loop", "target": 0.8, "at_least": True, "measured": 0.9, "met": True}],
                "rows": [
                    {
                        "op": "two_loop", "n": 10**7, "m": 10, "batch": 0, "dtype": "float32", "storage": "float32",
                        "by": "cuda", "kind": "backend", "note": "", "median": 7e-4, "bytes": 1.68e9, "flops": 1.03e9,
                    }
                ],
                "lost": ["two_loop: cuda takes 2x the time of compiled"],
            }
        ),
        "blocks": written(
            blocks={
                "bars": [
                    {
                        "measure": "block_inv, spd, n = 3, float32, against copy", "target": 1.6667, "at_least": False,
                        "measured": None, "met": None,
                    }
                ],
                "rows": [],
                "lost": [],
            }
        ),
        "hvp": None,
    },
}  # fmt: skip


def test_a_command_that_fails_or_hangs_leaves_the_next_alone(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    assert run.call("test", sys.executable, "-c", "print('hello')", log="a.log").good
    assert run.call("test", sys.executable, "-c", "raise SystemExit(3)", log="a.log").status == 3
    assert run.call("test", str(tmp_path / "no such program"), log="a.log").status == 127
    assert "hello" in (tmp_path / "a.log").read_text()
    run.deadlines["bench"] = time.perf_counter() + 1
    hangs = run.call("bench", sys.executable, "-c", "import time; time.sleep(60)", log="b.log")
    assert (hangs.status, hangs.good) == ("time", False)
    assert hangs.seconds < 30


def test_the_limits_are_nine_minutes_together(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_of.time, "perf_counter", lambda: 100.0)
    assert sum(runs_of.LIMITS.values()) <= 9 * 60
    assert tuple(runs_of.LIMITS) == runs_of.STAGES
    for stages in (runs_of.STAGES, ("bench",), ("test", "profile")):
        run = a_run(tmp_path, stages=stages, deadlines={})
        assert sum(run.left(stage) for stage in stages) == pytest.approx(sum(runs_of.LIMITS.values()))
        short = a_run(tmp_path, stages=stages, deadlines={}, budget=60.0)
        assert sum(short.left(stage) for stage in stages) == pytest.approx(60.0)


def test_stages_and_families_are_chosen(tmp_path, monkeypatch, capsys):
    done = []

    def stage(name, good):
        def work(run):
            done.append((name, run.families))
            return [runs_of.Outcome(name, 0 if good else 1, 0.1)]

        return work

    for name in runs_of.STAGES:
        monkeypatch.setattr(gpu, name, stage(name, name != "test"))
    assert gpu.main(["--out", str(tmp_path), "--stage", "test,bench", "--family", "hvp"]) == 1
    assert done == [("test", ("hvp",)), ("bench", ("hvp",))]
    assert gpu.main(["--out", str(tmp_path), "--stage", "bench", "--family", ""]) == 0
    assert done[-1] == ("bench", runs_of.FAMILIES)
    assert json.loads((tmp_path / "result.json").read_text())["stages"]["bench"][0]["status"] == 0
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "paint"])
    assert "expected some of build,test,bench,profile, got 'paint'" in capsys.readouterr().err


def test_the_tests_of_a_family():
    assert stages._test_files("tests/kernels/blocks") == [
        "tests/kernels/blocks/test_blocks_gpu.py", "tests/kernels/blocks/test_blocks_triton.py"
    ]  # fmt: skip
    everything = stages._other_files(runs_of.FAMILIES)
    assert "tests/gpu/test_whole_iterations.py" in everything
    assert "tests/glm/test_glm_gpu.py" in everything
    folders = tuple(f"tests/kernels/{family}/" for family in runs_of.FAMILIES)
    assert not any(path.startswith(folders) for path in everything)
    assert [path for path in everything if path not in stages._other_files(("blocks",))] == [
        "tests/glm/test_glm_gpu.py", "tests/gpu/test_minibatch_steps.py", "tests/test_minimize.py"
    ]  # fmt: skip


def test_junit_files_are_counted(tmp_path):
    assert results.tests_of(tmp_path) is None
    (tmp_path / "tests-a.xml").write_text(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure/></testcase>"
        "<testcase classname='a' name='left'><skipped message='no cupy'/></testcase></testsuite></testsuites>"
    )
    (tmp_path / "tests-b.xml").write_text(
        "<testsuites><testsuite><testcase classname='a' name='broken'><error/></testcase>"
        "<testcase classname='b' name='left'><skipped message='no cupy'/></testcase></testsuite></testsuites>"
    )
    (tmp_path / "tests-cut.xml").write_text("<testsuites><testsuite>")
    counted = {"passed": 1, "skipped": 2, "failed": ["a::bad", "a::broken"], "reasons": {"no cupy": 2}}
    assert results.tests_of(tmp_path) == counted
    assert "| no cupy | 2 |" in reports.report(RESULT | {"bars": [], "tests": counted})


def test_every_test_on_a_gpu_is_in_one_of_the_runs(tmp_path):
    runs = stages._pytest_runs(a_run(tmp_path, device="cuda"))
    for family in (*runs_of.FAMILIES, "rest"):
        for backend in ("cuda", "nvrtc", "triton"):
            parts = [part for name, (_, part) in runs.items() if name.startswith(f"{family}-{backend}")]
            count = stages.PARTS.get((family, backend), 1)
            assert parts == [f"{i}/{count}" for i in range(count)]
    every = set(stages._test_files("tests"))
    assert set(runs["large"][0][4:]) == every
    assert {path for name, (words, _) in runs.items() if name.endswith("-cuda") for path in words[4:]} == every
    alone = stages._pytest_runs(a_run(tmp_path, device="cuda", families=("hvp",)))
    assert set(alone) == {*(f"{x}-{y}" for x in ("hvp", "rest") for y in ("cuda", "nvrtc", "triton")), "large"}
    assert all("tests/kernels/hvp/" in path for path in alone["hvp-cuda"][0][4:])


@pytest.mark.slow
def test_the_runs_have_each_test_once(tmp_path):
    """What pytest collects for them together is what it collects for all: nothing is lost between the words."""

    def collected(arguments):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    runs = stages._pytest_runs(a_run(tmp_path, device="cuda", families=("lbfgs",)))
    files = sorted({path for words, _ in runs.values() for path in words[4:]})
    found = [name for words, _ in runs.values() for name in collected(words)]
    assert len(found) == len(set(found)) > 100
    assert set(found) == set(collected(["-m", "gpu", *files]))


def test_parts_of_the_tests_and_their_deadline(tmp_path):
    """Two parts have each test once, in an order of their own; after the deadline the rest is skipped and says why."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(40))\ndef test_it(i):\n    pass\n"
    )

    def run(name, **environment):
        junit = tmp_path / f"tests-{name}.xml"
        command = [sys.executable, "-m", "pytest", "-p", "gpu_pytest", "-q", f"--junitxml={junit}", str(tmp_path)]
        path = {"PYTHONPATH": str(ROOT / "bench")}
        done = subprocess.run(
            command, env=os.environ | path | environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        found = ET.parse(junit).getroot().iter("testcase")
        return [(case.get("name"), case.find("skipped") is not None) for case in found]

    first, second = (run(f"{i}", SECANT_TEST_PART=f"{i}/2") for i in range(2))
    assert len(first) + len(second) == len({*first, *second}) == 40
    assert min(len(first), len(second)) > 8
    names = [int(name[8:-1]) for name, _ in first]
    assert names != sorted(names)
    assert all(skipped for _, skipped in run("late", SECANT_TEST_PART="0/2", SECANT_TEST_DEADLINE="1"))
    assert "out of time" in next(iter(results.tests_of(tmp_path)["reasons"]))


def test_commands_side_by_side(tmp_path):
    """Each has its log, its environment and its status, and none waits for another."""
    code = "import os, sys, time; print(os.environ['A']); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"
    commands = {f"{name}.log": (sys.executable, "-c", code, wait, status) for name, wait, status in (
        ("a", "0", "0"), ("b", "0", "3"), ("c", "60", "0")
    )}  # fmt: skip
    run = a_run(tmp_path)
    run.deadlines["test"] = time.perf_counter() + 6
    found = run.together("test", commands | {"d.log": ("no such program",)}, env={"A": "x"}, each={"b.log": {"A": "y"}})
    assert [one.status for one in found] == [0, 3, "time", 127]
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in "abc"] == ["x", "y", "x"]


def test_the_smallest_calls_launch_every_kernel(monkeypatch):
    """By the planners alone, for the multiprocessors and the memory of three GPUs."""
    smallest, occupancy = (load(f"{name}_command", name) for name in ("gpu_smallest", "occupancy"))
    from secant import backends

    planners = {
        "lbfgs": occupancy.lbfgs_plan.Launcher, "blocks": occupancy.blocks_plan.Launcher,
        "hvp": occupancy.hvp_plan.Launcher, "precond": occupancy.precond_plan.Launcher,
        "search": occupancy.search_plan.Launcher,
    }  # fmt: skip
    devices = (occupancy.H100_DEVICE, occupancy.Device(108, 163 << 10), occupancy.Device(148, 227 << 10))
    for name, device in zip(
        smallest.NAMES, devices, strict=True
    ):  # by another name each, so that nothing is remembered
        recorder = occupancy.Recorder(device)
        launchers = {family: planner(recorder) for family, planner in planners.items()}
        monkeypatch.setattr(backends, "resolve", lambda family, *_, launchers=launchers: launchers[family])
        with backends.use_backend(name):
            for calls in smallest.FAMILIES.values():
                calls(torch.device("cpu"), every=True)
        assert {item.kernel for item in recorder.found} == set(smallest.kernels())


def test_the_report_has_bars_failures_and_losses():
    text = reports.report(RESULT | {"bars": results.bars_of(RESULT)})
    assert text.startswith("# H100")
    assert "| bandwidth, TB/s | 3 |\n| matmul_float32, Tflop/s | 50 |" in text
    assert "| two_loop | ≥ 0.8 | 0.9 | met |" in text
    assert "| block_inv, spd, n = 3, float32, against copy | ≤ 1.67 | - | not measured |" in text
    assert "7 passed, 1 skipped, 1 failed" in text
    assert "* tests.a::test_b" in text
    assert "* two_loop: cuda takes 2x the time of compiled" in text
    assert "FAILED (1)" in text


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("9.0\n", "sm_90"), ("8.6\n8.0\n", "sm_80"), ("12.0\n", None), ("", None), ("8.0\n9.0", None)],
)
def test_the_build_is_for_the_gpu_that_is_there(monkeypatch, printed, expected):
    monkeypatch.setattr(stages.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 0, stdout=printed))
    assert stages._only_this_architecture().get("SECANT_CUDA_ARCHITECTURES") == expected


def test_sanitizers_see_every_backend_and_every_allocation(tmp_path, monkeypatch):
    seen = {}

    def together(self, stage, commands, *, env=None, each=None, share=1.0):
        seen.update(commands=commands, each=each, env=env)
        return [runs_of.Outcome("x", 5 if log == "tests-hvp-nvrtc.log" else 0, 1.0) for log in commands]

    monkeypatch.setattr(runs_of.Run, "together", together)
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/bin/{name}")
    found = stages.test(a_run(tmp_path, device="cuda"))
    assert all(one.good for one in found)
    for tool in ("memcheck", "racecheck"):
        for backend in ("cuda", "triton", "nvrtc"):
            words = seen["commands"][f"{tool}-{backend}.log"]
            assert words[:3] == ("/bin/compute-sanitizer", "--tool", tool)
            assert words[-2:] == (str(stages.SMALLEST), backend)
            assert seen["each"][f"{tool}-{backend}.log"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert float(seen["env"]["SECANT_TEST_DEADLINE"]) < time.time() + runs_of.LIMITS["test"]
    assert seen["each"]["tests-blocks-triton-3.log"] == {"SECANT_TEST_PART": "3/4"}


def test_packages_that_are_missing_cost_the_pictures_alone(tmp_path, monkeypatch):
    seen = []

    def call(self, stage, *command, log, env=None, share=1.0):
        seen.append(command[3:])
        return runs_of.Outcome("x", 0, 1.0)

    monkeypatch.setattr(runs_of.Run, "call", call)
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    found = stages.bench(a_run(tmp_path))
    count = len(runs_of.FAMILIES)
    assert [one.command for one in found[:count]] == [
        f"{f} --seconds {w[-2]} --quick" for f, w in zip(runs_of.FAMILIES, seen, strict=True)
    ]
    assert found[count] == ("no picture: matplotlib, sklearn, rich not installed", 0, 0.0)
    assert [words[0] for words in seen] == ["bench"] * count
    assert [words[words.index("--family") + 1] for words in seen] == [
        "lbfgs", "blocks", "hvp", "precond", "batched",
    ]  # fmt: skip
    assert not any("--plot" in word for words in seen for word in words)
    shares = [float(words[-2]) for words in seen]
    assert shares == sorted(shares)
    assert shares[-1] <= 0.75 * runs_of.LIMITS["bench"]
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: True)
    assert [one.command.split()[0] for one in stages.bench(a_run(tmp_path))] == [*runs_of.FAMILIES, "demo"]
    assert any("--plot" in word for word in seen[count])


def test_published_figures_stand_beside_ours_and_are_never_taken_for_them():
    [path] = reports.PUBLISHED.glob("*.json")
    theirs = json.loads(path.read_text())
    assert theirs["gpu"].startswith("NVIDIA H100")
    assert {x["atoms"] * 3 for table in theirs["tables"] for x in table["milliseconds"]} == set(lbfgs.PUBLISHED)
    assert all(table["source"].startswith("https://github.com/NVIDIA/") for table in theirs["tables"])
    text = reports.report(RESULT | {"bars": []})
    assert "NVIDIA H100 80GB HBM3; ours: H100." in text
    assert "| 1,000,000 | 3,000,000 | [1] | 3.30 | not measured | 3.38 | not measured |" in text
    case = lbfgs.published()[2]
    row = case.parameters() | {"by": "cuda", "kind": "backend"}
    rows = [row | {"note": note, "median": time} for note, time in (("", 9.5e-4), ("graph replay", 9.25e-4))]
    measured = RESULT | {"bars": [], "bench": {"lbfgs": written(lbfgs={"bars": [], "rows": rows, "lost": []})}}
    assert "| 1,000,000 | 3,000,000 | [1] | 3.30 | 0.95 | 3.38 | 0.925 |" in reports.report(measured)
    assert "ours: none." in reports.report(measured | {"device": "cpu"})
    assert "| 0.95 |" not in reports.report(measured | {"device": "cpu"})


def test_the_problems_of_the_published_figures_are_measured_on_a_gpu():
    def of(device, **changes):
        return [case for group in lbfgs.groups(torch.device(device), **changes) for case in group]

    for case in lbfgs.published():
        assert (case.op, case.m, case.batch) == ("step", 6, 0)
        assert case.dtype == case.storage == torch.float64
        assert case in of("cuda")
        assert case not in of("cuda", quick=True) + of("cpu")


def test_occupancy_has_a_table_a_family(tmp_path):
    row = {
        "kernel": "lbfgs_a", "cases": ["step 7", "step 9"], "threads": 256, "registers": 80, "static": 0,
        "dynamic": 67184, "blocks": 3, "occupancy": 0.375, "limit": "registers", "driver_blocks": 3,
    }  # fmt: skip
    unknown = row | {"kernel": "hvp_b", "blocks": None, "occupancy": None, "limit": None, "driver_blocks": None}
    data = {"architecture": "sm_90", "registers": "cuobjdump", "families": {"lbfgs": [row], "hvp": [unknown]}}
    (tmp_path / "ncu.csv").write_text(
        "==PROF== Connected\nany words\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","lbfgs_a","sm__warps_active.avg.pct_of_peak_sustained_active","%","31.5"\n'
        '"1","lbfgs_a","sm__warps_active.avg.pct_of_peak_sustained_active","%","33.1"\n'
        '"1","lbfgs_a(Update)","launch__registers_per_thread","register/thread","80"\n'
        '"2","lbfgs_a","something_else","","n/a"\n'
    )
    counted = results.counters(tmp_path / "ncu.csv")
    assert counted == {"lbfgs_a": {"achieved": 33.1, "registers": 80.0}}
    assert results.counters(tmp_path / "none.csv") == {}
    text = reports.report(RESULT | {"bars": [], "occupancy": data, "ncu": counted})
    assert "| `lbfgs_a` | step 7 and 1 more | 256 | 80 | 0 + 67,184 | 3 | 38% | registers | 3 | 33% |" in text
    assert "### hvp" in text
    assert "| `hvp_b` | step 7 and 1 more | 256 | 80 | 0 + 67,184 | - | - | - | - | - |" in text
    rehearsed = reports.report(RESULT | {"bars": [], "occupancy": data, "ncu": {}, "device": "cpu"})
    assert "there is no GPU here" in rehearsed
    assert "| 38% | registers |\n" in rehearsed
    assert "occupancy" not in reports.report(RESULT | {"bars": [], "occupancy": None})


def test_the_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    assert reports.draw_roofline(tmp_path / "roofline.png", RESULT)
    assert (tmp_path / "roofline.png").stat().st_size > 5000
    assert not reports.draw_roofline(tmp_path / "none.png", RESULT | {"rates": None})
    assert not reports.draw_roofline(tmp_path / "none.png", RESULT | {"bench": {"lbfgs": None}})


def test_the_table_of_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{reports.BEGIN}\nold\n{reports.END}\nafter\n")
    reports.fill_readme(RESULT | {"bars": results.bars_of(RESULT)}, readme)
    text = readme.read_text()
    assert "old" not in text
    assert "| two_loop | ≥ 0.8 | 0.9 | met |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    for rehearsal in ({"device": "cpu"}, {"quick": True}, {"machine": {"gpu": None}}):
        with pytest.raises(ValueError, match="a rehearsal measures nothing"):
            reports.fill_readme(RESULT | {"bars": []} | rehearsal, readme)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the markers"):
        reports.fill_readme(RESULT | {"bars": []}, readme)


def test_the_readme_has_the_markers_once():
    text = (ROOT / "README.md").read_text()
    assert text.count(reports.BEGIN) == text.count(reports.END) == 1


def measured(family, op, size, by, median, **changes):
    return {"op": op, "d" if family == "hvp" else "n": size, "by": by, "kind": "backend", "median": median} | changes


def a_result(**rows):
    bench = {family: written(**{family: {"rows": found, "bars": [], "lost": []}}) for family, found in rows.items()}
    return RESULT | {"bench": bench, "tests": {"passed": 9, "skipped": 0, "failed": []}}


def test_defaults_are_proposed_by_family():
    """cuda holds the table: triton takes over where it is clearly faster over all, and only there."""
    for times, best in ((((1.0, 0.5), (1.0, 0.98)), "triton"), (((1.0, 0.9), (1.0, 1.0)), "triton"),
                        (((1.0, 0.98), (1.0, 0.95)), "cuda"), (((1.0, None), (1.0, None)), "cuda")):  # fmt: skip
        rows = [
            measured("lbfgs", "two_loop", n, by, time, dtype=dtype)
            for n, pair in zip((10, 1000), times, strict=True)
            for by, time in zip(("cuda", "triton"), pair, strict=True)
            for dtype in ("float32", "float64")
        ]
        rows += [measured("lbfgs", "two_loop", 10, "reference", 0.1), measured("lbfgs", "LBFGS", 50, "secant", 0.1)]
        found = defaults_of.propose(a_result(lbfgs=rows), "a run")
        assert found == [defaults.Default("cuda", "lbfgs", best, "a run")]


def test_a_backend_counts_by_the_cases_that_both_have():
    """Twice as fast on one and four times slower on the other is slower; a case of one alone says nothing."""
    rows = [
        measured("blocks", "block_eigh", 3, "cuda", 1.0, dtype="float32"),
        measured("blocks", "block_eigh", 3, "cuda", 1.0, dtype="float64"),
        measured("blocks", "block_eigh", 3, "triton", 0.5, dtype="float32"),
        measured("blocks", "block_eigh", 3, "triton", 4.0, dtype="float64"),
        measured("blocks", "block_eigh", 3, "nvrtc", 0.1, dtype="bfloat16"),
        measured("blocks", "block_inv", 3, "triton", 0.5, dtype="float32"),
    ]
    (found,) = defaults_of.propose(a_result(blocks=rows), "a run")
    assert found.backend == "cuda"


def test_proposed_defaults_are_a_table(tmp_path, capsys, monkeypatch):
    rows = [measured("hvp", "glm_hvp", d, "triton", 1.0) for d in (8, 256)]
    rows += [measured("hvp", "glm_hvp", d, "cuda", time) for d, time in ((8, 3.0), (256, 0.5))]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(a_result(hvp=rows)))
    assert gpu.main(["--propose-defaults", str(path)]) == 0
    names = {"Default": defaults.Default}
    table = eval(f"({capsys.readouterr().out})", names)
    assert [entry[:3] for entry in table] == [("cuda", "hvp", "triton")]
    monkeypatch.setattr(defaults, "TABLE", table)
    assert defaults.find("cuda", "hvp").backend == "triton"


def test_no_defaults_from_a_rehearsal_or_a_run_with_failures():
    for change in ({"quick": True}, {"machine": {"gpu": None}}):
        with pytest.raises(ValueError, match="a rehearsal measures nothing"):
            defaults_of.propose(a_result() | change, "a run")
    for tests in (None, {"passed": 1, "skipped": 0, "failed": ["tests.a::test_b"]}):
        with pytest.raises(ValueError, match="tests failed or did not run"):
            defaults_of.propose(a_result() | {"tests": tests}, "a run")


@pytest.mark.parametrize(
    ("name", "family"), [("", "lbfgs"), ("-blocks", "blocks"), ("-blocks-avx2", "blocks"), ("-hvp", "hvp")]
)
def test_recorded_runs_on_a_cpu_propose_what_the_table_has(name, family):
    data = json.loads((ROOT / f"bench/results/cpu-xeon-2core{name}.json").read_text())
    found = defaults_of.propose(a_result() | {"device": "cpu", "bench": {family: data}}, "a run")
    assert [(entry.family, entry.backend) for entry in found] == [(family, "cpu")]
