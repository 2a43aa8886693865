"""Which numbers a run's fields may hold: a bad one is named when the run is configured, not met hours later in its stage"""

import dataclasses
import math
from typing import Any

_SMALLEST = math.ulp(0.0)  # floats above 0
_LARGEST = 1e300  # neither inf nor nan
_SHARE = (0, 1)
_BELOW_1 = (0, 1 - 1e-9)
_POSITIVE_SHARE = (_SMALLEST, 1)
_NOT_NEGATIVE = (0, _LARGEST)
_ANY = (-_LARGEST, _LARGEST)

# By the field's name. What is not here is above 0 where it is a fraction, and at least 1 where it is whole.
RANGES: dict[str, tuple[float, float]] = {
    "seed": _ANY,
    "heldout_seed": _ANY,
    # optimizer
    "min_lr_ratio": _SHARE,
    "warmup_ratio": _BELOW_1,
    "beta1": _BELOW_1,
    "beta2": _BELOW_1,
    "eps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "clip": _NOT_NEGATIVE,
    # data
    "quick": _SHARE,
    "slip": _SHARE,
    "level_weights": _NOT_NEGATIVE,
    "num_heldout": (2, _LARGEST),
    # stages 3 and 4
    "rollouts_per_prompt": (2, _LARGEST),
    "nll_weight": _NOT_NEGATIVE,
    "clip_low": _SHARE,
    "clip_high": _NOT_NEGATIVE,
    "kl_coef": _NOT_NEGATIVE,
    "keep_share": _POSITIVE_SHARE,
    "max_accuracy": _POSITIVE_SHARE,
    "importance_low": _NOT_NEGATIVE,
    # sampling
    "samples": (8, _LARGEST),
    "evaluate.temperature": _NOT_NEGATIVE,
    "top_p": _POSITIVE_SHARE,
    "memory_share": _POSITIVE_SHARE,
    "oversample": (1, _LARGEST),
    "rollout.deadline_s": (1, _LARGEST),
    "max_staleness": _NOT_NEGATIVE,
}


def check_ranges(config: Any, prefix: str = "") -> None:
    """ValueError for the first number, at any depth of the dataclass, that its field cannot hold."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{key}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            least = 1 if isinstance(number, int) else _SMALLEST
            low, high = RANGES.get(key) or RANGES.get(field.name) or (least, _LARGEST)
            if not low <= number <= high:
                raise ValueError(f"{key}: expected {_described(low, high)}, got {number}")


def _described(low: float, high: float) -> str:
    if high == 1:
        return "a share above 0, at most 1" if low else "a share from 0 to 1"
    if high < 1:
        return "a number from 0 to below 1"
    if low == -_LARGEST:
        return "a finite number"
    return "a finite number above 0" if low == _SMALLEST else f"at least {low:g}"
