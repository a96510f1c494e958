"""The Triton backend: interpreted on the CPU, compiled on a GPU. The cases are in `hvp_triton_cases.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hvp_triton_cases
import pytest
import torch

pytest.importorskip("triton")

from secant.kernels.hvp import triton as backend

SCRIPT = Path(__file__).with_name("hvp_triton_cases.py")


def _params(device: str) -> list:
    gpu = device == "cuda"
    gpu_marks = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    return [
        pytest.param(name, marks=gpu_marks * gpu + [pytest.mark.slow] * (name in hvp_triton_cases.SLOW))
        for name in hvp_triton_cases.CASES
        if gpu or name not in hvp_triton_cases.GPU_ONLY
    ]


@pytest.fixture(scope="module")
def outcomes(request):
    """Failures by (device, case): one process per device runs the cases that this session has selected for it."""
    found: dict[tuple[str, str], str | None] = {}

    def outcome(device: str, name: str) -> str | None:
        if (device, name) not in found:
            names = [
                item.callspec.params["name"]
                for item in request.session.items
                if item.path == request.path and item.originalname == f"test_{device}"
            ]
            environment = {**os.environ, "TRITON_INTERPRET": "1"} if device == "cpu" else dict(os.environ)
            run = subprocess.run(
                [sys.executable, SCRIPT, "--device", device, *names], env=environment, capture_output=True, text=True
            )
            results = [json.loads(line) for line in run.stdout.splitlines()]
            died = f"the process ended before this case, with status {run.returncode}:\n{run.stderr[-4000:]}"
            found.update({(device, other): died for other in names})
            found.update({(device, result["name"]): result["failure"] for result in results})
        return found[device, name]

    return outcome


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _params("cpu"))
def test_cpu(name, outcomes):
    failure = outcomes("cpu", name)
    if failure is not None:
        pytest.fail(failure, pytrace=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", _params("cuda"))
def test_cuda(name, outcomes):
    failure = outcomes("cuda", name)
    if failure is not None:
        pytest.fail(failure, pytrace=False)


def test_available_says_what_is_missing():
    if torch.cuda.is_available():
        assert backend.available() is None
    else:
        assert backend.available() == "no CUDA device is present and TRITON_INTERPRET=1 is not set"


def test_supports_says_why_not():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backend.supports(torch.device("cuda"), dtype) is None
    assert "float32, float64, bfloat16 or float16" in backend.supports(torch.device("cuda"), torch.complex64)
    assert "TRITON_INTERPRET=1" in backend.supports(torch.device("cpu"), torch.float32)
