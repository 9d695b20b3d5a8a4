"""Modules that other packages ship: their trainings do not change, and hypergradients are right.

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
from cases import Recorder, frozen
from torch import nn
from torch.utils.data import DataLoader

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


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Some packages write to the working directory when they are used."""
    monkeypatch.chdir(tmp_path)


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
        precision: Of the Trainer; where it makes something else of a batch, module and data are in
            float64 as they are.
        carries: Whether later losses depend on more than θ that a step leaves behind, such as a
            teacher that follows; that is taken as constant, and only the last step is exact.
        options: Go to the callback.
    """

    module: Any
    train: Any
    valid: Any
    package: Any = lightning.pytorch
    precision: Any = "64-true"
    carries: bool = False
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


def segmentation_models() -> Training:
    package = pytest.importorskip("segmentation_models_pytorch")
    net = package.Unet(
        "resnet18", encoder_depth=2, encoder_weights=None, decoder_channels=(6, 4), classes=3
    )
    dice = package.losses.DiceLoss("multiclass")

    def masked(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(3, 8, 8, generator=g), torch.randint(3, (8, 8), generator=g)

    module = Lit(net, lambda net, batch: dice(net(batch[0]), batch[1]))
    return Training(tuned(module), *loaders(examples(masked)))


def monai() -> Training:
    package = pytest.importorskip("monai")
    from monai.data import DataLoader as OwnLoader
    from monai.data import Dataset, MetaTensor

    net = package.networks.nets.UNet(
        2, 1, 2, channels=(4, 6), strides=(2,), num_res_units=1, dropout=0.1, act="tanh"
    )
    loss = package.losses.DiceCELoss(to_onehot_y=True, softmax=True)
    flips = package.transforms.RandFlipd(["image", "label"], prob=0.5)
    data = examples(
        lambda g: {
            "image": MetaTensor(torch.randn(1, 8, 8, generator=g)),
            "label": MetaTensor(torch.randint(2, (1, 8, 8), generator=g)),
        }
    )
    module = Lit(net, lambda net, batch: loss(net(batch["image"]), batch["label"]))
    return Training(
        tuned(module, dropout=True),
        OwnLoader(Dataset(data[:EXAMPLES], flips), batch_size=BATCH, shuffle=True),
        OwnLoader(Dataset(data[EXAMPLES:]), batch_size=EXAMPLES),
    )


def lightly() -> Training:
    pytest.importorskip("lightly")
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), VICRegProjectionHead(144, 6, 4)
    )
    criterion = VICRegLoss()

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        return criterion(net(batch[0]), net(batch[0].flip(-1)))

    return Training(tuned(Lit(net, loss)), *loaders(examples(image)))


def torchgeo() -> Training:
    """Momentum contrast: an encoder that follows, and a queue of what it has made."""
    trainers = pytest.importorskip("torchgeo.trainers")
    module = trainers.MoCoTask(
        "test_resnet.r160_in1k",
        version=2,
        layers=2,
        hidden_dim=8,
        output_dim=4,
        lr=0.02,
        memory_bank_size=8,
        moco_momentum=0.9,
        size=32,
    )

    def validation_loss(module: Any, batch: Any) -> torch.Tensor:
        query, _ = module(batch["image"])  # its validation_step does nothing
        return F.cosine_similarity(query, module.forward_momentum(batch["image"])).mean()

    return Training(
        tuned(module),
        *loaders(examples(lambda g: {"image": torch.rand(3, 32, 32, generator=g)})),
        carries=True,
        options={"validation_loss": validation_loss},
    )


# ----------------------------------------------------------------------------------- sound and text


def speechbrain() -> Training:
    pytest.importorskip("speechbrain")
    from speechbrain.dataio.batch import PaddedBatch
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    net = ECAPA_TDNN(
        4,
        lin_neurons=3,
        activation=nn.Tanh,
        channels=[8, 8, 8, 8, 12],
        attention_channels=4,
        res2net_scale=2,
        se_channels=4,
        dropout=0.1,
    )

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        out = net(batch.sound.data, batch.sound.lengths).squeeze(1)
        return F.cross_entropy(out, batch.speaker.data.squeeze(1))

    data = examples(
        lambda g: {
            "sound": torch.randn(int(torch.randint(12, 16, (), generator=g)), 4, generator=g),
            "speaker": torch.randint(3, (1,), generator=g),
        }
    )
    return Training(tuned(Lit(net, loss), dropout=True), *loaders(data, collate_fn=PaddedBatch))


def sentence_transformers() -> Training:
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses, modules
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    words = list("abcdefgh")
    net = package.SentenceTransformer(
        modules=[
            modules.WordEmbeddings(
                WhitespaceTokenizer(words), torch.randn(9, 6), update_embeddings=True
            ),
            modules.LSTM(6, 5, dropout=0.2, num_layers=2),
            modules.Pooling(10, ("mean", "max")),
            modules.Dropout(0.2),
        ],
        device="cpu",
    )
    loss = losses.MultipleNegativesRankingLoss(net)

    def collate(items: list[Any]) -> Any:
        return [net.preprocess(list(side)) for side in zip(*items, strict=True)]

    def pair(g: torch.Generator) -> tuple[str, str]:
        chosen = torch.randint(8, (2, 5), generator=g).tolist()
        return tuple(" ".join(words[i] for i in side) for side in chosen)

    module = Lit(net, lambda net, batch: loss(batch, None))
    return Training(tuned(module, dropout=True), *loaders(examples(pair), collate_fn=collate))


# ---------------------------------------------------------------------------------------- decisions


def rl4co() -> Training:
    models = pytest.importorskip("rl4co.models")
    from rl4co.data.dataset import TensorDictDataset
    from rl4co.envs import TSPEnv

    env = TSPEnv(generator_params={"num_loc": 4}, seed=0)
    module = models.AttentionModel(
        env,
        baseline="exponential",
        policy_kwargs={
            "embed_dim": 16,
            "num_encoder_layers": 1,
            "num_heads": 2,
            "feedforward_hidden": 8,
        },
        optimizer="SGD",
        optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        train_data_size=EXAMPLES,
        val_data_size=EXAMPLES,
        batch_size=BATCH,
        val_batch_size=EXAMPLES,
    )
    train, valid = (TensorDictDataset(env.generator(EXAMPLES).double()) for _ in range(2))

    def validation_loss(module: Any, batch: Any) -> torch.Tensor:
        out = module.policy(module.env.reset(batch), module.env, phase="val")
        return -out["log_likelihood"].mean()  # its reward has no derivative

    return Training(
        tuned(module.double()),
        DataLoader(train, BATCH, shuffle=True, collate_fn=train.collate_fn),
        DataLoader(valid, EXAMPLES, collate_fn=valid.collate_fn),
        precision="32-true",
        options={"validation_loss": validation_loss},
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


# ---------------------------------------------------------------------------------------- molecules


def chemprop() -> Training:
    pytest.importorskip("chemprop")
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, collate_batch
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "Cl", "C=O")]
    points = [MoleculeDatapoint.from_smi(s, [math.sin(i)]) for i, s in enumerate(smiles)]
    module = MPNN(
        BondMessagePassing(d_h=6, depth=2, dropout=0.1, activation="tanh"),
        MeanAggregation(),
        RegressionFFN(input_dim=6, hidden_dim=6, dropout=0.1, activation="tanh"),
        batch_norm=True,
        init_lr=0.01,
        max_lr=0.02,
    )

    def collate(items: Any) -> Any:
        batch = collate_batch(items)
        batch.bmg.V, batch.bmg.E = batch.bmg.V.double(), batch.bmg.E.double()
        return batch

    train, valid = MoleculeDataset(points[::2]), MoleculeDataset(points[1::2])
    return Training(
        tuned(module, dropout=True),
        DataLoader(train, batch_size=BATCH, shuffle=True, collate_fn=collate),
        DataLoader(valid, batch_size=len(valid), collate_fn=collate),
    )


# -------------------------------------------------------------------------------------- time series


def pytorch_forecasting() -> Training:
    package = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    table = pd.DataFrame(
        {
            "time": np.tile(np.arange(14), 4),
            "series": np.repeat(list("abcd"), 14),
            "value": np.random.randn(56) + 3,  # noqa: NPY002
        }
    )
    data = package.TimeSeriesDataSet(
        table[table.time < 10],
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=4,
        max_prediction_length=2,
        static_categoricals=["series"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        add_relative_time_idx=True,
    )
    held_out = package.TimeSeriesDataSet.from_dataset(data, table[table.time >= 8])
    module = package.TemporalFusionTransformer.from_dataset(
        data,
        hidden_size=4,
        attention_head_size=2,
        hidden_continuous_size=3,
        learning_rate=0.02,
        dropout=0.1,
        optimizer="adam",
        reduce_on_plateau_patience=2,
    )
    return Training(
        tuned(module, dropout=True),
        data.to_dataloader(train=True, batch_size=BATCH),
        held_out.to_dataloader(train=False, batch_size=len(held_out)),
    )


def darts() -> Training:
    models = pytest.importorskip("darts.models")
    package = pytest.importorskip("pytorch_lightning")
    from darts import TimeSeries

    values = np.random.randn(50)  # noqa: NPY002
    model = models.TransformerModel(
        input_chunk_length=6,
        output_chunk_length=2,
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=8,
        dropout=0.1,
        activation="gelu",
        batch_size=BATCH,
        optimizer_kwargs={"lr": 0.01},
    )
    series, held_out = TimeSeries.from_values(values[:30]), TimeSeries.from_values(values[30:])
    _, parts = model._setup_for_fit_from_dataset(series=series, val_series=held_out)
    parts = model._setup_for_train(**parts)
    module, data = parts["model"], parts["datamodule"]
    data.batch_size = EXAMPLES
    return Training(
        tuned(module, dropout=True), data.train_dataloader(), data.val_dataloader(), package
    )


def neuralforecast() -> Training:
    models = pytest.importorskip("neuralforecast.models")
    package = pytest.importorskip("pytorch_lightning")
    import pandas as pd
    from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

    table = pd.DataFrame(
        {
            "unique_id": np.repeat(list("abcdefgh"), 30),
            "ds": np.tile(np.arange(30), 8),
            "y": np.random.randn(240),  # noqa: NPY002
        }
    )
    dataset, *_ = TimeSeriesDataset.from_df(table)
    module = models.NHITS(
        h=2,
        input_size=6,
        mlp_units=3 * [[8, 8]],
        activation="Tanh",
        dropout_prob_theta=0.1,
        windows_batch_size=8,
        learning_rate=0.01,
        scaler_type="standard",
    )
    module.val_size = 6
    data = TimeSeriesDataModule(dataset, batch_size=BATCH, valid_batch_size=8)
    return Training(
        tuned(module, dropout=True), data.train_dataloader(), data.val_dataloader(), package
    )


def gluonts() -> Training:
    deepar = pytest.importorskip("gluonts.torch.model.deepar")
    from gluonts.dataset.common import ListDataset

    series = [
        {"start": "2020-01-01", "target": np.random.randn(60) + 4}  # noqa: NPY002
        for _ in range(BATCH)
    ]
    data = ListDataset(series, freq="D")
    estimator = deepar.DeepAREstimator(
        freq="D",
        prediction_length=2,
        context_length=4,
        num_layers=2,
        hidden_size=5,
        lr=0.01,
        dropout_rate=0.1,
        lags_seq=[1, 2],
        time_features=[],
        batch_size=BATCH,
        num_batches_per_epoch=3,
    )
    module = estimator.create_lightning_module()
    data = list(estimator.create_transformation().apply(data))
    return Training(
        tuned(module, dropout=True),
        estimator.create_training_data_loader(data, module),
        estimator.create_validation_data_loader(data, module),
    )


# ------------------------------------------------------------------------------------------- tables


def pytorch_tabular() -> Training:
    package = pytest.importorskip("pytorch_tabular")
    standalone = pytest.importorskip("pytorch_lightning")
    import pandas as pd
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    table = pd.DataFrame(
        {
            "a": np.random.randn(2 * EXAMPLES),  # noqa: NPY002
            "b": np.random.randn(2 * EXAMPLES),  # noqa: NPY002
            "c": list("xyzx") * (EXAMPLES // 2),
            "y": np.random.randn(2 * EXAMPLES),  # noqa: NPY002
        }
    )
    model = package.TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=["a", "b"], categorical_cols=["c"]),
        model_config=CategoryEmbeddingModelConfig(
            task="regression",
            learning_rate=0.05,
            layers="6-5",
            activation="Tanh",
            dropout=0.1,
            use_batch_norm=True,
        ),
        optimizer_config=OptimizerConfig(optimizer="SGD"),
        trainer_config=TrainerConfig(batch_size=BATCH, progress_bar="none"),
        verbose=False,
    )
    data = model.prepare_dataloader(table[:EXAMPLES], table[EXAMPLES:])
    module = model.prepare_model(data)

    def validation_loss(module: Any, batch: Any) -> torch.Tensor:
        # Its validation_step takes no gradient.
        return module.loss(module(batch)["logits"], batch["target"])

    return Training(
        tuned(module, dropout=True),
        data.train_dataloader(),
        data.val_dataloader(batch_size=EXAMPLES),
        standalone,
        options={"validation_loss": validation_loss},
    )


def scvi() -> Training:
    package = pytest.importorskip("scvi")
    import anndata
    from scvi.dataloaders import AnnDataLoader
    from scvi.train import TrainingPlan

    counts = np.random.poisson(2.0, (2 * EXAMPLES, 7)).astype(np.float32)  # noqa: NPY002
    data = anndata.AnnData(counts)
    package.model.SCVI.setup_anndata(data)
    model = package.model.SCVI(data, n_hidden=6, n_latent=3, n_layers=1)
    module = TrainingPlan(model.module, lr=0.02, n_epochs_kl_warmup=3)
    manager = model.adata_manager

    def validation_loss(plan: Any, batch: Any) -> torch.Tensor:
        """Its own draws from the latent distribution, which here are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return plan(batch, loss_kwargs=plan.loss_kwargs)[2].loss

    return Training(
        tuned(module, dropout=True),
        AnnDataLoader(manager, indices=list(range(EXAMPLES)), batch_size=BATCH, shuffle=True),
        AnnDataLoader(manager, indices=list(range(EXAMPLES, 2 * EXAMPLES)), batch_size=EXAMPLES),
        options={"validation_loss": validation_loss},
    )


# ---------------------------------------------------------------------------------------- the table

MODULES = {
    "transformers-gpt2": gpt2,
    "transformers-bert": bert,
    "timm-vit": timm_vit,
    "torch-geometric": geometric,
    "chemprop": chemprop,
    "pytorch-forecasting": pytorch_forecasting,
    "darts": darts,
    "neuralforecast": neuralforecast,
    "gluonts": gluonts,
    "scvi-tools": scvi,
    "pytorch-tabular": pytorch_tabular,
    "segmentation-models-pytorch": segmentation_models,
    "monai": monai,
    "lightly": lightly,
    "torchgeo": torchgeo,
    "speechbrain": speechbrain,
    "sentence-transformers": sentence_transformers,
    "rl4co": rl4co,
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
        precision=training.precision,
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
def test_the_training_is_bit_identical(make):
    alone, trainer, _ = fit(make)
    draws = torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    assert trainer.callback_metrics
    for estimator in (T1T2(), ClipR(), UnrollK(2, "forward"), UnrollK(2, "reverse")):
        watched, other, _ = fit(make, observer(estimator))
        assert draws == (torch.rand(()), np.random.rand(), random.random())  # noqa: NPY002
        assert alone.state_dict().keys() == watched.state_dict().keys()
        for name, value in alone.state_dict().items():
            assert torch.equal(value, watched.state_dict()[name]), (estimator, name)
        logged = {k: v for k, v in other.callback_metrics.items() if not k.startswith("hpo/")}
        assert logged == dict(trainer.callback_metrics), estimator


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
    plugin = trainer.precision_plugin
    with torch.no_grad(), plugin.val_step_context():
        return float(loss(module, plugin.convert_input(batch)))


DISTANCE = 1e-5


@EVERY_MODULE
def test_hypergradient(make, monkeypatch):
    """Against central differences of whole trainings, with λ moved in all steps or the last."""
    # Then no mask changes, and the truth is a smooth function.
    monkeypatch.setattr("lightning_hpo.regularizers.tunable_dropout._DIFFERENCE_STEP", DISTANCE)
    training = make()
    names = list(named_hyperparameters(training.module))
    truth = {}
    for since in (0, STEPS - 1):
        for name in names:
            up, down = (moved(make, name, sign * DISTANCE, since) for sign in (1, -1))
            truth[since, name] = (up - down) / (2 * DISTANCE)
    assert all(abs(value) > 1e-6 for value in truth.values()), truth
    estimators = [(T1T2(), STEPS - 1), (ClipR(math.inf), 0), (UnrollK(STEPS, "reverse"), 0)]
    for estimator, since in estimators[: 1 if training.carries else None]:
        seen = []

        def observe(training, estimator=estimator, seen=seen):
            seen.append(observer(estimator)(training))
            return seen[0]

        fit(make, observe)
        found = seen[0].history[-1].hypergradients
        assert seen[0].history[-1].step == STEPS
        for name in names:
            expected = pytest.approx(truth[since, name], rel=1e-4)
            assert found[name].item() == expected, (type(estimator).__name__, name)


# ------------------------------------------------------------------------- batches that are objects


def tensordict_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    tensordict = pytest.importorskip("tensordict")
    batch = tensordict.TensorDict(
        {"x": torch.randn(BATCH, 3), "inner": {"y": torch.randn(BATCH)}}, batch_size=[BATCH]
    )
    return batch, lambda batch: batch["inner", "y"]


def tensorclass_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    tensordict = pytest.importorskip("tensordict")

    @tensordict.tensorclass
    class Examples:
        x: torch.Tensor
        y: torch.Tensor

    batch = Examples(torch.randn(BATCH, 3), torch.randn(BATCH), batch_size=[BATCH])
    return batch, lambda batch: batch.y


def graph_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    data = pytest.importorskip("torch_geometric.data")
    edges = torch.tensor([[0, 1], [1, 2]])
    graphs = [data.Data(x=torch.randn(3, 2), edge_index=edges, y=torch.randn(1))] * BATCH
    return data.Batch.from_data_list(graphs), lambda batch: batch.y


def heterogeneous_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    data = pytest.importorskip("torch_geometric.data")

    def graph() -> Any:
        graph = data.HeteroData()
        graph["a"].x, graph["b"].x = torch.randn(3, 2), torch.randn(2, 1)
        graph["a", "to", "b"].edge_index = torch.tensor([[0, 1], [1, 0]])
        return graph

    batch = data.Batch.from_data_list([graph() for _ in range(BATCH)])
    return batch, lambda batch: batch["a"].x


def encoding_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding({"x": torch.randn(BATCH, 3)}), lambda batch: batch["x"]


def padded_batch() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    data = pytest.importorskip("speechbrain.dataio.batch")
    batch = data.PaddedBatch([{"x": torch.randn(2 + i)} for i in range(BATCH)])
    return batch, lambda batch: batch.x.data


def meta_tensor() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    data = pytest.importorskip("monai.data")
    return data.MetaTensor(torch.randn(BATCH, 3), affine=2 * torch.eye(4)), lambda batch: batch


OBJECTS = {
    "TensorDict": tensordict_batch,
    "tensorclass": tensorclass_batch,
    "Batch": graph_batch,
    "Batch of HeteroData": heterogeneous_batch,
    "BatchEncoding": encoding_batch,
    "PaddedBatch": padded_batch,
    "MetaTensor": meta_tensor,
}
EVERY_OBJECT = pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)


def size(batch: Any) -> Any:
    return getattr(batch, "batch_size", getattr(batch, "num_graphs", len(batch)))


@EVERY_OBJECT
def test_a_copy_of_a_batch(make):
    batch, read = make()
    before = read(batch).clone()
    copied = copy_batch(batch)
    assert type(copied) is type(batch)
    assert size(copied) == size(batch)
    assert torch.equal(read(copied), before)
    read(copied).add_(1.0)
    assert torch.equal(read(batch), before)
    assert torch.equal(read(copied), before + 1.0)


@pytest.mark.parametrize("make", [tensordict_batch, tensorclass_batch, graph_batch])
def test_a_batch_is_copied_by_its_own_clone(make, monkeypatch):
    batch, _ = make()
    clones = []
    clone = type(batch).clone

    def counted(self, *args, **kwargs):
        clones.append(self)
        return clone(self, *args, **kwargs)

    monkeypatch.setattr(type(batch), "clone", counted)
    copy_batch([batch])
    assert any(each is batch for each in clones)


class Writing(lightning.pytorch.LightningModule):
    """Counts on its batch: a second pass over the same object would see other numbers."""

    def __init__(self, read: Callable[[Any], torch.Tensor], writes: bool) -> None:
        super().__init__()
        self.read, self.writes = read, writes
        self.weight = nn.Parameter(torch.ones(()))
        self.sizes = Recorder(seen=[])  # of the batches that steps and replays saw

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.sizes.seen.append(str(size(batch)))
        x = self.read(batch)
        x = x.add_(1.0) if self.writes else x + 1.0
        return (x * self.weight).square().mean().as_subclass(torch.Tensor)

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.read(batch) * self.weight).tanh().sum().as_subclass(torch.Tensor)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@EVERY_OBJECT
@pytest.mark.parametrize("estimator", [T1T2, ClipR, lambda: UnrollK(2, "reverse")])
def test_a_step_may_write_to_such_a_batch(make, estimator):
    runs = []
    for writes, observed in ((True, False), (True, True), (False, True)):

        def collate(items):
            seed(items[0])
            return make()[0]

        def training(writes=writes):
            module = with_mixins(Writing(make()[1], writes), L2Mixin)
            module.register_l2(init=0.1, parameters=["weight"])
            batches = DataLoader(range(STEPS), batch_size=1, collate_fn=collate)
            return Training(
                module, batches, DataLoader([0], collate_fn=collate), precision="32-true"
            )

        seen = []

        def observe(training, seen=seen):
            seen.append(observer(estimator())(training))
            return seen[0]

        module, _, _ = fit(training, observe if observed else None)
        history = [record for callback in seen for record in callback.history]
        runs.append((module.weight.detach(), module.sizes.seen, history))
    (alone, sizes, _), (written, all_sizes, records), (_, _, expected) = runs
    assert torch.equal(alone, written)
    assert len(all_sizes) > len(sizes) == STEPS  # there were replays
    assert {*sizes, *all_sizes} == {str(size(make()[0]))}
    for a, b in zip(records, expected, strict=True):
        torch.testing.assert_close(a.hypergradients, b.hypergradients, rtol=1e-12, atol=0)
