"""The smallest run that is still a run, and what a command leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

DEVICE = "counts"
TIERS = ("s", "l")

TINY: dict[str, Any] = {
    "data": {"name": "digits", "limit": 200},
    "profiles": [
        {
            "name": DEVICE,
            "provider": "none",
            "tiers": [
                {"name": "s", "limits": {"params": "25 %"}},
                {"name": "l", "limits": {"params": "80 %", "flops": "90 %"}},
            ],
        }
    ],
    "space": {"name": "mbconv", "size": "tiny"},
    "evaluator": {"name": "one-shot", "batch_size": 16, "evaluation_images": 16, "thorough_images": 16},
    "search": {"warm_up": 2, "evaluations": 12},
    "derive": {"trial_epochs": 1, "samples": 50, "rescored": 4, "best": 1},
    "retrain": {"epochs": 1},
    "export": {"parity_images": 20, "samples": 2},
    "robustness": {"images": 40},
}
"""Two tiers by what can be counted; 160 images to train on."""


class Outcome(NamedTuple):
    """What a command left: its exit code, what it printed, and the exception that nobody caught."""

    code: int
    out: str
    err: str
    crash: BaseException | None


Cli = Callable[..., Outcome]
