"""Draw the roofline of recorded results: python bench/roofline.py PICTURE RESULT.json...

The files are of one machine, written by `python -m secant bench --json`. The roofs are what these runs measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from secant.benchmarks import machine, roofline


def main(picture: Path, files: list[Path]) -> None:
    """Draw the points of all files under the best of their roofs."""
    results = [json.loads(path.read_text()) for path in files]
    rates: dict[str, float] = {}
    for data in results:
        bandwidths = [data["machine"].get("bandwidth"), data.get("hvp", {}).get("bandwidth")]
        measured = [("bandwidth", x) for x in bandwidths if x is not None] + list(data.get("rates", {}).items())
        for key, value in measured:
            rates[key] = max(value, rates.get(key, 0.0))
    rows = [row for data in results for row in roofline.rows_of(data)]
    about = machine.summary(results[0]["machine"])
    roofline.save(picture, roofline.points(rows), rates, "Operations and bytes of every kernel", about)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(x) for x in sys.argv[2:]])
