"""What puts the inputs of a test on a device."""

import torch

from placed import place


def test_strides_are_kept():
    x = torch.arange(24.0).view(4, 6)
    for view in (x.mT, x[:, ::2], x[:1].expand(5, 6), x[:, :1].expand(4, 3), x[:0]):
        there = place(view, "meta")
        assert (there.shape, there.stride()) == (view.shape, view.stride())
        assert place(view, "cpu") is view
    assert place(3.0, "meta") == 3.0
