"""A pytest plugin of `make gpu`: a part of the tests, in an order that a run cut short has seen something of all.

SECANT_TEST_PART="i/k" keeps every test whose name falls into part i of k. What has not begun at SECANT_TEST_DEADLINE
(seconds since the epoch) is skipped, and says so, so that the results of the others are written.
"""

from __future__ import annotations

import os
import time
import zlib

import pytest

OUT_OF_TIME = "out of time: run STAGE=test again, which finds what was compiled"


def number(name: str) -> int:
    """Number a name, the same on every machine; neighbours lie far apart."""
    return zlib.crc32(name.encode())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this process's part, shuffled."""
    part, parts = (int(x) for x in os.environ.get("SECANT_TEST_PART", "0/1").split("/"))
    left = [item for item in items if number(item.nodeid) % parts != part]
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = sorted((item for item in items if number(item.nodeid) % parts == part), key=lambda x: number(x.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what there is no time for."""
    if time.time() > float(os.environ.get("SECANT_TEST_DEADLINE", "inf")):
        pytest.skip(OUT_OF_TIME)
