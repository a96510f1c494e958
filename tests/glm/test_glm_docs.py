"""The page on linear models has every option and every answer. What it runs: `tests/test_docs.py`."""

from __future__ import annotations

from pathlib import Path

GUIDE = (Path(__file__).parents[2] / "docs" / "glm.md").read_text()


def test_every_status_and_loss_is_in_the_guide():
    from secant.glm import arguments, fitting

    for name in (*arguments.LOSSES, *arguments.SOLVERS):
        assert f'`"{name}"`' in GUIDE
    for status in fitting._MESSAGES:
        assert f"`Status.{status.name}`" in GUIDE
    assert str(fitting._FACTOR_UP_TO) in GUIDE
