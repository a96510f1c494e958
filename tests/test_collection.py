"""Every test is found by who calls pytest without a path."""

from fnmatch import fnmatch
from pathlib import Path


def test_no_folder_of_tests_is_passed_over(request):
    """By default pytest passes over folders with the names of products, such as "build"."""
    patterns = request.config.getini("norecursedirs")
    folders = [path for path in Path(__file__).parent.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) > 10
    assert [path.name for path in folders if any(fnmatch(path.name, pattern) for pattern in patterns)] == []
