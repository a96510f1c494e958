"""Choice of the backend: order, explicit choice, reasons, warnings."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from secant.kernels import FAMILIES

import secant
from secant import backends, defaults
from secant.defaults import Default

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def test_every_backend_answers_with_none_or_a_reason():
    rows = backends.table()
    assert [(family, name) for family, name, _ in rows] == [(f, n) for f in FAMILIES for n in backends.ORDER]
    reasons = {name: reason for _, name, reason in rows}
    assert reasons["cpu"] is None
    assert reasons["reference"] is None
    if not torch.cuda.is_available():
        assert reasons["cuda"]
        assert reasons["nvrtc"]


def test_auto_takes_the_cpu_kernels():
    assert backends.resolve("lbfgs", CPU, torch.float32).__name__ == "secant.kernels.lbfgs.cpu"


def test_an_explicit_choice_that_cannot_be_met_raises():
    with secant.use_backend("nvrtc"), pytest.raises(secant.BackendError, match=r"'nvrtc' was chosen .*: .+"):
        backends.resolve("lbfgs", CPU, torch.float32)
    with pytest.raises(ValueError, match=r"use_backend\(name\): expected one of"):
        secant.use_backend("tpu").__enter__()
    assert secant.current_backend() == "auto"


def test_falling_back_to_the_reference_warns_once(monkeypatch):
    cpu = backends.load("lbfgs", "cpu")
    monkeypatch.setattr(cpu, "supports", lambda device, dtype: "it is switched off")
    monkeypatch.setattr(backends, "_auto", {})
    with pytest.warns(secant.SecantWarning, match="falls back to the reference .* cpu: it is switched off"):
        assert backends.resolve("lbfgs", CPU, torch.float32).__name__ == "secant.kernels.lbfgs.reference"
    assert backends.resolve("lbfgs", CPU, torch.float32)  # a second warning would be an error here


def test_the_table_of_defaults_is_whole():
    """Every device and family has one entry, and every entry says whence."""
    for device in ("cpu", "cuda"):
        for family, modules in FAMILIES.items():
            (entry,) = [x for x in defaults.TABLE if (x.device, x.family) == (device, family)]
            assert defaults.find(device, family) is entry
            assert entry.backend in modules
    for entry in defaults.TABLE:
        assert entry.source == defaults.UNMEASURED or (ROOT / entry.source).is_file(), entry


def test_every_processor_has_an_entry():
    assert defaults.processor() in defaults.PROCESSORS
    assert [defaults.processor_of(x).name for x in ("intel", "amd", "something")] == ["intel", "amd", "other"]
    assert defaults.PROCESSORS[-1].vendor == defaults.ANY
    for entry in defaults.PROCESSORS:
        path = entry.source.partition(":")[0]
        assert path == "not measured, by reasoning" or (ROOT / path).is_file(), entry


@pytest.mark.parametrize(("vendor", "panels"), [("intel", True), ("amd", False)])
def test_the_processor_chooses_how_long_histories_are_read(vendor, panels):
    """By panels of 16 or one pair a pass: what `panel=` asks for is what the entry gives, bit for bit."""
    cpu = backends.load("lbfgs", "cpu")
    draw = torch.Generator().manual_seed(3)
    n, m = 150_000, 9  # 10.8 MB
    g, s = torch.randn(n, generator=draw), torch.randn(m, n, generator=draw)
    y = s * torch.linspace(1, 5, n)
    try:
        cpu.tune(defaults.processor_of(vendor))
        by_default, asked = torch.empty(n), {panel: torch.empty(n) for panel in (1, 16)}
        cpu.two_loop(g, s, y, None, by_default)
        for panel, out in asked.items():
            cpu.two_loop(g, s, y, None, out, panel=panel)
        public = secant.ops.two_loop(g, s, y)
    finally:
        cpu.tune(defaults.processor())
    assert not torch.equal(asked[1], asked[16])
    assert torch.equal(by_default, asked[16 if panels else 1])
    assert torch.equal(public, by_default)


def test_a_backend_that_breaks_its_contract_is_refused(monkeypatch):
    """Parameters by other names or in another order, one that is missing, one too many: the function is named."""
    module = importlib.import_module(FAMILIES["lbfgs"]["reference"])
    for wrong in (lambda grad, y, s, gamma, out: None, lambda grad, s, y: None, lambda grad, s, y, gamma, out, x: None):
        monkeypatch.setattr(module, "two_loop", wrong)
        monkeypatch.setattr(backends, "_modules", {})
        with pytest.raises(TypeError, match=r"reference: expected a function two_loop\(grad, s, y, gamma, out\), got "):
            backends.load("lbfgs", "reference")
    monkeypatch.delattr(module, "two_loop")
    with pytest.raises(TypeError, match="got none"):
        backends.load("lbfgs", "reference")


MEASURED = [x for x in defaults.TABLE if x.source != defaults.UNMEASURED]


@pytest.mark.parametrize("entry", [x for x in MEASURED if x.device == "cpu"], ids=str)
def test_what_the_table_names_was_the_fastest_backend_of_its_run(entry):
    data = json.loads((ROOT / entry.source).read_text())
    fastest = {}
    for row in data["families"][entry.family]["rows"]:
        if row["by"] in backends.ORDER and row["median"] is not None:
            case = tuple(row.get(key) for key in ("op", "assume", "n", "m", "d", "k", "batch", "dtype", "storage"))
            fastest[case] = min(fastest.get(case, ("", float("inf"))), (row["by"], row["median"]), key=lambda x: x[1])
    assert fastest
    assert {name for name, _ in fastest.values()} == {entry.backend}


@pytest.mark.parametrize("entry", [x for x in MEASURED if x.device == "cuda"], ids=str)
def test_what_the_table_names_on_a_gpu_follows_from_its_run(monkeypatch, entry):
    """Of several compilers none is the fastest everywhere: by the rule that proposes entries."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    rule = importlib.import_module("gpu_defaults")
    times = rule._times(json.loads((ROOT / entry.source).read_text())["families"][entry.family]["rows"])
    for held in times:
        assert rule._best(times, held) == entry.backend


def named(monkeypatch, backend: str) -> None:
    """Make a table that names this backend."""
    monkeypatch.setattr(defaults, "TABLE", (Default("cpu", "lbfgs", backend, "a test"),))
    monkeypatch.setattr(backends, "_auto", {})


def test_a_call_takes_the_backend_of_the_table(monkeypatch):
    named(monkeypatch, "reference")
    assert backends.resolve("lbfgs", CPU, torch.float64) is backends.load("lbfgs", "reference")
    assert backends.preferences("lbfgs", CPU)[:2] == ["reference", "cuda"]


def test_a_backend_of_the_table_that_cannot_serve_gives_way(monkeypatch):
    named(monkeypatch, "nvrtc")
    assert backends.resolve("lbfgs", CPU, torch.float32) is backends.load("lbfgs", "cpu")


def test_a_device_without_entries_is_served_in_order(monkeypatch):
    monkeypatch.setattr(defaults, "TABLE", ())
    monkeypatch.setattr(backends, "_auto", {})
    assert backends.preferences("lbfgs", CPU) == list(backends.ORDER)
    assert backends.resolve("lbfgs", CPU, torch.float32) is backends.load("lbfgs", "cpu")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_nothing_for_gpus_is_imported_for_a_cpu_tensor():
    code = "import secant, sys, torch; secant.ops.two_loop(torch.ones(2), torch.ones(1, 2), torch.ones(1, 2)); "
    assert run(code + "print('triton' in sys.modules, 'cupy' in sys.modules)").stdout == "False False\n"


def test_environment_variable():
    code = "import secant; print(secant.current_backend())"
    assert run(code, SECANT_BACKEND="reference").stdout == "reference\n"
    wrong = run(code, SECANT_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "SECANT_BACKEND: expected one of" in wrong.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_there_is_one_openmp_runtime():
    """The extension binds to the libgomp that torch loaded; two runtimes would each start their threads."""
    code = (
        "import secant; from secant import _cpu; import os\n"
        "print(len({os.path.realpath(l.split()[-1]) for l in open('/proc/self/maps') if 'libgomp' in l}))"
    )
    out = run(code)
    assert out.stdout == "1\n", out.stderr


def test_threads_follow_torch():
    code = (
        "import torch, secant; torch.set_num_threads(1); from secant import _cpu; print(_cpu.build_config()['threads'])"
    )
    assert run(code).stdout == "1\n"
