"""Several estimators in one run: patterns of names, what they share, errors, resuming."""

import math

import pytest
import torch
from cases import (
    STEPS,
    VALID,
    MemoryLogger,
    Mlp,
    Recorder,
    fit,
    flat,
    frozen,
    observe,
    train_loader,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_hpo import (
    T1T2,
    ClipR,
    GaussianNoiseMixin,
    Hyperparameter,
    Implicit,
    OnlineHPOCallback,
    UnrollK,
    freeze,
)
from lightning_hpo.estimators import Estimate, Estimator


class Noisy(GaussianNoiseMixin, Mlp):
    """Two λ that act through penalties, and one inside the loss."""

    def __init__(self, optimizer="momentum", **options):
        super().__init__(optimizer, **options)
        self.register_noise(init=0.2, at="net.0")
        self.double()
        torch.manual_seed(0)  # each training draws the same noise


def one_after_the_other(mapping, make=Noisy, **options):
    """Each λ from the run of its estimator alone, every three steps."""
    found = {}
    for pattern, estimator in mapping.items():
        callback = observe(estimator(), make(), every_n_steps=3, **options)
        found[pattern] = [record.hypergradients for record in callback.history]
    return found


MAPPINGS = {
    "forward and direct": {"l2.net.0": T1T2, "*": lambda: ClipR(math.inf)},
    "two tangents": {"l2*": lambda: ClipR(0.1, decay=0.9), "noise": lambda: UnrollK(3, "forward")},
    "reverse and forward": {"noise": lambda: UnrollK(3, "reverse"), "*": lambda: ClipR(stride=2)},
    "two windows": {"l2.net.2": lambda: UnrollK(2, "reverse"), "*": lambda: UnrollK(3, "reverse")},
    "implicit": {"l2*": lambda: Implicit(iterations=5), "*": T1T2},
}


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
def test_each_finds_what_it_finds_alone(mapping, derivatives, clip):
    options = {"derivatives": derivatives, "gradient_clip_val": clip}
    alone = one_after_the_other(mapping, **options)
    together = observe(
        {pattern: make() for pattern, make in mapping.items()},
        Noisy(),
        every_n_steps=3,
        **options,
    )
    assert [record.step for record in together.history] == [3, 6, 9]
    served = {
        name: next(p for p in mapping if p == name or p in ("*", f"{name[:2]}*"))
        for name in ("l2.net.0", "l2.net.2", "noise")
    }
    for t, record in enumerate(together.history):
        assert record.hypergradients.keys() == served.keys()
        for name, pattern in served.items():
            torch.testing.assert_close(
                record.hypergradients[name], alone[pattern][t][name], rtol=1e-9, atol=1e-12
            )


@pytest.mark.parametrize("optimizer", ["adam", "nesterov"])
def test_options_of_the_optimizer_have_an_estimator_of_their_own(optimizer):
    def run(estimator):
        callback = OnlineHPOCallback(
            estimator, optimizer=frozen, every_n_steps=3, optimizer_hyperparameters=["lr"]
        )
        fit(Noisy(optimizer), callback)
        return [record.hypergradients for record in callback.history]

    together = run({"optimizer.*": T1T2(), "*": ClipR(math.inf)})
    steps, tangents = run(T1T2()), run(ClipR(math.inf))
    for found, a, b in zip(together, steps, tangents, strict=True):
        for name, value in found.items():
            truth = a if name == "optimizer.lr" else b
            torch.testing.assert_close(value, truth[name], rtol=1e-9, atol=1e-12)
    # Implicit knows no optimizer, but need not serve its options.
    run({"l2*": Implicit(), "*": UnrollK(3)})
    with pytest.raises(MisconfigurationException, match=r"Implicit cannot tune \['optimizer.lr'\]"):
        run({"l2*": UnrollK(3), "*": Implicit()})


def test_accumulation_is_shared_too():
    options = {"train": train_loader(batch_size=4), "accumulate_grad_batches": 2}
    mapping = {"noise": lambda: UnrollK(3, "reverse"), "*": lambda: ClipR(math.inf)}
    alone = one_after_the_other(mapping, **options)
    together = observe(
        {p: make() for p, make in mapping.items()}, Noisy(), every_n_steps=3, **options
    )
    for t, record in enumerate(together.history):
        for name, value in record.hypergradients.items():
            truth = alone["noise" if name == "noise" else "*"][t][name]
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-12)


def test_replays_validation_batches_and_gradients_are_shared():
    counts = Recorder(replays=0, validations=0)

    class Counting(Noisy):
        def training_step(self, batch, batch_idx):
            counts.replays += "log" in vars(self)  # muted: this is a replay
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            counts.validations += "log" in vars(self)
            return super().validation_step(batch, batch_idx)

    def count(estimator):
        counts.replays = counts.validations = 0
        observe(
            estimator,
            Counting(),
            every_n_steps=2,
            derivatives="reverse",
            limit_val_batches=0,
            dataloader=[list(VALID)],
        )
        return counts.replays, counts.validations

    alone = count(ClipR())
    assert count({"noise": ClipR(5.0), "l2*": ClipR(2.0)}) == alone
    # T1T2 replays the last step of each window once more, from the other side. And at the first
    # step tangents are zero: without a λ in the loss there is nothing to multiply.
    assert count({"noise": T1T2(), "l2*": ClipR(2.0)}) == (alone[0] + STEPS // 2 - 1, alone[1])


def test_the_same_instance_may_serve_two_patterns():
    estimator = ClipR(math.inf)
    split = observe({"noise": estimator, "l2*": estimator}, Noisy())
    whole = observe(ClipR(math.inf), Noisy())
    for a, b in zip(split.history, whole.history, strict=True):
        for name, value in b.hypergradients.items():
            torch.testing.assert_close(a.hypergradients[name], value, rtol=1e-9, atol=1e-12)
    assert not vars(estimator).keys() - vars(ClipR(math.inf)).keys()  # a run leaves nothing in it


def test_what_has_no_estimate_is_left_alone():
    class Silent(T1T2):
        def hypergradient(self, validation):
            super().hypergradient(validation)
            return None

    logger = MemoryLogger()
    model = Noisy()
    start = {name: flat([b]) for name, b in model.named_buffers() if name.endswith("raw")}
    callback = OnlineHPOCallback({"noise": Silent(), "*": ClipR()})
    fit(model, callback, logger=logger, steps=4)
    assert len(callback.history) == 4
    for record in callback.history:
        assert set(record.values) == {"l2.net.0", "l2.net.2", "noise"}
        assert set(record.hypergradients) == set(record.tangent_norms) == {"l2.net.0", "l2.net.2"}
    raws = {name: flat([b]) for name, b in model.named_buffers() if name.endswith("raw")}
    assert torch.equal(raws["noise.raw"], start["noise.raw"])
    assert not torch.equal(raws["l2.net.0.raw"], start["l2.net.0.raw"])
    logged = {name for _, entries in logger.entries for name in entries}
    assert {"hpo/noise", "hpo/l2.net.0_grad"} <= logged
    assert "hpo/noise_grad" not in logged


def test_a_training_is_bit_identical_with_frozen_lambda():
    plain = Noisy()
    fit(plain)
    callback = OnlineHPOCallback(
        {"noise": UnrollK(2, "reverse"), "l2.net.0": T1T2(), "*": ClipR()}, optimizer=frozen
    )
    tuned = Noisy()
    fit(tuned, callback)
    for a, b in zip(tuned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_training_goes_on_as_one_that_never_stopped(tmp_path):
    def mapping():
        return {"noise": UnrollK(4, "reverse"), "l2.net.0": T1T2(), "*": ClipR(0.5, decay=0.9)}

    def train(steps, path=None, estimator=None, **options):
        model = Noisy()
        callback = OnlineHPOCallback(estimator or mapping(), **options)
        return model, callback, fit(model, callback, steps=steps, ckpt_path=path)

    whole, history, _ = train(15)
    path = tmp_path / "half.ckpt"
    train(5)[2].save_checkpoint(path)  # in the middle of the window
    resumed, found, _ = train(15, path)
    assert found.history == history.history
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(MisconfigurationException, match=r"T1T2 for \['l2.net.0'\]"):
        train(15, path, {"noise": UnrollK(4, "reverse"), "*": ClipR(0.5, decay=0.9)})
    train(15, path, {"*": T1T2()}, strict=False)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"keep*": T1T2(), "l2*": ClipR()}, r"matches the hyperparameters \['noise'\]"),
        ({"keep*": T1T2(), "*": ClipR()}, r"patterns \['keep\*'\].*\['l2.net.0', 'l2.net.2', 'no"),
        ({"*": T1T2(), "l2*": ClipR()}, r"patterns \['l2\*'\].*earlier pattern has left"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_anything_moves(mapping, message):
    model, plain = Noisy(), Noisy()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, OnlineHPOCallback(mapping))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_patterns_of_frozen_hyperparameters_are_no_mistake():
    model = freeze(Noisy(), {"noise": 0.1})
    callback = OnlineHPOCallback({"noise": T1T2(), "*": ClipR()})
    fit(model, callback, steps=2)
    assert set(callback.history[-1].values) == {"l2.net.0", "l2.net.2"}


def test_arguments_of_several_estimators():
    several = {"a*": UnrollK(3), "*": T1T2()}
    assert OnlineHPOCallback(several).every_n_steps == 3
    assert OnlineHPOCallback(several).estimator is several
    with pytest.raises(ValueError, match="smaller than the window of 3 steps of UnrollK"):
        OnlineHPOCallback(several, every_n_steps=2)
    with pytest.raises(ValueError, match=r"UnrollK\(restart=True\).*use it alone"):
        OnlineHPOCallback({"a": UnrollK(3, restart=True), "*": T1T2()})
    for wrong in ({}, {"*": "T1T2"}, {1: T1T2()}, [T1T2()], T1T2):
        with pytest.raises(TypeError, match="expected an instance of an Estimator"):
            OnlineHPOCallback(wrong)


def test_a_step_is_refused_where_theta_has_moved():
    class Late(Estimator):
        window = 1

        def observe(self, step):
            self.step = step

        def hypergradient(self, validation):
            return self.step.products([g.unsqueeze(0) for g in validation.tensors()])

    with pytest.raises(RuntimeError, match=r"keep step.kept\(\) instead of it"):
        observe(Late(), Mlp(), steps=1)


def test_products_and_tangents_do_not_mix():
    class Both(ClipR):
        def observe(self, step):
            super().observe(step)
            step.products([t.new_ones((1, *t.shape)) for t in self.space.theta])

    with pytest.raises(RuntimeError, match="its batches were not kept"):
        observe(Both(), Mlp(), steps=1)


def test_outcomes_stand_beside_their_patterns():
    callback = observe({"l2*": Implicit(), "noise": Implicit("neumann", 2), "x": T1T2()}, Named())
    assert callback.history[0].outcome == "l2*: negative curvature, noise: iteration limit"


class Named(Noisy):
    def __init__(self):
        super().__init__()
        self.x = Hyperparameter(1.0)

    def training_step(self, batch, batch_idx):
        return self.x() * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda found: found.gradients, TypeError, "returned a list, expected an Estimate or None"),
        (lambda found: Estimate(found.gradients[:1]), ValueError, r"\[\(\)\], expected \[\(\), "),
        (
            lambda found: Estimate([g.reshape(1) for g in found.gradients]),
            ValueError,
            r"shapes \[\(1,\).*space.split",
        ),
        (lambda found: Estimate(found.gradients, []), ValueError, r"shapes \[\], expected"),
    ],
)
def test_an_estimate_of_another_shape_is_refused(answer, error, message):
    class Wrong(T1T2):
        def hypergradient(self, validation):
            return answer(super().hypergradient(validation))

    with pytest.raises(error, match=message):
        observe(Wrong(), Mlp(), steps=1)


@pytest.mark.parametrize("use", [lambda step, y: step.jvp_(y), lambda step, y: step.kept()])
def test_a_step_is_refused_where_its_effect_has_used_it_up(use):
    class Both(ClipR):
        def observe(self, step):
            assert step.effect() is not None
            use(step, self._tangents)

    with pytest.raises(RuntimeError, match="Take the effect last"):
        observe(Both(), Mlp(), steps=1, gradient_clip_val=0.01)
