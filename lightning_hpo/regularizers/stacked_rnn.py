"""Recurrent layers with tunable dropout between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_hpo.hyperparameters import Hyperparameter
from lightning_hpo.regularizers.tunable_dropout import TunableDropout


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
    attributes (``hidden_size``, ``num_layers`` …). Dropout on these connections alone, not from
    step to step: Zaremba et al. (2014).

    Args:
        rnn: The module to take apart. Its parameters are copied.
        keep: The keep probability between the layers: what :func:`keep_probability` returned.

    Raises:
        TypeError: If ``keep`` is neither a :class:`Hyperparameter` nor a number.
        ValueError: If it is no keep probability.

    Example:
        >>> from lightning_hpo.regularizers import StackedRNN
        >>> rnn = StackedRNN(nn.LSTM(4, 8, num_layers=2), keep_probability(0.75))
        >>> output, (h, c) = rnn(torch.randn(5, 1, 4))
        >>> output.shape
        torch.Size([5, 1, 8])
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
        return self.between.p

    def __getattr__(self, name: str) -> Any:
        """Finds ``weight_ih_l1`` and the like in the layer that has it."""
        own, _, index = name.partition("_l")
        number = index.partition("_")[0]
        if own.startswith(("weight_", "bias_")) and number.isdigit():
            layers = super().__getattr__("layers")
            if int(number) < len(layers):  # type: ignore[arg-type]
                return getattr(layers[int(number)], name.replace(f"_l{number}", "_l0"))  # type: ignore[index]
        return super().__getattr__(name)

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
