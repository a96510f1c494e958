"""The strong Wolfe search on functions of one variable."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from secant.solvers import LineSearchResult, Trial, cubic_minimizer, run, strong_wolfe


def search(phi, t=1.0, **options) -> tuple[LineSearchResult, list[Trial]]:
    """Run the search on phi(t) -> (value, slope); the result and the trials made, in order."""
    trials = []

    def evaluate(t):
        trials.append(Trial(t, *phi(t)))
        return trials[-1]

    def keep(best):
        # What may still be returned is the start or an earlier finite trial.
        assert best == 0.0 or any(best == x.t and math.isfinite(x.value) for x in trials)

    step = run(strong_wolfe(Trial(0.0, *phi(0.0)), evaluate(t), **options), evaluate, keep)
    assert step.evaluations == len(trials)
    assert step.trial.t == 0.0 or step.trial in trials
    return step, trials


def is_wolfe(phi, t, c1=1e-4, c2=0.9) -> bool:
    (f0, g0), (f, g) = phi(0.0), phi(t)
    return f <= f0 + c1 * t * g0 and abs(g) <= c2 * abs(g0)


@given(
    minimum=st.floats(1e-3, 1e3),
    curvature=st.floats(1e-3, 1e3),
    wave=st.floats(0.0, 0.9),
    first=st.floats(1e-3, 1e3),
)
def test_step_satisfies_both_conditions(minimum, curvature, wave, first):
    """A parabola with ripples, bounded below: where it descends at 0, Wolfe steps exist (N&W Lemma 3.1)."""

    def phi(t):
        u = t - minimum
        return (
            curvature * (0.5 * u * u + wave * math.sin(u)),
            curvature * (u + wave * math.cos(u)),
        )

    if not phi(0.0)[1] < 0.0:
        return
    step, _ = search(phi, first, max_evaluations=100, tolerance=0.0)
    # 100 trials shrink or grow a bracket by far more than the six orders between first and minimum.
    assert step.wolfe
    assert is_wolfe(phi, step.trial.t)


def assert_trials_are_those_of_torch(phi, start, first, most):
    """The same trials and the same choice for phi(number of the trial, t)."""
    seen = []

    def objective(_, t, d):
        seen.append(float(t))
        value, slope = phi(len(seen) - 1, seen[-1])
        return value, torch.tensor([slope], dtype=torch.float64)

    one, gradient = torch.ones(1).double(), torch.tensor([start[1]], dtype=torch.float64)
    theirs = importlib.import_module("torch.optim.lbfgs")._strong_wolfe
    # Its max_ls counts the trials after the first.
    _, _, chosen, count = theirs(objective, None, first, one, start[0], gradient, gradient[0], max_ls=most - 1)
    assume(all(math.isfinite(t) for t in seen))  # where the cubic degenerates to 0 / 0 it tries NaN, we bisect

    numbers = itertools.count()
    step, trials = search(lambda t: phi(next(numbers), t) if t > 0.0 else start, first, max_evaluations=most)
    assert step.evaluations == len(trials) == count
    # A trial is the root of a quadratic whose rounding its condition amplifies, trial after trial.
    assert [x.t for x in trials] == pytest.approx(seen, rel=1e-6)
    assert step.trial.t == pytest.approx(float(chosen), rel=1e-6)


# Always the same examples: a decision that hangs on the last bit may fall either way.
@given(
    waves=st.lists(st.tuples(st.floats(-3.0, 3.0), st.floats(0.1, 5.0), st.floats(0.0, 6.3)), min_size=1, max_size=4),
    bowl=st.floats(-0.1, 1.0),
    first=st.floats(0.01, 20.0),
    most=st.integers(1, 25),
)
@settings(max_examples=300, derandomize=True)
def test_trials_are_those_of_torch_on_waves(waves, bowl, first, most):
    def phi(_, t):
        value = 0.01 * bowl * t * t + sum(a * math.sin(w * t + p) for a, w, p in waves)
        return value, 0.02 * bowl * t + sum(a * w * math.cos(w * t + p) for a, w, p in waves)

    start = phi(0, 0.0)
    assume(start[1] < -1e-3)
    assert_trials_are_those_of_torch(phi, start, first, most)


@given(
    script=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=9, max_size=9),
    slope=st.integers(-4, -1),
    most=st.integers(1, 9),
)
@settings(max_examples=600, derandomize=True)
def test_trials_are_those_of_torch_on_scripts(script, slope, most):
    """What a trial finds does not depend on where it is: every branch is taken, and values tie."""
    assert_trials_are_those_of_torch(lambda k, _: tuple(map(float, script[k])), (0.0, float(slope)), 1.0, most)


@given(scale=st.floats(1e-6, 1e6), first=st.floats(1e-6, 1e6))
def test_cubic_minimizer_is_exact_on_cubics(scale, first):
    """F(t) = t^3 - 3 t has its minimum at 1, whichever points it is seen from."""

    def at(t):
        return Trial(scale * t, t**3 - 3.0 * t, (3.0 * t * t - 3.0) / scale)

    for left, right in ((0.0, 2.0), (2.0, 0.0), (0.5, 3.0)):
        # Each of the dozen operations rounds once; d1 cancels at most one digit here.
        assert cubic_minimizer(at(left), at(right), 0.0, 4.0 * scale) == pytest.approx(scale, rel=1e-13)
    assert cubic_minimizer(at(0.0), at(2.0), 1.5 * scale, 1.8 * scale) == 1.5 * scale
    assert cubic_minimizer(at(0.0), at(2.0), 0.1 * scale, 0.2 * scale) == 0.2 * scale


def test_cubic_minimizer_bisects_where_there_is_no_minimum():
    # Values and slopes of t^3 + t: its derivative has no zero.
    assert cubic_minimizer(Trial(0.0, 0.0, 1.0), Trial(1.0, 2.0, 4.0), 0.0, 1.0) == 0.5
    # A straight line falls for ever.
    assert cubic_minimizer(Trial(0.0, 0.0, -1.0), Trial(1.0, -1.0, -1.0), 1.0, 10.0) == 10.0
    assert cubic_minimizer(Trial(0.0, 0.0, 1.0), Trial(1.0, 1.0, 1.0), -10.0, 1.0) == -10.0
    # One point seen twice, and slopes whose product overflows.
    assert cubic_minimizer(Trial(1.0, 0.0, 1.0), Trial(1.0, 0.0, 1.0), 0.0, 3.0) == 1.5
    assert cubic_minimizer(Trial(0.0, 0.0, -1e300), Trial(1.0, 0.0, 1e300), 0.0, 1.0) == 0.5


def test_first_trial_is_taken_when_it_will_do():
    step, trials = search(lambda t: ((t - 1.0) ** 2, 2.0 * (t - 1.0)), 1.0)
    assert step == LineSearchResult(trials[0], True, 1)


def test_short_first_trial_is_extrapolated_at_most_tenfold():
    step, trials = search(lambda t: (0.5 * (t - 1000.0) ** 2, t - 1000.0), 1.0)
    assert step.wolfe
    assert [x.t for x in trials[:2]] == [1.0, 10.0]
    assert all(b.t <= 10.0 * a.t for a, b in itertools.pairwise(trials))


def log_barrier(t):
    """-log(1 - t) - 3 t: a minimum at t = 2/3, NaN from t = 1 on."""
    return (-math.log(1.0 - t) - 3.0 * t, 1.0 / (1.0 - t) - 3.0) if t < 1.0 else (math.nan, math.nan)


@pytest.mark.parametrize("first", [1.0, 1.5, 40.0, 1e9])
def test_log_going_nan_makes_the_step_shorter(first):
    step, trials = search(log_barrier, first)
    assert step.wolfe
    assert is_wolfe(log_barrier, step.trial.t)
    # Back from 1e9 = 2^30 the trials at 2^(-k (k + 1) / 2) take eight to come below 1; a few more to be accepted.
    assert len(trials) <= 12


def test_nan_while_extrapolating_ends_inside_the_domain():
    """Phi falls steeply all the way to a cliff: there is no Wolfe step, but there are lower points."""

    def cliff(t):
        return (-t, -1.0) if t < 5.0 else (math.inf, 1.0)

    step, _ = search(cliff, 1.0)
    assert not step.wolfe
    assert 1.0 <= step.trial.t < 5.0
    # The bracket ends when its width is below the tolerance, or the evaluations do.
    assert step.trial.value == -step.trial.t


@pytest.mark.parametrize(
    ("value", "slope"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, -1.0), (0.0, math.nan), (-1.0, -math.inf)]
)
def test_no_finite_point_returns_to_the_start(value, slope):
    step, _ = search(lambda t: (1.0, -1.0) if t == 0.0 else (value, slope), 1.0)
    assert step.trial == Trial(0.0, 1.0, -1.0)
    assert not step.wolfe


def test_a_hole_inside_the_bracket_is_stepped_around():
    def holed(t):
        return ((t - 1.0) ** 2, 2.0 * (t - 1.0)) if not 0.4 < t < 1.2 else (math.nan, math.nan)

    step, _ = search(holed, 3.0, c2=0.5)
    assert math.isfinite(step.trial.value)
    assert step.trial.value < 1.0


def test_flat_tail():
    """exp(-1/t^2) backwards: slope and curvature vanish to all orders towards the minimum."""

    def flat(t):
        u = 1.0 - t
        return (math.exp(-1.0 / u**2), -2.0 / u**3 * math.exp(-1.0 / u**2)) if abs(u) > 0.04 else (0.0, 0.0)

    for first in (1e-3, 0.5, 1.0, 30.0):
        step, _ = search(flat, first)
        assert step.wolfe
        assert is_wolfe(flat, step.trial.t)


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_evaluations_are_limited(most):
    # A slope that never flattens: no Wolfe step exists, every trial is lower.
    step, trials = search(lambda t: (-t, -1.0), 1.0, max_evaluations=most)
    assert len(trials) == most
    assert step == LineSearchResult(trials[-1], False, most)
    # And one where every trial is higher.
    step, trials = search(lambda t: (t, -1.0 if t == 0.0 else 1.0), 1.0, max_evaluations=most)
    assert len(trials) == most
    assert step.trial.t == 0.0


def test_a_narrow_bracket_ends_the_search():
    # Higher for every t > 0, by a jump: the bracket shrinks towards 0 until size * width < tolerance.
    def jump(t):
        return (0.0, -1.0) if t == 0.0 else (1.0, 1.0)

    step, wide = search(jump, 1.0, tolerance=1e-2, max_evaluations=100)
    _, narrow = search(jump, 1.0, tolerance=1e-2, size=100.0, max_evaluations=100)
    assert step.trial.t == 0.0
    assert 1e-3 < wide[-1].t < 1e-1
    assert len(narrow) > len(wide)


@pytest.mark.parametrize(
    ("start", "first", "options", "name"),
    [
        (Trial(0.0, 1.0, 1.0), Trial(1.0, 0.0, 0.0), {}, "start"),
        (Trial(0.0, 1.0, 0.0), Trial(1.0, 0.0, 0.0), {}, "start"),
        (Trial(0.0, math.nan, -1.0), Trial(1.0, 0.0, 0.0), {}, "start"),
        (Trial(0.0, 1.0, math.nan), Trial(1.0, 0.0, 0.0), {}, "start"),
        (Trial(0.0, 1.0, -math.inf), Trial(1.0, 0.0, 0.0), {}, "start"),
        (Trial(0.0, 1.0, -1.0), Trial(0.0, 0.0, 0.0), {}, "first"),
        (Trial(0.0, 1.0, -1.0), Trial(math.inf, 0.0, 0.0), {}, "first"),
        (Trial(0.0, 1.0, -1.0), Trial(1.0, 0.0, 0.0), {"c1": 0.5, "c2": 0.4}, "c1, c2"),
        (Trial(0.0, 1.0, -1.0), Trial(1.0, 0.0, 0.0), {"max_evaluations": 0}, "max_evaluations"),
    ],
)
def test_errors_name_the_argument(start, first, options, name):
    with pytest.raises(ValueError, match=f"strong_wolfe: {name}: expected"):
        next(strong_wolfe(start, first, **options))


def rounded(phi, unit):
    """The values of phi to a multiple of `unit`, the slopes exact: what a loss in few digits looks like."""
    return lambda t: (round(phi(t)[0] / unit) * unit, phi(t)[1])


@pytest.mark.parametrize("first", [0.01, 0.3, 1.0, 1.7, 30.0])
def test_values_that_are_all_rounding_leave_the_slopes(first):
    """f = 268 to a unit of 1, a decrease of 1/2: the search ends by the slope, at most 0.9 of that at the start."""
    phi = rounded(lambda t: (268.0 + 0.5 * (t - 1.0) ** 2, t - 1.0), 1.0)
    step, trials = search(phi, first, noise=1.0, tolerance=0.0, max_evaluations=100)
    assert step.wolfe
    assert abs(step.trial.slope) <= 0.9
    assert len(trials) <= 5


def test_a_search_below_rounding_ends_soon():
    """Nothing moves, or slopes are noise: a few evaluations, and back to the start."""
    for_ever = {"noise": 1e-7, "tolerance": 0.0, "max_evaluations": 500}
    step, trials = search(lambda t: (1.0, -1e-12 if t == 0.0 else 5e-12), 1.0, **for_ever)
    assert step.trial.t == 0.0
    assert len(trials) <= 1 + 5 + 1


def test_a_step_that_moves_nothing_becomes_longer():
    def phi(t):  # x = 1e9 in float32: steps below 64 change nothing
        moved = 64.0 * round(t / 64.0)
        return 0.5 * (1e9 - moved) ** 2, moved - 1e9

    step, trials = search(phi, 1.0, noise=1.0, tolerance=0.0, max_evaluations=20)
    assert step.trial.value < phi(0.0)[0]
    assert len(trials) <= 20


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_invalid_noise(noise):
    with pytest.raises(ValueError, match="strong_wolfe: noise: expected a finite number >= 0"):
        next(strong_wolfe(Trial(0.0, 1.0, -1.0), Trial(1.0, 0.0, 0.0), noise=noise))


def test_run_asks_for_the_trials_of_a_search_and_keeps_what_it_may_return():
    """A recorded search: (t, best) as it asked, and what was found there."""
    asked = [(1.0, 0.0), (4.0, 1.0), (2.5, 1.0)]
    found = {1.0: Trial(1.0, -1.0, -1.0), 4.0: Trial(4.0, 9.0, 9.0), 2.5: Trial(2.5, -2.0, 0.0)}
    sent, log = [], []

    def recorded():
        for pair in asked:
            sent.append((yield pair))
        return LineSearchResult(sent[-1], True, len(sent))

    def evaluate(t):
        log.append(("evaluate", t))
        return found[t]

    result = run(recorded(), evaluate, lambda best: log.append(("keep", best)))
    assert result == LineSearchResult(found[2.5], True, 3)
    assert sent == list(found.values())
    assert log == [x for t, best in asked for x in (("keep", best), ("evaluate", t))]


def test_run_of_a_search_that_asks_for_nothing():
    first = Trial(1.0, 0.0, 0.0)
    result = run(strong_wolfe(Trial(0.0, 1.0, -1.0), first), lambda t: pytest.fail(f"asked for {t}"))
    assert result == LineSearchResult(first, True, 1)


def test_only_the_kept_trial_or_the_last_is_returned():
    """A caller that holds one earlier trial and the latest has the one that is chosen."""
    for first in (0.01, 0.3, 2.0, 40.0):
        phi = lambda t: Trial(t, math.cos(1.3 * t) + 0.01 * t * t, -1.3 * math.sin(1.3 * t) + 0.02 * t)  # noqa: E731
        start = phi(0.2)
        held = {0.0: start, first: phi(0.2 + first)._replace(t=first)}

        def evaluate(t, held=held, phi=phi):
            held[t] = phi(0.2 + t)._replace(t=t)
            return held[t]

        def keep(best, held=held):
            for t in held.keys() - {0.0, best}:
                del held[t]

        result = run(strong_wolfe(start._replace(t=0.0), held[first], c2=0.01), evaluate, keep)
        assert result.wolfe
        assert held[result.trial.t] == result.trial
        assert len(held) <= 3


def test_what_an_evaluation_raises_passes():
    """Also a StopIteration, which is none of the search."""
    for error in (KeyError("x"), StopIteration(3)):

        def evaluate(t, error=error):
            raise error

        with pytest.raises(type(error)):
            run(strong_wolfe(Trial(0.0, 1.0, -1.0), Trial(1.0, 2.0, 1.0)), evaluate)
