"""Command line: `python -m secant info | demo | spectrum | bench`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from secant.benchmarks.families import LONG, Choice
from secant.benchmarks.families import NAMES as FAMILIES

#: What a command imports beyond torch: module -> package, in the order in which it is asked for.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise argparse.ArgumentTypeError(f"there is no device {text} here (torch sees {count} GPUs)")
    torch.cuda.set_device(index)  # streams, events and graphs belong to the current device
    return torch.device("cuda", index)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing directory, got {text!r}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m secant", description="Second-order information for PyTorch.")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="{info,demo,spectrum,bench}")

    info = commands.add_parser("info", help="version, build configuration, and which backends can run here and why not")
    info.add_argument("--json", action="store_true", help="print JSON")

    demo = commands.add_parser(
        "demo", help="train on real data against torch.optim.LBFGS and draw the result, in a minute"
    )
    demo.add_argument("--output", type=_file, default=Path("secant-demo.png"), metavar="FILE", help="the picture (PNG)")

    spectrum = commands.add_parser(
        "spectrum", help="eigenvalues of the Hessian and the GGN of the demo's network, before and after training"
    )
    spectrum.add_argument("--json", type=_file, metavar="FILE", help="write the results as JSON")
    spectrum.add_argument(
        "--plot", type=_file, default=Path("secant-spectrum.png"), metavar="FILE", help="the picture (PNG)"
    )

    bench = commands.add_parser(
        "bench", help="time the kernels against every peer and check the bars, in a few minutes"
    )
    bench.add_argument(
        "--family",
        choices=FAMILIES,
        help=f"one family of cases (default: all but {', '.join(LONG)}, which takes an hour)",
    )
    bench.add_argument("--full", action="store_true", help="every size, which takes several times as long")
    bench.add_argument(
        "--seconds",
        "--budget",
        type=float,
        default=float("inf"),
        metavar="N",
        help="begin no further case, or run of training, after so long",
    )
    bench.add_argument(
        "--without", nargs="+", default=(), metavar="NAME", help="leave contenders out, by their names in the tables"
    )
    chosen = bench.add_argument_group("of training")
    chosen.add_argument(
        "--tasks", nargs="+", default=(), metavar="TASK", help="some of the tasks, by their short names"
    )
    chosen.add_argument(
        "--optimizers", nargs="+", default=(), metavar="NAME", help='by their names in the tables, as "torch Muon"'
    )
    chosen.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="starts of each task (default: 3, of cartpole 5)"
    )
    chosen.add_argument("--runs", type=_file, metavar="FILE", help="keep finished runs there, and do not repeat them")
    bench.add_argument("--json", type=_file, metavar="FILE", help="write the results as JSON")
    bench.add_argument("--plot", type=_file, metavar="FILE", help="draw the results (PNG)")

    for command in (demo, spectrum, bench):
        command.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
        command.add_argument("--quick", action="store_true", help="small inputs and few repeats, to see that it runs")
    return parser


def _missing(command: str, modules: Sequence[str], extra: str) -> str | None:
    """Say what to do when a command needs packages that are not installed."""
    absent = [PACKAGES[name] for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f'{command} needs {", ".join(absent)}; install with: pip install "secant[{extra}]"'


def _choice(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Choice:
    """Make the choice of a call; what is chosen of another family, or has no such name, is a wrong argument."""
    if args.seeds < 0:
        parser.error(f"argument --seeds: expected at least 1, got {args.seeds}")
    if not (args.tasks or args.optimizers or args.seeds or args.runs):
        return Choice()
    if args.family != "training":
        parser.error("--tasks, --optimizers, --seeds and --runs are of --family training")
    from secant.benchmarks.families.training import CHOICES
    from secant.benchmarks.training_optimizers import every_name

    for option, given, names in (("tasks", args.tasks, CHOICES), ("optimizers", args.optimizers, every_name())):
        for name in given:
            if name not in names:
                parser.error(f"argument --{option}: expected some of {', '.join(names)}, got {name!r}")
    return Choice(tuple(args.tasks), tuple(args.optimizers), args.seeds, args.runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its arguments; None: those of the process.

    Returns:
        The exit status: 0, or 1 when a package is missing. Wrong arguments exit with 2.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "info":
        from secant.cli import info

        return info.run(as_json=args.json)
    choice = _choice(parser, args) if args.command == "bench" else Choice()
    needs, extra = (
        (("matplotlib",) if args.plot else (), "bench") if args.command == "bench" else (tuple(PACKAGES), "demo")
    )
    complaint = _missing(args.command, needs, extra)
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 1
    if args.command == "demo":
        from secant.cli import demo

        demo.run(args.device, args.output, quick=args.quick)
    elif args.command == "spectrum":
        from secant.cli import spectrum

        spectrum.run(args.device, plot_path=args.plot, json_path=args.json, quick=args.quick)
    else:
        from secant.cli import bench

        families = (args.family,) if args.family else [name for name in FAMILIES if args.quick or name not in LONG]
        bench.run(
            args.device,
            json_path=args.json,
            plot_path=args.plot,
            quick=args.quick,
            families=families,
            full=args.full,
            seconds=args.seconds,
            choice=choice,
            without=args.without,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
