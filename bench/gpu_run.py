"""The run of `make gpu`: what was asked for, the time that each stage has left, and commands that end in it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "test", "bench", "profile")
FAMILIES = ("lbfgs", "blocks", "hvp", "precond", "search")
#: The benchmark of a family of kernels that has another name than they.
BENCHMARKS = {"search": "batched"}
#: Backends that the benchmark of a family leaves out: NVRTC compiles what `cuda` has compiled, and Triton's kernels for
#: every size of a block take longer to compile than all else takes.
WITHOUT = dict.fromkeys(FAMILIES, ("nvrtc",)) | dict.fromkeys(("blocks", "precond"), ("nvrtc", "triton"))
#: Seconds that a stage may take, its commands together; nine minutes in all, which fewer stages share.
LIMITS = {"build": 120, "test": 170, "bench": 200, "profile": 50}


class Outcome(NamedTuple):
    """How a command of a stage ended: status 0, another exit status, or "time" when it was stopped."""

    command: str
    status: int | str
    seconds: float

    @property
    def good(self) -> bool:
        """Say whether it succeeded."""
        return self.status == 0


class Run(NamedTuple):
    """What was asked for."""

    out: Path
    stages: tuple[str, ...]
    families: tuple[str, ...]
    device: str
    quick: bool
    deadlines: dict[str, float]
    budget: float = float(sum(LIMITS.values()))

    def left(self, stage: str) -> float:
        """Return the seconds that a stage has left; they run from when it is first asked."""
        now = time.perf_counter()
        scale = self.budget / sum(LIMITS[each] for each in self.stages)
        return self.deadlines.setdefault(stage, now + scale * LIMITS[stage]) - now

    def call(
        self, stage: str, *command: str, log: str, env: dict[str, str] | None = None, share: float = 1.0
    ) -> Outcome:
        """Run a command to its end or to that of its stage, or of a share of what is left; its output goes to a log."""
        [found] = self.together(stage, {log: command}, env=env, share=share)
        return found

    def together(
        self,
        stage: str,
        commands: dict[str, Sequence[str]],
        *,
        env: dict[str, str] | None = None,
        each: dict[str, dict[str, str]] | None = None,
        share: float = 1.0,
    ) -> list[Outcome]:
        """Run commands side by side, by the name of their log; `each`: what is added to the environment of one."""
        start = time.perf_counter()
        deadline = start + max(1.0, share * self.left(stage))
        running: dict[str, subprocess.Popen[bytes] | None] = {}
        for log, command in commands.items():
            with (self.out / log).open("a") as file:
                added = {**(env or {}), **(each or {}).get(log, {})}
                try:
                    running[log] = subprocess.Popen(
                        command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **added}
                    )
                except OSError as error:
                    file.write(f"{error}\n")
                    running[log] = None
        found = []
        for log, process in running.items():
            status: int | str = 127
            if process is not None:
                try:
                    status = process.wait(max(0.1, deadline - time.perf_counter()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    status = "time"
            command = commands[log]
            name = " ".join((Path(command[0]).name, *command[1:]))
            found.append(Outcome(name, status, time.perf_counter() - start))
        return found
