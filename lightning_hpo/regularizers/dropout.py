"""Turns the dropout of a module into tunable dropout."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_hpo._arguments import named_arguments
from lightning_hpo._repr import listed
from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.regularizers._mixin import RegularizerMixin
from lightning_hpo.regularizers._placement import (
    LR_HINTS,
    attach,
    check_free_name,
    find_modules,
)
from lightning_hpo.regularizers.live_rate import follow_keep_probability, is_following
from lightning_hpo.regularizers.stacked_rnn import StackedRNN
from lightning_hpo.regularizers.tunable_dropout import TunableDropout, keep_probability

# Their number of spatial dimensions.
_SPATIAL: dict[type[nn.Module], int] = {
    nn.Dropout: 0,
    nn.Dropout1d: 1,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
}

# Under what names modules of elsewhere keep their drop rate.
_RATES = ("p", "dropout", "drop_prob", "dropout_p", "drop_rate")


_KEEP = "init= is the keep probability, 1 − p: for a drop rate of p=0.2 pass init=0.8"
_HINTS = {
    "keep": "the keep probability, 1 − p, below 1, is given as init=, and its name as name=",
    **dict.fromkeys((*_RATES, "rate"), _KEEP),
    **LR_HINTS,
}


class DropoutMixin(RegularizerMixin):
    """Turns the dropout (Srivastava et al. 2014) of a module into tunable dropout.

    How a keep probability is differentiated is told at :class:`TunableDropout`.

    Example:
        >>> class Dropped(DropoutMixin, LitModel):
        ...     def __init__(self):
        ...         super().__init__()  # makes a network with nn.Dropout(0.3)
        ...         self.register_dropout()
        >>> Dropped().keep
        Hyperparameter(0.7, constraint=UnitInterval(margin=0.0001))
    """

    @named_arguments("register_dropout", _HINTS)
    def register_dropout(
        self,
        init: float | None = None,
        name: str = "keep",
        tied: bool = True,
        at: Sequence[str] | None = None,
    ) -> None:
        """Makes dropout layers tunable, in place. Call it after the network has been built.

        ``nn.Dropout``, ``nn.Dropout1d``, ``2d`` and ``3d`` are replaced, ``nn.LSTM`` and
        ``nn.GRU`` with dropout between their layers become stacks of single layers with the same
        weights (:class:`StackedRNN`; the names of their parameters change). The other modules of
        torch that drop out, and subclasses of all of them, stay what they are and read their rate
        from the keep probability: ``nn.AlphaDropout``, ``nn.FeatureAlphaDropout``, ``nn.RNN``,
        ``nn.MultiheadAttention`` (as in ``nn.TransformerEncoderLayer``).

        Layers with a rate of 0 are left out, as is what drops out under another class (paths,
        blocks), or by a number that a module passes to a function; a warning names them. ``at``
        tunes them all the same.

        Args:
            init: Initial *keep* probability, 1 − p of the layers found, in the scale of the value
                (not its logit). Default: theirs.
            name: The attribute under which the keep probabilities are registered, and the first
                part of their names.
            tied: Whether all layers share one keep probability, named ``name``. Otherwise there is
                one each, named ``name.<module>``.
            at: The dotted names of the modules, or of numbers that modules keep as attributes
                (``"encoder.layers.0.attention_dropout"``). Default: all modules of torch's kinds.

        Raises:
            TypeError: If ``init`` is not a number.
            ValueError: If there is nothing to tune, a named module does not exist (the closest
                names are listed) or is no dropout, ``name`` is taken, the keep probability is not
                between 0 and 1, or layers with different rates are to share one without ``init``.

        Example:
            >>> module = with_mixins(LitModel(), DropoutMixin)
            >>> module.register_dropout(init=0.9, at=["net.2"], tied=False)  # 1 − p: drops a tenth
            >>> list(named_hyperparameters(module))
            ['keep.net.2']
        """
        check_free_name("register_dropout", self, name)
        found = _named(self, at) if at is not None else _found(self, init is not None)
        keeps = {path: 1.0 - site.rate if init is None else init for path, site in found.items()}
        off = [path for path, keep in keeps.items() if keep == 1.0]
        if off and init is None:
            raise ValueError(
                f"register_dropout: {_some(off)} have a rate of 0, from which a keep probability "
                "cannot start; pass init=, a keep probability below 1"
            )
        all_off = [path for path, site in found.items() if init is None and site.rate >= 1]
        if all_off:
            raise ValueError(
                f"register_dropout: {_some(all_off)} have a rate of p=1, which drops everything: "
                "nothing passes through. p is the part that is dropped: give the layer one below "
                "1, for example nn.Dropout(0.2), or pass init=, the keep probability 1 − p to "
                "start with, such as 0.8"
            )
        if tied and len(set(keeps.values())) > 1:
            raise ValueError(
                f"register_dropout: the layers have different keep probabilities, {keeps}; pass "
                "init=, or tied=False for one each"
            )
        shared = keep_probability(next(iter(keeps.values()))) if tied else None
        made = {path: shared or keep_probability(keep) for path, keep in keeps.items()}
        for path, site in found.items():
            site.tune(self, made[path])
            if shared is None:
                attach(self, f"{name}.{path}", made[path])
        if shared is not None:
            attach(self, name, shared)


@dataclass
class _Site:
    """A place with dropout: a module, and the attribute that holds its rate."""

    module: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        return float(vars(self.module)[self.attribute])

    def tune(self, root: nn.Module, keep: Hyperparameter) -> None:
        """Puts a keep probability in the place of the rate."""
        module = self.module
        replacement: nn.Module
        if type(module) in _SPATIAL and self.attribute == "p":
            inplace = bool(module.inplace)
            replacement = TunableDropout(keep, _SPATIAL[type(module)], inplace)
        elif type(module) in (nn.LSTM, nn.GRU) and self.attribute == "dropout":
            replacement = StackedRNN(module, keep)  # type: ignore[arg-type]
        else:
            follow_keep_probability(module, self.attribute, keep)
            return
        replacement.train(module.training)
        places = [
            (parent, leaf)
            for parent in root.modules()
            for leaf, child in parent._modules.items()
            if child is module
        ]
        for parent, leaf in places:
            setattr(parent, leaf, replacement)


def _number(module: nn.Module, attribute: str) -> float | None:
    """Returns a number that a module keeps as a plain attribute."""
    value = vars(module).get(attribute)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _torch_site(module: nn.Module) -> _Site | None:
    """Returns the dropout of a module of torch's kinds, which may do nothing now."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    attribute = ""
    if isinstance(module, _DropoutNd):
        attribute = "p"
    elif isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, nn.RNNBase) and module.num_layers > 1
    ):
        attribute = "dropout"
    return None if _number(module, attribute) is None else _Site(module, attribute)


def _found(root: nn.Module, has_init: bool) -> dict[str, _Site]:
    """Finds what is tuned when nothing is named, and warns of what else drops out."""
    sites = {path: s for path, m in root.named_modules() if (s := _torch_site(m)) is not None}
    acting = {path: s for path, s in sites.items() if s.rate > 0}
    others = _other_dropout(root)
    if not acting and not (sites and has_init):
        if sites:
            raise ValueError(
                f"register_dropout: the dropout of {type(root).__name__} ({_some([*sites])}) "
                "has a rate of 0, from which it does not move. Pass init=, the keep probability "
                "to start with, or give the layers a rate"
            )
        rest = _some(others)
        hint = f"; it has {rest}: to tune these, name them in at=" if rest else ""
        raise ValueError(
            f"register_dropout: {type(root).__name__} has no nn.Dropout, and no nn.LSTM, nn.GRU or "
            "nn.MultiheadAttention with dropout; call it after the network has been built" + hint
        )
    off = [path for path in sites if path not in acting] if acting else []
    parts = []
    if off:
        parts.append(f"{_some(off)} with a rate of 0")
    if others:
        parts.append(f"{_some(others)}, which may drop out too")
    if parts:
        warnings.warn(
            f"register_dropout leaves out {'; and '.join(parts)}. To tune them, name them in at=",
            stacklevel=3,
        )
    return acting or sites


def _other_dropout(root: nn.Module) -> list[str]:
    """Lists what looks like dropout of another kind than those of torch."""
    listed = []
    for path, module in root.named_modules():
        kind = getattr(module, "original_name", type(module).__name__)
        known = isinstance(module, (TunableDropout, StackedRNN)) or is_following(module)
        if known or _torch_site(module) is not None or isinstance(module, nn.RNNBase):
            continue
        if not path or any(_drops_out(m) for m in module.modules() if m is not module):
            continue  # its numbers have served to build these
        if "drop" in kind.lower():
            if isinstance(module, torch.jit.ScriptModule) or any(
                _number(module, n) for n in _RATES
            ):
                listed.append(path)
        else:
            listed += [
                f"{path}.{n}"
                for n, value in vars(module).items()
                if "drop" in n.lower() and 0 < (_number(module, n) or 0) < 1
            ]
    return listed


def _drops_out(module: nn.Module) -> bool:
    return isinstance(module, (TunableDropout, StackedRNN)) or _torch_site(module) is not None


def _named(root: nn.Module, at: Sequence[str]) -> dict[str, _Site]:
    """Looks up what ``at`` names.

    Raises:
        ValueError: If something does not exist, or holds no rate.
    """
    found: dict[str, _Site] = {}
    modules = dict(root.named_modules(remove_duplicate=False))
    wrong = []
    for path in at:
        parent, _, leaf = path.rpartition(".")
        if path not in modules and parent in modules and _number(modules[parent], leaf) is not None:
            found[path] = _Site(modules[parent], leaf)
            continue
        (module,) = find_modules("register_dropout", root, [path])
        site = _torch_site(module)
        names = [n for n in _RATES if _number(module, n) is not None]
        if site is None and "drop" in type(module).__name__.lower() and len(names) == 1:
            site = _Site(module, names[0])
        if site is None:
            wrong.append(path)
        else:
            found[path] = site
    if wrong:
        known = [path for path, m in root.named_modules() if _torch_site(m) is not None]
        raise ValueError(
            f"register_dropout: {wrong} are no dropout layers; {type(root).__name__} has "
            f"{known or 'none'}"
        )
    if not found:
        raise ValueError(f"register_dropout: at={list(at)}, expected at least one name")
    return found


_some = partial(listed, most=4)
