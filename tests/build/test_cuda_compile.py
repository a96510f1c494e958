"""The CUDA sources compile without a GPU: no spill, no local memory, and the resources of the committed table.

The sources use nothing newer than compute capability 8.0, so nvcc translates them to PTX once (compute_80) and ptxas
makes the code of every architecture from that; the build does the same, and its list of architectures is the one that
is checked here, and the newest that the compiler knows. After a change that is meant, write the table anew with

    python tests/build/test_cuda_compile.py --update [FAMILY ...]
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
FAMILIES = ("lbfgs", "blocks", "hvp", "precond", "search")
MINIMUM = 80
PTXAS = "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage,-Werror"
REGISTERS = 65536  # of a multiprocessor


def table(family: str) -> Path:
    return ROOT / "kernels" / family / "resources.json"


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


def shipped() -> list[int]:
    """The architectures whose code a build contains, as far as its compiler knows them."""
    found = re.search(r"set\(SECANT_SHIPPED ([\d ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found
    return [int(x) for x in found.group(1).split()]


def checked(compiler: str) -> list[int]:
    """What is shipped, and the newest one, whose users get the PTX where its major version is not."""
    known = {int(x) for x in re.findall(r"sm_(\d+)", run(compiler, "--list-gpu-code"))}
    return sorted({*shipped(), max(known)} & known)


def resources(
    compiler: str, directory: Path, family: str, chosen: tuple[int, ...] = ()
) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers, static shared memory, stack and spills, as ptxas reports them."""
    ptx, code = directory / f"{family}.ptx", ROOT / "kernels" / family / "bind.cu"
    run(compiler, "-std=c++17", "-I", str(ROOT / "csrc"), "-ptx", f"-arch=compute_{MINIMUM}", str(code), "-o", str(ptx))

    def assemble(arch: str) -> str:
        return run(
            compiler, "-cubin", f"-arch={arch}", PTXAS, str(ptx), "-o", str(directory / f"{family}_{arch}.cubin")
        )

    archs = [f"sm_{x}" for x in chosen or checked(compiler)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(archs, map(parse, pool.map(assemble, archs)), strict=True))


def parse(report: str) -> dict[str, dict[str, int]]:
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        assert used
        assert stack
        shared = re.search(r"(\d+) bytes smem", part)
        kernels[part.split("'")[0]] = {
            "registers": int(used.group(1)),
            "shared": int(shared.group(1)) if shared else 0,
            "stack": int(stack.group(1)),
            "spills": int(stack.group(2)) + int(stack.group(3)),
        }
    return dict(sorted(kernels.items()))


@pytest.fixture(
    scope="module",
    params=[
        "lbfgs",
        pytest.param("blocks", marks=pytest.mark.slow),
        "blocks, sm_90 sm_100",
        pytest.param("hvp", marks=pytest.mark.slow),
        "hvp, sm_90 sm_100",
        "precond",
        "search",
    ],
)
def measured(request, tmp_path_factory):
    """(family, what ptxas reports for it); the many kernels of `blocks` for two architectures where time is short."""
    family = request.param.split(",")[0]
    chosen = tuple(int(x) for x in re.findall(r"sm_(\d+)", request.param))
    return family, resources(nvcc(), tmp_path_factory.mktemp("cuda"), family, chosen)


def threads_and_blocks(kernel: str, arch: str) -> tuple[int, int]:
    """Threads of a block, and the blocks of a multiprocessor that its registers must allow for."""
    if kernel.startswith("lbfgs_"):
        return 256, 1 if "panel_dots" in kernel else 2
    if kernel.startswith("hvp_"):
        from secant.kernels.hvp import plan

        found = re.match(r"hvp_tile_(\d+)x(\d+)_f(\d+)", kernel)
        if found:
            k, e, bits = map(int, found.groups())
            if k == 1 and (f"f{bits}", e) in plan.THREE_BLOCKS and arch in ("sm_90", "sm_100"):  # with room for them
                return plan.BLOCK, 3
            return plan.BLOCK, 2 if k * e <= plan.TWO_BLOCKS[8 if bits == 64 else 4] else 1
        if "cross_entropy" in kernel:
            return plan.ROW_THREADS[8 if kernel.endswith("f64") else 4], 1
        return plan.BLOCK, 2
    if kernel.startswith("precond_"):
        return 256, 1 if "newton" in kernel else 2
    if kernel.startswith("search_"):
        return 128, 4
    # 8 warps hide what a multiprocessor's latencies are; plan.py counts on shared memory for as many.
    return (64, 4) if re.search(r"_b\d+_f\d+$", kernel) else (128, 2)


def expected_kernels(family: str) -> list[str]:
    if family == "blocks":
        from secant.kernels.blocks import plan

        return sorted(plan.kernels())
    if family == "hvp":
        from secant.kernels.hvp import plan as hvp_plan

        return sorted(hvp_plan.kernels())
    if family == "precond":
        from secant.kernels.precond import plan as precond_plan

        return sorted(precond_plan.kernels())
    if family == "search":
        from secant.kernels.search import plan as search_plan

        return sorted(search_plan.kernels())
    kinds = ("update_block", "update_warp", "panel_dots", "panel_line", "two_loop_block", "two_loop_warp")
    pairs = [f"lbfgs_{k}_{t}_{h}" for k in kinds for t in ("f32", "f64") for h in ("f32", "f64", "bf16")]
    return sorted([*pairs, "lbfgs_dense_f32", "lbfgs_dense_f64"])


def test_no_spills_and_the_occupancy_that_the_planner_counts_on(measured):
    family, archs = measured
    for arch, kernels in archs.items():
        assert sorted(kernels) == expected_kernels(family), arch
        for name, found in kernels.items():
            assert found["stack"] == found["spills"] == 0, (arch, name, found)
            assert found["shared"] == 0, "the planner counts dynamic shared memory only"
            threads, blocks = threads_and_blocks(name, arch)
            assert found["registers"] * threads * blocks <= REGISTERS, (arch, name, found)


def test_resources_are_those_of_the_table(measured):
    """Exactly, for the compiler that wrote the table; another one may allocate registers differently."""
    family, archs = measured
    recorded = json.loads(table(family).read_text())
    if compiler_version(nvcc()) != recorded["nvcc"]:
        pytest.skip(f"the table was written with nvcc {recorded['nvcc']}")
    assert archs == {arch: recorded["kernels"][arch] for arch in archs}


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_cover_what_is_shipped(family):
    compiler = nvcc()
    recorded = json.loads(table(family).read_text())
    assert {f"sm_{x}" for x in shipped()} <= recorded["kernels"].keys()
    if compiler_version(compiler) == recorded["nvcc"]:
        assert {f"sm_{x}" for x in checked(compiler)} == recorded["kernels"].keys()
    for arch, kernels in recorded["kernels"].items():
        assert sorted(kernels) == expected_kernels(family), arch
        assert all(found["stack"] == found["spills"] == 0 for found in kernels.values()), arch


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_have_every_kernel_by_name(family):
    """What `secant._cuda` will offer to the planners, as the preprocessor sees it."""
    text = run(nvcc(), "-std=c++17", "-E", "-I", str(ROOT / "csrc"), str(ROOT / "kernels" / family / "bind.cu"))
    rows = re.findall(r'\{"([^"]+)", reinterpret_cast<const void\*>\(&(\w+)\), sizeof\((\w+)\)\}', text)
    assert sorted(name for name, _, _ in rows) == expected_kernels(family)
    assert all(name == function for name, function, _ in rows)


def self_contained(directory: Path, text: str) -> list[str]:
    """Names of the kernels of a text that NVRTC would get, which includes nothing and compiles by itself."""
    assert "#include" not in text
    source, ptx = directory / "runtime.cu", directory / "runtime.ptx"
    source.write_text(text)
    run(nvcc(), "-std=c++17", "-ptx", f"-arch=compute_{MINIMUM}", str(source), "-o", str(ptx))
    return sorted(re.findall(r"\.entry (\w+)\(", ptx.read_text()))


def test_runtime_source_of_lbfgs(tmp_path):
    """One module a pair of types, and one a type for dense updates."""
    from secant.kernels.lbfgs import nvrtc

    for module, number in (("f32_bf16", 6), ("dense_f64", 1)):
        expected = [name for name in expected_kernels("lbfgs") if name.endswith(f"_{module}")]
        assert len(expected) == number
        assert {nvrtc.module_of(kernel) for kernel in expected} == {module}
        assert self_contained(tmp_path, nvrtc.source(module)) == expected


def test_the_compiler_at_run_time_keeps_subnormal_numbers(tmp_path, monkeypatch):
    """NVRTC itself, as CuPy has it, which needs no GPU; compiled once, found again."""
    pytest.importorskip("cupy")
    from secant.kernels import _cuda_driver
    from secant.kernels.blocks import nvrtc as blocks
    from secant.kernels.search import nvrtc as search

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    images = []
    real = _cuda_driver._image
    monkeypatch.setattr(_cuda_driver, "_image", lambda *args: images.append(args) or real(*args))
    for text in (blocks.source("blocks_inv_lu_w16_f32"), search.source("f32")):
        paths = {_cuda_driver.compile_at_run_time(text, "80") for _ in range(2)}
        assert [path.read_bytes()[:4] for path in paths] == [b"\x7fELF"]
    assert len(images) == 2
    assert b".ftz" not in real(blocks.source("blocks_inv_lu_w16_f32"), 999)  # of a GPU to come: PTX


@pytest.mark.parametrize("kernel", ["blocks_inv_spd_t3_f32", "blocks_solve_lu_w16_f64", "blocks_eigen_b48_f32"])
def test_runtime_source_of_blocks(tmp_path, kernel):
    """One module a kernel."""
    from secant.kernels.blocks import nvrtc

    assert self_contained(tmp_path, nvrtc.source(kernel)) == [kernel]


@pytest.mark.parametrize(
    ("module", "kernels"),
    [
        ("tile_4x16_f16", ["hvp_tile_4x16_f16"]),
        ("cross_entropy_f32", ["hvp_cross_entropy_f32"]),
        ("rest_f64", [f"hvp_{kind}_f64" for kind in ("between", "finish", "gram", "gram_sum", "product", "sum")]),
    ],
)
def test_runtime_source_of_hvp(tmp_path, module, kernels):
    """One module a shape of the tile, one for the small kernels of a type."""
    from secant.kernels.hvp import nvrtc

    assert self_contained(tmp_path, nvrtc.source(module)) == kernels
    assert {nvrtc._module(kernel) for kernel in kernels} == {module}


@pytest.mark.parametrize(
    ("module", "kernels"),
    [
        ("f32_bf16", ["precond_entries_f32_bf16", "precond_tile_f32_bf16"]),
        ("newton_f16", ["precond_newton_root_f16", "precond_newton_schulz_f16"]),
    ],
)
def test_runtime_source_of_precond(tmp_path, module, kernels):
    """One module a pair of types, one a type of the iterations."""
    from secant.kernels.precond import nvrtc

    assert self_contained(tmp_path, nvrtc.source(module)) == kernels
    assert {nvrtc.module_of(kernel) for kernel in kernels} == {module}


def test_runtime_source_of_search(tmp_path):
    """One module a type of points."""
    from secant.kernels.search import nvrtc

    kernels = ["search_advance_f32", "search_begin_f32"]
    assert self_contained(tmp_path, nvrtc.source("f32")) == kernels
    assert {nvrtc.module_of(kernel) for kernel in kernels} == {"f32"}


def test_nothing_is_fused_in_line_searches(tmp_path):
    """Every multiplication and addition of the machine is one instruction of its own; sums of slopes may be fused."""
    from secant.kernels.search import nvrtc

    self_contained(tmp_path, nvrtc.source("f64"))
    ptx = (tmp_path / "runtime.ptx").read_text()
    begin = ptx[ptx.index(".entry search_begin_f64") :]
    advance = ptx[ptx.index(".entry search_advance_f64") : ptx.index(".entry search_begin_f64")]
    assert "mul.rn.f64" in begin
    assert "fma" not in begin
    assert len(re.findall(r"fma\.rn\.f64", advance)) <= 5  # the loop over the products, unrolled by four, and its rest


if __name__ == "__main__":
    assert sys.argv[1:2] == ["--update"], __doc__
    for each in sys.argv[2:] or FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            content = {"nvcc": compiler_version(nvcc()), "kernels": resources(nvcc(), Path(name), each)}
        table(each).write_text(json.dumps(content, indent=1) + "\n")
