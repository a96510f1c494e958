"""A pole balanced on a cart, many of them at once, and a policy that learns to do it.

The equations, the limits and the start are those of gymnasium's CartPole-v1, which the tests compare with where it is
installed; nothing else is needed to run it.

References:
    Barto, Sutton and Anderson, Neuronlike adaptive elements that can solve difficult learning control problems, IEEE
    Transactions on Systems, Man, and Cybernetics 13 (1983), 834-846. Towers et al., Gymnasium, arXiv 2407.17032.
    Williams, Simple statistical gradient-following algorithms, Machine Learning 8 (1992) (the policy gradient).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, INTERVAL = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
#: Beyond these an episode is over; or after so many steps, each of reward 1.
ANGLE, POSITION, STEPS = 12.0 * math.pi / 180.0, 2.4, 500
#: Mean return of `LAST` episodes in a row at which the problem counts as solved.
SOLVED, LAST = 475.0, 100


def start(count: int, generator: torch.Generator) -> Tensor:
    """Draw states (count, 4): position, speed, angle, angular speed, each uniform in [-0.05, 0.05]."""
    return 0.1 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 0.05


def advance(state: Tensor, action: Tensor) -> Tensor:
    """Return the states (B, 4) one interval later, by Euler's rule; action (B,): 0 pushes left, 1 right."""
    x, v, angle, spin = state.unbind(1)
    force = FORCE * (2.0 * action.to(state) - 1.0)
    sine, cosine, mass = angle.sin(), angle.cos(), CART + POLE
    push = (force + POLE * HALF_LENGTH * spin.square() * sine) / mass
    turn = (GRAVITY * sine - cosine * push) / (HALF_LENGTH * (4.0 / 3.0 - POLE * cosine.square() / mass))
    rate = push - POLE * HALF_LENGTH * turn * cosine / mass
    return torch.stack([x + INTERVAL * v, v + INTERVAL * rate, angle + INTERVAL * spin, spin + INTERVAL * turn], 1)


def over(state: Tensor) -> Tensor:
    """Say of each state (B, 4) whether its episode is over."""
    return (state[:, 0].abs() > POSITION) | (state[:, 2].abs() > ANGLE)


class Episodes(NamedTuple):
    """What was played: states (N, 4), actions (N,), advantages (N,), and the return of each episode (B,)."""

    states: Tensor
    actions: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def play(policy: nn.Module, count: int, generator: torch.Generator, discount: float = 0.99) -> Episodes:
    """Play some episodes at once with actions drawn from the policy.

    The advantage of an action is the discounted sum of rewards from there on less its mean over the episodes that are
    still played then, all divided by their deviation.

    Args:
        policy: states (B, 4) in its dtype -> logits (B, 2). count: episodes. generator: of starts and actions.
        discount: of a reward one step later.
    """
    state = start(count, generator)
    dtype = next(policy.parameters()).dtype
    running = torch.ones(count, dtype=torch.bool)
    states: list[Tensor] = []
    actions: list[Tensor] = []
    alive: list[Tensor] = []
    while len(alive) < STEPS and bool(running.any()):
        inputs = state.to(dtype)
        chance = policy(inputs).softmax(1)[:, 1]
        action = (torch.rand(count, generator=generator) < chance).long()
        states.append(inputs)
        actions.append(action)
        alive.append(running)
        state = advance(state, action)
        running = running & ~over(state)
    played = torch.stack(alive)
    to_go = torch.zeros(count, dtype=torch.float64)
    sums = torch.zeros(played.shape, dtype=torch.float64)
    for t in range(len(alive) - 1, -1, -1):
        to_go = played[t] * (1.0 + discount * to_go)
        sums[t] = to_go
    advantages = sums - sums.sum(1, keepdim=True) / played.sum(1, keepdim=True)
    kept = advantages[played]
    kept = kept / (kept.std(correction=0) + 1e-8)
    return Episodes(torch.stack(states)[played], torch.stack(actions)[played], kept.to(dtype), played.sum(0).double())


def outputs(policy: nn.Module, episodes: Episodes) -> tuple[Tensor, Tensor]:
    """Return the logits (N, 2) of what was played and the loss, -mean(advantage log p(action)), with their graph."""
    logits = policy(episodes.states)
    chosen = logits.log_softmax(1).gather(1, episodes.actions.unsqueeze(1))[:, 0]
    return logits, -(episodes.advantages * chosen).mean()
