"""The Hessian of a loss as a linear operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _errors, _graph, _matrices
from secant.curvature._curvature import CurvatureOperator
from secant.curvature._evaluate import Evaluator
from secant.curvature._matrices import BatchMatrix


class Hessian(CurvatureOperator):
    r"""H = d^2 loss / d params^2 at the current parameters, as a symmetric operator over flat vectors.

        H v = d/dt grad loss(params + t v)  at t = 0

    The flat vector is the concatenation of the flattened parameters, in their order. At the first product the closure
    is evaluated once; its graph is kept and reused by every product until a parameter is written in place or replaced
    (`refresh` for changes that cannot be seen).

    **Layers.** When the graph shows that Linear layers and elementwise functions (tanh, relu, gelu exact and tanh,
    silu, sigmoid, softplus, sin, multiples) made the loss, from an `nn.Sequential` or by hand, products go through the
    R-operator on fused kernels; whatever is above the last Linear layer, and terms of the loss beside it (a penalty),
    is differentiated by autograd. Nothing is assumed of the module: what is read is the graph of the closure.

    **Modes.** Elsewhere three ways are compared once per operator, at its first product, and the fastest is kept:
    "double-backward" on the kept graph, "forward-over-reverse" and "reverse-over-forward", which evaluate the closure
    at every product (with the same random numbers) and keep no graph. One that is not symmetric for two random vectors,
    or that disagrees with the first to half the digits, is not used; at an `EvaluatedPoint` neither is one that
    evaluates the closure where that alone takes longer than a product. `timings` has the seconds, or the reason. Where
    no other mode is compared (one chosen by `mode`, terms beside recognised layers) the symmetry is checked once. The
    choice is `chosen_mode`, which can be kept and given to another operator.

    **Several vectors** (`matmat`, estimates) are multiplied at once: by batched matrix products where layers are
    recognised, by one backward pass for all in "double-backward" unless there are convolutions, by one evaluation for
    all in "forward-over-reverse"; one after the other in "reverse-over-forward", and where torch cannot, or the first
    column disagrees with its product alone. `columns` says which. As many are taken as fit their intermediate values
    into 128 MB, 32 at most. The result differs from that of single products by rounding.

    **Normalisations.** torch 2.13 has wrong third derivatives of layer_norm, instance_norm and batch_norm in training,
    and wrong forward modes. In forward modes, and where the loss contains a derivative of such a layer, they are made
    of elementary operations here.

    **Parameters** may have a graph of their own: a hidden value that was computed before, a view. Each is a variable by
    itself, none may be computed from another, and the closure has to use it as it is; one that it computes again is an
    error. A leaf that the closure does not use has zero rows; where it uses none of `params`, that is an error.

    **Mini-batches.** With `batches` the closure is called with one batch at a time and the operator is
    sum_b weights_b H_b; weights None means the mean. The graphs of all batches are kept unless `keep_graphs=False`,
    which evaluates them one after the other at every product (once for all columns of `matmat`).

    **Several processes.** Where `torch.distributed` is initialised, products are averaged over the processes; each has
    its own data, and all must make the same products with the same vectors. Use the module without
    DistributedDataParallel, which has no double backward.

    **Attention** runs its math implementation, since the fused kernels have no second derivative; a `SecantWarning`
    says so once.

    **Random numbers.** At one point there is one matrix: dropout and sampling repeat those of the first evaluation
    there, whichever global generator (torch, Python, numpy) or `torch.Generator` they use, and all are left as they
    were. A closure whose value differs when it is evaluated again is an error. Modules in training lend copies of their
    buffers: a batch norm uses the statistics of the batch and keeps its running ones.

    Args:
        closure: () -> loss, or (batch) -> loss with `batches`: a tensor of one element with its graph; it does not call
            backward.
        params: real dense tensors that require gradients and that the closure uses, of one dtype and device.
        batches: something that can be iterated again and again, always in the same order: a list, a DataLoader.
        weights: one number per batch.
        mode: "auto", "r-operator" (raises where the layers are not recognised), "double-backward",
            "forward-over-reverse" or "reverse-over-forward".
        keep_graphs: whether the graph of each batch is kept.
        process_group: "auto" for the default group where there is one; a group; None for no reduction.

    Raises:
        TypeError, ValueError: an argument is invalid. At a product: the closure returns no loss with a graph, or does
            not use a parameter that has a graph of its own.
        RuntimeError: at a product: an operation cannot be differentiated twice, or is differentiated wrongly (the
            message names it); the closure cannot be repeated; the product is within a transform of torch.func.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
        Dagreou, Ablin, Vaiter and Moreau, How to compute Hessian-vector products?, ICLR blog posts (2024).

    Example:
        >>> from torch.nn import Linear, Sequential, Tanh, functional
        >>> model = Sequential(Linear(3, 8), Tanh(), Linear(8, 1))
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> H = secant.curvature.Hessian(lambda: functional.mse_loss(model(x), y), model.parameters())
        >>> v = torch.randn(41)
        >>> product = H @ v
        >>> newton = torch.linalg.solve(H @ torch.eye(41) + torch.eye(41), v)
    """

    _MODES = ("double-backward", "forward-over-reverse", "reverse-over-forward")

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, **options: Any
    ) -> Hessian:
        """Return the Hessian of loss_fn(model(inputs), targets) with respect to the parameters that require gradients.

        Args:
            options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.

        Example:
            >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(50, 3), torch.randint(2, (50,))
            >>> H = secant.curvature.Hessian.of(model, torch.nn.CrossEntropyLoss(), x, y)
        """
        return cls(lambda: loss_fn(model(inputs), targets), trainable(cls.__name__, model), **options)

    def _loss(self, result: Any) -> Tensor:
        loss = scalar(self._name, "closure", result)
        if not loss.requires_grad:
            raise _checks.fail(
                self._name, "closure", "a loss with its graph", "one without (detached, or under no_grad?)"
            )
        return loss

    def _batch_matrix(self, evaluator: Evaluator) -> BatchMatrix:
        op, requested = self._name, self._requested
        if self._is_light and self._is_unlayered and self._is_checked and self._chosen == "double-backward":
            self._used, loss = self._chosen, self._loss(evaluator())
            with _errors.explained(op, self._used, [_graph.edge_of(loss)[0]]):
                return self._double_backward(loss, known=True)
        if self._chosen in ("forward-over-reverse", "reverse-over-forward"):
            self._used = self._chosen
            with _errors.explained(op, self._chosen):
                matrix = self._forward(self._chosen, evaluator)
                size = torch.zeros((), device=self.device) if self._is_checked else self._loss(evaluator()).detach()
                return self._checked(matrix, self._chosen, (), size.reshape(()))
        loss = self._evaluated(evaluator, self._loss)[1]
        nodes, size = [_graph.edge_of(loss)[0]], loss.detach().reshape(())
        if requested in ("auto", "r-operator"):
            with _errors.explained(op, "r-operator", nodes):
                found = _matrices.layered_hessian(loss, self.params, self._slots)
                self._is_unlayered = isinstance(found, str)
                if not isinstance(found, str):
                    self._used = "r-operator"
                    return found if found.rest is None else self._checked(found, self._used, nodes, size)
            if requested == "r-operator":
                raise _checks.fail(op, "mode", "'auto' or another mode for this loss", f"'r-operator', not for {found}")
        if self._chosen is not None:
            self._used = self._chosen
            with _errors.explained(op, self._chosen, nodes):
                return self._checked(self._double_backward(loss), self._chosen, nodes, size)
        candidates: dict[str, Callable[[], BatchMatrix]] = {"double-backward": lambda: self._double_backward(loss)}
        for mode in self._MODES[1:]:
            candidates[mode] = functools.partial(self._forward, mode, evaluator)
        return self._choose(candidates, evaluator, nodes, size)

    def _double_backward(self, loss: Tensor, *, known: bool = False) -> BatchMatrix:
        """Build the matrix on the graph of the gradient, which a point may have already.

        Args:
            known: see `DoubleBackward`.
        """
        terms = [_matrices.whole(loss)]
        found = None if self._gradients is None else self._gradients(loss)
        return _matrices.DoubleBackward(terms, loss, self.params, found, known=known)

    def _forward(self, mode: str, evaluator: Evaluator) -> BatchMatrix:
        self._visible(evaluator, self._loss)
        cls = _matrices.ForwardOverReverse if mode == "forward-over-reverse" else _matrices.ReverseOverForward

        def repeated(value: Tensor) -> None:
            self._repeated((evaluator.key, "root"), value)

        return cls(lambda ids: scalar(self._name, "closure", evaluator(ids)), self.params, repeated)


def trainable(op: str, model: object) -> Iterable[Tensor]:
    """Return the parameters of a module that require gradients.

    Raises:
        TypeError: it is no module, or wrapped by DistributedDataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}.of: model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"{op}.of: model: DistributedDataParallel has no double backward: pass model.module; the products are "
            "reduced over the processes"
        )
    return [p for p in model.parameters() if p.requires_grad]


def scalar(op: str, name: str, loss: object) -> Tensor:
    """Return a loss that is a tensor of one real number."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{op}: {name}: expected a loss (a tensor of one element), got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise _checks.fail(op, name, "a loss of one real element", _checks.describe(loss))
    return loss
