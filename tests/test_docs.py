"""What README, the guides and the docstrings tell a newcomer to type exists, runs, and gives what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import secant
from secant.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "bench/results/README.md")),
              *sorted((ROOT / "kernels").glob("*/README.md"))]  # fmt: skip


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(page: Path) -> dict[str, object]:
    """Execute the Python of a page from top to bottom, as one program, and return its names."""
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page), 1):
        if "sklearn" in block:
            pytest.importorskip("sklearn", minversion="1.6")
        for trainer in ("lightning", "transformers"):
            if f"import {trainer}" in block:
                pytest.importorskip(trainer)
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run(page)
    if page.stem == "README":
        x, net = names["x"], names["net"]
        assert isinstance(x, torch.Tensor)
        assert isinstance(net, torch.nn.Module)
        assert (net(x) - torch.exp(-x)).abs().max() < 1e-6


def test_pages_with_python():
    expected = {"README", "choosing", "glm", "guide", "minimize", "solvers"}
    assert {page.stem for page in PAGES if blocks(page)} >= expected


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"^ +make ([a-z-]+)|`make ([a-z-]+)", README, flags=re.M))
    assert {a or b for a, b in named} >= {"demo", "test", "gpu"}
    assert {a or b for a, b in named} <= targets
    commands = {
        command for page in EVERY_PAGE for command in re.findall(r"python -m secant ([a-z]+)", page.read_text())
    }
    assert commands >= {"bench", "info", "spectrum"}
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def find_examples() -> dict[str, int]:
    """Count the examples in the text of each module of the package that has some."""
    found = {}
    for module in pkgutil.walk_packages(secant.__path__, "secant."):
        path = Path(module.module_finder.find_spec(module.name).origin)
        count = path.read_text().count(">>> ") if path.suffix == ".py" else 0
        if count:
            found[module.name] = count
    return found


EXAMPLES = find_examples()


def test_the_search_for_examples_finds_them():
    assert EXAMPLES.keys() >= {"secant.glm.fitting", "secant.ops.blocks", "secant.result"}


@pytest.mark.parametrize(
    ("name", "count"),
    sorted(EXAMPLES.items()),
)
def test_the_examples_of_docstrings_give_what_they_say(name, count):
    if name == "secant.sklearn":
        pytest.importorskip("sklearn", minversion="1.6")
    torch.manual_seed(0)
    done = doctest.testmod(
        importlib.import_module(name),
        globs={"secant": secant, "torch": torch},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert done.failed == 0
    assert done.attempted == count  # or some are where doctest does not look


def test_docstrings_of_functions_begin_with_a_verb():
    """They say what a function does. These are the words with which one says what something is."""
    nouns = {"A", "An", "How", "It", "Of", "That", "The", "What", "Where", "Whether", "Which", "Who", "Why"}
    files = [*(ROOT / "pysrc").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    looked_at, found = 0, []
    for path in files:
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            text = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if text:
                looked_at += 1
                if re.split(r"\W", text, maxsplit=1)[0] in nouns:
                    found.append(f"{place}:{node.lineno} {text.splitlines()[0]}")
    assert looked_at > 400
    assert not found, "\n".join(found)
