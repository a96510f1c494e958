"""Kronecker-factored approximations of the GGN and the Fisher information, block by block of the layers."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from secant import _checks
from secant.curvature import _blocks, _errors, _estimators, _evaluate, _graph, _layer_uses, _losses
from secant.curvature._blocks import Block, Dense, Diagonal, Kronecker, Place, Rotated
from secant.curvature._curvature import CurvatureOperator, mean_over_processes
from secant.curvature._estimators import Estimate
from secant.curvature._layer_uses import ChainUses, Layer, Uses
from secant.curvature._matrices import LayeredJacobian, Sandwich, parts_of
from secant.curvature._operator import LinearOperator, Seed
from secant.curvature._parameters import Parameters
from secant.curvature._row_uses import NotUnderstood
from secant.curvature.fisher import EmpiricalFisher, Fisher
from secant.curvature.ggn import GGN, _JacobianOperator
from secant.curvature.hessian import trainable

_SOURCES: dict[str, type[_JacobianOperator]] = {"ggn": GGN, "fisher": Fisher, "empirical": EmpiricalFisher}
_SHARING = ("expand", "reduce")


class KroneckerFactors(NamedTuple):
    """The two factors of the block of a layer, S (x) A.

    slots: places of the weight and the bias among the parameters. inputs: A, (groups, I, I), the bias as the last row
    and column, or (groups, I) where it is diagonal. outputs: S, (groups, O, O).
    """

    slots: tuple[int, ...]
    inputs: Tensor
    outputs: Tensor


class BlockOperator(LinearOperator):
    """A matrix made of blocks on its diagonal; zero, or a multiple of I, on parameters that are in none of them."""

    def __init__(self, params: Parameters) -> None:
        self.params = params
        super().__init__(params.n, params.dtype, params.device, [p.shape for p in params.tensors])

    @abc.abstractmethod
    def _all(self) -> tuple[Sequence[tuple[Place, Block]], float | Tensor]:
        """Return the blocks, and the number on the diagonal elsewhere."""

    @_evaluate.plainly
    @torch.no_grad()
    def _rows(self, vectors: Tensor) -> Tensor:
        return self._product(vectors)

    def _product(self, vectors: Tensor) -> Tensor:
        """Return what `_rows` does, within `torch.no_grad()` and without autocast."""
        blocks, rest = self._all()
        out = torch.empty_like(vectors)
        parts, results = parts_of(vectors, self.params), parts_of(out, self.params)
        left = set(range(len(parts)))
        for place, block in blocks:
            x = place.read(parts)
            place.write(block.apply(x.to(self._wide)).to(x.dtype), results)
            left.difference_update(place.slots)
        for i in left:
            torch.mul(parts[i], rest, out=results[i])
        return out

    @torch.no_grad()
    def _exact_diagonal(self) -> Tensor:
        blocks, rest = self._all()
        out = torch.empty(1, self.params.n, dtype=self._wide, device=self.device)
        results = parts_of(out, self.params)
        for part in results:
            part.copy_(rest) if isinstance(rest, Tensor) else part.fill_(rest)
        for place, block in blocks:
            place.write(block.diag().unsqueeze(0), results)
        return out[0]

    def diag(
        self, num_probes: int | None = None, *, distribution: str = "rademacher", seed: Seed = 0
    ) -> _estimators.Diagonal:
        """Return the diagonal, exactly unless `num_probes` are asked for; see `LinearOperator.diag`."""
        return super().diag(num_probes, distribution=distribution, seed=seed)

    def trace(
        self,
        num_probes: int | None = None,
        *,
        method: str = "hutchinson",
        distribution: str = "rademacher",
        seed: Seed = 0,
    ) -> Estimate:
        """Return the trace, exactly (with standard error 0) unless `num_probes` are asked for; see `LinearOperator`."""
        if num_probes is None:
            return Estimate(float(self._exact_diagonal().sum(dtype=torch.float64)), 0.0, 0)
        return super().trace(num_probes, method=method, distribution=distribution, seed=seed)


class KroneckerInverse(BlockOperator):
    """The inverse of a damped `KFAC` or `EKFAC`, of the blocks that it had when the inverse was asked for."""

    def __init__(self, params: Parameters, blocks: Sequence[tuple[Place, Block]], rest: float | Tensor) -> None:
        super().__init__(params)
        self._blocks, self._rest = blocks, rest

        self._simple = _simple(params, blocks)

    def _vector(self, v: Tensor) -> Tensor:
        """Multiply one vector, without the checks of `matvec`; within `torch.no_grad()`.

        Where all blocks are products of matrices, without what others need: for small ones that takes longer.
        """
        if self._simple is None:
            return self._product(v.unsqueeze(0))[0]
        out = torch.empty_like(v)
        parts, results = self.params.split(v), self.params.split(out)
        layers, left = self._simple
        for i in left:
            torch.mul(parts[i], self._rest, out=results[i])
        for weight, bias, s, a in layers:
            columns = [] if weight is None else [parts[weight]]
            if bias is not None:
                columns.append(parts[bias].unsqueeze(1))
            found = s @ (columns[0] if len(columns) == 1 else torch.cat(columns, 1)) @ a
            if weight is not None:
                results[weight].copy_(found if bias is None else found[:, :-1])
            if bias is not None:
                results[bias].copy_(found[:, -1])
        return out

    def _all(self) -> tuple[Sequence[tuple[Place, Block]], float | Tensor]:
        return self._blocks, self._rest


#: Slots of the weight and the bias, and two matrices.
_Simple = tuple[int | None, int | None, Tensor, Tensor]


def _simple(params: Parameters, blocks: Sequence[tuple[Place, Block]]) -> tuple[list[_Simple], list[int]] | None:
    """Return what is needed for products with one vector, and the slots in no block; None where a block is another."""
    found: list[_Simple] = []
    for place, block in blocks:
        if not isinstance(block, Kronecker) or block.inputs.dim() == 2 or len(block.inputs) > 1 or place.flipped:
            return None
        if block.outputs.dtype is not params.dtype or any(params.tensors[i].dim() > 2 for i in place.slots):
            return None
        if place.weight is not None and params.tensors[place.weight].dim() < 2:
            return None
        found.append((place.weight, place.bias, block.outputs[0], block.inputs[0]))
    taken = {slot for place, _ in blocks for slot in place.slots}
    return found, [i for i in range(len(params.tensors)) if i not in taken]


class _Sums:
    """What is summed over the batches for the block of a layer."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        self.table, self.shape, self.dtype = layer.table, layer.place.shape, dtype
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.count = 0

    def add_inputs(self, layer: Layer, *, reduce: bool) -> None:
        """Add x x^T over samples and places."""
        for use in layer.uses:
            found, count = _layer_uses.second_moment(use.inputs, self.dtype, self.shape[2], self.table, reduce=reduce)
            self.inputs = found if self.inputs is None else self.inputs.add_(found)
            self.count += count

    def add_outputs(self, layer: Layer, gradients: _layer_uses.Gradients, weight: float, *, reduce: bool) -> None:
        """Add weight g g^T over samples and places."""
        for use in layer.uses:
            g = use.outputs(gradients)
            if g is None:
                continue
            g = g.sum(2) if reduce else g.flatten(1, 2)
            found = _layer_uses.gram(g if g.dtype is self.dtype else g.to(self.dtype))
            found = found if weight == 1.0 else found.mul_(weight)
            self.outputs = found if self.outputs is None else self.outputs.add_(found)

    def block(self, scale: float, process_group: Any) -> Kronecker:
        """Return the block, averaged over processes.

        Args:
            scale: of the gradients' part.
        """
        assert self.inputs is not None
        groups, o, _ = self.shape
        s = self.inputs.new_zeros(groups, o, o) if self.outputs is None else self.outputs
        a, s = self.inputs.div_(max(1, self.count)), s if scale == 1.0 else s.mul_(scale)
        return Kronecker(*(mean_over_processes(x, process_group) for x in (a, s)))


class _Batch(NamedTuple):
    """One batch at a point: its weight, the uses of parameters, and the gradients of what is summed over, to pull."""

    weight: float
    uses: Uses | ChainUses
    pulls: Iterable[Callable[[], _layer_uses.Gradients]]


class KFAC(BlockOperator):
    r"""K-FAC: of the GGN or the Fisher information the blocks of the layers, each as one Kronecker product.

    Of G = sum_n J_n^T (sum_f s_fn s_fn^T) J_n the block of a layer with weight W (O, I) is taken to be

        S (x) A,    A = mean of x_np x_np^T,    S = sum_(f,n,p) g_fnp g_fnp^T     (row-major; V -> S V A)

    with x_np what goes into the layer for sample n at place p, and g_fnp what s_f becomes above it, on the way back.
    Places are those of a weight that is shared within a sample: tokens, positions of a convolution's kernel, several
    uses of one layer. Between layers there is nothing. For a single linear layer and the squared error, and a deep
    linear network of one place, this is the block of the GGN itself.

    | used as | A | S |
    |---|---|---|
    | Linear, any product with a matrix | (I, I) | (O, O) |
    | convolution of any dimension | one a group, of the patches | one a group |
    | embedding, `index_select` | diagonal: how often each entry is looked up | (O, O) |
    | all else | the block of G itself, dense up to 64 numbers, | else its diagonal |

    All else is norms, biases by themselves, transposed convolutions, weights that are computed, and those that are used
    in two of these ways. A bias that is added to every product of a weight is a column more of it, with input 1. What
    is read is the graph of the closure, no module and no hook. A parameter that the outputs do not use has a zero
    block. Batch norms in training take the statistics of the batch for constants; nothing else may mix samples, which
    are along the first dimension of the outputs.

    Args:
        closure: () -> (outputs, loss) for "ggn", outputs alone or with a loss for "fisher", (outputs, losses (N,)) for
            "empirical"; (batch) -> with `batches`.
        params, batches, process_group: as for `Hessian`.
        curvature: "ggn", with s_f from the Hessian of the loss in the outputs (one backward pass a class, or a number
            of a sample's outputs; only its positive part where the loss is not convex there); "fisher", with s_f drawn
            (one backward pass for each of `samples`); "empirical", with the gradients of the samples' losses (one).
        sharing: "expand", as above: every place is a sample of its own; "reduce": x_n = mean_p x_np and g_fn = sum_p
            g_fnp, for outputs that average over places.
        weights: one number >= 0 a batch, for S; None for the mean. A is the mean over all batches' places.
        likelihood, samples, reduction, seed: for "fisher", as for `Fisher`; reduction for "empirical", too; seed also
            of the signs below.

    For outputs (N, ..., C) of several predictions a sample "ggn" gives each of them a random sign, so that those of one
    sample do not interfere, on average over the signs.

    Attributes:
        params: as given. curvature, sharing: as given.

    Raises:
        TypeError, ValueError: an argument is invalid. At a product: the closure returns something else; samples are
            mixed; the outputs are no single predictions, or of more than 512 numbers, for "ggn".

    References:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML (2015).
        Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML (2016).
        Eschenhagen, Immer, Turner, Schneider and Hennig, Kronecker-factored approximate curvature for modern neural
        network architectures, NeurIPS (2023), sections 3.2 and 3.3 for "expand" and "reduce".

    Example:
        >>> model, x = torch.nn.Linear(3, 2).double(), torch.randn(50, 3).double()
        >>> y = torch.randn(50, 2).double()
        >>> K = secant.curvature.KFAC.of(model, torch.nn.MSELoss(), x, y)
        >>> G = secant.curvature.GGN.of(model, torch.nn.MSELoss(), x, y)
        >>> torch.allclose(K.to_dense(), G.to_dense())      # exact for one linear layer and squared errors
        True
        >>> step = K.inverse(damping=1e-3) @ torch.ones(8).double()
    """

    def __init__(
        self,
        closure: Callable[..., Any],
        params: Iterable[Tensor],
        *,
        curvature: str = "ggn",
        sharing: str = "expand",
        batches: Iterable[Any] | None = None,
        weights: Sequence[float] | None = None,
        likelihood: str = "categorical",
        samples: int = 1,
        reduction: str = "mean",
        seed: int = 0,
        process_group: Any = "auto",
    ) -> None:
        op = self._name
        if not isinstance(curvature, str) or curvature not in _SOURCES:
            raise _checks.fail(op, "curvature", " or ".join(map(repr, _SOURCES)), _estimators.brief(curvature))
        options: dict[str, Any] = {"batches": batches, "weights": weights, "process_group": process_group}
        if curvature == "fisher":
            options |= {"likelihood": likelihood, "samples": samples, "reduction": reduction, "seed": seed}
        elif curvature == "empirical":
            options["reduction"] = reduction
        source = _named(_SOURCES[curvature], op)(closure, params, keep_graphs=False, **options)
        if weights is not None and not all(w >= 0 for w in weights):
            raise _checks.fail(op, "weights", "numbers >= 0", list(weights))
        self._begin(source, sharing, seed)
        self.curvature = curvature

    def _begin(self, source: _JacobianOperator, sharing: str, seed: int) -> None:
        if sharing not in _SHARING:
            raise _checks.fail(self._name, "sharing", " or ".join(map(repr, _SHARING)), _estimators.brief(sharing))
        self._source, self.sharing, self._seed = source, sharing, seed
        self._found: list[tuple[Place, Block]] | None = None
        self._state: tuple[tuple[int, int], ...] = ()
        super().__init__(source.params)

    @classmethod
    def of(
        cls, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, **options: Any
    ) -> Self:
        """Return the operator of loss_fn(model(inputs), targets) over the parameters that require gradients.

        Args:
            loss_fn: for "empirical" one that gives a loss for each sample. options: those of the class.

        Raises:
            TypeError, ValueError: an argument is invalid.
        """

        def closure() -> tuple[Tensor, Tensor]:
            outputs = model(inputs)
            return outputs, loss_fn(outputs, targets)

        return cls(closure, trainable(cls.__name__, model), **options)

    @classmethod
    def _around(cls, source: CurvatureOperator, seed: int) -> Self | None:
        """Return that of an operator in use, of one batch, for one backward pass; None where it has no layers.

        S is of one vector u = c H_L v for random signs v, |u|^2 = v.H_L v: for squared errors its covariance is H_L,
        for other losses only its trace is right. This is a heuristic.

        Args:
            source: a product with which has been asked for. seed: of the signs.
        """
        if not isinstance(source, _JacobianOperator) or source.batches is not None:
            return None
        (matrix,) = source._iterate()
        if not isinstance(matrix, Sandwich):
            return None
        operator = cls.__new__(cls)
        operator._begin(source, "expand", seed)
        u = _probe(matrix, source.generator(seed))
        uses: Uses | ChainUses
        if isinstance(matrix.jacobian, LayeredJacobian):
            uses = ChainUses(matrix.jacobian.layers, len(u))
        else:
            (evaluator,) = source._evaluators()
            with torch.enable_grad():
                outputs = source._rooted(evaluator())
            try:
                uses = Uses(outputs, source.params, source._slots)
            except NotUnderstood:
                return None
        if not uses.layers:
            return None
        operator._found = operator._sum([_Batch(1.0, uses, [functools.partial(uses.pull, u)])])
        operator._state = source.params.state()
        return operator

    def refresh(self) -> None:
        """Forget the blocks, so that the next product computes them again; see `Hessian.refresh`."""
        self._found = None
        self._source.refresh()

    def factors(self) -> list[KroneckerFactors]:
        """Return the factors of the layers at the current parameters, in float32 or float64.

        Returns:
            A `KroneckerFactors` for each layer, in the order in which the graph has them, from the outputs down.
        """
        return [
            KroneckerFactors(place.slots, block.inputs, block.outputs)
            for place, block in self._kronecker()
            if isinstance(block, Kronecker)
        ]

    def _kronecker(self) -> Sequence[tuple[Place, Block]]:
        return self._all()[0]

    @torch.no_grad()
    def inverse(  # type: ignore[override]
        self, *, damping: float | Tensor = 0.0, split: str = "pi"
    ) -> KroneckerInverse:
        r"""Return the inverse of the damped blocks as an operator, whose products are two small ones for each layer.

        With "pi" lambda is divided among the factors, which changes the matrix that is inverted but keeps it a product:

            (S + sqrt(lambda) / pi I)^-1 (x) (A + pi sqrt(lambda) I)^-1,    pi^2 = (tr A / I) / (tr S / O)

        With "exact" it is (S (x) A + lambda I)^-1, by the eigenvectors of both. The lambda of a block is no less than
        what rounding needs; parameters without a block have 1 / lambda, or 1 for lambda = 0. Later changes of the
        parameters have no effect on it.

        Args:
            damping: lambda, a number >= 0 or a tensor of one. split: "pi" or "exact".

        Raises:
            TypeError, ValueError: an argument is invalid.

        References:
            Martens and Grosse (2015), arXiv 1503.05671, section 6.3, for pi.
        """
        op = f"{self._name}.inverse"
        if split not in ("pi", "exact"):
            raise _checks.fail(op, "split", "'pi' or 'exact'", _estimators.brief(split))
        if isinstance(damping, Tensor) and damping.numel() == 1:
            damping = damping.detach().reshape(()).to(self.device)
        else:
            damping = _checks.nonnegative(op, "damping", damping, "a finite number >= 0, or a tensor of one")
        with _evaluate.plain(self.device):
            return self._inverted(damping, split)

    def _inverted(self, damping: float | Tensor, split: str) -> KroneckerInverse:
        blocks = self._all()[0]
        products = [block for _, block in blocks if isinstance(block, Kronecker)] if split == "pi" else []
        inverses = iter(_blocks.factored_inverses(products, damping))
        found = [
            (place, next(inverses) if split == "pi" and isinstance(block, Kronecker) else block.inverse(damping))
            for place, block in blocks
        ]
        rest = Diagonal(torch.zeros(1, 1, 1, dtype=self._wide, device=self.device)).inverse(damping).diag().reshape(())
        return KroneckerInverse(self.params, found, rest.to(self.dtype))

    # Blocks -----------------------------------------------------------------------------------------------------------

    def _all(self) -> tuple[Sequence[tuple[Place, Block]], float | Tensor]:
        state = self.params.state()
        if self._found is None or state != self._state:
            self._source.refresh()
            self._source._check_surroundings()
            with _evaluate.plain(self.device), torch.no_grad(), self._source._kept_gradients():
                self._found = self._sum(self._batches)
            self._state = state
        return self._found, 0.0

    def _batches(self) -> Iterator[_Batch]:
        """Yield the batches, evaluating the closure at each."""
        source, op, count = self._source, self._name, 0
        for i, evaluator in enumerate(source._evaluators()):
            with torch.enable_grad():
                result, outputs = source._evaluated(evaluator, source._rooted)
            nodes = [_graph.edge_of(outputs)[0]]
            with _errors.explained(op, "backward", nodes), torch.enable_grad():
                try:
                    uses = Uses(outputs, source.params, source._slots)
                except NotUnderstood as error:
                    raise _checks.fail(op, "closure", "outputs (N, ...) of N samples, each by itself", error) from error
                cotangents = self._cotangents(outputs, result)
            if uses.guessed and not uses.keeps_samples(self.generator(0), source._eps):
                expected = "outputs (N, ...) of N samples, each by itself"
                raise _checks.fail(op, "closure", expected, f"some that {uses.guessed} mixes, it seems")
            weight = 1.0 if source.weights is None else source._weight(i)
            yield _Batch(weight, uses, (functools.partial(uses.pull, u) for u in cotangents))
            count += 1
        if count == 0:
            raise _checks.fail(op, "batches", "at least one", "none")
        if source.weights is not None and count != len(source.weights):
            raise _checks.fail(op, "weights", f"one per batch ({count})", len(source.weights))
        if not source._used_slots:
            raise _checks.fail(op, "params", "tensors that the closure uses", "none that it does")

    def _cotangents(self, outputs: Tensor, result: Any) -> Iterator[Tensor]:
        """Return the vectors s_f above the outputs, in their shape."""
        source, like = self._source, outputs.detach()
        if isinstance(source, Fisher):
            residuals, scale = source._draws(like)
            return iter(residuals * scale**0.5)
        factors = source._middle(outputs, result).factors(like)
        if factors is None:
            expected = "outputs of single predictions, of at most 512 numbers each (or curvature 'fisher')"
            raise _checks.fail(self._name, "closure", expected, f"others of shape {tuple(like.shape)}")
        return self._signed(factors, like)

    def _signed(self, factors: Iterator[_losses.Factor], like: Tensor) -> Iterator[Tensor]:
        """Leave out negative blocks, and give those of one sample random signs."""
        signs: Tensor | float = 1.0
        for factor, sign in factors:
            if isinstance(signs, float) and len(sign) > len(like):
                generator = self.generator(self._seed)
                signs = _estimators.rademacher(1, len(sign), factor.dtype, self.device, generator)[0]
            kept = (sign > 0).to(factor.dtype) * signs
            yield (factor.reshape(len(sign), -1) * kept.unsqueeze(1)).reshape(like.shape)

    def _sum(self, batches: Callable[[], Iterator[_Batch]] | Sequence[_Batch]) -> list[tuple[Place, Block]]:
        """Sum the factors over batches and processes."""
        layers: dict[Place, _Sums] = {}
        others: dict[Place, Tensor] = {}
        source, reduce, wide = self._source, self.sharing == "reduce", self._wide
        number = 0
        for batch in batches() if callable(batches) else batches:
            number += 1
            for layer in batch.uses.layers:
                sums = layers.setdefault(layer.place, _Sums(layer, wide))
                sums.add_inputs(layer, reduce=reduce)
            for pull in batch.pulls:
                gradients = pull()
                for layer in batch.uses.layers:
                    layers[layer.place].add_outputs(layer, gradients, batch.weight, reduce=reduce)
                for entry in batch.uses.rows:
                    n = entry.place.shape[1]
                    shape = (n, n) if n <= _layer_uses.DENSE else (n,)
                    total = others.setdefault(entry.place, torch.zeros(shape, dtype=wide, device=self.device))
                    for rows in entry.sample_gradients(gradients, batch.uses.samples):
                        rows = rows.to(wide)
                        part = rows.mT @ rows if total.dim() == 2 else rows.square().sum(0)
                        total.add_(part, alpha=batch.weight)
        self._check_places([*layers, *others])
        self._scale = 1.0 if source.weights is not None else 1.0 / max(1, number)
        group = source.process_group
        found: list[tuple[Place, Block]] = []
        for place, sums in layers.items():
            found.append((place, sums.block(self._scale, group)))
        for place, total in others.items():
            total = mean_over_processes(total.mul_(self._scale), group)
            found.append((place, Dense(total) if total.dim() == 2 else Diagonal(total.reshape(1, -1, 1))))
        return found

    def _check_places(self, places: Sequence[Place]) -> None:
        slots = [slot for place in places for slot in place.slots]
        if len(set(slots)) < len(slots):
            raise _checks.fail(self._name, "batches", "the same use of every parameter in each", "different ones")


class EKFAC(KFAC):
    r"""EKFAC: K-FAC with its eigenvalues replaced by the second moments along its eigenvectors.

        (Q_S (x) Q_A) diag(L) (Q_S (x) Q_A)^T,    L = sum_(f,n) (Q_S^T (sum_p g_fnp x_np^T) Q_A)^2

    with A = Q_A diag Q_A^T and S likewise: of all matrices with these eigenvectors the nearest, in Frobenius' norm, to
    the block of G. It takes a second evaluation and pass over the batches. The diagonal in the eigenbasis, and so the
    trace, is that of G itself ("fisher": of the vectors that were drawn). Blocks of parameters in no layer are those
    of `KFAC`.

    Args, Raises:
        as for `KFAC`.

    References:
        George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural gradient descent in a
        Kronecker-factored eigenbasis, NeurIPS (2018), arXiv 1806.03884, section 3.1.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.randint(2, (50,))
        >>> E = secant.curvature.EKFAC.of(model, torch.nn.CrossEntropyLoss(), x, y)
        >>> G = secant.curvature.GGN.of(model, torch.nn.CrossEntropyLoss(), x, y)
        >>> abs(E.trace().value / float(G.diag().value.sum()) - 1) < 1e-4
        True
    """

    def _kronecker(self) -> Sequence[tuple[Place, Block]]:
        self._all()
        return self._products

    def _sum(self, batches: Callable[[], Iterator[_Batch]] | Sequence[_Batch]) -> list[tuple[Place, Block]]:
        found = self._products = super()._sum(batches)
        rotated: dict[Place, Rotated] = {}
        for place, block in found:
            if isinstance(block, Kronecker):
                (_, qa), (_, qs) = _blocks.eigenbasis(block.inputs), _blocks.eigenbasis(block.outputs)
                assert qs is not None
                rotated[place] = Rotated(qa, qs, torch.zeros_like(block.diag()))
        for batch in batches() if callable(batches) else batches:
            for pull in batch.pulls:
                gradients = pull()
                for layer in batch.uses.layers:
                    target = rotated[layer.place]
                    for each in layer.sample_gradients(gradients, batch.uses.samples):
                        each = target.outputs.mT @ each.to(self._wide)
                        each = each if target.inputs is None else each @ target.inputs
                        target.values.add_(each.square().sum(0), alpha=batch.weight * self._scale)
        for target in rotated.values():
            mean_over_processes(target.values, self._source.process_group)
        return [(place, rotated.get(place, block)) for place, block in found]


@functools.cache
def _named(base: type[_JacobianOperator], name: str) -> type[_JacobianOperator]:
    """Return a class of operators that speaks of itself by another name."""
    return type(name, (base,), {})


def _probe(matrix: Sandwich, generator: torch.Generator) -> Tensor:
    """Return u = c M v for random signs v, with |u|^2 = v.M v."""
    like = matrix.like
    bits = torch.randint(2, like.shape, generator=generator, dtype=like.dtype, device=like.device)
    signs = bits.mul_(2.0).sub_(1.0)
    u = matrix.middle(signs)
    square = u.square().sum()
    found: Tensor = u * ((signs * u).sum().abs() / torch.where(square > 0.0, square, 1.0)).sqrt()
    return found
