"""Muon against torch's and against its formulas, on gradients that do not depend on where it is."""

import math

import pytest
import torch

from secant.optim import Muon

SHAPES = [(16, 8), (8, 24), (5, 5), (4, 2, 3, 3)]


def gradients(dtype, shapes=SHAPES, steps=50):
    gen = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes] for _ in range(steps)
    ]


def run(make, given, start=None):
    """Where an optimizer leads from ones, with these gradients."""
    params = [torch.ones_like(g).requires_grad_() for g in given[0]]
    optimizer = make(params)
    for grads in given:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_take_the_steps_of_torch(monkeypatch, nesterov, adjust):
    """In float64, and torch kept from rounding to bfloat16.

    A step of the iteration multiplies a rounding by 3.4445 at most, where a singular value is small, so that five of
    them leave 3.4445^5 = 485 roundings of entries of size one, and 50 steps 50 times that, times lr.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    given = gradients(torch.float64, SHAPES[:3])
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    theirs = run(lambda params: torch.optim.Muon(params, adjust_lr_fn=adjust, **options), given)
    ours = run(lambda params: Muon(params, adjust_lr=adjust, **options), given)
    for x, y in zip(ours, theirs, strict=True):
        factor = max(1.0, 0.2 * math.sqrt(max(x.shape)), math.sqrt(x.shape[0] / x.shape[1]))
        assert (x - y).abs().max() <= 50 * 485 * 0.02 * factor * 2.0**-52


def test_float32_matrices_differ_by_the_bfloat16_of_torch():
    """2^-9 a rounding, of each of about ten operations an iteration, and independent from step to step: a percent."""
    given = gradients(torch.float32, SHAPES[:3])
    theirs = run(lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.0), given)
    ours = run(lambda params: Muon(params, lr=0.02), given)
    for x, y in zip(ours, theirs, strict=True):
        way = (y - 1.0).norm()
        assert 1e-4 * way < (x - y).norm() < 1e-2 * way


def test_convolutions_are_matrices_and_vectors_take_the_steps_of_adam():
    given = gradients(torch.float64, [(4, 2, 3, 3), (7,), ()])
    ours = run(lambda params: Muon(params, lr=0.02, weight_decay=0.1, adam_scale=0.5), given)
    flat = [[grads[0].flatten(1)] for grads in given]
    (matrix,) = run(lambda params: Muon(params, lr=0.02, weight_decay=0.1), flat)
    assert torch.equal(ours[0].flatten(1), matrix)
    adam = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.2}  # twice, since half the rate multiplies it
    theirs = run(lambda params: torch.optim.AdamW(params, **adam), [grads[1:] for grads in given])
    for x, y in zip(ours[1:], theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=50 * 8 * 2.0**-52)


def test_a_matrix_may_be_left_to_adam():
    given = gradients(torch.float64, [(6, 4), (6, 4)])

    def in_groups(params):
        return Muon([{"params": params[:1]}, {"params": params[1:], "method": "adam", "adam_scale": 1.0}], lr=0.01)

    _, ours = run(in_groups, given)
    (theirs,) = run(lambda params: torch.optim.Adam(params, lr=0.01, betas=(0.9, 0.95)), [g[1:] for g in given])
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=50 * 8 * 2.0**-52)


def test_methods_that_do_not_fit():
    vector, matrix = torch.zeros(3, requires_grad=True), torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"Muon: params\[0\]: expected a matrix in a group of method 'muon'"):
        Muon([vector], method="muon")
    optimizer = Muon([matrix])
    matrix.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.param_groups[0]["method"] = "adam"
    with pytest.raises(ValueError, match="Muon: method: expected what it was when the state"):
        optimizer.step()
    for name, value in [("ns_coefficients", (1.0, 2.0)), ("ns_steps", 0), ("adjust_lr", "none"), ("betas", (0.9, 1.0))]:
        with pytest.raises(ValueError, match=f"Muon: {name}: expected"):
            Muon([matrix], **{name: value})
