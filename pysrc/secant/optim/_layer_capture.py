"""What goes into the layers of a model, and the gradients of what comes out, as the program's own passes have them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secant.curvature import _evaluate, _layer_uses
from secant.curvature._blocks import Place

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Modules whose forward passes a subclass may have changed are not taken for what they derive from.
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.Linear, nn.Embedding, *_CONVOLUTIONS)}


class ModuleLayer(NamedTuple):
    """A module whose weight is that of a layer; see `curvature._layer_uses`.

    name: in the model. place: the shape of the block; its slots are 0 for the weight and 1 for the bias.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    place: Place

    @property
    def table(self) -> bool:
        """Tell whether its inputs are indices."""
        return isinstance(self.module, nn.Embedding)

    def like(self, state: Mapping[str, Tensor]) -> ModuleLayer:
        """Return the layer with or without its bias, as it was when this state of the weight was built."""
        had = not self.table and "inputs" in state and state["inputs"].shape[-1] == self.place.shape[2] + 1
        if had is (self.bias is not None):
            return self
        bias = getattr(self.module, "bias", None) if had else None
        return self._replace(bias=bias, place=self.place._replace(bias=None if bias is None else 1))

    @property
    def sides(self) -> tuple[int, int]:
        """Return the numbers of rows of A and of S."""
        return self.place.shape[2] + (self.bias is not None), self.place.shape[1]


def layers_of(model: nn.Module, params: Mapping[int, Tensor], largest: int) -> list[ModuleLayer]:
    """List the modules that are layers with a weight among `params`, by id, that no other module has.

    Left out are those with a larger factor than `largest`, transposed convolutions, embeddings with a norm or with
    gradients that are scaled or sparse, and subclasses with a forward pass of their own.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    found = []
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not any(isinstance(module, kind) and type(module).forward is f for kind, f in _FORWARDS.items()):
            continue
        if not isinstance(weight, nn.Parameter) or id(weight) not in params or owners[id(weight)] > 1:
            continue
        if bias is not None and not (id(bias) in params and owners[id(bias)] == 1 and bias.requires_grad):
            bias = None
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                continue
            place = Place(0, None, (1, weight.shape[1], weight.shape[0]), flipped=True)
        elif isinstance(module, nn.Linear):
            place = Place(0, None if bias is None else 1, (1, weight.shape[0], weight.shape[1]))
        else:
            groups = int(module.groups)
            shape = (groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
            place = Place(0, None if bias is None else 1, shape)
        layer = ModuleLayer(name, module, weight, bias, place)
        a, s = layer.sides
        if weight.numel() and max(0 if layer.table else a, s) <= largest:
            found.append(layer)
    return found


def inputs_of(layer: ModuleLayer, x: Tensor) -> Tensor:
    """Return what goes into the layer: (groups, N, P, I), with ones for the bias, or indices (N, P)."""
    module: Any = layer.module
    if layer.table:
        return x.reshape(len(x) if x.dim() else 1, -1)
    if isinstance(module, nn.Linear):
        x = x.reshape(1, len(x) if x.dim() > 1 else 1, -1, x.shape[-1])
    else:
        x = x if x.dim() > len(module.kernel_size) + 1 else x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        zeros = [0] * len(module.kernel_size)
        x = _layer_uses.patches(
            x,
            module.kernel_size,
            module.stride,
            zeros,
            module.dilation,
            layer.place.shape[0],
        )
    return x if layer.bias is None else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def outputs_of(layer: ModuleLayer, x: Tensor, g: Tensor) -> Tensor:
    """Return the gradients of what comes out, (groups, N, P, O), for inputs x."""
    module: Any = layer.module
    if isinstance(module, nn.Embedding):
        g = g.reshape(1, len(x) if x.dim() else 1, -1, g.shape[-1])
        if module.padding_idx is not None:
            g = g.masked_fill((x == module.padding_idx).reshape(*g.shape[:3], 1), 0.0)
        return g
    if isinstance(module, nn.Linear):
        return g.reshape(1, len(x) if x.dim() > 1 else 1, -1, g.shape[-1])
    g = g if g.dim() > len(module.kernel_size) + 1 else g.unsqueeze(0)
    return _layer_uses.by_group(g, layer.place.shape[0])


class Sums:
    """What one layer had since the last step: sums of x x^T and of g g^T, and how many there were.

    count: of x. samples, calls: of its own passes. passes: of the model's.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.count = self.samples = self.calls = 0
        self.passes: set[int] = set()


class Hook:
    """Watches the forward pass of one layer for a `Capture`; of no effect in copies of the model.

    Args:
        capture, index: the capture and which of its layers; None of one that watches nothing.
    """

    def __init__(self, capture: Capture | None = None, index: int | None = None) -> None:
        self._capture = None if capture is None else weakref.ref(capture)
        self._index = index

    @property
    def is_dead(self) -> bool:
        """Tell whether it watches nothing any more."""
        return self._capture is None or self._capture() is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        """Ask for the gradient of the output; of the whole model, count."""
        capture = None if self._capture is None else self._capture()
        if capture is None or not torch.is_grad_enabled():
            return
        if self._index is None:
            capture.forwards += 1
        elif args and isinstance(output, Tensor) and output.requires_grad and capture.wanted(self._index):
            output.register_hook(_Receiver(capture, self._index, args[0].detach()))

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()


class _Receiver:
    """Takes the gradient of what one pass of a layer gave, for inputs x."""

    def __init__(self, capture: Capture, index: int, x: Tensor) -> None:
        self._capture, self._index, self._x, self._pass = weakref.ref(capture), index, x, capture.forwards

    def __call__(self, gradient: Tensor) -> None:
        capture = self._capture()
        if capture is not None:
            capture.add(self._index, self._x, gradient.detach(), self._pass)


class Capture:
    """Adds up what the layers of a model have in its passes, from hooks on the modules, until it is closed.

    Args:
        model: its forward passes are told apart where it is called itself. layers: of it. dtypes: of the sums of each.
        reduce: see `curvature.KFAC`. wanted: whether a layer, by its index, is watched in a pass. scale: multiplies a
            number by what the loss is multiplied by, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[ModuleLayer],
        dtypes: list[torch.dtype],
        *,
        reduce: bool,
        wanted: Callable[[int], bool],
        scale: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.layers, self.wanted, self._dtypes, self._reduce, self._scale = layers, wanted, dtypes, reduce, scale
        self.sums: dict[int, Sums] = {}
        self.forwards = 0
        for module in model.modules():
            _bury(module)
        self.handles = [layer.module.register_forward_hook(Hook(self, i)) for i, layer in enumerate(layers)]
        self.handles.append(model.register_forward_pre_hook(Hook(self)))
        self._finalizer = weakref.finalize(self, _remove, self.handles)

    def close(self) -> None:
        """Remove the hooks."""
        self._finalizer()
        self.sums = {}

    @torch.no_grad()
    def add(self, index: int, x: Tensor, gradient: Tensor, number: int) -> None:
        """Add what one pass of a layer had, in this one of the model."""
        layer, dtype = self.layers[index], self._dtypes[index]
        with _evaluate.plain(gradient.device):
            inputs = inputs_of(layer, x)
            a, count = _layer_uses.second_moment(inputs, dtype, layer.place.shape[2], layer.table, reduce=self._reduce)
            g = outputs_of(layer, x, gradient).to(dtype)
            if self._scale is not None:
                g = g / self._scale(torch.ones((), dtype=torch.float32, device=g.device)).to(dtype)
            samples = g.shape[1]
            s = _layer_uses.gram(g.sum(2) if self._reduce else g.flatten(1, 2))
            sums = self.sums.setdefault(index, Sums())
            sums.inputs = a if sums.inputs is None else sums.inputs.add_(a)
            sums.outputs = s if sums.outputs is None else sums.outputs.add_(s)
            sums.count += count
            sums.samples += samples
            sums.calls += 1
            sums.passes.add(number)

    def take(self) -> dict[int, tuple[Tensor, int, Tensor]]:
        """Return the sums of x x^T, how many x there were, and N times the sum of g g^T, and begin anew.

        N is the number of samples of all passes of the model that were gone back through: that of the layer's passes,
        of which one of the model may make several.
        """
        found = {}
        for index, sums in self.sums.items():
            assert sums.inputs is not None
            assert sums.outputs is not None
            n = sums.samples * len(sums.passes) / sums.calls
            found[index] = sums.inputs, sums.count, sums.outputs.mul_(n)
        self.sums = {}
        return found


def _bury(module: nn.Module) -> None:
    """Remove hooks that are left of captures that are no more, or of which the module is a copy."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, Hook) and hook.is_dead:
                del hooks[key]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
