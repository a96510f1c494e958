"""K-FAC and EKFAC: against the matrices that they are of where they are exact, and their formulas elsewhere."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, error
from secant.curvature import EKFAC, GGN, KFAC, EmpiricalFisher, EvaluatedPoint, Fisher, per_sample_gradients

F64 = torch.float64
BOTH = pytest.mark.parametrize("cls", [KFAC, EKFAC])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


def blocks_of(dense, params, slots):
    """The rows and columns of some parameters in a dense matrix."""
    starts = [0]
    for p in params:
        starts.append(starts[-1] + p.numel())
    places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in slots])
    return dense[places][:, places]


def kron(factors):
    """S (x) A in the order (weight, bias), of one group."""
    s, a = factors.outputs[0], factors.inputs[0]
    o, i = len(s), len(a) - 1
    places = torch.arange(o * (i + 1)).reshape(o, i + 1)
    order = torch.cat([places[:, :i].reshape(-1), places[:, i]])
    return torch.kron(s, a)[order][:, order]


def cross_entropy_roots(outputs):
    """For each class sqrt(p_c) (e_c - p), per row, over sqrt(N)."""
    p = torch.softmax(outputs.detach(), -1)
    return [
        p[:, c : c + 1].sqrt() * (F.one_hot(torch.tensor(c), p.shape[1]).to(p.dtype) - p) / math.sqrt(len(p))
        for c in range(p.shape[1])
    ]


# Where it is exact ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", [1, 7])
def test_a_linear_layer_and_squared_errors(cls, n):
    model, x, y = nn.Linear(4, 3).double(), randn(n, 4), randn(n, 3)
    args = model, nn.MSELoss(), x, y
    got, want = cls.of(*args), GGN.of(*args)
    assert error(got.to_dense(), want.to_dense()) < ROUNDING
    assert error(got.diag().value, want.diag().value) < ROUNDING
    assert got.trace().value == pytest.approx(float(want.diag().value.sum()), rel=1e-12)
    v = randn(15)
    assert error(got @ v, want @ v) < ROUNDING


@BOTH
def test_blocks_of_a_deep_linear_network(cls):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).double()
    params = list(model.parameters())
    args = model, nn.MSELoss(), randn(8, 4), randn(8, 2)
    got, want = cls.of(*args).to_dense(), GGN.of(*args).to_dense()
    for slots in ((0, 1), (2,), (3, 4)):
        assert error(blocks_of(got, params, slots), blocks_of(want, params, slots)) < ROUNDING
    assert got[:25, 25:].abs().max() == 0.0  # between layers there is nothing


@BOTH
def test_places_are_samples_where_each_has_outputs_of_its_own(cls):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    args = model, nn.MSELoss(), randn(6, 3, 4), randn(6, 3, 2)  # (samples, tokens, features)
    params = list(model.parameters())
    got, want = cls.of(*args, sharing="expand").to_dense(), GGN.of(*args).to_dense()
    if cls is KFAC:
        for slots in ((0, 1), (2, 3)):
            assert error(blocks_of(got, params, slots), blocks_of(want, params, slots)) < ROUNDING
    # By layer EKFAC has the moments of whole samples, on average over the signs of their places.


@BOTH
def test_places_are_averaged_where_the_outputs_average_them(cls):
    layers = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    model = lambda x: layers(x).mean(1)  # noqa: E731
    x, y = randn(6, 3, 4), randn(6, 2)

    def closure():
        outputs = model(x)
        return outputs, F.mse_loss(outputs, y)

    params = list(layers.parameters())
    got, want = cls(closure, params, sharing="reduce").to_dense(), GGN(closure, params).to_dense()
    for slots in ((0, 1), (2, 3)):
        assert error(blocks_of(got, params, slots), blocks_of(want, params, slots)) < ROUNDING
    if cls is KFAC:
        assert error(cls(closure, params).to_dense()[:25, :25], want[:25, :25]) > 0.01


@BOTH
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), lambda: nn.GroupNorm(2, 4),
        lambda: nn.BatchNorm1d(4).eval(),
    ],
)  # fmt: skip
def test_norms_have_the_blocks_themselves(cls, norm):
    layer = norm().double()
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 3)).double()
    if isinstance(layer, nn.BatchNorm1d):
        model.eval()
        layer.running_var.uniform_(0.5, 2.0)
    args = model, nn.CrossEntropyLoss(), randn(9, 3), torch.randint(3, (9,))
    got, want = cls.of(*args).to_dense(), GGN.of(*args).to_dense()
    params = list(model.parameters())
    for slot in range(2, 2 + len(list(layer.parameters()))):
        assert error(blocks_of(got, params, [slot]), blocks_of(want, params, [slot])) < ROUNDING


def test_a_batch_norm_in_training_takes_its_statistics_for_constants():
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    x, y = randn(5, 1, 4, 4), torch.randint(3, (5,))
    before = norm.running_mean.clone()
    K = KFAC.of(model, nn.CrossEntropyLoss(), x, y)
    got = K.to_dense()
    assert torch.equal(norm.running_mean, before)
    with torch.no_grad():
        z = model[0](x)
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    fixed = lambda x: F.batch_norm(x, mean, var, norm.weight, norm.bias, eps=norm.eps)  # noqa: E731
    params = list(model.parameters())

    def closure():
        outputs = model[4](model[3](model[2](fixed(model[0](x)))))
        return outputs, F.cross_entropy(outputs, y)

    want = GGN(closure, params).to_dense()
    for slot in (2, 3):  # below, gradients go through the statistics; here there is nothing between
        assert error(blocks_of(got, params, [slot]), blocks_of(want, params, [slot])) < ROUNDING


class Odd(nn.Module):
    """Parameters that are in no layer: computed, used in two ways, without a weight, more than 64."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.shift = nn.Parameter(torch.randn(3, 4))
        self.large = nn.Parameter(torch.randn(70))

    def forward(self, tokens):
        h = torch.tanh(self.norm(self.embed(tokens) + self.shift)).mean(1)
        return F.linear(h, self.embed.weight) + h.sum(1, keepdim=True) * self.large[:6] * self.large[6:12]


@BOTH
def test_what_is_in_no_layer_has_the_block_or_the_diagonal_itself(cls):
    model = Odd().double()
    args = model, nn.CrossEntropyLoss(), torch.randint(6, (8, 3)), torch.randint(6, (8,))
    params = list(model.parameters())
    got, want = cls.of(*args), GGN.of(*args).to_dense()
    assert [tuple(f.slots) for f in got.factors()] == []  # the bias of a computed weight is one of no layer
    got = got.to_dense()
    for slot, p in enumerate(params):
        mine, its = blocks_of(got, params, [slot]), blocks_of(want, params, [slot])
        assert error(mine, its if p.numel() <= 64 else torch.diag(its.diagonal())) < ROUNDING


@BOTH
def test_a_bias_alone_and_parameters_without_a_use(cls):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    x, y, unused = randn(5, 4), randn(5, 2), randn(3).requires_grad_()

    def closure():
        outputs = model(x)
        return outputs, F.mse_loss(outputs, y)

    K = cls(closure, [model[1].bias, unused])
    want = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64))
    assert error(K.to_dense(), want) < ROUNDING
    assert K.inverse(damping=0.5).to_dense().diagonal().tolist() == pytest.approx([2 / 3, 2 / 3, 2.0, 2.0, 2.0])


# Formulas -------------------------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def naive_factors(model, x, roots):
    """A and S of the layers of an MLP, by one backward pass for each root."""
    inputs, outputs = [], []
    h = x
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([h, torch.ones(len(h), 1, dtype=F64)], 1).detach())
        h = layer(h)
        if isinstance(layer, nn.Linear):
            outputs.append(h)
    s = [torch.zeros(z.shape[1], z.shape[1], dtype=F64) for z in outputs]
    for root in roots(h):
        for total, g in zip(s, torch.autograd.grad(h, outputs, root, retain_graph=True), strict=True):
            total += g.T @ g
    return [a.T @ a / len(x) for a in inputs], s


def test_factors_of_cross_entropy():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    A, S = naive_factors(model, x, cross_entropy_roots)
    found = sorted(KFAC.of(model, nn.CrossEntropyLoss(), x, y).factors())
    assert [f.slots for f in found] == [(0, 1), (2, 3)]
    for f, a, s in zip(found, A, S, strict=True):
        assert error(f.inputs[0], a) < ROUNDING
        assert error(f.outputs[0], s) < ROUNDING
    dense = KFAC.of(model, nn.CrossEntropyLoss(), x, y).to_dense()
    assert error(dense[:25, :25], kron(found[0])) < ROUNDING


def test_the_empirical_fisher_takes_the_gradients_of_the_losses():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))

    def roots(outputs):
        losses = F.cross_entropy(outputs, y, reduction="sum")
        return [torch.autograd.grad(losses, outputs, retain_graph=True)[0] / 3.0]

    A, S = naive_factors(model, x, roots)
    K = KFAC.of(model, nn.CrossEntropyLoss(reduction="none"), x, y, curvature="empirical")
    for f, a, s in zip(sorted(K.factors()), A, S, strict=True):
        assert error(f.inputs[0], a) < ROUNDING
        assert error(f.outputs[0], s) < ROUNDING


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_sampled_fisher_is_unbiased(likelihood):
    model, x = mlp(), randn(9, 4)
    losses = {
        "categorical": lambda out: F.cross_entropy(out, torch.zeros(9, dtype=torch.long)),
        "bernoulli": lambda out: F.binary_cross_entropy_with_logits(out, torch.zeros_like(out)),
        "gaussian": lambda out: 0.5 * out.square().mean(),
    }

    def closure():
        out = model(x)
        return out, losses[likelihood](out)

    params = list(model.parameters())
    want = sorted(KFAC(closure, params).factors())
    draws = [
        sorted(KFAC(closure, params, curvature="fisher", likelihood=likelihood, seed=k).factors()) for k in range(400)
    ]
    for layer, target in enumerate(want):
        s = torch.stack([each[layer].outputs[0] for each in draws])
        deviation = (s.mean(0) - target.outputs[0]) / (s.std(0) / math.sqrt(len(s)))
        assert deviation.abs().max() < 4.5  # 34 numbers, normal by 400 draws: 1 in 4,000 seeds
        assert error(draws[0][layer].inputs, target.inputs) < ROUNDING
    several = KFAC(closure, params, curvature="fisher", likelihood=likelihood, samples=400).factors()
    for f, target in zip(sorted(several), want, strict=True):
        assert error(f.outputs, target.outputs) < 0.25


def test_factors_of_many_samples_and_wide_layers():
    """Where one triangle of a Gram matrix is computed, and mirrored."""
    model, x, y = nn.Linear(200, 3).double(), randn(1000, 200), randn(1000, 3)
    (f,) = KFAC.of(model, nn.MSELoss(), x, y).factors()
    rows = torch.cat([x, torch.ones(1000, 1, dtype=F64)], 1)
    assert error(f.inputs[0], rows.T @ rows / 1000) < ROUNDING
    assert torch.equal(f.inputs[0], f.inputs[0].T)


CONVOLUTIONS = {
    "stride": (nn.Conv2d(2, 3, 3, stride=2), (7, 8)),
    "padding": (nn.Conv2d(2, 3, (3, 2), padding=(2, 1)), (5, 6)),
    "dilation": (nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=False), (7, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_a_convolution(name, sharing):
    conv, size = CONVOLUTIONS[name]
    conv = conv.double()
    x, weight = randn(4, 2, *size), None

    def closure():
        nonlocal weight
        z = conv(x)
        weight = torch.linspace(-1, 1, z[0].numel(), dtype=F64).reshape(1, *z.shape[1:]) if weight is None else weight
        out = torch.stack([(z * weight).flatten(1).sum(1), z.square().flatten(1).sum(1)], 1)
        return out, 0.5 * out.square().sum()

    (f,) = KFAC(closure, list(conv.parameters()), sharing=sharing).factors()
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # (N, L, C k)
    if conv.bias is not None:
        patches = torch.cat([patches, torch.ones(*patches.shape[:2], 1, dtype=F64)], 2)
    z = conv(x)
    g = [weight.expand_as(z), 2 * z.detach()]
    g = [t.flatten(2).mT for t in g]
    if sharing == "reduce":
        patches, g = patches.mean(1, keepdim=True), [t.sum(1, keepdim=True) for t in g]
    rows = patches.flatten(0, 1)
    assert error(f.inputs[0], rows.T @ rows / len(rows)) < ROUNDING
    assert error(f.outputs[0], sum(torch.einsum("nlo,nlp->op", t, t) for t in g)) < ROUNDING


def test_groups_of_a_convolution_are_layers_of_their_own():
    conv = nn.Conv1d(4, 6, 3, groups=2, padding=1).double()
    head = nn.Linear(6 * 5, 2).double()
    x, y = randn(6, 4, 5), randn(6, 2)

    def grouped():
        out = head(conv(x).flatten(1))
        return out, F.mse_loss(out, y)

    halves = [p.detach().clone().requires_grad_() for p in (*conv.weight.split(3), *conv.bias.split(3))]

    def apart():
        z = [F.conv1d(x[:, 2 * i : 2 * i + 2], halves[i], halves[2 + i], padding=1) for i in range(2)]
        out = head(torch.cat(z, 1).flatten(1))
        return out, F.mse_loss(out, y)

    for cls in (KFAC, EKFAC):
        got = cls(grouped, list(conv.parameters())).to_dense()
        want = cls(apart, halves).to_dense()
        assert error(got, want) < ROUNDING
    assert [f.inputs.shape for f in KFAC(grouped, list(conv.parameters())).factors()] == [(2, 7, 7)]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_an_embedding_counts_what_is_looked_up(sharing):
    embed, head = nn.Embedding(7, 3, padding_idx=2).double(), nn.Linear(3, 2).double()
    tokens, y = torch.tensor([[0, 1, 1], [2, 5, 0]]), randn(2, 2)

    def closure():
        out = torch.tanh(head(embed(tokens).sum(1)))
        return out, 0.5 * (out - y).square().sum()

    (f,) = KFAC(closure, [embed.weight], sharing=sharing).factors()
    shares = F.one_hot(tokens, 7).to(F64)
    want = shares.mean((0, 1)) if sharing == "expand" else shares.mean(1).square().mean(0)
    assert error(f.inputs[0], want) < ROUNDING
    slope = 1 - torch.tanh(head(embed(tokens).sum(1))).square()
    g = (slope.unsqueeze(2) * head.weight).detach()  # (2, outputs, 3), the same at all places of a sample
    real = torch.tensor([3.0, 2.0], dtype=F64)  # places that are not padding
    weight = real if sharing == "expand" else real.square()
    assert error(f.outputs[0], torch.einsum("n,nfi,nfj->ij", weight, g, g)) < ROUNDING
    dense = KFAC(closure, [embed.weight], sharing=sharing).to_dense()
    assert error(dense, torch.kron(torch.diag(f.inputs[0]), f.outputs[0])) < ROUNDING


def test_a_layer_that_is_used_twice_pools_its_places():
    layer, x, y = nn.Linear(3, 3).double(), randn(5, 3), randn(5, 3)

    def closure():
        out = layer(torch.tanh(layer(x)))
        return out, 0.5 * (out - y).square().sum()

    params = list(layer.parameters())
    (f,) = KFAC(closure, params).factors()
    h = torch.tanh(layer(x)).detach()
    rows = torch.cat([torch.cat([x, h]), torch.ones(10, 1, dtype=F64)], 1)
    slope = (1 - h.square()).unsqueeze(1) * layer.weight.detach()  # d out / d z1, (n, out, z1)
    assert error(f.inputs[0], rows.T @ rows / 10) < ROUNDING
    want = 5 * torch.eye(3, dtype=F64) + torch.einsum("nfi,nfj->ij", slope, slope)
    assert error(f.outputs[0], want) < ROUNDING
    E, G = EKFAC(closure, params), GGN(closure, params)
    assert E.trace().value == pytest.approx(float(G.diag().value.sum()), rel=1e-12)


def test_a_matrix_that_is_stored_as_inputs_by_outputs():
    w, b, x, y = randn(4, 3).requires_grad_(), randn(3).requires_grad_(), randn(6, 4), torch.randint(3, (6,))
    twin = nn.Linear(4, 3).double()
    with torch.no_grad():
        twin.weight.copy_(w.T)
        twin.bias.copy_(b)

    def closure():
        out = x @ w + b
        return out, F.cross_entropy(out, y)

    for cls in (KFAC, EKFAC):
        got = cls(closure, [w, b])
        want = cls.of(twin, nn.CrossEntropyLoss(), x, y)
        v = randn(15)
        turned = torch.cat([v[:12].reshape(4, 3).T.reshape(-1), v[12:]])
        its = want @ turned
        assert error(got @ v, torch.cat([its[:12].reshape(3, 4).T.reshape(-1), its[12:]])) < ROUNDING


def test_ekfac_has_the_moments_of_single_gradients_along_the_eigenvectors():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    losses = lambda: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
    params = list(model.parameters())
    E = EKFAC.of(model, nn.CrossEntropyLoss(reduction="none"), x, y, curvature="empirical")
    K = KFAC.of(model, nn.CrossEntropyLoss(reduction="none"), x, y, curvature="empirical")
    w, b, *_ = per_sample_gradients(losses, params)
    f = next(f for f in K.factors() if f.slots == (0, 1))
    qs, qa = (torch.linalg.eigh(m[0]).eigenvectors for m in (f.outputs, f.inputs))
    moments = (qs.T @ torch.cat([w, b.unsqueeze(2)], 2) @ qa).square().mean(0)
    q = torch.kron(qs, qa)
    places = torch.arange(25).reshape(5, 5)
    order = torch.cat([places[:, :4].reshape(-1), places[:, 4]])
    want = (q @ torch.diag(moments.reshape(-1)) @ q.T)[order][:, order]
    assert error(E.to_dense()[:25, :25], want) < ROUNDING
    exact = EmpiricalFisher(lambda: (out := model(x), F.cross_entropy(out, y, reduction="none")), params)
    distances = [(A.to_dense() - exact.to_dense())[:25, :25].norm() for A in (E, K)]
    assert distances[0] < distances[1]  # nearest of all with these eigenvectors


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
@BOTH
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical"])
def test_a_transformer(cls, curvature):
    """Attention, tokens before samples in one layer, normalisations: the trace of EKFAC is that of the matrix."""
    embed, attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2)
    norm, mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    head = nn.Linear(8, 4)
    parts = nn.ModuleList([embed, attention, norm, mlp, head]).double()
    tokens, y = torch.randint(9, (6, 5)), torch.randint(4, (6,))

    def closure():
        h = embed(tokens).transpose(0, 1)
        h = h + attention(h, h, h, need_weights=False)[0]
        h = h + mlp(norm(h))
        out = head(h.mean(0))
        return out, F.cross_entropy(out, y, reduction="none" if curvature == "empirical" else "mean")

    params = list(parts.parameters())
    K = cls(closure, params, curvature=curvature, seed=3)
    assert len(K.factors()) == 6
    assert sum(len(f.slots) for f in K.factors()) == 11  # with all biases, and the embedding without
    if cls is EKFAC:
        G = {"ggn": GGN, "empirical": EmpiricalFisher, "fisher": Fisher}[curvature]
        want = G(closure, params, **({"seed": 3} if curvature == "fisher" else {})).diag().value
        assert K.trace().value == pytest.approx(float(want.sum()), rel=1e-10)


# Inverses -------------------------------------------------------------------------------------------------------------


def test_the_factored_inverse_is_that_of_martens_and_grosse():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    K, lam = KFAC.of(model, nn.CrossEntropyLoss(), x, y), 0.03
    got = K.inverse(damping=lam).to_dense()
    start = 0
    for f in sorted(K.factors()):
        a, s = f.inputs[0], f.outputs[0]
        pi = math.sqrt(float((a.trace() / len(a)) / (s.trace() / len(s))))
        damped = f._replace(
            inputs=f.inputs + pi * math.sqrt(lam) * torch.eye(len(a), dtype=F64),
            outputs=f.outputs + math.sqrt(lam) / pi * torch.eye(len(s), dtype=F64),
        )
        want = torch.linalg.inv(kron(damped))
        end = start + len(want)
        assert error(got[start:end, start:end], want) < 1e-10
        start = end


@pytest.mark.parametrize("damping", [0.03, torch.tensor(0.03)])
@BOTH
def test_the_exact_inverse_is_that_of_the_operator(cls, damping):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 70), nn.LayerNorm(70), nn.Linear(70, 3))
    args = model.double(), nn.CrossEntropyLoss(), torch.randint(5, (6, 2)), torch.randint(3, (6,))
    K = cls.of(*args)
    v = randn(K.shape[0])
    for split in ("exact",) if cls is KFAC else ("exact", "pi"):
        solved = K.inverse(damping=damping, split=split) @ v
        # The damping is float32's .03 in the tensor: one matrix and its inverse.
        assert error(K @ solved + float(damping) * solved, v) < 1e-9
    by_cg = K.damped(float(damping)).inverse() @ v
    assert error(solved, by_cg) < 1e-6


def test_factors_above_64_are_inverted_like_small_ones():
    model, x, y = nn.Linear(80, 70).double(), randn(9, 80), randn(9, 70)
    K = KFAC.of(model, nn.MSELoss(), x, y)
    (f,), lam = K.factors(), 0.1
    pi = math.sqrt(float((f.inputs[0].trace() / 81) / (f.outputs[0].trace() / 70)))
    v = randn(70, 81)
    a, s = (m[0] + lam**0.5 * c * torch.eye(m.shape[-1], dtype=F64) for m, c in ((f.inputs, pi), (f.outputs, 1 / pi)))
    want = torch.linalg.solve(s, v) @ torch.linalg.inv(a)
    got = K.inverse(damping=lam) @ torch.cat([v[:, :80].reshape(-1), v[:, 80]])
    assert error(got, torch.cat([want[:, :80].reshape(-1), want[:, 80]])) < 1e-9


def test_an_inverse_outlives_a_step_and_the_operator_does_not():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    K = KFAC.of(model, nn.CrossEntropyLoss(), x, y)
    inverse, v = K.inverse(damping=0.1), randn(43)
    before, old = inverse @ v, K @ v
    with torch.no_grad():
        model[0].weight.add_(0.5)
    assert torch.equal(inverse @ v, before)
    assert error(K @ v, old) > 1e-3
    assert torch.equal(K @ v, KFAC.of(model, nn.CrossEntropyLoss(), x, y) @ v)


# Batches, precision, memory -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("weights", [None, [0.5, 0.5]])
def test_batches_are_one_batch(cls, weights):
    model, x, y = mlp(), randn(10, 4), torch.randint(3, (10,))

    def closure(batch):
        out = model(batch[0])
        return out, F.cross_entropy(out, batch[1])

    params = list(model.parameters())
    batches = list(zip(x.split(5), y.split(5), strict=True))
    got = cls(closure, params, batches=batches, weights=weights)
    assert error(got.to_dense(), cls.of(model, nn.CrossEntropyLoss(), x, y).to_dense()) < 1e-9
    twice = cls(closure, params, batches=batches, weights=[1.0, 1.0])
    assert error(twice.to_dense(), 2 * got.to_dense()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_kept_in_float32_at_least(dtype):
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    want = sorted(KFAC.of(model, nn.CrossEntropyLoss(), x, y).factors())
    model = model.to(dtype)
    K = KFAC.of(model, nn.CrossEntropyLoss(), x.to(dtype), y)
    for f, its in zip(sorted(K.factors()), want, strict=True):
        assert f.inputs.dtype is f.outputs.dtype is torch.float32
        assert error(f.inputs.double(), its.inputs) < 10 * torch.finfo(dtype).eps
        assert error(f.outputs.double(), its.outputs) < 20 * torch.finfo(dtype).eps
    assert (K @ torch.ones(43, dtype=dtype)).dtype is dtype


def test_dropout_is_the_same_in_both_passes_and_leaves_the_generator():
    model, x, y = nn.Sequential(nn.Dropout(0.5), *mlp()), randn(9, 4), torch.randint(3, (9,))
    E, G = (cls.of(model, nn.CrossEntropyLoss(), x, y) for cls in (EKFAC, GGN))
    state = torch.get_rng_state()
    trace = E.trace().value
    assert torch.equal(torch.get_rng_state(), state)
    assert trace == pytest.approx(float(G.diag().value.sum()), rel=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_no_graph_and_no_hook_is_left(fails):
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))
    made = []

    def closure():
        out = model(x)
        made.append(weakref.ref(out))
        if fails:
            raise RuntimeError("in the closure")
        return out, F.cross_entropy(out, y)

    K = EKFAC(closure, model.parameters())
    if fails:
        with pytest.raises(RuntimeError, match="in the closure"):
            K @ randn(43)
    else:
        K @ randn(43)
    gc.collect()
    assert made
    assert all(ref() is None for ref in made)
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_what_newton_cg_takes_of_a_point_has_these_factors():
    """Of a network that is no chain of layers too: there u is what the graph has above it."""
    conv, head = nn.Conv2d(1, 2, 3).double(), nn.Linear(8, 1).double()
    x, y = randn(6, 1, 4, 4), randn(6, 1)

    def closure():
        out = head(torch.tanh(conv(x)).flatten(1))
        return out, F.mse_loss(out, y)

    params = [*conv.parameters(), *head.parameters()]
    point = EvaluatedPoint(closure, params, "outputs")
    b = point.ggn()
    b @ randn(29)
    # A single output: H_L u = 2/6 signs, and |u| = sqrt(2/6) each: its square is the factor of the loss itself.
    got, want = sorted(KFAC._around(b, 0).factors()), sorted(KFAC(closure, params).factors())
    for f, its in zip(got, want, strict=True):
        assert error(f.inputs, its.inputs) < ROUNDING
        assert error(f.outputs, its.outputs) < ROUNDING


# Errors ---------------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    model, x, y = mlp(), randn(9, 4), torch.randint(3, (9,))

    def make(**options):
        return KFAC.of(model, nn.CrossEntropyLoss(), x, y, **options)

    with pytest.raises(ValueError, match="KFAC: curvature: expected 'ggn' or 'fisher' or 'empirical', got 'hessian'"):
        make(curvature="hessian")
    with pytest.raises(ValueError, match="KFAC: sharing: expected 'expand' or 'reduce', got 'sum'"):
        make(sharing="sum")
    with pytest.raises(ValueError, match="KFAC: likelihood"):
        make(curvature="fisher", likelihood="poisson")
    with pytest.raises(ValueError, match=r"EKFAC: weights: expected None without batches"):
        EKFAC.of(model, nn.CrossEntropyLoss(), x, y, weights=[1.0])
    with pytest.raises(ValueError, match="KFAC: weights: expected numbers >= 0"):
        KFAC(lambda b: b, model.parameters(), batches=[1], weights=[-1.0])
    with pytest.raises(ValueError, match=r"KFAC\.inverse: split: expected 'pi' or 'exact', got 'none'"):
        make().inverse(split="none")
    with pytest.raises(ValueError, match=r"KFAC\.inverse: damping: expected a finite number >= 0"):
        make().inverse(damping=-1.0)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda h: h - h.mean(0), lambda h: h.cumsum(0), lambda h: h.sum(), lambda h: h.flip(0),
        lambda h: torch.fft.fft(h, dim=0).real,
    ],
)  # fmt: skip
def test_samples_that_are_mixed_are_an_error(mixed):
    layer, x = nn.Linear(4, 3).double(), randn(5, 4)

    def closure():
        out = mixed(layer(x))
        return out, out.square().sum()

    with pytest.raises(ValueError, match=r"KFAC: closure: expected outputs \(N, ...\) of N samples, each by itself"):
        KFAC(closure, layer.parameters()) @ randn(15)


def test_a_loss_that_mixes_predictions_is_an_error_of_the_ggn():
    layer, x = nn.Linear(4, 3).double(), randn(5, 4)

    def closure():
        out = layer(x)
        return out, out.sum(0).square().sum()

    with pytest.raises(ValueError, match=r"KFAC: closure: expected outputs of single predictions"):
        KFAC(closure, layer.parameters()) @ randn(15)


# Peers ----------------------------------------------------------------------------------------------------------------


def test_curvlinops_has_the_same_matrix():
    curvlinops = pytest.importorskip("curvlinops")
    model, x, y = mlp().float(), torch.randn(9, 4), torch.randint(3, (9,))
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    peer = curvlinops.KFACLinearOperator(
        model, loss, params, [(x, y)], fisher_type="type-2", separate_weight_and_bias=False
    )
    v = torch.randn(43)
    want = peer @ v
    want = torch.as_tensor(want)
    assert error(KFAC.of(model, loss, x, y) @ v, want) < 1e-4
