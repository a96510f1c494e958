"""Training on mini-batches: tasks, runs with known answers, tuning, what is kept, rows and bars."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import secant
from secant.__main__ import main
from secant.benchmarks import cart_pole
from secant.benchmarks import training_optimizers as opts
from secant.benchmarks import training_runs as runs_module
from secant.benchmarks import training_tasks as tasks
from secant.benchmarks.case import Row, find
from secant.benchmarks.families import Choice
from secant.benchmarks.families import training as family
from secant.benchmarks.families.training import Noise, Solving, Training, noise_rows, tuned_rows
from secant.benchmarks.report import as_json, losses, plain_row
from secant.benchmarks.timing import Timing
from secant.benchmarks.training_optimizers import ADAMW, AT_DEFAULT, FLAGSHIP, MUON, NATURAL, OFTEN, RAW, Entry, factor
from secant.benchmarks.training_runs import Key, Ledger, Run, train

CPU = torch.device("cpu")
ABOUT = {"cpu": "a processor", "threads": 1, "python": "3", "torch": "2", "device": "cpu"}


def sgd(rates=(0.1, 0.3, 1.0), name="plain SGD", **options):
    """Make an entry for gradient descent; what is not decayed is the gradient alone."""
    return Entry(name, "peer", lambda task, rate: torch.optim.SGD(task.model.parameters(), rate, **options), rates)


# --- tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_seed_decides_start_and_batches_and_leaves_the_global_generator(name):
    if name in family.DIGITS:
        pytest.importorskip("sklearn")
    state = torch.get_rng_state()
    one = tasks.TASKS[name](1, CPU)
    torch.manual_seed(123)
    same, other = (tasks.TASKS[name](seed, CPU) for seed in (1, 2))
    torch.set_rng_state(state)
    for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    if name not in ("rotated", "axis-aligned"):  # which start at zero
        pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
    values = [float(task.loss(task.draw()).detach()) for task in (one, same, other)]
    assert values[0] == values[1]
    if name not in ("rotated", "axis-aligned"):
        assert values[0] != values[2]
    assert one.error() == same.error()
    assert math.isfinite(one.error())


def test_every_task_has_a_gradient_for_every_parameter():
    pytest.importorskip("sklearn")
    for make in tasks.TASKS.values():
        task = make(0, CPU)
        task.loss(task.draw()).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in task.model.parameters())


def test_the_transformer_looks_back_only_and_begins_with_all_characters_alike():
    task = tasks.Characters(0, CPU)
    size = tasks.text().size
    widths = 2 * (4 * 64 * 64 + 4 * 64 + 2 * 4 * 64 * 64 + 5 * 64 + 4 * 64)
    assert sum(p.numel() for p in task.model.parameters()) == widths + 2 * 64 + 64 * 64 + size * (2 * 64 + 1)
    x, y = task.draw()
    assert x.shape == y.shape == (16, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])  # the next character
    logits = task.model(x)
    changed = x.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % size
    torch.testing.assert_close(task.model(changed)[:, :40], logits[:, :40])
    assert not torch.allclose(task.model(changed)[:, 40:], logits[:, 40:], atol=1e-3)
    # Logits of variance v cost v / 2 above log(size); those of a normalised input and a layer's initial weights 1/3.
    assert task.error() == pytest.approx(math.log(size) + 1.0 / 6.0, abs=0.2)
    assert len(task.rest) + len(task.train) == len(tasks.text().train) + len(tasks.text().validation)


def test_second_derivatives_of_the_transformer_exist():
    task = tasks.Characters(0, CPU)
    params = list(task.model.parameters())
    grads = torch.autograd.grad(task.loss(task.draw()), params, create_graph=True)
    products = torch.autograd.grad(sum(g.sum() for g in grads), params)
    assert all(bool(p.isfinite().all()) for p in products)


def test_passages_to_train_on_and_the_rest_share_nothing():
    found = tasks._topics()
    assert found.classes == len(found.labels.unique()) == len(found.rest_labels.unique())
    length = tasks.PASSAGE - 2
    last = {int(k): int(found.starts[found.labels == k].max()) for k in range(found.classes)}
    for k in range(found.classes):
        assert last[k] + length <= int(found.rest_starts[found.rest_labels == k].min())
    task = tasks.Topics(0, CPU)
    x, y = task.draw()
    assert x.shape == (64, length)
    assert y.shape == (64,)
    assert int(x.max()) < tasks.TRIGRAMS


def test_a_rotation_changes_the_columns_and_nothing_else():
    rotated, straight = tasks.Rotated(0, CPU), tasks.AxisAligned(0, CPU)
    assert torch.equal(rotated.data.y, straight.data.y)
    gram = [task.data.x.double().T @ task.data.x.double() / len(task.data.x) for task in (rotated, straight)]
    values = [torch.linalg.eigvalsh(g) for g in gram]
    # Entries are float32: a Gram matrix of norm 1 is exact to its rounding.
    assert torch.allclose(*values, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    off = [float((g - torch.diag(g.diagonal())).abs().max()) for g in gram]
    assert off[0] > 3 * off[1]


def test_batches_of_the_quadratic_have_its_curvature():
    task = tasks.Quadratic(0, CPU)
    drawn = [task.draw() for _ in range(500)]
    rows, errors = torch.cat([a for a, _ in drawn]).double(), torch.cat([e for _, e in drawn]).double()
    count = len(rows)
    assert rows.shape == (500 * task.batch, task.side**2)
    covariance, a = rows.T @ rows / count, task.curvature.double()
    # The error of an entry of a sampled covariance is sqrt((a_ii a_jj + a_ij^2) / count); 6 of them, 65,536 entries.
    bound = 6.0 * ((a.diagonal().outer(a.diagonal()) + a * a) / count).sqrt()
    assert bool(((covariance - a).abs() <= bound).all())
    assert float(errors.square().mean()) == pytest.approx(task.noise**2, rel=6.0 * math.sqrt(2.0 / count))
    values = torch.linalg.eigvalsh(a)
    assert float(values[-1]) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(values[0])) < 1e-5  # 1e-6 to the rounding of float32
    assert task.error() == pytest.approx(1.0, abs=1e-6)
    # Of one row: half of (a.x - e)^2.
    x, (row, error) = task.model.x.detach().flatten(), (drawn[0][0][:1], drawn[0][1][:1])
    want = 0.5 * (float(row[0].double() @ x.double()) - float(error)) ** 2
    assert float(task.loss((row, error)).detach()) == pytest.approx(want, rel=1e-4)


def test_residuals_of_fresh_points_are_those_of_the_loss():
    task = tasks.FreshPoints(0, CPU)
    one, other = task.draw(), task.draw()
    assert not torch.equal(one.inside, other.inside)
    r = torch.cat(task.residuals(one))
    assert float(task.loss(one).detach()) == pytest.approx(0.5 * float((r * r).sum().detach()), rel=1e-12)


def test_the_pole_by_hand():
    """From rest, upright, a push to the right: the cart accelerates, the pole turns back, nothing has moved yet."""
    after = cart_pole.advance(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]))[0]
    push = 10.0 / 1.1
    turn = -push / (0.5 * (4.0 / 3.0 - 0.1 / 1.1))
    want = [0.0, 0.02 * (push - 0.05 * turn / 1.1), 0.0, 0.02 * turn]
    assert after.tolist() == pytest.approx(want, rel=1e-14)
    states = torch.tensor([[2.41, 0, 0, 0], [0, 9, 0.2, 9], [-2.39, 9, -0.2, 9], [0, 0, -0.21, 0]], dtype=torch.float64)
    assert cart_pole.over(states).tolist() == [True, False, False, True]


def test_the_pole_moves_as_that_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("CartPole-v1").unwrapped
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        env.reset(seed=seed)
        state = torch.tensor([[float(x) for x in env.state]], dtype=torch.float64)
        done, steps = False, 0
        while not done and steps < 200:
            action = torch.randint(2, (1,), generator=generator)
            _, reward, done, _, _ = env.step(int(action))
            state = cart_pole.advance(state, action)
            assert state[0].tolist() == pytest.approx([float(x) for x in env.state], rel=1e-9, abs=1e-12)
            assert bool(cart_pole.over(state)) == done
            assert reward == 1.0
            steps += 1
        assert done
    spec = gymnasium.spec("CartPole-v1")
    assert (spec.max_episode_steps, spec.reward_threshold) == (cart_pole.STEPS, cart_pole.SOLVED)


class Constant(nn.Module):
    """A policy that always gives the same logits."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), 2)


def test_what_was_played():
    """Always to the left the pole falls after 8 to 10 steps; a mean over one episode leaves no advantage."""
    played = cart_pole.play(Constant(100.0, -100.0), 6, torch.Generator().manual_seed(0))
    assert bool((played.actions == 0).all())
    assert all(8 <= x <= 10 for x in played.returns.tolist())
    assert len(played.states) == len(played.actions) == len(played.advantages) == played.returns.sum()
    assert float(played.advantages.double().square().mean()) == pytest.approx(1.0, abs=1e-6)
    alone = cart_pole.play(Constant(0.0, 0.0), 1, torch.Generator().manual_seed(0))
    assert float(alone.advantages.abs().max()) == 0.0


def test_advantages_are_discounted_sums_less_their_means():
    """Of two episodes of 8 and 9 steps, by hand."""
    generator = torch.Generator().manual_seed(1)
    played = cart_pole.play(Constant(100.0, -100.0), 2, generator, discount=0.5)
    lengths = [int(x) for x in played.returns]
    sums = [[sum(0.5**k for k in range(n - t)) for n in lengths if t < n] for t in range(max(lengths))]
    raw = [x - sum(row) / len(row) for row in sums for x in row]
    scale = math.sqrt(sum(x * x for x in raw) / len(raw) - (sum(raw) / len(raw)) ** 2)
    if scale == 0.0:
        pytest.skip("both fell at once")
    want = [x / (scale + 1e-8) for x in raw]
    assert played.advantages.tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)


# --- optimizers and their rates


def test_every_ladder_has_as_many_rates_and_the_default_in_its_middle():
    for name in tasks.TASKS:
        for entry in opts.entries(name).values():
            assert len(entry.rates) == (1 if entry.name in (FLAGSHIP + AT_DEFAULT, OFTEN) else opts.RATES)
            assert list(entry.rates) == sorted(entry.rates)
    assert opts.ladder(0.01) == (0.001, 0.003, 0.01, 0.03, 0.1)
    assert opts.entries("mlp")[ADAMW].rates == (0.001, 0.003, 0.01, 0.03, 0.1)
    assert opts.entries("rotated")[ADAMW].rates == (0.01, 0.03, 0.1, 0.3, 1.0)


class Halving(torch.optim.SGD):
    """Stands for one of ours."""

    def __init__(self, params, lr=0.5, *, update_every=20):
        super().__init__(params, lr)
        self.update_every = update_every


def test_ours_are_those_of_this_version(monkeypatch):
    for name in opts.OURS:
        monkeypatch.delattr(secant.optim, name, raising=False)
    assert not {*opts.OURS} & opts.entries("characters").keys()
    assert opts.absent()[0] == f"{', '.join(opts.OURS)}: not in this version"
    monkeypatch.setattr(secant.optim, FLAGSHIP, Halving, raising=False)
    found = opts.entries("characters")
    assert list(found)[:3] == [FLAGSHIP + AT_DEFAULT, OFTEN, FLAGSHIP]
    assert found[FLAGSHIP].rates == (0.05, 0.15, 0.5, 1.5, 5.0)
    assert found[FLAGSHIP + AT_DEFAULT].rates == (0.5,)
    assert found[FLAGSHIP + AT_DEFAULT].kept == found[FLAGSHIP].kept  # a run of both is made once
    task = tasks.Quadratic(0, CPU)
    assert found[OFTEN].make(task, 0.1).update_every == opts.EVERY
    assert found[FLAGSHIP].make(task, 0.1).param_groups[0]["lr"] == 0.1
    assert found[FLAGSHIP].make(task, None).param_groups[0]["lr"] == 0.5
    assert OFTEN not in opts.entries("mlp")
    monkeypatch.setattr(secant.optim, "Sophia", Halving, raising=False)
    assert opts.entries("mlp")["Sophia"].rates == opts.entries("mlp")[ADAMW].rates
    assert opts.entries("rotated")[FLAGSHIP].rates == (0.5, 1.5, 5.0, 15.0, 50.0)
    monkeypatch.setattr(secant.optim, "KFAC", Halving, raising=False)
    assert "KFAC" in opts.entries("mlp")
    assert "KFAC" not in opts.entries("quadratic")


def test_the_rate_rises_and_falls():
    got = [factor(k, 100) for k in range(100)]
    assert got[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert got[5] == 1.0
    assert got[5 + 95 // 2] == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert got[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 94 / 95)))
    assert got[5:] == sorted(got[5:], reverse=True)


def test_muon_has_the_matrices_and_adamw_the_rest():
    model = tasks.Transformer(10, 8, 4, 1, 2)
    together = opts.entries("characters")[MUON].make(SimpleNamespace(model=model), 0.02)
    assert [group["lr"] for group in together.param_groups] == [0.02, 0.02 * opts.REST]
    matrices, rest = (group["params"] for group in together.param_groups)
    assert {p.ndim for p in matrices} == {2}
    assert {p.ndim for p in rest} == {1}
    assert {id(p) for p in (*matrices, *rest)} == {id(p) for p in model.parameters()}


def test_state_counts_the_tensors_of_a_checkpoint():
    model = nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert opts.state_bytes(optimizer) == 2 * 4 * 110 + 2 * 4  # two moments, and a count for each tensor
    other = torch.optim.SGD([torch.zeros(3)], 0.1)
    other.state[other.param_groups[0]["params"][0]] = {"object": SimpleNamespace(parts=[torch.zeros(5), (1, None)])}
    assert opts.state_bytes(opts.Together([optimizer, other])) == opts.state_bytes(optimizer) + 4 * 5


# --- runs


@pytest.fixture
def exact(monkeypatch):
    """Let the loss of a step be that of all there is."""

    def outputs(task, batch):
        return task.model(), task._value(task.model())

    monkeypatch.setattr(tasks.Quadratic, "outputs", outputs)


def test_gradient_descent_on_the_quadratic_is_its_closed_form(exact):
    """x_i shrinks by 1 - lr_k h_i at each step, whatever the others do."""
    rate, steps = 0.7, 40
    run = train("quadratic", sgd(), rate, 3, CPU, steps)
    task = tasks.Quadratic(3, CPU)
    values, vectors = torch.linalg.eigh(task.curvature.double())
    x = vectors.T @ task.model.x.detach().double().flatten()
    start = float((values * x * x).sum())
    want, at = {0: 1.0}, x
    for k in range(steps):
        at = at * (1.0 - rate * factor(k, steps) * values)
        want[k + 1] = float((values * at * at).sum()) / start
    assert [step for step, _, _ in run.curve] == [0, 10, 20, 30, 40]
    # A gradient in float32 is off by about sqrt(n) roundings of its largest term, and so is x after `steps` of them.
    bound = steps * math.sqrt(256) * torch.finfo(torch.float32).eps
    for step, _, error in run.curve:
        assert error == pytest.approx(want[step], abs=bound)
    assert run.final == run.curve[-1][2]
    assert run.failure == ""
    assert run.state == 0.0
    assert [seconds for _, seconds, _ in run.curve] == sorted(seconds for _, seconds, _ in run.curve)
    assert 0.0 < run.inside < run.seconds


def test_at_its_defaults_a_rate_is_constant(exact):
    constant = Entry("c", "peer", lambda task, rate: torch.optim.SGD(task.model.parameters(), 0.7), (0.7,))
    run = train("quadratic", constant, None, 3, CPU, 20)
    task = tasks.Quadratic(3, CPU)
    values, vectors = torch.linalg.eigh(task.curvature.double())
    x = vectors.T @ task.model.x.detach().double().flatten()
    want = float((values * (1.0 - 0.7 * values) ** 40 * x * x).sum() / (values * x * x).sum())
    assert run.final == pytest.approx(want, abs=20 * 16 * torch.finfo(torch.float32).eps)


def test_runs_that_diverge_say_why(exact):
    run = train("quadratic", sgd(), 10.0, 0, CPU, 400)
    assert run.failure.startswith("not finite by step ")
    assert run.steps < 400
    assert run.final == math.inf
    up = train("quadratic", sgd(maximize=True), 0.1, 0, CPU, 20)
    assert up.failure == "ends above its start"
    assert up.final == math.inf

    def broken(task, rate):
        optimizer = torch.optim.SGD(task.model.parameters(), rate)
        optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        return optimizer

    run = train("quadratic", Entry("b", "peer", broken, (0.1,)), 0.1, 0, CPU, 20)
    assert run.failure == "ZeroDivisionError at step 1: division by zero"


def test_a_closure_is_what_the_optimizer_asks_for():
    natural = opts.entries("pinn")[NATURAL]
    run = train("pinn", natural, 1.0, 0, CPU, 40)
    assert run.failure == ""
    # Gauss-Newton steps of 257 parameters and 360 residuals: 1e-3 and less of the start.
    assert run.final < 0.01 * run.curve[0][2]
    policy = opts.entries("cartpole")[NATURAL]
    run = train("cartpole", policy, 1.0, 0, CPU, 3)
    assert run.failure == ""
    assert [step for step, _, _ in run.curve] == [0, 1, 2, 3]


class Graphs(torch.optim.SGD):
    """Wants the graph of every second step, and notes where it had one."""

    is_second_order = True

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.had = []

    @property
    def needs_graph(self):
        return len(self.had) % 2 == 0

    def step(self, closure):
        loss = closure()
        self.had.append(self.param_groups[0]["params"][0].grad.requires_grad)
        with torch.no_grad():
            super().step()
        return loss


def test_a_graph_is_kept_where_it_is_needed():
    kept = []

    def make(task, rate):
        kept.append(Graphs(task.model.parameters(), rate))
        return kept[-1]

    train("quadratic", Entry("g", "backend", make, (0.1,)), 0.1, 0, CPU, 4)
    assert kept[0].had == [True, False, True, False]
    assert runs_module.keeps_graph(SimpleNamespace(is_second_order=True))
    assert not runs_module.keeps_graph(torch.optim.SGD([torch.zeros(1)], 0.1))


def test_a_run_that_gets_there_is_over(monkeypatch, exact):
    monkeypatch.setattr(tasks.Quadratic, "target", 0.5)
    run = train("quadratic", sgd(), 1.0, 0, CPU, 1000)
    assert run.steps < 1000
    assert run.curve[-1][2] <= 0.5
    assert run.curve[-2][2] > 0.5
    assert run.reached(0.5) == run.curve[-1][:2]


def test_when_a_run_was_where():
    curve = ((0, 0.0, 3.0), (10, 1.0, 2.0), (20, 2.0, 1.0), (30, 3.0, 1.5))
    run = Run(Key("quadratic", "x", 0.1, 0, 30), curve, 1.0, 2.0)
    assert run.reached(2.0) == (10, 1.0)
    assert run.reached(0.5) is None
    assert [run.at(t) for t in (0.0, 0.99, 1.0, 2.5, 99.0)] == [3.0, 3.0, 2.0, 1.0, 1.5]
    assert (run.steps, run.seconds, run.final) == (30, 3.0, 1.5)
    assert run._replace(failure="x").final == math.inf


def test_the_optimizer_is_not_charged_for_the_closure(monkeypatch):
    """On a clock of the test: 3 seconds before the closure, 10 in it, 4 after."""
    now = [0.0]
    clock = SimpleNamespace(mark=lambda: now[0], wait=lambda: None, seconds=lambda a, b: b - a)
    monkeypatch.setattr(runs_module, "clock_for", lambda device: clock)

    class Slow(torch.optim.SGD):
        def step(self, closure):
            now[0] += 3.0
            loss = closure()
            now[0] += 4.0
            super().step()
            return loss

    def loss(self, batch, original=tasks.Quadratic.loss):
        now[0] += 10.0
        return original(self, batch)

    monkeypatch.setattr(tasks.Quadratic, "loss", loss)
    entry = Entry("s", "peer", lambda task, rate: Slow(task.model.parameters(), rate), (0.1,))
    assert train("quadratic", entry, 0.1, 0, CPU, 12).inside == 12 * 7.0


# --- tuning, rows, and what is kept


@pytest.fixture
def small(monkeypatch, exact):
    """Four optimizers on a few steps of the quadratic; counts the runs that are made."""
    made = []

    def train_and_count(op, entry, rate, seed, device, steps=None):
        if steps != family.WARM_UP_STEPS:
            made.append((entry.name, rate, seed))
        return train(op, entry, rate, seed, device, steps)

    ours = Entry("ours", "backend", sgd().make, (0.1, 0.5, 1.0))
    entries = [ours, *(sgd(rates, name) for name, rates in ((ADAMW, (0.01, 0.03, 0.1)), (MUON, (0.1, 0.2, 0.3))))]
    entries.append(sgd((1.0, 10.0, 100.0), "wild"))
    monkeypatch.setattr(family, "train", train_and_count)
    monkeypatch.setattr(family, "entries", lambda op: {x.name: x for x in entries})
    return made


CASES = [Training("quadratic", 20, 2, 3, goal) for goal in (ADAMW, MUON)]


def rows_with(path=None, allows=lambda label: True, **choice):
    advanced = []
    chosen = Choice(allows=allows, advance=lambda share, label: advanced.append(share), **choice)
    rows = tuned_rows(CASES, CPU, choice=chosen, ledger=Ledger(path, ABOUT))
    assert advanced == sorted(advanced)
    return rows


def test_rows_of_a_comparison(small):
    rows = rows_with()
    names = ["ours", ADAMW, MUON, "wild"]
    assert [(row.case.goal, row.name) for row in rows] == [(goal, name) for goal in (ADAMW, MUON) for name in names]
    assert len(small) == len(set(small)) == 4 * (3 + 1)
    seconds = [(name, seed) for name, _, seed in small if seed]
    assert seconds == [(name, 1) for name in (ADAMW, MUON, "ours", "wild")]  # in turns, after all rates
    ours, adamw = find(rows, CASES[0]), find(rows, CASES[0], ADAMW)
    for row in rows[:4]:  # the best rate by the first start, of gradient descent the largest that is stable
        tried = dict(row.figures["rates"])
        assert row.figures["rate"] == min(tried, key=tried.get)
    assert ours.figures["rate"] == 1.0
    assert adamw.figures["rate"] == 0.1
    assert ours.figures["steps"] < adamw.figures["steps"] == 20
    assert ours.correct
    assert adamw.error == 1.0  # its own last loss, the lowest it has
    assert len(ours.timing.samples) == 2
    assert ours.figures["finals"] == [train("quadratic", sgd(), 1.0, seed, CPU, 20).final for seed in (0, 1)]
    wild = find(rows, CASES[0], "wild")
    assert wild.figures["diverged"] == 2
    assert "ends above its start, rate 10" in wild.note or "not finite" in wild.note
    assert "best rate at the end of its ladder" in adamw.note
    missed = find(rows, CASES[1], ADAMW)  # 0.1 does not get where 0.3 does
    assert missed.timing is None
    assert missed.note.startswith("0 of 2 starts")
    assert missed.figures["steps"] is None
    assert missed.error > 1.0
    assert "rates" not in missed.figures  # said once
    assert not [line for line in losses(rows) if "does not get there" in line]


def test_rows_and_bars_are_plain_data_of_one_shape(small):
    rows = rows_with()
    data = json.loads(json.dumps(as_json(rows, family.bars(rows, CPU), 1e10)))
    for row, plain in zip(rows, data["rows"], strict=True):
        assert row.case.parameters().items() <= plain.items()
        assert plain["unit"] == "run"
        assert plain["figures"].keys() == json.loads(json.dumps(dict(row.figures))).keys()
        assert ("curve" in plain) == (row.case is CASES[0])
        again = Row(row.case, row.name, row.kind, row.timing, row.error, row.tolerance, row.note, row.units, row.curve)
        assert plain_row(rows, again, 1e10).keys() == plain.keys() - {"figures"}
    ours = data["rows"][0]
    assert ours["speedup_over"].keys() == {ADAMW, MUON, "wild"}
    assert ours["curve"][0][1] == 1.0
    whole = {
        "rate", "steps", "steps_to", "finals", "seconds", "at_equal_seconds", "validation", "optimizer_ms", "model_ms",
        "state", "runs", "diverged", "rates", "by_step",
    }  # fmt: skip
    assert ours["figures"].keys() == whole


def test_fields_tell_the_classes_of_cases_apart():
    """Recorded rows are read by them."""
    fields = [{x.name for x in dataclasses.fields(kind)} for kind in (Training, Solving, Noise)]
    assert len({frozenset(x) for x in fields}) == 3


def test_a_benchmark_goes_on_where_it_was_stopped(small, tmp_path):
    whole = rows_with()
    everything = list(small)
    small.clear()
    path = tmp_path / "runs.jsonl"
    left_out = []

    def stops(label):
        if len(small) < 8:
            return True
        left_out.append(label)
        return False

    partial = rows_with(path, stops)
    assert {row.name for row in partial} < {row.name for row in whole}
    assert ADAMW in {row.name for row in partial}
    assert left_out == ["quadratic: ours", "quadratic: wild", f"quadratic: {MUON}"]
    before = list(small)
    with path.open("a") as file:
        file.write('{"about": {"cpu"')  # stopped while it wrote
    small.clear()
    resumed = rows_with(path)
    assert sorted([*before, *small]) == sorted(everything)  # nothing twice, nothing missing
    assert not set(before) & set(small)
    assert [(row.case, row.name) for row in resumed] == [(row.case, row.name) for row in whole]
    timed = {"seconds", "optimizer_ms", "model_ms", "at_equal_seconds"}
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.figures.items() if k not in timed} == {
            k: v for k, v in b.figures.items() if k not in timed
        }
        assert (a.error, a.correct) == (b.error, b.correct)
    small.clear()
    again = rows_with(path)
    assert small == []
    assert [plain_row(again, row, None) for row in again] == [plain_row(resumed, row, None) for row in resumed]


def test_kept_runs_are_of_this_machine_and_this_code(small, tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    rows_with(path)
    count = len(small)
    key = Key("quadratic", "ours", 1.0, 0, 20)
    assert key in Ledger(path, ABOUT)
    assert key not in Ledger(path, ABOUT | {"torch": "3"})
    assert key not in Ledger(path, ABOUT | {"threads": 2})
    versions = runs_module.versions()
    monkeypatch.setattr(runs_module, "versions", lambda: versions | {"backend": "another"})
    assert key not in Ledger(path, ABOUT)
    assert Key("quadratic", ADAMW, 0.1, 0, 20) in Ledger(path, ABOUT)
    small.clear()
    rows_with(path)
    assert {name for name, _, _ in small} == {"ours"}
    assert len(small) == count // 4


def test_what_is_chosen_runs_and_the_goals_always(small):
    rows = rows_with(optimizers=("ours",))
    assert {row.name for row in rows} == {"ours", ADAMW, MUON}
    small.clear()
    rows = rows_with(allows=lambda label: False)
    assert {row.name for row in rows} == {ADAMW}  # something to show


def test_groups_are_what_is_chosen():
    pytest.importorskip("sklearn")
    whole = family.FAMILY.groups(CPU)
    assert [cases[0].op for cases in whole] == [*tasks.TASKS, *family.NOISY]
    assert all(len({case.op for case in cases}) == 1 for cases in whole)
    chosen = family.choose(Choice(("topics", "cartpole", "noise"), starts=4)).groups(CPU)
    assert [(type(cases[0]), cases[0].op, cases[0].starts) for cases in chosen] == [
        (Training, "topics", 4), (Solving, "cartpole", 4), *((Noise, op, 20) for op in family.NOISY)
    ]  # fmt: skip
    assert tasks.HELD_OUT in tasks.TASKS


def test_noise_counts_what_diverges(monkeypatch):
    def half(task, rate):
        """Diverge from every other start."""
        return torch.optim.SGD(task.model.parameters(), 1e30 if task.generator.initial_seed() % 2 else 0.1)

    entries = [Entry("ours", "backend", sgd().make, (0.1,)), Entry("half", "peer", half, (0.1,))]
    entries[0] = entries[0]._replace(make=lambda task, rate: torch.optim.SGD(task.model.parameters(), 0.1))
    monkeypatch.setattr(family, "entries", lambda op: {x.name: x for x in entries})
    case = Noise("quadratic", 20, 4)
    rows = noise_rows([case], CPU, choice=Choice(), ledger=Ledger(None, ABOUT))
    assert [(row.name, row.figures["diverged"]) for row in rows] == [("ours", 0), ("half", 2)]
    assert rows[0].correct
    assert len(rows[0].timing.samples) == 4
    assert rows[1].timing is None
    assert rows[1].error == math.inf
    assert rows[1].note.startswith("2 of 4 diverge: ")


# --- bars and tables


def fabricated(case, name, kind, seconds, **figures):
    timing = None if seconds is None else Timing(seconds)
    return Row(case, name, kind, timing, 1.0 if timing else 2.0, 1.0, "", 1, (), figures)


def characters(monkeypatch, ours=True, **changes):
    monkeypatch.setattr(secant.optim, FLAGSHIP, Halving, raising=False)
    adamw, muon = (Training("characters", 600, 3, 5, goal) for goal in (ADAMW, MUON))
    name = FLAGSHIP + AT_DEFAULT
    figures = {"finals": [1.40, 1.43, 1.41], "steps": 240, "optimizer_ms": 1.1, "rates": [(1e-2, 1.4)]} | changes
    tried = [(1e-3, 9.0), (3e-3, 1.9), (1e-2, 1.4), (3e-2, 1.8), (0.1, 9.0)]
    theirs = {"steps": 600, "optimizer_ms": 0.5, "rates": [(3e-3, 2.0), (1e-2, 2.5)]}
    rows = [
        fabricated(adamw, name, "backend", (4.0, 5.0, 4.8), **figures),
        fabricated(adamw, OFTEN, "backend", (4.0, 5.0, 4.8), optimizer_ms=2.6),
        fabricated(adamw, FLAGSHIP, "backend", (4.0,), rates=tried),
        fabricated(adamw, ADAMW, "peer", (10.0, 10.2, 9.9), **theirs),
        fabricated(adamw, MUON, "peer", (6.0,), finals=[1.45, 1.47, 1.44], optimizer_ms=5.3),
        fabricated(muon, name, "backend", (9.5, 9.6, 9.7), steps=500),
        fabricated(muon, MUON, "peer", (12.0, 12.1, 11.9), steps=600),
    ]  # fmt: skip
    return rows if ours else [row for row in rows if not row.name.startswith(FLAGSHIP)]


def test_bars_of_the_transformer(monkeypatch):
    found = family.bars(characters(monkeypatch), CPU)
    values = [bar.measured for bar in found]
    assert values == pytest.approx([240 / 600, 4.8 / 10.0, 9.6 / 12.0, 0.03, 1.9 / 2.0, 1.1, 2.6])
    assert [bar.target for bar in found] == [0.45, 0.50, 0.90, 0.03, 1.0, 1.2, 2.5]
    assert [bar.met for bar in found] == [True, True, True, found[3].measured >= 0.03, True, True, False]
    assert [bar.at_least for bar in found] == [False, False, False, True, False, False, False]
    assert "torch Muon 5.3, AdamW 0.5 in the same run" in found[-1].measure


def test_bars_that_are_missed(monkeypatch):
    rows = characters(monkeypatch, finals=[1.40, 1.46, 1.41], steps=300)
    rows[0] = rows[0]._replace(timing=None)
    found = family.bars(rows, CPU)
    assert found[0].measured == found[1].measured == math.inf  # it did not get there from every start
    assert found[3].measured == pytest.approx(0.01)
    assert [bar.met for bar in found[:4]] == [False, False, True, False]


def test_bars_without_the_flagship_say_so(monkeypatch):
    rows = characters(monkeypatch, ours=False)
    monkeypatch.delattr(secant.optim, FLAGSHIP)
    found = family.bars(rows, CPU)
    assert len(found) == 7
    assert all(bar.measured is None for bar in found)
    assert {bar.verdict for bar in found} == {f"{FLAGSHIP} is not in this version"}
    short = [row._replace(case=dataclasses.replace(row.case, steps=4)) for row in rows]
    short.append(fabricated(Noise("mlp", 20, 1), RAW, "peer", (1.0,), diverged=0))
    short.append(fabricated(Solving("cartpole", 3, 1, 1), ADAMW, "peer", None, steps_to=[None]))
    assert family.bars(short, CPU) == []  # of a quick run nothing is claimed


def test_bars_of_the_autoencoder_the_noise_and_the_pole(monkeypatch):
    monkeypatch.setattr(secant.optim, FLAGSHIP, Halving, raising=False)
    auto, noise = Training("autoencoder", 1000, 3, 5, ADAMW), Noise("mlp", 300, 20)
    pole = Solving("cartpole", 120, 5, 5)
    rows = [
        fabricated(auto, FLAGSHIP + AT_DEFAULT, "backend", (1.0, 2.0, 3.0), finals=[0.29, 0.32, 0.3]),
        fabricated(auto, ADAMW, "peer", (5.0, 5.0, 5.0), steps=1000),
        fabricated(noise, "Shampoo", "backend", (1.0,), diverged=0),
        fabricated(noise, "KFAC", "backend", None, diverged=2),
        fabricated(noise, RAW, "peer", None, diverged=20),
        fabricated(pole, NATURAL, "backend", None, steps_to=[20, None, 30, 24, 22]),
        fabricated(pole, ADAMW, "peer", None, steps_to=[40, 50, 60, None, 45]),
    ]
    found = family.bars(rows, CPU)
    assert [bar.measured for bar in found] == pytest.approx([0.32, 2.0 / 5.0, 2.0, 20.0, 24 / 50])
    assert [bar.met for bar in found] == [False, True, False, True, True]
    rows[-1] = fabricated(pole, ADAMW, "peer", None, steps_to=[None, None, None, 40, 50])
    assert family.bars(rows, CPU)[-1].verdict == f"{ADAMW} does not solve it"
    rows[-2] = fabricated(pole, NATURAL, "backend", None, steps_to=[None, None, None, 40, 50])
    rows[-1] = fabricated(pole, ADAMW, "peer", None, steps_to=[40, 50, 60, None, 45])
    assert family.bars(rows, CPU)[-1].measured == math.inf


def test_tables_have_a_line_an_optimizer(small):
    rows = rows_with()
    [table] = family.tables("title", rows, None)
    assert [line[0] for line in table.rows] == ["ours", ADAMW, MUON, "wild"]
    line = dict(zip(table.columns, table.rows[0], strict=True))
    assert line["rate"] == "1"
    assert line[f"steps to {ADAMW}"] == "10"
    assert line["diverged"] == "0 of 4"
    assert line["state"] == "0x"
    assert dict(zip(table.columns, table.rows[1], strict=True))[f"steps to {MUON}"] == "-"
    rows[5] = rows[5]._replace(figures=rows[5].figures | {"steps_to": [None, 20]})
    again = family.tables("title", rows, None)[0]
    assert dict(zip(again.columns, again.rows[1], strict=True))[f"steps to {MUON}"] == "1 of 2"
    assert table.notes[-1].startswith("Not here: ") or not opts.absent()


def test_the_picture_has_a_line_an_optimizer(small, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from secant.benchmarks import plot

    plot.save_family(tmp_path / "x.png", rows_with(), None, "footer")
    pixels = imread(tmp_path / "x.png")[..., :3]
    third = pixels.shape[1] // 3
    for name in (ADAMW, MUON):
        colour = plot.COLORS[name][0]
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        for k in range(3):
            part = pixels[:, k * third : (k + 1) * third]
            assert int((abs(part - rgb).max(-1) < 0.02).sum()) > 200, (name, k)


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mlp"], "--tasks, --optimizers, --seeds and --runs are of --family training"),
        (["--family", "training", "--tasks", "mnist"], "argument --tasks: expected some of characters"),
        (["--family", "training", "--optimizers", "Adan"], "argument --optimizers: expected some of Shampoo"),
        (["--family", "training", "--seeds", "-1"], "argument --seeds: expected at least 1, got -1"),
    ],
)
def test_a_choice_that_cannot_be_is_a_wrong_argument(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_keeps_its_runs(tmp_path, capsys):
    path, kept = tmp_path / "x.json", tmp_path / "runs.jsonl"
    words = ["bench", "--quick", "--family", "training", "--tasks", "quadratic", "rotated"]
    words += ["--optimizers", "SGD, momentum", "--json", str(path), "--runs", str(kept)]
    assert main(words) == 0
    data = json.loads(path.read_text())
    found = data["families"]["training"]["rows"]
    assert {row["op"] for row in found} == {"quadratic", "rotated"}
    assert {row["by"] for row in found} == {ADAMW, MUON, "SGD, momentum"}
    lines = kept.read_text().splitlines()
    assert len(lines) == 2 * 3
    assert main(words) == 0
    assert kept.read_text().splitlines() == lines
    again = json.loads(path.read_text())["families"]["training"]["rows"]
    assert again == found  # with the seconds of the first time
    assert "Not here: " in capsys.readouterr().out or not opts.absent()


def test_a_call_for_all_families_leaves_out_those_that_take_an_hour(monkeypatch):
    from secant.cli import bench

    seen = []
    monkeypatch.setattr(bench, "run", lambda device, **options: seen.append(list(options["families"])))
    assert main(["bench"]) == main(["bench", "--quick"]) == main(["bench", "--family", "training"]) == 0
    assert "training" not in seen[0]
    assert "lbfgs" in seen[0]
    assert seen[1][-1] == "training"
    assert seen[2] == ["training"]
