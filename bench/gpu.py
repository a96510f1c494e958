"""What `make gpu` runs: build, test, measure and profile on a machine with a GPU, and write one report of it.

    python bench/gpu.py --out FOLDER [--stage build,test,bench,profile] [--family lbfgs,...] [--budget SECONDS]

Nothing is downloaded. Every stage runs in processes of its own with a time limit, whatever became of the others; the
exit status says whether all of them succeeded. The folder gets result.json, report.md, the pictures, and the logs.
`--device cpu --quick` rehearses all of it on a machine without a GPU: small inputs, no GPU tests, nothing claimed.
`--readme result.json` writes the table of a run into README.md, between its markers; `--propose-defaults result.json`
prints the entries of `secant.defaults` that follow from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_defaults import propose
from gpu_report import draw_roofline, fill_readme, report
from gpu_results import collect
from gpu_run import FAMILIES, LIMITS, ROOT, STAGES, Outcome, Run
from gpu_stages import bench, build, profile, test


def _choices(name: str, allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        found = tuple(x for x in text.split(",") if x)
        if wrong := [x for x in found if x not in allowed]:
            raise argparse.ArgumentTypeError(f"{name}: expected some of {','.join(allowed)}, got {wrong[0]!r}")
        return found or allowed

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all of them succeeded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--stage", type=_choices("stage", STAGES), default=STAGES, help=",".join(STAGES))
    parser.add_argument("--family", type=_choices("family", FAMILIES), default=FAMILIES, help=",".join(FAMILIES))
    parser.add_argument("--budget", type=float, default=sum(LIMITS.values()), help="seconds that the stages share")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--quick", action="store_true", help="small inputs, to see that it runs")
    parser.add_argument("--readme", type=Path, metavar="RESULT", help="fill the table of README.md from a result.json")
    parser.add_argument(
        "--propose-defaults", type=Path, metavar="RESULT", help="print entries of secant.defaults from a result.json"
    )
    args = parser.parse_args(arguments)
    if args.propose_defaults is not None:
        for entry in propose(json.loads(args.propose_defaults.read_text()), str(args.propose_defaults)):
            print(f"    Default({', '.join(map(json.dumps, entry)).replace('null', 'None')}),")
        return 0
    if args.readme is not None:
        fill_readme(json.loads(args.readme.read_text()), ROOT / "README.md")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.stage, args.family, args.device, args.quick, {}, args.budget)
    for log in (*args.out.glob("*.log"), *args.out.glob("tests-*.xml"), *args.out.glob("ncu.csv")):
        log.unlink()  # of an earlier run
    work = {"build": build, "test": test, "bench": bench, "profile": profile}
    outcomes: dict[str, list[Outcome]] = {}
    for stage in STAGES:
        if stage in run.stages:
            outcomes[stage] = work[stage](run)
            for one in outcomes[stage]:
                print(
                    f"{stage:8} {'ok' if one.good else one.status!s:>5} {one.seconds:6.1f} s  {one.command[:90]}",
                    flush=True,
                )
    result = collect(run, outcomes)
    (run.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (run.out / "report.md").write_text(report(result))
    try:
        draw_roofline(run.out / "roofline.png", result)
    except ImportError:
        print("No picture: matplotlib is not installed.")
    print(f"Wrote {run.out / 'report.md'} and result.json.")
    return 0 if all(one.good for found in outcomes.values() for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
