"""The tests of the CPU kernels of each family again, with the other instruction sets that this processor has."""

from __future__ import annotations

from pathlib import Path

import pytest

from reruns import run_again
from secant import _cpu

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
FILES = [*KERNELS.glob("*/test_*_cpu.py"), KERNELS / "lbfgs/test_lbfgs_dense.py"]
BUILT = _cpu.build_config()


def test_there_is_a_file_of_every_family():
    assert {path.parent.name for path in FILES} == {"lbfgs", "blocks", "hvp", "precond", "search"}


@pytest.mark.parametrize("isa", [x for x in BUILT["isas_usable"] if x != BUILT["isa"]])
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_other_instruction_sets(file, isa):
    done = run_again("-x", str(file), SECANT_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
