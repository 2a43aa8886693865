"""The rows of `phimini bench train`: throughput, shares of the phases and FLOP/s, from the steps of all ranks."""

import dataclasses
import statistics
from dataclasses import dataclass

import torch

from phimini.bench.gate.environment import environment
from phimini.bench.gate.rows import Row
from phimini.bench.ops.harness import PEAKS
from phimini.parallel.attention.core import attention_name
from phimini.parallel.ranks.timing import PHASES, Step
from phimini.parallel.ranks.world import World
from phimini.stages.config.schema import RunConfig

TRAINING_PHASES = tuple(p for p in PHASES if p not in ("rollout", "verify", "sync"))
ESSENTIAL = ("rollout", "forward", "head", "backward", "optimizer", "verify", "sync")
"""the work that a step exists for; the head is the end of the forward and the start of the backward pass"""
OUTSIDE_LIMIT = 0.05
"""largest share of an RL step for data, communication and unmarked time"""


@dataclass(frozen=True, slots=True)
class RankResult:
    """The measurements of one rank."""

    steps: list[Step]
    """the steps that give the speed"""
    marked: list[Step]
    """the steps that give the shares"""
    gemm_flops: list[float]
    """FLOP/s of a matrix product, after each of `steps`"""
    peak_bytes: int
    peak_rss_bytes: int | None
    model_size: int
    """ranks that compute the same tokens"""


@dataclass(frozen=True, slots=True)
class JobStep:
    """One step over all ranks."""

    seconds: dict[str, float]
    """by phase; CPU time summed over ranks, or the ranks' mean wall time on a GPU"""
    counts: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def training_s(self) -> float:
        return sum(self.seconds[p] for p in TRAINING_PHASES)


def job_steps(of_each_rank: list[list[Step]], model_size: int, cuda: bool) -> list[JobStep]:
    """Combine the steps of the ranks. Work that all `model_size` ranks of a replica count is counted once."""
    steps = []
    for of_ranks in zip(*of_each_rank, strict=True):
        clocks = [step.wall_s if cuda else step.cpu_s for step in of_ranks]
        share = len(of_ranks) if cuda else 1
        seconds = {p: sum(clock[p] for clock in clocks) / share for p in PHASES}
        counts = {name: sum(step.counts[name] for step in of_ranks) / model_size
                  for name in ("tokens", "trained_tokens", "flops")}  # fmt: skip
        counts |= {name: float(of_ranks[0].counts[name]) for name in ("samples", "sampled_tokens")}
        steps.append(JobStep(seconds, counts))
    return steps


def make_row(
    run: RunConfig, stage: str, world: World, ranks: list[RankResult], log: list[dict], reward: str | None
) -> Row:  # fmt: skip
    cuda = world.device.type == "cuda"
    size = ranks[0].model_size
    steps = job_steps([rank.steps for rank in ranks], size, cuda)
    training = [step for step in steps if step.counts["tokens"]]  # stage 4 may skip an update
    if not training:
        raise ValueError(f"bench train {stage}: no step trained on anything; take more --steps")
    gemms = [statistics.median(flops) for flops in zip(*(r.gemm_flops for r in ranks), strict=True)]
    # On a GPU a step's wall time is that of all ranks, so its yardstick is the sum of theirs.
    at_once = len(ranks) if cuda else 1
    if stage == "rlvr":  # per GFLOP: the FLOPs of rollouts are not counted
        unit, work = "samples/cpu_s", [s.counts["samples"] for s in steps]
        machine = [gemm * at_once / 1e9 for gemm in gemms]
    else:  # the ratio is the share of the yardstick's FLOP/s
        unit, work = "tokens/cpu_s", [s.counts["tokens"] for s in steps]
        machine = [gemm * at_once * s.counts["tokens"] / s.counts["flops"]
                   for gemm, s in zip(gemms, steps, strict=True)]  # fmt: skip
    if cuda:
        unit = unit.replace("cpu_s", "s")
    wrong = [row for row in log if row["loss"] is None or row["grad_norm"] is None]
    samples = [amount / step.total_s for amount, step in zip(work, steps, strict=True)]
    marked = job_steps([rank.marked for rank in ranks], size, cuda)
    whole = {p: sum(s.seconds[p] for s in marked) for p in PHASES}
    total = sum(whole.values())
    flops = [s.counts["flops"] / s.training_s / at_once for s in training]
    gemm = statistics.median(gemms)
    achieved = statistics.median(flops)
    device = torch.cuda.get_device_name() if cuda else environment().device
    peak = PEAKS.get(device, (None,))[0]
    peak_rss = [r.peak_rss_bytes for r in ranks if r.peak_rss_bytes is not None]
    layout = {
        k: v for k, v in dataclasses.asdict(world.layout).items() if v not in (1, False, "auto")
    }
    return Row(
        bench="train",
        case={"stage": stage, "model": run.model, "ranks": len(ranks)}
        | layout
        | ({"reward": reward} if reward else {})
        | {"tokens": _size_of_step(run, stage)},
        provider="phimini",
        unit=unit,
        samples=[] if wrong else samples,
        correct=not wrong,
        reference="gemm",
        reference_samples=[] if wrong else machine,
        peak_bytes=max(r.peak_bytes for r in ranks),
        info={
            "steps": len(steps),
            "share": {p: whole[p] / total for p in PHASES if whole[p]},
            "step_seconds": statistics.median(s.total_s for s in steps),
            "essential_share": sum(whole[p] for p in ESSENTIAL) / total,
            "flops_per_second": achieved,
            "gemm_flops_per_second": gemm,
            "gemm_share": achieved / gemm,
            "mfu": None if peak is None else achieved / peak,
            "attention": attention_name(world.device),
            "tokens_per_step": statistics.median(s.counts["tokens"] for s in training),
            "sampled_tokens_per_step": statistics.median(s.counts["sampled_tokens"] for s in steps),
            "peak_rss_bytes": max(peak_rss) if peak_rss else None,
            "first_loss": log[0]["loss"],
        },
    )


def _size_of_step(run: RunConfig, stage: str) -> str:
    """Return the settings that decide the amount of work of a step."""
    if stage == "midtrain":
        return f"{run.midtrain.rows_per_step}x{run.midtrain.sequence_length}"
    if stage == "sft":
        return f"{run.sft.examples_per_step} examples"
    if stage == "dpo":
        return f"{run.rollout_dpo.pairs_per_step} pairs"
    return f"{run.rlvr.prompts_per_step}x{run.rlvr.rollouts_per_prompt}, to {run.rlvr.max_new_tokens}"  # fmt: skip


def outside_share(row: Row) -> float:
    """Return a step's share for data, communication and unmarked time."""
    return 1 - row.info["essential_share"]


def too_much_outside(row: Row) -> bool:
    """Return True if an RL step spends more than OUTSIDE_LIMIT outside its essential phases."""
    return row.correct and row.case["stage"] == "rlvr" and outside_share(row) > OUTSIDE_LIMIT


def describe(row: Row) -> str:
    name = f"{row.case['stage']} ({', '.join(f'{k} {v}' for k, v in row.case.items() if k != 'stage')})"
    if row.value is None:
        return f"{name}: WRONG, not timed: a loss or a gradient norm was not finite"
    info = row.info
    shares = "  ".join(f"{p} {100 * s:.1f}" for p, s in info["share"].items())
    seconds = "CPU s" if "cpu" in row.unit else "s"
    alarm = f", MORE THAN {100 * OUTSIDE_LIMIT:g}" if too_much_outside(row) else ""
    measured_against = (
        f"MFU {100 * info['mfu']:.1f} % of dense bf16 with {info['attention']}"
        if info["mfu"] is not None
        else f"{100 * info['gemm_share']:.1f} % of a measured matrix product's {info['gemm_flops_per_second'] / 1e9:.0f}"
    )
    rss = "" if info["peak_rss_bytes"] is None else f", peak RSS {info['peak_rss_bytes'] / 2**20:.0f} MiB"  # fmt: skip
    return (
        f"{name}\n"
        f"  {row.value.p50:,.0f} {row.unit} ({row.value.p20:,.0f} to {row.value.p80:,.0f}; {info['steps']} steps of "
        f"{info['step_seconds']:.3f} {seconds}, {info['tokens_per_step']:,.0f} trained-on tokens)\n"
        f"  % of the step: {shares}; outside its purpose {100 * outside_share(row):.1f}{alarm}\n"
        f"  {info['flops_per_second'] / 1e9:.1f} model GFLOP/s, {measured_against} "
        "(causal half, no recomputation, rollout, verify and sync left out)\n"
        f"  peak of a step {(row.peak_bytes or 0) / 2**20:.1f} MiB{rss}"
    )
