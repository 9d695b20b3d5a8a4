"""Compiled modules, checkpointed activations, recurrent layers and attention, with every backend.

Each regime is held to its plain twin: the same network, with the same draws, out of operators that
have all derivatives. The twins themselves are held to brute force.
"""

import functools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from cases import (
    VALID,
    fit,
    frozen,
    last_hypergradient,
    make_optimizer,
    observe,
    relative_error,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import (
    T1T2,
    ClipR,
    Hyperparameter,
    L2Mixin,
    OnlineHPOCallback,
    UnrollK,
    named_hyperparameters,
)

STEPS = 5
ESTIMATORS = {
    "T1T2": T1T2,  # replays later, with θ_t put back in place
    "UnrollK": lambda: UnrollK(STEPS, "reverse"),
    "ClipR": lambda: ClipR(math.inf),  # replays now
}
BACKENDS = ("reverse", "forward", "finite_difference", "auto")


class Lit(L2Mixin, pl.LightningModule):
    """Trains a network with one λ that acts in the gradient (L2) and one inside the network."""

    def __init__(self, make_net):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = make_net()
        self.register_l2(init=0.05)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return make_optimizer("momentum", self.parameters())


class Scale(nn.Module):
    """Multiplies by λ in training: a hyperparameter in the midst of a network."""

    def __init__(self):
        super().__init__()
        self.factor = Hyperparameter(0.8)

    def forward(self, x):
        return x * self.factor() if self.training else x


# --------------------------------------------------------------------------------------- checkpoint


def saves_matrix_products(ctx, op, *args, **kwargs):
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "plain": lambda f, x: f(x),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "non_reentrant": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, saves_matrix_products),
    ),
}


class Deep(nn.Module):
    """λ, statistics and a mask inside a block whose activations may be computed again."""

    def __init__(self, mode="plain"):
        super().__init__()
        # Computing a block again updates its statistics a second time, which in the plain twin a
        # larger momentum does: 1 − (1 − 0.1)².
        momentum = 0.19 if mode == "plain" else 0.1
        self.first = nn.Linear(4, 5)
        self.block = nn.Sequential(
            nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=momentum), nn.Tanh(), Scale(), nn.Dropout()
        )
        self.last = nn.Linear(5, 3)
        self.mode = mode

    def forward(self, x):
        run = CHECKPOINTS[self.mode if self.training else "plain"]
        return self.last(run(self.block, self.first(x).tanh()))


# --------------------------------------------------------------------------------------- recurrent


class Recurrent(nn.Module):
    def __init__(self, kind, dropout=0.3):
        super().__init__()
        self.rnn = kind(2, 3, num_layers=2, batch_first=True, dropout=dropout)
        self.scale = Scale()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.scale(self.rnn(x.reshape(-1, 2, 2))[0][:, -1]))


# --------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """The numbers of an example as tokens."""

    def __init__(self, kind="bare", dropout=0.0, kernel=None, width=4):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.scale = Scale()
        self.kind, self.dropout, self.kernel = kind, dropout, kernel
        if kind == "multihead":
            self.attend = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)
        elif kind == "encoder":
            self.attend = nn.TransformerEncoderLayer(
                width, 2, 6, dropout=dropout, activation="gelu", batch_first=True
            )
        self.head = nn.Linear(width, 3)

    def mix(self, h):
        if self.kind == "multihead":
            return self.attend(h, h, h, need_weights=False)[0]
        if self.kind == "encoder":
            return self.attend(h)
        h = h.unflatten(-1, (2, -1)).transpose(1, 2)
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(h, h, h, dropout_p=p).transpose(1, 2).flatten(2)

    def forward(self, x):
        h = self.scale(self.embed(x.unsqueeze(-1)))
        if self.kernel is None:
            h = self.mix(h)
        else:
            with sdpa_kernel(self.kernel):
                h = self.mix(h)
        return self.head(h.tanh().mean(1))


# ----------------------------------------------------------------------------------------- regimes


def compiled(make_net, how, backend="aot_eager"):
    """Makes a module, and what the Trainer is given."""
    torch._dynamo.reset()
    model = Lit(make_net)
    if how == "net":
        model.net = torch.compile(model.net, backend=backend)
    elif how == "net in place":
        model.net.compile(backend=backend)
    else:
        return torch.compile(model, backend=backend)
    return model


def attention(**options):
    """A regime on the default kernel, and its twin on the one that has all derivatives."""
    return (
        lambda: Lit(lambda: Attention(**options)),
        lambda: Lit(lambda: Attention(kernel=SDPBackend.MATH, **options)),
    )


# The regime, and its plain twin.
REGIMES = {
    "compiled_net": (lambda: compiled(Deep, "net"), lambda: Lit(Deep)),
    "compiled_net_in_place": (lambda: compiled(Deep, "net in place"), lambda: Lit(Deep)),
    "compiled_module": (lambda: compiled(Deep, "module"), lambda: Lit(Deep)),
    **{
        f"checkpoint_{mode}": (lambda mode=mode: Lit(lambda: Deep(mode)), lambda: Lit(Deep))
        for mode in ("reentrant", "non_reentrant", "selective")
    },
    "attention": attention(),
    "attention_dropout": attention(dropout=0.3),
    "multihead_attention": attention(kind="multihead", dropout=0.3),
    "transformer_encoder_layer": attention(kind="encoder", dropout=0.3),
    "lstm": (lambda: Lit(lambda: Recurrent(nn.LSTM)),) * 2,
    "gru": (lambda: Lit(lambda: Recurrent(nn.GRU)),) * 2,
}


def hypergradient(make, estimator, derivatives):
    """Returns dL_V/dλ after STEPS steps, and what was said about the choice of a backend."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = observe(ESTIMATORS[estimator](), make(), steps=STEPS, derivatives=derivatives)
    said = [str(w.message) for w in caught if "OnlineHPOCallback" in str(w.message)]
    return last_hypergradient(callback), said


@functools.cache
def truth(regime, estimator):
    result, said = hypergradient(REGIMES[regime][1], estimator, "reverse")
    assert not said
    return result


def is_refused(regime, derivatives):
    if regime == "checkpoint_selective" and derivatives == "reverse":
        return True  # what it keeps serves one backward pass
    # The non-reentrant checkpoint of earlier versions of torch has no forward derivative.
    old = hasattr(torch.utils.checkpoint, "_NoopSaveInputs")
    return regime.startswith("checkpoint") and derivatives == "forward" and old


# Compiling takes a second or two; the third way to do it stands for these.
SLOW = ("compiled_net_in_place", "compiled_net")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("derivatives", BACKENDS)
@pytest.mark.parametrize(
    "regime", [pytest.param(r, marks=[pytest.mark.slow] * (r in SLOW)) for r in REGIMES]
)
def test_hypergradient(regime, derivatives, estimator):
    """Each cell of the table "Architectures" in the guide."""
    make = REGIMES[regime][0]
    if is_refused(regime, derivatives):
        with pytest.raises(RuntimeError, match=rf"(?s)'{derivatives}'.*Use derivatives='auto'"):
            hypergradient(make, estimator, derivatives)
        return
    falls_back = derivatives == "auto" and is_refused(regime, "reverse")
    expected = truth(regime, estimator)
    assert (expected.abs() > 1e-6).all()
    result, said = hypergradient(make, estimator, derivatives)
    exact = derivatives != "finite_difference" and not falls_back
    assert relative_error(result, expected) < (1e-9 if exact else 1e-5)
    assert len(said) == falls_back
    assert all("uses finite differences" in message for message in said)


def brute_force(make):
    """Central differences of the whole training over both λ."""

    def trained(j, h):
        torch.manual_seed(0)
        model = make()
        for k, p in enumerate(named_hyperparameters(model).values()):
            p.raw.add_(h * (j == k))
        fit(model, steps=STEPS)
        model.eval()
        with torch.no_grad():
            return model.loss(VALID).item()

    h = 1e-4
    return torch.tensor([(trained(j, h) - trained(j, -h)) / (2 * h) for j in range(2)])


@pytest.mark.parametrize("regime", REGIMES)
def test_the_twins_equal_brute_force(regime):
    expected = brute_force(REGIMES[regime][1])
    for estimator in ("UnrollK", "ClipR"):
        assert relative_error(truth(regime, estimator), expected) < 1e-5


class Trace(pl.Callback):
    """What the parameters and their gradients are after each step."""

    def __init__(self):
        self.entries = []

    def on_train_batch_end(self, trainer, module, *args):
        for p in module.parameters():
            self.entries += [p.detach().clone(), None if p.grad is None else p.grad.clone()]


@pytest.mark.parametrize("derivatives", ["auto", "finite_difference"])
@pytest.mark.parametrize("regime", REGIMES)
def test_training_is_bit_identical(regime, derivatives):
    """θ, gradients and buffers, with and without the callback; λ are frozen."""
    traces = []
    callback = OnlineHPOCallback(ClipR(math.inf), optimizer=frozen, derivatives=derivatives)
    for own in ([], [callback]):
        torch.manual_seed(0)
        model, trace = REGIMES[regime][0](), Trace()
        fit(model, [*own, trace], steps=STEPS)
        traces.append([*trace.entries, *model.buffers()])
        assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, nn.RNNBase))
    for one, other in zip(*traces, strict=True):
        assert torch.equal(one, other)
    assert len(callback.history) == STEPS
    assert issubclass(torch.utils.checkpoint.CheckpointFunction, torch.autograd.Function)


def test_checkpoints_compute_their_block_again():
    """The twins of the checkpointed regimes rest on it."""
    for mode in CHECKPOINTS:
        model = Lit(lambda mode=mode: Deep(mode))
        fit(model, steps=3)
        assert model.net.block[1].num_batches_tracked == (3 if mode == "plain" else 6)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
def test_a_reentrant_checkpoint_cuts_off_what_its_inputs_do_not_need(derivatives):
    """Where no input requires grad nothing inside is trained, in replays as in the training."""

    class Cut(nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
            self.scale = Scale()
            self.plain = plain

        def forward(self, x):
            if not self.training:
                h = self.first(x)
            elif self.plain:
                h = self.first(x).detach()
            else:
                h = checkpoint(self.first, x, use_reentrant=True)
            return self.last(self.scale(h.tanh()))

    plain, _ = hypergradient(lambda: Lit(lambda: Cut(True)), "ClipR", "reverse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the inputs
        result, said = hypergradient(lambda: Lit(lambda: Cut(False)), "ClipR", derivatives)
    assert relative_error(result, plain) < (1e-9 if derivatives == "reverse" else 1e-5)
    assert not said


def normalized(normalize, dim):
    return Lit(
        lambda: nn.Sequential(
            normalize(nn.Linear(4, 5), dim=dim), Scale(), nn.Tanh(), nn.Linear(5, 3)
        )
    )


@functools.cache
def expected_of_normalized(normalize, dim):
    return brute_force(lambda: normalized(normalize, dim))


@pytest.mark.parametrize("derivatives", BACKENDS)
@pytest.mark.parametrize("estimator", ["UnrollK", "ClipR"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    "normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm(normalize, dim, estimator, derivatives):
    """torch's own operator has a wrong second derivative."""
    result, said = hypergradient(lambda: normalized(normalize, dim), estimator, derivatives)
    assert relative_error(result, expected_of_normalized(normalize, dim)) < 1e-5
    assert not said


# ---------------------------------------------------------------------------------------- compiled


class Count(pl.Callback):
    """How many graphs have been compiled by the end of each step."""

    def __init__(self, backend):
        self.backend = backend
        self.frames = []

    def on_train_batch_end(self, *args):
        self.frames.append(self.backend.frame_count)


@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference"])
@pytest.mark.parametrize(
    ("how", "make_net", "more"),
    [
        ("net", lambda: nn.Linear(4, 3), 0),
        ("net", Deep, 1),
        ("module", Deep, 1),
    ],
    ids=["net", "net with a hyperparameter", "module"],
)
def test_compilations(how, make_net, more, derivatives):
    """One more before the first step, where λ is in the compiled code; later none."""
    frames = []
    for own in (
        [],
        [OnlineHPOCallback(ClipR(math.inf), optimizer=frozen, derivatives=derivatives)],
    ):
        count = Count(CompileCounterWithBackend("aot_eager"))
        fit(compiled(make_net, how, count.backend), [count, *own], steps=7)
        frames.append(count.frames)
    assert frames[1] == [n + more for n in frames[0]]
    assert frames[0][0] > 0


def other_draws(graph, inputs):
    """A compiler whose code draws random numbers as inductor's does: not those of eager mode."""

    def run(*args):
        torch.rand(1)
        return graph(*args)

    return run


class OtherDraws(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Deep()

    def forward(self, x):
        torch.rand(1)
        return self.net(x)


def test_auto_leaves_kernels_that_draw_other_random_numbers():
    def make():
        return compiled(Deep, "net", other_draws)

    plain, _ = hypergradient(lambda: Lit(OtherDraws), "ClipR", "reverse")
    result, said = hypergradient(make, "ClipR", "auto")
    assert relative_error(result, plain) < 1e-5
    assert len(said) == 1
    assert "uses finite differences" in said[0]
    assert "other random numbers" in said[0]

    result, said = hypergradient(make, "ClipR", "reverse")
    assert relative_error(result, plain) > 0.01
    assert len(said) == 1
    assert "'reverse'): eager mode" in said[0]
    assert "fallback_random" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("fallback_random", [False, True])
def test_inductor(fallback_random):
    """Its dropout is its own, unless it is told to draw as eager mode does."""

    def make():
        return compiled(Deep, "net", "inductor")

    with torch._inductor.config.patch(fallback_random=fallback_random):
        result, said = hypergradient(make, "ClipR", "auto")
        assert relative_error(result, brute_force(make)) < 1e-5
    assert len(said) == (not fallback_random)
    plain = truth("compiled_net", "ClipR")
    assert (relative_error(result, plain) < 1e-9) == fallback_random


# --------------------------------------------------------------------------------------- recurrent


def test_forward_derivatives_of_onednn_lstm():
    """oneDNN takes float32 only, and has none; replays go without it."""
    loader = DataLoader(TensorDataset(VALID[0].float(), VALID[1]), batch_size=5)
    results = []
    for derivatives in ("forward", "reverse"):
        torch.manual_seed(0)
        model = Lit(lambda: Recurrent(nn.LSTM)).float()
        x = torch.ones(1, 4).float()
        with forward_ad.dual_level(), pytest.raises(NotImplementedError):
            model.net(forward_ad.make_dual(x, x))
        callback = observe(
            ClipR(math.inf), model, steps=3, train=loader, valid=loader, derivatives=derivatives
        )
        results.append(last_hypergradient(callback))
    assert relative_error(*results) < 1e-4


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("derivatives", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_squared_error(estimator, derivatives):
    """Torch's own operator for the mean has no forward derivative of its gradient."""

    class Regressor(Lit):
        def __init__(self, error):
            super().__init__(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
            self.error = error

        def loss(self, batch):
            x, y = batch
            return self.error(self.net(x).squeeze(-1), y.to(x))

    def written_out(a, b):
        return ((a - b) ** 2).mean()

    operator = torch._C._nn.mse_loss
    found, said = hypergradient(lambda: Regressor(F.mse_loss), estimator, derivatives)
    expected, _ = hypergradient(lambda: Regressor(written_out), estimator, "reverse")
    assert not said
    assert relative_error(found, expected) < (1e-6 if derivatives == "finite_difference" else 1e-12)
    assert torch._C._nn.mse_loss is operator


# -------------------------------------------------------------------------------------------- CUDA

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("derivatives", ["reverse", "finite_difference", "auto"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_cudnn_recurrent_layers(kind, estimator, derivatives):
    """cuDNN has no double backward, and no backward in evaluation mode, which L_V is taken in."""

    def make():
        return Lit(lambda: Recurrent(kind, dropout=0.0))

    expected = last_hypergradient(observe(ESTIMATORS[estimator](), make(), steps=STEPS))
    callback = observe(
        ESTIMATORS[estimator](),
        make(),
        steps=STEPS,
        derivatives=derivatives,
        accelerator="gpu",
        devices=1,
    )
    assert relative_error(last_hypergradient(callback).cpu(), expected.cpu()) < 1e-5


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("derivatives", ["reverse", "forward", "finite_difference", "auto"])
@pytest.mark.parametrize("kind", ["bare", "multihead", "encoder"])
def test_attention_on_cuda(kind, derivatives):
    """In float32 and heads of 8, which the memory-efficient kernel takes."""
    results = []
    for accelerator, chosen in (("cpu", "reverse"), ("gpu", derivatives)):
        loader = DataLoader(TensorDataset(VALID[0].float(), VALID[1]), batch_size=5)
        callback = observe(
            ClipR(math.inf),
            Lit(lambda: Attention(kind=kind, width=16)).float(),
            steps=4,
            train=loader,
            valid=loader,
            derivatives=chosen,
            accelerator=accelerator,
            devices=1,
        )
        results.append(last_hypergradient(callback).cpu())
    assert relative_error(results[1], results[0]) < 1e-2


@pytest.mark.gpu
@needs_cuda
def test_auto_sees_that_fused_attention_drops_out_otherwise():
    """The masks of the fused kernels are not those of the MATH kernel."""
    loader = DataLoader(TensorDataset(VALID[0].float(), VALID[1]), batch_size=20)
    with pytest.warns(UserWarning, match="other random numbers"):
        observe(
            ClipR(math.inf),
            Lit(lambda: Attention(dropout=0.5, width=16)).float(),
            steps=2,
            train=loader,
            valid=loader,
            accelerator="gpu",
            devices=1,
        )
