"""Choice of the backend: order, explicit choice, reasons, warnings."""

from __future__ import annotations

import importlib
import inspect
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
from secant.defaults import ANY, Default

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
    """Every device and family has one entry for any op; those of an op rise in size; and every entry says whence."""
    for device in ("cpu", "cuda"):
        for family, modules in FAMILIES.items():
            reference = importlib.import_module(modules["reference"])
            by_op = defaults.entries(device, family)
            assert [entry.largest for entry in by_op[ANY]] == [None]
            for op, found in by_op.items():
                assert op == ANY or inspect.isfunction(getattr(reference, op))
                *bounded, last = [entry.largest for entry in found]
                assert last is None
                assert bounded == sorted(set(bounded))
                assert all(entry.backend in modules for entry in found)
    for entry in defaults.TABLE:
        assert entry.source == defaults.UNMEASURED or (ROOT / entry.source).is_file(), entry
    assert len(defaults.TABLE) == len(set(defaults.TABLE))


@pytest.mark.parametrize("entry", [x for x in defaults.TABLE if x.source != defaults.UNMEASURED], ids=str)
def test_what_the_table_names_was_the_fastest_backend_of_its_run(entry):
    data = json.loads((ROOT / entry.source).read_text())
    fastest = {}
    for row in data["families"][entry.family]["rows"]:
        if row["by"] in backends.ORDER and row["median"] is not None:
            case = tuple(row.get(key) for key in ("op", "assume", "n", "m", "d", "k", "batch", "dtype", "storage"))
            fastest[case] = min(fastest.get(case, ("", float("inf"))), (row["by"], row["median"]), key=lambda x: x[1])
    assert fastest
    assert {name for name, _ in fastest.values()} == {entry.backend}


def two_sizes(monkeypatch, small: str) -> None:
    """A table by which two_loop takes another backend up to n = 10."""
    table = (
        Default("cpu", "lbfgs", "two_loop", 10, small, "a test"),
        Default("cpu", "lbfgs", "two_loop", None, "cpu", "a test"),
        Default("cpu", "lbfgs", ANY, None, "cpu", "a test"),
    )
    monkeypatch.setattr(defaults, "TABLE", table)
    monkeypatch.setattr(backends, "_auto", {})


def test_a_call_takes_the_backend_of_its_size(monkeypatch):
    two_sizes(monkeypatch, "reference")
    seen = []
    for name in ("reference", "cpu"):
        module = backends.load("lbfgs", name)

        def spy(*args, name=name, original=module.two_loop):
            seen.append(name)
            original(*args)

        monkeypatch.setattr(module, "two_loop", spy)
    chosen = backends.resolve("lbfgs", CPU, torch.float64)
    s = torch.randn(3, 11, dtype=torch.float64)
    for n in (1, 10, 11):
        g, out = torch.randn(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
        chosen.two_loop(g, s[:, :n], 2 * s[:, :n], None, out)
        torch.testing.assert_close(out, -g / 2)
    assert seen == ["reference", "reference", "cpu"]
    assert chosen.update is backends.load("lbfgs", "cpu").update
    monkeypatch.setattr(backends.load("lbfgs", "cpu"), "two_loop_plain", print, raising=False)
    assert not hasattr(chosen, "two_loop_plain")
    assert chosen.__name__ == "secant.kernels.lbfgs.cpu"
    assert backends.resolve("lbfgs", CPU, torch.float64) is chosen
    assert backends.preferences("lbfgs", CPU, "two_loop", 10)[:2] == ["reference", "cuda"]
    assert backends.preferences("lbfgs", CPU, "update", 10)[0] == "cpu"


def test_a_choice_of_one_product_has_no_shortcut_past_it(monkeypatch):
    """One shortcut serves two functions of the hvp family."""
    table = (
        Default("cpu", "hvp", "glm_hvp", 10, "reference", "a test"),
        Default("cpu", "hvp", "glm_hvp", None, "cpu", "a test"),
        Default("cpu", "hvp", ANY, None, "cpu", "a test"),
    )
    monkeypatch.setattr(defaults, "TABLE", table)
    monkeypatch.setattr(backends, "_auto", {})
    monkeypatch.setattr(backends.load("hvp", "cpu"), "glm_plain", print)
    assert not hasattr(backends.resolve("hvp", CPU, torch.float32), "glm_plain")


def test_a_backend_of_the_table_that_cannot_serve_gives_way(monkeypatch):
    two_sizes(monkeypatch, "nvrtc")
    assert backends.resolve("lbfgs", CPU, torch.float32) is backends.load("lbfgs", "cpu")


def test_a_device_without_entries_is_served_in_order(monkeypatch):
    monkeypatch.setattr(defaults, "TABLE", ())
    monkeypatch.setattr(backends, "_auto", {})
    assert backends.preferences("lbfgs", CPU, "two_loop", 10) == list(backends.ORDER)
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
