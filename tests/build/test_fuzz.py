"""Random and hostile calls of every op, in a process of their own: it must live, and answer as `fuzz_ops.py` says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from cpu_flags import FLAGS, ROOT, WIDTH

from secant import _cpu

PROGRAM = Path(__file__).with_name("fuzz_ops.py")


def fuzz(*options: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    checked, returned, refused = (int(word) for word in done.stdout.split()[1::2])
    # Each kind of end has its share, or the program tests less than it says.
    total = checked + returned + refused
    assert min(checked, returned, refused) > total / 20, done.stdout


def test_a_minute():
    fuzz("--cases", "4000")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_longer(seed):
    fuzz("--seed", str(seed), "--cases", "20000")


def build(folder: Path, families: list[str]) -> Path:
    """Build the module secant._cpu of these families with AddressSanitizer, for the instruction set in use."""
    isa = _cpu.build_config()["isa"]
    flags = [
        "g++", "-std=gnu++17", "-O0", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-fopenmp",
        "-fsanitize=address", "-Wno-psabi", "-DSECANT_BLOCKS_SMALL=3", f"-DSECANT_ISA={isa}",
        f"-DSECANT_VECTOR_BYTES={WIDTH[isa]}", f"-DSECANT_ISAS=X({isa})", '-DSECANT_COMPILER="g++"',
        *FLAGS.get(isa, []), f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
    ]  # fmt: skip
    sources = [ROOT / "csrc/cpu_module.cpp", ROOT / "csrc/bandwidth.cpp"]
    sources += [path for family in families for path in sorted((ROOT / "kernels" / family).glob("*.cpp"))]
    objects = [folder / f"{i}.o" for i in range(len(sources))]

    def compile_one(source: Path, out: Path) -> None:
        done = subprocess.run([*flags, "-c", str(source), "-o", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    module = folder / "_cpu.so"
    link = ["g++", "-shared", "-fopenmp", "-fsanitize=address", *map(str, objects), "-o", str(module)]
    subprocess.run(link, check=True)
    return module


def preload(*names: str) -> str:
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return " ".join(paths)


def fuzz_sanitized(module: Path, *options: str) -> None:
    # The sanitizer looks for the throw of the C++ library before Python has loaded that.
    libraries = preload("libasan.so", "libstdc++.so.6")
    fuzz(
        "--cpu", str(module), *options, LD_PRELOAD=libraries, ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1"
    )


needs_sanitizer = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux"
)


@needs_sanitizer
def test_under_the_address_sanitizer(tmp_path):
    fuzz_sanitized(build(tmp_path, ["lbfgs", "hvp", "precond", "search"]), "--cases", "2000", "--skip", "block")


@needs_sanitizer
@pytest.mark.slow
def test_longer_under_the_address_sanitizer(tmp_path):
    fuzz_sanitized(
        build(tmp_path, ["lbfgs", "hvp", "blocks", "precond", "search"]), "--seed", "100", "--cases", "20000"
    )
