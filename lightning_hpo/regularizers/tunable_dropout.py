"""The dropout layer with a tunable keep probability."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_hpo._arguments import named_arguments
from lightning_hpo._tensors import is_on_host
from lightning_hpo.hyperparameters import Hyperparameter, UnitInterval

# In logits. The variance with common draws falls as 1/ε and the bias grows as ε²; independent masks
# have about 1/ε times that variance.
_DIFFERENCE_STEP = 0.05
# Drop rates of 0.1 to 0.5 are in use.
_TYPICAL_KEEP = 0.8


def keep_probability(init: float) -> Hyperparameter:
    """Makes a keep probability: a logit, whose derivative is taken by differences.

    Args:
        init: Initial keep probability (1 − drop rate), strictly between 0 and 1.

    Raises:
        TypeError: If ``init`` is not a number.
        ValueError: If ``init`` is not within the margins of :class:`UnitInterval`, as 0 and 1.

    Example:
        >>> keep = keep_probability(0.75)  # one λ, two layers
        >>> net = nn.Sequential(TunableDropout(keep), nn.Linear(4, 3), TunableDropout(keep))
        >>> len(named_hyperparameters(net))
        1
    """
    bounds = UnitInterval()
    is_number = isinstance(init, (int, float)) and not isinstance(init, bool)
    if is_number and not bounds.margin <= init <= 1 - bounds.margin:
        raise ValueError(
            f"The keep probability is {init!r}, expected a number from {bounds.margin:g} to "
            f"{1 - bounds.margin:g}. It is 1 − p: for a drop rate of p = 0.2 pass 0.8. Where it "
            "is 1, which drops nothing, or 0 its derivative vanishes, so start inside: 0.95, say"
        )
    return Hyperparameter(init, bounds, difference_step=_DIFFERENCE_STEP, typical=_TYPICAL_KEEP)


def drop_rate(keep: Hyperparameter) -> float:
    """Returns 1 − λ as a number, for code that wants no tensor.

    No derivative passes through it, and none is needed: differences over λ see the number move.
    On a device it is read once for each value of λ, and once in each replay.
    """
    raw = keep.raw
    if is_on_host(raw) or torch.compiler.is_compiling():
        return 1.0 - float(keep().detach())
    known = vars(keep).get("_number")
    if known is None or known[0] is not raw or known[1] != raw._version:
        known = (raw, raw._version, 1.0 - float(keep().detach()))
        vars(keep)["_number"] = known
    rate: float = known[2]
    return rate


class TunableDropout(nn.Module):
    r"""Keeps each unit with probability λ and scales it by 1/λ, in training only.

        y = x · 1[u < λ] / λ,   u ~ U(0, 1)

    Source: Srivastava et al. (2014); the scale is that of ``nn.Dropout``.

    One u is drawn per unit whatever λ is, so the masks at λ + ε and λ − ε are coupled as in
    eq. 10 of the online-HPO paper (§3.5.2): they differ only where u lies between the two. The
    derivative with respect to λ is the central difference over λ with common u.

    Code that reads ``p`` and drops out by itself, as attention does, is followed likewise.

    Args:
        keep: The keep probability: its initial value (not its logit), or what
            :func:`keep_probability` returned, to share it between layers.
        spatial: 0 drops units; 1, 2 and 3 drop channels as ``nn.Dropout1d``, ``2d`` and ``3d`` do,
            for inputs with and without a batch dimension.
        inplace: Whether the input is overwritten.

    Raises:
        TypeError: If ``keep`` is neither a number nor a :class:`Hyperparameter`.
        ValueError: If the keep probability is not between 0 and 1, or is a
            :class:`Hyperparameter` of another kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), TunableDropout(0.75), nn.Linear(16, 3))
        >>> net[1].keep
        Hyperparameter(0.75, constraint=UnitInterval(margin=0.0001))
    """

    @named_arguments(
        "TunableDropout", {"p": "pass the keep probability, 1 − p: for p=0.2, keep=0.8"}
    )
    def __init__(
        self, keep: float | Hyperparameter, spatial: int = 0, inplace: bool = False
    ) -> None:
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
        self.inplace = inplace

    @property
    def p(self) -> float:
        """The drop rate 1 − λ, as a number.

        Example:
            >>> net[1].p = 0.5  # moves λ to 1 − p
            >>> net[1].p
            0.5
        """
        return drop_rate(self.keep)

    @p.setter
    def p(self, rate: float) -> None:
        """Moves λ; that of all layers which share it."""
        with torch.no_grad():
            value = torch.as_tensor(1.0 - rate).to(self.keep.raw)
            self.keep.raw.copy_(self.keep.constraint.inverse(value))

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the shape of ``x``; ``x`` itself in evaluation mode.

        Args:
            x: Floating-point numbers, units or channels as ``spatial`` says.
        """
        if not self.training:
            return x
        keep: Tensor = self.keep().to(x.dtype)
        mask = torch.rand(self._mask_shape(x), dtype=x.dtype, device=x.device) < keep.detach()
        scale = mask / keep
        return x.mul_(scale) if self.inplace else x * scale

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """Returns one entry per unit, or per example and channel."""
        if self.spatial == 0:
            return tuple(x.shape)
        # nn.Dropout2d takes three dimensions for (N, C, L); the others allow for a missing batch.
        unbatched = self.spatial != 2 and x.dim() == self.spatial + 1
        leading = 1 if unbatched else 2
        return (*x.shape[:leading], *[1] * (x.dim() - leading))
