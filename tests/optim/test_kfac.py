"""K-FAC's steps: those of a naive implementation; what its hooks see, what they leave, and what moves nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secant import curvature
from secant.optim import KFAC

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def backward(model, optimizer, x, y, loss=F.cross_entropy):
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    return value.detach()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


# The algorithm --------------------------------------------------------------------------------------------------------


class Naive:
    """The formulas of the class, layer by layer, for an `nn.Sequential` of Linear and Conv2d layers with biases."""

    def __init__(
        self, model, lr, damping=1e-2, relative_damping=True, graft="adam", kl_clip=None, weight_decay=0.0,
        update_every=10, factor_every=1, sharing="expand",
    ):  # fmt: skip
        self.__dict__.update(locals())
        self.layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.t = 0
        self.state = [
            {"m": 0.0, "v": 0.0, "A": 0.0, "S": 0.0, "w": 0.0, "inverses": None, "W": _matrix(m)} for m in self.layers
        ]

    def step(self, x, y):
        pairs, h = [], x
        for m in self.model:
            z = m(h)
            if m in self.layers:
                pairs.append((m, h.detach(), z))
            h = z
        params = [p for m in self.layers for p in (m.weight, m.bias)]
        found = torch.autograd.grad(F.cross_entropy(h, y), [z for _, _, z in pairs] + params)
        self.t += 1
        steps = []
        for (m, h, _), g, w, b, state in zip(
            pairs, found, found[len(pairs) :: 2], found[len(pairs) + 1 :: 2], self.state, strict=False
        ):
            G = torch.cat([w.flatten(1), b.unsqueeze(1)], 1)
            if self.t % self.factor_every == 0 or self.t in (1, 2, 4, 8)[: self.factor_every.bit_length()]:
                self.learn(m, h, g, state)
            steps.append((G, *self.direction(G, state)))
        if self.kl_clip is not None:
            total = sum(self.lr**2 * (D * G).sum() for G, D, _ in steps)
            nu = min(1.0, math.sqrt(self.kl_clip / total)) if total > 0 else 1.0
        with torch.no_grad():
            for m, (_, D, adam) in zip(self.layers, steps, strict=True):
                if self.graft == "adam":
                    D = D * adam.norm() / D.norm()
                elif self.kl_clip is not None:
                    D = nu * D
                for p in (m.weight, m.bias):
                    p.mul_(1 - self.lr * self.weight_decay)
                m.weight -= self.lr * D[:, :-1].reshape(m.weight.shape)
                m.bias -= self.lr * D[:, -1]

    def learn(self, m, h, g, state):
        if isinstance(m, nn.Conv2d):
            h, g = F.unfold(h, m.kernel_size, padding=m.padding, stride=m.stride).mT, g.flatten(2).mT
        else:
            h, g = h.unsqueeze(1), g.unsqueeze(1)
        h = torch.cat([h, torch.ones(*h.shape[:2], 1, dtype=F64)], 2)
        n = len(h)
        if self.sharing == "reduce":
            h, g = h.mean(1, keepdim=True), g.sum(1, keepdim=True)
        A, S = torch.einsum("npi,npj->ij", h, h) / (n * h.shape[1]), n * torch.einsum("npi,npj->ij", g, g)
        state["A"], state["S"] = 0.95 * state["A"] + 0.05 * A, 0.95 * state["S"] + 0.05 * S
        state["w"] = 0.95 * state["w"] + 0.05

    def direction(self, G, state):
        state["m"] = 0.9 * state["m"] + 0.1 * G
        state["v"] = 0.95 * state["v"] + 0.05 * G * G
        m, v = state["m"] / (1 - 0.9**self.t), state["v"] / (1 - 0.95**self.t)
        if self.t % self.update_every == 0 or self.t in [k for k in (1, 2, 4, 8) if k < self.update_every]:
            A, S = state["A"] / state["w"], state["S"] / state["w"]
            a, s = A.trace() / len(A), S.trace() / len(S)
            lam, pi = self.damping * (a * s if self.relative_damping else 1.0), (a / s).sqrt()
            eye_a, eye_s = torch.eye(len(A), dtype=F64), torch.eye(len(S), dtype=F64)
            state["inverses"] = (
                torch.linalg.inv(A + pi * math.sqrt(lam) * eye_a),
                torch.linalg.inv(S + math.sqrt(lam) / pi * eye_s),
            )
        a, s = state["inverses"]
        return s @ m @ a, m / (v.sqrt() + 1e-8)


def _matrix(m):
    return torch.cat([m.weight.detach().flatten(1), m.bias.detach().unsqueeze(1)], 1)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"lr": 0.02}),
        (mlp, {"lr": 0.02, "damping": 1e-3, "relative_damping": False, "weight_decay": 0.1, "update_every": 1}),
        (mlp, {"lr": 0.01, "graft": "none", "damping": 0.1, "update_every": 3}),
        (mlp, {"lr": 0.05, "graft": "none", "damping": 0.1, "kl_clip": 1e-3, "update_every": 7, "factor_every": 2}),
        (cnn, {"lr": 0.02, "factor_every": 3}),
        (cnn, {"lr": 0.02, "sharing": "reduce", "update_every": 4}),
    ],
    ids=["default", "absolute", "ungrafted", "clipped", "convolutions", "reduced"],
)
def test_fifty_steps_of_a_naive_implementation(make, options):
    model = make()
    other = copy.deepcopy(model)
    optimizer, naive = KFAC(model, **options), Naive(other, **options)
    start = weights(model)
    for _ in range(50):
        x, y = randn(16, 5) if make is mlp else randn(16, 1, 5, 5), torch.randint(3, (16,))
        backward(model, optimizer, x, y)
        optimizer.step()
        naive.step(x, y)
    assert error(weights(model), start) > 0.05
    # Inverses of condition 1e4 at most amplify rounding, 50 times, less than that.
    assert error(weights(model), weights(other)) < 1e-8


def test_one_whole_step_solves_linear_least_squares():
    model, x, y = nn.Linear(4, 2).double(), randn(30, 4), randn(30, 2)
    optimizer = KFAC(model, lr=1.0, betas=(0.0, 0.9), graft="none", curvature="ggn", damping=1e-13,
                     relative_damping=False)  # fmt: skip
    backward(model, optimizer, x, y, F.mse_loss)
    optimizer.step(outputs_closure=lambda: (out := model(x), F.mse_loss(out, y)))
    want = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=F64)], 1), y).solution
    # sqrt(lambda) = 3e-7 in either factor, beside eigenvalues near 1.
    assert error(torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach(), want.T) < 1e-5


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def test_digits_train_at_the_defaults():
    x, y = digits()
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer, losses = KFAC(model), []
        for _ in range(150):
            batch = torch.randint(len(x), (64,))
            losses.append(backward(model, optimizer, x[batch], y[batch]).item())
            optimizer.step()
        assert max(losses) < 1.2 * losses[0]
        assert sum(losses[-20:]) / 20 < 0.1  # where AdamW at its best rate has .2 to .4


def noisy_digits(seed):
    """A network with ReLU; batches of 32."""
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, x, y, F.cross_entropy


def noisy_labels(seed):
    """Labels of a linear model, a tenth of them wrong, features of scales from .1 to 10; batches of 32."""
    torch.manual_seed(seed)
    x = torch.randn(1000, 20) * torch.logspace(-1, 1, 20)
    y = ((x @ torch.randn(20) > 0.0) ^ (torch.rand(1000) < 0.1)).float().unsqueeze(1)
    model = nn.Linear(20, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model, x, y, F.binary_cross_entropy_with_logits


def descend(problem, seed, steps):
    """The loss over all data before and after, and the largest that a batch had."""
    model, x, y, loss = problem(seed)
    optimizer, largest = KFAC(model), 0.0
    begun = loss(model(x), y).item()
    for _ in range(steps):
        batch = torch.randint(len(x), (32,))
        largest = max(largest, backward(model, optimizer, x[batch], y[batch], loss).item())
        optimizer.step()
        assert torch.isfinite(weights(model)).all()
    return begun, loss(model(x), y).item(), largest


@pytest.mark.parametrize("problem", [noisy_digits, noisy_labels])
def test_no_divergence_at_the_defaults(problem):
    for seed in range(2):
        begun, ended, largest = descend(problem, seed, 150)
        assert ended < 0.9 * begun
        assert largest < 10.0 * begun + 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "share"), [(noisy_digits, 0.1), (noisy_labels, 0.75)])
def test_no_divergence_over_twenty_seeds(problem, share):
    """Of log 2 at the start the labels leave at least .33, the entropy of a tenth, and .45 where most overlap."""
    for seed in range(20):
        begun, ended, largest = descend(problem, seed, 300)
        assert ended < share * begun
        assert largest < 10.0 * begun + 1.0


# What the hooks see ---------------------------------------------------------------------------------------------------


class Circular(nn.Module):
    """Convolutions of every kind, groups, an embedding with padding, layers over sequences."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=0)
        self.plain = nn.Conv1d(6, 4, 3, padding="same", bias=False)
        self.grouped = nn.Conv1d(4, 6, 2, groups=2, stride=2, padding=1, padding_mode="circular", dilation=2)
        self.mixed = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        h = torch.tanh(self.plain(self.embed(tokens).mT))
        h = torch.tanh(self.grouped(h)).mT
        return self.head(torch.tanh(self.mixed(h)).mean(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_the_operator(sharing):
    model, tokens, y = Circular().double(), torch.randint(7, (6, 8)), torch.randint(3, (6,))
    params = list(model.parameters())
    K = curvature.KFAC.of(model, nn.CrossEntropyLoss(reduction="none"), tokens, y, curvature="empirical",
                          sharing=sharing)  # fmt: skip
    want = {f.slots[0]: f for f in K.factors()}
    optimizer = KFAC(model, factor_decay=0.0, sharing=sharing)
    backward(model, optimizer, tokens, y)
    optimizer.step()
    assert len(want) == 5
    for slot, f in want.items():
        state = optimizer.state[params[slot]]
        assert error(state["inputs"], f.inputs) < 1e-12
        assert error(state["outputs"], f.outputs) < 1e-12


@pytest.mark.parametrize("kind", ["fisher", "ggn"])
def test_factors_of_drawn_labels_come_from_the_operator(kind):
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    params = list(model.parameters())
    optimizer = KFAC(model, factor_decay=0.0, curvature=kind, factor_every=3)
    assert not any(m._forward_hooks for m in model.modules())
    calls = []

    def outputs():
        calls.append(1)
        out = model(x)
        return out, F.cross_entropy(out, y)

    for t in range(1, 7):
        want = curvature.KFAC(outputs, params, curvature=kind, seed=t - 1).factors()
        backward(model, optimizer, x, y)
        calls.clear()
        optimizer.step(outputs_closure=outputs)
        assert len(calls) == (t in (1, 2, 3, 6))
        if calls:
            for f in want:
                state = optimizer.state[params[f.slots[0]]]
                assert error(state["inputs"], f.inputs) < 1e-12
                assert error(state["outputs"], f.outputs) < 1e-12
    before = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        backward(model, optimizer, x, y)
        optimizer.step()  # none are due
    before, at = copy.deepcopy(optimizer.state_dict()), weights(model)
    with pytest.raises(ValueError, match=rf"KFAC.step: outputs_closure: expected a function .* for curvature '{kind}'"):
        optimizer.step()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(outputs_closure=lambda: 1 / 0)
    assert torch.equal(weights(model), at)
    after = optimizer.state_dict()
    assert all(torch.equal(x, after["state"][i][k]) for i, s in before["state"].items() for k, x in s.items())


def test_accumulated_gradients_are_those_of_one_batch():
    model, x, y = mlp(), randn(12, 5), torch.randint(3, (12,))
    states = []
    for parts in (1, 3):
        twin = copy.deepcopy(model)
        optimizer = KFAC(twin, factor_decay=0.0)
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(twin(a), b) / parts).backward()
        optimizer.step()
        states.append([optimizer.state[p] for p in twin.parameters() if p.dim() == 2])
    for one, other in zip(*states, strict=True):
        assert error(other["inputs"], one["inputs"]) < 1e-12
        assert error(other["outputs"], one["outputs"]) < 1e-12


def test_a_layer_that_is_called_twice_counts_its_samples_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model, x, y = Twice().double(), randn(5, 3), torch.randint(3, (5,))
    K = curvature.KFAC.of(model, nn.CrossEntropyLoss(reduction="none"), x, y, curvature="empirical")
    (f,), optimizer = K.factors(), KFAC(model, factor_decay=0.0)
    backward(model, optimizer, x, y)
    optimizer.step()
    state = optimizer.state[model.layer.weight]
    assert error(state["inputs"], f.inputs) < 1e-12
    assert error(state["outputs"], f.outputs) < 1e-12


def test_a_scaled_loss_has_the_same_factors():
    model, x, y = mlp().float(), torch.randn(9, 5), torch.randint(3, (9,))
    found = []
    for enabled in (False, True):
        twin = copy.deepcopy(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        optimizer = KFAC(twin, factor_decay=0.0, scaler=scaler)
        scaler.scale(F.cross_entropy(twin(x), y)).backward()
        scaler.step(optimizer)
        found.append((optimizer.state[twin[0].weight]["outputs"], weights(twin)))
    assert torch.equal(found[0][0], found[1][0])  # a power of two
    assert torch.equal(found[0][1], found[1][1])


def test_bfloat16_parameters_and_autocast_have_factors_in_float32():
    x, y = torch.randn(9, 5), torch.randint(3, (9,))
    model = mlp().float()
    half = copy.deepcopy(model).bfloat16()
    found = []
    for net, inputs, amp in ((model, x, False), (half, x.bfloat16(), False), (copy.deepcopy(model), x, True)):
        optimizer = KFAC(net, factor_decay=0.0)
        with torch.autocast("cpu", enabled=amp):
            loss = F.cross_entropy(net(inputs).float(), y)
            loss.backward()
            optimizer.step()
        state = optimizer.state[net[0].weight]
        assert all(t.dtype is torch.float32 for t in state.values())
        found.append(state)
    for state in found[1:]:  # bfloat16 has a relative rounding of 4e-3
        assert error(state["inputs"], found[0]["inputs"]) < 0.02
        assert error(state["outputs"], found[0]["outputs"]) < 0.1


# What they leave ------------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_go_by_close_by_a_block_by_an_exception_and_with_the_optimizer():
    model = mlp()
    own = model[0].register_forward_hook(lambda *_: None)
    optimizer = KFAC(model)
    assert hooks(model) == 5  # three layers, the model, and the program's own
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 1
    with pytest.raises(RuntimeError, match="within"), KFAC(model):
        raise RuntimeError("within")
    assert hooks(model) == 1
    optimizer = KFAC(model)
    del optimizer
    gc.collect()
    assert hooks(model) == 1
    own.remove()


def test_an_optimizer_that_was_closed_steps_with_the_factors_it_has():
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    optimizer = KFAC(model, update_every=1)
    backward(model, optimizer, x, y)
    optimizer.step()
    optimizer.close()
    before, at = optimizer.state[model[0].weight]["inputs"].clone(), weights(model)
    backward(model, optimizer, x, y)
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["inputs"], before)
    assert not torch.equal(weights(model), at)


def test_copies_and_pickles_of_the_model_are_free_of_the_optimizer():
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    optimizer = KFAC(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        F.cross_entropy(other(x), y).backward()
        assert not optimizer._capture.sums
        second = KFAC(other)
        assert hooks(other) == 4  # what was dead is gone
        second.close()
        assert hooks(other) == 0
    assert model.state_dict().keys() == {f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_both_continue_bit_for_bit(how):
    model, optimizer = mlp(), None
    optimizer = KFAC(model, update_every=3)
    batches = [(randn(9, 5), torch.randint(3, (9,))) for _ in range(8)]
    for x, y in batches[:4]:
        backward(model, optimizer, x, y)
        optimizer.step()
    both = (model, optimizer)
    twin, second = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for x, y in batches[4:]:
        for net, it in ((model, optimizer), (twin, second)):
            backward(net, it, x, y)
            it.step()
    assert torch.equal(weights(model), weights(twin))
    assert hooks(twin) == hooks(model) == 4


def test_a_saved_state_continues_bit_for_bit():
    model = Circular().double()
    options = {"update_every": 3, "factor_every": 2}
    optimizer = KFAC(model, **options)
    batches = [(torch.randint(7, (6, 8)), torch.randint(3, (6,))) for _ in range(12)]
    for x, y in batches[:5]:
        backward(model, optimizer, x, y)
        optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = Circular().double()
    second = KFAC([{"params": [p for p in other.named_parameters() if p[1].dim() == k]} for k in (3, 2, 1)],
                  model=other, **options)  # fmt: skip
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for x, y in batches[5:]:
        for net, it in ((model, optimizer), (other, second)):
            backward(net, it, x, y)
            it.step()
    assert torch.equal(weights(model), weights(other))


def test_two_hundred_steps_leave_no_tensor_behind():
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    optimizer, counts = KFAC(model), []
    for t in range(200):
        backward(model, optimizer, x, y)
        optimizer.step()
        with torch.no_grad():
            model(x)
        model(x)  # with a graph that is not gone back through
        if t in (20, 199):
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1]
    assert not optimizer._capture.sums
    assert not optimizer._directions


def test_the_memory_of_layers_is_what_the_documentation_says():
    model = nn.Sequential(nn.Linear(20, 30), nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Embedding(50, 8))
    optimizer = KFAC(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    sizes = {name: sum(x.numel() for k, x in optimizer.state[p].items() if k not in ("step", "gathered"))
             for name, p in model.named_parameters()}  # fmt: skip
    assert sizes["0.weight"] == 2 * 600 + 2 * 21**2 + 2 * 30**2
    assert sizes["0.bias"] == 2 * 30
    assert sizes["1.weight"] == 2 * 36 * 2 // 2 + 2 * 2 * 6**2 + 2 * 2 * 3**2  # two groups of six inputs, three outputs
    assert sizes["2.weight"] == 2 * 400 + 2 * 50 + 2 * 8**2
    text = " ".join(inspect.getdoc(KFAC).split())
    assert "2 (I + 1)^2 + 2 O^2 numbers with a bias" in text


# What moves nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", ["inputs", "loss"])
def test_a_batch_that_is_not_finite_leaves_the_factors(spoilt):
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    optimizer = KFAC(model, update_every=1)
    backward(model, optimizer, x, y)
    optimizer.step()
    names = ("inputs", "outputs", "inputs_inverse", "outputs_inverse", "gathered")
    before = {(i, k): optimizer.state[model[i].weight][k].clone() for i in (0, 2, 4) for k in names}
    optimizer.zero_grad()
    bad = x.clone()
    if spoilt == "inputs":
        bad[3, 2] = math.nan
    loss = F.cross_entropy(model(bad), y)
    (loss * (math.inf if spoilt == "loss" else 1.0)).backward()
    for p in model.parameters():
        p.grad.zero_()  # as a program may do that looks
    optimizer.step()
    for (i, k), want in before.items():
        if not k.endswith("_inverse"):
            assert torch.equal(optimizer.state[model[i].weight][k], want)
        else:  # found again, of the same
            assert error(optimizer.state[model[i].weight][k], want) < 1e-12
    assert torch.isfinite(weights(model)).all()


def test_a_layer_that_is_not_used_waits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x, right=False):
            return self.right(x) if right else self.left(x)

    model, x, y = Two().double(), randn(9, 5), torch.randint(3, (9,))
    optimizer = KFAC(model)
    before = model.right.weight.detach().clone()
    for _ in range(3):
        backward(model, optimizer, x, y)
        optimizer.step()
    assert torch.equal(model.right.weight, before)
    assert model.right.weight not in optimizer.state
    optimizer.zero_grad()
    F.cross_entropy(model(x, right=True), y).backward()
    optimizer.step()
    assert optimizer.state[model.right.weight]["step"].item() == 1
    assert optimizer.state[model.left.weight]["step"].item() == 3


def test_layers_without_an_inverse_take_adams_steps():
    """Gradients set by hand; a layer whose weight attention uses without calling it."""

    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(0))

    model = Attentive().double()
    other = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.1, update_every=1)
    adam = torch.optim.Adam(other.parameters(), lr=0.1, betas=(0.9, 0.95))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    adam.step()
    assert error(weights(model), weights(other)) < 1e-12
    x, y = randn(5, 6, 4), torch.randint(3, (6,))
    for net, it in ((model, optimizer), (other, adam)):
        backward(net, it, x, y)
        it.step()
    assert error(weights(model.attention), weights(other.attention)) < 1e-9
    assert error(weights(model.head), weights(other.head)) > 1e-3


def test_what_is_in_no_layer_takes_adams_steps():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, tokens):
            return self.head(self.norm(self.embed(tokens)).mean(1) * self.scale)

    model = Tied().double()
    other = copy.deepcopy(model)
    optimizer = KFAC(model, lr=0.02, weight_decay=0.1)
    adam = torch.optim.AdamW(other.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        tokens, y = torch.randint(7, (6, 3)), torch.randint(7, (6,))
        for net, it in ((model, optimizer), (other, adam)):
            backward(net, it, tokens, y)
            it.step()
    assert error(weights(model), weights(other)) < 1e-12


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_frozen_bias(when):
    model, x, y = mlp(), randn(9, 5), torch.randint(3, (9,))
    if when == "before":
        model[0].bias.requires_grad_(False)
    optimizer = KFAC(model)
    for _ in range(3):
        backward(model, optimizer, x, y)
        optimizer.step()
    model[0].bias.requires_grad_(False)
    at = model[0].bias.detach().clone()
    for _ in range(3):
        backward(model, optimizer, x, y)
        optimizer.step()
    assert torch.equal(model[0].bias, at)
    assert optimizer.state[model[0].weight]["inputs"].shape[-1] == 5 + (when == "later")
    copied = copy.deepcopy((model, optimizer))
    backward(copied[0], copied[1], x, y)
    copied[1].step()
    assert torch.isfinite(weights(copied[0])).all()


def test_a_subclass_with_a_forward_pass_of_its_own_and_large_layers_are_left_to_adam():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = nn.Sequential(Doubled(4, 5), nn.Linear(5, 40), nn.Linear(40, 3), nn.Embedding(100, 4)).double()
    optimizer = KFAC(model, max_size=39)
    assert [layer.name for layer in optimizer._layers] == ["3"]


def test_a_group_that_is_added_has_its_layers():
    model = mlp()
    optimizer = KFAC(list(model[0].named_parameters("0")), model=model)
    assert [layer.name for layer in optimizer._layers] == ["0"]
    x, y = randn(9, 5), torch.randint(3, (9,))
    backward(model, optimizer, x, y)
    optimizer.step()
    optimizer.add_param_group({"params": [(f"later.{n}", p) for n, p in model[2:].named_parameters()], "lr": 0.1})
    assert [layer.name for layer in optimizer._layers] == ["0", "2", "4"]
    assert hooks(model) == 4
    backward(model, optimizer, x, y)
    optimizer.step()
    assert [optimizer.state[model[i].weight]["step"].item() for i in (0, 2, 4)] == [2, 1, 1]
    assert float(optimizer.state[model[4].weight]["gathered"]) == pytest.approx(0.05)


# Processes and errors -------------------------------------------------------------------------------------------------


def _half(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x, y = mlp(), randn(8, 5), torch.randint(3, (8,))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = KFAC(parallel, update_every=2)
    for _ in range(5):
        backward(parallel, optimizer, x.chunk(2)[rank], y.chunk(2)[rank])
        optimizer.step()
    torch.save(weights(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_two_processes_take_the_steps_of_one(tmp_path):
    torch.multiprocessing.spawn(_half, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model, x, y = mlp(), randn(8, 5), torch.randint(3, (8,))
    optimizer = KFAC(model, update_every=2)
    for _ in range(5):
        backward(model, optimizer, x, y)
        optimizer.step()
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one, other)
    assert error(one, weights(model)) < 1e-10


def test_wrong_arguments_are_named():
    model = mlp()
    with pytest.raises(TypeError, match="KFAC: model: expected a module, in params or in model"):
        KFAC(model.parameters())
    with pytest.raises(ValueError, match="KFAC: model: expected None beside a module"):
        KFAC(model, model=model)
    with pytest.raises(ValueError, match=r"KFAC: damping: expected a finite number > 0, got 0\.0"):
        KFAC(model, damping=0.0)
    with pytest.raises(ValueError, match="KFAC: graft: expected 'adam' or 'none', got 'sgd'"):
        KFAC(model, graft="sgd")
    with pytest.raises(ValueError, match="KFAC: kl_clip: expected None or a finite number > 0"):
        KFAC(model, kl_clip=0.0)
    with pytest.raises(ValueError, match="KFAC: factor_every: expected 1 where steps are counted on the device"):
        KFAC(model, capturable=True, update_every=1, factor_every=2)
    with pytest.raises(TypeError, match="KFAC: scaler: expected a GradScaler"):
        KFAC(model, scaler=2.0**10)
    assert hooks(model) == 0
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match=r"KFAC\.step: outputs_closure: expected None for curvature 'empirical'"):
        optimizer.step(outputs_closure=lambda: model(randn(9, 5)))
    optimizer.close()
