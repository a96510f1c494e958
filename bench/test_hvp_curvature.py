"""pytest-benchmark over Hessian products of an MLP 64-256-256-10: secant, eager PyTorch and `torch.compile`.

    pytest bench/test_hvp_curvature.py --benchmark-group-by=group --benchmark-sort=fullname

All contenders make the product with the same vector; each is checked against float64 before it is timed. What
pytest-benchmark measures one after the other is also taken in turns first, and the ratios in `extra_info` are of those
turns. SECANT_BENCH_DEVICE=cuda runs it on a GPU, with large batches too; SECANT_BENCH_QUICK=1 leaves out compiling.

The bars for a batch of 512, in float32 on two cores: at least as fast as compiled jvp(grad), 1.5 times as fast as eager
double backward on a kept graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from secant.benchmarks.timing import Timed, clock_for, interleaved
from secant.curvature import GGN, Hessian

DEVICE = torch.device(os.environ.get("SECANT_BENCH_DEVICE", "cpu"))
QUICK = os.environ.get("SECANT_BENCH_QUICK", "0") == "1"
SECONDS = 0.05 if QUICK else 4.0
BATCHES = (512,) if DEVICE.type == "cpu" else (512, 10_000, 100_000)
OURS = ("secant", "secant GGN")
NAMES = (*OURS, "double backward", "jvp(grad)", *(() if QUICK else ("compiled jvp(grad)",)))


class Problem:
    """The network at a point, a vector, and one product per contender."""

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)).to(
            DEVICE
        )
        self.x = torch.randn(batch, 64, device=DEVICE)
        self.y = torch.randint(0, 10, (batch,), device=DEVICE)
        self.params = list(self.net.parameters())
        self.v = torch.randn(sum(p.numel() for p in self.params), device=DEVICE)

    def loss(self) -> Tensor:
        """Mean cross-entropy."""
        return nn.functional.cross_entropy(self.net(self.x), self.y)

    def exact(self) -> Tensor:
        """H v in float64."""
        net = nn.Sequential(
            *(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in self.net)
        )
        net.to(DEVICE).double().load_state_dict(self.net.state_dict())
        return Hessian.of(net, nn.CrossEntropyLoss(), self.x.double(), self.y, mode="double-backward") @ self.v.double()

    def products(self) -> dict[str, Callable[[], Tensor]]:
        """By name; each with its state prepared, as a user would who multiplies many times at one point."""
        H = Hessian(self.loss, self.params)
        G = GGN.of(self.net, nn.CrossEntropyLoss(), self.x, self.y)
        parts = H.unflatten(self.v)
        grads = torch.autograd.grad(self.loss(), self.params, create_graph=True)
        names = [name for name, _ in self.net.named_parameters()]
        point = dict(zip(names, (p.detach() for p in self.params), strict=True))
        direction = dict(zip(names, parts, strict=True))

        def loss(p: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self.net, p, (self.x,)), self.y)

        def forward_over_reverse(p: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
            return jvp(grad(loss), (p,), (t,))[1]

        compiled = torch.compile(forward_over_reverse)
        found: dict[str, Callable[[], Tensor]] = {
            "secant": lambda: H @ self.v,
            "secant GGN": lambda: G @ self.v,
            "double backward": lambda: torch.autograd.grad(grads, self.params, parts, retain_graph=True),
            "jvp(grad)": lambda: forward_over_reverse(point, direction),
            "compiled jvp(grad)": lambda: compiled(point, direction),
        }
        return {name: found[name] for name in NAMES}


def _flat(result: object) -> Tensor:
    if isinstance(result, Tensor):
        return result
    parts = result.values() if isinstance(result, dict) else result
    return torch.cat([part.reshape(-1) for part in parts])


class Group:
    """The products of one batch, checked, and their times in turns."""

    def __init__(self, batch: int) -> None:
        problem = Problem(batch)
        self.calls = problem.products()
        want = problem.exact()
        self.errors = {
            name: float((_flat(call()).double() - want).norm() / want.norm())
            for name, call in self.calls.items()
            if name != "secant GGN"
        }
        timed = {name: Timed([call]) for name, call in self.calls.items()}
        self.timings = interleaved(timed, clock_for(DEVICE), seconds=SECONDS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_mlp_product(benchmark, group_of, to_the_end, batch, name):
    group = group_of(batch)
    # Products of a few hundred terms each, through three layers: a wrong answer has no speed.
    assert group.errors.get(name, 0.0) < 100 * torch.finfo(torch.float32).eps
    benchmark.group = f"Hessian product, MLP 64-256-256-10, batch {batch:,}"
    benchmark.pedantic(to_the_end(group.calls[name], DEVICE), rounds=3 if QUICK else 50, warmup_rounds=3)
    ours = group.timings["secant"]
    benchmark.extra_info.update(
        milliseconds_in_turns=group.timings[name].median * 1e3,
        best_milliseconds_in_turns=group.timings[name].best * 1e3,
        times_secant=group.timings[name].median / ours.median,
        times_secant_best=group.timings[name].best / ours.best,
        error=group.errors.get(name),
    )
