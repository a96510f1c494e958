"""Triton kernels compiled for GPUs that are not here: no spills, resources within what a multiprocessor has.

The launchers themselves run, with a driver that only knows which GPU it pretends to be, so what is compiled is exactly
what they would launch: signature, divisibility, block sizes, warps.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lbfgs_update import call_update
from precond_cases import RULES as STEPS
from precond_cases import tensors as stepped
from search_cases import RULE as SEARCH
from search_cases import a_state as searches

triton = pytest.importorskip("triton")

from secant.kernels.blocks import triton as blocks  # noqa: E402
from secant.kernels.hvp import triton as hvp  # noqa: E402
from secant.kernels.lbfgs import triton as lbfgs  # noqa: E402
from secant.kernels.lbfgs import triton_dense  # noqa: E402
from secant.kernels.lbfgs.contract import EXTRAS, RULES, Dense, Pair, State  # noqa: E402
from secant.kernels.precond import triton as precond  # noqa: E402
from secant.kernels.precond.contract import APPLY, GRAMS  # noqa: E402
from secant.kernels.search import triton as search  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

KERNELS = {
    lbfgs: ("_dots", "_solve", "_combine", "_panel", "_update_one", "_two_loop_one"),
    triton_dense: ("_pass", "_reduce", "_finish"),
    blocks: ("_inv_lanes", "_inv_tile", "_solve_lanes", "_solve_tile", "_eigh_lanes", "_eigh_tile"),
    hvp: ("_pass", "_between", "_finish", "_cross_entropy", "_product", "_product_finish", "_gram", "_gram_finish"),
    precond: ("_tile", "_entries", "_newton_schulz", "_newton_root"),
    search: ("_advance", "_begin"),
}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
#: Lengths: short and long; the aligned ones are loaded 16 bytes at a time.
SHORT, SHORT_ODD = lbfgs._ONE_PROGRAM, lbfgs._ONE_PROGRAM - 1
LONG, LONG_ODD = 2 * lbfgs._ONE_PROGRAM, lbfgs._ONE_PROGRAM + 1
MAIN = [(10, 64, F32, F32), (10, LONG, F32, F32), (10, LONG, F32, BF16), (10, LONG, F64, F64), (10, LONG_ODD, F32, F32)]
MORE = [
    (m, n, t, r)
    for m in (1, 17, 256)
    for n in (1, 64, 1024, SHORT, SHORT_ODD, LONG, LONG_ODD)
    for t, r in ((F32, BF16), (F64, F64))
]


class PretendDriver:
    """Enough of Triton's driver to specialise and compile a launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Stands in for a kernel: compiles what would be launched, and keeps the result."""

    def __init__(self, kernel, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        assert 0 < grid[0] < 2**31
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request, monkeypatch):
    """The architecture, and the list of every kernel that the launchers would have launched on such a GPU."""
    if lbfgs._INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set: nothing is compiled")
    compiled: list = []
    for family, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(family, name, Compiler(getattr(family, name), compiled))
    driver = triton.runtime.driver
    before = dict(vars(driver))  # reset_active would look for a real GPU
    driver.set_active(PretendDriver(request.param))
    yield request.param, compiled
    vars(driver).update(before)


def a_state(m: int, n: int, ring: torch.dtype) -> State:
    """An empty history of one problem."""
    rings = [torch.zeros(1, m, n, dtype=ring) for _ in range(2)]
    grams = [torch.zeros(1, m, m, dtype=F64) for _ in range(2)]
    counters = [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
    return State(*rings, *grams, *counters, torch.zeros(1, 8, dtype=F64))


def launch_all(m: int, n: int, vectors: torch.dtype, ring: torch.dtype, main: bool) -> None:
    """The fused step and a two-loop; unless `main`, also every other way to call `update`."""
    state = a_state(m, n, ring)
    rings = state[:2]
    g, d, p = (torch.zeros(1, n, dtype=vectors) for _ in range(3))
    call_update(lbfgs.update, *state, g, d, g, p, 1.0, 1e-7, d, p)
    lbfgs.two_loop(g, *rings, None, d)
    if not main:
        call_update(lbfgs.update, *state, g, d, g, p, torch.ones(1, dtype=F64), 1e-7, d, p)
        call_update(lbfgs.update, *state, None, d, g, None, 1.0, 1e-7, None, None)
        call_update(lbfgs.update, *state, g, None, None, None, 1.0, 1e-7, d, None)
        lbfgs.two_loop(g, *rings, 0.5, d)


def resources(kernel, arch: int, path: Path) -> dict[str, int]:
    """What ptxas and Triton say of a compiled kernel; shared memory in bytes."""
    path.write_text(kernel.asm["ptx"])
    target = re.search(r"^\.target (sm_\w+)", kernel.asm["ptx"], re.MULTILINE).group(1)
    assert re.fullmatch(rf"sm_{arch}a?", target)
    log = subprocess.run(
        [PTXAS, "-v", f"--gpu-name={target}", path, "-o", path.with_suffix(".cubin")],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    ).groups()
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "stack": int(stack),
        "spills": int(stores) + int(loads),
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
    }


def check_resources(gpu, tmp_path, what, allowed):
    """Print and check what every compiled kernel uses; `allowed` maps its registers to the bytes it may spill."""
    arch, compiled = gpu
    for i, kernel in enumerate(compiled):
        used = resources(kernel, arch, tmp_path / "kernel.ptx")
        label = f"{kernel.metadata.name} {i} sm_{arch} {what}: {used}"
        print(label)  # pytest -rP shows the table
        assert used["spills"] <= allowed(used["registers"]), label
        assert used["stack"] <= allowed(used["registers"]), label
        assert used["registers"] * used["threads"] <= 65536, label
        assert used["shared"] <= 48 * 1024, label


def check(gpu, tmp_path, m, n, vectors, ring, main):
    launch_all(m, n, vectors, ring, main)
    want = {"_dots", "_combine", "_panel"} if n > lbfgs._ONE_PROGRAM else {"_update_one", "_two_loop_one"}
    assert {k.metadata.name for k in gpu[1]} == want
    # In corners ptxas gives up a word or two for an occupancy step, far below the 255 registers it could use.
    what = f"m={m} n={n} {vectors} {ring}"
    check_resources(gpu, tmp_path, what, lambda registers: 0 if main or registers > 128 else 32)


@pytest.mark.parametrize(("m", "n", "vectors", "ring"), MAIN, ids=str)
def test_compiles_without_spills(gpu, tmp_path, m, n, vectors, ring):
    check(gpu, tmp_path, m, n, vectors, ring, True)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "vectors", "ring"), MORE, ids=str)
def test_everything_compiles_without_spills(gpu, tmp_path, m, n, vectors, ring):
    check(gpu, tmp_path, m, n, vectors, ring, False)


slowly = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["step", slowly("pair"), slowly("direction")])
@pytest.mark.parametrize(("m", "n", "vectors", "ring"), MAIN[:4], ids=str)
def test_parts_compile_without_spills(gpu, tmp_path, m, n, vectors, ring, kind):
    state = a_state(m, n, ring)
    g, d, p = (torch.zeros(1, n, dtype=vectors) for _ in range(3))
    sums, coefs = torch.zeros(1, 4 * m + EXTRAS, dtype=F64), torch.zeros(1, 2 * m + 2, dtype=F64)
    pair = None if kind == "direction" else Pair(d, g, p, 1.0)
    grad, out, prev = (None, None, None) if kind == "pair" else (g, d, p)
    lbfgs.dots(state, pair, grad, sums)
    lbfgs.solve(state, sums, coefs, 1e-7, pair is not None, grad is not None)
    lbfgs.combine(state, pair, grad, coefs, out, prev)
    assert [k.metadata.name for k in gpu[1]] == ["_dots", "_solve", "_combine"]
    check_resources(gpu, tmp_path, f"{kind} in parts m={m} n={n} {vectors} {ring}", lambda registers: 0)


@pytest.mark.parametrize("kind", ["step", slowly("pair"), slowly("direction")])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("n", [5000, slowly(1)])
def test_dense_updates_compile_without_spills(gpu, tmp_path, n, dtype, kind):
    h, vectors = torch.zeros(n * (n + 1) // 2, dtype=dtype), torch.zeros(5, n, dtype=dtype)
    count = torch.zeros((), dtype=torch.int32)
    state = Dense(h, vectors[:2].clone(), torch.zeros(5, dtype=F64), count, torch.zeros(10, dtype=F64))
    g, d, p = vectors[2:]
    pair = None if kind == "direction" else Pair(d, g, p if kind == "step" else None, 1.0)
    grad, out, prev = (None, None, None) if kind == "pair" else (g, d, p if kind == "step" else None)
    for rule in range(len(RULES)):
        lbfgs.dense_update(state, pair, grad, 1e-7, rule, out, prev)
    assert [k.metadata.name for k in gpu[1]] == ["_pass", "_reduce", "_finish"] * len(RULES)
    what = f"{kind} of a dense matrix n={n} {dtype}"
    check_resources(gpu, tmp_path, what, lambda registers: 0 if (kind == "step" and n > 1) or registers > 128 else STEP)


@pytest.mark.parametrize("n", [64, LONG])
def test_rows_are_read_sixteen_bytes_at_a_time(gpu, n):
    """A float32 ring of aligned rows: the loads of the passes over the history are ld.global.v4."""
    _, compiled = gpu
    launch_all(10, n, F32, F32, True)
    for kernel in compiled:
        if kernel.metadata.name in ("_dots", "_combine", "_update_one"):
            wide = re.findall(r"ld\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"])
            assert len(wide) >= 4, kernel.metadata.name


#: Bytes that ptxas may spill for an occupancy step, far below the 255 registers it could use, and in the corners.
STEP, CORNER = 32, 64


def launch_blocks(op: str, n: int, dtype: torch.dtype, mode: object) -> None:
    """One call of an op on 1000 blocks; `mode` is spd, for solve (spd, k), for eigenvalues the function."""
    a = torch.zeros(1000, n, n, dtype=dtype)
    out, info = torch.zeros_like(a), torch.zeros(1000, dtype=torch.int32)
    if op == "inv":
        blocks.inv(a, None, False, mode, out, info)
    elif op == "solve":
        b = torch.zeros(1000, n, mode[1], dtype=dtype)
        blocks.solve(a, b, None, False, mode[0], b, info)
    elif mode == "eigh":
        blocks.eigh(a, torch.zeros(1000, n, dtype=dtype), out, info)
    elif mode == "abs_inv":
        blocks.abs_inv(a, 0.1, out, info)
    else:
        blocks.inv_root(a, 4, None, False, out, info)


BLOCKS_MAIN = [
    ("inv", 4, F32, False),
    ("inv", 32, F32, True),
    ("solve", 9, F32, (True, 1)),
    ("eigen", 3, F32, "eigh"),
    ("eigen", 9, F32, "inv_root"),
]
BLOCKS_MORE = [
    *(("inv", n, t, spd) for t in (F32, F64) for n in (1, 2, 3, 5, 6, 8, 9, 16, 32, 64) for spd in (True, False)),
    *(
        ("solve", n, t, (s, k))
        for t in (F32, F64)
        for n in (2, 4, 8, 16, 32, 64)
        for s in (True, False)
        for k in (1, 4)
    ),
    *(("eigen", n, t, f) for t in (F32, F64) for n in (2, 4, 8, 16, 32, 64) for f in ("eigh", "abs_inv")),
    *(("inv", n, BF16, False) for n in (4, 16)),
    ("solve", 32, F32, (True, 32)),
    ("solve", 16, BF16, (True, 1)),
    ("eigen", 3, BF16, "eigh"),
    ("eigen", 16, BF16, "inv_root"),
]


@pytest.mark.parametrize(("op", "n", "dtype", "mode"), BLOCKS_MAIN, ids=str)
def test_blocks_compile_without_spills(gpu, tmp_path, op, n, dtype, mode):
    launch_blocks(op, n, dtype, mode)
    assert len(gpu[1]) == 1
    check_resources(gpu, tmp_path, f"{op} n={n} {dtype} {mode}", lambda registers: 0 if registers > 128 else STEP)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "n", "dtype", "mode"), BLOCKS_MORE, ids=str)
def test_all_blocks_compile(gpu, tmp_path, op, n, dtype, mode):
    launch_blocks(op, n, dtype, mode)
    check_resources(gpu, tmp_path, f"{op} n={n} {dtype} {mode}", lambda registers: CORNER)


def launch_function_of_x(op: str, n: int, d: int, k: int, dtype: torch.dtype, loss: str = "logistic") -> None:
    """One call of an op over X (n, d); rows aligned to 16 bytes are loaded so."""
    arithmetic = F64 if dtype == F64 else F32
    x = torch.zeros(1, d, dtype=dtype).expand(n, d)
    rows, v = torch.zeros(n, dtype=arithmetic), torch.zeros(d, k, dtype=arithmetic)
    value, probs = torch.zeros((), dtype=F64), torch.zeros(1, k, dtype=arithmetic).expand(n, k)
    if op == "glm_hvp":
        hvp.glm_hvp(x, v, rows, 0.5, v)
    elif op == "glm_value_grad":
        hvp.glm_value_grad(x, rows, v[:, 0].contiguous(), loss, 1.0, None, 0.5, value, v[:, 0].contiguous(), rows)
    elif op == "softmax_hvp":
        hvp.softmax_hvp(x, v, probs, None, 0.5, v)
    else:
        hvp.softmax_value_grad(x, rows.long(), v, rows, 0.5, value, v, probs)


#: (op, rows, columns, columns of v, dtype): one pass and two, one column and groups of them.
HVP_MAIN = [
    ("glm_hvp", 1 << 17, 256, 1, F32),
    ("glm_hvp", 1 << 17, 784, 8, F32),
    ("glm_value_grad", 1 << 17, 784, 1, F32),
    ("glm_hvp", 4096, 65536, 1, F32),
    ("softmax_value_grad", 1 << 17, 784, 10, F32),
]
HVP_MORE = [
    *(("glm_hvp", 1 << 17, d, k, t) for t in (F32, F64, BF16) for d in (3, 256, 785, 4096, 16384) for k in (1, 8, 64)),
    *(("glm_value_grad", 1 << 17, d, 1, t) for t in (F32, F64, torch.float16) for d in (10, 1024, 16384, 65536)),
    *((op, 1 << 17, d, k, t) for op in ("softmax_hvp", "softmax_value_grad") for t in (F32, F64, BF16)
      for d, k in ((10, 3), (784, 10), (1024, 16), (4096, 100))),
]  # fmt: skip


@pytest.mark.parametrize(("op", "n", "d", "k", "dtype"), HVP_MAIN, ids=str)
def test_functions_of_x_compile_without_spills(gpu, tmp_path, op, n, d, k, dtype):
    launch_function_of_x(op, n, d, k, dtype)
    once = {"_pass", "_finish"}
    assert {x.metadata.name for x in gpu[1]} == (once | {"_between"} if d > 16384 or "softmax" in op else once)
    check_resources(gpu, tmp_path, f"{op} n={n} d={d} k={k} {dtype}", lambda registers: 0 if registers > 128 else STEP)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "n", "d", "k", "dtype"), HVP_MORE, ids=str)
def test_all_functions_of_x_compile(gpu, tmp_path, op, n, d, k, dtype):
    for loss in hvp.LOSSES if op == "glm_value_grad" else ("logistic",):
        launch_function_of_x(op, n, d, k, dtype, loss)
    check_resources(gpu, tmp_path, f"{op} n={n} d={d} k={k} {dtype}", lambda registers: CORNER)


@pytest.mark.parametrize("d", [256, 784])
def test_rows_of_x_are_read_sixteen_bytes_at_a_time(gpu, d):
    launch_function_of_x("glm_hvp", 1 << 17, d, 1, F32)
    (found,) = (x for x in gpu[1] if x.metadata.name == "_pass")
    assert len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", found.asm["ptx"])) >= 4


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("vocabulary", "dtype"), [(1000, F32), (50304, F32), (50304, BF16)], ids=str)
def test_cross_entropy_compiles_without_spills(gpu, tmp_path, vocabulary, dtype, given):
    logits = torch.zeros(4, vocabulary, dtype=dtype)
    hvp.cross_entropy_hvp(logits, logits, torch.zeros(4) if given else None, logits.clone())
    check_resources(gpu, tmp_path, f"cross_entropy V={vocabulary} {dtype}", lambda registers: 0)


@pytest.mark.parametrize(("m", "n", "k", "dtype"), [(10000, 256, 256, F32), (256, 256, 10000, F32), (96, 64, 64, F64)])
def test_products_compile_without_spills(gpu, tmp_path, m, n, k, dtype):
    a, b, out = torch.zeros(m, k, dtype=dtype), torch.zeros(n, k, dtype=dtype).T, torch.zeros(m, n, dtype=dtype)
    hvp.paired_matmul(a, b, a, b, out[0], out, out, out, out)
    check_resources(gpu, tmp_path, f"product {m} {n} {k} {dtype}", lambda registers: 0)


@pytest.mark.parametrize(("m", "n", "dtype"), [(9000, 999, F32), (9000, 800, F64), (5000, 65, F32), (5000, 30, F32)])
def test_grams_compile_without_spills(gpu, tmp_path, m, n, dtype):
    x, out = torch.zeros(m, n, dtype=dtype), torch.zeros(n, n, dtype=dtype)
    hvp.gram(x, None, False, out)
    hvp.gram(torch.zeros(n, m, dtype=dtype).T, x[:, 0].contiguous(), True, out)
    assert ("_gram_finish" in {kernel.metadata.name for kernel in gpu[1]}) == (n < 64)  # split over rows
    check_resources(gpu, tmp_path, f"gram {m} {n} {dtype}", lambda registers: 0)


def launch_step(name: str, shapes: list, dtype: torch.dtype, storage: torch.dtype, phases: int) -> None:
    """One call that steps tensors of these shapes, with the number of the step and the rate on the device."""
    given, layout = stepped(dtype, storage, STEPS[name], shapes=shapes)
    precond.step(given, layout, 1e-2, STEPS[name], phases, torch.zeros((), dtype=torch.int64))


WHOLE, WIDE = [((128, 128), 2, 2, "lr")], [((64, 64), 2, 2, "lr")]
PARTS = [((60, 30), 2, 1, "lr"), ((33, 30), 2, 1, "l"), ((5000,), 1, 3, "")]


@pytest.mark.parametrize("dtype", [F32, slowly(F64)], ids=str)
@pytest.mark.parametrize("name", ["adam", "soap", slowly("sgd"), slowly("rms"), slowly("none")])
def test_steps_compile_without_spills(gpu, tmp_path, name, dtype):
    """Both phases in one launch, and each alone."""
    for phases in (GRAMS | APPLY, APPLY, GRAMS):
        launch_step(name, WIDE if dtype is F64 else WHOLE, dtype, dtype, phases)
    assert [k.metadata.name for k in gpu[1]] == ["_tile"] * 3
    check_resources(gpu, tmp_path, f"step {name} {dtype}", lambda registers: 0 if registers > 128 else STEP)


@pytest.mark.parametrize(
    ("dtype", "storage"), [(F32, F32), slowly(BF16, BF16), slowly(F64, F64), slowly(F32, BF16)], ids=str
)
@pytest.mark.parametrize("name", ["adam", slowly("soap")])
def test_steps_of_other_tensors_compile(gpu, tmp_path, name, dtype, storage):
    launch_step(name, PARTS, dtype, storage, GRAMS | APPLY)
    assert [k.metadata.name for k in gpu[1]] == ["_tile", "_tile", "_entries"]
    check_resources(gpu, tmp_path, f"step of others {name} {dtype} {storage}", lambda registers: CORNER)


@pytest.mark.parametrize(
    ("m", "n", "dtype"), [(32, 32, F32), (20, 9, F32), slowly(32, 17, F64), slowly(32, 5, BF16)], ids=str
)
def test_orthogonalisation_compiles_without_spills(gpu, tmp_path, m, n, dtype):
    x = torch.zeros(3, m, n, dtype=dtype)
    precond.newton_schulz(x, 5, 3.0, -4.0, 2.0, 1e-7, x)
    assert [k.metadata.name for k in gpu[1]] == ["_newton_schulz"]
    check_resources(gpu, tmp_path, f"newton_schulz {m} {n} {dtype}", lambda registers: 0)


@pytest.mark.parametrize(
    ("n", "p", "dtype"), [(32, 2, F32), (20, 4, F32), slowly(9, 1, BF16), slowly(32, 4, F64)], ids=str
)
def test_roots_compile_without_spills(gpu, tmp_path, n, p, dtype):
    a, info = torch.zeros(3, n, n, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    precond.newton_inv_root(a, p, 1e-3, 20, 1e-4, a.clone(), info)
    assert [k.metadata.name for k in gpu[1]] == ["_newton_root"]
    check_resources(gpu, tmp_path, f"newton_root {n} {p} {dtype}", lambda registers: 0)


@pytest.mark.parametrize(("n", "dtype"), [(10, F64), (10, F32), slowly(1, F64), slowly(1000, F64)], ids=str)
def test_line_searches_compile_without_spills(gpu, tmp_path, n, dtype):
    state, (value, grad) = searches(100, n, dtype, 0)
    rows = torch.arange(50)
    search.advance(state, value, grad, None, SEARCH)
    search.advance(state, value[:50], grad[:50], rows, SEARCH)
    search.begin(state, state.numbers[0], state.numbers[1], None, rows, SEARCH)
    search.begin(state, state.numbers[0], state.numbers[1], state.step, None, SEARCH)
    assert [k.metadata.name for k in gpu[1]] == ["_advance"] * 2 + ["_begin"] * 2
    # Nothing is fused, in the code for the device neither.
    assert all("fma.rn.f64" not in k.asm["ptx"] and not k.metadata.enable_fp_fusion for k in gpu[1])
    check_resources(gpu, tmp_path, f"search {n} {dtype}", lambda registers: 0)
