"""The base of Shampoo and SOAP: parameters in tiles, whose Gram averages are refreshed every so often."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secant import _checks, ops
from secant._checks import Option
from secant.ops.precond import ADAM, NONE, Rule
from secant.optim._per_parameter import BETAS, Batch, PerParameterOptimizer, is_due, wide

#: Lists of parameters whose tiles are kept.
_KEPT = 64


class TiledOptimizer(PerParameterOptimizer, abc.ABC):
    """Base of the optimizers that precondition both sides of tiles by averages of their Gram matrices.

    A subclass says what is made of the averages when they are refreshed, and how a step uses it.
    """

    #: Whether steps are those of Adam in another basis, and not products with roots.
    ROTATE: ClassVar[bool]

    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **PerParameterOptimizer.OPTIONS,
        "betas": BETAS,
        "beta_gram": _checks.number_from(0.0, 1.0),
        "eps": _checks.positive_number(),
        "block_size": _checks.or_none(_checks.integer_from(1)),
        "max_side": _checks.integer_from(1),
        "one_sided": _checks.flag(),
        "precondition_frequency": _checks.integer_from(1),
        "distribute": _checks.flag(),
        "state_dtype": _checks.one_of(None, torch.float32, torch.float64, torch.bfloat16),
    }
    READY = False
    SHARDS = False

    _tiles: dict[Any, tuple[ops.Tiles, list[Any]]]  # with the states, so that no other dictionary gets their ids
    _host: dict[int, int]  # step of each parameter, where the tensor that counts must not be read
    _skipped: dict[torch.device, Tensor]

    @abc.abstractmethod
    def _refresh(self, tiles: ops.Tiles, group: dict[str, Any]) -> None:
        """Make of the Gram averages what a step multiplies by."""

    def _graft(self, group: dict[str, Any]) -> int:
        """Return whose length a step takes, a place in `GRAFTS`."""
        return NONE

    def _rule(self, group: dict[str, Any]) -> Rule:
        """Return the numbers of a step."""
        beta1, beta2 = group["betas"]
        numbers = group["beta_gram"], group["eps"], group["weight_decay"]
        return Rule(beta1, beta2, *numbers, self._graft(group), self.ROTATE, group["maximize"])

    def _needs_squares(self, group: dict[str, Any]) -> bool:
        """Tell whether matrices need an average of squares."""
        return self.ROTATE or self._graft(group) == ADAM

    @staticmethod
    def _process_group(group: dict[str, Any]) -> Any:
        """Return the processes that share a refresh, None for this one alone."""
        there = group["distribute"] and torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.group.WORLD if there else None

    @property
    def skipped(self) -> Tensor:
        """Count the tiles that were left as they were since this optimizer was made, in a scalar tensor of int64.

        A tile whose gradient or step is not finite is not stepped; nothing else hears of it.
        """
        counts = list(self._skipped.values()) or [torch.zeros((), dtype=torch.int64)]
        return counts[0] if len(counts) == 1 else torch.stack([x.to(counts[0].device) for x in counts]).sum()

    @torch.no_grad()
    def refresh(self) -> None:
        """Refresh all preconditioners now: between replays of a CUDA graph, which holds a step without it."""
        for group in self.param_groups:
            members: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.numel() and self.state.get(p):
                    members.setdefault((p.dtype, p.device), []).append(p)
            for params in members.values():
                self._refresh(self._tiles_of(params, [self.state[p] for p in params], group), group)

    def _kind(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state.get(p)
        if state and p.dim() > 1 and p.numel() and ("exp_avg_sq" in state) is not self._needs_squares(group):
            expected = "adam or not, as it was when the state of its parameters was built"
            raise _checks.fail(self._name, "graft", expected, repr(group["graft"]))

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if p.numel() == 0:
            return {"exp_avg": self._zeros(p)}
        state = ops.Tiles.new_state(
            p,
            block_size=group["block_size"],
            max_side=group["max_side"],
            one_sided=group["one_sided"],
            second_moment=self._needs_squares(group),
            dtype=group["state_dtype"],
        )
        del state["step"]
        return state

    def _check_parameter(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        super()._check_parameter(name, p, group)
        storage, own = group["state_dtype"], wide(p.dtype)
        if storage not in (None, torch.bfloat16, own):
            raise _checks.fail(self._name, "state_dtype", f"None, bfloat16 or {own} for {name} of {p.dtype}", storage)

    def _update(self, batch: Batch) -> None:
        counts = self._counts(batch)
        every = batch.group["precondition_frequency"]
        due: list[int] = []
        others: list[int] = []
        for i, (p, t) in enumerate(zip(batch.params, counts, strict=True)):
            if p.numel():
                (due if is_due(t, every) else others).append(i)
        if due and batch.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            due, others = [], due + others  # a graph holds a step without it: see `refresh`
        group, rule = batch.group, self._rule(batch.group)
        for members, fresh in ((due, True), (others, False)):
            if not members:
                continue
            grads = [batch.grads[i] for i in members]
            tiles = self._tiles_of([batch.params[i] for i in members], [batch.states[i] for i in members], group)
            if fresh and not self.ROTATE:
                tiles.update_grams(grads, beta_gram=rule.beta_gram, maximize=rule.maximize)
                self._refresh(tiles, group)
                tiles.apply(grads, lr=batch.lr, rule=rule)
                continue
            tiles.step(grads, lr=batch.lr, rule=rule)
            if fresh:
                # In a basis of this very gradient most entries are rounding, which Adam would make as large as any.
                self._refresh(tiles, group)

    def _counts(self, batch: Batch) -> list[Any]:
        """Return the numbers of this step, known to the host."""
        if not batch.group["capturable"]:
            return batch.counts
        counts = []
        for p in batch.params:
            self._host[id(p)] = t = self._host.get(id(p), 0) + 1
            counts.append(t)
        return counts

    def _tiles_of(self, params: list[Tensor], states: list[Any], group: dict[str, Any]) -> ops.Tiles:
        key = (group["block_size"], group["max_side"], *map(id, states))
        found = self._tiles.get(key)
        if found is None:
            if len(self._tiles) >= _KEPT:  # parameters whose gradients come and go make ever new lists
                del self._tiles[next(iter(self._tiles))]
            device = params[0].device
            if device not in self._skipped:
                self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            sides = {"block_size": group["block_size"], "max_side": group["max_side"]}
            try:
                found = ops.Tiles(params, states, **sides, skipped=self._skipped[device]), states
            except ValueError as error:
                expected = "what they were when the state of its parameters was built"
                raise _checks.fail(self._name, "block_size, max_side", expected, sides) from error
            self._tiles[key] = found
        return found[0]

    def _forget(self) -> None:
        super()._forget()
        self._tiles, self._host = {}, {}
        self._skipped = self.__dict__.get("_skipped", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._count_again()

    def _take(self, given: dict[str, Any]) -> None:
        super()._take(given)
        self._tiles = {}
        self._count_again()

    def _count_again(self) -> None:
        """Learn the steps from the state, after a load."""
        self._host = {
            id(p): int(self.state[p]["step"].item())
            for group in self.param_groups
            for p in group["params"]
            if group["capturable"] and self.state.get(p)
        }
