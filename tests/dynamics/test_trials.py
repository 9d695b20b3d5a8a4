"""A trial of an optimizer's step ends neither the process nor leaves anything."""

import subprocess
import sys

import optimizers
import pytest
import torch

from lightning_hpo.dynamics import THETA, GenericDynamics

# x is the gradient, y a tensor of the state that is written to.
OPERATIONS = """
y.sgn_() | y.copy_(x.sgn()) | y.sign_() | torch.sgn(x) | y.clamp_(-1, 1) | y.zero_() | y.fill_(1.0)
y.masked_fill_(y > 0, 0.0) | y.abs_() | y.round_() | y.floor_() | y.copysign_(x) | y.lerp_(x, 0.1)
y.addcdiv_(x, x.abs() + 1) | y.addcmul_(x, x) | y.pow_(2) | y.abs_().add_(1).rsqrt_()
y.__setitem__(0, x[0]) | y.__setitem__(y > 0, 0.0) | y[0].mul_(x[0]) | y.view(-1).add_(x.view(-1))
torch.maximum(x, y, out=y) | y.mul_(x.norm()) | y.copy_(torch.where(x > 0, x, y)) | y.exp_()
torch._foreach_mul_([y], 2.0) | torch._foreach_sign_([y]) | torch._foreach_lerp_([y], [x], 0.5)
torch._foreach_copy_([y], [x]) | torch._foreach_addcmul_([y], [x], [x], value=0.1) | y.relu_()
y.nan_to_num_() | y.fmod_(2.0) | y.mul_((x * y > 0).to(x.dtype)) | y.copy_(x @ x.T @ x)
y.index_add_(0, torch.tensor([0]), x[:1]) | y.scatter_(0, torch.tensor([[0, 1, 2]]), x[:1])
y.data.add_(x) | y.copy_(torch.linalg.qr(x)[0]) | y.sub_(x.mean(dim=0, keepdim=True)) | y.t_()
"""

SCRIPT = """
import sys, torch
from lightning_hpo.dynamics import THETA, GenericDynamics

class Doing(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            x, y = p.grad, self.state[p]["y"]
            eval(operation)
            p.sub_(y)
            x.mul_(2.0)

for operation in sys.stdin.read().split("|"):
    operation = operation.strip()
    p = torch.randn(3, 3).requires_grad_()
    p.grad = torch.randn(3, 3)
    optimizer = Doing([p])
    optimizer.state[p]["y"] = torch.randn(3, 3)
    dynamics = GenericDynamics(optimizer)
    try:
        step = dynamics.capture()
        pulled = dynamics.vjp_(step, {THETA: [torch.ones(1, 3, 3)]})
        assert pulled[0].isfinite().all()
    except Exception as error:
        print(operation, "|", type(error).__name__, str(error)[:100])
print("end")
"""


@pytest.mark.slow
def test_no_operation_ends_the_process():
    """In a process of its own: a segmentation fault would end this one."""
    joined = OPERATIONS.strip().replace("\n", " | ")
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        input=joined, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n") == ["end", ""]


@pytest.mark.parametrize("kind", optimizers.EXACT, ids=lambda kind: kind.__name__)
def test_trials_leave_the_optimizer_as_it_is(kind):
    """Tangents and adjoints before the step: the step is the one that would have been made."""

    def train(looks):
        torch.manual_seed(1)
        parameters = [torch.randn(3, 2).requires_grad_(), torch.randn(2).requires_grad_()]
        optimizer = kind(parameters)
        dynamics = GenericDynamics(optimizer)
        for _ in range(5):
            for p in parameters:
                p.grad = torch.randn_like(p)
            if looks:
                step = dynamics.capture()
                dynamics.jvp_(
                    step,
                    {THETA: [torch.ones(1, *p.shape) for p in parameters]},
                    [torch.ones(1, *p.shape) for p in parameters],
                )
                dynamics.vjp_(step, {THETA: [torch.ones(1, *p.shape) for p in parameters]})
            optimizer.step(closure=lambda: torch.zeros(()))
        return parameters

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=0)
