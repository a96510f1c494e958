"""Build entry: scikit-build-core's setuptools plugin runs CMake; the metadata lives in pyproject.toml."""

from setuptools import setup

setup(
    cmake_source_dir=".",
    package_dir={"": "pysrc", "secant.kernels": "kernels"},
)
