"""Shampoo and SOAP against implementations written straight from the papers, and what tiles are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from secant.ops.precond import shares
from secant.optim import SOAP, Shampoo
from secant.optim._per_parameter import is_due

F64 = torch.float64
STEPS = 50
SHAPES = [(13, 8), (5, 3, 2, 2), (6, 6), (1, 9), (7, 1), (5,), ()]


def gradients(shapes, seed=0, steps=STEPS):
    """Gradients with a direction that lasts, correlated rows and columns, and entries of different sizes."""
    gen = torch.Generator().manual_seed(seed)
    out = []
    for shape in shapes:
        mean = torch.randn(shape, generator=gen, dtype=F64)
        x = mean + torch.randn(steps, *shape, generator=gen, dtype=F64)
        if len(shape) > 1:
            mix = torch.randn(shape[0], shape[0], generator=gen, dtype=F64)
            x = torch.einsum("ij,tj...->ti...", mix, x)
        out.append(x)
    return [[x[t] for x in out] for t in range(steps)]


def run(make, given, start=None):
    params = [torch.nn.Parameter(torch.ones_like(g) if start is None else start[i]) for i, g in enumerate(given[0])]
    optimizer = make(params)
    for grads in given:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params], optimizer


def tiles_of(shape, block):
    """Slices of a matrix, by torch's own way of splitting evenly."""
    ranges = []
    for n in (shape[0], math.prod(shape[1:])):
        pieces = torch.arange(n).tensor_split(-(-n // (block or n)))
        ranges.append([slice(int(x[0]), int(x[-1]) + 1) for x in pieces])
    return list(itertools.product(*ranges))


class Average:
    """An average of whatever, corrected for its start at zero."""

    def __init__(self, beta):
        self.beta, self.value, self.t = beta, 0.0, 0

    def __call__(self, x):
        self.t += 1
        self.value = self.beta * self.value + (1 - self.beta) * x
        return self.value / (1 - self.beta**self.t)


def inverse_root(a, e, damping):
    w, q = torch.linalg.eigh(a)
    return q @ torch.diag((w.clamp(min=0) + damping * w[-1]) ** -e) @ q.T


def sides_of(r, c, one_sided):
    return (r < c, r >= c) if one_sided else (True, True)


def naive_shampoo(
    given, *, lr, e=0.5, block=64, every=20, graft="adam", one_sided=False, decay=0.0, damping=1e-4, eps=1e-8
):
    found = []
    for k, first in enumerate(given[0]):
        w = torch.ones_like(first)
        if first.dim() < 2:
            m, v = Average(0.9), Average(0.95)
            for grads in given:
                w = (1 - lr * decay) * w - lr * m(grads[k]) / (v(grads[k] ** 2).sqrt() + eps)
            found.append(w)
            continue
        w = w.reshape(len(w), -1)
        for rows, columns in tiles_of(first.shape, block):
            m, v, l, r = Average(0.9), Average(0.95), Average(0.95), Average(0.95)
            x = w[rows, columns].clone()
            has_left, has_right = sides_of(*x.shape, one_sided)
            for t, grads in enumerate(given, 1):
                g = grads[k].reshape(w.shape)[rows, columns]
                left, right = l(g @ g.T), r(g.T @ g)
                if is_due(t, every):
                    root_l, root_r = inverse_root(left, e, damping), inverse_root(right, e, damping)
                mean, square = m(g), v(g**2)
                p = root_l @ mean if has_left else mean
                p = p @ root_r if has_right else p
                adam = mean / (square.sqrt() + eps)
                length = {"adam": adam.norm(), "sgd": mean.norm(), "rms": 0.2 * x.numel() ** 0.5, "none": p.norm()}
                x = (1 - lr * decay) * x - lr * p * length[graft] / p.norm()
            w[rows, columns] = x
        found.append(w.reshape(first.shape))
    return found


def exact_basis(a, *place):
    return torch.linalg.eigh(a)[1]


class FoundBases:
    """Runs SOAP, and gives out the bases that it found, having seen that they are some.

    Eigenvectors of equal eigenvalues, such as the zeros of a low rank, are anything that spans them.
    """

    def __init__(self, make, given):
        params = [torch.nn.Parameter(torch.ones_like(g)) for g in given[0]]
        optimizer, self.found = make(params), []
        for grads in given:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            self.found.append([{k: x.clone() for k, x in optimizer.state[p].items()} for p in params])
        self.params = [p.detach() for p in params]

    def __call__(self, a, t, k, tile, side):
        n = len(a)
        q = self.found[t - 1][k][f"{side}_root"][tile, :n, :n]
        assert (q.T @ q - torch.eye(n, dtype=F64)).abs().max() < 1e-13
        d = q.T @ a @ q
        assert (d - d.diag().diag()).abs().max() <= 1e-13 * a.norm()
        return q


def naive_soap(given, *, lr, eps, basis=exact_basis, block=64, every=20, one_sided=False, decay=0.0):
    found = []
    for k, first in enumerate(given[0]):
        if first.dim() < 2:
            found += naive_shampoo([[grads[k]] for grads in given], lr=lr, decay=decay, eps=eps)
            continue
        w = torch.ones_like(first).reshape(len(first), -1)
        for i, (rows, columns) in enumerate(tiles_of(first.shape, block)):
            m, v, l, r = Average(0.9), Average(0.95), Average(0.95), Average(0.95)
            x = w[rows, columns].clone()
            has_left, has_right = sides_of(*x.shape, one_sided)
            ql, qr = (torch.eye(n, dtype=F64) for n in x.shape)
            for t, grads in enumerate(given, 1):
                g = grads[k].reshape(w.shape)[rows, columns]
                l(g @ g.T), r(g.T @ g)
                turned, mean = v((ql.T @ g @ qr) ** 2), ql.T @ m(g) @ qr
                x = (1 - lr * decay) * x - lr * ql @ (mean / (turned.sqrt() + eps)) @ qr.T
                if is_due(t, every):
                    ql = basis(l.value, t, k, i, "left") if has_left else ql
                    qr = basis(r.value, t, k, i, "right") if has_right else qr
            w[rows, columns] = x
        found.append(w.reshape(first.shape))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"e": 0.25, "every": 5},
        {"graft": "sgd", "block": 4},
        {"graft": "rms", "block": None, "every": 1},
        {"graft": "none", "block": 5, "every": 5},
        {"one_sided": True, "block": 7},
        {"e": 1.0, "decay": 0.1, "every": 7, "damping": 1e-2},
    ],
    ids=str,
)
def test_fifty_steps_of_shampoo_are_those_of_the_paper(options):
    given = gradients(SHAPES)
    names = {"e": "exponent", "block": "block_size", "every": "precondition_frequency", "decay": "weight_decay"}
    renamed = {names.get(k, k): v for k, v in options.items()}
    ours, optimizer = run(lambda params: Shampoo(params, lr=0.01, **renamed), given)
    for x, y in zip(ours, naive_shampoo(given, lr=0.01, **options), strict=True):
        assert (x - y).abs().max() < 1e-8
        assert (x - 1).abs().max() > 1e-3
    assert optimizer.skipped == 0


@pytest.mark.parametrize("options", [{}, {"exponent": 0.25, "block_size": 4}, {"graft": "none"}], ids=str)
def test_fifty_steps_with_roots_by_products(options):
    """What is damped is not the same in the last digits: |A| lies up to n^(1/64) above the largest eigenvalue."""
    given = gradients(SHAPES)
    options = {"lr": 0.01, "damping": 1e-9, "precondition_frequency": 5, **options}
    exact, _ = run(lambda params: Shampoo(params, **options), given)
    ours, optimizer = run(lambda params: Shampoo(params, root="newton", **options), given)
    assert optimizer.skipped == 0
    for x, y in zip(ours, exact, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() <= 0.05 * (y - 1).norm()
    full, _ = run(lambda params: Shampoo(params, **{**options, "block_size": 3}), gradients([(9, 9)]))
    same, _ = run(lambda params: Shampoo(params, root="newton", **{**options, "block_size": 3}), gradients([(9, 9)]))
    # Averages of full rank, the damping far below their smallest eigenvalues: one root.
    torch.testing.assert_close(same[0], full[0], rtol=0, atol=1e-5)


def test_averages_that_have_no_root_by_products_keep_the_old_one():
    """Of an average with a negative eigenvalue beyond the damping nothing is made; the others have theirs."""
    p = torch.nn.Parameter(torch.ones(6, 6, dtype=F64))
    optimizer = Shampoo([p], root="newton")
    p.grad = torch.eye(6, dtype=F64) + 0.1
    optimizer.step()
    state = optimizer.state[p]
    before = {k: state[k].clone() for k in ("left_root", "right_root")}
    state["left"][0, 0] = -1.0
    state["right"].mul_(4.0)
    optimizer.refresh()
    assert torch.equal(state["left_root"], before["left_root"])
    torch.testing.assert_close(state["right_root"], before["right_root"] / 2)


@pytest.mark.parametrize("every", [1, 20])
def test_fifty_steps_of_soap_are_those_of_the_paper(every):
    """Square tiles, whose averages have distinct eigenvalues from the first step on: one basis, but for signs."""
    given = gradients([(6, 6), (12, 18), (7,)])
    options = {"lr": 0.01, "eps": 1e-5}
    ours, _ = run(lambda params: SOAP(params, block_size=6, precondition_frequency=every, **options), given)
    for x, y in zip(ours, naive_soap(given, block=6, every=every, **options), strict=True):
        assert (x - y).abs().max() < 1e-8
        assert (x - 1).abs().max() > 1e-3


def test_soap_does_not_step_in_the_basis_of_the_gradient_at_hand():
    """Of a gradient of rank one all entries but one are rounding there, and a step would be mostly noise."""
    u, v = (torch.linspace(1.0, 2.0, 8, dtype=torch.float32)[:, None].roll(k, 0) for k in (0, 3))
    w = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = SOAP([w], lr=0.1)
    for _ in range(5):
        w.grad = u @ v.T
        optimizer.step()
    cosine = -(w.detach() * w.grad).sum() / (w.detach().norm() * w.grad.norm())
    assert cosine > 0.9


@pytest.mark.parametrize("options", [{}, {"block": 4, "every": 5}, {"one_sided": True, "decay": 0.1}], ids=str)
def test_fifty_steps_of_soap_with_sides_of_low_rank(options):
    given = gradients(SHAPES)
    names = {"block": "block_size", "every": "precondition_frequency", "decay": "weight_decay"}
    renamed = {names.get(k, k): v for k, v in options.items()}
    bases = FoundBases(lambda params: SOAP(params, lr=0.01, eps=1e-5, **renamed), given)
    for x, y in zip(bases.params, naive_soap(given, lr=0.01, eps=1e-5, basis=bases, **options), strict=True):
        assert (x - y).abs().max() < 1e-8


def test_sides_above_those_of_small_blocks():
    """Whole sides of 80 and 100, and the same of 97 cut by max_side."""
    given = gradients([(80, 100)], steps=5)
    ours, _ = run(lambda params: Shampoo(params, lr=0.01, block_size=None, precondition_frequency=2), given)
    assert (ours[0] - naive_shampoo(given, lr=0.01, block=None, every=2)[0]).abs().max() < 1e-8
    ours, optimizer = run(lambda params: Shampoo(params, lr=0.01, block_size=None, max_side=50), given)
    assert (ours[0] - naive_shampoo(given, lr=0.01, block=50)[0]).abs().max() < 1e-8
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["left_root"].shape == (4, 40, 40)


def test_memory():
    """Of one matrix of 130 x 64 in tiles of 44 + 43 + 43 rows: two moments, half of each average, whole roots."""

    def entries(make, dtype=torch.float32):
        p = torch.nn.Parameter(torch.randn(130, 64, dtype=dtype))
        optimizer = make([p])
        p.grad = torch.randn_like(p)
        optimizer.step()
        return {k: (x.numel(), x.dtype) for k, x in optimizer.state[p].items() if k != "step"}

    half, roots = 3 * (44 * 45 // 2), 3 * 44 * 44
    right_half, right_roots = 3 * (64 * 65 // 2), 3 * 64 * 64
    sizes = {"exp_avg": 8320, "exp_avg_sq": 8320, "left": half, "right": right_half, "left_root": roots,
             "right_root": right_roots}  # fmt: skip

    def as_(dtype, without=()):
        return {k: (n, dtype) for k, n in sizes.items() if k not in without}

    assert entries(Shampoo) == entries(SOAP) == as_(torch.float32)
    assert entries(Shampoo, torch.bfloat16) == as_(torch.float32)
    assert entries(lambda p: Shampoo(p, state_dtype=torch.bfloat16)) == as_(torch.bfloat16)
    assert entries(lambda p: Shampoo(p, graft="rms")) == as_(torch.float32, ["exp_avg_sq"])
    assert entries(lambda p: SOAP(p, one_sided=True)) == as_(torch.float32, ["right", "right_root"])


@pytest.mark.parametrize("make", [Shampoo, SOAP])
def test_states_of_bfloat16_train(make):
    """On a linear regression with inputs of condition 100, about as far as with those of float32."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(256, 20, generator=gen) * torch.logspace(0, -1, 20)
    y = x @ torch.randn(20, 3, generator=gen)
    losses = []
    for dtype in (None, torch.bfloat16):
        w = torch.zeros(20, 3, requires_grad=True)
        optimizer = make([w], lr=0.05, state_dtype=dtype, precondition_frequency=5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (x @ w - y).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    start = y.square().mean().item()
    assert losses[0] < 1e-3 * start
    assert losses[1] < 1e-2 * start


@pytest.mark.parametrize("make", [Shampoo, SOAP])
def test_a_bad_gradient_costs_the_steps_of_its_tiles(make):
    """The tile with a NaN stays; all others are bit for bit what they are without; then it goes on."""
    given = gradients([(12, 12), (5,)], steps=9)
    spoilt = [[g.clone() for g in grads] for grads in given]
    spoilt[4][0][1, 2] = math.nan
    options = {"lr": 0.01, "block_size": 6, "precondition_frequency": 2}
    whole, _ = run(lambda params: make(params, **options), given)
    ours, optimizer = run(lambda params: make(params, **options), spoilt)
    assert optimizer.skipped == 1
    assert torch.isfinite(ours[0]).all()
    good = torch.ones(12, 12, dtype=torch.bool)
    good[:6, :6] = False
    assert torch.equal(ours[0][good], whole[0][good])
    assert torch.equal(ours[1], whole[1])
    assert not torch.equal(ours[0][~good], whole[0][~good])
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert all(bool(torch.isfinite(x).all()) for x in state.values())


@pytest.mark.parametrize("make", [Shampoo, SOAP])
def test_degenerate_gradients(make):
    """Zero, of rank one, tiny, and huge ones: finite everywhere, and a gradient of zero moves nothing."""
    u = torch.randn(70, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1e-15, 1.0, 1e15):
        w = torch.nn.Parameter(torch.ones(70, 40))
        optimizer = make([w], lr=0.01)
        for t in range(25):
            w.grad = scale * torch.outer(u, torch.ones(40) if t % 2 else torch.arange(40.0))
            optimizer.step()
        assert torch.isfinite(w).all()
        assert torch.equal(w.detach(), torch.ones(70, 40)) == (scale == 0)
        assert optimizer.skipped == 0


def test_the_step_does_not_depend_on_the_scale_of_the_gradient():
    """Grafted to Adam, with eps far below: multiplying the loss by a power of two changes no bit but those of eps."""
    given = gradients([(9, 7)], steps=20)
    one, _ = run(lambda params: Shampoo(params, eps=1e-300), given)
    more, _ = run(lambda params: Shampoo(params, eps=1e-300), [[g * 2.0**10 for g in grads] for grads in given])
    torch.testing.assert_close(one[0], more[0], rtol=0, atol=1e-10)


def test_it_is_equivariant_to_rotations_of_both_sides():
    """One tile with grafts that no rotation changes: steps of Q G R^T are Q times those of G times R^T."""
    given = gradients([(9, 7)], steps=20)
    gen = torch.Generator().manual_seed(3)
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=F64)).Q for n in (9, 7))
    for graft in ("sgd", "rms", "none"):

        def make(params, graft=graft):
            return Shampoo(params, graft=graft)

        zero = [torch.zeros(9, 7, dtype=F64)]
        plain, _ = run(make, given, [x.clone() for x in zero])
        turned, _ = run(make, [[q @ grads[0] @ r.T] for grads in given], [x.clone() for x in zero])
        # The roots of left Gram matrices, of rank 7 at first, are those of 1e-4 lambda_max there: 1e4 roundings.
        torch.testing.assert_close(turned[0], q @ plain[0] @ r.T, rtol=0, atol=1e-9)


def test_channels_last_and_transposed_parameters():
    given = gradients([(8, 3, 2, 2), (9, 7)], steps=12)
    plain, _ = run(lambda params: Shampoo(params, block_size=5), given)
    start = [
        torch.ones(8, 3, 2, 2, dtype=F64).to(memory_format=torch.channels_last),
        torch.ones(7, 9, dtype=F64).t(),
    ]
    turned, _ = run(lambda params: Shampoo(params, block_size=5), given, start)
    for x, y, z in zip(plain, turned, start, strict=True):
        assert torch.equal(x, y)
        assert y.stride() == z.stride()


def test_a_parameter_may_get_other_memory():
    """`p.data = ...`, as casts and shares of a model do, with other strides."""
    given = gradients([(9, 7)], steps=6)
    plain, _ = run(Shampoo, given)
    p = torch.nn.Parameter(torch.ones(9, 7, dtype=F64))
    optimizer = Shampoo([p])
    for t, grads in enumerate(given):
        if t == 3:
            p.data = p.data.t().contiguous().t()
        p.grad = grads[0].clone()
        optimizer.step()
    assert torch.equal(p.detach(), plain[0])


def test_parameters_that_come_and_go():
    """Each has its own number of steps, and so its own schedule."""
    given = gradients([(6, 6), (6, 6)], steps=20)
    alone = [run(Shampoo, [[grads[k]] for grads in given[k::2]])[0][0] for k in (0, 1)]
    params = [torch.nn.Parameter(torch.ones(6, 6, dtype=F64)) for _ in range(2)]
    optimizer = Shampoo(params)
    for t, grads in enumerate(given):
        for k in (0, 1):
            params[k].grad = grads[k].clone() if t % 2 == k else None
        optimizer.step()
    assert torch.equal(params[0].detach(), alone[0])
    assert torch.equal(params[1].detach(), alone[1])


def test_a_state_that_is_cleared_begins_anew():
    given = gradients([(6, 6)], steps=5)
    fresh, _ = run(Shampoo, given)
    p = torch.nn.Parameter(torch.ones(6, 6, dtype=F64))
    optimizer = Shampoo([p])
    for _ in range(2):
        optimizer.state.clear()
        with torch.no_grad():
            p.fill_(1.0)
        for grads in given:
            p.grad = grads[0].clone()
            optimizer.step()
    assert torch.equal(p.detach(), fresh[0])


def test_a_refresh_by_hand():
    """A step that finds roots anew, and one that does not but has been told to, are the same."""
    given = gradients([(6, 6)], steps=4)  # due at 1, 2 and 4
    whole, _ = run(lambda params: Shampoo(params, precondition_frequency=20), given[:3])
    p = torch.nn.Parameter(torch.ones(6, 6, dtype=F64))
    optimizer = Shampoo([p])
    for grads in given[:3]:
        p.grad = grads[0].clone()
        optimizer.step()
    assert torch.equal(p.detach(), whole[0])
    before = optimizer.state[p]["left_root"].clone()
    optimizer.refresh()
    assert not torch.equal(before, optimizer.state[p]["left_root"])


#: Each shares a refresh in one way of its own.
SHARING = [(Shampoo, {}), (SOAP, {}), (Shampoo, {"root": "newton"}), (Shampoo, {"state_dtype": torch.bfloat16})]


def _train_with_shares(rank, folder, given):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    found = []
    for make, options in SHARING:
        own = {"block_size": 5, **options}
        ours, optimizer = run(lambda params, make=make, own=own: make(params, distribute=True, **own), given)
        found.append((ours, optimizer.state_dict()["state"]))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_processes_share_a_refresh(tmp_path):
    """Three of them, with sizes of which there are 1 to 8 matrices: each has bit for bit what one alone has."""
    given = gradients([*SHAPES, (3, 3)], steps=9)
    torch.multiprocessing.spawn(_train_with_shares, (str(tmp_path), given), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for k, (make, options) in enumerate(SHARING):
        own = {"block_size": 5, **options}
        alone, optimizer = run(lambda params, make=make, own=own: make(params, **own), given)
        for rank in ranks:
            ours, state = rank[k]
            assert all(map(torch.equal, ours, alone))
            for i, own in optimizer.state_dict()["state"].items():
                assert all(torch.equal(x, state[i][name]) for name, x in own.items())


def test_matrices_are_shared_by_cost():
    """Each has one owner, who has at most the dearest one more to do than the others; a large one waits for nobody."""
    for sizes, ranks in (([(7, 64**3), (5, 32**3), (1, 128**3)], 3), ([(2, 1.0)], 5), ([(100, 8.0), (30, 1.0)], 7)):
        found = shares(sizes, ranks)
        for (count, _), owners in zip(sizes, found, strict=True):
            assert sorted(itertools.chain(*owners)) == list(range(count))
            assert all(x == sorted(x) for x in owners)
        costs = [cost for _, cost in sizes]
        loads = [sum(len(x[rank]) * cost for x, cost in zip(found, costs, strict=True)) for rank in range(ranks)]
        assert max(loads) - min(loads) <= max(cost for _, cost in sizes)
    # One of 128 costs what eight of 64 do: who has it has nothing else.
    assert shares([(8, 64**3), (1, 128**3)], 2) == [[[], list(range(8))], [[0], []]]


def test_options_that_do_not_fit():
    p = torch.zeros(3, 3, requires_grad=True)
    for name, value in [("block_size", 0), ("max_side", 0), ("graft", "lion"), ("exponent", 0.3), ("damping", 0.0),
                        ("root", "qr"), ("state_dtype", torch.float16), ("precondition_frequency", 0),
                        ("one_sided", 1)]:  # fmt: skip
        with pytest.raises(ValueError, match=f"Shampoo: {name}: expected"):
            Shampoo([p], **{name: value})
    with pytest.raises(ValueError, match=r"Shampoo: state_dtype: expected None, bfloat16 or torch.float32"):
        Shampoo([p], state_dtype=torch.float64)
    optimizer = Shampoo([p])
    p.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.param_groups[0]["graft"] = "rms"
    with pytest.raises(ValueError, match="Shampoo: graft: expected adam or not, as it was when the state"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
    optimizer.param_groups[0].update(graft="adam", block_size=2)
    with pytest.raises(ValueError, match="Shampoo: block_size, max_side: expected what they were when the state"):
        optimizer.step()
