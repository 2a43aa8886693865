"""The guards of a stage at work: what they remember of earlier steps, what they decide, and what they print.

All they look at is on the host before the optimizer's update, and equal on every rank: the sums that the step waits for
anyway, the gradient norm, and the facts about rollouts. So a guard costs no further wait for the GPU.
"""

from collections.abc import Callable, Mapping
from statistics import fmean, median
from typing import Any

import numpy as np

from phimini.parallel.ranks.world import World
from phimini.stages.config.guards import ENDS, FEWEST, GUARDS, RECENT, GuardsConfig, Rule

_DONE = {
    "warn": "training goes on",
    "skip": "this update is skipped",
    "stop": "the run stops without this update",
}


class GuardStop(Exception):
    """Exception for a guard whose action is stop; the message names stage, step, guard, value and threshold."""


def measured(rule: Rule, first: list[float], recent: list[float], value: float) -> float | None:
    """Return the number that a guard compares with its threshold, or None while there are too few steps.

    first: the metric in the first ENDS steps. recent: in up to RECENT steps before this one.
    """
    if rule.measure == "value":
        return value
    if len(recent) < FEWEST:
        return None
    if rule.measure in ("deviations", "times_median"):
        middle = median(recent)
        if rule.measure == "times_median":
            return value / middle if middle else None
        deviation = median(abs(x - middle) for x in recent)
        least = 1e-3 * abs(
            middle
        )  # of steps that are nearly equal, every other one would be a spike
        return (value - middle) / max(deviation, least) if max(deviation, least) else None
    start, now = fmean(first), fmean([*recent[1 - ENDS :], value])
    if rule.measure == "rise":
        return now - start
    return now / start if start else None


class Guards:
    """The guards of one stage. A checkpoint keeps `state`, so that a resumed run decides alike."""

    def __init__(self, config: GuardsConfig, world: World, state: dict[str, Any]) -> None:
        self._config, self._world = config, world
        self._past: dict[str, dict[str, list[float]]] = state.setdefault("past", {})
        self.counts: dict[str, dict[str, int]] = state.setdefault("counts", {})
        """by guard: `steps` in which it tripped, the `first` of them from 1, and the updates that it `skipped`"""
        self.stop: str | None = None
        """why the run must stop, once a guard says so"""

    def allow(self, step: str, index: int, values: Mapping[str, float], row: dict) -> bool:
        """Return False, on every rank, if step `index` must not make its update. Collective.

        step: its name in the log. values: metrics, equal on every rank; each comes once a step. Adds `alarm_NAME` to the step's
        `row`, and `skipped`.
        """
        tripped = self._tripped(values)
        actions = {name: getattr(self._config, name).action for name in GUARDS}
        if self._world.world_size > 1 and not {"skip", "stop"}.isdisjoint(actions.values()):
            tripped = self._world.all_gather_objects(tripped)[0]  # a decision is never a rank's own
        held = False
        for name, value in tripped.items():
            row[f"alarm_{name}"] = value
            count = self.counts.setdefault(name, {"steps": 0, "first": index + 1, "skipped": 0})
            count["steps"] += 1
            action = actions[name]
            count["skipped"] += action != "warn"
            held |= action != "warn"
            line = sentence(step, name, value, self._config)
            if self._world.is_main and count["steps"] & (count["steps"] - 1) == 0:
                print(line, flush=True)
            if action == "stop":
                self.stop = self.stop or line
        if held:
            row["skipped"] = 1
        return not held

    def _tripped(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the values of the guards beyond their thresholds, and remember the metrics."""
        found = {}
        for name, rule in GUARDS.items():
            guard = getattr(self._config, name)
            if guard.action == "off" or rule.metric not in values:
                continue
            value = values[rule.metric]
            past = self._past.setdefault(name, {"first": [], "recent": []})
            number = measured(rule, past["first"], past["recent"], value)
            if number is not None and is_beyond(rule, number, guard.threshold):
                found[name] = number
            if rule.measure != "value":
                past["first"] += [value] * (len(past["first"]) < ENDS)
                past["recent"] = [*past["recent"], value][-RECENT:]
        return found


def is_beyond(rule: Rule, value: float, threshold: float) -> bool:
    return value < threshold if rule.below else value > threshold


def sentence(where: str, name: str, value: float, config: GuardsConfig) -> str:
    """Return the line of the log about a guard that trips."""
    guard, rule = getattr(config, name), GUARDS[name]
    return (
        f"{where}: {name}: {rule.words.format(value=f'{value:.4g}')}, {'below' if rule.below else 'above'} "
        f"guards.{name}.threshold={guard.threshold:g}; {_DONE[guard.action]}"
    )


def check_trained_shares(
    config: GuardsConfig,
    world: World,
    stage: str,
    shares: np.ndarray,
    name_of: Callable[[int], str],
    *,
    all_tokens: bool = False,
) -> None:
    """Print the share of tokens that carry loss, per document: the lowest, the median, the highest. Before step 1.

    shares: of each document. name_of: names a document by its number. all_tokens: the question is trained on too, on
    purpose. Raises GuardStop, on every rank, if a guard's action is stop.
    """
    lowest, highest = int(shares.argmin()), int(shares.argmax())
    if world.is_main:
        print(
            f"{stage}: share of trained tokens per document: lowest {shares[lowest]:.3f} ({name_of(lowest)}), median "
            f"{np.median(shares):.3f}, highest {shares[highest]:.3f} ({name_of(highest)})",
            flush=True,
        )
    for name, worst in {"trained_share_low": lowest, "trained_share_high": highest}.items():
        guard, value = getattr(config, name), float(shares[worst])
        if guard.action == "off" or (all_tokens and name == "trained_share_high"):
            continue
        if is_beyond(GUARDS[name], value, guard.threshold):
            line = sentence(f"{stage}, {name_of(worst)}", name, value, config)
            if guard.action == "stop":
                raise GuardStop(line)
            if world.is_main:
                print(line, flush=True)
