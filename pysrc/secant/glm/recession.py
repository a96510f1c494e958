"""Directions along which an unpenalised likelihood never stops falling: separable classes, counts that are all zero.

References:
    Albert and Anderson, On the existence of maximum likelihood estimates in logistic regression models, Biometrika 71
    (1984).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secant.glm.objective import FitPoint, Objective
from secant.solvers.newton import DirectionSolver

#: A Newton step along such a direction moves the margins of the rows that it separates by 1, however far they are;
#: towards a minimum steps vanish.
_STEP = 0.5
#: Rows may go the wrong way by this part of what others gain: the rest of the step still converges.
_SLACK = 1e-3


def intercept_falls_forever(objective: Objective) -> bool:
    """Tell whether an intercept alone has no best value, penalty or not: targets at one end, a class of no weight."""
    if not objective.intercept or objective.loss in ("squared", "huber", "gamma"):
        return False
    t, c = objective.target, objective.sample_weight
    if objective.loss == "multinomial":
        return bool((torch.bincount(t, weights=c, minlength=objective.classes) == 0.0).any())
    used = t if c is None else t[c > 0.0]
    return not bool((used > 0.0).any()) or (objective.loss == "logistic" and not bool((used < 1.0).any()))


def falls_forever(
    objective: Objective, point: FitPoint, step: Tensor | None, system: DirectionSolver[FitPoint]
) -> bool:
    """Tell whether the point, or the Newton step from it, shows that the objective has no minimum.

    The first is a proof: coefficients that put every row on its side (complete separation), along which every row's
    loss falls to its infimum. The second is one up to `_SLACK`: a direction along which no row's loss grows and some
    row's falls (quasi-complete separation). It is not computed where the last step that was taken was too short for it.
    """
    if objective.l2 > 0.0 or objective.loss not in ("logistic", "poisson", "tweedie", "multinomial"):
        return False
    worst, _ = _margins(objective, objective.product(point.theta))
    if worst > 0.0:
        return True
    if step is not None and _margins(objective, objective.product(step))[1] < 0.5 * _STEP:
        return False
    p, _ = system.solve(objective, point, 1e-4, 0.0)
    worst, best = _margins(objective, objective.product(p))
    return best >= _STEP and worst >= -_SLACK * best


def _margins(objective: Objective, z: Tensor) -> tuple[float, float]:
    """Find the smallest and largest gain of a row's margin when its linear predictor grows by z; negative is a loss.

    A row that has a finite optimum of its own (a target in (0, 1), a positive count) loses by any change.
    """
    t = objective.target
    if objective.loss == "multinomial":
        own = z.gather(1, t[:, None])
        gain = own - z.scatter(1, t[:, None], -torch.inf).amax(1, keepdim=True)
        margins = gain[:, 0]
    elif objective.loss == "logistic":
        margins = torch.where(t == 1.0, z, torch.where(t == 0.0, -z, -z.abs()))
    else:
        margins = torch.where(t == 0.0, -z, -z.abs())
    if objective.sample_weight is not None:
        margins = margins[objective.sample_weight > 0.0]
    low, high = torch.aminmax(margins)
    return float(low), float(high)
