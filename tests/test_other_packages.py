"""Modules that other packages ship: nothing in their trainings changes, and hypergradients are right.

Each is built from a configuration with random weights, and its data are made up. The tests of a
package that is not installed are skipped: ``pip install -e ".[dev,packages]"``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import frozen
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
    with_mixins,
)
from lightning_hpo.batch_copy import copy_batch

pytestmark = pytest.mark.packages

STEPS = 6
BATCH = 4
EXAMPLES = 16


class Training(NamedTuple):
    """What a package ships, with data for it.

    Attributes:
        module: A LightningModule.
        train: Its training batches.
        valid: One validation batch that holds all held-out data.
        package: Of whose class the module is.
        options: Go to the callback.
    """

    module: Any
    train: Any
    valid: Any
    package: Any = lightning.pytorch
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Lit(lightning.pytorch.LightningModule):
    """Trains a network of a package that ships no LightningModule."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.net, batch)
        self.log("train_loss", loss, batch_size=BATCH)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self.net, batch), batch_size=EXAMPLES)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loaders(data: Any, kind: Any = DataLoader, **options: Any) -> tuple[Any, Any]:
    """Loads the first examples for the training, as many others in one validation batch."""
    train, valid = data[:EXAMPLES], data[EXAMPLES:]
    return (
        kind(train, batch_size=BATCH, shuffle=True, **options),
        kind(valid, batch_size=EXAMPLES, **options),
    )


def examples(make: Callable[[torch.Generator], Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [make(generator) for _ in range(2 * EXAMPLES)]


def tuned(module: Any, *, dropout: bool = False) -> Any:
    """Adds L2, and makes the dropout tunable."""
    with_mixins(module, L2Mixin, *[DropoutMixin] * dropout)
    module.register_l2(init=0.05)
    if dropout:
        module.register_dropout()
    return module


# ----------------------------------------------------------------------------------------- language


def gpt2() -> Training:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        tokens = batch["input_ids"]  # its own loss is in float32
        logits = net(input_ids=tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    data = examples(lambda g: {"input_ids": torch.randint(11, (6,), generator=g)})
    return Training(
        tuned(Lit(transformers.GPT2LMHeadModel(config), loss), dropout=True), *loaders(data)
    )


def bert() -> Training:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )

    def collate(items: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(items)
        return transformers.BatchEncoding(batch)

    data = examples(
        lambda g: {
            "input_ids": torch.randint(11, (6,), generator=g),
            "attention_mask": (torch.arange(6) < torch.randint(2, 7, (), generator=g)).long(),
            "labels": torch.randint(3, (), generator=g),
        }
    )
    net = transformers.BertForSequenceClassification(config)
    module = tuned(Lit(net, lambda net, batch: net(**batch).loss), dropout=True)
    return Training(module, *loaders(data, collate_fn=collate))


# ------------------------------------------------------------------------------------------- images


def image(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 8, 8, generator=g), torch.randint(3, (), generator=g)


def timm_vit() -> Training:
    vit = pytest.importorskip("timm.models.vision_transformer")
    net = vit.VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        num_classes=3,
        drop_rate=0.1,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.1,
    )
    return Training(
        tuned(Lit(net, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])), dropout=True),
        *loaders(examples(image)),
    )


# ------------------------------------------------------------------------------------------- graphs


def geometric() -> Training:
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GAT, global_mean_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = GAT(3, 6, num_layers=2, heads=2, dropout=0.2, act="elu", norm="BatchNorm")
            self.head = nn.Linear(6, 1)

        def forward(self, batch: Any) -> torch.Tensor:
            h = self.body(batch.x, batch.edge_index)
            return self.head(global_mean_pool(h, batch.batch)).squeeze(-1)

    def graph(g: torch.Generator) -> Any:
        n = int(torch.randint(3, 6, (), generator=g))
        return Data(
            x=torch.randn(n, 3, generator=g),
            edge_index=torch.randint(n, (2, 2 * n), generator=g),
            y=torch.randn(1, generator=g),
        )

    module = Lit(Net(), lambda net, batch: F.mse_loss(net(batch), batch.y))
    return Training(tuned(module, dropout=True), *loaders(examples(graph), GraphLoader))


# ------------------------------------------------------------------------------------------ the table

MODULES = {
    "transformers-gpt2": gpt2,
    "transformers-bert": bert,
    "timm-vit": timm_vit,
    "torch-geometric": geometric,
}
EVERY_MODULE = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - the generator that packages draw from
    random.seed(number)


def fit(make: Callable[[], Training], callback: Any = None) -> tuple[Any, Any, Training]:
    """Trains for STEPS steps in float64; returns the module, its Trainer, and all the rest."""
    seed(0)
    training = make()
    trainer = training.package.Trainer(
        max_steps=STEPS,
        precision="64-true",
        accelerator="cpu",
        callbacks=None if callback is None else [callback(training)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    seed(1)
    trainer.fit(training.module, training.train, training.valid)
    return training.module, trainer, training


def observer(estimator: Any) -> Callable[[Training], OnlineHPOCallback]:
    return lambda training: OnlineHPOCallback(estimator, optimizer=frozen, **training.options)


@EVERY_MODULE
@pytest.mark.parametrize("estimator", [T1T2, ClipR, lambda: UnrollK(2)], ids=["1", "clip", "k"])
def test_the_training_is_bit_identical(make, estimator):
    alone, trainer, _ = fit(make)
    draws = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    watched, other, _ = fit(make, observer(estimator()))
    assert draws == (torch.rand(()), np.random.rand(), random.random())  # noqa: NPY002
    assert alone.state_dict().keys() == watched.state_dict().keys()
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    logged = {k: v for k, v in other.callback_metrics.items() if not k.startswith("hpo/")}
    assert logged == dict(trainer.callback_metrics)
    assert logged


def moved(make: Callable[[], Training], name: str, distance: float, since: int) -> float:
    """Returns the validation loss after a training in which a raw λ is moved from a step on."""

    def pulse(training: Training) -> Any:
        class Pulse(training.package.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == since:
                    named_hyperparameters(pl_module)[name].raw.add_(distance)

        return Pulse()

    module, trainer, training = fit(make, pulse)
    loss = training.options.get("validation_loss")
    if loss is None:
        (metrics,) = trainer.validate(module, training.valid, verbose=False)
        names = (training.options.get("monitor"), "val_loss", "valid_loss", "validation_loss")
        return next(metrics[name] for name in names if name in metrics)
    module.eval()
    (batch,) = training.valid
    with torch.no_grad():
        return float(loss(module, batch))


DISTANCE = 1e-5


@EVERY_MODULE
def test_hypergradient(make, monkeypatch):
    """Against central differences of whole trainings, with λ moved in all steps or the last."""
    # Then no mask changes, and the truth is a smooth function.
    monkeypatch.setattr("lightning_hpo.regularizers.tunable_dropout._DIFFERENCE_STEP", DISTANCE)
    names = list(named_hyperparameters(make().module))
    truth = {}
    for since in (0, STEPS - 1):
        for name in names:
            up, down = (moved(make, name, sign * DISTANCE, since) for sign in (1, -1))
            truth[since, name] = (up - down) / (2 * DISTANCE)
    assert all(truth.values())
    for estimator, since in (
        (T1T2(), STEPS - 1),
        (ClipR(math.inf), 0),
        (UnrollK(STEPS, "reverse"), 0),
    ):
        seen = []

        def observe(training, estimator=estimator, seen=seen):
            seen.append(observer(estimator)(training))
            return seen[0]

        fit(make, observe)
        found = seen[0].history[-1].hypergradients
        assert seen[0].history[-1].step == STEPS
        for name in names:
            expected = pytest.approx(truth[since, name], rel=1e-4, abs=1e-10)
            assert found[name].item() == expected, (type(estimator).__name__, name)
