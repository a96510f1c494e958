"""Optimizers for mini-batches by the names that the tables show, each with the learning rates at which it is tuned.

Every one is tuned by as many runs, over `RATES` rates: those of a peer are written here, those of ours follow from its
default. No weight decay, so that what is compared is how a loss goes down. Ours that this version does not have and
packages that are not installed are in `absent`, with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks.training_tasks import TASKS, Task

#: Ours that need nothing but gradients of batches, and `AdaHessian`, `Sophia`, whose backward pass keeps its graph.
OURS = ("Shampoo", "SOAP", "KFAC", "BlockAdam", "StochasticLBFGS", "AdaHessian", "Sophia", "Muon")
#: Rates of ours, in units of the default; rates of everyone.
LADDER = (0.1, 0.3, 1.0, 3.0, 10.0)
RATES = len(LADDER)
#: Those of ours whose default, as published, is no middle: relatives of Adam, tried where AdamW is.
LIKE_ADAM = ("BlockAdam", "StochasticLBFGS", "Sophia")
#: The one whose default rate has rows of its own, and the suffix of their name.
FLAGSHIP, AT_DEFAULT = "Shampoo", ", default rate"
#: The flagship with its roots refreshed more often.
OFTEN, EVERY = f"{FLAGSHIP}, every 5", 5
#: Peers that learn a policy, besides natural gradients; the others have nothing to say there.
POLICY = ("AdamW", "SGD, momentum")
ADAMW, MUON, RAW = "AdamW", "torch Muon", "torch LBFGS"
#: Share of a run in which the rate rises.
WARM_UP = 0.05
#: Pairs that limited-memory methods keep.
HISTORY = 10

Optimizer = Any
Making = Callable[[Task, float | None], Optimizer]


class Entry(NamedTuple):
    """An optimizer in the comparison.

    name: in tables. kind: "backend" (ours) or "peer". make: from a task and a rate, None: its own default. rates: that
    are tried. returns: what its closure returns, "loss" (after backward), "outputs" or "residuals". cosine: whether the
    rate warms up and falls; else the optimizer has its own schedule. key: under which its runs are kept.
    """

    name: str
    kind: str
    make: Making
    rates: tuple[float, ...]
    returns: str = "loss"
    cosine: bool = True
    key: str = ""

    @property
    def default(self) -> float:
        """Return the rate in the middle: of ours, the default."""
        return self.rates[len(self.rates) // 2]

    @property
    def kept(self) -> str:
        """Return the name under which its runs are kept."""
        return self.key or self.name


class Together:
    """Several optimizers, each for its own parameters, that take a step after one evaluation of the closure."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """List the groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Evaluate, then let each take its step."""
        loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all."""
        return {"state": [optimizer.state_dict()["state"] for optimizer in self.optimizers]}


def _given(rate: float | None) -> dict[str, Any]:
    return {} if rate is None else {"lr": rate}


def _torch(name: str, **options: Any) -> Making:
    """Make one of `torch.optim`."""

    def make(task: Task, rate: float | None) -> Optimizer:
        return getattr(torch.optim, name)(task.model.parameters(), **_given(rate), **options)

    return make


#: AdamW's rate for what is no matrix, over that of Muon for matrices.
REST = 0.15


def _muon(task: Task, rate: float | None) -> Optimizer:
    """Make torch's Muon for the matrices, AdamW for the rest."""
    matrices = [p for p in task.model.parameters() if p.ndim == 2]
    rest = [p for p in task.model.parameters() if p.ndim != 2]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, **_given(rate), weight_decay=0.0))
    if rest:
        found.append(torch.optim.AdamW(rest, **_given(rate and REST * rate), weight_decay=0.0))
    return Together(found)


def _schedule_free(task: Task, rate: float | None) -> Optimizer:
    """Make AdamW without a schedule; it warms up by itself."""
    module = importlib.import_module("schedulefree")
    optimizer = module.AdamWScheduleFree(
        task.model.parameters(), **_given(rate), weight_decay=0.0, warmup_steps=max(1, round(WARM_UP * task.steps))
    )
    optimizer.train()
    return optimizer


def _pytorch_optimizer(name: str, **options: Any) -> Making:
    """Make one of the package pytorch_optimizer."""

    def make(task: Task, rate: float | None) -> Optimizer:
        module = importlib.import_module("pytorch_optimizer")
        return getattr(module, name)(task.model.parameters(), **_given(rate), weight_decay=0.0, **options)

    return make


def _facebookresearch(task: Task, rate: float | None) -> Optimizer:
    """Make DistributedShampoo: blocks, steps between refreshes, averages and grafting as ours, else as it comes.

    Its first refresh may not come before the second would.
    """
    module = importlib.import_module("distributed_shampoo")
    graft = module.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8)
    often = {"precondition_frequency": 20, "start_preconditioning_step": 20}
    return module.DistributedShampoo(
        task.model.parameters(), **_given(rate), betas=(0.9, 0.95), max_preconditioner_dim=64, grafting_config=graft,
        **often,
    )  # fmt: skip


def _class(name: str) -> Any:
    return getattr(secant.optim, name)


def _ours(name: str, **options: Any) -> Making:
    def make(task: Task, rate: float | None) -> Optimizer:
        over = task.model if name == "KFAC" else task.model.parameters()
        return _class(name)(over, **_given(rate), **options)

    return make


#: Options of natural gradients on batches: damping on which no search is spent.
FRESH = {"max_iter": 1, "adaptive": False, "line_search_fn": None}


def _residuals(task: Task, rate: float | None) -> Optimizer:
    options: dict[str, Any] = {"damping": 1e-6, **FRESH}
    return secant.optim.NaturalGradient(task.model.parameters(), **_given(rate), **options)


def _policy(task: Task, rate: float | None) -> Optimizer:
    options: dict[str, Any] = {"curvature": "fisher", "damping": 1e-2, **FRESH}
    return secant.optim.NaturalGradient(task.model.parameters(), **_given(rate), **options)


NATURAL = "NaturalGradient"
_NATURAL_RATES = (0.3, 0.5, 1.0, 1.5, 2.0)
#: Natural gradients, by task.
_NATURAL = {
    "pinn": Entry(NATURAL, "backend", _residuals, _NATURAL_RATES, "residuals"),
    "cartpole": Entry(NATURAL, "backend", _policy, _NATURAL_RATES, "outputs"),
}
_FINE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_COARSE = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)
_LBFGS = {"max_iter": 1, "history_size": HISTORY, "tolerance_grad": 0.0, "tolerance_change": 0.0}
#: Those of torch. That L-BFGS makes one iteration a batch, so that its pairs are differences between batches.
_PEERS = (
    Entry(ADAMW, "peer", _torch("AdamW", weight_decay=0.0), _FINE),
    Entry(MUON, "peer", _muon, (6e-3, 2e-2, 6e-2, 2e-1, 6e-1)),
    Entry("SGD, momentum", "peer", _torch("SGD", momentum=0.9), _COARSE),
    Entry("RMSprop", "peer", _torch("RMSprop"), _FINE),
    Entry("Adagrad", "peer", _torch("Adagrad"), _COARSE),
    Entry("Adadelta", "peer", _torch("Adadelta"), (1e-1, 3e-1, 1.0, 3.0, 10.0)),
    Entry(RAW, "peer", _torch("LBFGS", **_LBFGS), _COARSE),
)
#: Those of other packages: entry, module, package.
_PACKAGE = ("pytorch_optimizer", "pytorch-optimizer")
PACKAGED = "pytorch_optimizer Shampoo"
#: Of that package's Shampoo: blocks and steps between refreshes as ours, from the start, grafted to RMSprop.
_BLOCKS = {"block_size": 64, "preconditioning_compute_steps": 20, "start_preconditioning_step": 1, "graft_type": 3}
_OTHERS = (
    (Entry("schedule-free AdamW", "peer", _schedule_free, _FINE, cosine=False), "schedulefree", "schedulefree"),
    (Entry(PACKAGED, "peer", _pytorch_optimizer("ScalableShampoo", **_BLOCKS), _FINE), *_PACKAGE),
    (Entry("pytorch_optimizer SOAP", "peer", _pytorch_optimizer("SOAP"), _FINE), *_PACKAGE),
    (
        Entry("facebookresearch Shampoo", "peer", _facebookresearch, _FINE),
        "distributed_shampoo",
        "git+https://github.com/facebookresearch/optimizers (Python 3.12 or later)",
    ),
)


def _scaled(rates: Sequence[float], scale: float) -> tuple[float, ...]:
    return tuple(float(f"{scale * rate:.3g}") for rate in rates)


def ladder(rate: float) -> tuple[float, ...]:
    """Return the rates around a default."""
    return _scaled(LADDER, rate)


def _default(name: str) -> float:
    return float(inspect.signature(_class(name).__init__).parameters["lr"].default)


def _of_ours(task: str) -> Iterator[Entry]:
    for name in OURS:
        if not hasattr(secant.optim, name) or (name == "KFAC" and not TASKS[task].layered):
            continue
        rates = _FINE if name in LIKE_ADAM else ladder(_default(name))
        if name == FLAGSHIP:
            middle = (rates[len(rates) // 2],)
            yield Entry(name + AT_DEFAULT, "backend", _ours(name), middle, key=name)
            option = _refresh()
            if option is not None and task == "characters":
                yield Entry(OFTEN, "backend", _ours(name, **{option: EVERY}), middle)
        yield Entry(name, "backend", _ours(name), _scaled(rates, TASKS[task].scale))


def _refresh() -> str | None:
    """Find what the flagship calls the steps between two refreshes of its roots."""
    names = inspect.signature(_class(FLAGSHIP).__init__).parameters
    return next((name for name in ("precondition_frequency", "update_every") if name in names), None)


def entries(task: str) -> dict[str, Entry]:
    """Return what runs on a task (of `training_tasks.TASKS`) here, by name: ours first."""
    own = [_NATURAL[task]] if task in _NATURAL else []
    if task == "cartpole":
        return {entry.name: entry for entry in (*own, *(x for x in _PEERS if x.name in POLICY))}
    others = (entry for entry, module, _ in _OTHERS if importlib.util.find_spec(module) is not None)
    peers = [x._replace(rates=_scaled(x.rates, TASKS[task].scale)) for x in (*_PEERS, *others)]
    peers = [x for x in peers if x.name != MUON or hasattr(torch.optim, "Muon")]
    return {entry.name: entry for entry in (*own, *_of_ours(task), *peers)}


def every_name() -> list[str]:
    """List all names, of those too that do not run here."""
    others = [entry.name for entry, _, _ in _OTHERS]
    return [*OURS, FLAGSHIP + AT_DEFAULT, OFTEN, NATURAL, *(entry.name for entry in _PEERS), *others]


def absent() -> list[str]:
    """Say of each that does not run here why not."""
    reasons: dict[str, list[str]] = {}
    for name in OURS:
        if not hasattr(secant.optim, name):
            reasons.setdefault("not in this version", []).append(name)
    if not hasattr(torch.optim, "Muon"):
        reasons["needs a newer torch"] = [MUON]
    for entry, module, package in _OTHERS:
        if importlib.util.find_spec(module) is None:
            reasons.setdefault(f"pip install {package}", []).append(entry.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def factor(step: int, steps: int) -> float:
    """Return the share of the rate at a step from 0: rising over the first twentieth, then half a cosine to 0.

    Example:
        >>> from secant.benchmarks.training_optimizers import factor
        >>> [round(factor(k, 40), 3) for k in (0, 1, 2, 21)]
        [0.5, 1.0, 1.0, 0.5]
    """
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of the tensors in the state that a checkpoint would hold."""
    found = {id(x): x.numel() * x.element_size() for x in _tensors(optimizer.state_dict()["state"])}
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors in what a state may hold: some libraries keep objects of their own there."""
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif hasattr(value, "__dict__") and not callable(value):
        inside = vars(value).values()
    for x in inside:
        yield from _tensors(x)
