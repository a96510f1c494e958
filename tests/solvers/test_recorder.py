"""The record of a run's iterations."""

from __future__ import annotations

import pickle

import pytest

import secant
from secant.result import Iteration, Recorder, Status


def test_iterations_are_numbered_kept_and_told():
    told = []
    record = Recorder(told.append, first=4)
    assert not record(value=3.0, grad_norm=1.0, step=0.0)
    assert not record(value=2.0, grad_norm=0.5, step=1.0, inner=7, rows=100, evaluations=3)
    assert record.history == told == [Iteration(4, 3.0, 1.0, 0.0), Iteration(5, 2.0, 0.5, 1.0, 7, 100, 3)]


@pytest.mark.parametrize(("answer", "stops"), [(None, False), (0, False), (True, True), ("yes", True)])
def test_a_true_answer_stops(answer, stops):
    record = Recorder(lambda iteration: answer, keep=False)
    assert record(value=3.0, grad_norm=1.0, step=0.0) is stops
    assert record.history == []


def test_without_a_callback_nothing_stops():
    assert Recorder()(value=1.0, grad_norm=0.0, step=0.0) is False


def test_the_status_is_public_and_keeps_its_sentence():
    assert secant.Status is Status
    assert secant.Iteration is secant.glm.Iteration is Iteration
    again = pickle.loads(pickle.dumps(Status.NO_MINIMUM))
    assert again is Status.NO_MINIMUM
    assert f"{again}" == "no_minimum"
    assert again.message == "the objective falls forever"
