"""The CUDA sources compile without a GPU: no spill, no local memory, and the resources of the committed table.

The sources use nothing newer than compute capability 8.0, so nvcc translates them to PTX once (compute_80) and ptxas
makes the code of every architecture from that; the build does the same. After a change that is meant, write the table
anew with

    python tests/build/test_cuda_compile.py --update
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "lbfgs" / "resources.json"
MINIMUM = 80
PTXAS = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"
REGISTERS = 65536  # of a multiprocessor
THREADS = 256  # of a block
BLOCKS = {"panel_dots": 1}  # blocks of a multiprocessor that __launch_bounds__ asks for; 2 where not named


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compiler_version(compiler: str) -> str:
    found = re.search(r"release (\S+),", run(compiler, "--version"))
    assert found
    return found.group(1)


def newest(compiler: str) -> int:
    return max(int(x) for x in re.findall(r"compute_(\d+)", run(compiler, "--list-gpu-arch")))


def resources(compiler: str, directory: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers, static shared memory, stack and spills, as ptxas reports them."""
    ptx = directory / "kernels.ptx"
    run(compiler, "-std=c++17", "-ptx", f"-arch=compute_{MINIMUM}", str(ROOT / "csrc/cuda_kernels.cu"), "-o", str(ptx))

    def assemble(arch: str) -> str:
        return run(compiler, "-cubin", f"-arch={arch}", PTXAS, str(ptx), "-o", str(directory / f"{arch}.cubin"))

    archs = [f"sm_{x}" for x in sorted({80, 90, newest(compiler)})]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, map(parse, pool.map(assemble, archs)), strict=True))


def parse(report: str) -> dict[str, dict[str, int]]:
    table = {}
    for part in report.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert used
        assert stack
        shared = re.search(r"(\d+) bytes smem", part)
        table[part.split("'")[0]] = {
            "registers": int(used.group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "stack": int(stack.group(1)),
            "spills": int(stack.group(2)) + int(stack.group(3)),
        }
    return dict(sorted(table.items()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return resources(nvcc(), tmp_path_factory.mktemp("cuda"))


def test_no_spills_and_the_occupancy_that_the_planner_counts_on(measured):
    for arch, kernels in measured.items():
        assert len(kernels) == 36, arch
        for name, found in kernels.items():
            assert found["stack"] == found["spills"] == 0, (arch, name, found)
            assert found["shared"] == 0, "the planner counts dynamic shared memory only"
            blocks = next((n for key, n in BLOCKS.items() if key in name), 2)
            assert found["registers"] * THREADS * blocks <= REGISTERS, (arch, name, found)


def test_resources_are_those_of_the_table(measured):
    """Exactly, for the compiler that wrote the table; another one may allocate registers differently."""
    recorded = json.loads(TABLE.read_text())
    if compiler_version(nvcc()) != recorded["nvcc"]:
        pytest.skip(f"the table was written with nvcc {recorded['nvcc']}")
    assert measured == recorded["kernels"]


def test_runtime_source_is_self_contained(tmp_path):
    """What NVRTC gets includes nothing and compiles by itself, for a pair of types."""
    from secant.kernels.lbfgs import nvrtc

    text = nvrtc.source("f32_bf16")
    assert "#include" not in text
    source = tmp_path / "runtime.cu"
    source.write_text(text)
    run(nvcc(), "-std=c++17", "-ptx", f"-arch=compute_{MINIMUM}", str(source), "-o", str(tmp_path / "runtime.ptx"))
    names = re.findall(r"\.entry (\w+)\(", (tmp_path / "runtime.ptx").read_text())
    assert sorted(names) == sorted(
        f"lbfgs_{k}_f32_bf16"
        for k in ("update_block", "update_warp", "panel_dots", "panel_line", "two_loop_block", "two_loop_warp")
    )


if __name__ == "__main__":
    assert sys.argv[1:] == ["--update"], __doc__
    with tempfile.TemporaryDirectory() as name:
        content = {"nvcc": compiler_version(nvcc()), "kernels": resources(nvcc(), Path(name))}
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
