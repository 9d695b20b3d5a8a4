"""Data hyper-cleaning: half of the training labels are wrong, and a training finds out which.

Every training example has a weight between 0 and 1. All weights start at 1 and are tuned at once by
the loss on 100 clean held-out examples (Franceschi et al. 2017, §5.1). A wrong label is the next
digit's: errors of one kind mislead a classifier more than random ones, which average out.

The script trains with all weights fixed at 1, and with the weights tuned. Then, as in that paper,
it throws out the examples whose weight has fallen below one half, adds the held-out examples to the
rest, and trains again. An oracle throws out exactly the wrong ones.

    python examples/hyper_cleaning.py
"""

from __future__ import annotations

import lightning
import torch
from _common import adam, batches, digits, evaluate, fit, parse_seed, print_header, print_row
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import T1T2, ExampleWeightMixin, OnlineHPOCallback
from lightning_hpo.estimators import Estimator
from lightning_hpo.regularizers import IndexedDataset

STEPS = 1000


class LitClassifier(ExampleWeightMixin, lightning.LightningModule):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        self.register_example_weights(count)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return self.weighted_mean(losses, index)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def corrupt(data: TensorDataset, seed: int) -> tuple[TensorDataset, Tensor]:
    """Gives half of the examples the label of the next digit, and says which."""
    images, labels = data.tensors
    wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < 0.5
    return TensorDataset(images, torch.where(wrong, (labels + 1) % 10, labels)), wrong


def train(
    data: TensorDataset, held_out: TensorDataset, estimator: Estimator | None, seed: int
) -> LitClassifier:
    lightning.seed_everything(seed, verbose=False)
    module = LitClassifier(len(data))
    # Weights are tuned on their own scale. Adam moves them by up to its learning rate per step:
    # with 0.01 a weight needs 100 steps from 1 to 0, in which its example is drawn eight times.
    callbacks = [] if estimator is None else [OnlineHPOCallback(estimator, optimizer=adam(0.01))]
    loader = DataLoader(IndexedDataset(data), batch_size=100, shuffle=True)
    fit(module, loader, batches(held_out, 100), STEPS, callbacks)
    return module


def kept(data: TensorDataset, keep: Tensor, more: TensorDataset) -> TensorDataset:
    """Joins some examples of one set with all of another."""
    pairs = zip(data.tensors, more.tensors, strict=True)
    return TensorDataset(*(torch.cat([own[keep], other]) for own, other in pairs))


def main() -> None:
    seed = parse_seed(__doc__)
    clean, held_out, test = digits(1200, 100, 497)
    data, wrong = corrupt(clean, seed)
    print_header("examples", "test loss", "test accuracy")

    def show(name: str, examples: TensorDataset, estimator: Estimator | None = None) -> Tensor:
        module = train(examples, held_out, estimator, seed)
        loss, accuracy = evaluate(module.net, test)
        print_row(name, str(len(examples)), loss, f"{accuracy:.1%}")
        return module.example_weights().detach()

    show("not tuned: all weights 1", data)
    weights = show("tuned, T1T2", data, T1T2())
    found = weights < 0.5

    print("\nTrained with the held-out examples added")
    show("  held-out examples alone", held_out)
    show("  with all", kept(data, torch.ones_like(wrong), held_out))
    show("  with those of weight ≥ 0.5", kept(data, ~found, held_out))
    show("  with the right ones (oracle)", kept(data, ~wrong, held_out))

    hits = int((found & wrong).sum())
    precision, recall = hits / int(found.sum()), hits / int(wrong.sum())
    f1 = 2 * precision * recall / (precision + recall)
    print(
        f"\nWrong labels: {int(wrong.sum())}; found {hits} of them among {int(found.sum())} "
        f"suspects (precision {precision:.1%}, recall {recall:.1%}, F1 {f1:.3f})"
    )


if __name__ == "__main__":
    main()
