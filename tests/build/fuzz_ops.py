"""Calls every public op with random arguments, most of them hostile, for as many cases as it is told.

    python tests/build/fuzz_ops.py --seed 0 --cases 2000 [--cpu PATH] [--skip NAMES]

What holds for each case, whatever came in:

* the process lives: nothing is read or written outside its memory (run it with a `_cpu` module that was built with
  AddressSanitizer to be sure; `--cpu` takes its path);
* the call returns, or raises TypeError, ValueError or BackendError in words that name the op and the argument;
* inputs are what they were, bit for bit, and so is memory around a result;
* arguments that are valid, finite and well conditioned give the numbers of the reference in float64.

It prints the case before it dies, so that `--seed S --first N --cases 1` shows it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: Relative errors of the arithmetic on well-conditioned problems of these sizes: hundreds of roundings.
TOLERANCE = {F64: 1e-10, F32: 2e-4, BF16: 3e-2, F16: 4e-3}
NUMBERS = (0.0, -1.0, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, 10**400, True, "a", None, 1j, [1.0])
ENTRIES = (math.nan, math.inf, -math.inf, 0.0, 1e38, -1e38, 1e-42, 1e-45)
FUNCTIONS = ("exp", "log", "sqrt", "abs", ("power", -0.5), ("power", 3))
INDICES = (-1, -(2**31), 2**31 - 1, 10**6, 7)


class Fuzzer:
    """Random arguments from one seed, and a note of whether anything about them is hostile."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.hostile = False
        self.given: list[Tensor] = []

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, options: Any) -> Any:
        return self.random.choice(list(options))

    def spoil(self, p: float = 0.12) -> bool:
        """Whether to do something hostile here."""
        if self.chance(p):
            self.hostile = True
            return True
        return False

    def size(self) -> int:
        return self.pick((1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 70))

    def normal(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return torch.randn(*shape, generator=self.torch, dtype=F64).to(dtype)

    def tensor(self, x: Tensor) -> Tensor:
        """`x` as a hostile caller hands it over: other strides, and seldom other contents, shape, dtype or layout."""
        if self.spoil(0.04):
            return self.pick(
                (
                    lambda: x[..., :0] if x.dim() else x[None, None],
                    lambda: x.unsqueeze(0),
                    lambda: x.flatten()[:1] if x.numel() else x,
                    lambda: x.to(self.pick((torch.int64, torch.complex64, F16, F64, torch.bool))),
                    lambda: x.to("meta"),
                    lambda: x.clone().requires_grad_() if x.dtype.is_floating_point else x,
                    lambda: x.to_sparse(),
                    lambda: [1.0],
                    lambda: x.expand(2, *x.shape),
                )
            )()
        if x.dtype.is_floating_point and x.numel() and self.spoil(0.05):
            x = x.clone()
            for _ in range(self.pick((1, 1, 3))):
                x.view(-1)[self.random.randrange(x.numel())] = self.pick(ENTRIES)
        style = self.pick(("dense", "dense", "wide", "offset", "transposed", "negated", "spread"))
        if style == "wide" and x.dim():
            x = torch.cat((x, x), -1)[..., : x.shape[-1]]
        elif style == "offset":
            x = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        elif style == "transposed" and x.dim() > 1:
            x = x.mT.contiguous().mT
        elif style == "negated" and x.dtype.is_floating_point:
            x = torch._neg_view(-x)
        elif style == "spread" and x.dim():
            x = torch.stack((x, x), -1)[..., 0]
        self.given.append(x)
        return x

    def number(self, usual: Any) -> Any:
        return self.pick(NUMBERS) if self.spoil(0.05) else usual

    def out(self, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Any, strided: bool = True) -> Any:
        """None, or something to write to."""
        if self.chance(0.6):
            return None
        if self.spoil(0.2):
            inputs = tuple(x for x in inputs if isinstance(x, Tensor) and x.layout is torch.strided)
            return self.pick((torch.zeros(1, dtype=dtype).expand(shape), *inputs, "out", torch.zeros(3, 5, 7)))
        x = torch.full(shape, math.nan, dtype=dtype)
        return self.pick((x, torch.stack((x, x), -1)[..., 0] if x.dim() and strided else x))

    def csr(self, n: int, d: int, dtype: torch.dtype) -> Tensor:
        """Sparse rows, often with indices that lead out of them."""
        dense = self.normal(n, d) * (torch.rand(n, d, generator=self.torch) < 0.4)
        x = dense.to(dtype).to_sparse_csr()
        crow, col, values = x.crow_indices().clone(), x.col_indices().clone(), x.values()
        if self.spoil(0.4):
            target = self.pick((crow, col))
            if target.numel():
                target[self.random.randrange(target.numel())] = self.pick((*INDICES, d, values.numel() + 1))
        if self.chance(0.3):
            crow = crow.to(torch.int32)
        if self.chance(0.3):
            col = col.to(torch.int32)
        return torch.sparse_csr_tensor(crow, col, values, (n, d), check_invariants=False)


def relative(got: Tensor, want: Tensor) -> float:
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (scale or 1.0)


def two_loop(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    n, m, batch = f.size(), f.pick((0, 1, 2, 5, 9)), f.pick(((), (), (1,), (3,)))
    dtype, pairs = f.pick((F32, F64, BF16)), f.pick((F32, F64, BF16, F16))
    s = f.normal(*batch, m, n)
    y = s * (1 + torch.rand(n, generator=f.torch))
    args = {
        "grad": f.tensor(f.normal(*batch, n, dtype=dtype)),
        "s": f.tensor(s.to(pairs)),
        "y": f.tensor(y.to(pairs)),
        "gamma": f.pick((None, f.number(0.7))),
    }
    args["out"] = f.out((*batch, n), dtype, args["grad"], args["s"])
    return OPS["two_loop"], args


def blocks(name: str) -> Callable[[Fuzzer], tuple[Callable[..., Any], dict[str, Any]]]:
    def make(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
        n, batch = f.pick((1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64)), f.pick(((), (0,), (1,), (5,), (2, 9)))
        dtype = f.pick((F32, F64, BF16))
        a = f.normal(*batch, n, n) / math.sqrt(n)
        a = a @ a.mT + torch.eye(n, dtype=F64)
        given = f.tensor(a.to(dtype))
        args: dict[str, Any] = {"a": given}
        if name in ("block_inv", "block_solve"):
            args["assume"] = f.pick(("spd", "general", "general" if f.spoil(0.02) else "spd"))
            args["out"] = None
        if name == "block_solve":
            args["b"] = f.tensor(f.normal(*batch, n, f.pick((1, 2, 5)), dtype=dtype))
            if isinstance(args["b"], Tensor):
                args["out"] = f.out(tuple(args["b"].shape), dtype, given, args["b"])
        elif name == "block_inv":
            args["out"] = f.out(tuple(a.shape), dtype, given)
        if name == "block_function":
            hostile = f.spoil(0.1)
            args["f"] = f.pick(("sin", ("power", 1e9), 3)) if hostile else f.pick(FUNCTIONS)
        if name == "block_solve" and f.chance(0.3):
            args["vector"] = f.pick((True, 1)) if f.spoil(0.3) else False
        if name == "block_abs_inv":
            args["floor"] = f.number(0.01)
        elif name == "block_inv_root":
            args["p"] = f.pick((1, 2, 4, 3)) if f.spoil(0.1) else f.pick((1, 2, 4))
        if name in ("block_eigh", "block_abs_inv", "block_inv_root") and f.chance(0.3):
            args["vectors"] = f.tensor(f.normal(*batch, n, n, dtype=dtype))
        if name in ("block_inv", "block_solve", "block_inv_root", "block_function"):
            lam = f.pick((None, f.number(0.1), ("scale", f.number(0.1)), f.tensor(torch.full(batch, 0.1, dtype=dtype))))
            if name == "block_inv_root" and f.chance(0.3):
                lam = ("max", f.number(0.1))
            args["damping"] = lam
        return OPS[name], args

    return make


def rows(f: Fuzzer, half: bool = True) -> tuple[Any, int, int, torch.dtype]:
    n, d = f.pick((0, 1, 2, 5, 9, 40)), f.size()
    if f.chance(0.5):
        dtype = f.pick((F32, F64))
        x: Any = f.csr(n, d, dtype)
    else:
        dtype = f.pick((F32, F64, BF16, F16))
        x = f.tensor(f.normal(n, d, dtype=dtype))
    return x, n, d, F64 if dtype is F64 else F32


def glm_hvp(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, n, d, dtype = rows(f)
    intercept = f.chance(0.5)
    shape = (d + intercept, *f.pick(((), (), (1,), (3,), (8,), (65,))))
    v = f.tensor(f.normal(*shape, dtype=dtype))
    weight = f.tensor(f.normal(n, dtype=dtype).abs())
    args = {"x": x, "v": v, "weight": weight, "l2": f.number(0.3), "intercept": intercept}
    return OPS["glm_hvp"], args | {"out": f.out(shape, dtype, v, weight)}


def glm_value_grad(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, n, d, dtype = rows(f)
    intercept = f.chance(0.5)
    return OPS["glm_value_grad"], {
        "x": x,
        "target": f.tensor((f.normal(n) > 0).to(dtype)),
        "coef": f.tensor(f.normal(d + intercept, dtype=dtype) / d),
        "loss": f.pick(("squared", "logistic", "poisson", "huber", "gamma", "tweedie"))
        if not f.spoil(0.03)
        else f.pick(("hinge", None)),
        "sample_weight": f.pick((None, f.tensor(f.normal(n, dtype=dtype).abs()))),
        "l2": f.number(0.3),
        "delta": f.number(1.0),
        "power": f.number(1.3),
        "intercept": intercept,
    }


def softmax_hvp(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, n, d, dtype = rows(f)
    k, intercept = f.pick((1, 2, 3, 10, 17)), f.chance(0.5)
    return OPS["softmax_hvp"], {
        "x": x,
        "v": f.tensor(f.normal(d + intercept, k, dtype=dtype)),
        "probs": f.tensor(torch.softmax(f.normal(n, k), -1).to(dtype)),
        "sample_weight": f.pick((None, f.tensor(f.normal(n, dtype=dtype).abs()))),
        "l2": f.number(0.3),
        "intercept": intercept,
    }


def softmax_value_grad(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    x, n, d, dtype = rows(f)
    k, intercept = f.pick((1, 2, 3, 10, 17)), f.chance(0.5)
    target = torch.randint(k, (n,), generator=f.torch)
    if n and f.spoil(0.2):
        target[f.random.randrange(n)] = f.pick((*INDICES, k, 2**62))
    return OPS["softmax_value_grad"], {
        "x": x,
        "target": f.tensor(target),
        "coef": f.tensor(f.normal(d + intercept, k, dtype=dtype) / d),
        "sample_weight": f.pick((None, f.tensor(f.normal(n, dtype=dtype).abs()))),
        "l2": f.number(0.3),
        "intercept": intercept,
    }


def cross_entropy_hvp(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    shape, dtype = (*f.pick(((), (0,), (1,), (6,), (2, 3))), f.size()), f.pick((F32, F64, BF16, F16))
    logits = f.normal(*shape, dtype=dtype)
    lse = torch.logsumexp(logits.double(), -1).to(F64 if dtype is F64 else F32)
    args = {"logits": f.tensor(logits), "u": f.tensor(f.normal(*shape, dtype=dtype))}
    return OPS["cross_entropy_hvp"], args | {"lse": f.pick((None, f.tensor(lse)))}


def history(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A history that loads a state, possibly a hostile one, and takes steps."""
    n, m, batch, dtype = f.size(), f.pick((1, 2, 5)), f.pick((None, 1, 3)), f.pick((F32, F64))
    shape = (n,) if batch is None else (batch, n)

    def run(grad: Any, direction: Any, t: Any, key: str | None, value: int) -> Tensor:
        own = secant.LBFGSHistory(n, m, batch=batch, dtype=dtype, storage_dtype=dtype)
        for _ in range(m + 1):
            s = f.normal(*shape, dtype=dtype)
            own.append(s, 2 * s)
        if key is not None:
            state = {name: x.clone() for name, x in own.state_dict().items()}
            state[key].view(-1)[0] = value
            own.load_state_dict(state)
        own.step(grad, torch.zeros(shape, dtype=dtype), direction, t)
        return own.direction(grad)

    key = f.pick(("head", "count")) if f.spoil(0.3) else None
    direction = torch.ones(shape, dtype=dtype)
    if f.spoil(0.1):
        direction = f.pick((direction.expand(2, *shape), direction.requires_grad_(), direction[..., :-1]))
    args = {"grad": f.tensor(f.normal(*shape, dtype=dtype)), "direction": direction, "t": f.number(0.5), "key": key}
    return run, args | {"value": f.pick((*INDICES, m + 1))}


def inverse_hessian(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A dense inverse Hessian that loads a state, possibly a hostile one, and takes steps."""
    n, dtype, rule = f.size(), f.pick((F32, F64)), f.pick(("bfgs", "ssbfgs", "ssbroyden"))
    # Of gradients and steps: squares of float32 would be nothing or infinite.
    scale = f.pick((1.0, 1.0, 2.0**-80, 2.0**80))
    pairs = [f.normal(n, dtype=dtype) for _ in range(2)]

    def run(grad: Any, direction: Any, t: Any, key: str | None, value: Any, rule: str) -> Tensor:
        wide = torch.promote_types(grad.dtype, dtype) if isinstance(grad, Tensor) and grad.dtype is F64 else dtype
        own = secant.InverseHessian(n, rule=rule, dtype=wide)
        for s in pairs:
            own.append(s.to(wide), (2 * scale * s).to(wide))
        if key is not None:
            state = {name: x.clone() for name, x in own.state_dict().items()}
            state[key].view(-1)[0] = value
            own.load_state_dict(state)
        # What is no tensor goes in as it is.
        before, along = (
            scale * x.clone() if isinstance(x, Tensor) else x for x, scale in ((grad, 0.5), (direction, 1.0))
        )
        own.step(grad, before, along, t)
        return own.direction(grad)

    key = f.pick(("h", "pair", "coefs", "count")) if f.spoil(0.3) else None
    g = f.normal(n, dtype=dtype)
    direction = -g / (2 * scale)
    args = {"grad": f.tensor(scale * g), "direction": direction, "t": f.number(0.5), "key": key, "rule": rule}
    return run, args | {"value": f.pick(INDICES) if key == "count" else f.pick(ENTRIES)}


def paired_matmul(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    m, k, n, dtype = f.size(), f.size(), f.size(), f.pick((F32, F64))
    a, b = f.tensor(f.normal(m, k, dtype=dtype)), f.tensor(f.normal(k, n, dtype=dtype))
    args = {"a": a, "b": b, "bias": f.pick((None, f.tensor(f.normal(n, dtype=dtype))))}
    return OPS["paired_matmul"], args | {"out": f.out((m, n), dtype, a, b, strided=False)}


def gram(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    m, n, dtype = f.pick((0, 1, 2, 9, 40, 300)), f.size(), f.pick((F32, F64))
    x = f.tensor(f.normal(m, n, dtype=dtype))
    weight = f.pick((None, f.tensor(f.normal(m, dtype=dtype))))
    args = {"x": x, "weight": weight, "out": f.out((n, n), dtype, x, weight)}
    return OPS["gram"], args | ({"accumulate": True} if f.spoil(0.1) else {})


def newton_schulz(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    shape = (*f.pick(((), (0,), (1,), (5,), (2, 3))), f.size(), f.size())
    dtype = f.pick((F32, F64, BF16, F16))
    x = f.tensor(f.normal(*shape, dtype=dtype))
    args = {"x": x, "steps": f.number(f.pick((0, 1, 5))), "eps": f.number(1e-7), "out": f.out(shape, dtype, x)}
    return OPS["newton_schulz"], args


def newton_inv_root(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    n = f.size()
    x = f.normal(*f.pick(((), (0,), (1,), (5,), (2, 3))), n, n)
    a = f.tensor((x @ x.mT / n + torch.eye(n, dtype=F64)).to(f.pick((F32, F64, BF16, F16))))
    args = {"a": a, "p": f.pick((1, 2, 4)), "damping": f.number(1e-3), "steps": f.pick((None, 1, 60))}
    return OPS["newton_inv_root"], args


def precond_step(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The registered op, which a graph or anybody may call: lists of tensors, with sizes that may lead out of them."""
    dtype, block = f.pick((F32, F64, BF16, F16)), f.pick((2, 5, 64))
    storage = f.pick((F64 if dtype is F64 else F32, BF16))
    shapes = [f.pick(((), (f.size(),), (f.size(), f.size()), (3, 2, f.size()))) for _ in range(f.pick((1, 2, 4)))]
    made, grads = ([f.normal(*shape, 1, dtype=dtype)[..., 0] for shape in shapes] for _ in range(2))
    states = [OPS["Tiles"].new_state(x, block_size=block, dtype=storage, one_sided=f.chance(0.2)) for x in made]
    names = ("exp_avg", "exp_avg_sq", "left", "right", "left_root", "right_root", "step")
    lists = [[s.get(name, torch.empty(0, dtype=storage)) for s in states] for name in names]
    for step in lists[-1]:
        step.fill_(3)
    cuts = [[*secant.ops.precond.matrix(x.shape), *secant.ops.precond.tiling(x.shape, block, 1024)] for x in made]
    layout = torch.tensor([[*x, x[1], 1] for x in cuts])
    graft, rotate, phases = f.pick((0, 1, 2, 3)), f.chance(0.3), f.pick((1, 2, 3))
    if f.spoil(0.3):
        row, column = f.random.randrange(len(made)), f.random.randrange(6)
        layout[row, column] = f.pick((0, -1, 2, 7, 10**6, 2**62, -(2**63)))
    for members in (grads, *lists):
        if f.spoil(0.05):
            i = f.random.randrange(len(members))
            x = members[i]
            members[i] = f.pick((x.flatten()[:-1], x[None].expand(2, *x.shape), x.to(torch.int64), torch.empty(0)))
        if f.spoil(0.02):
            members.pop()
    if f.spoil(0.05):
        graft, phases = f.pick(((7, 3), (-1, 3), (0, 0), (1, 2**40)))

    def run(params: Any, grads: Any) -> list[Tensor]:
        params, copies = [p.clone() for p in params], [[x.clone() for x in members] for members in lists]
        wide = params[0].dtype is F64 and dtype is not F64  # for the reference
        copies = [[x.double() for x in m] if wide else m for m in copies[:-1]] + copies[-1:]
        skipped = torch.zeros((), dtype=torch.int64)
        numbers = (0.9, 0.95, 0.9, 1e-8, 0.1, graft, rotate, False, phases)
        torch.ops.secant.precond_step(params, grads, *copies, layout, None, 0.01, *numbers, skipped)
        return params

    return run, {"params": made, "grads": grads}


def search(f: Fuzzer) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Line searches, from rounds with hostile values and rows; or the registered op on a state that does not fit."""
    n, b, dtype = f.size(), f.pick((1, 2, 5, 40)), f.pick((F32, F64))
    count = f.pick((b, b, 1))
    rows = None if count == b else torch.tensor([f.random.randrange(b)])
    if rows is not None and f.spoil(0.3):
        rows[0] = f.pick((*INDICES, b, 2**62, -(2**63)))
    start = [f.normal(b, n, dtype=dtype), f.normal(b), f.normal(b, n, dtype=dtype)]
    broken = f.random.randrange(8) if f.spoil(0.1) else None

    def run(value: Any, grad: Any, slope: Any, c1: Any, max_trials: Any) -> Tensor:
        own = OPS["BatchedSearch"](*start, c1=c1, max_trials=max_trials)
        if broken is not None:
            state = [x[..., :-1] if i == broken else x for i, x in enumerate(own._search)]
            torch.ops.secant.search_advance(*state, *start[1:], None, *own._rule)
        for _ in range(3):
            own.advance(value, grad, rows)
            own.begin(slope, slope, None, rows)
        return own.trial

    args = {"value": f.tensor(f.normal(count)), "grad": f.tensor(f.normal(count, n, dtype=dtype))}
    args |= {"slope": f.tensor(-f.normal(b).abs()), "c1": f.number(1e-4), "max_trials": f.number(25)}
    return run, args


def first(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, Tensor)]


def reference(op: Callable[..., Any], args: dict[str, Any]) -> list[Tensor]:
    """The same call in float64 on the reference, with the values that came in."""

    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(y) for y in x]
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            return x
        if x.layout is torch.sparse_csr:
            crow, col = x.crow_indices().long(), x.col_indices().long()
            return torch.sparse_csr_tensor(crow, col, x.values().double(), x.shape).to_dense()
        return x.resolve_neg().double()

    with secant.use_backend("reference"):
        return first(op(**{k: None if k == "out" else wide(x) for k, x in args.items()}))


MAKERS: dict[str, Callable[[Fuzzer], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "two_loop": two_loop,
    "glm_hvp": glm_hvp,
    "glm_value_grad": glm_value_grad,
    "softmax_hvp": softmax_hvp,
    "softmax_value_grad": softmax_value_grad,
    "cross_entropy_hvp": cross_entropy_hvp,
    "paired_matmul": paired_matmul,
    "gram": gram,
    "history": history,
    "newton_inv_root": newton_inv_root,
    "newton_schulz": newton_schulz,
    "precond_step": precond_step,
    "search": search,
    "inverse_hessian": inverse_hessian,
} | {
    name: blocks(name)
    for name in ("block_inv", "block_solve", "block_eigh", "block_abs_inv", "block_inv_root", "block_function")
}


def run_case(seed: int) -> str:
    """Run one case; "checked", "returned" or "refused"."""
    f = Fuzzer(seed)
    name = f.pick(MAKERS)
    op, args = MAKERS[name](f)
    copies = [(x, x.detach().clone()) for x in f.given if x.layout is torch.strided and not x.is_meta]
    refusal: Exception | None = None
    try:
        result = op(**args)
    except (TypeError, ValueError, secant.BackendError) as error:
        refusal = error
    out = args.get("out")
    for x, copy in copies:
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            continue
        assert torch.equal(x.detach().nan_to_num(), copy.nan_to_num()), f"{name} changed an input"
    if refusal is not None:
        assert f.hostile, f"{name} refused a valid call: {refusal}"
        assert ": expected" in str(refusal) or isinstance(refusal, secant.BackendError), f"{name}: {refusal!r}"
        return "refused"
    if f.hostile or name in ("history", "block_eigh", "search"):
        return "returned"
    for got, want in zip(first(result), reference(op, args), strict=True):
        if got.dtype is torch.int32:
            assert torch.equal(got, want), f"{name}: info"
            continue
        # Bounded by the type of the data where the arithmetic is wider.
        given = [x for y in args.values() for x in (y if isinstance(y, list) else (y,))]
        kinds = {x.dtype for x in given if isinstance(x, Tensor) and x.dtype in TOLERANCE} | {got.dtype}
        bound = max(TOLERANCE[kind] for kind in kinds)
        error = relative(got, want)
        assert error <= bound, f"{name}: {error} from the reference, bound {bound}"
    return "checked"


def main() -> None:
    """Run cases first..first+cases of a seed, and print how each kind ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--skip", help="leave out the ops whose names begin so")
    parser.add_argument("--cpu", help="path of the extension module to use in place of the installed one")
    options = parser.parse_args()
    global secant, OPS
    if options.cpu:
        spec = importlib.util.spec_from_file_location("secant._cpu", options.cpu)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["secant._cpu"] = module
        spec.loader.exec_module(module)
    import secant

    OPS = vars(secant.ops)
    if options.skip:
        for name in [name for name in MAKERS if name.startswith(options.skip)]:
            del MAKERS[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    ends = {"checked": 0, "returned": 0, "refused": 0}
    for case in range(options.first, options.first + options.cases):
        # The last line that reached the disk names the case that killed the process.
        print(f"case {case}", file=sys.stderr, flush=True)
        ends[run_case(options.seed * 1_000_003 + case)] += 1
    print(" ".join(f"{kind} {number}" for kind, number in ends.items()))


if __name__ == "__main__":
    main()
