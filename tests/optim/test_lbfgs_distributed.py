"""Two processes with halves of the data: the ranks stay equal bit for bit, and follow one process with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


def problem():
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(64, 5, generator=gen, dtype=torch.float64)
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    return model, x, torch.sin(x.sum(1, keepdim=True))


def train(model, loss_of, line_search_fn):
    optimizer = LBFGS(model.parameters(), max_iter=10, line_search_fn=line_search_fn)

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()  # DistributedDataParallel averages the gradients
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        return mean

    losses = [float(optimizer.step(closure)) for _ in range(2)]
    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def work(rank, folder, line_search_fn):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, x, y = problem()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    half = slice(32 * rank, 32 * rank + 32)
    found = train(model, lambda: torch.nn.functional.mse_loss(parallel(x[half]), y[half]), line_search_fn)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_ranks_stay_equal(tmp_path, line_search_fn):
    mp.spawn(work, (str(tmp_path), line_search_fn), nprocs=2)
    (losses, x), (other_losses, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert losses == other_losses
    assert torch.equal(x, other)
    model, data, target = problem()
    expected, alone = train(model, lambda: torch.nn.functional.mse_loss(model(data), target), line_search_fn)
    # Means of halves are rounded otherwise than the mean of all: rounding, amplified over twenty iterations.
    assert losses == pytest.approx(expected, rel=1e-8)
    assert (x - alone).norm() <= 1e-8 * (1.0 + alone.norm())
