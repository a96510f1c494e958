"""csrc/standin/cuda_on_cpu.h itself: what it computes, and the mistakes it reports."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch

BODIES = {
    "neighbour": "shared[i] = float(i); __syncthreads(); data[i] = shared[(i + 1) % 64];",
    "neighbour_without_barrier": "shared[i] = float(i); data[i] = shared[(i + 1) % 64];",
    "collectives": """
        data[i] = __shfl_xor_sync(0xffffffffu, float(i), 3);
        data[64 + i] = __shfl_sync(0xffffffffu, float(i), 5);
        data[128 + i] = float(__popc(__ballot_sync(0xffffffffu, i % 3 == 0)));""",
    "static_shared": """
        __shared__ int first;
        if (i == 7) first = int(blockIdx.x) * 10;
        __syncthreads();
        if (i == 3) data[blockIdx.x] = float(first);""",
    "asynchronous": """
        data[i] = 1.0f;
        __syncthreads();
        if (i == 0) {
          copy_async16(shared, data);
          data[100] = shared[0];
          copy_async_wait();
          data[101] = shared[0];
        }""",
    "early_return": "if (i == 5) return;\n__syncthreads();",
    "two_barriers": "if (i < 32) { __syncthreads(); }\nelse { __syncthreads(); }",
    "lane_missing": "if (i != 40) __syncwarp();",
    "two_collectives": "if (i % 2) { __syncwarp(); }\nelse { __syncwarp(); }",
    "misaligned": "float x[4]; load_wide<4>(data + 1, x); data[i] = x[0];",
}
PROLOGUE = """
    SECANT_DYNAMIC_SHARED(memory);
    float* data = reinterpret_cast<float*>(address);
    float* shared = reinterpret_cast<float*>(memory);
    const int i = int(threadIdx.x);
    (void)data, (void)shared, (void)i;
"""


class Launch(NamedTuple):
    kernel: str
    grid_x: int = 1
    grid_y: int = 1
    threads: int = 64
    shared: int = 1024
    cooperative: bool = False


@pytest.fixture(scope="module")
def library(build_standin):
    text = "\n".join(
        f'extern "C" __global__ void {name}(u64 address) {{{PROLOGUE}{body}\n}}' for name, body in BODIES.items()
    )
    rows = ", ".join(f"SECANT_STANDIN_KERNEL({name}, u64)" for name in BODIES)
    table = f"static const secant_standin::Kernel kKernels[] = {{{rows}}};\nSECANT_STANDIN_EXPORT(kKernels)"
    return build_standin("lbfgs", table, lambda _: text)


@pytest.fixture
def run(library, standin_driver):
    """run(name, seed, **launch): a kernel of BODIES with `float* data`, 256 zeros; returns them."""

    def call(name: str, seed: int = 0, **kw: int) -> torch.Tensor:
        data = torch.zeros(256)
        pointer = bytes(ctypes.c_uint64(data.data_ptr()))
        standin_driver(library, None, seed).launch(Launch(name, **kw), 0, 0, pointer)
        return data

    return call


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_through_shared_memory(run, seed):
    assert torch.equal(run("neighbour", seed)[:64], torch.arange(1.0, 65.0) % 64)


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_shows(run, seed):
    """Without the barrier the neighbour's value is still the NaN that shared memory starts with, for many threads."""
    assert run("neighbour_without_barrier", seed)[:64].isnan().any()


def test_shuffles_and_ballot(run):
    data, lanes = run("collectives"), torch.arange(64)
    assert torch.equal(data[:64], (lanes ^ 3).float())
    assert torch.equal(data[64:128], (lanes // 32 * 32 + 5).float())
    assert torch.equal(data[128:192], torch.full((64,), 11.0))


def test_static_shared_memory_is_one_a_block(run):
    data = run("static_shared", grid_x=5, cooperative=True)
    assert torch.equal(data[:5], torch.arange(5.0) * 10)


def test_asynchronous_copies_come_at_the_wait(run):
    data = run("asynchronous")
    assert data[100].isnan()
    assert data[101] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early_return", "deadlock"),
        ("two_barriers", "divergent __syncthreads"),
        ("lane_missing", "deadlock"),
        ("two_collectives", "divergent warp collective"),
        ("misaligned", "misaligned"),
        ("no_such_kernel", "no kernel no_such_kernel"),
    ],
)
def test_mistakes_are_reported(run, name, message):
    with pytest.raises(RuntimeError, match=message):
        run(name)
