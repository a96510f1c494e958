"""The optimizers in other people's training loops, where these are installed; `docs/trainers.md` has them, too."""

import pytest
import torch

from secant.optim import KFAC, SOAP, AdaHessian, BlockAdam, Muon, Shampoo, Sophia, StochasticLBFGS

pytestmark = pytest.mark.trainers

OPTIMIZERS = {
    "shampoo": (Shampoo, {"precondition_frequency": 3}),
    "soap": (SOAP, {"precondition_frequency": 3}),
    "kfac": (KFAC, {"update_every": 3}),
    "muon": (Muon, {}),
    "block-adam": (BlockAdam, {"lr": 0.01}),
    "adahessian": (AdaHessian, {"update_every": 2}),
    "sophia": (Sophia, {"lr": 0.01, "update_every": 3}),
    "stochastic-lbfgs": (StochasticLBFGS, {"lr": 0.01, "update_every": 2, "average": 0.5}),
    "stochastic-lbfgs-same": (StochasticLBFGS, {"lr": 0.01, "pairs": "same-batch"}),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def made(name, model):
    """The optimizer of a model, which K-FAC watches."""
    make, options = OPTIMIZERS[name]
    return make(model if make is KFAC else model.parameters(), **options)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def data():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(64, 6, generator=gen), torch.randint(3, (64,), generator=gen)


def by_hand(name, epochs):
    """What both trainers do: batches of 16 in their order, a rate that falls to a half."""
    model, (x, y) = network(), data()
    optimizer = made(name, model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)
    for _ in range(epochs):
        for rows in torch.arange(64).split(16):

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward(create_graph=getattr(optimizer, "needs_graph", False))
                return loss

            optimizer.step(closure)
            schedule.step()
    return model


def assert_same(model, expected):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@optimizers
def test_lightning(name, tmp_path):
    """The same steps as by hand, and also where the run was stopped and continued from its checkpoint."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def backward(self, loss):
            loss.backward(create_graph=getattr(self.optimizers().optimizer, "needs_graph", False))

        def configure_optimizers(self):
            optimizer = made(name, self.model)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=16)
    first = trainer(1)
    first.fit(Module(), loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = Module()
    trainer(2).fit(module, loader, ckpt_path=tmp_path / "half.ckpt")
    assert_same(module.model, by_hand(name, 2))


@optimizers
def test_hugging_face(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if name == "stochastic-lbfgs-same":
        pytest.skip("this trainer has no closure")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x, labels):
            logits = self.layers(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None  # in order

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss, create_graph=getattr(self.optimizer.optimizer, "needs_graph", False))
            return loss.detach()

    net, (x, y) = Net(), data()
    optimizer = made(name, net.layers)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=8)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    Trainer(net, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    assert_same(net.layers, by_hand(name, 2))
