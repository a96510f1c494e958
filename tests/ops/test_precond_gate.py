"""What `secant.ops.Tiles` and `secant.ops.newton_schulz` accept, what they say of the rest, and how torch sees them."""

from __future__ import annotations

import math

import pytest
import torch

import secant
from secant.ops import Tiles, newton_inv_root, newton_schulz
from secant.ops.precond import ADAM, GRAFTS, MUON, Rule, matrix, tiling

RULE = Rule(0.9, 0.95, 0.95, 1e-8, 0.0, ADAM, False, False)
OP = torch.ops.secant


def made(*shapes, dtype=torch.float32, block_size=64, **options):
    params = [torch.ones(shape, dtype=dtype) for shape in shapes]
    states = [Tiles.new_state(p, block_size=block_size, **options) for p in params]
    return Tiles(params, states, block_size=block_size), params, states


def test_shapes_and_tiles():
    assert [matrix(s) for s in ((), (5,), (5, 3), (5, 3, 2, 2))] == [(1, 1), (1, 5), (5, 3), (5, 12)]
    assert tiling((97, 64), 64, 1024) == (2, 1)
    assert tiling((97, 3, 5, 5), None, 1024) == (1, 1)
    assert tiling((97, 3, 5, 5), None, 50) == (2, 2)
    assert tiling((5000,), 64, 1024) == (1, 3)
    state = Tiles.new_state(torch.zeros(97, 64), capturable=True, dtype=torch.bfloat16, second_moment=False)
    assert {k: (tuple(x.shape), x.dtype) for k, x in state.items()} == {
        "step": ((), torch.float32),
        "exp_avg": ((97, 64), torch.bfloat16),
        "left": ((2, 49 * 50 // 2), torch.bfloat16),
        "right": ((2, 64 * 65 // 2), torch.bfloat16),
        "left_root": ((2, 49, 49), torch.bfloat16),
        "right_root": ((2, 64, 64), torch.bfloat16),
    }
    assert torch.equal(state["left_root"], torch.eye(49, dtype=torch.bfloat16).expand(2, 49, 49))


def wrong_state(name, value):
    p = torch.ones(4, 3)
    return lambda: Tiles([p], [Tiles.new_state(p) | {name: value}])


p, e = torch.ones(4, 3), torch.empty(0)
WRONG = [
    (lambda: Tiles([], []), ValueError, "Tiles: params, states: expected as many, at least one, got 0 and 0"),
    (lambda: Tiles([p], []), ValueError, "Tiles: params, states: expected as many"),
    (lambda: Tiles([p.long()], [Tiles.new_state(p)]), TypeError, r"Tiles: params\[0\]: expected dtype float32"),
    (lambda: Tiles.new_state(p[:0]), ValueError, "Tiles.new_state: param: expected at least one element"),
    (lambda: Tiles([p[:0]], [Tiles.new_state(p)]), ValueError, r"params\[0\]: expected real numbers, at least one"),
    (wrong_state("left", torch.zeros(1, 9)), ValueError, r"Tiles: left\[0\]: expected 10 elements, got 9"),
    (wrong_state("right_root", torch.zeros(1, 9)), None, ""),
    (wrong_state("right_root", torch.zeros(1, 8)), ValueError, r"right_root\[0\]: expected 9 elements, got 8"),
    (wrong_state("right_root", e), ValueError, r"right_root\[0\]: expected as many tiles as right, got none"),
    (wrong_state("exp_avg", torch.zeros(4, 3).half()), ValueError, "exp_avg: expected torch.float32 or bfloat16"),
    (wrong_state("exp_avg_sq", torch.zeros(3, 4).t()), ValueError, r"states\[0\]\['exp_avg_sq'\]: expected contiguous"),
    (wrong_state("step", torch.zeros(())), None, ""),
    (wrong_state("step", torch.zeros((), dtype=torch.int64)), ValueError, r"step\[0\]: expected a scalar of float32"),
    (lambda: made((4, 3))[0].step([p, p], lr=0.1, rule=RULE), ValueError, "grads: expected 1 tensors, got 2"),
    (lambda: made((4, 3))[0].step([p.t()], lr=0.1, rule=RULE), ValueError, r"grads\[0\]: expected shape \(4, 3\)"),
    (lambda: made((4, 3))[0].step([p.double()], lr=0.1, rule=RULE), TypeError, r"grads\[0\]: expected dtype float32"),
    (lambda: made((4, 3))[0].step([p.to_sparse()], lr=0.1, rule=RULE), ValueError, r"grads\[0\]: expected a dense"),
    (lambda: made((4, 3), second_moment=False)[0].step([p], lr=0.1, rule=RULE), ValueError,
     "states: expected an exp_avg_sq in each of them, got some without"),
    (lambda: newton_schulz([1.0]), TypeError, "newton_schulz: x: expected a torch.Tensor, got list"),
    (lambda: newton_schulz(torch.ones(3)), ValueError, r"newton_schulz: x: expected shape \(..., m, n\)"),
    (lambda: newton_schulz(p.to(torch.complex64)), TypeError, "newton_schulz: x: expected dtype"),
    (lambda: newton_schulz(p, -1), ValueError, "steps: expected an integer, 0 to 100, got -1"),
    (lambda: newton_schulz(p, coefficients=(1.0, 2.0)), ValueError, "coefficients: expected three numbers"),
    (lambda: newton_schulz(p, coefficients=(1.0, 2.0, math.nan)), ValueError, "coefficients: expected a finite number"),
    (lambda: newton_schulz(p, eps=0.0), ValueError, "eps: expected a finite number > 0"),
    (lambda: newton_schulz(p.clone().requires_grad_(), out=e.new_empty(4, 3)), ValueError, "out: expected None where"),
    (lambda: newton_schulz(p, out=p[:2]), ValueError, r"out: expected shape \(4, 3\)"),
    (lambda: newton_schulz(p, out=p.view(3, 4).t()), ValueError, "out: expected x itself or no overlap"),
    (lambda: newton_inv_root(p, 2), ValueError, r"newton_inv_root: a: expected square matrices, shape \(..., n, n\)"),
    (lambda: newton_inv_root(p[:0, :0], 2), ValueError, "newton_inv_root: a: expected square matrices"),
    (lambda: newton_inv_root([1.0], 2), TypeError, "newton_inv_root: a: expected a torch.Tensor, got list"),
    (lambda: newton_inv_root(p[:3], 3), ValueError, "newton_inv_root: p: expected 1, 2 or 4, got 3"),
    (lambda: newton_inv_root(p[:3], 2, damping=0.0), ValueError, "damping: expected a number > 0, at most 1e6"),
    (lambda: newton_inv_root(p[:3], 2, steps=0), ValueError, "steps: expected an integer, 1 to 500, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_what_is_wrong_is_named(call, error, message):
    if error is None:
        call()
        return
    with pytest.raises(error, match=message):
        call()


def test_gradients_of_any_strides_and_conjugates_of_nothing():
    for g in (
        torch.randn(3, 4).t(),
        torch.randn(4, 6)[:, ::2],
        torch.randn(1, 3).expand(4, 3),
        torch.randn(4, 3).neg(),
    ):
        results = []
        for x in (g, g.contiguous()):
            tiles, params, states = made((4, 3))
            states[0]["step"] += 1
            tiles.step([x], lr=0.1, rule=RULE)
            results.append(params[0])
        assert torch.equal(*results)


def test_autograd_learns_of_the_step():
    tiles, params, states = made((4, 3))
    leaf = torch.ones(3, requires_grad=True)
    saved = (params[0] * leaf).sum()
    states[0]["step"] += 1
    tiles.step([torch.ones(4, 3)], lr=0.1, rule=RULE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def op_args(rule=RULE, phases=3, lr=None, shapes=((4, 3), (5,), (7, 2, 3)), block_size=3, **options):
    tiles, params, states = made(*shapes, block_size=block_size, **options)
    for s in states:
        s["step"] += 2
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in params]
    return (params, grads, *tiles._states, tiles._layout, lr, 0.1, *rule, phases, tiles.skipped)


@pytest.mark.parametrize("rule", [RULE, RULE._replace(graft=GRAFTS.index("rms")), RULE._replace(rotate=True)], ids=str)
def test_opcheck(rule):
    # Lists in which nothing has no elements: the checker takes two empty tensors for overlapping ones.
    torch.library.opcheck(OP.precond_step.default, op_args(rule, shapes=((4, 3), (7, 6))))
    torch.library.opcheck(OP.precond_step.default, op_args(rule, 1, torch.tensor(0.1), shapes=((4, 3), (7, 6))))
    torch.library.opcheck(OP.newton_schulz.default, (torch.randn(2, 4, 3), 5, *MUON, 1e-7, torch.empty(2, 4, 3)))
    info = torch.empty(2, dtype=torch.int32)
    torch.library.opcheck(
        OP.newton_inv_root.default, (torch.eye(3).repeat(2, 1, 1), 2, 1e-3, 30, 1e-4, torch.empty(2, 3, 3), info)
    )


def test_the_registered_op_takes_what_lies_anyhow():
    plain = op_args()
    OP.precond_step(*plain)
    spread = op_args()
    lists = [[torch.stack((x, x), -1)[..., 0] if x.dim() > 1 else x for x in members] for members in spread[:9]]
    OP.precond_step(*lists, *spread[9:])
    for members, others in zip(plain[:9], lists, strict=True):
        assert all(map(torch.equal, members, others))


HOSTILE = [
    ("grads", lambda a: a[0].append(torch.ones(3))),
    ("grads", lambda a: a[1].pop()),
    (r"grads\[0\]", lambda a: a[1].__setitem__(0, torch.ones(3, 3))),
    (r"exp_avg\[1\]", lambda a: a[2].__setitem__(1, torch.ones(4))),
    (r"exp_avg_sq\[1\]", lambda a: a[3].__setitem__(1, torch.empty(0))),
    (r"left\[0\]", lambda a: a[4].__setitem__(0, torch.ones(5))),
    (r"right_root\[2\]", lambda a: a[7].__setitem__(2, torch.ones(5).bfloat16())),
    (r"left_root\[2\]", lambda a: a[6].__setitem__(2, torch.empty(0))),
    (r"layout\[0\]", lambda a: a[9].__setitem__((0, 2), 9)),
    (r"layout\[0\]", lambda a: a[9].__setitem__((0, 3), 0)),
    (r"layout\[0\]", lambda a: a[9].__setitem__((0, 3), -(2**40))),
]


@pytest.mark.parametrize(("name", "spoil"), HOSTILE)
def test_the_registered_op_trusts_nobody(name, spoil):
    args = op_args()
    spoil(args)
    with pytest.raises((ValueError, TypeError), match=f"precond_step: {name}: expected"):
        OP.precond_step(*args)
    for place, value, name in ((17, len(GRAFTS), "graft"), (20, 4, "graft, phases"), (21, torch.zeros(1), "skipped")):
        args = list(op_args())
        args[place] = value
        with pytest.raises((ValueError, TypeError), match=f"precond_step: {name}"):
            OP.precond_step(*args)


def test_a_compiled_orthogonalisation():
    x = torch.randn(3, 5, 4)
    compiled = torch.compile(lambda x: newton_schulz(2 * x, 4) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), newton_schulz(2 * x, 4) + 1)


def test_newton_schulz_converges_to_the_polar_factor():
    """With coefficients whose fixed point is 1 (Higham, section 8.3), from any matrix of full rank."""
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    for backend in ("auto", "reference"):
        with secant.use_backend(backend):
            y = newton_schulz(x, 30, coefficients=(15 / 8, -10 / 8, 3 / 8))
        torch.testing.assert_close(y, u @ v, rtol=0, atol=1e-12)
    out = torch.stack((x, x), -1)[..., 0]
    assert newton_schulz(x, out=out) is out
    assert torch.equal(out, newton_schulz(x))
    assert torch.equal(newton_schulz(x, out=x), out)
    assert newton_schulz(torch.empty(2, 0, 3)).shape == (2, 0, 3)


def test_derivatives_of_the_orthogonalisation():
    """The differentiable way gives what the kernel gives, and derivatives of either mode, twice; at zero, too."""
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for steps in (0, 1, 5):
        torch.testing.assert_close(newton_schulz(x, steps), newton_schulz(x.detach(), steps), rtol=0, atol=1e-11)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 2), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: newton_schulz(x, 1), x)
    zero = torch.zeros(2, 3, requires_grad=True)
    newton_schulz(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def graded(n, spread, dtype=torch.float64, seed=0):
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    return ((q * torch.logspace(0, -spread, n, dtype=torch.float64)) @ q.T).to(dtype)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("damping", [1e-8, 1e-4, 0.1, 10.0])
def test_roots_by_products_are_those_of_eigenvalues(p, damping):
    """Of any batch and strides, and of either triangle but the lower one's."""
    a = torch.stack([graded(n, spread)[:12, :12] for n, spread in ((12, 0.0), (12, 3.0), (12, 12.0))])
    w, q = torch.linalg.eigh(a)
    size = w.abs().pow(64).sum(-1, keepdim=True).pow(1 / 64)
    want = (q * (w + damping * size).pow(-1 / p)[:, None, :]) @ q.mT
    x, info = newton_inv_root(torch.stack((a, a), -1)[..., 0].unsqueeze(1), p, damping=damping)
    assert x.shape == (3, 1, 12, 12)
    assert info.shape == (3, 1)
    assert not info.any()
    # The bound of the docstring; the steps are at most 40 for 1e-8.
    most = 12 * 2.0**-53 * (4 * (1 + 1 / damping) + 240)
    for got, right in zip(x[:, 0], want, strict=True):
        assert torch.linalg.matrix_norm(got - right, ord=2) <= most * torch.linalg.matrix_norm(right, ord=2)
    torn = a + torch.ones(12, 12, dtype=torch.float64).triu(1)
    assert torch.equal(newton_inv_root(torn, p, damping=damping)[0], x[:, 0])
    assert newton_inv_root(a[:0], p)[0].shape == (0, 12, 12)


def test_as_many_steps_as_a_root_needs():
    """The default cap is enough for the smallest eigenvalue that there can be, and one third of it is not."""
    from secant.ops.precond import _steps

    for p in (1, 2, 4):
        for damping in (1e-2, 1e-6):
            a = torch.zeros(9, 9, dtype=torch.float64)
            a[0, 0] = 1.0
            cap = _steps(p, damping, math.sqrt(torch.finfo(a.dtype).eps) / 4)
            assert newton_inv_root(a, p, damping=damping, steps=cap - 1)[1] == 0
            assert newton_inv_root(a, p, damping=damping, steps=cap // 3)[1] == cap // 3


def test_derivatives_of_a_root():
    """Those of the root, of either mode, twice; codes as without them."""
    a = graded(4, 1.0).requires_grad_()

    def root(a):
        return newton_inv_root(a + a.mT, 2, damping=0.05)[0]

    x, info = newton_inv_root(a, 2, damping=0.05)
    torch.testing.assert_close(x, newton_inv_root(a.detach(), 2, damping=0.05)[0], rtol=0, atol=1e-12)
    assert info == 0
    assert torch.autograd.gradcheck(root, a, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(root, a)
    bad = torch.stack((torch.zeros(2, 2), torch.full((2, 2), math.inf), torch.eye(2))).requires_grad_()
    x, info = newton_inv_root(bad, 4)
    x.sum().backward()
    assert info.tolist() == [0, -1, 0]
    assert torch.isfinite(x).all()
    assert torch.isfinite(bad.grad).all()


def test_refresh_makes_inverse_roots():
    """Of uneven tiles, several sizes and low ranks; an average of zero leaves its root alone."""
    tiles, params, states = made((13, 8), (9, 1), (5, 5), dtype=torch.float64, block_size=7)
    states[2]["left"].zero_()
    for _ in range(3):
        tiles.update_grams([torch.randn_like(x) if i < 2 else torch.zeros_like(x) for i, x in enumerate(params)])
    for root, damping in ((2, 1e-4), (4, 1e-2)):
        tiles.refresh(root=root, damping=damping)
        for state, tile_rows in ((states[0], (7, 7, 6, 6)), (states[1], (5, 4))):
            n = state["left_root"].shape[-1]
            for packed, x, r in zip(state["left"], state["left_root"], tile_rows, strict=True):
                a = torch.zeros(n, n, dtype=torch.float64)
                a[tuple(torch.tril_indices(n, n))] = packed
                a = (a + a.tril(-1).mT)[:r, :r]
                w, q = torch.linalg.eigh(a)
                want = q @ torch.diag((w.clamp(min=0) + damping * w[-1]) ** (-1 / root)) @ q.mT
                # An error of eps lambda_max in the smallest eigenvalues, of damping lambda_max, is eps / damping.
                assert (x[:r, :r] - want).norm() <= 1e-15 / damping * 50 * want.norm()
                assert not x[:r, r:].any()
        assert torch.equal(states[2]["left_root"], torch.eye(5, dtype=torch.float64)[None])


def test_refresh_makes_eigenvectors():
    """Those of a smaller tile come first, apart from its padding."""
    tiles, params, states = made((13, 8), dtype=torch.float64, block_size=7)
    tiles.update_grams([torch.randn_like(params[0])])
    tiles.refresh_basis()
    q = states[0]["left_root"]
    for k, r in enumerate((7, 7, 6, 6)):
        g = torch.zeros(7, 7, dtype=torch.float64)
        g[tuple(torch.tril_indices(7, 7))] = states[0]["left"][k]
        d = q[k, :r, :r].mT @ (g + g.tril(-1).mT)[:r, :r] @ q[k, :r, :r]
        assert (d - d.diag().diag()).abs().max() < 1e-13
        assert bool((d.diag().diff() >= -1e-13).all())
        assert (q[k, :r, :r].mT @ q[k, :r, :r] - torch.eye(r, dtype=torch.float64)).abs().max() < 1e-13


def test_an_average_that_is_not_finite_keeps_its_root():
    tiles, params, states = made((4, 3), dtype=torch.float64)
    tiles.update_grams([torch.randn_like(params[0])])
    tiles.refresh()
    old = {k: x.clone() for k, x in states[0].items()}
    states[0]["left"][0, 2] = math.nan
    tiles.refresh(damping=0.5)
    assert torch.equal(states[0]["left_root"], old["left_root"])
    assert not torch.equal(states[0]["right_root"], old["right_root"])
    tiles.refresh_basis()
    assert torch.equal(states[0]["left_root"], old["left_root"])
