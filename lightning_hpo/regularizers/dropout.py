"""Dropout with a tunable keep probability."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_hpo.hyperparameters import Hyperparameter, UnitInterval
from lightning_hpo.regularizers._mixin import RegularizerMixin
from lightning_hpo.regularizers._placement import attach, check_free_name, find_modules

# In logits. The variance with common draws falls as 1/ε and the bias grows as ε²; independent masks
# have about 1/ε times that variance.
_DIFFERENCE_STEP = 0.05

# Their number of spatial dimensions.
_KINDS: dict[type[nn.Module], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
}


def keep_probability(init: float) -> Hyperparameter:
    """Makes a keep probability: a logit, whose derivative is taken by differences.

    Args:
        init: Initial keep probability (1 − drop rate), strictly between 0 and 1.

    Raises:
        ValueError: If ``init`` is not within the margins of :class:`UnitInterval`.
    """
    return Hyperparameter(init, UnitInterval(), difference_step=_DIFFERENCE_STEP)


class TunableDropout(nn.Module):
    r"""Keeps each unit with probability λ and scales it by 1/λ, in training only.

        y = x · 1[u < λ] / λ,   u ~ U(0, 1)

    One u is drawn per unit whatever λ is, so the masks at λ + ε and λ − ε are coupled as in
    eq. 10 of the online-HPO paper (§3.5.2): they differ only where u lies between the two. The
    derivative with respect to λ is the central difference over λ with common u.

    Args:
        keep: The keep probability: its initial value, or what :func:`keep_probability` returned, to
            share it between layers.
        spatial: 0 drops units; 1, 2 and 3 drop channels as ``nn.Dropout1d``, ``2d`` and ``3d`` do,
            for inputs with and without a batch dimension.

    Raises:
        ValueError: If the keep probability is not between 0 and 1, or is a
            :class:`Hyperparameter` of another kind.
    """

    def __init__(self, keep: float | Hyperparameter, spatial: int = 0) -> None:
        super().__init__()
        if not isinstance(keep, Hyperparameter):
            keep = keep_probability(keep)
        elif not isinstance(keep.constraint, UnitInterval) or keep.difference_step is None:
            raise ValueError(
                f"TunableDropout: keep={keep}, expected a number, or what keep_probability(0.5) "
                "returns: the derivative with respect to it must be taken by differences"
            )
        self.keep = keep
        self.spatial = spatial

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the shape of ``x``; ``x`` itself in evaluation mode."""
        if not self.training:
            return x
        keep: Tensor = self.keep().to(x.dtype)
        mask = torch.rand(self._mask_shape(x), dtype=x.dtype, device=x.device) < keep.detach()
        scaled: Tensor = x * (mask / keep)
        return scaled

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """Returns one entry per unit, or per example and channel."""
        if self.spatial == 0:
            return tuple(x.shape)
        # nn.Dropout2d takes three dimensions for (N, C, L); the others allow for a missing batch.
        unbatched = self.spatial != 2 and x.dim() == self.spatial + 1
        leading = 1 if unbatched else 2
        return (*x.shape[:leading], *[1] * (x.dim() - leading))


class DropoutMixin(RegularizerMixin):
    """Turns the dropout of a module into tunable dropout.

    Example::

        self.net = make_net()          # with nn.Dropout in it
        self.register_dropout()
    """

    def register_dropout(
        self,
        init: float | None = None,
        name: str = "keep",
        tied: bool = True,
        at: Sequence[str] | None = None,
    ) -> None:
        """Replaces dropout layers in place. Call it after the network has been built.

        Replaced are ``nn.Dropout``, ``nn.Dropout1d``, ``2d``, ``3d``, and ``nn.LSTM`` and
        ``nn.GRU`` with dropout between their layers, which become stacks of single layers with the
        same weights (:class:`StackedRNN`; the names of their parameters change).

        Args:
            init: Initial *keep* probability, 1 − p of the layers replaced. Default: theirs.
            name: The attribute under which the keep probabilities are registered, and the first
                part of their names.
            tied: Whether all layers share one keep probability, named ``name``. Otherwise there is
                one each, named ``name.<module>``.
            at: The dotted names of the layers to replace. Default: all.

        Raises:
            ValueError: If there is nothing to replace, a named module does not exist (the closest
                names are listed) or is no dropout, ``name`` is taken, the keep probability is not
                between 0 and 1, or layers with different rates are to share one without ``init``.
        """
        check_free_name("register_dropout", self, name)
        found = {path: m for path, m in self.named_modules() if _rate(m) is not None}
        if at is not None:
            find_modules("register_dropout", self, at)
            wrong = [path for path in at if path not in found]
            if wrong:
                raise ValueError(
                    f"register_dropout: {wrong} are no dropout layers; {type(self).__name__} has "
                    f"{list(found) or 'none'}"
                )
            found = {path: found[path] for path in at}
        if not found:
            raise ValueError(
                f"register_dropout: {type(self).__name__} has no nn.Dropout, and no nn.LSTM or "
                "nn.GRU with dropout between its layers; call it after the network has been built"
            )
        keeps = {
            path: 1.0 - (_rate(m) or 0.0) if init is None else init for path, m in found.items()
        }
        if tied and len(set(keeps.values())) > 1:
            raise ValueError(
                f"register_dropout: the layers have different keep probabilities, {keeps}; pass "
                "init=, or tied=False for one each"
            )
        shared = keep_probability(next(iter(keeps.values()))) if tied else None
        made = {path: shared or keep_probability(keep) for path, keep in keeps.items()}
        for path, module in found.items():
            replacement = _replacement(module, made[path]).train(module.training)
            parent, _, leaf = path.rpartition(".")
            setattr(self.get_submodule(parent), leaf, replacement)
            if shared is None:
                attach(self, f"{name}.{path}", made[path])
        if shared is not None:
            attach(self, name, shared)


def _rate(module: nn.Module) -> float | None:
    """Returns the drop rate of a module that can be replaced, else None."""
    if type(module) in _KINDS:
        return float(module.p)  # type: ignore[arg-type]
    if type(module) in (nn.LSTM, nn.GRU) and module.num_layers > 1 and module.dropout > 0:  # type: ignore[operator]
        return float(module.dropout)  # type: ignore[arg-type]
    return None


def _replacement(module: nn.Module, keep: Hyperparameter) -> nn.Module:
    if isinstance(module, (nn.LSTM, nn.GRU)):
        return StackedRNN(module, keep)
    return TunableDropout(keep, _KINDS[type(module)])


def _rows(
    hx: Tensor | tuple[Tensor, Tensor] | None, rows: slice
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Picks one layer's part of the states of all layers."""
    if hx is None or isinstance(hx, Tensor):
        return None if hx is None else hx[rows]
    return hx[0][rows], hx[1][rows]


_RNN_ATTRIBUTES = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "bidirectional",
    "proj_size",
)


class StackedRNN(nn.Module):
    """An ``nn.LSTM`` or ``nn.GRU`` as single layers with tunable dropout in between.

    Called, and returning, as the module that it replaces, PackedSequence included; it has the same
    attributes (``hidden_size``, ``num_layers`` …).

    Args:
        rnn: The module to take apart. Its parameters are copied.
        keep: The keep probability between the layers.
    """

    def __init__(self, rnn: nn.LSTM | nn.GRU, keep: Hyperparameter) -> None:
        super().__init__()
        for name in _RNN_ATTRIBUTES:
            setattr(self, name, getattr(rnn, name))
        self.directions = 2 if rnn.bidirectional else 1
        width = (rnn.proj_size or rnn.hidden_size) * self.directions
        own = rnn.state_dict()
        layers = []
        for k in range(rnn.num_layers):
            options = {
                "bias": rnn.bias,
                "batch_first": rnn.batch_first,
                "bidirectional": rnn.bidirectional,
                **({"proj_size": rnn.proj_size} if isinstance(rnn, nn.LSTM) else {}),
            }
            layer = type(rnn)(rnn.input_size if k == 0 else width, rnn.hidden_size, **options)
            layer.load_state_dict(
                {name: own[name.replace("_l0", f"_l{k}")] for name in layer.state_dict()}
            )
            layer = layer.to(own["weight_ih_l0"])
            for name, parameter in layer.named_parameters():
                trained = getattr(rnn, name.replace("_l0", f"_l{k}")).requires_grad
                parameter.requires_grad_(trained)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        self.between = TunableDropout(keep)

    @property
    def dropout(self) -> float:
        """The drop rate between the layers."""
        return 1.0 - float(self.between.keep())

    def flatten_parameters(self) -> None:
        """Lays out the weights of each layer as cuDNN wants them."""
        for layer in self.layers:
            layer.flatten_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
        """Returns the last layer's output and the final states of all layers."""
        finals = []
        for k, layer in enumerate(self.layers):
            if k > 0:
                x = (
                    x._replace(data=self.between(x.data))
                    if isinstance(x, PackedSequence)
                    else self.between(x)
                )
            rows = slice(k * self.directions, (k + 1) * self.directions)
            x, final = layer(x, _rows(hx, rows))
            finals.append(final)
        if isinstance(finals[0], Tensor):
            return x, torch.cat(finals)
        return x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
