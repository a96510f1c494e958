"""The generalised Gauss-Newton matrix as a linear operator."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _errors, _evaluate, _graph, _losses, _matrices
from secant.curvature._curvature import CurvatureOperator
from secant.curvature._estimators import Diagonal
from secant.curvature._evaluate import Evaluator
from secant.curvature._matrices import BatchJacobian, BatchMatrix
from secant.curvature._operator import Seed
from secant.curvature.hessian import scalar, trainable


class _JacobianOperator(CurvatureOperator):
    """J^T M J for a Jacobian J of the outputs, found in one of three ways."""

    _MODES = ("double-backward", "forward")

    def _outputs(self, result: Any) -> Tensor:
        """Read what the Jacobian is taken of, from what the closure returns."""
        first = result[0] if isinstance(result, (tuple, list)) and len(result) == 2 else None
        if not isinstance(first, Tensor):
            raise TypeError(f"{self._name}: closure: expected a pair {self._PAIR}, got {type(result).__name__}")
        if not first.is_floating_point():
            raise _checks.fail(self._name, "closure", "real outputs", _checks.describe(first))
        return first

    _PAIR = "(outputs, loss)"

    @abc.abstractmethod
    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        """Build M, which maps u to M u in its shape, from an evaluation with its graph."""

    def _rooted(self, result: Any) -> Tensor:
        outputs = self._outputs(result)
        if not outputs.requires_grad:
            raise _checks.fail(
                self._name, "closure", "outputs with their graph", "some without (detached, or under no_grad?)"
            )
        return outputs

    def _batch_matrix(self, evaluator: Evaluator) -> BatchMatrix:
        op, requested, chosen = self._name, self._requested, self._chosen
        result, outputs = self._evaluated(evaluator, self._rooted)
        nodes = [_graph.edge_of(outputs)[0]]
        with _errors.explained(op, self._used, nodes), torch.enable_grad():
            middle = self._middle(outputs, result)
        if requested in ("auto", "r-operator"):
            with _errors.explained(op, "r-operator", nodes):
                found = _matrices.layered_jacobian(outputs, self.params, self._slots)
            if not isinstance(found, str):
                self._used = "r-operator"
                return _matrices.Sandwich(found, middle, outputs.detach())
            if requested == "r-operator":
                raise _checks.fail(op, "mode", "'auto' or another mode here", f"'r-operator', not for {found}")

        def forward() -> BatchJacobian:
            self._visible(evaluator, self._rooted)

            def repeated(value: Tensor) -> None:
                self._repeated((evaluator.key, "root"), value)

            return _matrices.ForwardJacobian(outputs, self.params, lambda ids: self._outputs(evaluator(ids)), repeated)

        makers: dict[str, Callable[[], BatchJacobian]] = {
            "double-backward": lambda: _matrices.GraphJacobian(outputs, self.params),
            "forward": forward,
        }
        size = self._size(result)
        if chosen is not None:
            self._used = chosen
            with _errors.explained(op, chosen, nodes):
                matrix = _matrices.Sandwich(makers[chosen](), middle, outputs.detach())
                # On the kept graph J is the transpose of J^T by the way it is made.
                return self._checked(matrix, chosen, nodes, size) if chosen == "forward" else matrix
        candidates: dict[str, Callable[[], BatchMatrix]] = {
            mode: lambda make=make: _matrices.Sandwich(make(), middle, outputs.detach())  # type: ignore[misc]
            for mode, make in makers.items()
        }
        return self._choose(candidates, evaluator, nodes, size)

    def diag(self, num_probes: int | None = None, *, distribution: str = "rademacher", seed: Seed = 0) -> Diagonal:
        """Compute the diagonal, exactly unless `num_probes` are asked for.

            diag(J^T M J) = sum_b sum_f sign_fb (J_b^T s_fb)^2,      block b of M = sum_f sign_fb s_fb s_fb^T

        The blocks are the predictions. For the cross-entropy of C classes s_c = sqrt(p_c) (e_c - p), for Fisher and
        empirical Fisher they are the gradients with respect to the outputs; for other losses they are found by C
        products with M and its eigenvectors. Recognised layers take all blocks of one f in one backward pass, whose
        squares are products of squares; other models take one backward pass per block and f, or n products where these
        are fewer, or where the loss does not fall into predictions.

        Args:
            num_probes: None for the exact diagonal; else as for `LinearOperator.diag`, with distribution and seed.

        Returns:
            `Diagonal`: `value` (n,) and `stderr` (n,), zero of the exact one.

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Dangel, Kunstner and Hennig, BackPACK: packing more into backprop, ICLR (2020), section 2.3.

        Example:
            >>> w, x = torch.zeros(2, requires_grad=True), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
            >>> def closure():
            ...     outputs = x @ w
            ...     return outputs, outputs.square().sum() / 2
            >>> secant.curvature.GGN(closure, [w]).diag().value.tolist()        # of X^T X
            [5.0, 9.0]
        """
        return super().diag(num_probes, distribution=distribution, seed=seed)

    def _exact_diagonal(self) -> Tensor:
        self._check_surroundings()
        with _evaluate.plain(self.device), torch.no_grad(), self._kept_gradients():
            found = self._sum(self._write_diagonal, torch.empty(self.params.n, dtype=self.dtype, device=self.device))
            return found.to(self._wide)

    def _write_diagonal(self, matrix: BatchMatrix, out: Tensor) -> None:
        assert isinstance(matrix, _matrices.Sandwich)
        try:
            matrix.diagonal(out)
        except RuntimeError as error:
            raise RuntimeError(_errors.reason(self._name, self._used, error, ())) from error

    def _size(self, result: Any) -> Tensor:
        """Tell how large the loss is, for `_asymmetry`."""
        loss = result[1] if isinstance(result, (tuple, list)) else None
        if isinstance(loss, Tensor):
            return loss.detach().abs().sum()
        return torch.ones((), device=self.device)


class GGN(_JacobianOperator):
    r"""G = J^T H_L J: J the Jacobian of the outputs, H_L the Hessian of the loss with respect to the outputs.

    It is what is left of the Hessian when the second derivatives of the outputs are left out, and positive
    semi-definite when the loss is convex in the outputs. For cross-entropy of a softmax, and for squared error, it is
    the Fisher information. Terms of the loss that do not pass through `outputs`, as a penalty on the parameters, have
    no part in it: add `G + lambda` for L2.

    Linear + activation layers are recognised as in `Hessian`. The cross-entropy of class labels is recognised
    above any model: its product reads the log-probabilities that the graph holds, in one pass, and stores nothing else
    as large as they are. Elsewhere J v is either the derivative of J^T u by u ("double-backward", on the kept graph) or
    forward mode through the closure ("forward"), whichever is faster. `diag()` is exact.

    Args:
        closure: () -> (outputs, loss), or (batch) -> (outputs, loss) with `batches`: outputs a real tensor with its
            graph, from which the loss of one element is computed.
        params, batches, weights, keep_graphs, process_group: as for `Hessian`.
        mode: "auto", "r-operator", "double-backward" or "forward".

    Raises:
        TypeError, ValueError: an argument is invalid. At a product: the closure returns something else.
        RuntimeError: at a product: an operation cannot be differentiated; the message names it.

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation 14
        (2002). Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020), section 8.

    Example:
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(50, 3)
        >>> y = torch.randint(2, (50,))
        >>> def closure():
        ...     outputs = model(x)
        ...     return outputs, torch.nn.functional.cross_entropy(outputs, y)
        >>> G = secant.curvature.GGN(closure, model.parameters())
        >>> ((G + 1e-3) @ torch.ones(8)).shape
        torch.Size([8])
    """

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, **options: Any
    ) -> GGN:
        """Return the GGN of loss_fn(model(inputs), targets) with respect to the parameters that require gradients.

        Args:
            options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """

        def closure() -> tuple[Tensor, Tensor]:
            outputs = model(inputs)
            return outputs, loss_fn(outputs, targets)

        return cls(closure, trainable(cls.__name__, model), **options)

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        loss = scalar(self._name, "closure", result[1])
        top = _graph.edge_of(outputs)
        terms = _matrices.split_terms(loss, {**self._slots, top: -1}) if loss.requires_grad else []
        terms = [term for term in terms if _graph.reaches(term.at, top)]
        if not terms:
            raise _checks.fail(self._name, "closure", "a loss computed from the outputs", "one that does not use them")
        return _losses.curvature(terms, _graph.below_views(top), outputs, loss)[1]


class SquaresGGN(GGN):
    """J^T J, of half the squared sum of the outputs: the GGN whose H_L is known to be I."""

    @property
    def _name(self) -> str:
        return "GGN"

    def _middle(self, outputs: Tensor, result: Any) -> _losses.Middle:
        return _losses.IdentityMiddle()
