"""Budgets, tolerances, groups, gradients in one vector, transfers to the host, and what is refused."""

import math

import pytest
import torch

import secant
from optimizer_problems import PROBLEMS, Reads, Run
from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


def parameter(*shape, dtype=torch.float64, **options):
    return torch.ones(*shape, dtype=dtype, requires_grad=True, **options)


# Budgets and tolerances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("max_eval", range(2, 12))
def test_max_eval_is_never_exceeded(max_eval, line_search_fn):
    options = {"line_search_fn": line_search_fn, "max_iter": 50, "max_eval": max_eval}
    run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], **options)
    for calls in (1, 2, 3):
        run.step()
        # Rosenbrock takes far more, so the budget is also used up.
        assert len(run.points) == calls * max_eval
    assert run.state["func_evals"] == 3 * max_eval


def test_max_eval_of_one_without_a_search():
    run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], max_iter=50, max_eval=1).step(20)
    assert len(run.points) == 20
    short = Run(LBFGS, *PROBLEMS["rosenbrock-10"], max_iter=1).step(20)
    assert torch.equal(run.x, short.x)


def test_default_max_eval_goes_at_most_one_over():
    for max_iter in (1, 2, 3, 8, 20):
        run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], max_iter=max_iter, line_search_fn="strong_wolfe").step()
        assert len(run.points) <= max_iter * 5 // 4 + 1


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_relative_tolerances(line_search_fn):
    """They stop a run at the same point whatever the scale of the loss."""
    loss, start = PROBLEMS["quadratic-1e3"]
    for option in ("tolerance_grad_rel", "tolerance_change_rel"):
        ends = []
        for scale in (2.0**6, 2.0**30):
            run = Run(
                LBFGS, lambda params, scale=scale: scale * loss(params), start, max_iter=400, max_eval=9999,
                tolerance_grad=0.0, tolerance_change=0.0, line_search_fn=line_search_fn, **{option: 1e-3},
            )  # fmt: skip
            ends.append(run.step())
        # Scaling by a power of two is exact, and with |g|_1 >= 1 the first step does not depend on the scale.
        assert 1 < ends[0].state["n_iter"] == ends[1].state["n_iter"] < 400
        assert torch.equal(ends[0].x, ends[1].x)
        if option == "tolerance_grad_rel":
            sizes = []
            for x in ends[0].points[0], ends[0].x:
                p = x.clone().requires_grad_()
                sizes.append(torch.autograd.grad(loss([p]), p)[0].abs().max())
            assert sizes[1] <= 1e-3 * sizes[0]


def test_lr_of_zero_stays():
    for line_search_fn in SEARCHES:
        run = Run(LBFGS, *PROBLEMS["rosenbrock-2"], lr=0.0, line_search_fn=line_search_fn)
        start = run.x
        run.step(2)
        assert torch.equal(run.x, start)
        assert len(run.points) == 2


def test_lr_may_be_a_tensor_and_change():
    runs = [Run(LBFGS, *PROBLEMS["mlp"], lr=lr) for lr in (0.5, torch.tensor(0.5))]
    for run in runs:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        for _ in range(3):
            run.step()
            scheduler.step()
    assert torch.equal(runs[0].x, runs[1].x)


# Groups ---------------------------------------------------------------------------------------------------------------


def grouped(lrs, **options):
    """The MLP with one group per tensor."""
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start, **options)
    groups = [{"params": [p]} | ({} if lr is None else {"lr": lr}) for p, lr in zip(run.params, lrs, strict=True)]
    run.optimizer = LBFGS(groups, **options)
    return run


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_groups_of_one_lr_are_one_group(line_search_fn):
    one = Run(LBFGS, *PROBLEMS["mlp"], lr=0.5, line_search_fn=line_search_fn).step(2)
    many = grouped([None, 0.5, None, 0.5], lr=0.5, line_search_fn=line_search_fn).step(2)
    assert torch.equal(one.x, many.x)


def test_first_step_of_each_group_is_its_lr_times_the_gradient():
    lrs = [0.5, 0.1, 0.0, 2.0]
    run = grouped(lrs, max_iter=1)
    before = [p.detach().clone() for p in run.params]
    run.step()
    total = sum(lr * p.grad.abs().sum() for lr, p in zip(lrs, run.params, strict=True)) / max(lrs)
    for lr, p, x in zip(lrs, run.params, before, strict=True):
        expected = x - lr * min(1.0, 1.0 / total) * p.grad
        # Two roundings of the square root of lr / max lr, and one per operation.
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_lr_of_zero_freezes_a_group_as_if_it_were_not_there(line_search_fn):
    loss, start = PROBLEMS["mlp"]
    frozen = grouped([1.0, 0.0, 1.0, 1.0], line_search_fn=line_search_fn, max_iter=10).step(2)
    alone = Run(LBFGS, lambda p: loss([p[0], start[1], p[1], p[2]]), [start[0], *start[2:]],
                line_search_fn=line_search_fn, max_iter=10).step(2)  # fmt: skip
    assert torch.equal(frozen.params[1].detach(), start[1])
    x = torch.cat([p.detach().reshape(-1) for i, p in enumerate(frozen.params) if i != 1])
    # Zeros in the dot products change the order of summation only.
    torch.testing.assert_close(x, alone.x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_unequal_lr_still_converges(line_search_fn):
    run = grouped([1.0, 0.25, 0.5, 1.0], line_search_fn=line_search_fn, max_iter=200).step()
    assert run.losses[-1] < 0.1 * run.losses[0]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_unequal_lr_is_a_run_in_other_coordinates(line_search_fn):
    """With R = diag(lr_k / max lr) the points are R^(1/2) times those of the loss of R^(1/2) z: as robust as equal lr.

    The loss is small, so that the first step is not scaled by 1 / |d|_1, which depends on the coordinates.
    """
    mlp, start = PROBLEMS["mlp"]
    options = {"line_search_fn": line_search_fn, "max_iter": 20, "tolerance_grad": 0.0, "tolerance_change": 0.0}

    def loss(params):
        return 2.0**-10 * mlp(params)

    shares = [1.0, 0.25, 0.0625, 1.0]  # whose roots are exact
    roots = [math.sqrt(share) for share in shares]
    run = grouped(shares, **options)
    run.loss = loss
    run.step()
    other = Run(
        LBFGS, lambda z: loss([r * x for r, x in zip(roots, z, strict=True)]),
        [x / r for r, x in zip(roots, start, strict=True)], **options,
    ).step()  # fmt: skip
    scale = torch.cat([torch.full((x.numel(),), r).double() for r, x in zip(roots, start, strict=True)])
    assert len(run.points) == len(other.points)
    for a, b in zip(run.points, other.points, strict=True):
        # As in the trajectory tests: rounding, amplified over twenty iterations.
        assert (a - scale * b).norm() <= 1e-8 * (1.0 + a.norm())


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_ratios_of_lr_may_change(line_search_fn):
    """The pairs are rescaled: on a quadratic that they know, the step to the minimum is the same for every R."""
    a = torch.tensor([1.0, 4.0]).double()
    ends = []
    for lr in (1.0, 0.25, 0.5):
        params = [torch.tensor([3.0]).double().requires_grad_(), torch.tensor([-2.0]).double().requires_grad_()]
        optimizer = LBFGS([{"params": [p]} for p in params], line_search_fn=line_search_fn, max_iter=1, max_eval=30)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 0.5 * (a * torch.cat(params) ** 2).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        optimizer.param_groups[1]["lr"] = lr
        optimizer.step(closure)
        ends.append(torch.cat([p.detach() for p in params]))
    # Two independent pairs determine the inverse Hessian of two parameters up to the change of gamma in the step.
    assert all(torch.isfinite(x).all() for x in ends)
    assert all((x.abs() <= ends[0].abs().max() + 1e-9).all() for x in ends)


def test_a_group_added_later_starts_anew():
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start)
    run.optimizer = LBFGS(run.params[:2])
    run.step()
    run.optimizer.add_param_group({"params": run.params[2:]})
    fresh = Run(LBFGS, loss, [p.detach() for p in run.params])
    run.step()
    fresh.step()
    assert torch.equal(run.x, fresh.x)


# Gradients ------------------------------------------------------------------------------------------------------------


def is_inside(grad, vector):
    offset = grad.data_ptr() - vector.data_ptr()
    return 0 <= offset <= (vector.numel() - grad.numel()) * vector.element_size()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_views_of_one_vector(set_to_none):
    run = Run(LBFGS, *PROBLEMS["mlp"]).step()
    flat = run.optimizer._flat.grad
    views = [p.grad for p in run.params]
    assert all(is_inside(g, flat) for g in views)
    assert flat.abs().sum() > 0
    run.optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is g for p, g in zip(run.params, views, strict=True))
    assert not flat.any()
    run.loss(run.params).backward()
    assert all(p.grad is g for p, g in zip(run.params, views, strict=True))
    assert torch.equal(flat, torch.cat([g.reshape(-1) for g in torch.autograd.grad(run.loss(run.params), run.params)]))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_any_way_of_zeroing_gives_the_same_run(line_search_fn):
    loss, start = PROBLEMS["mlp"]
    expected = Run(LBFGS, loss, start, line_search_fn=line_search_fn).step(2)
    for zero in ("none", "zeros", "autograd", "graph"):
        run = Run(LBFGS, loss, start, line_search_fn=line_search_fn)

        def closure(run=run, zero=zero):
            for p in run.params:
                if zero == "zeros" and p.grad is not None:
                    p.grad.zero_()
                else:
                    p.grad = None
            value = run.loss(run.params)
            if zero == "autograd":
                for p, g in zip(run.params, torch.autograd.grad(value, run.params), strict=True):
                    p.grad = g
            elif zero == "graph":
                value.backward(inputs=run.params, create_graph=True)
            else:
                value.backward()
            return value

        for _ in range(2):
            run.optimizer.step(closure)
        assert torch.equal(run.x, expected.x)


def test_no_gradient_counts_as_zero_at_every_evaluation():
    loss, start = PROBLEMS["rosenbrock-2"]
    run = Run(LBFGS, lambda params: loss(params[:1]), [*start, torch.ones(3).double()])
    run.params[1].grad = torch.full((3,), 7.0).double()  # of an earlier backward: gone with zero_grad

    def closure():
        for p in run.params:
            p.grad = None
        value = run.loss(run.params)
        value.backward()
        return value

    for _ in range(2):
        run.optimizer.step(closure)
        run.params[1].grad.fill_(7.0)  # a view of the optimizer's vector by now; None from the closure still wins
    alone = Run(LBFGS, loss, start).step(2)
    # Zeros at the end of the vectors change the order of summation only.
    torch.testing.assert_close(run.params[0].detach(), alone.x, rtol=1e-8, atol=1e-8)
    assert torch.equal(run.params[1].detach(), torch.ones(3).double())


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_parameters_of_any_layout():
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start)
    run.params = [run.params[0].detach().t().contiguous().t().requires_grad_(), *run.params[1:]]
    assert not run.params[0].is_contiguous()
    run.optimizer = LBFGS(run.params)
    expected = Run(LBFGS, loss, start).step(2)
    # Another layout, another kernel for x @ w1: rounding, amplified over two steps as in the trajectory tests.
    torch.testing.assert_close(run.step(2).x, expected.x, rtol=1e-6, atol=1e-6)


# Transfers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("lrs", [[1.0] * 4, [1.0, 0.5, 0.5, 1.0]])
def test_one_transfer_per_evaluation(line_search_fn, lrs, maximize, monkeypatch):
    """As on a GPU, whose way of reading is taken here on the CPU; the reference backend would show its own reads."""
    loss, _ = PROBLEMS["mlp"]
    run = grouped(lrs, line_search_fn=line_search_fn, maximize=maximize, history_size=4)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        run.optimizer.zero_grad()
        value = -loss(run.params) if maximize else loss(run.params)
        value.backward()
        return value

    with secant.use_backend("reference"):
        run.optimizer._bind()
        run.optimizer._packed = True
        for _ in range(3):
            with Reads(monkeypatch) as reads:
                run.optimizer.step(closure)
            monkeypatch.undo()
            assert reads.count == evaluations > 10
            evaluations = 0


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_reading_together_does_not_change_the_run(problem, line_search_fn):
    plain = Run(LBFGS, *PROBLEMS[problem], line_search_fn=line_search_fn, max_iter=25).step(4)
    packed = Run(LBFGS, *PROBLEMS[problem], line_search_fn=line_search_fn, max_iter=25)
    packed.optimizer._bind()
    packed.optimizer._packed = True
    packed.step(4)
    assert torch.equal(plain.x, packed.x)
    # A call that stops before a search learns so after its first trial.
    extra = len(packed.points) - len(plain.points)
    assert 0 <= extra <= (4 if line_search_fn else 0)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "LBFGS: lr: expected a finite number >= 0"),
        ({"lr": math.nan}, ValueError, "LBFGS: lr: expected"),
        ({"lr": torch.ones(2)}, ValueError, "LBFGS: lr: expected .* a tensor of one"),
        ({"max_iter": 0}, ValueError, "LBFGS: max_iter: expected an integer >= 1"),
        ({"max_iter": 2.5}, ValueError, "LBFGS: max_iter: expected an integer"),
        ({"max_eval": 0}, ValueError, "LBFGS: max_eval: expected None or an integer >= 1"),
        ({"max_eval": 1, "line_search_fn": "strong_wolfe"}, ValueError, "LBFGS: max_eval: expected .* >= 2"),
        ({"tolerance_grad": -1.0}, ValueError, "LBFGS: tolerance_grad: expected a finite number >= 0"),
        ({"tolerance_change": math.nan}, ValueError, "LBFGS: tolerance_change: expected"),
        ({"tolerance_grad_rel": "1"}, ValueError, "LBFGS: tolerance_grad_rel: expected"),
        ({"tolerance_change_rel": math.inf}, ValueError, "LBFGS: tolerance_change_rel: expected"),
        ({"history_size": 0}, ValueError, "LBFGS: history_size: expected an integer, 1 to 256"),
        ({"history_size": 257}, ValueError, "LBFGS: history_size: expected an integer, 1 to 256"),
        ({"line_search_fn": "wolfe"}, ValueError, "LBFGS: line_search_fn: expected None or 'strong_wolfe'"),
        ({"maximize": 1}, ValueError, "LBFGS: maximize: expected True or False"),
        ({"history_dtype": torch.float16}, ValueError, "LBFGS: history_dtype: expected None, torch.float32"),
        ({"curvature_tol": 1.0}, ValueError, r"LBFGS: curvature_tol: expected None or a number in \[0, 1\)"),
    ],
    ids=str,
)
def test_invalid_options(options, error, message):
    with pytest.raises(error, match=message):
        LBFGS([parameter(3)], **options)
    with pytest.raises(error, match=message):
        LBFGS([{"params": [parameter(3)], **options}])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty parameter list"),
        ([{"params": []}], ValueError, "LBFGS: params: expected at least one parameter in every group"),
        ([{"params": [parameter(3)]}, {"params": []}], ValueError, "LBFGS: params: expected at least one parameter"),
        (parameter(3), TypeError, "iterable of Tensors"),
        ([parameter(2), parameter(2, dtype=torch.float32)], TypeError, r"params\[1\]: expected dtype torch.float64"),
        ([parameter(2, dtype=torch.bfloat16)], TypeError, r"params\[0\]: expected dtype float32 or float64"),
        ([parameter(2, dtype=torch.float16)], TypeError, r"params\[0\]: expected dtype float32 or float64"),
        ([parameter(2, dtype=torch.complex128)], TypeError, r"params\[0\]: .*complex is not supported"),
        ([parameter(2), parameter(2, device="meta")], ValueError, r"params\[1\]: expected device cpu"),
        ([{"params": [parameter(2)]}, {"params": [parameter(2)], "max_iter": 3}], ValueError, "max_iter: .*only lr"),
    ],
    ids=[
        "no-params", "empty-group", "empty-second-group", "a-tensor", "mixed-dtypes", "bfloat16", "float16", "complex",
        "mixed-devices", "unequal-option",
    ],
)  # fmt: skip
def test_invalid_parameters(params, error, message):
    with pytest.raises(error, match=message):
        LBFGS(params)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice():
    p = parameter(3)
    with pytest.raises(ValueError, match="LBFGS: params: expected distinct tensors"):
        LBFGS([p, p])


def test_parameters_without_elements():
    with pytest.raises(ValueError, match="LBFGS: params: expected at least one element"):
        LBFGS([parameter(0)]).step(lambda: 0.0)


def test_invalid_closures():
    p = parameter(3)
    optimizer = LBFGS([p])
    with pytest.raises(TypeError, match="closure: expected a function that returns the loss, got None"):
        optimizer.step(None)
    with pytest.raises(TypeError, match="closure: expected it to return the loss, got None"):
        optimizer.step(lambda: None)
    for bad in ("1.0", torch.ones(2), torch.tensor(1j), [1.0]):
        with pytest.raises(TypeError, match="closure: expected it to return a number or a tensor of one"):
            optimizer.step(lambda bad=bad: bad)
    assert torch.equal(p.detach(), torch.ones(3).double())


def test_sparse_gradients():
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = LBFGS(table.parameters())
    before = table.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 3])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"params\[0\].grad: expected a dense gradient"):
        optimizer.step(closure)
    assert torch.equal(table.weight.detach(), before)
