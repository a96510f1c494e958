"""K-FAC: the gradient of each layer times the inverse of a Kronecker product; Adam for everything else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from secant import _checks, curvature
from secant._checks import Option
from secant.curvature._blocks import Kronecker, factored_inverses
from secant.optim import _per_parameter
from secant.optim._layer_capture import Capture, ModuleLayer, layers_of
from secant.optim._per_parameter import BETAS, Batch, PerParameterOptimizer, is_due, wide

_Item = TypeVar("_Item")


class _Entry(NamedTuple):
    """What a step has of one parameter: its group and its rate, its number, the average gradient and Adam's step."""

    batch: Batch
    place: int
    average: Tensor
    adam: Tensor


class KFAC(PerParameterOptimizer):
    r"""Precondition the average gradient of each layer by Kronecker factors of the Fisher information (K-FAC).

    For a layer with weight W (O, I), the bias its last column, with the averages m^ of gradients and A^, S^ of factors,
    all corrected for their start at zero,

        A <- c A + (1 - c) mean of x x^T,    S <- c S + (1 - c) N sum of g g^T,
        D = (S^ + sqrt(lambda) / pi I)^-1 m^ (A^ + pi sqrt(lambda) I)^-1,
        W <- (1 - lr w) W - lr D |adam| / |D|,    pi^2 = (tr A / I) / (tr S / O),

    with x what goes into the layer, g the gradient of the loss with respect to what comes out, N the samples of the
    batch, and |adam| the norm of the step that Adam would take (`graft`). Linear layers, convolutions and embeddings
    have factors; norms, biases by themselves, tied weights and the parameters of other modules take Adam's steps at the
    same rate. With one layer and one sample the factors are those of the empirical Fisher matrix itself.

    **No closure is needed.** Hooks on the modules see x in the program's own forward passes and g in its backward
    passes, which makes this the empirical Fisher matrix, of the labels of the data. They hold nothing once a graph is
    freed, do nothing under `no_grad`, and go with `close()`, at the end of a `with` block, or with the optimizer. A
    copy or pickle of the model watches nothing. N is along the first dimension of what goes into a layer. With
    `curvature="fisher"` (labels drawn from the model) or "ggn" there are no hooks: `step(outputs_closure=...)` takes
    a function that returns (outputs, loss), or outputs for "fisher", of which `secant.curvature.KFAC` finds the factors
    in the steps that need them, at the cost of a forward and a backward pass ("ggn": one for each class) there.

    **What is not there.** A parameter without a gradient waits. A layer whose passes were not seen (unused, or its
    gradient set by hand) keeps its factors, and so do all whose x or g is not finite; a layer that has no inverse yet
    takes Adam's steps. So do both layers of `nn.MultiheadAttention` always: its products are taken within one function,
    between which no hook of a module stands (g of the projections of queries, keys and values is nowhere to be seen),
    and its last layer is never called itself. An inverse that cannot be found is not used.

    **What it costs.** Factors take (I^2 + O^2) / (3 I O) of the time of a layer's own passes where they are found; more
    for convolutions, whose patches are formed. `factor_every=5` takes a fifth of that.

    The state is, in float32 for bfloat16 and float16 parameters: 2 times the memory of the parameters, and for each
    layer twice A and S: 2 (I + 1)^2 + 2 O^2 numbers with a bias, I^2 being a group's of a convolution (I = channels of
    the group x kernel, O its output channels), and V in place of I^2 for an embedding of V entries.

    Args:
        params: a module, whose parameters are taken by their names, or parameters or groups, as for
            `torch.optim.Optimizer`. model: the module whose layers these are in, where `params` is none.
        lr: a number >= 0 or a tensor of one element.
        betas: decay rates of m and of Adam's second moment, in [0, 1). eps: Adam's, > 0.
        damping: lambda, > 0. relative_damping: whether lambda is damping (tr A / I)(tr S / O), of each layer, so that
            the scale of the loss is of no effect.
        factor_decay: c, in [0, 1). factor_every, update_every: steps between factors, and between inverses; both are
            found at steps 1, 2, 4, 8, ... before the first of these, too.
        graft: "adam", as above, or "none": without |adam| / |D|.
        kl_clip: None, or kappa > 0: D is multiplied by min(1, sqrt(kappa / sum lr^2 D.g)), over all layers together,
            g the gradient of this step; for graft "none".
        curvature: "empirical", "fisher" or "ggn", see above. likelihood: of the outputs, for "fisher".
        sharing: "expand" or "reduce", see `secant.curvature.KFAC`: how tokens and positions count.
        max_size: layers with a larger factor are left to Adam.
        scaler: the `torch.amp.GradScaler` of the loss, so that its scale is taken out of g.
        process_group: the factors are averaged over: "auto" for the default group where there is one, or None.
        weight_decay: w, decoupled. maximize, capturable: as for torch's Adam.

    Raises:
        TypeError, ValueError: a parameter or an option is not what it may be. In `step`: factors are due, and there is
            no outputs_closure.

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML (2015),
        arXiv 1503.05671, sections 3, 5 and 6.3. Grosse and Martens, ICML (2016), for convolutions. Eschenhagen et al.,
        arXiv 2311.00636, for "expand" and "reduce". Ba, Grosse and Martens, Distributed second-order optimization using
        Kronecker-factored approximations, ICLR (2017), section 5, for kl_clip. Anil et al., Scalable second order
        optimization for deep learning, arXiv 2002.09018, section 5, for grafting (there to Adagrad or SGD). A relative
        damping is a heuristic.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(50, 3), torch.randint(2, (50,))
        >>> with secant.optim.KFAC(model, lr=0.05) as optimizer:
        ...     for _ in range(100):
        ...         optimizer.zero_grad()
        ...         loss = torch.nn.functional.cross_entropy(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        >>> loss.item() < 0.5
        True
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "betas": BETAS,
        "eps": _checks.positive_number(),
        "damping": _checks.positive_number(),
        "relative_damping": _checks.flag(),
        "factor_decay": _checks.number_from(0.0, 1.0),
        "factor_every": _checks.integer_from(1),
        "update_every": _checks.integer_from(1),
        "graft": _checks.one_of("adam", "none"),
    }
    #: Options that all groups have in common, fixed when the optimizer is made.
    WHOLE: ClassVar[Mapping[str, Option]] = {
        "kl_clip": _checks.or_none(_checks.positive_number()),
        "curvature": _checks.one_of("empirical", "fisher", "ggn"),
        "likelihood": _checks.one_of("categorical", "bernoulli", "gaussian"),
        "sharing": _checks.one_of("expand", "reduce"),
        "max_size": _checks.integer_from(1),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        *,
        model: nn.Module | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        damping: float = 1e-2,
        relative_damping: bool = True,
        factor_decay: float = 0.95,
        factor_every: int = 1,
        update_every: int = 10,
        graft: str = "adam",
        kl_clip: float | None = None,
        curvature: str = "empirical",
        likelihood: str = "categorical",
        sharing: str = "expand",
        max_size: int = 4096,
        scaler: Any = None,
        process_group: Any = "auto",
        weight_decay: float = 0.0,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        given = locals()
        if isinstance(params, nn.Module):
            if model is not None:
                raise _checks.fail(self._name, "model", "None beside a module", _checks.describe(type(model)))
            model, params = params, params.named_parameters()
        if not isinstance(model, nn.Module):
            expected = "a module, in params or in model: the layers of the parameters"
            raise TypeError(f"{self._name}: model: expected {expected}, got {_checks.describe(model)}")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(f"{self._name}: scaler: expected a GradScaler, got {_checks.describe(scaler)}")
        self._whole = {name: given[name] for name in self.WHOLE}
        _checks.options(self._name, self.WHOLE, self._whole)
        self._model, self._scaler, self._group = model, scaler, process_group
        self._capture: Capture | None = None
        self._layers: list[ModuleLayer] = []
        own = {name: given[name] for name in self.OPTIONS if name not in PerParameterOptimizer.OPTIONS}
        super().__init__(params, {"lr": lr, **own}, weight_decay=weight_decay, maximize=maximize, capturable=capturable)
        self._watch()

    def _check_options(self, op: str, options: Mapping[str, Any]) -> None:
        super()._check_options(op, options)
        for name in ("update_every", "factor_every"):
            if options["capturable"] and options[name] != 1:
                raise _checks.fail(op, name, "1 where steps are counted on the device", options[name])

    # Hooks ------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Find the layers, and put hooks on them."""
        self.close()
        params = {id(p): p for group in self.param_groups for p in group["params"]}
        found = layers_of(self._model, params, self._whole["max_size"])
        self._layers = [x.like(self.state[x.weight]) if self.state.get(x.weight) else x for x in found]
        self._places = {id(layer.weight): layer for layer in self._layers}
        self._settle()
        if self._whole["curvature"] != "empirical" or not self._layers:
            return
        me = weakref.ref(self)

        def wanted(index: int) -> bool:
            optimizer = me()
            return optimizer is not None and optimizer._is_due(index, "factor_every")

        dtypes = [wide(layer.weight.dtype) for layer in self._layers]
        scale = None if self._scaler is None else self._scaler.scale
        reduce = self._whole["sharing"] == "reduce"
        self._capture = Capture(self._model, self._layers, dtypes, reduce=reduce, wanted=wanted, scale=scale)

    def _settle(self) -> None:
        """Remember which group each parameter is in."""
        self._homes = {id(p): group for group in self.param_groups for p in group["params"]}

    def _is_due(self, index: int, name: str) -> bool:
        """Tell whether the next step of a layer finds something anew."""
        weight = self._layers[index].weight
        group = self._homes[id(weight)]
        if group[name] == 1:
            return True
        state = self.state.get(weight)
        return is_due(1 if not state else int(state["step"].item()) + 1, group[name])

    def close(self) -> None:
        """Remove the hooks; factors stay as they are from now on."""
        if self._capture is not None:
            self._capture.close()
        self._capture = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; layers of the model that it has weights of get factors from now on."""
        super().add_param_group(param_group)
        if hasattr(self, "_places"):  # not while the first groups are added
            self._watch()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_model", "_scaler", "_group", "_whole")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:
            self._capture = None
            self._watch()
        else:  # while a state is loaded
            self._settle()

    # A step -----------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(
        self, closure: Callable[[], Any] | None = None, *, outputs_closure: Callable[[], Any] | None = None
    ) -> Any:
        """Run one step from the gradients as they are; see `torch.optim.Optimizer.step`.

        Args:
            closure: None, or a function that computes the loss, calls backward on it and returns it.
            outputs_closure: () -> (outputs, loss), or outputs, for curvature "fisher" and "ggn"; called without
                gradients to be computed, in the steps that find factors.

        Raises:
            TypeError, ValueError: see the class.
        """
        if outputs_closure is not None and self._whole["curvature"] == "empirical":
            raise _checks.fail(f"{self._name}.step", "outputs_closure", "None for curvature 'empirical'", "a function")
        self._outputs_closure = outputs_closure
        try:
            return super().step(closure)
        finally:
            self._outputs_closure = None

    def _gather(self) -> list[Batch]:
        if self._whole["curvature"] != "empirical":
            self._drawn = self._factors()  # before anything of the state is changed
        return super()._gather()

    def _factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Find the factors of this step from the outputs of the model."""
        due = [i for i, x in enumerate(self._layers) if x.weight.grad is not None and self._is_due(i, "factor_every")]
        due = [i for i in due if self._layers[i].weight.requires_grad]
        if not due:
            return {}
        if not callable(self._outputs_closure):
            expected = f"a function () -> (outputs, loss), for curvature {self._whole['curvature']!r}"
            raise _checks.fail(f"{self._name}.step", "outputs_closure", expected, self._outputs_closure)
        params, seed = [], 0
        for i in due:
            layer = self._layers[i]
            state = self.state.get(layer.weight)
            seed = max(seed, int(state["step"].item()) if state else 0)
            params += [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        options = {name: self._whole[name] for name in ("curvature", "sharing", "likelihood")}
        operator = curvature.KFAC(self._outputs_closure, params, seed=seed, process_group=self._group, **options)
        found = {id(params[f.slots[0]]): f for f in operator.factors()}
        factors = {}
        for i in due:
            layer = self._layers[i]
            f = found.get(id(layer.weight))
            if f is not None and (len(f.slots) == 2) == (layer.bias is not None):
                factors[i] = f.inputs, f.outputs
        return factors

    def _takes_shards(self, group: dict[str, Any]) -> bool:
        return False  # a layer's gradient is multiplied from both sides

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"exp_avg": self._zeros(p), "exp_avg_sq": self._zeros(p)}
        layer = self._places.get(id(p))
        if layer is None:
            return state
        (a, s), groups = layer.sides, layer.place.shape[0]
        like = torch.empty(0, dtype=wide(p.dtype), device=p.device)
        shape = (groups, a) if layer.table else (groups, a, a)
        state["inputs"], state["outputs"] = like.new_zeros(shape), like.new_zeros(groups, s, s)
        state["inputs_inverse"], state["outputs_inverse"] = like.new_zeros(shape), like.new_zeros(groups, s, s)
        state["gathered"] = like.new_zeros(())  # 1 - c^k after k factors
        return state

    def _kind(self, p: Tensor, group: dict[str, Any]) -> str:
        kind = "layer" if id(p) in self._places else "adam"
        state = self.state.get(p)
        if state and ("inputs" in state) is not (kind == "layer"):
            expected = "the layers that it had when the state of its parameters was built"
            raise _checks.fail(self._name, "model", expected, "others")
        return kind

    def _begin(self, batches: list[Batch]) -> None:
        entries: dict[int, _Entry] = {}
        for batch in batches:
            group, averages = batch.group, (batch.state("exp_avg"), batch.state("exp_avg_sq"))
            _per_parameter.moments(batch, *averages, group["betas"])
            adam = _per_parameter.adam(batch, *averages, group["betas"], group["eps"])
            corrected = torch._foreach_div(averages[0], batch.corrections(group["betas"][0]))
            for i, p in enumerate(batch.params):
                entries[id(p)] = _Entry(batch, i, corrected[i], adam[i])
        self._directions = {key: entry.adam for key, entry in entries.items()}
        live = [(i, layer) for i, layer in enumerate(self._layers) if id(layer.weight) in entries]
        self._learn(live, entries)
        self._invert(live, entries)
        self._precondition([layer for _, layer in live], entries)

    def _learn(self, live: list[tuple[int, ModuleLayer]], entries: Mapping[int, _Entry]) -> None:
        """Update the averages of factors by those that were seen, where they are finite."""
        for found in _alike(self._seen_factors(live), lambda each: each[1]):
            states = [self.state[self._layers[i].weight] for i, _, _ in found]
            news = [x for _, a, s in found for x in (a, s)]
            fine = torch.isfinite(torch.stack(torch._foreach_norm(news)).view(-1, 2).sum(1))
            flags = fine.to(news[0].dtype).unbind()
            for state, (i, a, s), flag, is_fine in zip(states, found, flags, fine.unbind(), strict=True):
                rest = 1.0 - entries[id(self._layers[i].weight)].batch.group["factor_decay"]
                for average, new in ((state["inputs"], a), (state["outputs"], s)):
                    average.lerp_(torch.where(is_fine, new, average), rest)
                gathered = state["gathered"]
                gathered.addcmul_(1.0 - gathered, flag, value=rest)

    def _seen_factors(self, live: list[tuple[int, ModuleLayer]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the new factors of layers, by their indices."""
        if self._whole["curvature"] != "empirical":
            for i, (a, s) in self._drawn.items():
                if id(self._layers[i].weight) in self._directions:
                    yield i, a, s
            return
        found = {} if self._capture is None else self._capture.take()
        if self._capture is not None and _processes(self._group) > 1:
            found = self._reduced(found, [i for i, _ in live if self._is_due_now(i)])
        for i, _ in live:
            if i in found:
                a, count, s = found[i]
                yield i, a / count, s

    def _is_due_now(self, i: int) -> bool:
        """Tell whether this step, which has been counted, finds the factors of a layer."""
        weight = self._layers[i].weight
        every = self._homes[id(weight)]["factor_every"]
        return every == 1 or is_due(int(self.state[weight]["step"].item()), every)

    def _reduced(self, found: Mapping[int, Any], indices: list[int]) -> dict[int, tuple[Tensor, Any, Tensor]]:
        """Add up over processes: the means are over all samples of all of them."""
        if not indices:
            return {}
        parts, shapes = [], []
        for i in indices:
            layer = self._layers[i]
            state = self.state[layer.weight]
            a, count, s = found.get(i) or (torch.zeros_like(state["inputs"]), 0, torch.zeros_like(state["outputs"]))
            parts += [a.reshape(-1), a.new_tensor([count]), s.reshape(-1)]
            shapes.append((a, s))
        total = curvature._curvature.mean_over_processes(torch.cat(parts), self._group)
        result, pieces = {}, iter(total.split([x.numel() for x in parts]))
        for i, (a, s) in zip(indices, shapes, strict=True):
            result[i] = next(pieces).view_as(a), next(pieces), next(pieces).view_as(s)
        return result

    def _invert(self, live: list[tuple[int, ModuleLayer]], entries: Mapping[int, _Entry]) -> None:
        """Find the inverses that are due, those of one damping together."""
        due: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
        for _, layer in live:
            entry = entries[id(layer.weight)]
            group = entry.batch.group
            if is_due(entry.batch.counts[entry.place], group["update_every"]):
                key = (group["damping"], group["relative_damping"], layer.weight.device, wide(layer.weight.dtype))
                due.setdefault(key, []).append(self.state[layer.weight])
        for (damping, relative, *_), states in due.items():
            products = []
            for state in states:
                scale = 1.0 / state["gathered"]
                products.append(Kronecker(state["inputs"] * scale, state["outputs"] * scale))
            for state, inverse in zip(states, factored_inverses(products, damping, relative=relative), strict=True):
                fine = torch.isfinite(inverse.inputs.sum() + inverse.outputs.sum())
                for name, new in (("inputs_inverse", inverse.inputs), ("outputs_inverse", inverse.outputs)):
                    state[name].copy_(torch.where(fine, new, state[name]))

    def _precondition(self, layers: list[ModuleLayer], entries: Mapping[int, _Entry]) -> None:
        """Replace Adam's steps of layers by theirs."""
        total: Tensor | float = 0.0
        clipped: list[int] = []
        for those in _alike(layers, lambda layer: layer.weight):
            founds = [self._direction(layer, entries) for layer in those]
            grafted = [k for k, x in enumerate(those) if entries[id(x.weight)].batch.group["graft"] == "adam"]
            if grafted:
                self._graft([those[k] for k in grafted], [founds[k] for k in grafted], entries)
            # The inverse of a positive definite matrix has a positive diagonal; where there is none yet, it is zero.
            firsts = torch.stack([self.state[layer.weight]["outputs_inverse"][0, 0, 0] for layer in those])
            for k, (layer, found, known) in enumerate(zip(those, founds, (firsts > 0.0).unbind(), strict=True)):
                for p, part in zip(_tensors(layer), layer.place.parts(found, _tensors(layer)), strict=True):
                    if id(p) not in entries:
                        continue
                    entry = entries[id(p)]
                    direction = self._directions[id(p)] = torch.where(known, part, entry.adam)
                    if self._whole["kl_clip"] is not None and k not in grafted:
                        total = total + (direction * entry.batch.grads[entry.place]).sum() * entry.batch.lr**2
                        clipped.append(id(p))
        if isinstance(total, Tensor):
            # What does not descend is not a step to shorten.
            factor = torch.where(total > 0.0, self._whole["kl_clip"] / total, 1.0).sqrt().clamp_max(1.0)
            for key in clipped:
                self._directions[key] = self._directions[key] * factor.to(self._directions[key].dtype)

    def _direction(self, layer: ModuleLayer, entries: Mapping[int, _Entry]) -> Tensor:
        """Compute D of a layer, (1, groups, O, I), with a zero for a bias that has no gradient."""
        entry, state = entries[id(layer.weight)], self.state[layer.weight]
        parts, other = [entry.average.unsqueeze(0)], None
        if layer.bias is not None:
            other = entries.get(id(layer.bias))
            zeros = torch.zeros_like(layer.bias, dtype=wide(layer.bias.dtype))
            parts.append((zeros if other is None else other.average).unsqueeze(0))
        found = Kronecker(state["inputs_inverse"], state["outputs_inverse"]).apply(layer.place.read(parts))
        if layer.bias is not None and other is None:
            found[..., -1] = 0.0
        return found

    def _graft(self, layers: list[ModuleLayer], founds: list[Tensor], entries: Mapping[int, _Entry]) -> None:
        """Give each direction the length of Adam's."""
        weights = [entries[id(layer.weight)].adam for layer in layers]
        biases = [entries[id(x.bias)].adam if x.bias is not None and id(x.bias) in entries else None for x in layers]
        norms = torch._foreach_norm(founds + weights + [x for x in biases if x is not None])
        zero, of_biases = torch.zeros_like(norms[0]), iter(norms[2 * len(layers) :])
        second = torch.stack([zero if x is None else next(of_biases) for x in biases])
        own, first = torch.stack(norms[: 2 * len(layers)]).view(2, -1).unbind()
        factors = torch.where(own > 0.0, torch.hypot(first, second) / own, 0.0)
        torch._foreach_mul_(founds, list(factors.unbind()))

    def _update(self, batch: Batch) -> None:
        self._move(batch, [self._directions.pop(id(p)) for p in batch.params])


def _alike(items: Iterable[_Item], tensor: Callable[[_Item], Tensor]) -> list[list[_Item]]:
    """Divide items by the device and the dtype of a tensor of each."""
    found: dict[tuple[torch.device, torch.dtype], list[_Item]] = {}
    for item in items:
        x = tensor(item)
        found.setdefault((x.device, x.dtype), []).append(item)
    return list(found.values())


def _tensors(layer: ModuleLayer) -> list[Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _processes(group: Any) -> int:
    """Return how many processes factors are averaged over."""
    dist = torch.distributed
    if group is None or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(None if group == "auto" else group)
