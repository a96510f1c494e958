"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h: every kernel within the bounds of the reference."""

from __future__ import annotations

import re

import pytest
import torch
from secant.kernels import _cuda_driver
from secant.kernels.precond import plan
from torch.utils._python_dispatch import TorchDispatchMode

import precond_cases as precond
from precond_cases import BF16, F16, F32, F64, RULES
from reruns import under_address_sanitizer

TABLE = """
#define SECANT_STEPS(TAG, S, Q) SECANT_PRECOND_STEP_TABLE(SECANT_STANDIN_ROW, TAG)
#define SECANT_ITERATIONS(TAG, S) SECANT_PRECOND_ITERATION_TABLE(SECANT_STANDIN_ROW, TAG)
#define SECANT_STANDIN_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
static const secant_standin::Kernel kKernels[] = {
    SECANT_PRECOND_STEPS(SECANT_STEPS) SECANT_PRECOND_ITERATIONS(SECANT_ITERATIONS)};
SECANT_STANDIN_EXPORT(kKernels)
"""
SMALL = _cuda_driver.Device(multiprocessors=3, shared=101_376)
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("precond", TABLE)


@pytest.fixture
def backend(library, standin_driver):
    return plan.Launcher(standin_driver(library, SMALL, 1))


@ALL
def test_a_step_is_that_of_the_reference(backend, rule):
    precond.compare(backend, F32, F32, rule)
    # The tiles of 12 tensors in one launch, those that have no sides in another.
    assert [item.kernel for item in backend.driver.log] == ["precond_tile_f32_f32", "precond_entries_f32_f32"]
    sizes = [(down * across, sides) for _, down, across, sides in precond.SHAPES]
    assert backend.driver.log[0].grid_x == sum(tiles for tiles, sides in sizes if sides)
    assert backend.driver.log[1].grid_x == sum(tiles for tiles, sides in sizes if not sides)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(F64, F64), (F32, BF16), (F64, BF16), (BF16, F32), (BF16, BF16), (F16, F32), (F16, BF16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["adam", "soap"])
def test_every_pair_of_types(backend, name, dtype, storage):
    precond.compare(backend, dtype, storage, RULES[name], shapes=precond.SHAPES[2:])
    assert {item.kernel for item in backend.driver.log} <= set(plan.kernels())


@pytest.mark.parametrize("order", ["columns", "spread"])
def test_any_strides(backend, order):
    given, layout = precond.tensors(F32, F32, RULES["soap"])
    plain, _ = precond.run(backend, given, layout, RULES["soap"])
    other, _ = precond.run(backend, given, layout, RULES["soap"], order=order)
    for members, others in zip(plain, other, strict=True):
        assert all(map(torch.equal, members, others))


@pytest.mark.parametrize("name", ["adam", "soap"])
def test_more_tensors_than_a_launch_takes_and_every_size(backend, name):
    shapes = [((m, n), 1, 1, "lr") for m, n in zip(range(1, 52), [(7 * i) % 40 + 1 for i in range(51)], strict=True)]
    precond.compare(backend, F32, F32, RULES[name], shapes=shapes)
    assert [item.grid_x for item in backend.driver.log] == [24, 24, 3]


def test_large_tiles_go_to_torch(backend):
    """Beyond 64, and where shared memory has no room."""
    shapes = [((70, 90), 1, 1, "lr"), ((9, 30), 1, 2, "lr")]
    precond.compare(backend, F32, F32, RULES["adam"], shapes=shapes)
    assert [item.grid_x for item in backend.driver.log] == [2]
    backend._shared[0] = plan.shared_bytes(33, 8)
    backend.driver.log.clear()
    precond.compare(backend, F64, F64, RULES["adam"], shapes=[((33, 7), 1, 1, "lr"), ((34, 7), 1, 1, "lr")])
    assert [item.grid_x for item in backend.driver.log] == [1]


@ALL
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_bad_gradients_stay_in_their_tiles(backend, rule, dtype):
    precond.bad_tiles(backend, dtype, rule)


def test_bad_roots_cost_a_step(backend):
    precond.bad_steps(backend)


@ALL
def test_two_phases_are_one(backend, rule):
    precond.two_phases(backend, F32, rule)


@pytest.mark.parametrize("name", ["adam", "sgd", "soap"])
def test_zero_gradients(backend, name):
    precond.zeros(backend, F32, RULES[name])


@pytest.mark.parametrize("name", ["adam", "soap"])
def test_no_eps(backend, name):
    precond.without_eps(backend, F32, RULES[name])


def test_lengths_of_grafted_steps(backend):
    precond.fixed_length(backend)


def test_rate_and_count_on_the_device_and_on_the_host(backend, monkeypatch):
    shapes = precond.SHAPES[2:6] + precond.SHAPES[-3:]
    given, layout = precond.tensors(F32, F32, RULES["adam"], shapes=shapes)
    number, _ = precond.run(backend, given, layout, RULES["adam"], lr=2.0**-7)
    for dtype in (F32, F64):
        tensor, _ = precond.run(backend, given, layout, RULES["adam"], lr=torch.tensor(2.0**-7, dtype=dtype))
        assert all(map(torch.equal, number.params, tensor.params))
    monkeypatch.setattr(plan, "scalar", lambda x, device: (float(x), 0))
    host, _ = precond.run(backend, given, layout, RULES["adam"], lr=2.0**-7)
    assert all(map(torch.equal, number.params, host.params))


def test_the_count_of_bad_tiles_has_64_bits(backend):
    given, layout = precond.tensors(F32, F32, RULES["adam"], shapes=precond.SHAPES[2:3])
    given.grads[0].fill_(torch.nan)
    skipped = torch.tensor(2**32 - 1)
    backend.step(given, layout, 1e-2, RULES["adam"], precond.GRAMS | precond.APPLY, skipped)
    assert skipped == 2**32


class Forbidding(TorchDispatchMode):
    """Raises where a number of a tensor goes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back to the host"
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back(backend):
    given, layout = precond.tensors(F32, F32, RULES["soap"], shapes=precond.SHAPES[2:])
    skipped, lr = torch.tensor(0), torch.tensor(0.01)
    with Forbidding():
        backend.step(given, layout, lr, RULES["soap"], precond.GRAMS | precond.APPLY, skipped)
        x = torch.randn(2, 5, 70)
        backend.newton_schulz(x, 2, 3.0, -4.0, 2.0, 1e-7, x)
        backend.newton_schulz(x[:, :, :9].contiguous(), 2, 3.0, -4.0, 2.0, 1e-7, x[:, :, :9].clone())
        for n in (5, 70):
            a, info = torch.eye(n).repeat(2, 1, 1), torch.zeros(2, dtype=torch.int32)
            backend.newton_inv_root(a, 2, 1e-3, 3, 1e-4, torch.empty_like(a), info)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_newton_schulz(backend, dtype):
    sizes = ((1, 1, 1), (3, 5, 9), (2, 9, 5), (1, 64, 64), (2, 33, 17), (1, 16, 70))
    for batch, m, n in sizes:
        precond.newton_schulz(backend, batch, m, n, dtype)
    assert len(backend.driver.log) == len(sizes) - 1


def test_newton_schulz_of_odd_matrices(backend):
    precond.odd_matrices(backend)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_newton_inv_root(backend, dtype, p):
    sizes = ((1, 1, 1), (3, 5, 5), (2, 9, 3), (1, 33, 40)) + (((1, 64, 20), (1, 70, 70)) if dtype is F32 else ())
    for batch, n, rank in sizes:
        precond.newton_inv_root(backend, batch, n, rank, p, dtype)
    assert len(backend.driver.log) == len(sizes) - (dtype is F32)


def test_newton_inv_root_of_odd_matrices(backend):
    precond.odd_roots(backend)


def test_members_of_the_structs():
    """The planner packs what cuda.cu reads: members of the same types in the same order."""
    text, code = _cuda_driver.device_code("precond"), {"u64": "Q", "i64": "q", "double": "d", "int": "i"}
    for name, packed in (
        ("PrecondTensor", plan._TENSOR),
        ("PrecondStep", plan._STEP),
        ("NewtonSchulz", plan._ITERATION),
        ("NewtonRoot", plan._ROOT),
    ):
        body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL).group(1))
        groups = re.findall(r"(u64|i64|double|int) ([^;]+);", body)
        want = "".join(code[kind] * len(found.split(",")) for kind, found in groups)
        got = "".join(x * int(n or 1) for n, x in re.findall(r"(\d*)([Qqdi])", packed.format))
        assert got == want
    assert f"tensor[{plan.TENSORS}]" in text
    assert plan._STEP.size + plan.TENSORS * plan._TENSOR.size <= 4096  # what parameters may take
    assert plan._STEP.size % 8 == plan._TENSOR.size % 8 == 0


MUTATIONS = {
    "none": ("", ""),
    "factors": ("  __syncthreads();  // the factors have been read\n", ""),
    "product": ("  __syncthreads();  // and the product can be\n", ""),
    "sums": ("  __syncthreads();\n  T sum = board[0];", "  T sum = board[0];"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_missing_barriers_show(build_standin, standin_driver, name):
    """One of six orders of threads finds it; with all barriers none finds anything."""
    old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert not old or text.count(old) == 1
        return text.replace(old, new) if old else text

    before = "#define SECANT_PRECOND_STEPS(X) X(f32_f32, float, float)\n#define SECANT_PRECOND_ITERATIONS(X)"
    library = build_standin("precond", TABLE, edit, before)
    given, layout = precond.tensors(F32, F32, RULES["soap"], shapes=precond.SHAPES[6:7])
    want, _ = precond.run(precond.reference, precond.widened(given), layout, RULES["soap"])
    found = []
    for seed in range(6):
        on = plan.Launcher(standin_driver(library, SMALL, seed))
        found.append(precond.run(on, given, layout, RULES["soap"])[0].params[0])
    assert all((x - want.params[0]).abs().max() <= 1e-4 for x in found) == (not old)


@pytest.mark.slow
def test_address_sanitizer():
    under_address_sanitizer(
        __file__,
        [
            "test_bad_roots_cost_a_step",
            "test_newton_schulz_of_odd_matrices",
            "test_newton_inv_root_of_odd_matrices",
            "test_a_step_is_that_of_the_reference[soap]",
        ],
    )
