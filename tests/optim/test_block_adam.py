"""Adam with blocks, against its formulas and against Adam."""

import functools
import math

import pytest
import torch

from secant.optim import BlockAdam
from test_muon import gradients, run


def naive(given, n, lr=0.01, betas=(0.9, 0.999), eps=1e-8, damping=1e-2, every=1):
    """Block by block, each root by the eigenvalues of V^ itself."""
    params = [torch.ones_like(g) for g in given[0]]
    states = [{} for _ in params]
    for t, grads in enumerate(given, 1):
        for p, g, state in zip(params, grads, states, strict=True):
            flat, along = p.view(-1), g.reshape(-1)
            size = min(n, flat.numel())
            for k in range(0, flat.numel(), size):
                block = torch.zeros(size, dtype=p.dtype)
                piece = along[k : k + size]
                block[: len(piece)] = piece
                m, v, root = state.get(k, (torch.zeros_like(block), torch.zeros(size, size, dtype=p.dtype), None))
                m = betas[0] * m + (1 - betas[0]) * block
                v = betas[1] * v + (1 - betas[1]) * torch.outer(block, block)
                trace = v.trace()
                if t % every == 0 or (t < every and t in (1, 2, 4, 8)):
                    shape = (1 - damping) * v / trace + damping * torch.eye(size, dtype=p.dtype) / size
                    values, vectors = torch.linalg.eigh(shape)
                    root = vectors @ torch.diag(values**-0.5) @ vectors.T
                state[k] = m, v, root
                step = root @ (m / (1 - betas[0] ** t)) / ((trace / (1 - betas[1] ** t)).sqrt() + eps)
                flat[k : k + size] -= lr * step[: len(piece)]
    return params


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_it_is_the_formula(n, every):
    """An eigenvalue is at least damping / n, so that its power -1/2 has 1.5 n^2 / damping^1.5 roundings at most."""
    given = gradients(torch.float64, [(7, 5), (3,), ()])
    ours = run(lambda params: BlockAdam(params, lr=0.01, block_size=n, update_every=every), given)
    for x, y in zip(ours, naive(given, n, every=every), strict=True):
        bound = 50 * 0.01 * 1.5 * min(n, x.numel()) ** 2 * 1e-2**-1.5 * 2.0**-52
        assert (x - y).abs().max() <= bound


def test_blocks_of_one_are_adam():
    given = gradients(torch.float64, [(7, 5), (3,), ()])
    for every in (1, 7):
        make = functools.partial(BlockAdam, lr=0.01, block_size=1, update_every=every, weight_decay=0.1)
        ours = run(make, given)
        theirs = run(lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1), given)
        for x, y in zip(ours, theirs, strict=True):
            assert (x - y).abs().max() <= 50 * 16 * 2.0**-52


def test_a_whole_block_is_invariant_to_rotations():
    """The steps of Q p are Q times the steps of p, as those of Adam are not."""
    given = gradients(torch.float64, [(6,)])
    gen = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(6, 6, generator=gen, dtype=torch.float64))[0]
    make = functools.partial(BlockAdam, lr=0.01, block_size=6, update_every=1)
    (plain,) = run(make, given)
    (turned,) = run(make, [[q @ grads[0]] for grads in given])
    torch.testing.assert_close(turned - 1.0, q @ (plain - 1.0), rtol=0.0, atol=50 * 0.01 * 54 * 1e3 * 2.0**-52)


def test_blocks_that_are_zero_first_take_steps_of_the_size_of_adam():
    """Their root is as old as the zeros are: R = I, so that a step is m^ / sqrt(tr V^)."""
    p = torch.zeros(8, requires_grad=True)
    optimizer = BlockAdam([p], lr=1.0, block_size=4, update_every=20)
    for t in range(1, 15):
        p.grad = torch.full((8,), 1e-3 if t >= 10 else 0.0)
        before = p.detach().clone()
        optimizer.step()
        moved = (p.detach() - before).view(2, 4).norm(dim=1)
        if t < 10:
            assert not moved.any()
        elif t < 16:
            # m^ and V^ are averages of equal vectors and zeros.
            k = t - 9
            m = (1 - 0.9**k) / (1 - 0.9**t)
            v = (1 - 0.999**k) / (1 - 0.999**t)
            torch.testing.assert_close(moved, torch.full((2,), m / math.sqrt(v)), rtol=1e-4, atol=0.0)


def test_gradients_of_low_rank_in_float32():
    """64 entries and 8 gradients: nothing but finite numbers, from the smallest damping on."""
    gen = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 64, generator=gen)
    for damping in (1e-12, 1e-6, 1e-2):
        p = torch.zeros(64, requires_grad=True)
        optimizer = BlockAdam([p], block_size=64, damping=damping, update_every=1)
        for k in range(30):
            p.grad = basis[k % 8].clone()
            optimizer.step()
        assert torch.isfinite(p).all()


def test_options_that_do_not_fit():
    p = torch.zeros(3, requires_grad=True)
    for name, value in [("block_size", 65), ("block_size", 0), ("damping", 0.0), ("damping", 1.0), ("update_every", 0)]:
        with pytest.raises(ValueError, match=f"BlockAdam: {name}: expected"):
            BlockAdam([p], **{name: value})
    with pytest.raises(ValueError, match="BlockAdam: update_every: expected 1 where steps are counted on the device"):
        BlockAdam([p], capturable=True)
    optimizer = BlockAdam([p], block_size=2)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["block_size"] = 3
    with pytest.raises(ValueError, match="BlockAdam: block_size: expected what it was when the state"):
        optimizer.step()
