"""Many tensors as one vector: order, views, joins, and what changes when a tensor does."""

import pytest
import torch

from secant._parameters import FlatParameters
from secant.optim._gradients import FlatGradients


def tensors():
    a = torch.arange(6.0).reshape(3, 2).t()  # not contiguous
    return [a, torch.tensor(6.0), torch.empty(0, 4), torch.arange(7.0, 10.0).reshape(1, 3, 1)]


def flat():
    return FlatParameters("op", tensors())


def test_entry_i_is_the_ith_element_of_the_concatenation():
    params = flat()
    expected = torch.cat([x.reshape(-1) for x in params.tensors])
    assert params.n == 10
    assert params.sizes == [6, 1, 0, 3]
    vector = params.vector()
    assert torch.equal(vector, torch.zeros(10))
    views = params.split(vector)
    assert [v.shape for v in views] == [x.shape for x in params.tensors]
    params.save(views)
    assert torch.equal(vector, expected)
    out = torch.full((10,), torch.nan)
    params.join(params.tensors, out)
    assert torch.equal(out, expected)
    params.join([None, *params.tensors[1:]], out)
    assert torch.equal(out, torch.cat([torch.zeros(6), expected[6:]]))


@pytest.mark.parametrize("many", [True, False])
def test_arithmetic_with_a_vector(many):
    params = flat() if many else FlatParameters("op", [torch.arange(10.0)])
    start = params.vector()
    params.save(params.split(start))
    d = torch.linspace(-1.0, 1.0, 10)
    now = params.vector()

    def x():
        params.save(params.split(now))
        return now

    assert not params.differs(params.split(start))
    params.add_(params.split(d), 0.5)
    assert torch.equal(x(), start.add(d, alpha=0.5))
    assert params.differs(params.split(start))
    params.toward_(params.split(start), 0.75)
    assert torch.equal(x(), torch.lerp(start.add(d, alpha=0.5), start, 0.75))
    params.set_(params.split(start))
    assert torch.equal(x(), start)


def test_what_a_change_changes():
    params = flat()
    state = params.state()
    assert params.state() == state
    params.tensors[1].add_(1.0)
    assert params.state() != state
    state = params.state()
    params.tensors[1].data = params.tensors[1].data.clone()
    assert params.state() != state
    assert not params.moved()
    params.tensors[1].data = params.tensors[1].data.double()
    assert params.moved()


def test_frozen_parts_of_a_vector_are_zeroed():
    params = FlatGradients("op", [torch.ones(2, requires_grad=True) for _ in range(3)])
    (params.tensors[0].sum() + 2.0 * params.tensors[2].sum()).backward()
    params.gather_grad()
    assert params.absent == (1,)
    assert torch.equal(params.grad, torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0, 2.0]))
    vector = torch.ones(6)
    params.freeze_(params.split(vector))
    assert torch.equal(vector, torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]))
    assert all(p.grad is not None and p.grad.data_ptr() == params.grad[2 * i :].data_ptr()
               for i, p in enumerate(params.tensors) if i != 1)  # fmt: skip
