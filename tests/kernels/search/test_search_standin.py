"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h: every kernel with the bits of the reference."""

from __future__ import annotations

import re

import pytest
import torch
from secant.kernels import _cuda_driver
from secant.kernels.search import contract, plan

import search_cases as search
from reruns import under_address_sanitizer
from search_cases import F32, F64

TABLE = """
#define SECANT_ROWS(TAG, S) SECANT_SEARCH_TABLE(SECANT_STANDIN_ROW, TAG)
#define SECANT_STANDIN_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
static const secant_standin::Kernel kKernels[] = {SECANT_SEARCH_TYPES(SECANT_ROWS)};
SECANT_STANDIN_EXPORT(kKernels)
"""
SMALL = _cuda_driver.Device(multiprocessors=3, shared=101_376)
DTYPES = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("search", TABLE)


@pytest.fixture
def backend(library, standin_driver):
    return plan.Launcher(standin_driver(library, SMALL, 1))


@DTYPES
@pytest.mark.parametrize("seed", range(3))
def test_a_call_is_that_of_the_reference(backend, dtype, seed):
    rule = search.RULE._replace(ftol=0.1 * (seed % 2))
    search.advance(backend, 2000, 3, dtype, seed=seed, rule=rule)
    search.begin(backend, 2000, 3, dtype, seed=seed, rule=rule, first=seed % 2 == 0)
    tag = plan.NAMES[dtype]
    assert [item.kernel for item in backend.driver.log] == [f"search_advance_{tag}", f"search_begin_{tag}"]
    assert {item.grid_x for item in backend.driver.log} == {-(-2000 * 4 // 128)}


def test_steps_are_those_of_the_generator(backend):
    search.steps_of_the_generator(backend, search.SETTINGS[::5])
    search.random_lines(backend, 60)


def test_every_size(backend):
    search.sizes(backend)
    assert {item.kernel for item in backend.driver.log} == set(plan.kernels())


def test_rows(backend):
    search.some_rows(backend)
    backend.driver.log.clear()
    search.advance(backend, 5, 2, F64, rows=torch.empty(0, dtype=torch.int64))
    assert backend.driver.log == []


def test_statuses(backend):
    search.limits(backend)


def test_long_slopes(backend):
    search.long_slopes(backend)


def test_neighbours_change_no_bit(backend):
    search.neighbours(backend)


@DTYPES
def test_the_order_of_threads_does_not_matter(library, standin_driver, dtype):
    """What one thread of a problem writes no other one still has to read."""
    for seed in range(6):
        on = plan.Launcher(standin_driver(library, SMALL, seed))
        search.advance(on, 300, 21, dtype, seed=seed)
        search.begin(on, 300, 21, dtype, seed=seed)


def test_lanes():
    assert [plan.lanes_of(n) for n in (1, 16, 17, 64, 65, 10**6)] == [4, 4, 8, 8, 32, 32]


def test_members_of_the_struct():
    """The planner packs what cuda.cu reads: members of the same types in the same order."""
    text, code = _cuda_driver.device_code("search"), {"u64": "Q", "i64": "q", "double": "d", "int": "i"}
    body = re.sub(r"//[^\n]*", "", re.search(r"struct SearchCall {(.*?)\n};", text, re.DOTALL).group(1))
    groups = re.findall(r"(u64|i64|double|int) ([^;]+);", body)
    want = "".join(code[kind] * len(found.split(",")) for kind, found in groups)
    assert "".join(x * int(n or 1) for n, x in re.findall(r"(\d*)([Qqdi])", plan._CALL.format)) == want
    members = [name.strip() for _, found in groups for name in found.split(",")]
    assert tuple(members[: len(contract.Search._fields)]) == contract.Search._fields


@pytest.mark.parametrize("path", ["cuda.cu", "cpu.cpp"])
def test_numbers_are_those_of_the_contract(path):
    text = (_cuda_driver.KERNELS / "search" / path).read_text()
    assert f"kMaxBlind = {contract.MAX_BLIND};" in text
    found = {}
    for body in re.findall(r"enum {(.*?)};", text):
        following = 0
        for item in body.split(","):
            name, _, given = item.partition("=")
            following = int(given) if given else following
            found[name.strip()] = following
            following += 1
    names = {"VALUE": 0} | {k: getattr(contract, k) for k in ("SLOPE", "T", "LAST", "LOW", "HIGH", "FRACTION", "SIZE")}
    names |= {k: getattr(contract, k) for k in ("NOISE", "KEPT_T", "KEPT_VALUE", *map(str.upper, contract.COUNTS))}
    names |= {k: getattr(contract, k) for k in ("ZOOMS", "NEAR_END", "LOW_IS_FIRST", "ENDED", "RUNNING", "CONVERGED")}
    names |= {k: getattr(contract, k) for k in ("SMALL_CHANGE", "MAX_ITER", "MAX_EVAL", "STALLED", "NO_DESCENT")}
    for name, number in names.items():
        assert found["k" + "".join(word.capitalize() for word in name.split("_"))] == number, name


MUTATIONS = {
    "none": ("", ""),
    "slope": ("slope += __shfl_xor_sync(kAll, slope, o);", "(void)o;"),
    "step": (
        "  t = __shfl_sync(kAll, t, s.leader);\n\n  if (code == kNothing) return;\n  S* const x",
        "\n  if (code == kNothing) return;\n  S* const x",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_missing_exchanges_show(build_standin, standin_driver, name):
    old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert not old or text.count(old) == 1
        return text.replace(old, new) if old else text

    library = build_standin("search", TABLE, edit, "#define SECANT_SEARCH_TYPES(X) X(f64, double)")
    on = plan.Launcher(standin_driver(library, SMALL, 3))
    if not old:
        search.advance(on, 300, 21, F64)
        return
    with pytest.raises(AssertionError):
        search.advance(on, 300, 21, F64)


@pytest.mark.slow
def test_address_sanitizer():
    under_address_sanitizer(__file__, ["test_rows", "test_every_size"])
