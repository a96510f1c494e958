"""The guide's Python runs, and what it asserts holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import secant

GUIDE = (Path(__file__).parents[2] / "docs" / "glm.md").read_text()


def test_examples_of_the_guide():
    pytest.importorskip("sklearn", minversion="1.6")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)


def test_every_status_and_loss_is_in_the_guide():
    from secant.glm import arguments, fitting

    for name in (*arguments.LOSSES, *arguments.SOLVERS):
        assert f'`"{name}"`' in GUIDE
    for status in fitting._MESSAGES:
        assert f"`Status.{status.name}`" in GUIDE
    assert str(fitting._FACTOR_UP_TO) in GUIDE


def test_example_of_the_docstring():
    import torch

    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 5.0])
    result = secant.glm.fit(x, y, loss="squared")
    assert result.coef.tolist() == pytest.approx([2.0], abs=1e-5)
    assert float(result.intercept) == pytest.approx(1.0, abs=1e-5)
