from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import secant
from secant import backends
from secant.__main__ import main
from secant.benchmarks import machine
from secant.benchmarks.families import NAMES
from secant.benchmarks.report import Table
from secant.cli import console

CPU = torch.device("cpu")


def test_alone_prints_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("info", "demo", "bench"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "invalid choice: 'train'"),
        (["demo", "--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["demo", "--device", "cuda:99"], "there is no device cuda:99"),
        (["demo", "--output", "no/such/directory/x.png"], "expected a file in an existing directory"),
        (["bench", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_why(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_info_json_has_every_backend_and_the_build(capsys):
    assert main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    table = [(row["family"], row["backend"], row["reason"]) for row in about["backends"]]
    assert table == backends.table()
    assert all(row["available"] == (row["reason"] is None) for row in about["backends"])
    assert about["version"] == secant.__version__
    assert about["packages"]["torch"] == torch.__version__
    assert about["choices_in_force"] == machine.table_in_force()
    build = about["build"]["secant._cpu"]
    if importlib.util.find_spec("secant._cpu"):
        assert build["isa"] in build["isas_usable"]
        assert set(build["isas_usable"]) <= set(build["isas"])
    else:
        assert "secant._cpu" in build["unavailable"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not list mapped libraries")
def test_extension_and_torch_share_one_openmp_runtime():
    # In a process of its own: scikit-learn brings a second one.
    command = [sys.executable, "-m", "secant", "info", "--json"]
    about = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(about["openmp_runtimes"]) == 1


@pytest.mark.parametrize("rich", [True, False])
def test_info_shows_the_reasons_with_and_without_rich(capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setattr(console, "rich", None)
    elif console.rich is None:
        pytest.skip("rich is not installed")
    monkeypatch.setattr(
        backends, "table", lambda: [("lbfgs", "nvrtc", "pip install secant[cupy]"), ("lbfgs", "cpu", None)]
    )
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "pip install secant[cupy]" in out  # brackets are no markup
    assert torch.__version__ in out
    assert machine.table_in_force() in out


def test_plain_table_is_aligned():
    text = console.plain(Table("Title", ("name", "value"), [("a", "1.5 ms"), ("long", "-"), ("b", "12 ms")], ("note",)))
    assert text.splitlines() == [
        "Title",
        "name   value",
        "----  ------",
        "a     1.5 ms",
        "long       -",
        "b      12 ms",
        "note",
    ]


def test_progress_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(console, "rich", None)
    with console.progress("work") as advance:
        advance(0.5, "half")
    assert capsys.readouterr().out == "work ...\n"


@pytest.mark.parametrize(
    ("arguments", "absent", "message"),
    [
        (["demo"], "sklearn", 'demo needs scikit-learn; install with: pip install "secant[demo]"'),
        (["demo"], "matplotlib", 'demo needs matplotlib; install with: pip install "secant[demo]"'),
        (
            ["bench", "--plot", "x.png"],
            "matplotlib",
            'bench needs matplotlib; install with: pip install "secant[bench]"',
        ),
    ],
)
def test_a_missing_extra_is_named(capsys, monkeypatch, arguments, absent, message):
    found = importlib.util.find_spec
    others = {"sklearn", "matplotlib", "rich"} - {absent}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == absent else object() if name in others else found(name),
    )
    assert main(arguments) == 1
    assert capsys.readouterr().err.strip() == message


def test_demo(tmp_path, capsys):
    for module in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(module)
    from matplotlib.image import imread

    from secant.cli import demo

    path = tmp_path / "demo.png"
    result = demo.run(CPU, path, quick=True)
    assert imread(path)[..., :3].std() > 0.02
    assert result.keys() == {"equation", "training", "directions", "bandwidth", "lost", "seconds"}
    assert set(result["equation"]) == set(demo.SOLVERS)
    for name, row in result["equation"].items():
        seconds, errors = zip(*row.curve, strict=True)
        assert list(seconds) == sorted(seconds)
        assert errors[-1] < errors[0] or name != "LevenbergMarquardt"  # others may have no time
    for pair in result["training"].values():
        ours, theirs = pair.secant, pair.torch
        assert ours.steps.iterations == theirs.steps.iterations
        assert ours.steps.losses[0] == theirs.steps.losses[0]
        # float32 runs part after some tens of iterations, and stay within a few per cent of each other.
        assert ours.loss == pytest.approx(theirs.loss, rel=0.1)
        assert ours.steps.inside + ours.steps.outside == pytest.approx(ours.steps.total)
        assert ours.accuracy > 0.93
    assert [at["two_loop"].case.n for at in result["directions"]] == [1000, 3000, 10_000]
    assert all(row.correct for at in result["directions"] for row in at.values())
    out = capsys.readouterr().out
    assert "logistic regression" in out
    assert "10,000" in out
    assert str(path) in out


def test_demo_says_when_it_loses():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from secant.benchmarks.digits import Run
    from secant.benchmarks.optimizers import Steps
    from secant.cli.demo import Pair, training_losses, training_table

    def right(count: int) -> torch.Tensor:
        return torch.arange(360) < count

    fast = Run(Steps(2.0, 1.0, 10, 12, [1.0], [0.5]), 0.5, right(342))
    slow = Run(Steps(4.0, 1.0, 10, 12, [1.0], [0.5]), 0.6, right(324))
    assert training_losses({"model": Pair(torch=slow, secant=fast, runs=3)}) == []
    lost = training_losses({"model": Pair(torch=fast, secant=slow, runs=3)})
    assert lost == [
        "model: secant takes 3x the time of torch outside the closures",
        "model: secant takes 2x the time of torch in total",
        "model: secant ends at a loss of 0.60000, torch at 0.50000",
        "model: secant classifies 18 of the 360 test images fewer than torch",
    ]
    table = training_table({"model": Pair(torch=slow, secant=fast, runs=3)})
    ours = table.rows[1]
    assert ours[6:] == ("1 s", "1 s", "3x", "2 s", "2x")


def test_demo_stops_before_the_deadline():
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from secant.cli import demo

    found = demo.measure_directions([100, 10**9], CPU, seconds=0.0, deadline=0.0)
    assert [at["two_loop"].case.n for at in found] == [100]


def test_bench(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path, picture = tmp_path / "x.json", tmp_path / "x.png"
    assert main(["bench", "--quick", "--json", str(path), "--plot", str(picture)]) == 0
    data = json.loads(path.read_text())
    assert data.keys() == {"machine", "rates", "families", "left_out"}
    assert tuple(data["families"]) == NAMES
    assert data["left_out"] == []
    assert data["machine"]["choices"] == machine.table_in_force()
    every = [row for family in data["families"].values() for row in family["rows"]]
    assert all(row["bytes"] > 0 for row in every if row["unit"] not in ("run", "problem"))  # of kernels
    assert all(row["flops"] > 0 for row in data["families"]["lbfgs"]["rows"])
    directions = data["families"]["lbfgs"]
    assert directions["bandwidth"] > 1e8
    assert {row["op"] for row in directions["rows"]} == {"two_loop", "direction", "step", "dense_update", "LBFGS"}
    assert all(row["note"] != "wrong answer" for row in directions["rows"])
    ours = [row for row in directions["rows"] if row["kind"] == "backend" and row["speedup_over"]]
    assert ours
    for row in ours:
        peers = {
            other["by"]: other["median"]
            for other in directions["rows"]
            if other["kind"] == "peer" and other["label"] == row["label"]
        }
        assert row["speedup_over"] == pytest.approx({name: seconds / row["median"] for name, seconds in peers.items()})
    assert len(directions["bars"]) == 13
    others = [picture.with_stem(f"x-{name}") for name in (*NAMES[1:], "roofline")]
    for drawn in (picture, *others):
        assert imread(drawn)[..., :3].std() > 0.02
    out = capsys.readouterr().out
    assert "Bars" in out
    assert "NOT MET" in out or "met" in out
    assert f"table of choices in force: {machine.table_in_force()}" in out


def test_bench_begins_nothing_when_its_time_is_over(tmp_path, capsys):
    """One case of each family is measured whatever the time, and written; what was left out is said."""
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "x.json", tmp_path / "x.png"
    assert main(["bench", "--quick", "--seconds", "0", "--json", str(path), "--plot", str(picture)]) == 0
    data = json.loads(path.read_text())
    for family in data["families"].values():
        assert len({(row["op"], row.get("n"), row.get("dtype")) for row in family["rows"]}) == 1
    assert "LBFGS outside the closure, n = 1,000, history 10" in data["left_out"]
    assert {"two_loop 10,000", "direction 10,000", "two_loop 100 x 64"} <= set(data["left_out"])
    assert "block_eigh, n = 9, float32" in data["left_out"]
    assert "Left out, for time:" in capsys.readouterr().out


def test_bench_leaves_contenders_out(tmp_path):
    path = tmp_path / "x.json"
    without = ["--without", "reference", "eager"]
    assert main(["bench", "--quick", "--family", "hvp", "--seconds", "0", "--json", str(path), *without]) == 0
    assert {row["by"] for row in json.loads(path.read_text())["families"]["hvp"]["rows"]} == {"cpu", "one read of X"}


def test_where_time_may_run_out_every_kind_comes_first():
    from secant.cli import bench

    cases = ["a1", "a2", "a3", "b1", "b2", "c1"]
    assert bench.Budget(float("inf")).order(cases, lambda case: case[0]) == cases
    assert bench.Budget(9.0).order(cases, lambda case: case[0]) == ["a1", "b1", "c1", "a2", "b2", "a3"]
