"""A loss that asks the trainer how far the training is: replays get the answers of their step."""

import functools
import math

import pytest
from cases import Mlp, last_hypergradient, observe, relative_error, truth

from lightning_hpo import ClipR, UnrollK

ESTIMATORS = {"ClipR": lambda: ClipR(math.inf), "reverse": lambda: UnrollK(10, "reverse")}


class ByRate(Mlp):
    def factor(self):
        return 5 * self.optimizers().param_groups[0]["lr"]


class ByScheduler(Mlp):
    def factor(self):
        return 5 * self.lr_schedulers().get_last_lr()[0]


class ByBatches(Mlp):
    def factor(self):
        return 0.1 * self.trainer.fit_loop.epoch_loop.total_batch_idx


class ByBatchOfEpoch(Mlp):
    def factor(self):
        return 0.2 * self.trainer.fit_loop.epoch_loop.batch_idx


class ByEndOfEpoch(Mlp):
    def factor(self):
        return float(self.trainer.is_last_batch)


class BySchedulersCount(Mlp):
    def factor(self):
        return 1 / (1 + self.lr_schedulers().last_epoch)


class BySchedulersState(Mlp):
    def factor(self):
        return 1 / (1 + self.lr_schedulers().state_dict()["_step_count"])


class ByEpochs(Mlp):
    def factor(self):
        return 0.2 * self.trainer.fit_loop.epoch_progress.current.processed


class ByBatchesThatStepped(Mlp):
    def factor(self):
        return 0.1 * self.trainer.fit_loop.epoch_loop._batches_that_stepped


class ByProcessed(Mlp):
    def factor(self):
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return 0.1 * progress.current.processed + 0.05 * progress.total.completed


KINDS = [
    *(ByRate, ByScheduler, ByBatches, ByBatchOfEpoch, ByEndOfEpoch, BySchedulersCount),
    *(BySchedulersState, ByEpochs, ByBatchesThatStepped, ByProcessed),
]


def make(kind):
    class Weighted(kind):
        def __init__(self):
            super().__init__("momentum", granularity="model")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (0.5 + self.factor())

    return Weighted()


@functools.cache
def whole_fits(kind):
    return truth(lambda: make(kind))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_are_those_of_whole_fits(kind, estimator):
    every = 10 if estimator == "reverse" else 1
    found = last_hypergradient(observe(ESTIMATORS[estimator](), make(kind), every_n_steps=every))
    assert relative_error(found, whole_fits(kind)) < 1e-6
