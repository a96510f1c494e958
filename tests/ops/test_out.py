"""Arguments that are written follow the rules of torch's own `out=`, but that none is resized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import secant
from secant.ops import _gate, block_inv, block_solve, glm_hvp, gram, paired_matmul, two_loop

torch.manual_seed(0)
grad, s = torch.randn(6), torch.randn(3, 6)
a, b = torch.randn(4, 3, 3) + 4 * torch.eye(3), torch.randn(4, 3)
x, v, weight = torch.randn(8, 5), torch.randn(5, 2), torch.rand(8)


def direction(out: Tensor) -> Tensor:
    return history().direction(grad, out=out)


def step_direction(out: Tensor) -> Tensor:
    history().step(grad, torch.zeros(6), out, 1.0)
    return out


def step_gradient(out: Tensor) -> Tensor:
    history().step(grad, out, torch.ones(6), 1.0)
    return out


def history() -> secant.LBFGSHistory:
    h = secant.LBFGSHistory(6, 3)
    for row in s:
        h.append(row, 2 * row)
    return h


# name -> (op with out=, shape of out, whether out may be strided)
OPS = {
    "two_loop": (lambda out: two_loop(grad, s, 2 * s, out=out), (6,), True),
    "block_inv": (lambda out: block_inv(a, assume="general", out=out)[0], (4, 3, 3), True),
    "block_solve": (lambda out: block_solve(a, b, assume="general", out=out)[0], (4, 3), True),
    "glm_hvp": (lambda out: glm_hvp(x, v, weight, out=out), (5, 2), True),
    "glm_hvp of one vector": (lambda out: glm_hvp(x, v[:, 0], weight, out=out), (5,), True),
    "gram": (lambda out: gram(x, out=out), (5, 5), True),
    "paired_matmul": (lambda out: paired_matmul(x, v, out=out), (8, 2), False),
    "direction": (direction, (6,), False),
    "step, direction": (step_direction, (6,), False),
    "step, prev_grad": (step_gradient, (6,), False),
}


def outputs(shape: tuple[int, ...], strided: bool) -> list[Tensor]:
    dense = torch.ones(shape)
    return [dense, torch.ones(*shape, 2)[..., 0]] if strided else [dense]


@pytest.mark.parametrize("name", OPS)
def test_what_was_saved_for_a_backward_pass_is_known_to_be_gone(name):
    op, shape, strided = OPS[name]
    for out in outputs(shape, strided):
        leaf = torch.ones(shape, requires_grad=True)
        loss = (leaf * out).sum()  # saves `out`
        op(out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", OPS)
def test_a_leaf_that_requires_grad_is_written_without_grad_mode_only(name):
    op, shape, strided = OPS[name]
    for out in outputs(shape, strided):
        before = out.clone()
        leaf = out.requires_grad_()
        with pytest.raises(ValueError, match=r"None when an argument is|does not require grad"):
            op(leaf)
        assert torch.equal(leaf, before)
        with torch.no_grad():
            op(leaf)
        assert not torch.equal(leaf, before)


@pytest.mark.parametrize("name", OPS)
def test_an_inference_tensor_can_be_written(name):
    op, shape, _ = OPS[name]
    with torch.inference_mode():
        out = torch.full(shape, float("nan"))
        op(out)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", [name for name, (_, _, strided) in OPS.items() if strided])
def test_elements_that_share_an_address_are_refused(name):
    op, shape, _ = OPS[name]
    shared = [torch.zeros(64).as_strided(shape, (1,) * len(shape))] if len(shape) > 1 else []
    for out in [*shared, torch.zeros(1).expand(shape)]:
        with pytest.raises(ValueError, match="out: expected an address of its own for each element"):
            op(out)


def test_own_addresses_by_exhaustion():
    for shape in ((2, 3), (3, 2), (2, 1, 3), (3, 3)):
        for strides in torch.cartesian_prod(*[torch.arange(7)] * len(shape)).tolist():
            view = torch.empty(64).as_strided(shape, strides)
            places = {sum(i * t for i, t in zip(at, strides, strict=True)) for at in _indices(shape)}
            assert _gate.has_own_addresses(view) == (len(places) == view.numel()), (shape, strides)


def _indices(shape: tuple[int, ...]) -> list[list[int]]:
    return torch.cartesian_prod(*[torch.arange(size) for size in shape]).tolist()


def test_interlaced_strides_hold_the_result():
    want = glm_hvp(x, v, weight)
    out = torch.full((20,), float("nan")).as_strided((5, 2), (2, 3))  # 0 2 4 6 8 and 3 5 7 9 11: no address twice
    assert torch.equal(glm_hvp(x, v, weight, out=out), want)


def test_a_ring_that_autograd_has_saved_is_known_to_be_changed():
    h = history()
    g = grad.clone().requires_grad_()
    loss = two_loop(g, h.s, h.y).sum()
    h.append(torch.ones(6), torch.ones(6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_input_itself_still_counts_as_written():
    g = grad.clone()
    before = g._version
    two_loop(g, s, 2 * s, out=g)
    assert g._version > before
    matrix = a.clone()
    before = matrix._version
    block_inv(matrix, assume="general", out=matrix)
    assert matrix._version > before
