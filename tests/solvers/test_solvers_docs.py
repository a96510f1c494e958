"""The page on solvers has every name and every status. What it runs: `tests/test_docs.py`."""

from __future__ import annotations

from pathlib import Path

import secant

GUIDE = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()


def test_every_public_name_and_status_is_in_the_guide():
    for name in secant.solvers.__all__:
        assert f"`{name}" in GUIDE or f"secant.solvers.{name}" in GUIDE, name
    for status in secant.Status:
        assert f"`{status.name}`" in GUIDE
