"""Optimizers as other packages write them: state in all places, .data, wrappers, closures."""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim


class Rule(optim.Optimizer):
    """Calls ``update(group, p, g)`` for each parameter."""

    def __init__(self, parameters: Any, lr: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, p.grad)
        return loss

    def before(self) -> None:
        pass

    def update(self, group: dict[str, Any], p: Tensor, g: Tensor) -> None:
        raise NotImplementedError


# ----------------------------------------------------------------------------- state in containers


class Lists(Rule):
    """A preconditioner per parameter in a list, as SOAP keeps them."""

    def update(self, group, p, g):
        state = self.state[p]
        if not state:
            state["GG"] = [torch.ones_like(p)]
        state["GG"][0].mul_(0.9).add_(g**2)
        p.sub_(group["lr"] * g / state["GG"][0].sqrt())


class Nested(Rule):
    """Tuples in dicts in lists; tensors are replaced, not written to."""

    def update(self, group, p, g):
        state = self.state[p]
        if not state:
            state["of"] = [{"pair": (torch.zeros_like(p), torch.ones_like(p))}]
        mean, square = state["of"][0]["pair"]
        mean, square = 0.8 * mean + 0.2 * g, 0.9 * square + g * g
        state["of"] = [{"pair": (mean, square)}]
        p.sub_(group["lr"] * mean / square.sqrt())


class Kept:
    """As a preconditioner object of Shampoo."""

    def __init__(self, p):
        self.statistics = [torch.ones_like(p)]


class Objects(Rule):
    """State in objects of a class of its own, which count, too."""

    def update(self, group, p, g):
        state = self.state[p]
        if not state:
            state["kept"] = Kept(p)
            state["counts"] = [0]
        state["counts"][0] += 1
        (square,) = state["kept"].statistics
        square.mul_(0.9).add_(g * g)
        p.sub_(group["lr"] / state["counts"][0] ** 0.5 * g / square.sqrt())


class OnGroups(Rule):
    """The norm of the gradients of a group, averaged in a tensor of the group."""

    def before(self):
        for group in self.param_groups:
            total = sum(p.grad.square().sum() for p in group["params"])
            group.setdefault("norm", torch.ones((), dtype=total.dtype))
            group["norm"].mul_(0.5).add_(total)

    def update(self, group, p, g):
        p.sub_(group["lr"] * g / group["norm"].sqrt())


class Buffers(Rule):
    """Momentum in a list, which is an attribute."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        own = [p for group in self.param_groups for p in group["params"]]
        self.buffers = {p: torch.zeros_like(p) for p in own}
        self.names = {p: f"parameter {i}" for i, p in enumerate(own)}

    def update(self, group, p, g):
        assert self.names[p].startswith("parameter")
        self.buffers[p].mul_(0.9).add_(g)
        p.add_(self.buffers[p], alpha=-group["lr"])


# ------------------------------------------------------------------------------------ other habits


class DataDecay(Rule):
    """Decoupled weight decay through ``.data``."""

    def update(self, group, p, g):
        p.data.mul_(1 - group["lr"] * 0.5)
        p.data.add_(g.data, alpha=-group["lr"])


class DataSet(Rule):
    """Gives ``.data`` a new tensor."""

    def update(self, group, p, g):
        mean = self.state[p].setdefault("mean", torch.zeros_like(p.data))
        mean.data = 0.9 * mean + g
        p.data = p.data - group["lr"] * (mean + 0.3 * p.data)


class CountsInState(Rule):
    """A count that belongs to no parameter: ``self.state["k"]``."""

    def before(self):
        self.state["k"] = self.state.get("k", 0) + 1

    def update(self, group, p, g):
        p.sub_(group["lr"] * g / self.state["k"] ** 2)


class CountsInAttribute(Rule):
    """A count in an attribute, and one in a list."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.k, self.ks = 0, [0]

    def before(self):
        self.k += 1
        self.ks[0] += 1

    def update(self, group, p, g):
        p.sub_(group["lr"] * g / (self.k * self.ks[0]))


class Noisy(Rule):
    """Draws random numbers in its step, by which the gradient is multiplied."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        torch.manual_seed(5)

    def update(self, group, p, g):
        p.sub_(group["lr"] * g * (1 + 0.3 * torch.randn_like(g)))


class Madgrad(Rule):
    """Defazio and Jelassi (2021), Algorithm 1, as its authors write it: a count in the state."""

    def before(self):
        if "k" not in self.state:
            self.state["k"] = torch.tensor([0], dtype=torch.long)
        self.count = self.state["k"].item()
        self.state["k"] += 1

    def update(self, group, p, g):
        state = self.state[p]
        lamb = group["lr"] * (self.count + 1) ** 0.5
        if not state:
            state["grad_sum_sq"] = torch.zeros_like(p.data).detach()
            state["s"] = torch.zeros_like(p.data).detach()
            state["x0"] = torch.clone(p.data).detach()
        state["grad_sum_sq"].addcmul_(g.data, g.data, value=lamb)
        rms = state["grad_sum_sq"].pow(1 / 3).add_(1e-6)
        state["s"].data.add_(g.data, alpha=lamb)
        z = state["x0"].addcdiv(state["s"], rms, value=-1)
        p.data.mul_(0.9).add_(z, alpha=0.1)


class Lamb(Rule):
    """You et al. (2020): ratios of norms."""

    def update(self, group, p, g):
        state = self.state[p]
        if not state:
            state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        state["m"].mul_(0.9).add_(g, alpha=0.1)
        state["v"].mul_(0.99).addcmul_(g, g, value=0.01)
        update = state["m"] / (1 - 0.9 ** state["step"])
        update = update / ((state["v"] / (1 - 0.99 ** state["step"])).sqrt() + 1e-6) + 0.1 * p
        p_norm, norm = p.norm(), update.norm()
        one = torch.ones_like(p_norm)
        ratio = torch.where(p_norm > 0, torch.where(norm > 0, p_norm / norm, one), one)
        p.add_(update * ratio, alpha=-group["lr"])


class Foreach(Rule):
    """Works on lists of tensors."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            ps = [p for p in group["params"] if p.grad is not None]
            gs = [p.grad for p in ps]
            for p in ps:
                if not self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
            ms = [self.state[p]["m"] for p in ps]
            torch._foreach_mul_(ms, 0.9)
            torch._foreach_add_(ms, gs)
            torch._foreach_mul_(ps, 1 - group["lr"] * 0.1)
            torch._foreach_add_(ps, ms, alpha=-group["lr"])
        return loss


# From the first Adam on, its ``step`` calls the hooks of whatever optimizer runs it.
optim.Adam([torch.zeros(1, requires_grad=True)])


class ThroughSuper(optim.Adam):
    """Changes the gradient, then steps as Adam does: in a second ``no_grad``, past two hooks."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sub_(p.grad.mean(), alpha=0.5)
        super().step()
        return loss


class Lookahead(optim.Optimizer):
    """Zhang et al. (2019): no constructor of torch, nor the hooks that it makes."""

    def __init__(self, parameters, lr=0.05, every=3):
        self.base = optim.SGD(parameters, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups
        self.defaults = self.base.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["lookahead_step"], group["every"] = 0, every

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def update_slow(self, group):
        for p in group["params"]:
            state = self.base.state[p]
            if "slow" not in state:
                state["slow"] = torch.empty_like(p)
                state["slow"].copy_(p)
            state["slow"].add_(p - state["slow"], alpha=0.5)
            p.copy_(state["slow"])

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["every"] == 0:
                self.update_slow(group)
        return loss


class LookaheadOfState(optim.Optimizer):
    """Another way to write it: shares the state, keeps slow weights and a count as attributes."""

    def __init__(self, parameters, lr=0.05):
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.optimizer = optim.RMSprop(parameters, lr=lr)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.defaults = self.optimizer.defaults
        self.slow = [[deepcopy(p.data) for p in g["params"]] for g in self.param_groups]
        self.count = 0

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for group, slows in zip(self.param_groups, self.slow, strict=True):
                for p, q in zip(group["params"], slows, strict=True):
                    q.data.add_(p.data - q.data, alpha=0.5)
                    p.data.copy_(q.data)
        return loss


class RequiredClosure(Rule):
    """Insists on a closure, and evaluates it once."""

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
        return loss


# ------------------------------------------------------------------------- what cannot be followed


class Sam(Rule):
    """Foret et al. (2021): a second gradient at another place, where there is a closure."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            closure = torch.enable_grad()(closure)
            loss = closure()
            moved = []
            for group in self.param_groups:
                for p in group["params"]:
                    moved.append(0.05 * p.grad / (p.grad.norm() + 1e-12))
                    p.add_(moved[-1])
            closure()
            for p, e in zip(
                [p for g in self.param_groups for p in g["params"]], moved, strict=True
            ):
                p.sub_(e)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        return loss


class Early(Rule):
    """Moves the parameters to where it wants the gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        return super().step(closure)

    def update(self, group, p, g):
        p.sub_(group["lr"] * g)


class Polyak(Rule):
    """A step whose length is the loss."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * loss * p.grad)
        return loss


class DAdaptAdam(Rule):
    """Defazio and Mishchenko (2023), Algorithm 5: the distance d is a Python number."""

    def __init__(self, parameters, lr=1.0, d0=1e-2):
        super().__init__(parameters, lr=lr, d=d0, numerator=0.0, k=0)

    def before(self):
        group = self.param_groups[0]
        numerator, norm = 0.0, 0.0
        root = 0.99**0.5
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["s"], state["m"], state["v"] = (torch.zeros_like(p) for _ in range(3))
            dlr = group["d"] * group["lr"]
            denominator = state["v"].sqrt().add_(1e-8)
            numerator += (
                dlr * torch.dot(p.grad.flatten(), state["s"].div(denominator).flatten()).item()
            )
            state["m"].mul_(0.9).add_(p.grad, alpha=dlr * 0.1)
            state["v"].mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            state["s"].mul_(root).add_(p.grad, alpha=dlr * (1 - root))
            norm += state["s"].abs().sum().item()
        group["numerator"] = root * group["numerator"] + (1 - root) * numerator
        group["d"] = max(group["d"], group["numerator"] / ((1 - root) * norm))
        group["k"] += 1

    def update(self, group, p, g):
        state = self.state[p]
        p.addcdiv_(state["m"], state["v"].sqrt().add_(1e-8), value=-1)


class ByItem(Rule):
    """Reads a norm as a number."""

    def update(self, group, p, g):
        p.sub_(group["lr"] * g / (1 + g.norm().item()))


class ReadsTheParameters(Rule):
    """The dependence on θ passes through a number, which a second step shows."""

    def update(self, group, p, g):
        p.sub_(group["lr"] * g * (1 + float(p.sum())))


class LaterByItem(Rule):
    """Follows at first, and reads a number from the fifth step on."""

    def update(self, group, p, g):
        state = self.state[p]
        state["k"] = state.get("k", 0) + 1
        limit = min(1.0, 0.01 / g.norm().item()) if state["k"] >= 5 else 1.0
        p.sub_(group["lr"] * g * limit)


ELSEWHERE = [0]


class CountsElsewhere(Rule):
    """A count outside of the optimizer."""

    def before(self):
        ELSEWHERE[0] += 1

    def update(self, group, p, g):
        p.sub_(group["lr"] * g / ELSEWHERE[0])


# -------------------------------------------------------------------------- counts of other kinds


class Counting(Rule):
    """Takes smaller steps from the fifth on; trials would bring that forward."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr)
        self.counter = self.start()

    def update(self, group, p, g):
        p.sub_(group["lr"] * (1.0 if self.taken < 5 else 0.2) * g)


class CountsInArray(Counting):
    def start(self):
        return np.zeros(1)

    def before(self):
        self.counter += 1
        self.taken = int(self.counter[0])


class CountsInIterator(Counting):
    def start(self):
        return itertools.count(1)

    def before(self):
        self.taken = next(self.counter)


# ------------------------------------------------------------------- counts before the closure


class WarmsUp(optim.SGD):
    """Sets its learning rate before it calls its closure, from a count in an attribute."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr, momentum=0.9)
        self.t = 0

    def step(self, closure=None):
        self.t += 1
        for group in self.param_groups:
            group["lr"] = 0.05 * min(1, self.t / 5)
        return super().step(closure)


class Noam(optim.Adam):
    """Counts in a group, in a tensor and in an iterator of a list."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr, eps=1e-4)
        self.t, self.ks = torch.zeros(()), [itertools.count(1)]

    def step(self, closure=None):
        self.t += 1
        count = self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        assert count == self.t
        for group in self.param_groups:
            group["lr"] = 0.05 * min(count**-0.5, next(self.ks[0]) * 4**-1.5)
        return super().step(closure)


class WrapsAndCounts(optim.Optimizer):
    """A schedule around another optimizer, from a count in its state."""

    def __init__(self, parameters, lr=0.05):
        self.inner = optim.SGD(list(parameters), lr, momentum=0.9)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        self.state["n"] = self.state.get("n", 0) + 1
        for group in self.inner.param_groups:
            group["lr"] = 0.05 / self.state["n"] ** 0.5
        return self.inner.step(closure)


class DecaysBefore(Rule):
    """Writes to its momentum before it calls its closure."""

    @torch.no_grad()
    def step(self, closure=None):
        for state in self.state.values():
            state["m"].mul_(0.9)
        return super().step(closure)

    def update(self, group, p, g):
        p.sub_(group["lr"] * self.state[p].setdefault("m", torch.zeros_like(p)).add_(g))


@dataclass(slots=True)
class Slots:
    taken: int = 0


class CountsInSlots(Counting):
    def start(self):
        return Slots()

    def before(self):
        self.counter.taken += 1
        self.taken = self.counter.taken


class CountsInNamespace(CountsInSlots):
    def start(self):
        return SimpleNamespace(taken=0)


# ------------------------------------------------------------------------------ clipping of its own


class Clips(Rule):
    def before(self):
        every = [p for group in self.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(every, 0.3)

    def update(self, group, p, g):
        p.sub_(group["lr"] * g)


class ClipsEachForItself(Rule):
    def update(self, group, p, g):
        nn.utils.clip_grad_norm_([p], 0.1)
        p.sub_(group["lr"] * p.grad)


class Views(Rule):
    """Momentum in one buffer, of which each parameter has a part."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, lr)
        every = [p for group in self.param_groups for p in group["params"]]
        self.flat = torch.zeros(sum(p.numel() for p in every), dtype=every[0].dtype)
        parts = self.flat.split([p.numel() for p in every])
        self.parts = {p: part.view_as(p) for p, part in zip(every, parts, strict=True)}

    def before(self):
        self.flat.mul_(0.9)

    def update(self, group, p, g):
        p.sub_(group["lr"] * self.parts[p].add_(g))


class SkipsSpikes(Rule):
    """Compares the loss with bounds; follows its own."""

    bound = 1.2

    def step(self, closure):
        loss = closure()
        if 1e-8 < float(loss) < self.bound:
            super().step(lambda: loss)
        return loss

    def update(self, group, p, g):
        p.sub_(group["lr"] * g)


class SlowsDown(SkipsSpikes):
    bound = float("inf")

    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            group["lr"] = 0.3 if float(loss) > 0.9 else 0.1
        return super().step(lambda: loss)


EXACT = [
    SkipsSpikes, SlowsDown,
    Lists, Nested, Objects, OnGroups, Buffers, DataDecay, DataSet, CountsInState, CountsInAttribute,
    Noisy, Madgrad, Lamb, Foreach, ThroughSuper, Lookahead, LookaheadOfState, RequiredClosure,
    CountsInArray, CountsInIterator, CountsInSlots, CountsInNamespace, Clips, ClipsEachForItself,
    WarmsUp, Noam, WrapsAndCounts,
]  # fmt: skip
"""Followed exactly."""

REFUSED = [
    (Sam, "evaluates its closure 2 times"),
    (Early, "moves the parameters before it evaluates its closure"),
    (DecaysBefore, "writes to its state 'm' before it evaluates its closure"),
    (Polyak, "depends on the value of the loss"),
    (DAdaptAdam, "is not what tangents follow"),
    (ByItem, "the parameter after a step, as a function of the gradient, is not"),
    (ReadsTheParameters, "the parameter after a step, as a function of the gradient, is not"),
    (Views, "shares memory with other state"),
    (CountsElsewhere, "not the same when it is made twice"),
]
"""Refused before anything has moved, each with a part of the reason."""
