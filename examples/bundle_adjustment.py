"""Bundle adjustment by Levenberg and Marquardt's method, its small blocks inverted by `secant.ops.block_inv`.

Cameras around a round building, thousands of points on its wall, pixels with noise: all cameras and points are found
again from a perturbed start. A camera has the nine parameters of the BAL data sets (angle-axis rotation, translation,
focal length f, radial distortion k1, k2):

    P = R X + t,   p = -P / P.z,   pixel = f (1 + k1 |p|^2 + k2 |p|^4) p

A step solves (J^T J + lambda diag) d = -J^T r. With B the camera blocks (9 x 9), C the point blocks (3 x 3) and E
between them, points are eliminated: S = B - E C^-1 E^T for the cameras alone. S is never formed; `secant.solvers.cg`
applies its factors, preconditioned by the inverses of its diagonal blocks, and `NielsenDamping` moves lambda. So each
iteration inverts thousands of 3 x 3 and tens of 9 x 9 blocks. The same code runs on `torch.linalg` for comparison.

    python examples/bundle_adjustment.py --cameras 40 --points 8000 --output bundle.png

References: Agarwal, Snavely, Seitz, Szeliski, Bundle adjustment in the large, ECCV 2010 (model, method).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import secant
from secant.benchmarks import machine
from secant.benchmarks.report import Table, duration, times
from secant.cli import console

#: Standard deviation of a pixel coordinate.
NOISE = 0.5
#: Conjugate gradients stop when the residual, in the preconditioner's norm, has fallen by this; or at so many steps.
CG_TOLERANCE, CG_STEPS = 1e-2, 200
#: Done when the model promises to lower the cost by less than this, relatively.
COST_TOLERANCE = 1e-9
FIRST_LAMBDA = 1e-4
#: Both implementations are run this often, in turn; the fastest run of each counts.
REPEATS = 3


class Scene(NamedTuple):
    """What was measured, and where to start. Each camera's M observations stand in a row, the last ones padding.

    Attributes:
        cameras: (C, 9), points: (3, P): the start.
        pixels: (C, 2, M), measured.
        mask: (C, 1, M), 1 for an observation and 0 for padding, which repeats a point of the same camera.
        index: (C, M), the point that is observed.
        true_cameras: (C, 9), true_points: (3, P): what the pixels were made from.
    """

    cameras: Tensor
    points: Tensor
    pixels: Tensor
    mask: Tensor
    index: Tensor
    true_cameras: Tensor
    true_points: Tensor

    @property
    def observations(self) -> int:
        """Observed pixels."""
        return int(self.mask.sum())

    @property
    def expected_rms(self) -> float:
        """RMS of the residuals of a least-squares fit: NOISE, less what the free parameters take up."""
        coordinates = 2 * self.observations
        free = self.cameras.numel() + self.points.numel() - 7  # the pixels do not tell position, rotation and scale
        return NOISE * math.sqrt(1 - free / coordinates)


class Blocks(NamedTuple):
    """Where the inverses of small blocks come from.

    Attributes:
        name: of the library.
        inv: (A + lambda diag(A))^-1 of SPD blocks (..., n, n).
    """

    name: str
    inv: Callable[[Tensor, float], Tensor]


def _damped(a: Tensor, lam: float) -> Tensor:
    a = a.clone()
    a.diagonal(dim1=-2, dim2=-1).mul_(1 + lam)
    return a


SECANT = Blocks("secant", lambda a, lam: secant.ops.block_inv(a, damping=("scale", lam))[0])
INV_EX = Blocks("torch.linalg.inv_ex", lambda a, lam: torch.linalg.inv_ex(_damped(a, lam))[0])
CHOLESKY = Blocks(
    "torch.cholesky_inverse",
    lambda a, lam: torch.cholesky_inverse(torch.linalg.cholesky_ex(_damped(a, lam))[0]),
)


class Row(NamedTuple):
    """One iteration: the cost after it, the lambda of its step, steps of CG, whether it was accepted."""

    cost: float
    lam: float
    cg: int
    accepted: bool


class Solution(NamedTuple):
    """What `solve` found.

    Attributes:
        cameras: (C, 9), points: (3, P).
        first_cost: at the start; rows: of the iterations.
        times: seconds until the end of each iteration. inversions: seconds in `blocks.inv`.
    """

    cameras: Tensor
    points: Tensor
    first_cost: float
    rows: list[Row]
    times: list[float]
    inversions: float

    @property
    def costs(self) -> list[float]:
        """At the start and after each iteration."""
        return [self.first_cost, *(row.cost for row in self.rows)]


def _skew(w: Tensor) -> Tensor:
    x, y, z = w.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack((o, -z, y, z, o, -x, -y, x, o), -1).unflatten(-1, (3, 3))


def rotation(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation matrices of angle-axis vectors (..., 3), and L with d(R X) = (L dw) x (R X)."""
    square = w.square().sum(-1)[..., None, None]
    small = square < 1e-3  # there the formulas cancel, and these series are exact to rounding
    safe = torch.where(small, torch.ones_like(square), square)
    angle = safe.sqrt()
    sine = torch.where(small, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), angle.sin() / angle)
    cosine = torch.where(
        small, 0.5 - square / 24 * (1 - square / 30 * (1 - square / 56)), 2 * (angle / 2).sin().square() / safe
    )
    third = torch.where(
        small, (1 - square / 20 * (1 - square / 42 * (1 - square / 72))) / 6, (1 - angle.sin() / angle) / safe
    )
    k = _skew(w)
    eye = torch.eye(3, dtype=w.dtype, device=w.device)
    return eye + sine * k + cosine * (k @ k), eye + cosine * k + third * (k @ k)


def project(cameras: Tensor, points: Tensor) -> Tensor:
    """Pixels (C, 2, M) of the points (C, 3, M), which each camera sees."""
    moved = rotation(cameras[:, :3])[0] @ points + cameras[:, 3:6, None]
    p = -moved[:, :2] / moved[:, 2:]
    f, k1, k2 = cameras[:, 6:, None, None].unbind(1)
    square = p.square().sum(1, keepdim=True)
    return f * (1 + square * (k1 + k2 * square)) * p


def linearize(cameras: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels with their derivatives.

    Args:
        cameras: (C, 9). points: (C, 3, M), what each camera sees.

    Returns:
        Pixels (C, 2, M); their derivatives in the camera, (C, 9, 2, M), and in the point, (C, 3, 2, M).
    """
    r, left = rotation(cameras[:, :3])
    turned = r @ points
    moved = turned + cameras[:, 3:6, None]
    scale = -1 / moved[:, 2]
    p = moved[:, :2] * scale[:, None]
    f, k1, k2 = cameras[:, 6:, None].unbind(1)
    square = p.square().sum(1)
    radial = 1 + square * (k1 + k2 * square)
    bend = 2 * f * (k1 + 2 * k2 * square)
    x, y = p.unbind(1)
    xx, xy, yy = f * radial + bend * x * x, bend * x * y, f * radial + bend * y * y  # d pixel / dp
    dx, dy = torch.stack((xx, xy), 1) * scale[:, None], torch.stack((xy, yy), 1) * scale[:, None]
    by_moved = torch.stack((dx, dy, dx * x[:, None] + dy * y[:, None]), 1)
    by_rotation = left.mT @ torch.linalg.cross(turned[:, :, None].expand_as(by_moved), by_moved, dim=1).flatten(2)
    fp, square = f[..., None] * p, square[:, None]
    by_lens = torch.stack((radial[:, None] * p, square * fp, square * square * fp), 1)
    by_camera = torch.cat((by_rotation.unflatten(2, p.shape[1:]), by_moved, by_lens), 1)
    by_point = (r.mT @ by_moved.flatten(2)).unflatten(2, p.shape[1:])
    return f[..., None] * radial[:, None] * p, by_camera, by_point


def make_scene(cameras: int, points: int, seed: int = 0) -> Scene:
    """Cameras on an arc (from 40 on: a ring) around a round building, looking at it, in float64.

    A point is found in about half of the images in which it can be seen at less than 60 degrees to the wall's normal.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    arc = min(math.pi, math.radians(4.5) * cameras)
    yaw = (torch.arange(cameras, dtype=torch.float64) + 0.5) * (2 * arc / cameras) - arc
    distance = 9 + 0.5 * uniform(cameras)
    centers = torch.stack((distance * yaw.sin(), 0.7 * uniform(cameras), distance * yaw.cos()), 1)
    true = torch.zeros(cameras, 9, dtype=torch.float64)
    true[:, 1] = -yaw
    true[:, :3] += 0.03 * normal(cameras, 3)
    true[:, 3:6] = -(rotation(true[:, :3])[0] @ centers[..., None]).squeeze(-1)
    true[:, 6] = 1000 + 50 * uniform(cameras)
    true[:, 7] = -0.08 + 0.02 * normal(cameras)
    true[:, 8] = 0.02 + 0.01 * normal(cameras)

    candidates = 2 * points
    around, radius = arc * uniform(candidates), 3 + 0.2 * uniform(candidates)
    normals = torch.stack((around.sin(), torch.zeros_like(around), around.cos()), 1)
    wall = radius[:, None] * normals
    wall[:, 1] = 2 * uniform(candidates)
    sight = centers[:, None] - wall
    cosine = (sight * normals).sum(-1) / sight.norm(dim=-1)
    pixels = project(true, wall.T.expand(cameras, 3, candidates))
    frame = torch.tensor([640.0, 480.0], dtype=torch.float64)[:, None]
    seen = (cosine > 0.5) & (pixels.abs() < frame).all(1)
    seen &= torch.rand(seen.shape, generator=generator, dtype=torch.float64) < 0.5
    kept = (seen.sum(0) >= 2).nonzero().flatten()[:points]
    seen, wall = seen[:, kept], wall[kept].T.contiguous()

    count = seen.sum(1)
    if len(kept) < points or int(count.min()) < 5:  # nine parameters of a camera need five pixels
        raise ValueError(f"{cameras} cameras see too little of {points} points: give more of either")
    longest = int(count.max())
    index = seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    mask = torch.arange(longest) < count[:, None]
    index = torch.where(mask, index, index[:, :1])
    measured = project(true, wall[:, index].transpose(0, 1)) + NOISE * normal(cameras, 2, longest)

    start = true.clone()
    start[:, :3] += 0.02 * normal(cameras, 3)
    start[:, 3:6] += 0.1 * normal(cameras, 3)
    start[:, 6] *= 1 + 0.03 * normal(cameras)
    start[:, 7:] = 0
    moved = wall + 0.1 * normal(3, points)
    return Scene(start, moved, measured, mask[:, None].to(torch.float64), index, true, wall)


class Sight:
    """Who sees what: from points (k, P) to observations (C, k, M), and sums back. Indices are flat: these are fast."""

    def __init__(self, index: Tensor, points: int) -> None:
        self.points = points
        self.shape = index.shape
        self.slots = {
            k: (index[:, None] + points * torch.arange(k, device=index.device)[:, None]).flatten() for k in (3, 6)
        }

    def gather(self, x: Tensor) -> Tensor:
        """(k, P) to (C, k, M)."""
        k = len(x)
        return x.flatten()[self.slots[k]].view(self.shape[0], k, self.shape[1])

    def sum(self, x: Tensor) -> Tensor:
        """(C, k, M) to (k, P)."""
        k = x.shape[1]
        return x.new_zeros(k * self.points).index_add_(0, self.slots[k], x.flatten()).view(k, self.points)


#: A symmetric 3 x 3 block from its (0,0), (0,1), (1,1), (0,2), (1,2), (2,2).
PACKED = (0, 1, 3, 1, 2, 4, 3, 4, 5)
PAIRS = ((0, 0, 1, 0, 1, 2), (0, 1, 1, 2, 2, 2))


class Normal:
    """The normal equations at one point: J^T J in blocks, J^T r."""

    def __init__(self, scene: Scene, sight: Sight, cameras: Tensor, points: Tensor) -> None:
        pixels, by_camera, self.jp = linearize(cameras, sight.gather(points))
        self.sight = sight
        self.residual = (pixels - scene.pixels).mul_(scene.mask)
        self.jp.mul_(scene.mask[:, None])
        self.jc = by_camera.mul_(scene.mask[:, None]).flatten(2)  # (C, 9, 2 M)
        self.b = self.jc @ self.jc.mT
        i, j = PAIRS
        packed = sight.sum((self.jp[:, i] * self.jp[:, j]).sum(2))
        self.c = packed[list(PACKED)].T.reshape(-1, 3, 3)
        self.gc = (self.jc @ self.residual.flatten(1)[..., None]).squeeze(-1)
        self.gp = self.to_points(self.residual)

    def to_points(self, u: Tensor) -> Tensor:
        """Jp^T u, (C, 2, M) to (3, P)."""
        return self.sight.sum((self.jp * u[:, None]).sum(2))

    def from_points(self, y: Tensor) -> Tensor:
        """Jp y, (3, P) to (C, 2, M)."""
        return (self.jp * self.sight.gather(y)[:, :, None]).sum(1)

    def from_cameras(self, x: Tensor) -> Tensor:
        """Jc x, (C, 9) to (C, 2, M)."""
        return (x[:, None] @ self.jc).view_as(self.residual)

    def to_cameras(self, u: Tensor) -> Tensor:
        """Jc^T u, (C, 2, M) to (C, 9)."""
        return (self.jc @ u.flatten(1)[..., None]).squeeze(-1)

    def schur_blocks(self, b: Tensor, inverse: Tensor) -> Tensor:
        """Diagonal blocks of b - E C^-1 E^T, (C, 9, 9); a camera sees a point once. `inverse`: (3, 3, P)."""
        i, j = PAIRS
        packed = self.sight.gather(inverse[i, j])
        rows = packed[:, list(PACKED)].unflatten(1, (3, 3))
        product = (rows[:, :, :, None] * self.jp[:, None]).sum(2)  # C^-1 Jp^T, (C, 3, 2, M)
        inner = (self.jp[:, :, :, None] * product[:, :, None]).sum(1)  # Jp C^-1 Jp^T, (C, 2, 2, M)
        jc = self.jc.unflatten(2, self.residual.shape[1:])
        weighted = jc[:, :, :1] * inner[:, None, 0] + jc[:, :, 1:] * inner[:, None, 1]
        return b - weighted.flatten(2) @ self.jc.mT


def step(
    normal: Normal, lam: float, inv: Callable[[Tensor, float], Tensor], tolerance: float = CG_TOLERANCE
) -> tuple[Tensor, Tensor, int]:
    """Compute the step of the cameras (C, 9) and of the points (3, P) at this lambda, and the steps of CG."""
    inverse = inv(normal.c, lam).permute(1, 2, 0).contiguous()  # (3, 3, P): points innermost, for long loops
    b = _damped(normal.b, lam)

    def solve_points(y: Tensor) -> Tensor:
        return (inverse * y).sum(1)

    def schur(x: Tensor) -> Tensor:
        u = normal.from_cameras(x)
        y = solve_points(normal.to_points(u))
        return (b @ x[..., None]).squeeze(-1) - normal.to_cameras(normal.from_points(y))

    rhs = normal.to_cameras(normal.from_points(solve_points(normal.gp))) - normal.gc
    inverses = inv(normal.schur_blocks(b, inverse), 0.0)
    found = secant.solvers.cg(
        schur,
        rhs,
        preconditioner=lambda r: (inverses @ r[..., None]).squeeze(-1),
        rtol=tolerance,
        max_iter=CG_STEPS,
    )
    x = found.x
    return x, -solve_points(normal.gp + normal.to_points(normal.from_cameras(x))), int(found.iterations)


def half_square(residual: Tensor) -> float:
    """Compute the cost."""
    return float(residual.square().sum()) / 2


def solve(
    scene: Scene, blocks: Blocks, iterations: int, done: Callable[[int, float], None] = lambda i, cost: None
) -> Solution:
    """Levenberg and Marquardt's method from the scene's start.

    Args:
        scene: what to fit. blocks: who inverts blocks. iterations: how many at most, refused steps included.
        done: called after each iteration with its number and the cost.
    """
    spent = 0.0

    def inv(a: Tensor, lam: float) -> Tensor:
        nonlocal spent
        before = time.perf_counter()
        inverse = blocks.inv(a, lam)
        spent += time.perf_counter() - before
        return inverse

    start = time.perf_counter()
    cameras, points = scene.cameras, scene.points
    sight = Sight(scene.index, points.shape[1])
    normal = Normal(scene, sight, cameras, points)
    cost = first_cost = half_square(normal.residual)
    damping = secant.solvers.NielsenDamping(FIRST_LAMBDA)
    rows: list[Row] = []
    seconds: list[float] = []
    for i in range(iterations):
        lam = damping.value
        dc, dp, cg = step(normal, lam, inv)
        change = normal.from_cameras(dc) + normal.from_points(dp)
        promised = -float((change * (normal.residual + change / 2)).sum())
        moved = cameras + dc, points + dp
        new = half_square((project(moved[0], sight.gather(moved[1])) - scene.pixels) * scene.mask)
        accepted = damping.update(cost - new, promised)
        if accepted:
            (cameras, points), cost = moved, new
        rows.append(Row(cost, lam, cg, accepted))
        seconds.append(time.perf_counter() - start)
        done(i + 1, cost)
        if promised < COST_TOLERANCE * cost or i + 1 == iterations:
            break
        if accepted:
            normal = Normal(scene, sight, cameras, points)
    return Solution(cameras, points, first_cost, rows, seconds, spent)


def rms(scene: Scene, cost: float) -> float:
    """Root mean square of the residuals, in pixels a coordinate."""
    return math.sqrt(cost / scene.observations)


def largest_difference(a: Solution, b: Solution) -> float:
    """Compare the costs, relatively, over the start and all iterations; infinite where one took more of them."""
    if len(a.rows) != len(b.rows):
        return math.inf
    return max(abs(x - y) / abs(y) for x, y in zip(a.costs, b.costs, strict=True))


def faster_peer(scene: Scene) -> Blocks:
    """Find which of torch's two ways inverts this scene's point blocks faster, here and now."""
    blocks = Normal(scene, Sight(scene.index, scene.points.shape[1]), scene.cameras, scene.points).c

    def seconds(peer: Blocks) -> float:
        found = []
        for _ in range(4):
            start = time.perf_counter()
            peer.inv(blocks, FIRST_LAMBDA)
            found.append(time.perf_counter() - start)
        return min(found)

    return min((INV_EX, CHOLESKY), key=seconds)


def compare(scene: Scene, iterations: int) -> tuple[Solution, Solution, Blocks]:
    """Solutions by secant and by torch, of each the fastest run, and who torch was. Runs take turns after a warm-up."""
    peer = faster_peer(scene)
    best: dict[str, Solution] = {}
    order = [SECANT, peer]
    for blocks in order:
        solve(scene, blocks, 1)
    with console.progress("bundle adjustment") as advance:
        for turn in range(REPEATS):
            for j, blocks in enumerate(order):

                def done(i: int, cost: float, base: int = 2 * turn + j, name: str = blocks.name) -> None:
                    advance((base + i / iterations) / (2 * REPEATS), f"{name}, cost {cost:.6g}")

                found = solve(scene, blocks, iterations, done)
                if blocks.name not in best or found.times[-1] < best[blocks.name].times[-1]:
                    best[blocks.name] = found
            order.reverse()
    return best[SECANT.name], best[peer.name], peer


def size(scene: Scene) -> str:
    """In words."""
    cameras, points = len(scene.cameras), scene.points.shape[1]
    return f"{cameras} cameras, {points:,} points, {scene.observations:,} observations, float64"


def iterations_table(scene: Scene, ours: Solution) -> Table:
    """One line an iteration."""
    rows = [("0", f"{ours.first_cost:.9g}", f"{rms(scene, ours.first_cost):.4f}", "", "", "")]
    rows += [
        (str(i), f"{row.cost:.9g}", f"{rms(scene, row.cost):.4f}", f"{row.lam:.2e}", str(row.cg),
         "accepted" if row.accepted else "refused")
        for i, row in enumerate(ours.rows, 1)
    ]  # fmt: skip
    title = size(scene)
    notes = (f"rms: of the residuals, in pixels; a fit to noise of {NOISE} px should end at {scene.expected_rms:.4f}.",)
    return Table(title, ("iteration", "cost", "rms", "lambda", "CG steps", "step"), rows, notes)


def times_table(ours: Solution, theirs: Solution, peer: Blocks) -> Table:
    """Seconds of both."""
    rows = []
    for name, found in (("secant.ops.block_inv", ours), (peer.name, theirs)):
        rest = found.times[-1] - found.inversions
        rows.append((name, duration(found.times[-1]), duration(found.inversions), duration(rest)))
    parts = [(x.times[-1], x.inversions, x.times[-1] - x.inversions) for x in (theirs, ours)]
    rows.append(("torch over secant", *(times(slow / fast) for slow, fast in zip(*parts, strict=True))))
    notes = (
        f"The fastest of {REPEATS} runs each, {torch.get_num_threads()} threads; the rest is the same code.",
        f"Largest relative difference of the costs, all iterations: {largest_difference(ours, theirs):.1e}.",
    )
    return Table("The whole, and its parts", ("blocks by", "total", "inverting blocks", "the rest"), rows, notes)


def draw(path: Path, scene: Scene, ours: Solution, theirs: Solution) -> None:
    """Write the picture: RMS over iterations and over seconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from secant.benchmarks import plot

    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    solutions = (("torch.linalg", plot.TORCH, theirs), ("secant", plot.SECANT, ours))
    ratio = theirs.times[-1] / ours.times[-1]
    for name, color, found in solutions:
        above = name == "torch.linalg"  # the curves coincide on the left: a ring around each dot
        dot, face = (9, "none") if above else (4, color)
        errors = [rms(scene, cost) for cost in found.costs]
        left.plot(errors, "o-", color=color, markersize=dot, markerfacecolor=face, linewidth=1.6, label=name)
        label = f"{name}: {duration(found.times[-1])}, {duration(found.inversions)} of it inverting blocks"
        right.plot([0, *found.times], errors, "o-", color=color, markersize=4, linewidth=1.6, label=label)
    left.set_title("The same cost at every iteration", loc="left", fontweight="bold", fontsize=12)
    right.set_title(f"torch.linalg takes {times(ratio)} the time", loc="left", fontweight="bold", fontsize=12)
    left.set_xlabel("iteration")
    right.set_xlabel("seconds")
    left.set_ylabel("RMS reprojection error, pixels")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.axhline(scene.expected_rms, color=plot.GREY, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.set_xlim(left=0)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(frameon=False, fontsize=9.5)
    left.annotate(
        f"expected from noise: {scene.expected_rms:.3f} px", (1, scene.expected_rms), (-4, 8), color="#5a5a5a",
        xycoords=left.get_yaxis_transform(), textcoords="offset points", fontsize=9.5, ha="right",
    )  # fmt: skip
    figure.supxlabel(
        f"{size(scene)}; {machine.summary(machine.describe(torch.device('cpu')))}", fontsize=8.5, color="#5a5a5a"
    )
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> int:
    """Make a scene, solve it with both libraries, print the tables and draw the costs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cameras", type=int, default=40)
    parser.add_argument("--points", type=int, default=8000)
    parser.add_argument("--iterations", type=int, default=15, help="at most; refused steps count")
    parser.add_argument("--output", type=Path, default=Path("bundle.png"), help="picture of the cost (PNG)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.iterations < 1 or args.cameras < 2 or args.points < 1:
        parser.error("expected at least 2 cameras, 1 point and 1 iteration")
    if not args.output.absolute().parent.is_dir():
        parser.error(f"expected a file in an existing directory, got {str(args.output)!r}")
    try:
        scene = make_scene(args.cameras, args.points, args.seed)
    except ValueError as error:
        parser.error(str(error))
    ours, theirs, peer = compare(scene, args.iterations)
    console.show(iterations_table(scene, ours))
    console.show(times_table(ours, theirs, peer))
    draw(args.output, scene, ours, theirs)
    print(f"Wrote {args.output}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
