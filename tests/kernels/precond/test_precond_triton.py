"""The Triton backend: interpreted on the CPU, compiled on a GPU. The cases are in `precond_triton_cases.py`."""

from __future__ import annotations

import pytest
import torch

import triton_runner

pytest.importorskip("triton")

from secant.kernels.precond import triton as backend

import precond_triton_cases

test_cpu, test_cuda = triton_runner.make_tests(precond_triton_cases)


def test_available_says_what_is_missing():
    triton_runner.check_available(backend)


def test_supports_says_why_not():
    real = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    triton_runner.check_supports(backend, real, "float32, float64, bfloat16 and float16")
