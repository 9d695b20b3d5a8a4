"""Which buffers are state that hypergradients follow, besides θ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hpo._tensors import filled, stacked_zeros
from lightning_hpo._trainer import one_batch_later
from lightning_hpo.derivatives import gradient, is_missing_derivative
from lightning_hpo.distributed import average_, gather
from lightning_hpo.objectives import Moment
from lightning_hpo.statistics import Place
from lightning_hpo.step.backends import fall_back
from lightning_hpo.step.space import Space
from lightning_hpo.step.training_map import TrainingMap


def find_buffers(
    training: TrainingMap,
    moment: Moment,
    validate: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    *,
    is_read_later: bool,
    known: Collection[str] = (),
) -> None:
    """Adds to the running statistics what else a step writes to buffers that a loss depends on.

    Besides those of L_V these are, where several steps are differentiated, buffers that later steps
    read: centres, banks of features, codebooks. Their tangents take as much memory as they
    themselves do, per scalar λ.

    Costs a forward pass where there are other buffers of floating point numbers, and a validation
    gradient where the step writes to any of them. For those that L_V does not depend on it costs
    four gradients of the training loss besides, and where that depends on them, two for each.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        validate: Takes the derivative of L_V with respect to buffers.
        is_read_later: Whether what a step writes is followed into later steps.
        known: Names of buffers that were followed before the training was resumed: this step may
            not be one of those that write to them.
    """
    objective, statistics = training.objective, training.statistics
    if training.sharded:
        return
    objective.unwritten = []
    before = {place: _shape_of(place) for place in objective.other_buffers()}
    known = {objective.name_of(place) for place in before}.intersection(known)
    after = objective.written_buffers(moment, training.theta)
    reshaped = [n for n, b in after.items() if before[objective.place_of(n)] != b.shape]
    for name in reshaped:
        del after[name]
    if is_read_later:
        written = {objective.place_of(name) for name in (*after, *reshaped, *known)}
        objective.unwritten = [p for p in before if p not in written and _may_be_state(p)]
        if reshaped:
            _warn_of_constants(reshaped, "training_step changes their shape")
    # All ranks must follow the same: they exchange what they follow.
    floating = [n for n, b in after.items() if b.is_floating_point()]
    names = sorted(set().union(known, *gather(floating)))
    places = [objective.place_of(name) for name in names]
    if not places:
        return
    found = validate([owner._buffers[name] for owner, name in places])  # type: ignore[misc]
    flags = _agreed([g is not None and bool(g.any()) for g in found], training)
    flags = [flag or name in known for name, flag in zip(names, flags, strict=True)]
    if is_read_later and not all(flags):
        flags = _read_in_training(training, moment, names, after, flags)
    statistics.follow(
        [*statistics.places, *(p for p, flag in zip(places, flags, strict=True) if flag)]
    )


def _shape_of(place: Place) -> torch.Size | None:
    owner, name = place
    buffer = owner._buffers[name]
    return None if buffer is None else buffer.shape


def _may_be_state(place: Place) -> bool:
    owner, name = place
    buffer = owner._buffers[name]
    return buffer is None or buffer.is_floating_point()


def _warn_of_constants(names: Sequence[str], reason: str) -> None:
    warnings.warn(
        f"OnlineHPOCallback takes the buffers {', '.join(map(repr, names[:4]))} as constants, "
        f"because {reason}. If losses depend on them, hypergradients miss how λ moves them; give "
        "them their shape in __init__, and write to them from the first step on",
        stacklevel=3,
    )


def follow_newly_written(
    training: TrainingMap,
    moment: Moment,
    validate: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    spaces: Sequence[Space],
) -> bool:
    """Follows buffers that a step writes to for the first time, if a loss depends on them.

    Called once a replay has shown them, with the tangents still where the step starts.

    Args:
        training: What all steps of the training share.
        moment: The micro-batch, at the present θ.
        validate: As for :func:`find_buffers`.
        spaces: Those of the estimators that follow statistics.

    Returns:
        Whether tangents have to be moved anew, with more statistics than before.
    """
    objective, statistics = training.objective, training.statistics
    names = [objective.name_of(place) for place in objective.newly_written]
    objective.newly_written = []
    known = statistics.places
    # The module may hold what the step has left already, in other objects than before.
    moment = replace(moment, state=None)
    find_buffers(training, moment, validate, is_read_later=True)
    new = statistics.places[len(known) :]
    if not new:
        return False
    warnings.warn(
        f"OnlineHPOCallback: from this step on training_step writes to the buffers "
        f"{', '.join(map(repr, names[:4]))}, which hypergradients follow from now on",
        stacklevel=2,
    )
    tangents = [each for space in spaces if space.replays for each in space.followed]
    # In the order that they would have, had they been found together: after a resumption they are.
    places, buffers = statistics.places, statistics.buffers()
    is_layer = [isinstance(owner, _NormBase) for owner, _ in places]
    labels = [
        "" if layer else objective.name_of(p) for layer, p in zip(is_layer, places, strict=True)
    ]
    order = sorted(range(len(places)), key=labels.__getitem__)
    statistics.follow(places[i] for i in order)
    for each in tangents:
        every = [*each.statistics, *stacked_zeros(buffers[len(known) :], each.count)]
        each.statistics = [every[i] for i in order]
    check_buffers(training, moment, spaces)
    return True


def warn_of_newly_written(training: TrainingMap) -> None:
    """Names buffers that steps have begun to write to, where nothing follows them."""
    objective = training.objective
    names = [objective.name_of(place) for place in objective.newly_written]
    objective.newly_written = []
    if names:
        _warn_of_constants(names, "training_step has begun to write to them after the first step")


def _agreed(found: Sequence[bool], training: TrainingMap) -> list[bool]:
    """Returns for each finding whether any rank has made it."""
    flags = torch.tensor(found, dtype=torch.float32, device=training.theta[0].device)
    average_([flags])
    return (flags > 0).tolist()


def _read_in_training(
    training: TrainingMap,
    moment: Moment,
    names: Sequence[str],
    after: Mapping[str, Tensor],
    flags: Sequence[bool],
) -> list[bool]:
    """Adds to the buffers that L_V depends on those by which θ reaches later steps.

    Found by values, since what is read or written under ``no_grad`` has no derivative for autograd:
    by what ∇θ L_T, and what the step writes, change with. It starts from what the step has left:
    what is done once, such as a first filling from the batch, is over then. What a step fills anew
    before it reads it, other steps may only read: the next one is looked at as well.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        names: Buffers that the step writes to.
        after: What the step has left, in these and others, by name.
        flags: Which of ``names`` L_V depends on.
    """
    progress = one_batch_later(moment.progress)
    later = replace(moment, batch_idx=moment.batch_idx + 1, progress=progress)
    at_next = _what_changes(training, later, names, after, flags)
    is_read = any(map(any, at_next))
    here = _what_changes(training, moment, names, after, flags, in_any_case=is_read)
    rows = [
        [any(pair) for pair in zip(*row, strict=True)] for row in zip(here, at_next, strict=True)
    ]
    (_, *moves), *reads = rows
    acts = [flag or row[0] for flag, row in zip(flags, reads, strict=True)]
    for _ in names:  # one may act by way of another
        for i, (_, *read) in enumerate(reads):
            acts[i] |= any(r and a for r, a in zip(read, acts, strict=True))
            if moves[i]:
                moves = [r or m for r, m in zip(read, moves, strict=True)]
    return [flag or (a and m) for flag, a, m in zip(flags, acts, moves, strict=True)]


def _what_changes(
    training: TrainingMap,
    moment: Moment,
    names: Sequence[str],
    after: Mapping[str, Tensor],
    flags: Sequence[bool],
    *,
    in_any_case: bool = False,
) -> list[list[bool]]:
    """Tells what ∇θ L_T and what a step leaves in some buffers change with.

    Returns:
        Whether the gradient and each buffer do: with θ and λ; with what each buffer held. Unless
        ``in_any_case``, all are False where those that L_V does not depend on reach neither the
        gradient nor the others.
    """
    objective, theta = training.objective, training.theta
    places = {name: objective.place_of(name) for name in {**after, **dict.fromkeys(names)}}
    buffers = {name: owner._buffers[own] for name, (owner, own) in places.items()}
    present = {name: b for name, b in buffers.items() if b is not None}
    generator = torch.Generator().manual_seed(0)

    def moved(value: Tensor, relative: float, least: float = 0.0) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return value.detach() + relative * noise * value.detach().abs().clamp(min=least)

    with (
        torch.enable_grad(),
        objective.evaluations(moment, [*theta, *present.values()], looks="check") as evaluate,
    ):

        def run(displaced: Iterable[str] = (), *, moves_theta: bool = False) -> list[list[Tensor]]:
            """Returns ∇θ L_T, and what each of the buffers holds after the step."""
            values, lam = list(theta), objective.leaves()
            if moves_theta:
                values = [moved(p, 0.01, 0.01).requires_grad_(p.requires_grad) for p in theta]
                lam = [moved(raw, 0.01, 0.01).requires_grad_() for raw in lam]
            held = [after.get(name, b).detach() for name, b in present.items()]
            held = [
                moved(b, 0.1, 0.01) if name in displaced else b.clone()
                for name, b in zip(present, held, strict=True)
            ]
            loss, _ = evaluate([*values, *held], lam)
            written = [places[name][0]._buffers[places[name][1]] for name in names]
            gradients = [] if loss is None else gradient(loss * objective.scale, values)
            return [
                filled(gradients, values) if gradients else [],
                *([] if b is None else [b.detach()] for b in written),
            ]

        base = run()
        usual: list[list[float]] = []

        def changes(now: list[list[Tensor]]) -> list[bool]:
            """Tells which parts differ by more than a repetition does."""
            found = _distances(now, base)
            if not usual and any(map(any, found)):
                usual.extend(_distances(run(), base))
            return [
                any(d != 0 and not d <= 10 * n for d, n in zip(part, noise, strict=True))
                for part, noise in zip(found, usual or found, strict=True)
            ]

        unread = [name for name, flag in zip(names, flags, strict=True) if not flag]
        of_gradient, *of_buffers = changes(run(unread))
        reached = of_gradient or any(c and f for c, f in zip(of_buffers, flags, strict=True))
        size = len(names) + 1
        if not (in_any_case or any(_agreed([reached], training))):
            return [[False] * size] * size
        found = [changes(run(moves_theta=True)), *(changes(run([name])) for name in names)]
    agreed = iter(_agreed([each for row in found for each in row], training))
    return [[next(agreed) for _ in range(size)] for _ in range(size)]


def _distances(now: list[list[Tensor]], base: list[list[Tensor]]) -> list[list[float]]:
    """Returns how far tensors are from others; infinitely, where their shape is another."""
    return [
        [
            float((a - b).norm()) if a.shape == b.shape else math.inf
            for a, b in zip(some, others, strict=True)
        ]
        if len(some) == len(others)
        else [math.inf] * len(others)
        for some, others in zip(now, base, strict=True)
    ]


def check_buffers(training: TrainingMap, moment: Moment, spaces: Sequence[Space]) -> None:
    """Looks for followed buffers that are written to without a graph, and says what comes of it.

    What a step computes under ``no_grad``, or from ``detach()`` and ``.data``, has no derivative
    for autograd, though θ moves it. The derivatives of all r' along one direction in θ are compared
    with central differences. Differences of whole steps follow it in tangents; ``"auto"`` takes
    them. Else such buffers are constants. Costs about three gradients and four forward passes.

    Args:
        training: What all steps of the training share.
        moment: A micro-batch, at the present θ.
        spaces: Those of the estimators, which have been set up.
    """
    statistics = training.statistics
    if not statistics or statistics.by_value or training.sharded:
        return
    flags = _agreed(_without_graph(training, moment), training)
    if not any(flags):
        return
    places = list(zip(statistics.places, flags, strict=True))
    names = [repr(training.objective.name_of(place)) for place, flag in places if flag]
    reason = (
        f"training_step writes to the buffers {', '.join(names[:4])} without a graph (under "
        "torch.no_grad(), by .detach() or .data)"
    )
    tangents = [each for space in spaces if space.replays for each in space.followed]
    if training.is_automatic and training.derivatives != "finite_difference" and tangents:
        training.derivatives = fall_back(f"{reason}, which other derivatives miss")
    if training.derivatives == "finite_difference":
        statistics.follow_by_value(reason)
        return
    statistics.follow(place for place, flag in places if not flag)
    for each in tangents:
        kept = zip(each.statistics, flags, strict=True)
        each.statistics = [t for t, flag in kept if not flag]
    warnings.warn(
        f"OnlineHPOCallback takes buffers that a loss depends on as constants, because {reason}. "
        "Hypergradients miss how λ moves them; derivatives='auto' or 'finite_difference' with "
        "ClipR or UnrollK(mode='forward') follows them",
        stacklevel=2,
    )


def _without_graph(training: TrainingMap, moment: Moment) -> list[bool]:
    """Tells for each statistic whether its derivative is not what autograd says."""
    objective, theta = training.objective, training.theta
    statistics = training.statistics.leaves(moment.state)
    generator = torch.Generator().manual_seed(0)
    resolution = max(torch.finfo(t.dtype).eps for t in (*theta, *statistics))
    step = max(resolution, objective.rounding or 0.0) ** (1 / 3)
    # Across the kinks of a deep network differences of float32 are far from a derivative. What has
    # no graph at all, as is usual, has a slope of exactly zero.
    tolerance = 0.05 if step < 1e-3 else 0.5
    directions = [
        p.detach() * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for p in theta
    ]
    weights = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in statistics
    ]
    with torch.enable_grad(), ExitStack() as stack:
        evaluate = stack.enter_context(
            objective.evaluations(moment, theta, exact=True, statistics=True, looks="check")
        )

        def moved(distance: float) -> list[Tensor]:
            values = [
                (p.detach() + distance * d).requires_grad_(p.requires_grad)
                for p, d in zip(theta, directions, strict=True)
            ]
            _, after = evaluate([*values, *statistics], objective.leaves())
            return [r.detach() for r in after]

        def differences(distance: float) -> list[float]:
            # Sums come last: what does not move has a difference of exactly zero.
            pairs = zip(weights, moved(distance), moved(-distance), strict=True)
            return [float((w * (a - b)).sum()) / (2 * distance) for w, a, b in pairs]

        # Deep in a network a difference is far from a derivative: two of them have to agree.
        truth = list(zip(differences(step), differences(step / 2), strict=True))
        _, after = evaluate([*theta, *statistics], objective.leaves())
        sizes = [float((w * r.detach()).norm()) for w, r in zip(weights, after, strict=True)]

        def is_wrong(
            owner: nn.Module, found: float, values: tuple[float, float], size: float
        ) -> bool:
            if found and isinstance(owner, _NormBase):
                return False  # layers of torch write with a graph, if they have one
            # A slow average moves by little more than its rounding, but by more than nothing.
            rounding: float = (10 if found else 1) * resolution * size / step
            far, near = values
            error = abs(found - far)
            is_resolved = abs(far - near) <= error / 2 + 2 * rounding
            return is_resolved and not error <= tolerance * max(abs(found), abs(far)) + rounding

        terms = [(w * r).sum() for w, r in zip(weights, after, strict=True)]
        active = [i for i, p in enumerate(theta) if p.requires_grad]
        found = _slopes(terms, [theta[i] for i in active], [directions[i] for i in active])
        owners = [owner for owner, _ in training.statistics.places]
        return [is_wrong(*each) for each in zip(owners, found, truth, sizes, strict=True)]


def _slopes(
    terms: Sequence[Tensor], theta: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[float]:
    """Returns the derivatives of numbers along one direction in θ, by autograd.

    They are parts of one derivative, with respect to factors of these numbers: that costs about
    three gradients, however many there are.
    """
    factors = torch.ones(len(terms), dtype=torch.float64, requires_grad=True)
    total = sum(f.to(t) * t for f, t in zip(factors, terms, strict=True) if t.requires_grad)
    if not isinstance(total, Tensor):
        return [0.0] * len(terms)

    def along(total: Tensor, *, create_graph: bool) -> Tensor | None:
        gradients = torch.autograd.grad(
            total, theta, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        parts = [(g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None]
        return torch.stack([part.cpu() for part in parts]).sum() if parts else None

    try:
        slope = along(total, create_graph=True)
        if slope is None or not slope.requires_grad:
            return [0.0] * len(terms)
        (found,) = torch.autograd.grad(slope, factors, retain_graph=True)
        result: list[float] = found.tolist()
        return result
    except RuntimeError as error:
        if not is_missing_derivative(error):
            raise
    slopes = [along(t, create_graph=False) if t.requires_grad else None for t in terms]
    return [0.0 if slope is None else float(slope) for slope in slopes]
