"""OnlineHPOCallback: when λ is updated, by how much, and what is written down about it."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from cases import (
    OPTIMIZERS,
    VALID,
    MemoryLogger,
    Mlp,
    cosine,
    fit,
    frozen,
    observe,
    train_loader,
    weights,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    Interval,
    OnlineHPOCallback,
    UnitInterval,
    UnrollK,
    named_hyperparameters,
)

NAMES = ["l2.net.0", "l2.net.2"]


def sgd(lr):
    return lambda raw: torch.optim.SGD(raw, lr=lr)


def values(callback):
    return torch.tensor([list(r.values.values()) for r in callback.history])


def hypergradients(callback):
    return torch.stack([torch.stack(list(r.hypergradients.values())) for r in callback.history])


# ---------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("estimator", "options", "steps"),
    [
        (T1T2(), {}, range(1, 11)),
        (ClipR(), {}, range(1, 11)),
        (UnrollK(4), {}, [4, 8]),
        (UnrollK(4), {"every_n_steps": 5}, [5, 10]),
        (T1T2(), {"every_n_steps": 3}, [3, 6, 9]),
        (ClipR(), {"every_n_steps": 3, "warmup_steps": 5}, [6, 9]),
        (ClipR(), {"warmup_steps": 8}, [9, 10]),
    ],
)
def test_updates_happen_when_they_are_due(estimator, options, steps):
    assert [r.step for r in observe(estimator, Mlp(), **options).history] == list(steps)


def test_tangents_advance_while_the_hyperparameters_warm_up():
    warm = observe(ClipR(math.inf), Mlp("adam"), warmup_steps=6)
    cold = observe(ClipR(math.inf), Mlp("adam"))
    # Held-out batches are shuffled, so that sums round differently.
    torch.testing.assert_close(hypergradients(warm), hypergradients(cold)[6:], rtol=1e-11, atol=0)


def test_hyperparameters_stay_put_during_the_warm_up():
    callback = OnlineHPOCallback(ClipR(), warmup_steps=10)
    model = Mlp()
    fit(model, callback)
    assert callback.history == []
    assert torch.equal(model.l2.net._modules["0"].raw, torch.tensor(0.05).log())


def test_the_schedule_is_a_predicate_that_may_be_overridden():
    class Squares(OnlineHPOCallback):
        def should_update(self, step):
            return math.isqrt(step) ** 2 == step

    callback = Squares(T1T2(), optimizer=frozen)
    fit(Mlp(), callback)
    assert [r.step for r in callback.history] == [1, 4, 9]
    every = hypergradients(observe(T1T2(), Mlp()))
    torch.testing.assert_close(hypergradients(callback), every[[0, 3, 8]], rtol=1e-11, atol=0)


def test_steps_are_optimizer_steps():
    callback = observe(T1T2(), Mlp(), steps=6, accumulate_grad_batches=2)
    assert [r.step for r in callback.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("clip", [None, 1e6])
def test_a_gradient_overflow_is_no_step(clip):
    """Under a gradient scaler, an overflow skips the step; λ is not updated for it either.

    What clipping did to it is forgotten as well.
    """

    class Overflowing(Mlp):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.inf if batch_idx == 2 else 1.0)

    # As large as after the first overflow of a real training, and the same later on.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # Autocast alone would make the numbers coarse; what is tested is the scaling.
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    batches = [batch for i, batch in enumerate(train_loader()) if i != 2]
    for estimator in (ClipR(math.inf), UnrollK(4, "reverse"), UnrollK(4, "forward")):
        overflowing = Overflowing("momentum", inside_loss=True, schedule=False)
        callback = OnlineHPOCallback(estimator, optimizer=frozen)
        fit(overflowing, callback, steps=5, plugins=plugin, gradient_clip_val=clip)
        assert callback.history[-1].step == 4
        # The same four steps without the third batch.
        plain = OnlineHPOCallback(estimator, optimizer=frozen)
        model = Mlp("momentum", inside_loss=True, schedule=False)
        fit(model, plain, steps=4, train=DataLoader(batches, batch_size=None))
        torch.testing.assert_close(weights(overflowing), weights(model), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            hypergradients(callback)[-1], hypergradients(plain)[-1], rtol=1e-9, atol=0
        )


# --------------------------------------------------------------------------------------- the λ step


def test_lambda_takes_the_step_of_its_optimizer():
    callback = OnlineHPOCallback(ClipR(), optimizer=sgd(0.5))
    model = Mlp("momentum")
    fit(model, callback)
    raw = torch.cat([torch.full((1, 2), math.log(0.05)), values(callback).log()])
    moves = -0.5 * hypergradients(callback)
    torch.testing.assert_close(raw.diff(dim=0), moves, rtol=1e-7, atol=1e-14)
    found = torch.stack([h() for h in named_hyperparameters(model).values()])
    assert torch.equal(found, values(callback)[-1])


def test_the_learning_rate_can_follow_the_models():
    """c · η of Algorithm 1, with η the rate of the very step, under a schedule."""
    callback = OnlineHPOCallback(ClipR(), optimizer=sgd(5.0), scale_lr_with_model=True)
    fit(Mlp("momentum"), callback)
    rates = OPTIMIZERS["momentum"][1]["lr"] * torch.tensor([cosine(t) for t in range(10)])
    raw = torch.cat([torch.full((1, 2), math.log(0.05)), values(callback).log()])
    moves = -5.0 * rates[:, None] * hypergradients(callback)
    torch.testing.assert_close(raw.diff(dim=0), moves, rtol=1e-7, atol=1e-14)
    assert (moves.abs() > 0).all()


def test_a_schedule_of_the_lambda_optimizer_survives_the_scaling():
    kept = []

    def factory(raw):
        kept.append(torch.optim.SGD(raw, lr=0.25))
        return kept[0]

    fit(Mlp(), OnlineHPOCallback(ClipR(), optimizer=factory, scale_lr_with_model=True))
    assert kept[0].param_groups[0]["lr"] == 0.25


def test_beside_an_estimator_the_default_is_adam_on_the_raw_values():
    callback = OnlineHPOCallback(ClipR())
    fit(Mlp(), callback)
    first = values(callback)[0].log() - math.log(0.05)
    signs = -hypergradients(callback)[0].sign()
    torch.testing.assert_close(first, 0.01 * signs, rtol=1e-4, atol=0)


class Sigma(Mlp):
    """Has a noise level at the lower end of its interval, of which less is better."""

    def __init__(self, init=0.0):
        super().__init__()
        self.sigma = Hyperparameter(init, Interval(0.0, 1.0))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x + self.sigma() * torch.randn_like(x)), y)


def test_lambda_is_projected_after_the_step():
    callback = OnlineHPOCallback(T1T2(), optimizer=sgd(1e3))
    fit(Sigma(0.5), callback)
    sigma = torch.tensor([r.values["sigma"] for r in callback.history])
    assert ((sigma >= 0) & (sigma <= 1)).all()
    assert ((sigma == 0) | (sigma == 1)).any()


# ------------------------------------------------------------------------- hypergradients of no use


def held_out(*broken):
    """Held-out batches in a fixed order, some of them NaN."""
    x, y = VALID
    return [[x * math.nan if k in broken else x, y] for k in range(5)]


@pytest.mark.parametrize(
    "make", [T1T2, ClipR, lambda: UnrollK(1, "reverse"), lambda: UnrollK(1, "forward")]
)
def test_a_hypergradient_that_is_not_finite_never_reaches_lambda(make):
    callback = OnlineHPOCallback(make(), dataloader=held_out(1, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Mlp(), callback)
    raw = torch.cat([torch.full((1, 2), 0.05), values(callback)])
    moved = (raw.diff(dim=0) != 0).all(dim=1).tolist()
    stayed = (raw.diff(dim=0) == 0).all(dim=1).tolist()
    broken = [k % 5 in (1, 3) for k in range(10)]
    assert stayed == broken
    assert moved == [not b for b in broken]
    assert torch.isfinite(raw).all()
    assert [r.skipped for r in callback.history] == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert callback.skipped == 4
    said = [w for w in caught if "not finite" in str(w.message)]
    assert len(said) == 1
    assert "step 2" in str(said[0].message)
    assert ".skipped" in str(said[0].message)


def test_the_lambda_optimizer_does_not_see_what_is_skipped():
    """Its moments go on as if the broken batches had never been drawn."""
    optimizers = []

    def factory(raw):
        optimizers.append(torch.optim.Adam(raw, lr=0.01))
        return optimizers[0]

    callback = OnlineHPOCallback(T1T2(), optimizer=factory, dataloader=held_out(0))
    fit(Mlp(), callback)
    for state in optimizers[0].state.values():
        assert state["step"] == 8
        assert torch.isfinite(state["exp_avg"]).all()
        assert torch.isfinite(state["exp_avg_sq"]).all()


def test_a_tangent_that_overflows_starts_anew_and_the_others_go_on():
    class Overflowing(ClipR):
        def observe(self, step):
            super().observe(step)
            self.count = getattr(self, "count", 0) + 1
            if self.count == 4:
                self._tangents.state["theta"][0][0] = math.inf

    broken = observe(Overflowing(math.inf), Mlp())
    whole = hypergradients(observe(ClipR(math.inf), Mlp()))
    result = hypergradients(broken)
    finite = torch.isfinite(result)
    assert finite[:, 1].all()
    assert finite[:, 0].tolist() == [t != 3 for t in range(10)]
    assert torch.equal(result[:, 1], whole[:, 1])
    assert broken.skipped == 1
    # The first step of the new tangent sees the effect of λ on that step alone.
    one_step = hypergradients(observe(T1T2(), Mlp()))
    torch.testing.assert_close(result[4, 0], one_step[4, 0], rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------- what is written down


def test_a_record_of_scalars():
    callback = observe(ClipR(), Mlp())
    record = callback.history[2]
    assert record.step == 3
    assert list(record.values) == list(record.hypergradients) == NAMES
    assert record.values["l2.net.0"] == pytest.approx(0.05)
    assert all(type(v) is float for v in record.values.values())
    assert all(type(v) is float for v in record.tangent_norms.values())
    assert all(h.shape == () and h.device.type == "cpu" for h in record.hypergradients.values())
    assert record.skipped == 0
    assert observe(T1T2(), Mlp()).history[0].tangent_norms is None


class PerExample(Mlp):
    """Has a weight for each of the training examples, of which a batch uses the first few."""

    def __init__(self, n):
        super().__init__()
        self.example = Hyperparameter(torch.full((n,), 0.5), UnitInterval())

    def training_step(self, batch, batch_idx):
        x, y = batch
        each = F.cross_entropy(self.net(x), y, reduction="none")
        return (each * self.example()[: len(x)]).mean()


def test_a_record_of_a_vector():
    record = observe(ClipR(), PerExample(6), steps=2, train=train_loader(batch_size=6)).history[-1]
    assert record.values["example"] == pytest.approx([0.5] * 6)
    assert record.hypergradients["example"].shape == (6,)
    assert record.hypergradients["example"].abs().min() > 0
    assert len(record.tangent_norms["example"]) == 6


@pytest.mark.parametrize(("n", "summarized"), [(1000, False), (1001, True)])
def test_above_a_thousand_elements_summaries_are_kept(n, summarized):
    record = observe(ClipR(), PerExample(n), steps=1).history[-1]
    raw = record.hypergradients["example"]
    assert isinstance(raw, dict) == summarized
    if not summarized:
        assert len(record.values["example"]) == n
        return
    full = observe(ClipR(), PerExample(1000), steps=1).history[-1]
    # The example weights beyond the batch have no influence, so the extremes are the same.
    gradient = full.hypergradients["example"]
    assert raw == pytest.approx(
        {
            "min": gradient.min().item(),
            "mean": gradient.sum().item() / n,
            "max": gradient.max().item(),
            "norm": gradient.norm().item(),
        },
        rel=1e-9,
    )
    assert record.values["example"] == pytest.approx(
        {"min": 0.5, "mean": 0.5, "max": 0.5, "norm": 0.5 * math.sqrt(n)}
    )
    assert record.tangent_norms["example"]["max"] == pytest.approx(
        max(full.tangent_norms["example"])
    )


def test_loggers_get_what_log_every_n_steps_asks_for():
    """The first update after each multiple of it, and the last; the history has them all."""
    expected = {1: [2, 4, 6, 8, 10], 3: [4, 6, 10], 4: [4, 8, 10], 7: [8, 10], 50: [10], 0: []}
    for every, steps in expected.items():
        logger = MemoryLogger()
        callback = OnlineHPOCallback(ClipR(), every_n_steps=2)
        fit(Mlp(), callback, logger=logger, log_every_n_steps=every)
        logged = [step for step, m in logger.entries if any("hpo/" in k for k in m)]
        assert logged == steps, every
        assert [record.step for record in callback.history] == [2, 4, 6, 8, 10]


def test_every_update_reaches_every_logger():
    loggers = [MemoryLogger(), MemoryLogger()]
    callback = OnlineHPOCallback(ClipR(), every_n_steps=2)
    fit(Mlp(), callback, logger=loggers, log_every_n_steps=1)
    for logger in loggers:
        entries = [(step, m) for step, m in logger.entries if any("hpo/" in k for k in m)]
        assert [step for step, _ in entries] == [2, 4, 6, 8, 10]
        for (_, logged), record in zip(entries, callback.history, strict=True):
            expected = {}
            for name in NAMES:
                expected[f"hpo/{name}"] = record.values[name]
                expected[f"hpo/{name}_grad"] = record.hypergradients[name].item()
                expected[f"hpo/{name}_tangent_norm"] = record.tangent_norms[name]
            assert logged == expected


def test_reverse_estimators_log_no_tangent_norms():
    logger = MemoryLogger()
    fit(Mlp(), OnlineHPOCallback(T1T2()), logger=logger)
    logged = {k for _, m in logger.entries for k in m if "hpo/" in k}
    assert logged == {f"hpo/{name}{end}" for name in NAMES for end in ("", "_grad")}


def test_a_vector_is_logged_as_its_mean_and_extremes():
    logger = MemoryLogger()
    callback = OnlineHPOCallback(T1T2(), optimizer=sgd(50.0))
    fit(PerExample(6), callback, steps=1, logger=logger, train=train_loader(batch_size=6))
    (logged,) = (m for _, m in logger.entries if any("hpo/" in k for k in m))
    (record,) = callback.history
    example = torch.tensor(record.values["example"])
    gradient = record.hypergradients["example"]
    for key, reduce in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
        assert logged[f"hpo/example/{key}"] == pytest.approx(reduce(example).item())
        assert logged[f"hpo/example_grad/{key}"] == pytest.approx(reduce(gradient).item())
    assert logged["hpo/example/min"] < logged["hpo/example/max"]


def test_values_are_on_the_progress_bar_and_in_the_callback_metrics():
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((dict(trainer.progress_bar_metrics), dict(trainer.callback_metrics)))

    callback = OnlineHPOCallback(ClipR())
    fit(Mlp(), [callback, Look()])
    for (bar, metrics), record in zip(seen, callback.history, strict=True):
        assert {k for k in bar if "hpo/" in k} == {f"hpo/{name}" for name in NAMES}
        for name in NAMES:
            assert bar[f"hpo/{name}"] == pytest.approx(record.values[name])
            assert metrics[f"hpo/{name}"].item() == pytest.approx(record.values[name])


def test_a_second_training_starts_a_new_history():
    callback = OnlineHPOCallback(ClipR(), dataloader=held_out(1))
    fit(Mlp(), callback)
    first = [(r.step, r.values, r.skipped) for r in callback.history]
    fit(Mlp(), callback)
    assert [(r.step, r.values, r.skipped) for r in callback.history] == first
    assert callback.skipped == 2
