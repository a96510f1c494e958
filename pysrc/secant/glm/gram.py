"""Weighted Gram matrices and moments of the rows of X, in row blocks that stay in the cache.

X (N, d) is dense or CSR; with an intercept it stands for [X, 1], which is never formed. A `shift` (d,) is taken off its
rows, block by block while they are in the cache: where features are far from zero for their spread, products of the
difference are right where a difference of products is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

#: A block of rows and its scaled copy share the cache of one core with the panel of the Gram matrix being updated.
_BLOCK_BYTES = 3 << 20
#: Columns of the Gram matrix updated by one product: below, the product is too small for BLAS; above, too much of the
#: half that symmetry gives for free is computed.
_PANEL = 128


def row_blocks(x: Tensor, rows: int, shift: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, dense rows start:stop) of X - shift; views of a dense one, or one buffer again and again."""
    if shift is None:
        yield from _row_blocks(x, rows)
        return
    buffer = torch.empty(min(rows, len(x)), x.shape[1], dtype=x.dtype, device=x.device)
    for start, stop, block in _row_blocks(x, rows):
        yield start, stop, torch.sub(block, shift, out=buffer[: stop - start])


def _row_blocks(x: Tensor, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    n, d = x.shape
    if x.layout is torch.strided:
        for start in range(0, n, rows):
            stop = min(n, start + rows)
            yield start, stop, x[start:stop]
        return
    crow, col, values = x.crow_indices(), x.col_indices(), x.values()
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        low, high = int(crow[start]), int(crow[stop])
        block = torch.sparse_csr_tensor(
            crow[start : stop + 1] - low, col[low:high], values[low:high], (stop - start, d), check_invariants=False
        )
        yield start, stop, block.to_dense()


def weighted_gram(x: Tensor, weight: Tensor, *, intercept: bool, shift: Tensor | None = None) -> Tensor:
    """Compute [X - shift, 1]^T diag(weight) [X - shift, 1], float64.

    Args:
        x: (N, d), dense or CSR.
        weight: (N,).
        intercept: whether the column of ones is there.
        shift: (d,) or None.

    Returns:
        (p, p), p = d + 1 with an intercept; symmetric up to rounding. Summed in the dtype of x.
    """
    d = x.shape[1]
    p = d + intercept
    rows = block_rows(x, p)
    upper = torch.zeros(p, p, dtype=x.dtype, device=x.device)
    scaled = torch.empty(min(rows, x.shape[0]), p, dtype=x.dtype, device=x.device)
    panels = max(1, d // _PANEL)
    cuts = [d * k // panels for k in range(panels + 1)]
    for start, stop, block in row_blocks(x, rows, shift):
        w, s = weight[start:stop, None], scaled[: stop - start]
        torch.mul(block, w, out=s[:, :d])
        if intercept:
            s[:, d:] = w
        for a, b in itertools.pairwise(cuts):
            upper[a:b, a:].addmm_(block[:, a:b].t(), s[:, a:])
    if intercept:
        upper[d, d] = weight.sum()
        if panels == 1:
            upper[d, :d] = upper[:d, d]
    gram = upper.double()
    return gram if panels == 1 else gram.triu() + gram.triu(1).t()


def softmax_gram(
    x: Tensor, probs: Tensor, sample_weight: Tensor | None, *, intercept: bool, shift: Tensor | None = None
) -> Tensor:
    """Compute the Hessian of the multinomial loss: blocks [X, 1]^T diag(c p_a (1[a = b] - p_b)) [X, 1], float64.

    Args:
        x: (N, d), dense or CSR.
        probs: (N, K).
        sample_weight: (N,) or None.
        intercept: whether the column of ones is there.
        shift: (d,) or None.

    Returns:
        (p, K, p, K): coefficient (j, a) against (k, b). Summed in the dtype of x.
    """
    n, d = x.shape
    k, p = probs.shape[1], d + intercept
    rows = block_rows(x, p * k)
    upper = torch.zeros(k, p, k, p, dtype=x.dtype, device=x.device)
    scaled = torch.empty(min(rows, n), k, p, dtype=x.dtype, device=x.device)
    for start, stop, block in row_blocks(x, rows, shift):
        probs_here = probs[start:stop]
        weighted = probs_here if sample_weight is None else probs_here * sample_weight[start:stop, None]
        s = scaled[: stop - start]
        for a in range(k):
            w = -weighted[:, a, None] * probs_here[:, a:]
            w[:, 0] += weighted[:, a]
            torch.mul(block[:, None, :], w[:, :, None], out=s[:, a:, :d])
            if intercept:
                s[:, a:, d] = w
                upper[a, d, a:, d] += w.sum(0)
            upper[a, :d, a:].view(d, -1).addmm_(block.t(), s[:, a:].reshape(stop - start, -1))
    if intercept:
        # The row of the intercept of class a against the coefficients of b is the column of a's against b's intercept.
        upper[:, d, :, :d] = upper[:, :d, :, d].transpose(1, 2)
    full = upper.double()
    for a in range(k):
        for b in range(a):
            full[a, :, b] = full[b, :, a].t()
    return full.permute(1, 0, 3, 2).contiguous()


def weighted_moments(x: Tensor, weight: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the rows, weighted: 1, x_ij - shift_j and its square.

    Args:
        x: (N, d), dense or CSR.
        weight: (N,) or (N, K).
        shift: (d,) or None.

    Returns:
        () or (K,); (d,) or (d, K); (d,) or (d, K), in the dtype of x.
    """
    zero = torch.zeros(x.shape[1], *weight.shape[1:], dtype=x.dtype, device=x.device)
    if x.layout is torch.strided or shift is not None:
        first, second = zero, zero.clone()
        rows = block_rows(x, x.shape[1])
        square = torch.empty(min(rows, x.shape[0]), x.shape[1], dtype=x.dtype, device=x.device)
        for start, stop, block in row_blocks(x, rows, shift):
            w = weight[start:stop]
            first += block.t() @ w
            second += torch.mul(block, block, out=square[: stop - start]).t() @ w
        return weight.sum(0), first, second
    counts = x.crow_indices().diff()
    values = x.values().reshape(-1, *(1,) * (weight.dim() - 1))
    terms = values * torch.repeat_interleave(weight, counts, dim=0)
    col = x.col_indices()
    return weight.sum(0), zero.index_add(0, col, terms), zero.index_add(0, col, terms * values)


def block_rows(x: Tensor, width: int) -> int:
    """Count how many rows of so many numbers share the cache with what is made of them."""
    return max(64, _BLOCK_BYTES // (x.element_size() * max(1, width)))
