"""Choice of the backend: order, explicit choice, reasons, warnings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from secant.kernels import FAMILIES

import secant
from secant import backends

CPU = torch.device("cpu")


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
