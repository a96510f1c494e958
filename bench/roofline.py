"""Draw the roofline of recorded results: python bench/roofline.py PICTURE RESULT.json...

The files are of one machine, written by `python -m secant bench --json`. The roofs are what these runs measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from secant.benchmarks import machine, roofline


def main(picture: Path, files: list[Path]) -> None:
    """Draw the points of all files under the best of their roofs."""
    results = [json.loads(path.read_text()) for path in files]
    rates: dict[str, float] = {}
    for data in results:
        bandwidths = [("bandwidth", family["bandwidth"]) for family in data["families"].values() if family["bandwidth"]]
        for key, value in [*bandwidths, *data.get("rates", {}).items()]:
            rates[key] = max(value, rates.get(key, 0.0))
    rows = [row for data in results for row in roofline.rows_of(data)]
    about = machine.summary(results[0]["machine"])
    roofline.save(picture, roofline.dots(rows), rates, "Operations and bytes of every kernel", about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of `python -m secant bench`, of one machine")
    given = parser.parse_args()
    main(given.picture, given.results)
