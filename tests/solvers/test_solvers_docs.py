"""The examples in docstrings and in the guide run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import math
import re
import types
from pathlib import Path

import pytest
import torch

import secant

MODULES = ("cg", "damping", "forcing", "lanczos", "line_search", "newton")
GUIDE = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()


@pytest.mark.parametrize("name", [*(f"secant.solvers.{name}" for name in MODULES), "secant.result"])
def test_examples_of_docstrings(name):
    names = {"secant": secant, "torch": torch, "math": math, "types": types}
    found = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert found.attempted > 0
    assert found.failed == 0


def test_examples_of_the_guide():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        exec(block, names)


def test_every_public_name_and_status_is_in_the_guide():
    for name in secant.solvers.__all__:
        assert f"`{name}" in GUIDE or f"secant.solvers.{name}" in GUIDE, name
    for status in secant.Status:
        assert f"`{status.name}`" in GUIDE
