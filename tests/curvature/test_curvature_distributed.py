"""Products and estimates over two processes against one process with all the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = Path(__file__).parent


def _problem():
    from curvature_problems import data, mlp

    torch.manual_seed(0)
    net = mlp()
    x, y = data(8)
    return net, x, y


def _operators(net, x, y, **options):
    from torch import nn

    from secant.curvature import GGN, EmpiricalFisher, Hessian

    def samples():
        outputs = net(x)
        return outputs, nn.functional.cross_entropy(outputs, y, reduction="none")

    loss = nn.CrossEntropyLoss()
    return {
        "Hessian": Hessian.of(net, loss, x, y, **options),
        "double backward": Hessian.of(net, loss, x, y, mode="double-backward", **options),
        "GGN": GGN.of(net, loss, x, y, **options),
        "EmpiricalFisher": EmpiricalFisher(samples, net.parameters(), **options),
    }


def _point(net, x, y):
    from torch import nn

    from secant.curvature import EvaluatedPoint

    def closure():
        outputs = net(x)
        return outputs, nn.functional.cross_entropy(outputs, y)

    return EvaluatedPoint(closure, net.parameters(), "outputs")


def _run(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    net, x, y = _problem()
    half = slice(4 * rank, 4 * rank + 4)
    found = {}
    for name, operator in _operators(net, x[half], y[half]).items():
        v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
        found[name] = operator @ v, operator.trace(20).value, operator.eigs(2).values
    local = _operators(net, x[half], y[half], process_group=None)["Hessian"]
    found["local"] = local @ torch.linspace(-1, 1, local.shape[0], dtype=torch.float64)
    point = _point(net, x[half], y[half])
    v = torch.linspace(-1, 1, point.params.n, dtype=torch.float64)
    found["point"] = point.value, point.gradient(), point.hessian() @ v
    found["rows"] = point.jacobian().to_dense()
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_product_of_all_data(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import test_curvature_distributed as t; "
    processes = [
        subprocess.Popen([sys.executable, "-c", f"{code}t._run({rank}, {str(tmp_path)!r})"]) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    net, x, y = _problem()
    for name, operator in _operators(net, x, y).items():
        v = torch.linspace(-1, 1, operator.shape[0], dtype=torch.float64)
        product, trace, values = first[name]
        want = operator @ v
        assert (product - want).abs().max() < 1e-13 * want.abs().max(), name  # sums of 8 rows, in another order
        assert abs(trace - operator.trace(20).value) < 1e-12 * abs(trace)
        assert (values - operator.eigs(2).values).abs().max() < 1e-8
        for mine, theirs in zip(first[name], second[name], strict=True):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))  # bit for bit
    point = _point(net, x, y)
    v = torch.linspace(-1, 1, point.params.n, dtype=torch.float64)
    for mine, theirs, want in zip(
        first["point"], second["point"], (point.value, point.gradient(), point.hessian() @ v), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert (mine - want).abs().max() < 1e-13 * want.abs().max()
    rows = torch.cat([first["rows"], second["rows"]])  # each has those of its own data
    assert (rows - point.jacobian().to_dense()).abs().max() < 1e-13 * rows.abs().max()
    mean = (first["local"] + second["local"]) / 2
    assert (mean - first["Hessian"][0]).abs().max() < 1e-13
    assert (first["local"] - second["local"]).abs().max() > 1e-3
