"""Occupancy by counting: against figures worked out by hand, NVIDIA's own calculator, and what the planners rely on."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("occupancy_command", ROOT / "bench" / "occupancy.py")
command = importlib.util.module_from_spec(spec)
sys.modules["occupancy_command"] = command  # its classes look their module up
spec.loader.exec_module(command)

#: Worked out from the limits that NVIDIA documents. A warp's registers are a multiple of 256 in one of four partitions
#: of 16,384; a block's shared memory is a multiple of 128 bytes, 1,024 of them the system's.
BY_HAND = [
    # architecture, registers, shared, threads -> blocks, share of the warps, limit
    ("sm_80", 32, 0, 256, 8, 1.0, "warps"),  # 1,024 a warp, 16 warps a partition: 64, as many as there may be
    ("sm_80", 33, 0, 256, 6, 0.75, "registers"),  # 1,056 -> 1,280 a warp, 12 a partition: 48 warps of 8
    ("sm_80", 32, 16384, 128, 9, 36 / 64, "shared memory"),  # 17,408 a block, 167,936 / 17,408 = 9.6
    ("sm_90", 32, 16384, 128, 13, 52 / 64, "shared memory"),  # 233,472 / 17,408 = 13.4
    ("sm_100", 32, 16384, 128, 13, 52 / 64, "shared memory"),
    ("sm_90", 232, 0, 64, 4, 8 / 64, "registers"),  # 7,424 a warp, 2 a partition: 8 warps of 2
    ("sm_90", 168, 0, 96, 4, 12 / 64, "registers"),  # 5,376 a warp, 3 a partition: 12 warps of 3
    ("sm_100", 64, 0, 1024, 1, 0.5, "registers"),  # 2,048 a warp, 8 a partition: 32 warps, all of one block
    ("sm_100", 65, 0, 1024, 0, 0.0, "registers"),  # 2,304 a warp: 32 of them are more than there is
    ("sm_90", 16, 0, 32, 32, 0.5, "blocks"),
    ("sm_120", 16, 0, 32, 24, 0.5, "blocks"),
    ("sm_90", 32, 227 << 10, 256, 1, 8 / 64, "shared memory"),  # with the system's kilobyte all 228
    ("sm_90", 32, (227 << 10) + 1, 256, 0, 0.0, "shared memory"),
    ("sm_80", 32, 163 << 10, 256, 1, 8 / 64, "shared memory"),
    ("sm_80", 32, 164 << 10, 256, 0, 0.0, "shared memory"),
    ("sm_90", 256, 0, 32, 0, 0.0, "registers"),
    ("sm_90", 32, 0, 1025, 0, 0.0, "warps"),
]


@pytest.mark.parametrize(("arch", "registers", "shared", "threads", "blocks", "share", "limit"), BY_HAND)
def test_figures_worked_out_by_hand(arch, registers, shared, threads, blocks, share, limit):
    found = command.occupancy(command.ARCHITECTURES[arch], registers, shared, threads)
    assert found == (blocks, share, limit)


#: A program around NVIDIA's calculator, which is a header of the toolkit and of Triton: a case a line.
PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps, registers, dynamic, threads;
  long shared, most;
  while (scanf("%d %d %d %ld %ld %d %d %d", &major, &minor, &warps, &shared, &most, &registers, &dynamic, &threads) ==
         8) {
    cudaOccDeviceProp device;
    cudaOccFuncAttributes function;
    cudaOccDeviceState state;
    cudaOccResult result;
    memset(&device, 0, sizeof device);
    memset(&function, 0, sizeof function);
    memset(&state, 0, sizeof state);
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared;
    device.sharedMemPerBlockOptin = most;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.maxDynamicSharedSizeBytes = dynamic;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    state.carveoutConfig = 100;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, dynamic)) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
  return 0;
}
"""


def header() -> Path:
    places = [Path("/usr/local/cuda/include")]
    if (compiler := shutil.which("nvcc")) is not None:
        places.append(Path(compiler).resolve().parents[1] / "include")
    if (triton := importlib.util.find_spec("triton")) is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/include")
    for place in places:
        if (place / "cuda_occupancy.h").is_file():
            return place
    pytest.skip("cuda_occupancy.h is not installed")


def test_agrees_with_the_calculator_of_nvidia(tmp_path):
    compiler = shutil.which("gcc") or pytest.skip("needs gcc")
    (tmp_path / "a.c").write_text(PROGRAM)
    build = [compiler, "-I", str(header()), str(tmp_path / "a.c"), "-o", str(tmp_path / "a")]
    subprocess.run(build, check=True, capture_output=True)
    draw = random.Random(0)
    asked, counted = [], []
    for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        limits, number = command.ARCHITECTURES[name], int(name[3:])
        for _ in range(400):
            registers, threads = draw.randint(1, 255), draw.choice([1, 32, 33, 64, 96, 128, 256, 384, 512, 1000, 1024])
            shared = draw.choice([0, draw.randint(0, 48 << 10), draw.randint(0, limits.block_shared)])
            device = (number // 10, number % 10, limits.warps, limits.shared, limits.block_shared)
            asked.append(" ".join(map(str, (*device, registers, shared, threads))))
            counted.append(command.occupancy(limits, registers, shared, threads).blocks)
    done = subprocess.run([str(tmp_path / "a")], input="\n".join(asked), capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == counted
    assert len(set(counted)) > 10


@pytest.fixture(scope="module")
def found():
    return command.tables(False)


def test_every_kernel_of_the_benchmark_has_its_resources(found):
    assert (found["architecture"], found["registers"]) == ("sm_90", "the committed tables of ptxas")
    for family in command.FAMILIES:
        table = json.loads((ROOT / "kernels" / family / "resources.json").read_text())["kernels"]["sm_90"]
        rows = found["families"][family]
        assert rows
        for row in rows:
            assert row["registers"] == table[row["kernel"]]["registers"]
            assert row["blocks"] >= 1, row
            assert row["driver_blocks"] is None
        measured = {name for row in rows for name in row["cases"]}
        assert measured == {case.label for case in command.cases(family)}


def test_the_planners_get_the_blocks_that_they_count_on(found):
    """Two blocks of a multiprocessor for what the planners of lbfgs and hvp give two blocks' worth of memory."""
    rows = {
        family: {(row["kernel"], row["dynamic"]): row for row in found["families"][family]}
        for family in command.FAMILIES
    }
    for (kernel, shared), row in rows["lbfgs"].items():
        half = command.H100_DEVICE.shared // 2 - 1024
        if "panel_dots" not in kernel and shared <= half:
            assert row["blocks"] >= 2, row
    for (kernel, _), row in rows["hvp"].items():
        if kernel.startswith("hvp_tile"):
            k, e = (int(x) for x in kernel.split("_")[2].split("x"))
            size = 8 if kernel.endswith("f64") else 4
            if k * e <= command.hvp_plan.TWO_BLOCKS[size] and row["dynamic"] <= half:
                assert row["blocks"] >= 2, row


def test_resources_of_a_module_are_read():
    text = """
Fatbin ptx code:
================
arch = sm_80

Fatbin elf code:
================
arch = sm_80
 Function lbfgs_a:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0

Fatbin elf code:
================
arch = sm_90
 Function lbfgs_a:
  REG:48 STACK:0 SHARED:1152 LOCAL:0 CONSTANT[0]:560 TEXTURE:0
 Function hvp_b:
  REG:64 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0
"""
    assert command.parse_cuobjdump(text, "sm_90") == {"lbfgs_a": (48, 128), "hvp_b": (64, 0)}
    assert command.parse_cuobjdump(text, "sm_80") == {"lbfgs_a": (40, 0)}
    assert command.parse_cuobjdump(text, "sm_100") == {}


def test_tables_are_those_of_the_nearest_older_architecture():
    assert command.recorded("lbfgs", "sm_103") == command.recorded("lbfgs", "sm_100")
    assert command.recorded("lbfgs", "sm_89") == command.recorded("lbfgs", "sm_80")
    assert command.recorded("lbfgs", "sm_86") == command.recorded("lbfgs", "sm_80")
