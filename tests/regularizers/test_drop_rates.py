"""Drop rates that code reads as numbers; layers of other kinds; what is left out."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
from cases import VALID, Recorder, fit, frozen, weights
from torch import nn
from torch.nn import functional as F

from lightning_hpo import (
    T1T2,
    ClipR,
    DropoutMixin,
    OnlineHPOCallback,
    UnrollK,
    keep_probability,
    named_hyperparameters,
)
from lightning_hpo.regularizers import StackedRNN, TunableDropout


class ReadsTheRate(nn.Module):
    """As BERT, GPT-2 and timm's ViT do: the layer is there for its number alone."""

    def __init__(self, drop):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.dropout = drop

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:-1], 2, 6).movedim(-2, -3).chunk(3, -1)
        rate = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).movedim(-3, -2).flatten(-2)


class Functional(nn.Module):
    """As BART does: a number of its own."""

    def __init__(self, rate):
        super().__init__()
        self.dropout = rate

    def forward(self, x):
        return F.dropout(x, p=self.dropout, training=self.training)


class OwnDropout(nn.Dropout):
    """Drops out the same units in the whole batch."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.empty_like(x[:1]).bernoulli_(1 - self.p) / (1 - self.p)


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.drop_prob = rate

    def forward(self, x):
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1).bernoulli_(keep) / keep if self.training else x


class OwnLSTM(nn.LSTM):
    pass


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 4, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.rnn(x.reshape(len(x), 2, 2).repeat(1, 1, 2))[0][:, -1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0.3, activation=F.gelu, batch_first=True
        )

    def forward(self, x):
        return self.layer(x[None])[0]


MIDDLES = {
    "read": lambda: nn.Sequential(Rows(), ReadsTheRate(nn.Dropout(0.3)), Unrows()),
    "subclass": lambda: OwnDropout(0.3),
    "alpha": lambda: nn.AlphaDropout(0.3),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.3),
    "in place": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3, inplace=True)),
    "rnn": lambda: Recurrent(nn.RNN),
    "own lstm": lambda: Recurrent(OwnLSTM),
    "attention": Attention,
    "encoder": Encoder,
    "functional": lambda: Functional(0.3),
    "path": lambda: DropPath(0.3),
}
NAMED = {"functional": ["net.2.dropout"], "path": ["net.2"]}


class Rows(nn.Module):
    def forward(self, x):
        return x[None]


class Unrows(nn.Module):
    def forward(self, x):
        return x[0]


class Net(DropoutMixin, pl.LightningModule):
    def __init__(self, middle, *, move=0.0, **options):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 4), nn.Tanh(), MIDDLES[middle](), nn.Tanh(), nn.Linear(4, 3)
            )
        self.double()
        self.register_dropout(**{"at": NAMED.get(middle), **options})
        self.keep.double().raw.add_(move)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


STEPS = 4


def _fit_loss(middle, move):
    model = Net(middle, move=move)
    torch.manual_seed(0)
    fit(model, steps=STEPS)
    with torch.no_grad():
        return model.eval().loss(VALID).item()


@pytest.fixture
def small_differences(monkeypatch):
    """Then no mask changes, and the truth is a smooth function."""
    monkeypatch.setattr("lightning_hpo.regularizers.tunable_dropout._DIFFERENCE_STEP", 1e-5)


@pytest.mark.parametrize("middle", MIDDLES)
def test_hypergradient(middle, small_differences):
    """Against central differences of whole fits, with the same random draws."""
    truth = (_fit_loss(middle, 1e-5) - _fit_loss(middle, -1e-5)) / 2e-5
    found = {}
    for name, estimator, derivatives in (
        ("forward", ClipR(float("inf")), "auto"),
        ("reverse", UnrollK(STEPS, "reverse"), "auto"),
        ("differences", ClipR(float("inf")), "finite_difference"),
    ):
        every = STEPS if name == "reverse" else 1
        callback = OnlineHPOCallback(
            estimator, optimizer=frozen, every_n_steps=every, derivatives=derivatives
        )
        torch.manual_seed(0)
        fit(Net(middle), callback, steps=STEPS)
        assert callback.history[-1].step == STEPS
        found[name] = callback.history[-1].hypergradients["keep"].item()
    assert abs(truth) > 1e-5
    assert found == pytest.approx(dict.fromkeys(found, truth), rel=1e-4)


@pytest.mark.parametrize("middle", MIDDLES)
def test_training_is_bit_identical(middle):
    plain, watched = Net(middle), Net(middle)
    torch.manual_seed(0)
    fit(plain, steps=STEPS)
    torch.manual_seed(0)
    fit(watched, OnlineHPOCallback(ClipR(1.0), optimizer=frozen), steps=STEPS)
    assert torch.equal(weights(plain), weights(watched))


def test_rates_are_numbers_that_follow_the_keep_probability():
    layer = TunableDropout(0.75, inplace=True)
    rnn = StackedRNN(nn.LSTM(2, 2, 2, dropout=0.25), keep_probability(0.75))
    model = Net("attention", init=0.75)
    attention = model.net[2].attention
    for read in (lambda: layer.p, lambda: rnn.dropout, lambda: attention.dropout):
        assert type(read()) is float
        assert read() == pytest.approx(0.25)
    model.keep.raw.zero_()
    layer.keep.raw.zero_()
    assert attention.dropout == layer.p == 0.5
    assert layer.inplace
    assert not TunableDropout(0.75).inplace
    x = torch.ones(8)
    assert layer(x) is x


def test_a_rate_is_read_from_a_device_once_per_value(monkeypatch):
    monkeypatch.setattr("lightning_hpo.regularizers.tunable_dropout.is_on_host", lambda t: False)
    layer = TunableDropout(0.75)
    calls = []
    layer.keep.register_forward_hook(lambda *_: calls.append(1))
    assert [layer.p, layer.p] == pytest.approx([0.25, 0.25])
    assert len(calls) == 1
    layer.keep.raw.zero_()  # an update of λ writes in place
    assert [layer.p, layer.p] == [0.5, 0.5]
    assert len(calls) == 2
    layer.keep.raw = torch.tensor(100.0)  # a replay exchanges the tensor
    assert layer.p < 0.01
    assert copy.deepcopy(layer).p == layer.p


@pytest.mark.parametrize("middle", ["subclass", "alpha", "own lstm", "attention", "path"])
def test_copies_and_pickles_follow_their_own(middle):
    model = Net(middle)
    state = model.state_dict()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == list(state)
        twin.keep.raw.fill_(1.5)
        torch.manual_seed(0)
        a = twin.net(VALID[0])
        twin.keep.raw.fill_(-1.5)
        torch.manual_seed(0)
        assert not torch.equal(a, twin.net(VALID[0]))
        twin.keep.raw.copy_(model.keep.raw)
        torch.manual_seed(0)
        a = twin.net(VALID[0])
        torch.manual_seed(0)
        assert torch.equal(a, model.net(VALID[0]))


def test_a_layer_stays_what_it_was():
    inner = OwnDropout(0.3)
    before = nn.Sequential(nn.Linear(2, 2), inner)

    class Holder(DropoutMixin):
        def __init__(self):
            super().__init__()
            self.net = before
            self.plain = [inner]
            self.register_dropout()

    model = Holder()
    assert model.plain[0] is model.net[1] is inner
    assert isinstance(inner, OwnDropout)
    assert type(inner).__name__ == "OwnDropout"
    assert inner.p == pytest.approx(0.3)


def _module(**children):
    class Holder(DropoutMixin):
        def __init__(self):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    return Holder()


def test_a_layer_in_two_places_is_replaced_in_both():
    shared = nn.Dropout(0.2)
    model = _module(a=nn.Sequential(shared), b=nn.Sequential(shared))
    model.register_dropout(tied=False)
    assert model.a[0] is model.b[0]
    assert isinstance(model.a[0], TunableDropout)
    assert list(named_hyperparameters(model)) == ["keep.a.0"]


@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_do_nothing_are_left_out(tied):
    model = _module(a=nn.Dropout(0.0), b=nn.Dropout(0.2), c=nn.LSTM(2, 2, 2))
    with pytest.warns(UserWarning, match=r"leaves out a, c with a rate of 0\. .* at=") as caught:
        model.register_dropout(tied=tied)
    assert len(caught) == 1
    assert type(model.a) is nn.Dropout
    assert list(named_hyperparameters(model)) == ["keep" if tied else "keep.b"]


def test_layers_that_do_nothing_are_tuned_where_that_is_said():
    model = _module(a=nn.Dropout(0.0), b=nn.Dropout(0.2))
    model.register_dropout(0.9, at=["a", "b"])
    assert model.a.p == model.b.p == pytest.approx(0.1)
    model = _module(a=nn.Dropout(0.0), b=nn.MultiheadAttention(2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.register_dropout(0.9)  # there is nothing else
    assert model.a.p == model.b.dropout == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("child", "name"),
    [
        (lambda: DropPath(0.1), "child"),
        (lambda: Functional(0.1), r"child\.dropout"),
        (lambda: torch.jit.script(nn.Dropout(0.1)), "child"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_dropout_of_other_kinds_is_named(child, name):
    model = _module(child=child(), b=nn.Dropout(0.2))
    with pytest.warns(UserWarning, match=rf"leaves out {name}, which may drop out too"):
        model.register_dropout()
    with pytest.raises(ValueError, match=rf"no nn\.Dropout.*it has {name}: .*at="):
        _module(child=child()).register_dropout()


def test_what_a_number_was_for_is_not_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = 0.2
            self.layer = nn.Dropout(self.dropout)

    model = _module(a=Block(), b=nn.LSTM(2, 2, dropout=0.2, num_layers=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.register_dropout()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ["a"]}, r"a have a rate of 0.*pass init="),
        ({"at": ["b.width"]}, r"no module 'b\.width'"),
        ({"at": ["b"]}, r"\['b'\] are no dropout layers.*\['a', 'c'\]"),
        ({"at": []}, r"at=\[\], expected at least one"),
    ],
)
def test_bad_names_are_refused(options, message):
    model = _module(a=nn.Dropout(0.0), b=nn.Linear(2, 2), c=nn.Dropout(0.2))
    with pytest.raises(ValueError, match=message):
        model.register_dropout(**options)


def test_a_number_that_is_never_read_is_refused():
    """Before the first step, as any other λ without an effect."""

    class Idle(Net):
        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.net[4](x), y)

    with pytest.raises(Exception, match=r"'keep' has no effect on the training"):
        fit(Idle("attention"), OnlineHPOCallback(T1T2()), steps=1)


@pytest.mark.parametrize("middle", ["read", "attention", "alpha"])
def test_compiled_code_sees_the_rate_move(middle):
    class Compiled(Net):
        def __init__(self):
            super().__init__(middle)
            self.run = torch.compile(self.net, backend="eager")

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.run(x), y)

    values = []
    for model in (Net(middle), Compiled()):
        callback = OnlineHPOCallback(ClipR(float("inf")), optimizer=_fast)
        torch.manual_seed(0)
        fit(model, callback, steps=STEPS)
        values.append([record.values["keep"] for record in callback.history])
    assert len(set(values[0])) == STEPS
    assert values[1] == pytest.approx(values[0], rel=1e-9)


def _fast(raw):
    return torch.optim.SGD(raw, lr=10.0)


class Watched(nn.LSTM):
    """Notes on which kernels it runs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = Recorder(kernels=[])

    def forward(self, *args):
        if self.training:
            self.seen.kernels.append(torch.backends.mkldnn.enabled)
        return super().forward(*args)


MIDDLES["watched"] = lambda: nn.Sequential(Recurrent(Watched), nn.Dropout(0.3))


@pytest.mark.parametrize(
    ("estimator", "is_exact"), [(T1T2(), False), (UnrollK(STEPS, "reverse"), True)]
)
def test_differences_over_rates_alone_run_on_the_training_s_kernels(estimator, is_exact):
    """Those of a recurrent layer with a second derivative take three times as long."""
    model = Net("watched", at=["net.2.1"])
    recorded = model.net[2][0].rnn.seen.kernels
    callback = OnlineHPOCallback(estimator, optimizer=frozen, every_n_steps=STEPS)
    torch.manual_seed(0)
    fit(model, callback, steps=STEPS)
    assert callback.history[-1].hypergradients["keep"] != 0
    assert all(recorded[-4:]) != is_exact
