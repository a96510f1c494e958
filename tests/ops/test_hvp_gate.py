"""What `secant.ops.hvp` accepts, and what it says of the rest."""

from __future__ import annotations

import pytest
import torch
from secant.kernels.hvp import LOSSES, cpu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import secant
from secant import backends
from secant._errors import BackendError
from secant.ops import (
    cross_entropy_hvp,
    glm_hvp,
    glm_value_grad,
    gram,
    paired_matmul,
    softmax_hvp,
    softmax_value_grad,
)
from secant.ops import hvp as ops

x, v, w = torch.randn(6, 4), torch.randn(4), torch.rand(6)
coef, classes, probs = torch.randn(4, 3), torch.randint(3, (6,)), torch.softmax(torch.randn(6, 3), -1)
a, b, full = torch.randn(5, 4), torch.randn(4, 2), torch.empty(5, 2)
sparse = x.to_sparse_csr()
tracked = torch.ones(2, requires_grad=True)


def hvp(**changes):
    return lambda: glm_hvp(**{"x": x, "v": v, "weight": w, **changes})


def value_grad(**changes):
    return lambda: glm_value_grad(**{"x": x, "target": w, "coef": v, "loss": "logistic", **changes})


def softmax(**changes):
    return lambda: softmax_hvp(**{"x": x, "v": coef, "probs": probs, **changes})


def softmax_value(**changes):
    return lambda: softmax_value_grad(**{"x": x, "target": classes, "coef": coef, **changes})


WRONG = [
    (hvp(x=[1.0]), TypeError, "glm_hvp: x: expected a torch.Tensor, got list"),
    (hvp(x=x[0]), ValueError, r"glm_hvp: x: expected shape \(N, d\), d >= 1, got shape \(4,\)"),
    (hvp(x=x[:, :0], v=v[:0]), ValueError, r"x: expected shape \(N, d\), d >= 1"),
    (hvp(x=x.to(torch.complex64)), TypeError, r"x: expected dtype .*complex is not supported"),
    (hvp(x=x.to_sparse_coo()), ValueError, "x: expected a dense"),
    (hvp(v=v[:3]), ValueError, r"v: expected shape \(4,\) or \(4, k\), got shape \(3,\)"),
    (hvp(intercept=True), ValueError, r"v: expected shape \(5,\) or \(5, k\), got shape \(4,\)"),
    (hvp(v=v.double()), TypeError, "v: expected dtype float32, got torch.float64"),
    (hvp(x=x.bfloat16(), v=v.bfloat16()), TypeError, "v: expected dtype float32, got torch.bfloat16"),
    (hvp(weight=w[:5]), ValueError, r"weight: expected shape \(6,\), got shape \(5,\)"),
    (hvp(l2=-1.0), ValueError, "l2: expected a finite number >= 0, got float -1.0"),
    (hvp(l2=float("nan")), ValueError, "l2: expected a finite number"),
    (hvp(out=v), ValueError, "out: expected no overlap with v, got overlapping memory"),
    (hvp(out=w[:4]), ValueError, "out: expected no overlap with weight"),
    (hvp(x=sparse, out=sparse.values()[:4]), ValueError, "out: expected no overlap with x"),
    (hvp(out=torch.empty(5)), ValueError, r"out: expected shape \(4,\), got shape \(5,\)"),
    (value_grad(target=classes), TypeError, "glm_value_grad: target: expected dtype float32, got torch.int64"),
    (value_grad(coef=coef), ValueError, r"coef: expected shape \(4,\), got shape \(4, 3\)"),
    (value_grad(loss="hinge"), ValueError, "loss: expected one of .*'huber'.*, got 'hinge'"),
    *(
        (value_grad(power=power), ValueError, "power: expected a number between 1 and 2, neither included, got")
        for power in (1.0, 2, 0.5, float("nan"), float("inf"))
    ),
    (value_grad(delta=0.0), ValueError, "delta: expected a finite number > 0"),
    (value_grad(sample_weight=w[:1]), ValueError, r"sample_weight: expected shape \(6,\)"),
    (softmax(v=v), ValueError, r"softmax_hvp: v: expected shape \(4, K\), got shape \(4,\)"),
    (softmax(probs=probs[:, :2]), ValueError, r"probs: expected shape \(6, 3\), got shape \(6, 2\)"),
    (softmax_value(target=w), TypeError, "softmax_value_grad: target: expected dtype int64, got torch.float32"),
    (
        softmax_value(target=classes.new_full((6,), 3)),
        ValueError,
        r"target: expected classes in 0\.\.2, got values in ",
    ),
    (softmax_value(coef=coef.double()), TypeError, "coef: expected dtype float32"),
    (lambda: cross_entropy_hvp(x, x[:5]), ValueError, r"cross_entropy_hvp: u: expected shape \(6, 4\)"),
    (lambda: cross_entropy_hvp(x, x, lse=w[:, None]), ValueError, r"lse: expected shape \(6,\), got shape \(6, 1\)"),
    (lambda: cross_entropy_hvp(x.half(), x.half(), lse=w.half()), TypeError, "lse: expected dtype float32"),
    (
        lambda: cross_entropy_hvp(torch.tensor(1.0), torch.tensor(1.0)),
        ValueError,
        r"logits: expected shape \(\.\.\., V\)",
    ),
    (lambda: paired_matmul(a, a), ValueError, r"paired_matmul: b: expected shape \(4, N\), got shape \(5, 4\)"),
    (lambda: paired_matmul(a, b, a), ValueError, "c, e: expected both or none, got only c"),
    (lambda: paired_matmul(a, b, q=a), ValueError, "p, q: expected both or none, got only q"),
    (lambda: paired_matmul(a, b, a, a), ValueError, r"e: expected shape \(4, 2\), got shape \(5, 4\)"),
    (lambda: paired_matmul(a, b, bias=v), ValueError, r"bias: expected shape \(2,\), got shape \(4,\)"),
    (
        lambda: paired_matmul(a, b, scale=a[:, :2].clone(), out=a[:, :2]),
        ValueError,
        "out: expected a contiguous tensor",
    ),
    (lambda: paired_matmul(a, b, scale=full, out=full), ValueError, "out: expected no overlap with scale"),
    (
        lambda: paired_matmul(a, b.clone().requires_grad_(), out=full),
        ValueError,
        "out: expected None where a derivative",
    ),
    (lambda: gram([1.0]), TypeError, "gram: x: expected a torch.Tensor, got list"),
    (lambda: gram(v), ValueError, r"gram: x: expected shape \(m, n\), got shape \(4,\)"),
    (lambda: gram(x.half()), TypeError, "gram: x: expected dtype float32 or float64"),
    (lambda: gram(sparse), ValueError, "gram: x: expected a dense"),
    (lambda: gram(x, weight=w[:5]), ValueError, r"gram: weight: expected shape \(6,\), got shape \(5,\)"),
    (lambda: gram(x, weight=w.double()), TypeError, "gram: weight: expected dtype float32"),
    (lambda: gram(x, accumulate=True), ValueError, "gram: out: expected a tensor to add to, with accumulate=True"),
    (lambda: gram(x, out=torch.empty(4, 3)), ValueError, r"gram: out: expected shape \(4, 4\), got shape \(4, 3\)"),
    (lambda: gram(x, out=x[:4]), ValueError, "gram: out: expected no overlap with x"),
    (lambda: gram(x[:, :1], weight=w, out=w[:1, None]), ValueError, "gram: out: expected no overlap with weight"),
    (lambda: paired_matmul(a.half(), b.half()), TypeError, "a: expected dtype float32 or float64"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message[:60] for _, _, message in WRONG])
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("intercept", [False, True])
def test_vectors_and_matrices_agree(intercept):
    columns = torch.randn(4 + intercept, 3)
    whole = glm_hvp(x, columns, w, l2=0.5, intercept=intercept)
    for k in range(3):
        single = glm_hvp(x, columns[:, k], w, l2=0.5, intercept=intercept)
        torch.testing.assert_close(whole[:, k], single)
    ones = torch.cat((x, torch.ones(6, 1)), 1)[:, : 4 + intercept]
    penalty = torch.tensor([0.5] * 4 + [0.0] * intercept)[:, None]
    torch.testing.assert_close(whole, ones.mT @ (w[:, None] * (ones @ columns)) + penalty * columns)


def test_more_vectors_than_a_kernel_takes():
    columns = torch.randn(4, 150, dtype=torch.float64)
    wide, weight = x.double(), w.double()
    expected = wide.mT @ (weight[:, None] * (wide @ columns)) + 0.1 * columns
    torch.testing.assert_close(glm_hvp(wide, columns, weight, l2=0.1), expected)


def test_out():
    for shape in ((4,), (4, 3)):
        columns, out = torch.randn(shape), torch.full(shape, torch.nan)
        assert glm_hvp(x, columns, w, out=out) is out
        assert torch.equal(out, glm_hvp(x, columns, w))
    product = torch.full((5, 2), torch.nan)
    assert paired_matmul(a, b, out=product) is product
    torch.testing.assert_close(product, a @ b)
    strided = torch.full((3, 4), torch.nan).mT
    columns = torch.randn(4, 3)
    assert glm_hvp(x, columns, w, out=strided) is strided
    assert torch.equal(strided, glm_hvp(x, columns, w))


@pytest.mark.parametrize("weighted", [False, True])
def test_gram(weighted):
    weight = w - 0.5 if weighted else None
    right = x.mT @ (x if weight is None else weight[:, None] * x)
    whole = gram(x, weight=weight)
    assert torch.equal(whole, whole.mT)
    torch.testing.assert_close(whole, right)
    for z in (x.mT.contiguous().mT, torch.stack((x, x), -1)[..., 0], torch._neg_view(-x)):
        torch.testing.assert_close(gram(z, weight=weight), right)
    torch.testing.assert_close(gram(x.T), x @ x.T)
    for out in (torch.full((4, 4), torch.nan), torch.full((4, 8), torch.nan)[:, ::2]):
        assert gram(x, weight=weight, out=out) is out
        assert torch.equal(out, whole)
    for out in (torch.zeros(4, 4), torch.zeros(4, 8)[:, ::2], torch._neg_view(torch.zeros(4, 4))):
        for rows in (slice(0, 2), slice(2, 6)):
            gram(x[rows], weight=None if weight is None else weight[rows], out=out, accumulate=True)
        assert torch.equal(out, out.mT)
        torch.testing.assert_close(out, right)


def test_any_strides():
    turned = x.mT.contiguous().mT
    columns = torch.randn(3, 4).mT
    apart = torch.stack((w, w), 1)[:, 0]
    torch.testing.assert_close(glm_hvp(turned, columns, apart), glm_hvp(x, columns.contiguous(), w))
    torch.testing.assert_close(
        softmax_hvp(turned, columns, probs.mT.contiguous().mT), softmax_hvp(x, columns.contiguous(), probs)
    )
    logits = torch.randn(5, 2, 7).movedim(1, 2)  # the vocabulary is not the innermost dimension
    u = torch.randn(5, 7, 2)
    expected = torch.stack([cross_entropy_hvp(logits[i].contiguous(), u[i]) for i in range(5)])
    torch.testing.assert_close(cross_entropy_hvp(logits, u), expected)


def test_no_rows_leave_the_penalty():
    none = x[:0]
    v5 = torch.randn(5)
    penalty = 0.5 * torch.cat((v5[:4], torch.zeros(1)))
    assert torch.equal(glm_hvp(none, v5, w[:0], l2=0.5, intercept=True), penalty)
    value, grad, weight = glm_value_grad(none, w[:0], v5, loss="poisson", l2=0.5, intercept=True)
    torch.testing.assert_close(float(value), 0.25 * float((v5[:4] ** 2).sum()))
    assert torch.equal(grad, penalty)
    assert weight.shape == (0,)
    assert torch.equal(softmax_hvp(none, coef, probs[:0], l2=2.0), 2 * coef)
    assert softmax_value_grad(none, classes[:0], coef)[2].shape == (0, 3)
    assert glm_hvp(x, torch.empty(4, 0), w).shape == (4, 0)
    assert cross_entropy_hvp(torch.empty(0, 5), torch.empty(0, 5)).shape == (0, 5)
    assert paired_matmul(a[:0], b).shape == (0, 2)
    assert torch.equal(gram(none), torch.zeros(4, 4))
    assert gram(x[:, :0]).shape == (0, 0)
    before = torch.randn(4, 4)
    after = gram(none, out=before.clone(), accumulate=True)
    assert torch.equal(after.tril(), before.tril())
    assert torch.equal(after, after.mT)


def test_dtypes_of_the_results():
    for dtype, compute in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        z, c = x.to(dtype), v.to(compute)
        value, grad, weight = glm_value_grad(z, w.to(compute), c, loss="squared")
        assert (value.dtype, grad.dtype, weight.dtype) == (torch.float64, compute, compute)
        assert glm_hvp(z, c, weight).dtype == compute
        assert cross_entropy_hvp(z, z).dtype == dtype


def test_results_without_memory():
    """While torch only asks for shapes, what it allocates has no memory that a kernel could write to."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = (
            glm_hvp(x, v, w),
            glm_hvp(x, coef, w),
            *glm_value_grad(x, w, v, loss="poisson"),
            cross_entropy_hvp(x, x),
            gram(x),
        )
    assert all(isinstance(result, FakeTensor) for result in results)
    assert [tuple(result.shape) for result in results] == [(4,), (4, 3), (), (4,), (6,), (6, 4), (4, 4)]


#: The functions of x.
OF_X = {
    "glm_hvp": lambda x: glm_hvp(x, v, w, l2=0.1),
    "glm_value_grad": lambda x: glm_value_grad(x, w, v, loss="logistic", sample_weight=w, l2=0.1),
    "softmax_hvp": lambda x: softmax_hvp(x, coef, probs, sample_weight=w, l2=0.1),
    "softmax_value_grad": lambda x: softmax_value_grad(x, classes, coef, sample_weight=w, l2=0.1),
}


@pytest.mark.parametrize("name", OF_X)
def test_sparse_rows_are_those_of_the_dense_matrix(name):
    sparse = torch.where(x > 0, x, 0).to_sparse_csr()
    torch.testing.assert_close(OF_X[name](sparse), OF_X[name](sparse.to_dense()))


@pytest.mark.parametrize("name", OF_X)
def test_a_backend_without_sparse_rows_says_so(monkeypatch, name):
    backend = backends.load("hvp", "reference")
    monkeypatch.delattr(backend, "SPARSE_ROWS")
    with secant.use_backend("reference"), pytest.raises(BackendError, match=f"'reference' has no sparse {name}: pass"):
        OF_X[name](x.to_sparse_csr())


@pytest.mark.parametrize("name", OF_X)
def test_sparse_rows_are_refused_on_other_devices_and_in_half_precision(name):
    with pytest.raises(
        ValueError, match=rf"{name}: x: expected sparse rows on the CPU \(pass x.to_dense\(\).*got meta"
    ):
        OF_X[name](x.to_sparse_csr().to("meta"))
    with pytest.raises(TypeError, match=f"{name}: x: expected float32 or float64 for sparse rows"):
        OF_X[name](x.half().to_sparse_csr())


def test_a_batch_of_logits():
    logits, u = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p = torch.softmax(logits, -1)
    expected = p * (u - (p * u).sum(-1, keepdim=True))
    torch.testing.assert_close(cross_entropy_hvp(logits, u), expected)
    torch.testing.assert_close(cross_entropy_hvp(logits, u, lse=logits.logsumexp(-1)), expected)
    torch.testing.assert_close(cross_entropy_hvp(logits[0, 0], u[0, 0]), expected[0, 0])


shortcut = pytest.mark.skipif(cpu.glm_plain is None, reason="torch before 2.10 has no DLPack exchange table")


@shortcut
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("intercept", [False, True])
def test_the_shortcut_gives_the_same_bits(dtype, intercept, monkeypatch):
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    x, w, t = torch.randn(50, 9).to(dtype)[:, :7], torch.rand(50, dtype=kind), torch.rand(50, dtype=kind)
    v = torch.randn(7 + intercept, dtype=kind)

    def results():
        yield glm_hvp(x, v, w, l2=0.5, intercept=intercept)
        for loss in LOSSES:
            yield from glm_value_grad(x, t, v, loss=loss, l2=2, delta=0.3, intercept=intercept)

    taken = []

    def counted(*args):
        taken.append(cpu.glm_plain(*args))
        return taken[-1]

    monkeypatch.setattr(ops, "_glm_plain", lambda: counted)
    short = list(results())
    assert taken == [True] * (1 + len(LOSSES))
    monkeypatch.setattr(ops, "_glm_plain", lambda: None)
    for a, b in zip(short, results(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype is b.dtype


@shortcut
def test_the_shortcut_leaves_everything_else_to_the_gate():
    x, w, v, out = torch.randn(6, 4), torch.rand(6), torch.randn(4), torch.full((4,), 7.0)
    value, weight = torch.empty((), dtype=torch.float64), torch.empty(6)
    for call in (
        (x.double(), v, w, out),
        (x.half(), v, w, out),
        (x[0], v, w, out),
        (x[:0], v, w[:0], out),
        (x.mT.contiguous().mT, v, w, out),
        (x, v[:3], w, out),
        (x, v[:, None], w, out),
        (x, torch.randn(8)[::2], w, out),
        (x, v, w[:5], out),
        (x, v, w.double(), out),
        (x, v, torch.rand(12)[::2], out),
        (x, v, w, x[1]),
        (x, v, w, v),
        (x, v, w, w[2:]),
        (x, None, w, out),
    ):
        a, b, row, to = call
        assert not cpu.glm_plain(0, a, b, row, None, 0.0, False, 0, 1.0, to, None, None)
    assert not cpu.glm_plain(0, x, v, w, None, 0.0, True, 0, 1.0, out, None, None)
    for more in ((w[:5], value, weight), (None, value.float(), weight), (None, value, weight[:5])):
        assert not cpu.glm_plain(1, x, v, w, more[0], 0.0, False, 0, 1.0, out, *more[1:])
    assert torch.equal(out, torch.full((4,), 7.0))
    torch.testing.assert_close(glm_hvp(torch._neg_view(-x), torch._neg_view(-v), torch._neg_view(-w)), glm_hvp(x, v, w))


OPS = torch.ops.secant
value_of, grad_of = torch.empty((), dtype=torch.float64), torch.empty(4, 3)
#: Calls of the registered ops by themselves, each with one argument that no kernel may see.
DIRECT = {
    "glm_hvp: weight": (w[:5],),
    "glm_hvp: v": (coef[:3],),
    "glm_hvp: out": (torch.empty(4, 2),),
    "softmax_hvp: probs": (probs[:, :2],),
    "softmax_value_grad: target": (classes[:5], classes.int()),
    "softmax_value_grad: probs": (torch.empty(6, 2), torch.empty(5, 3), torch.empty(6, 3).double()),
    "softmax_value_grad: value": (torch.empty(()), torch.empty(1).double()),
    "glm_value_grad: coef": (v[:2], torch.empty(6), coef),
    "cross_entropy_hvp: u": (x[:5], x.double(), x[:, :2]),
    "cross_entropy_hvp: lse": (w[:3], w.double()),
    "paired_matmul: bias": (v,),
    "paired_matmul: e": (a,),
    "gram: x": (x.half(), x[0]),
    "gram: weight": (w[:5], w.double()),
    "gram: out": (torch.empty(4, 3), torch.empty(4, 4).double()),
}


@pytest.mark.parametrize("name", DIRECT)
def test_registered_ops_check_what_a_kernel_trusts(name):
    op, argument = name.split(": ")
    right = {
        "glm_hvp": {"x": x, "v": coef, "weight": w, "l2": 0.1, "out": torch.empty(4, 3)},
        "glm_value_grad": {
            "x": x, "target": w, "coef": v, "loss": "huber", "delta": 1.0, "sample_weight": w, "l2": 0.1,
            "value": value_of, "grad": torch.empty(4), "weight": torch.empty(6),
        },
        "softmax_hvp": {"x": x, "v": coef, "probs": probs, "sample_weight": None, "l2": 0.1, "out": torch.empty(4, 3)},
        "softmax_value_grad": {
            "x": x, "target": classes, "coef": coef, "sample_weight": None, "l2": 0.1, "value": value_of,
            "grad": grad_of, "probs": torch.empty(6, 3),
        },
        "cross_entropy_hvp": {"logits": x, "u": x, "lse": w, "out": torch.empty(6, 4)},
        "paired_matmul": {
            "a": a, "b": b, "c": a, "e": b, "bias": v[:2], "scale": None, "p": None, "q": None, "out": full,
        },
        "gram": {"x": x, "weight": w, "accumulate": False, "out": torch.empty(4, 4)},
    }[op]  # fmt: skip
    getattr(OPS, op)(*right.values())
    for wrong in DIRECT[name]:
        kind = ValueError if wrong.dtype is right[argument].dtype else TypeError
        with pytest.raises(kind, match=rf"{op}: {argument}: expected"):
            getattr(OPS, op)(*(right | {argument: wrong}).values())


def test_registered_ops_write_results_of_any_strides():
    turned = torch.full((3, 4), torch.nan).mT
    OPS.glm_hvp(x, coef, w, 0.1, turned)
    assert torch.equal(turned, glm_hvp(x, coef, w, l2=0.1))
    turned = torch.ones(4, 8)[:, ::2]
    OPS.gram(x, None, True, turned)
    torch.testing.assert_close(turned, gram(x) + 1)


@pytest.mark.parametrize("wrong", [-1, 3, 2**32 + 1, -(2**63)])
@pytest.mark.parametrize("how", ["aot_eager", "op", "vmap", "by x"])
def test_a_class_out_of_range_where_nobody_looks(wrong, how):
    """In a compiled graph, in the registered op, under vmap: value and gradient are NaN."""
    bad = classes.clone()
    bad[2] = wrong
    with pytest.raises(ValueError, match=r"softmax_value_grad: target: expected classes in 0\.\.2"):
        softmax_value_grad(x, bad, coef)
    if how == "op":
        value, grad, p = torch.zeros((), dtype=torch.float64), torch.zeros(4, 3), torch.zeros(6, 3)
        OPS.softmax_value_grad(x, bad, coef, None, 0.1, value, grad, p)
    elif how == "vmap":
        both = torch.stack((classes, bad))
        values, grads, ps = torch.vmap(lambda t: softmax_value_grad(x, t, coef))(both)
        right = softmax_value_grad(x, classes, coef)
        for got, expected in zip((values[0], grads[0], ps[0]), right, strict=True):
            torch.testing.assert_close(got, expected)
        value, grad, p = values[1], grads[1], ps[1]
    else:
        torch.compiler.reset()
        at = x.clone().requires_grad_() if how == "by x" else x
        compiled = torch.compile(lambda t: softmax_value_grad(at, t, coef), backend="aot_eager")
        value, grad, p = compiled(bad)
    assert value.isnan()
    assert grad.isnan().all()
    torch.testing.assert_close(p, torch.softmax(x @ coef, -1))
