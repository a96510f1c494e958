"""What an installed secant consists of: every package of the tree, and the text of the kernels that NVRTC compiles."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def listed():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages(folder, name):
    return {
        ".".join((name, *path.parent.relative_to(folder).parts)): path.parent for path in folder.rglob("__init__.py")
    }


def test_every_package_is_installed(listed):
    found = _packages(ROOT / "pysrc" / "secant", "secant") | _packages(ROOT / "kernels", "secant.kernels")
    assert sorted(listed["packages"]) == sorted(found)


def test_every_family_brings_its_cuda_source(listed):
    data = listed["package-data"]
    for name, folder in _packages(ROOT / "kernels", "secant.kernels").items():
        for source in (*folder.glob("*.cu"), *folder.glob("*.cuh")):
            assert any(source.match(pattern) for pattern in data.get(name, ())), source
