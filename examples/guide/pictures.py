"""The pictures of ``when_it_goes_wrong.md``: for each warning, a training in which it is given.

A small network learns scikit-learn's digits from 100 examples. Red is the training that the warning
is given in, blue the same training after the remedy.

    python examples/guide/pictures.py                              # all: half a minute
    python examples/guide/pictures.py --only bound --output-dir .  # one

It prints each warning as its training gives it.
"""

import argparse
import gc
import logging
import math
import re
import time
import warnings
from pathlib import Path

import lightning
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_hpo import (
    T1T2,
    Box,
    ClipR,
    Hyperparameter,
    IndexedDataset,
    L2Mixin,
    LossWeightMixin,
    OnlineHPOCallback,
    Positive,
    UnrollK,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
WRONG, MENDED = {"color": "C3"}, {"color": "C0"}

digits = load_digits()
data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
train, held_out, test = random_split(data, [100, 700, 997], torch.Generator().manual_seed(0))


class LitDigits(L2Mixin, lightning.LightningModule):
    def __init__(self, l2="auto", constraint=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
        self.register_l2(l2, constraint=constraint)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(lightning.Callback):
    """Keeps what the pictures show besides the history of λ."""

    def __init__(self):
        self.training, self.norms, self.clock = [], [], []
        self.tested_at, self.test = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.training.append(outputs["loss"].item())
        self.norms.append(module.net[0].weight.norm().item())
        self.clock.append(time.process_time())

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.tested_at.append(trainer.global_step)
            self.test.append(trainer.callback_metrics["val_loss"].item())


class Run:
    """A training: its updates of λ, what else was watched, and the warnings."""

    def __init__(
        self,
        module,
        *estimator,
        steps=400,
        examples=train,
        tuned_on=held_out,
        batch=100,
        callbacks=(),
        **options,
    ):
        loader = DataLoader(tuned_on, min(batch, len(tuned_on)), shuffle=True)
        callback = OnlineHPOCallback(*estimator, dataloader=loader, **options)
        self.watch = Watch()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[*callbacks, callback, self.watch],
            val_check_interval=20,  # by Lightning, on the test data, which λ is not tuned on
            check_val_every_n_epoch=None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(examples, 20, shuffle=True), DataLoader(test, len(test)))
        self.warnings = [str(w.message) for w in caught if "OnlineHPOCallback: " in str(w.message)]
        self.updates = list(callback.history)
        self.steps = [update.step for update in self.updates]

    def draw_lambda(self, axes, low=1e-4, **style):
        values = [update.values["l2"] for update in self.updates]
        axes.plot(self.steps, values, **style)
        axes.set(title="L2 strength λ", yscale="log", ylim=(low, 0.1))

    def draw_held_out_loss(self, axes, **style):
        axes.plot(self.steps, [update.loss for update in self.updates], **style)

    def draw_test_loss(self, axes, low=0.4, high=0.8, **style):
        axes.plot(self.watch.tested_at, self.watch.test, **style)
        axes.set(title="test loss", ylim=(low, high))


def mark(axes, y, text, above=2):
    axes.axhline(y, color="gray", linestyle=":")
    axes.annotate(
        text,
        (0.98, y),
        (0, above),
        axes.get_yaxis_transform(),
        "offset points",
        ha="right",
        va="bottom",
    )


def seeded(make, *arguments):
    lightning.seed_everything(0, verbose=False)
    return make(*arguments)


# ------------------------------------------------------------------- one function for each warning


def same_data(left, right):
    wrong = Run(seeded(LitDigits, 1e-3), tuned_on=train)
    mended = Run(seeded(LitDigits, 1e-3), tuned_on=held_out)
    for run, style in (wrong, WRONG), (mended, MENDED):
        run.draw_lambda(left, **style)
        run.draw_test_loss(right, **style)
    return wrong, mended, "λ tuned on the training data", "λ tuned on held-out data"


def no_update(left, right):
    wrong = Run(seeded(LitDigits), UnrollK(50), steps=20)
    mended = Run(seeded(LitDigits), UnrollK(5), steps=20)
    for axes, window, run, style in (left, 50, wrong, WRONG), (right, 5, mended, MENDED):
        axes.axvspan(0, 20, color="0.9")
        axes.text(1, 0.1, "the training")
        for i in range(0, 50 if window == 50 else 20, window):
            axes.annotate("", (i + window, 0.5), (i, 0.5), arrowprops={"arrowstyle": "<->"} | style)
        axes.plot(run.steps, [0.5] * len(run.steps), "o", **style)
        axes.set(title=f"{len(run.steps)} updates of λ", xlim=(0, 55), ylim=(0, 1), yticks=[])
    left.text(50, 0.55, "first update due", ha="right", va="bottom")
    right.text(22, 0.5, "four windows", va="center")
    return wrong, mended, "UnrollK(50)", "UnrollK(5)"


class Balanced(LitDigits):
    """Its held-out loss is the mean over ten classes: 0 / 0 for one that is not in the batch."""

    least = 0

    def validation_step(self, batch, batch_idx):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        of_class = F.one_hot(batch[1], 10).float()
        self.log("val_loss", (losses @ of_class / of_class.sum(0).clamp(self.least)).mean())


class Clamped(Balanced):
    least = 1


def skipped(left, right):
    wrong, mended = Run(seeded(Balanced), batch=20), Run(seeded(Clamped), batch=20)
    mended.draw_held_out_loss(left, linestyle="", marker=".", **MENDED)
    wrong.draw_held_out_loss(left, linestyle="", marker="o", **WRONG)
    lost = [update.step for update in wrong.updates if update.skipped]
    left.plot(lost, [0] * len(lost), "x", **WRONG)
    left.set(title="loss of held-out batches (×: NaN)")
    for run, style in (wrong, WRONG), (mended, MENDED):
        run.draw_lambda(right, **style)
    return wrong, mended, "means divided by 0", "… by at least 1"


def dead(left, right):
    module = seeded(LitDigits)
    module.l2.value = 0.3
    wrong, mended = Run(module), Run(seeded(LitDigits))
    for run, style in (wrong, WRONG), (mended, MENDED):
        left.plot(range(1, 401, 4), run.watch.training[::4], **style)
        right.plot(range(1, 401, 4), run.watch.norms[::4], **style)
    left.set(title="training loss", ylim=(-0.1, 3.1))
    right.set(title="norm of the first layer", yscale="log")
    mark(left, math.log(10), "ln 10: a guess among ten", above=10)
    return wrong, mended, "L2 from 0.3", "L2 from register_l2()"


def bound(left, right):
    wrong = Run(seeded(LitDigits, 3e-4, Positive(high=6e-4)))
    mended = Run(seeded(LitDigits, 3e-4))
    for run, style in (wrong, WRONG), (mended, MENDED):
        run.draw_lambda(left, **style)
        run.draw_test_loss(right, **style)
    mark(left, 6e-4, "upper bound")
    return wrong, mended, "constraint=Positive(high=6e-4)", "without it"


def radius(left, right):
    options = {"every_n_steps": 5, "lr": 20.0}
    wrong = Run(seeded(LitDigits, 1e-3), ClipR(0.05, stride=5), **options)
    mended = Run(seeded(LitDigits, 1e-3), ClipR(20.0, decay=0.95, stride=5), **options)
    for run, style in (wrong, WRONG), (mended, MENDED):
        left.plot(run.steps, [update.tangent_norms["l2"] for update in run.updates], **style)
        run.draw_lambda(right, **style)
    left.set(title="norm of the tangent")
    mark(left, 0.05, "")
    return wrong, mended, "ClipR(0.05)", "ClipR(20.0, decay=0.95)"


def effect(left, right):
    wrong = Run(seeded(LitDigits, 1e-9), T1T2(), every_n_steps=5)
    mended = Run(seeded(LitDigits), T1T2(), every_n_steps=5)
    for run, style in (wrong, WRONG), (mended, MENDED):
        run.draw_lambda(left, low=1e-10, **style)
        run.draw_test_loss(right, **style)
    least = re.search(r"measurable from about ([\d.e-]+\d)", wrong.warnings[0])[1]
    mark(left, float(least), f"measurable from {least}")
    return wrong, mended, "L2 from 1e-9", "L2 from register_l2()"


class Weighted(LitDigits):
    """λ are weights of the training examples; with a smaller count, of groups of them."""

    def __init__(self, count):
        super().__init__(3e-3)
        self.l2.frozen = True
        self.weights = Hyperparameter(torch.full((count,), 0.5), constraint=Box(0.0, 1.0))

    def training_step(self, batch, batch_idx):
        images, labels, index = batch  # IndexedDataset adds the index
        weights = self.weights()
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return (weights[index % len(weights)] * losses).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def overfitted(left, right):
    images, labels = train[:]
    labels[:40] = torch.randint(10, (40,), generator=torch.Generator().manual_seed(1))
    examples = IndexedDataset(TensorDataset(images, labels))  # λ can leave out what is mislabelled
    options = {"examples": examples, "every_n_steps": 2, "lr": 5.0}
    wrong = Run(seeded(Weighted, 100), T1T2(), tuned_on=Subset(held_out, range(10)), **options)
    mended = Run(seeded(Weighted, 100), T1T2(), **options)
    for run, style in (wrong, WRONG), (mended, MENDED):
        run.draw_held_out_loss(left, **style)
        run.draw_test_loss(right, low=0.0, high=3.2, **style)
    left.set(title="loss of held-out batches", ylim=(0.0, 3.2))
    return wrong, mended, "100 λ on 10 held-out examples", "… on 700"


class Weigh(lightning.Callback):
    """Finds out how many MiB of tensors a training has, besides those that were there before."""

    def __init__(self):
        self.mib = -self.of_all()

    def on_train_end(self, trainer, module):
        self.mib += self.of_all()

    def of_all(self):
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        tensors = [x for x in tensors if torch._C._has_storage(x)]  # sparse ones have none
        return sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 2**20


def many(left, right):
    counts, ends = [1, 10, 100], []
    for estimator, style in (ClipR(), WRONG), (T1T2(), MENDED):
        times, sizes = [], []
        for count in counts:
            weigh = Weigh()
            module, examples = seeded(Weighted, count), IndexedDataset(train)
            run = Run(module, estimator, examples=examples, steps=5, callbacks=[weigh])
            times.append(1000 * (run.watch.clock[-1] - run.watch.clock[0]) / 4)
            sizes.append(weigh.mib)
        left.plot(counts, times, "o-", **style)
        right.plot(counts, sizes, "o-", **style)
        ends.append(run)
    left.set(title="CPU time of a step (ms)", ylim=(0, None), xscale="log", xlabel="number of λ")
    right.set(title="tensors in memory (MiB)", xscale="log", xlabel="number of λ")
    return *ends, "ClipR()", "T1T2()"


class TwoLosses(LossWeightMixin, LitDigits):
    def __init__(self, weighs_both):
        super().__init__(1e-3)
        self.l2.frozen = True
        self.register_loss_weights({"size": 0.1})
        self.weighs_both = weighs_both

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        main = F.cross_entropy(logits, batch[1])
        return self.weighted_loss(main, size=logits.square().mean())

    def validation_step(self, batch, batch_idx):
        main = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", main)
        return self.training_step(batch, batch_idx) if self.weighs_both else main


def direct(left, right):
    wrong = Run(seeded(TwoLosses, True))
    mended = Run(seeded(TwoLosses, False))
    for run, style in (wrong, WRONG), (mended, MENDED):
        values = [update.values["loss_weights.size"] for update in run.updates]
        left.plot(run.steps, values, **style)
        run.draw_test_loss(right, low=0.3, **style)
    left.set(title="weight λ of the second loss", ylim=(0, None))
    right.set(title="test loss (the main one)")
    return wrong, mended, "λ in validation_step", "in training_step alone"


# Each function, how its warning begins.
PICTURES = {
    "same_data": (same_data, "the held-out data are training data"),
    "no_update": (no_update, "this training will end after step"),
    "skipped": (skipped, "updates were skipped"),
    "dead": (dead, "the network is dead"),
    "bound": (bound, "λ sits at a bound"),
    "radius": (radius, "the tangent sits at the radius of ClipR"),
    "effect": (effect, "λ has no measurable effect"),
    "overfitted": (overfitted, "λ is fitted to its held-out data"),
    "direct": (direct, "the held-out loss is computed with λ itself"),
    "many": (many, "carries forward tangents of"),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--only", choices=PICTURES)
parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
arguments = parser.parse_args()

for name in [arguments.only] if arguments.only else PICTURES:
    draw, words = PICTURES[name]
    figure = Figure(figsize=(6.4, 2.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    wrong, mended, *labels = draw(*axes)
    (text,) = [text for text in wrong.warnings if words in text]
    assert not [text for text in mended.warnings if words in text]
    for one in axes:
        one.title.set_fontsize(10)
        if not one.get_xlabel():
            one.set_xlabel("training step")
    lines = [Line2D([], [], **style) for style in (WRONG, MENDED)]
    figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(arguments.output_dir / f"{name}.png")
    print(f"{name}: {text}\n", flush=True)
