"""The Triton backend: interpreted on the CPU, compiled on a GPU. The cases are in `search_triton_cases.py`."""

from __future__ import annotations

import pytest
import torch

import triton_runner

pytest.importorskip("triton")

from secant.kernels.search import triton as backend

import search_triton_cases

test_cpu, test_cuda = triton_runner.make_tests(search_triton_cases)


def test_available_says_what_is_missing():
    triton_runner.check_available(backend)


def test_supports_says_why_not():
    triton_runner.check_supports(backend, (torch.float32, torch.float64), "float32 and float64")
