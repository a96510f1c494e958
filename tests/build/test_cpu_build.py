"""The C++ kernels as built: sanitizers, width of the loads, and what the extension must not know."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cpu_flags import FLAGS, ROOT, WIDTH

from secant import _cpu

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux"
)


def compile_cpp(isa: str, sources: list[str], out: Path, *flags: str) -> None:
    command = [
        "g++", "-std=gnu++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        f"-DSECANT_ISA={isa}", f"-DSECANT_VECTOR_BYTES={WIDTH[isa]}", *FLAGS.get(isa, []), f"-I{ROOT / 'csrc'}",
        *flags, *(str(ROOT / s) for s in sources), "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check_sanitized(isa: str, sources: list[str], program: Path, *flags: str) -> None:
    """Compile a program with both sanitizers, run it, and see that they found nothing."""
    sanitizers = ("-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_cpp(isa, sources, program, *flags, *sanitizers)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "clean\n"


@pytest.mark.parametrize("isa", [_cpu.build_config()["isa"]])
def test_sanitizers(tmp_path, isa):
    """AddressSanitizer and UndefinedBehaviorSanitizer over every path, on buffers of exactly their size."""
    program = tmp_path / "sanitize"
    sources = ["tests/build/sanitize.cpp", "kernels/lbfgs/cpu.cpp", "kernels/lbfgs/cpu_dense.cpp"]
    check_sanitized(isa, sources, program, "-O1", "-g")


@pytest.mark.parametrize("isa", [_cpu.build_config()["isa"]])
def test_sanitizers_on_products(tmp_path, isa):
    """The same for the products with X, Gram matrices and cross entropy."""
    program = tmp_path / "sanitize_hvp"
    sources = [
        "tests/build/sanitize_hvp.cpp",
        *(f"kernels/hvp/cpu_{s}.cpp" for s in ("cross_entropy", "dense", "gram", "sparse")),
    ]
    check_sanitized(isa, sources, program, "-O0")


@pytest.mark.parametrize("isa", [_cpu.build_config()["isa"]])
def test_sanitizers_on_preconditioned_steps(tmp_path, isa):
    """The same for preconditioned steps and the Newton-Schulz iteration."""
    program = tmp_path / "sanitize_precond"
    sources = [
        "tests/build/sanitize_precond.cpp",
        *(f"kernels/precond/cpu_{s}.cpp" for s in ("step", "newton_schulz", "newton_root")),
    ]
    check_sanitized(isa, sources, program, "-O0")


@pytest.mark.parametrize("isa", [_cpu.build_config()["isa"]])
def test_sanitizers_on_line_searches(tmp_path, isa):
    """The same for the searches of many problems."""
    program = tmp_path / "sanitize_search"
    sources = ["tests/build/sanitize_search.cpp", "kernels/search/cpu.cpp"]
    check_sanitized(isa, sources, program, "-O0")


@pytest.mark.slow  # minutes to compile
@pytest.mark.parametrize("isa", [_cpu.build_config()["isa"]])
def test_sanitizers_on_blocks(tmp_path, isa):
    """The same for small blocks. Of the sizes that are unrolled only the first ones, to compile in time."""
    program = tmp_path / "sanitize_blocks"
    sources = [
        "tests/build/sanitize_blocks.cpp",
        *(f"kernels/blocks/cpu{s}.cpp" for s in ("", "_eigh", "_lu", "_pivot", "_spd", "_tridiagonal")),
    ]
    check_sanitized(isa, sources, program, "-O0", "-DSECANT_BLOCKS_SMALL=3")


@pytest.mark.skipif("avx2" not in _cpu.build_config()["isas"], reason="x86 only")
def test_the_loads_are_wide(tmp_path):
    """The inner loops convert whole registers and multiply-add them; none of them goes through the stack.

    An under-aligned vector type, or a conversion that the compiler takes apart, shows here.
    """
    assembly = tmp_path / "cpu.s"
    compile_cpp("avx2", ["kernels/lbfgs/cpu.cpp"], assembly, "-O3", "-fopenmp", "-S")
    text = assembly.read_text()
    assert len(re.findall(r"vfmadd\w+pd\s.*%ymm", text)) > 200
    assert len(re.findall(r"vcvtps2pd\s+[^%]*\(.*\), %ymm", text)) > 50, "conversions of whole registers from memory"
    assert len(re.findall(r"vpmovzxwd\s+[^%]*\(.*\), %ymm", text)) > 2, "bfloat16 rows, eight at a time"
    # A conversion that was taken apart is put together again by vinsertf128 of two halves.
    loops = [b for b in re.split(r"^\.L\w+:", text, flags=re.M) if b.count("vfmadd") >= 4 and "pd" in b]
    assert loops
    assert not [b for b in loops if re.search(r"vcvtps2pd\s+%xmm\d+, %xmm", b) and "vinsertf128" in b]


def test_the_extension_knows_no_torch():
    sources = [p for d in ("csrc", "kernels") for e in ("*.cpp", "*.h", "*.cu", "*.cuh") for p in (ROOT / d).rglob(e)]
    assert len(sources) > 8
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    linked = subprocess.run(["ldd", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked
    assert "libgomp" in linked or _cpu.build_config()["openmp"] is None


def test_arrows_point_one_way():
    """Imports go down: optim, glm, curvature -> solvers -> ops -> backends, kernels -> _cpu, _cuda."""
    ground = {"_errors", "_checks", "result"}
    allowed = {
        "ops": {"ops", "backends", "kernels"} | ground,
        "solvers": {"solvers", "ops"} | ground,
        "curvature": {"curvature", "solvers", "ops", "_parameters"} | ground,
        "glm": {"glm", "solvers", "ops"} | ground,
        "optim": {"optim", "solvers", "curvature", "ops", "_parameters"} | ground,
        "kernels": {"kernels", "_cpu", "_cuda"},
    }
    places = {room: ROOT / ("kernels" if room == "kernels" else f"pysrc/secant/{room}") for room in allowed}
    for room, folder in places.items():
        for path in folder.rglob("*.py"):
            text = path.read_text()
            found = {m.split(".")[0] for m in re.findall(r"^\s*(?:from|import) secant\.([\w.]+)", text, flags=re.M)}
            for names in re.findall(r"^\s*from secant import ([\w, ]+)", text, flags=re.M):
                found |= {n.strip() for n in names.split(",")}
            assert found <= allowed[room], f"{path} imports {found - allowed[room]}"
