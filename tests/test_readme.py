"""What the README and the guide tell a newcomer to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from secant.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_does_what_it_says():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict[str, object] = {}
    exec(code, names)
    x = names["x"]
    assert isinstance(x, torch.Tensor)
    assert (x.detach() - 1).abs().max() < 1e-4


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"^ +make ([a-z-]+)|`make ([a-z-]+)", README, flags=re.M))
    assert {a or b for a, b in named} >= {"demo", "test", "gpu"}
    assert {a or b for a, b in named} <= targets
    commands = set(re.findall(r"python -m secant ([a-z]+)", README))
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


def test_the_links_lead_somewhere():
    for text, folder in ((README, ROOT), ((ROOT / "docs/guide.md").read_text(), ROOT / "docs")):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target
