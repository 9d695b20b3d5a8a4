"""How noisy the policy gradient of choices is, by baseline and by number of samples.

The network of ``architectures.py`` has 3456 combinations of choices. It is trained
for 300 steps with uniform probabilities, which stand still, so that every update is a draw of the
same kind of estimate. The variance is that of the last 200 estimates around their mean, over all
logits.

    python examples/benchmarks/policy_gradients.py
"""

from __future__ import annotations

import lightning
import torch
from _digits import batches, digits, fit, print_header, print_row
from architectures import Searched

from lightning_hpo import T1T2, OnlineHPOCallback, PolicyGradient

STEPS = 300
CASES = {
    "direct, no baseline": {"response": False, "baseline": "none"},
    "direct, moving average": {"response": False, "baseline": "average"},
    "direct, leave one out": {"response": False, "baseline": "leave_one_out"},
    "direct and response, no baseline": {"baseline": "none"},
    "direct and response, moving average": {"baseline": "average"},
    "direct and response, leave one out": {"baseline": "leave_one_out"},
}


def variance(samples: int, **options: object) -> float:
    """Returns the variance of the estimate, summed over all logits."""
    lightning.seed_everything(0, verbose=False)
    train, held_out, _ = digits(300, 700, 797)
    callback = OnlineHPOCallback(
        PolicyGradient(T1T2(), samples=samples, **options),
        optimizer=lambda logits: torch.optim.SGD(logits, lr=0.0),
    )
    fit(Searched(), batches(train, 50), batches(held_out, 200), STEPS, [callback])
    names = callback.history[0].hypergradients
    rows = [
        torch.cat([record.hypergradients[name].flatten() for name in names])
        for record in callback.history[100:]
    ]
    return float(torch.stack(rows).var(0).sum())


def main() -> None:
    print_header("2 samples", "8 samples")
    for name, options in CASES.items():
        print_row(name, *(f"{variance(samples, **options):.3g}" for samples in (2, 8)))


if __name__ == "__main__":
    main()
