"""Products against curvlinops, an implementation of others, on an MLP, a CNN and a small transformer."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, Transformer, cnn, data, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Hessian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")


class Tokens(nn.Module):
    """Its predictions as rows; without LayerNorm, of which torch 2.13 differentiates the forward mode wrongly.

    curvlinops takes backward over forward mode: with LayerNorm its Hessian is 1% off there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer(norm=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens).reshape(-1, 11)


def _problem(name):
    torch.manual_seed(0)
    if name == "mlp":
        return mlp(), *data()
    if name == "cnn":
        return cnn(), torch.randn(4, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    tokens = torch.randint(0, 11, (2, 5))
    return Tokens().double(), tokens, tokens.flip(1).reshape(-1)


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_products_are_those_of_curvlinops(name):
    net, x, y = _problem(name)
    params = [p for p in net.parameters() if p.requires_grad]
    loss = nn.CrossEntropyLoss()

    def samples():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y, reduction="none")

    ours = {
        "HessianLinearOperator": Hessian.of(net, loss, x, y),
        "GGNLinearOperator": GGN.of(net, loss, x, y),
        "EFLinearOperator": EmpiricalFisher(samples, params),
    }
    # Attention and convolutions: some hundreds of roundings rather than some tens.
    tolerance = ROUNDING if name == "mlp" else 20 * ROUNDING
    for peer, operator in ours.items():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            theirs = getattr(curvlinops, peer)(net, loss, params, [(x, y)], check_deterministic=False)
            v = torch.randn(operator.shape[0], dtype=torch.float64)
            want = theirs @ v
        assert error(operator @ v, torch.as_tensor(want)) < tolerance, peer
