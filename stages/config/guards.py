"""The guards of a run: the table of them, and their settings.

A guard compares what a stage measures with a threshold. Beyond it, it warns, skips the step's update, or stops the run. The
log then has one line, `sft, step 12: loss_spike: ...`, at the 1st, 2nd, 4th, 8th ... such step, the step's row of
metrics.jsonl has `alarm_NAME`, and summary.json has the counts.

These checks have no choice of action, and stand where they are made: a value that is not finite, ranks with different
data, a first preference loss other than ln 2, and sampler and trainer that differ (`rlvr.max_mismatch`) end the run;
an update of fewer than `rlvr.min_rollouts` waits.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from phimini.stages.config.ranges import NotNegative

Action = Literal["off", "warn", "skip", "stop"]
RECENT = 64
"""steps before this one whose median a spike is compared with"""
FEWEST = 16
"""steps before which no guard that compares with earlier steps trips"""
ENDS = 8
"""steps at the start of a stage, and up to now, whose means a trend compares"""


class Rule(NamedTuple):
    """A row of the table."""

    metric: str
    """the field of metrics.jsonl that is watched; `trained_share` is measured once, before step 1"""
    measure: Literal["value", "deviations", "times_median", "times_start", "rise"]
    """the number that is compared: the metric itself; its distance from the median of the last RECENT steps in median absolute
    deviations, or how many times that median it is; how many times the mean of the first ENDS steps that of the last ENDS
    is, or their difference"""
    words: str
    """the sentence of the log; its value is {value}"""
    below: bool = False
    """it trips below the threshold"""
    no_skip: str = ""
    """why no update can be skipped"""


_OF_POLICY = "a skipped update leaves the policy as it is, so every later one would be skipped too"
_AT_START = "it is measured before the first update"
GUARDS = {
    "loss_spike": Rule("loss", "deviations", f"the loss is {{value}} deviations above the median of the last {RECENT} steps"),
    "grad_norm": Rule("grad_norm", "times_median", f"the gradient norm is {{value}} times the median of the last {RECENT} steps"),
    "entropy_collapse": Rule("entropy", "times_start", f"the mean entropy of {ENDS} steps is {{value}} times that of the first {ENDS}", below=True, no_skip=_OF_POLICY),
    "length_explosion": Rule("response_length", "times_start", f"the mean length of the answers of {ENDS} steps is {{value}} times that of the first {ENDS}", no_skip=_OF_POLICY),
    "reward_hacking": Rule("unconfirmed", "rise", f"since the first {ENDS} steps the reward rose and the audited accuracy did not: the share of rewarded answers that the audit refuses rose by {{value}}", no_skip=_OF_POLICY),
    "equal_groups": Rule("zero_groups", "value", "the share of groups whose answers all have one reward is {value}"),
    "truncated": Rule("truncated", "value", "the share of answers that were cut off is {value}"),
    "trained_share_low": Rule("trained_share", "value", "the smallest share of trained tokens of a document is {value}", below=True, no_skip=_AT_START),
    "trained_share_high": Rule("trained_share", "value", "the largest share of trained tokens of a document is {value}", no_skip=_AT_START),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A threshold, and what follows beyond it."""

    threshold: NotNegative
    """the guard trips above this, entropy_collapse and trained_share_low below"""
    action: Action = "warn"
    """`warn` prints a line, `skip` makes no update in this step, `stop` skips it too, saves and ends with exit status 3"""


def _at(threshold: float) -> Guard:
    return field(default=Guard(threshold=threshold))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardsConfig:
    """A guard for each row of the table."""

    loss_spike: Guard = _at(30.0)
    """stages 1 to 3: deviations of a step's loss above the median of the last 64 steps"""
    grad_norm: Guard = _at(30.0)
    """all stages: gradient norm, before clipping, as a multiple of the median of the last 64 steps"""
    entropy_collapse: Guard = _at(0.05)
    """stage 4: entropy of the last 8 updates as a multiple of that of the first 8"""
    length_explosion: Guard = _at(3.0)
    """stage 4: length of the answers of the last 8 steps as a multiple of that of the first 8"""
    reward_hacking: Guard = _at(0.15)
    """stage 4: rise, since the first 8 steps, of the share of audited answers that have a reward and that the second check
    calls wrong; see audit"""
    equal_groups: Guard = _at(0.95)
    """stage 4: share of a step's groups whose answers all have one reward, and so no advantage"""
    truncated: Guard = _at(0.5)
    """stage 4: share of a step's answers that were cut off at max_new_tokens"""
    trained_share_low: Guard = _at(0.01)
    """stages 1 to 3, before step 1: smallest share of a document's tokens that carry loss; a fault of mask or template"""
    trained_share_high: Guard = _at(0.9999)
    """stages 1 to 3, before step 1: largest such share; nearly 1 where the question is trained on. Not with loss_on_question"""


def check_actions(guards: GuardsConfig) -> None:
    """Raise ValueError for a guard whose action cannot exist."""
    for name, rule in GUARDS.items():
        if getattr(guards, name).action == "skip" and rule.no_skip:
            raise ValueError(
                f"guards.{name}.action: expected off, warn or stop, because {rule.no_skip}, got skip"
            )
