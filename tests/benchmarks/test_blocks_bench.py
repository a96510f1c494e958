from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secant import backends
from secant.__main__ import main
from secant.benchmarks import case as cases_module
from secant.benchmarks import machine, report, training_optimizers
from secant.benchmarks import measure as measuring
from secant.benchmarks.case import PILOT, Row, everything, fastest, find
from secant.benchmarks.families import batched, blocks, curvature, lbfgs, newton, precond, residuals
from secant.benchmarks.families.blocks import COPY, THRESHOLD, Case, Problem
from secant.benchmarks.measure import measure
from secant.benchmarks.timing import REPLAY, HostClock, Timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F32, F64 = torch.float32, torch.float64
#: A case of each kind.
KINDS = [Case(op, assume, 5, 40) for op, assume in blocks.KINDS]


def named(kind):
    return f"{kind.op} {kind.assume}"


def test_default_cases_are_the_sizes_of_the_bars_and_full_ones_every_n():
    cases, full = blocks.cases(CPU), blocks.cases(CPU, full=True)
    for op, assume in blocks.KINDS:
        for chosen, single in ((cases, blocks.SIZES), (full, tuple(range(1, 65)))):
            mine = [case for case in chosen if (case.op, case.assume) == (op, assume)]
            assert tuple(case.n for case in mine if case.dtype == F32) == single
            assert tuple(case.n for case in mine if case.dtype == F64) == blocks.DOUBLE
    assert all(case.batch == 4 * 2**20 // case.n**2 for case in full)
    assert len(set(full)) == len(full)


def test_bytes_count_the_block_its_results_and_its_code_once():
    assert Case("block_inv", "spd", 3, 10).nbytes == 2 * 9 * 4 + 4
    assert Case("block_solve", "general", 3, 10, F64).nbytes == (9 + 3 + 3) * 8 + 4
    assert Case("block_eigh", "symmetric", 3, 10).nbytes == (9 + 9 + 3) * 4 + 4


@pytest.mark.parametrize("case", KINDS, ids=named)
def test_blocks_are_what_the_case_assumes(case):
    a = Problem(case, CPU).a
    if case.assume == "spd":
        assert bool((torch.linalg.eigvalsh(a.double()) > 0.99).all())
    assert torch.equal(a, a.mT) == (case.assume != "general")
    if case.assume == "symmetric":
        assert bool((torch.linalg.eigvalsh(a)[:, 0] < 0).all())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("case", KINDS, ids=named)
def test_every_contender_is_right(monkeypatch, case, dtype):
    monkeypatch.setattr(
        cases_module, "SLICE_SECONDS", math.inf
    )  # on a loaded machine a peer would get a part of the batch
    problem = Problem(case.replace(dtype=dtype), CPU)
    found = problem.case.contenders(problem, everything)
    expected = [*case.serving(CPU), *blocks.peers(case, CPU)]
    assert [one.name for one in found] == expected
    for one in found:
        fitting = one.fitting(HostClock())
        check = fitting.check(problem)
        assert (fitting.units, check.failure) == (case.batch, "")
        assert 0 < check.error < THRESHOLD


def altered(case, change):
    """A check of the answer of torch with `change` made to its results, for the first 30 blocks."""
    problem = Problem(case, CPU)
    peer = next(one for one in case.contenders(problem, everything) if one.kind == "peer")
    answer = tuple(x.clone() for x in peer.part(30)())
    change(answer)
    return problem.worst_ratio(answer)


@pytest.mark.parametrize("case", KINDS, ids=named)
def test_one_wrong_column_of_one_block_is_found(case):
    assert altered(case, lambda answer: None) < THRESHOLD

    def wrong(answer):
        answer[-2][17, ..., 3] += 1e-3

    # 1e-3 of a result of order 1 is 8,000 times the epsilon of float32; the ratio has n = 5 and the norms, each a sum
    # of 5 entries of order 1, in its denominator.
    assert altered(case, wrong) > THRESHOLD

    def missing(answer):
        answer[-2][29, ..., 0] = math.nan

    assert math.isnan(altered(case, missing))
    assert math.isnan(altered(case, lambda answer: answer[-1][5].fill_(2)))


def test_eigenvalues_that_do_not_ascend_are_wrong():
    def swap(answer):
        w, v, _ = answer
        w[3], v[3] = w[3].flip(-1), v[3].flip(-1)  # still A = V diag(w) V^T

    assert math.isnan(altered(KINDS[-1], swap))


def test_an_answer_of_another_shape_is_an_error():
    problem = Problem(KINDS[2], CPU)
    with pytest.raises(ValueError, match="expected shapes"):
        problem.worst_ratio((problem.b[:10, :4], torch.zeros(10, dtype=torch.int32)))


@pytest.mark.parametrize("value", [1.01, math.nan])
def test_a_wrong_answer_has_no_speed(monkeypatch, value):
    case = KINDS[0]
    first = case.serving(CPU)[0]
    auto = backends.load("blocks", first)
    right = auto.inv

    def wrong(a, damping, scaled, spd, out, info):
        right(a, damping, scaled, spd, out, info)
        out[7, 0, 0] *= value

    monkeypatch.setattr(auto, "inv", wrong)
    rows = measure([case], CPU, seconds=0.0)
    own = find(rows, case)
    assert (own.name, own.seconds, own.best, own.bytes_per_second, own.correct) == (first, None, None, None, False)
    assert own.note == "wrong answer"
    assert all(row.seconds for row in rows if row is not own)
    lost = report.losses(rows)
    assert [line for line in lost if "wrong" in line] == [line for line in lost if first in line]
    assert all(x.measured is None and x.met is None for x in blocks.bars(rows, CPU))


def test_a_peer_that_fails_fails_alone(monkeypatch):
    def broken(a, b):
        raise RuntimeError("no such library")

    monkeypatch.setattr(blocks, "_inv_ex", broken)
    rows = measure([KINDS[0]], CPU, seconds=0.0)
    peers = {row.name: row for row in rows if row.kind == "peer"}
    assert peers["inv_ex"].note == "failed: RuntimeError"
    assert peers["inv_ex"].seconds is None
    assert peers["cholesky"].seconds
    assert fastest(rows, KINDS[0]).name == "cholesky"


class SlowClock(HostClock):
    """Each block takes a microsecond."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now


def test_slow_peers_are_timed_on_a_slice_and_ours_never():
    case = Case("block_inv", "general", 2, 10**5)
    problem, clock = Problem(case, CPU), SlowClock()

    def slow(a, b):
        clock.now += len(a) * 1e-6
        return blocks._inv_ex(a, b)

    # 32 blocks, 128, ...: 2,048 take 2 ms, less than a quarter of 12 ms; 8,192 take more.
    assert blocks.contender(problem, "slow", "peer", slow).fitting(clock).units == 8192
    assert blocks.contender(problem, "slow", "peer", slow, whole=True).fitting(clock).units == 10**5
    clock.now = 0.0
    few = Problem(case.replace(batch=300), CPU)
    assert blocks.contender(few, "slow", "peer", slow).fitting(clock).units == 300
    whole = {one.name: one.part is None for one in case.contenders(problem, everything)}
    assert whole == {name: name not in ("reference", "inv_ex") for name in whole}


def test_rows_of_a_slice_say_so_and_are_per_block(monkeypatch):
    monkeypatch.setattr(cases_module, "SLICE_SECONDS", 0.0)
    case = Case("block_solve", "spd", 3, 1000)
    rows = {row.name: row for row in measure([case], CPU, seconds=0.0)}
    peer, copy = rows["solve_ex"], rows[COPY]
    assert (peer.units, peer.note) == (PILOT, f"timed on {PILOT} of 1,000 blocks, scaled")
    assert (copy.units, copy.kind, copy.note) == (1000, "limit", "")
    for row in rows.values():
        assert 0 < row.best <= row.seconds < 0.1  # even where the machine has other things to do
    assert peer.bytes_per_second == pytest.approx(case.nbytes / peer.seconds)
    assert copy.bytes_per_second == pytest.approx(2 * 9 * 4 / copy.seconds)
    assert report.of_limit(list(rows.values()), copy) == 1.0


def factors(op, assume, n, dtype=F32, device=CPU):
    case = Case(op, assume, n, blocks.batch_of(n, device), dtype)
    return [(goal.target(dtype), goal.against != (COPY,)) for goal in blocks.goals(case, device)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            ("block_inv", "spd"),
            {
                1: [], 2: [25, 2.5], 3: [25, 2.5], 4: [12, 2.5], 5: [9, 2.5], 8: [9, 2.5], 9: [14, 2.5], 16: [14, 2.5],
                17: [], 24: [10], 32: [10, 4], 48: [5], 64: [5],
            },
        ),
        (("block_inv", "general"), {2: [], 3: [10], 9: [10], 10: [], 16: [8], 32: [6], 64: []}),
        (("block_solve", "spd"), {2: [], 3: [10], 16: [10], 17: []}),
        (("block_solve", "general"), {3: [10], 17: []}),
        (("block_eigh", "symmetric"), {3: [10], 6: [10], 8: [], 9: [10], 16: [4], 32: [4], 33: []}),
    ],
)  # fmt: skip
def test_bars_of_each_size(kind, expected):
    assert {n: [target for target, _ in factors(*kind, n)] for n in expected} == expected


def test_float64_has_to_be_half_as_good():
    assert factors("block_inv", "spd", 16, F64) == [(7.0, True), (5.0, False)]


def test_bars_of_a_gpu_and_of_batches_of_another_size():
    assert factors("block_inv", "spd", 16, device=GPU) == [(pytest.approx(1 / 0.6), False), (3.0, True)]
    assert factors("block_inv", "spd", 32, device=GPU) == [(pytest.approx(1 / 0.35), False), (3.0, True)]
    assert factors("block_eigh", "symmetric", 64, device=GPU) == [(5.0, True)]
    assert blocks.goals(Case("block_inv", "spd", 16, 10), CPU) == []


SPD16 = Case("block_inv", "spd", 16, blocks.batch_of(16, CPU))
NS = 1e-9


def row(name, nanoseconds, kind="peer", error=1.0, case=SPD16, count=SPD16.batch):
    seconds = None if nanoseconds is None else nanoseconds * NS
    return Row(case, name, kind, None if seconds is None else Timing((seconds,)), error, THRESHOLD, "", count)


def test_few_blocks_have_bars_of_their_own():
    found = {(case.n, case.batch, case.dtype): case for case in blocks.few_cases()}
    case = found[64, 4, F32]
    assert (case.label, case.series) == ("block_eigh, n = 64, float32, 4 blocks", None)
    assert found[32, 1, F64].label.endswith("float64, 1 block")
    for peer, met in ((630, True), (570, False)):
        rows = [row("cpu", 300, "backend", case=case, count=4), row("eigh", peer, case=case, count=4)]
        assert [bar.met for bar in blocks.bars(rows, CPU)] == [met]


ROWS = [
    row("cpu", 300, "backend"),
    row("reference", 90_000, "backend"),
    row("inv_ex", 4500, count=64),
    row("cholesky", 3900),
    row(COPY, 100, "limit", 0.0),
]


def test_verdicts_are_against_the_fastest_of_the_peers_and_the_copy():
    speed, copies = blocks.bars(ROWS, CPU)
    assert (speed.measured, speed.met, speed.text) == (pytest.approx(13.0), False, "14x: NOT MET")
    assert (copies.measured, copies.met, copies.text) == (pytest.approx(3.0), False, "2.5 copies: NOT MET")
    better = [row("cpu", 240, "backend"), *ROWS[1:]]
    assert [(x.met, x.text) for x in blocks.bars(better, CPU)] == [
        (True, "14x: met"),
        (True, "2.5 copies: met"),
    ]
    unknown = blocks.bars([row("cpu", None, "backend", math.nan), *ROWS[1:]], CPU)
    assert [(x.met, x.text.split(": ")[1]) for x in unknown] == [(None, "not measured")] * 2


def test_tables_have_a_line_per_backend_and_the_missed_bars():
    bars = blocks.bars(ROWS, CPU)
    table = report.rows_table("Blocks", ROWS, None, bars)
    (line,) = table.rows
    found = dict(zip(table.columns, line, strict=True))
    assert (found["by"], found["a"], found["median"], found["times longer"]) == (
        "cpu",
        "block",
        "300 ns",
        "inv_ex 15x, cholesky 13x",
    )
    assert found["GB/s"] == f"{(2 * 256 * 4 + 4) / 300:.3g}"
    assert found["of limit"] == "33%"
    assert found["bars"] == "14x: NOT MET, 2.5 copies: NOT MET"
    missed = report.bars_table(bars)
    assert [line[1:] for line in missed.rows] == [("≥ 14", "13", "NOT MET"), ("≤ 2.5", "3", "NOT MET")]
    assert missed.notes == ("0 of 2 bars met.",)
    better = blocks.bars([row("cpu", 240, "backend"), *ROWS[1:]], CPU)
    assert (report.bars_table(better).rows, report.bars_table(better).notes) == ([], ("2 of 2 bars met.",))


def test_losses_are_against_every_peer():
    assert report.losses(ROWS) == []
    slower = [row("cpu", 4000, "backend"), *ROWS[1:]]
    assert report.losses(slower) == ["block_inv, spd, n = 16, float32: cpu takes 1.03x the time of cholesky"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(JSON, picture, what was printed) of the command on small batches."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("blocks")
    path, picture = folder / "x.json", folder / "x.png"
    assert main(["bench", "--family", "blocks", "--quick", "--json", str(path), "--plot", str(picture)]) == 0
    return json.loads(path.read_text()), picture


def test_command_writes_every_field(run):
    data, _ = run
    assert data.keys() == {"machine", "rates", "families", "left_out"}
    assert data["families"].keys() == {"blocks"}
    assert data["families"]["blocks"].keys() == {"bandwidth", "rows", "bars", "lost"}
    rows = data["families"]["blocks"]["rows"]
    assert {(row["op"], row["assume"]) for row in rows} == set(blocks.KINDS)
    assert all(row["note"] != "wrong answer" and row["median"] >= row["min"] > 0 for row in rows)
    for ours in (row for row in rows if row["kind"] == "backend"):
        peers = {
            row["by"]: row["median"]
            for row in rows
            if row["kind"] == "peer" and all(row[key] == ours[key] for key in ("op", "assume", "n", "dtype"))
        }
        assert ours["speedup_over"] == pytest.approx({name: x / ours["median"] for name, x in peers.items()})
        assert 0 < ours["of_limit"] < 2
        assert 0 < ours["error"] < ours["tolerance"]
        assert ours["timed"] <= ours["batch"]


def test_json_has_the_bars():
    bars = report.as_json(ROWS, blocks.bars(ROWS, CPU), None)["bars"]
    expected = {"op": "block_inv", "assume": "spd", "n": 16, "dtype": "float32", "target": 14.0, "at_least": True}
    assert expected.items() <= bars[0].items()
    assert [(bar["measured"], bar["met"]) for bar in bars] == [(pytest.approx(13), False), (pytest.approx(3), False)]
    json.dumps(bars)


def test_the_picture_has_a_curve_per_backend_and_peer(tmp_path):
    """Of times that lie apart: a curve below another one could not be seen."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from secant.benchmarks import plot

    rows = []
    for kind in KINDS:
        names = [(kind.serving(CPU)[0], "backend"), *((name, "peer") for name in blocks.peers(kind, CPU))]
        for n in (3, 9):
            case = kind.replace(n=n, batch=7, dtype=torch.float32)
            for i, (name, role) in enumerate([(COPY, "limit"), *names]):
                rows.append(Row(case, name, role, Timing((3.0**i * n * 1e-9,)), 1.0, THRESHOLD, units=7))
    plot.save_family(tmp_path / "x.png", rows, None, machine.summary(machine.describe(CPU)))
    pixels = imread(tmp_path / "x.png")[..., :3]
    assert min(pixels.shape[:2]) > 800
    width = pixels.shape[1] // len(blocks.KINDS)
    for i in range(len(blocks.KINDS)):
        panel = pixels[: pixels.shape[0] * 4 // 5, i * width : (i + 1) * width]
        for name in (KINDS[i].serving(CPU)[0], *blocks.peers(KINDS[i], CPU)):
            colour = [int(plot.COLORS[name][0][k : k + 2], 16) / 255 for k in (1, 3, 5)]
            assert (abs(panel - colour).max(-1) < 0.02).sum() > 50, (i, name)


def test_the_command_draws(run):
    from matplotlib.image import imread

    assert imread(run[1])[..., :3].std() > 0.02


def test_every_contender_has_a_colour():
    pytest.importorskip("matplotlib")
    from secant.benchmarks import plot

    names = {*backends.ORDER, "matinvBatched", "cupy", "secant", "torch"}
    names = names.union(*(blocks.peers(case, CPU) for case in KINDS))
    names = names.union(*(lbfgs.peer_names(lbfgs.Case("two_loop", 9, batch=batch)) for batch in (0, 2)))
    names = names.union(*(case.names(CPU) for case in precond.small_cases()))
    names = names.union(*(curvature._makers(curvature.Case("Hessian", 9, k)) for k in (1, 2)))
    names = names.union(
        residuals.OURS, residuals.PEERS, residuals.TORCHZERO, residuals.Rows("Jacobian", (2, 1)).names(CPU)
    )
    names = names.union(newton.Autoencoder("a", 0.1).names(CPU), newton._MINIMIZERS)
    names = names.union({"torch ops"}, *(task.PEERS for task in batched.TASKS.values()))
    trained = {"Shampoo", "Shampoo, default rate", "SOAP", "torch Muon", "AdamW"}  # the others take what is spare
    assert trained <= {*training_optimizers.every_name()}
    assert names | trained == plot.COLORS.keys()


def test_pytest_benchmark_face():
    pytest.importorskip("pytest_benchmark")
    file = Path(__file__).parents[2] / "bench" / "test_families.py"
    environment = os.environ | {"SECANT_BENCH_QUICK": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(file),
        "-k",
        "float64 and block_solve",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    solves = [case for case in KINDS if case.op == "block_solve"]
    expected = sum(len([*case.serving(CPU), *blocks.peers(case, CPU)]) for case in solves)
    assert f"{expected} passed" in done.stdout


def test_backends_are_timed_by_graph_replay_too(monkeypatch):
    case = Case("block_inv", "spd", 3, 20)
    monkeypatch.setattr(measuring, "has_graphs", lambda device: True)
    for graph in (None, "not captured: RuntimeError"):
        monkeypatch.setattr(measuring, "captured", lambda timed, device, graph=graph: graph or timed)
        rows = measure([case], CPU, seconds=0.0)
        first = case.serving(CPU)[0]
        [replay] = [row for row in rows if row.name == first and row.note]
        assert (replay.kind, replay.note) == ("backend", graph or REPLAY)
        assert (replay.seconds is None) == (graph is not None)
        assert find(rows, case).note == ""
        lines = [line for line in report.rows_table("", rows, None).rows if line[1].startswith(first)]
        assert [line[1] for line in lines] == [first, f"{first}, {graph or REPLAY}"]
        assert not any("wrong answer" in line for line in report.losses(rows))


def test_batches_inside_and_outside_of_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 32 << 20)
    held = blocks.held_cases()
    assert {(case.n, case.held) for case in held} == {(n, held) for n in range(1, 17) for held in ("cache", "memory")}
    for case in held:
        both = 2 * case.batch * case.n**2 * 4  # the blocks and their inverses
        assert (both < 32 << 20) if case.held == "cache" else (both > 4 * (32 << 20))
        assert [(goal.factor, goal.against) for goal in blocks.goals(case, CPU)] == [(2.5, (COPY,))]
    assert blocks.goals(held[0].replace(batch=7), CPU) == []
    full = [case for group in blocks.groups(CPU, full=True) for case in group]
    assert full == [*blocks.cases(CPU, full=True), *blocks.few_cases(), *held]
    assert len({case.label for case in full}) == len(full)


def test_the_size_of_a_cache_is_known():
    assert 1 << 18 <= machine.last_level_cache() <= 1 << 32
