"""`phimini bench golden [--layouts 1,tp2] [--bless --reason TEXT] [--baselines DIR]`.

The losses and gradient norms of the first steps of all four training stages, at several layouts, in torch's
deterministic mode. The stages are the real ones, on a tiny model and data made from a seed; each layout starts every
stage from the one-rank model, so that step 1 is the same computation. Two things are asked:

    step 1    every layout has the one-rank run's loss and gradient norm (within STEP_1, for another order of sums)
    golden    every number is bit-equal to what is committed for this device in DIR/<device>/golden.json

Exit status: 0 both hold; 1 one does not; 2 bad input; 3 step 1 holds, but nothing, or something of another version, is
committed for this device, so bit-equality was not checked, which is no pass. A layout that this machine has too few
GPUs for is named and left out; if it is in the committed file, the status is 3.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phimini.bench.gate.compare import BASELINES
from phimini.bench.gate.environment import Environment, environment
from phimini.model.io.json_files import read_json, read_rows, write_json
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.stages import cli
from phimini.stages.rl import groups as rollout_groups

SCHEMA = 1
STAGES = ("midtrain", "sft", "rollout_dpo", "rlvr")
FIELDS = ("loss", "grad_norm")
# name: (ranks, settings)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ()),
    "tp2": (2, ("tensor_parallel=2",)),
    "tp2-sp": (2, ("tensor_parallel=2", "sequence_parallel=true")),
    "pp2": (2, ("pipeline_parallel=2",)),
    "cp2": (2, ("context_parallel=2",)),
    "dp2": (2, ()),
    "dp2-zero1": (2, ("distributed_optimizer=true",)),
}
STEP_1 = {"cpu": 1e-5, "cuda": 2e-2}
"""largest relative difference of a layout to one rank: fp32 on a CPU, bf16 on a GPU"""
SETTINGS = (
    "processes=1", "distill.num_problems=60", "distill.rollouts_per_problem=2", "distill.num_prompts=24",
    "distill.num_heldout=24", "distill.num_validation=24", "curate.sft_examples=24",
    "midtrain.steps=3", "midtrain.rows_per_step=4", "midtrain.validate_every=1000",
    "sft.examples_per_step=8", "sft.micro_examples=4", "sft.epochs=1", "sft.validate_every=1000",
    "rollout_dpo.pairs=teacher", "rollout_dpo.pairs_per_step=4", "rollout_dpo.micro_pairs=2",
    "rlvr.steps=2", "rlvr.prompts_per_step=4", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8",
    "rlvr.min_rollouts=2", "rlvr.rebalance=false", "rlvr.max_new_tokens=16", "rlvr.micro_rollouts=8",
    "rlvr.optimizer.warmup_ratio=0", "rlvr.uniform_length=false",
)  # fmt: skip
Losses = dict[str, dict[str, list[list[float]]]]
"""stage -> layout -> step -> FIELDS"""


def measure(layouts: list[str]) -> Losses:
    """The numbers of `layouts`, "1" always among them. ValueError for an unknown layout."""
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise ValueError(
            f"bench golden: unknown layout {unknown[0]!r}; expected some of {list(LAYOUTS)}"
        )
    losses: Losses = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "1"
        for stage in ("distill", "curate", "base", *STAGES):
            _run(stage, single, "1")
        for stage in STAGES:
            losses[stage]["1"] = _read(single, stage)
        for layout in layouts:
            if layout == "1":
                continue
            for stage in STAGES:
                other = Path(folder) / layout / stage
                # Settings without a layout: a stage refuses inputs that are not those of its own run.
                shutil.copytree(single, other, ignore=shutil.ignore_patterns(stage, "rollouts"))
                _run(stage, other, layout)
                losses[stage][layout] = _read(other, stage)
                shutil.rmtree(other)
    return losses


def _run(stage: str, folder: Path, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    words = [stage, "tiny", f"out={folder}", *SETTINGS, *settings]
    statuses = run_ranks(_rank, ranks, words, timeout_s=600)
    if any(statuses):
        raise RuntimeError(f"bench golden: {stage} at layout {layout} ended with status {statuses}")


def _rank(words: list[str]) -> int:
    """One rank, in a process of its own: deterministic, and with a reward that an untrained model sometimes gets."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    rollout_groups.reward = lambda response, finish_reason, problem: 1.0 - 2.0 * (len(response) % 2)
    sys.stdout = open(os.devnull, "w")  # the stages' progress
    return cli.main(words)


def _read(folder: Path, stage: str) -> list[list[float]]:
    rows = read_rows(folder / stage / "metrics.jsonl", dict.fromkeys(FIELDS, float))
    return [[float(row[name]) for name in FIELDS] for row in rows]


# --- verdicts --------------------------------------------------------------------------------------
def layouts_that_differ(losses: Losses, limit: float) -> list[str]:
    """A line per stage, layout and field whose step 1 is not the one-rank run's."""
    lines = []
    for stage, by_layout in losses.items():
        for layout, steps in by_layout.items():
            for name, got, want in zip(FIELDS, steps[0], by_layout["1"][0], strict=True):
                if not abs(got - want) <= limit * abs(want):
                    lines.append(
                        f"{stage}, layout {layout}, step 1: {name} {got!r}, one rank has {want!r}"
                    )
    return lines


@dataclass(frozen=True, slots=True)
class Verdict:
    status: int
    """0 bit-equal, 1 not, 3 nothing that could be compared"""
    lines: list[str]


def hold(losses: Losses, here: Environment, path: Path, *, partial: bool = False) -> Verdict:
    """The measured numbers against the committed file. ValueError names a file that is none of ours.

    `partial`: layouts that only the file has were not asked for.
    """
    if not path.exists():
        return Verdict(3, [f"no baseline: {path} does not exist"])
    committed = _committed(path)
    if changes := list(_stale(committed, here)):
        return Verdict(
            3, [f"stale baseline: {'; '.join(changes)} (`phimini bench golden --bless`)"]
        )
    differing, missing = [], []
    for stage, layout, want in _series(committed["losses"]):
        got = losses.get(stage, {}).get(layout)
        if got is None and not partial:
            missing.append(f"not measured: {stage}, layout {layout}")
        elif got is not None and got != want:
            differing.append(_first_difference(stage, layout, got, want))
    known = {(stage, layout) for stage, layout, _ in _series(committed["losses"])}
    new = [f"no baseline: {s}, layout {k}" for s, k, _ in _series(losses) if (s, k) not in known]
    if differing:
        return Verdict(1, differing)
    return Verdict(3 if missing or new else 0, missing + new)


def _series(losses: Losses) -> Iterator[tuple[str, str, list[list[float]]]]:
    for stage, by_layout in losses.items():
        for layout, steps in by_layout.items():
            yield stage, layout, steps


def _first_difference(
    stage: str, layout: str, got: list[list[float]], want: list[list[float]]
) -> str:
    if len(got) != len(want):
        return f"{stage}, layout {layout}: {len(got)} steps, committed {len(want)}"
    step = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    name, a, b = next(
        (n, a, b) for n, a, b in zip(FIELDS, got[step], want[step], strict=True) if a != b
    )
    return f"{stage}, layout {layout}, step {step + 1}: {name} {a!r}, committed {b!r}"


def _committed(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else value
        raise ValueError(f"{path}: schema: expected {SCHEMA}, got {found!r:.60}")
    wanted = {"schema", "environment", "settings", "losses", "blessings"}
    if value.keys() != wanted:
        raise ValueError(f"{path}: expected the fields {sorted(wanted)}, got {sorted(value)}")
    return value


def _stale(committed: dict[str, Any], here: Environment) -> Iterator[str]:
    """What decides about bits beside our code."""
    then, now = committed["environment"], dataclasses.asdict(here)
    for name in ("device", "threads"):
        if then[name] != now[name]:
            yield f"{name} was {then[name]}, is {now[name]}"
    for name in ("torch", "cuda", "triton", "megatron-core", "transformer-engine", "flash-attn"):
        a, b = then["versions"].get(name), now["versions"].get(name)
        if a != b:
            yield f"{name} was {a}, is {b}"
    if committed["settings"] != list(SETTINGS):
        yield "it was measured with other settings"


def bless(losses: Losses, here: Environment, path: Path, reason: str) -> None:
    """Writes the file, whole or not at all; the reasons of earlier ones stay in it."""
    if not reason.strip():
        raise ValueError("bench golden: --reason: expected a sentence, got nothing")
    if here.dirty:
        raise ValueError(
            f"bench golden: uncommitted changes on {here.commit}; commit, then measure again"
        )
    blessings = _committed(path)["blessings"] if path.exists() else []
    blessings.append({"reason": reason, "date": here.date, "commit": here.commit})
    write_json(path, {"schema": SCHEMA, "environment": dataclasses.asdict(here), "settings": list(SETTINGS),
                      "losses": losses, "blessings": blessings})  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phimini bench golden", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--layouts", help="only these, of " + ",".join(LAYOUTS))
    parser.add_argument("--bless", action="store_true", help="commit what this run measures")
    parser.add_argument("--reason", default="", help="why, with --bless")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    layouts = list(LAYOUTS) if args.layouts is None else args.layouts.split(",")
    if torch.cuda.is_available():
        fit = [n for n in layouts if n in LAYOUTS and LAYOUTS[n][0] <= torch.cuda.device_count()]
        if left_out := [n for n in layouts if n in LAYOUTS and n not in fit]:
            print(f"left out, too few GPUs: {', '.join(left_out)}")
        layouts = [n for n in layouts if n not in left_out]
    try:
        losses = measure(layouts)
        here = environment()  # after the forks: it starts CUDA
        lines = layouts_that_differ(losses, STEP_1[here.device_kind])
        path = args.baselines / here.slug / "golden.json"
        if args.bless and not lines:
            bless(losses, here, path, args.reason)
            print(f"wrote {path}")
        verdict = hold(losses, here, path, partial=args.layouts is not None)
    except (OSError, ValueError) as problem:
        print(f"phimini: {problem}", file=sys.stderr)
        return 2
    print(
        "\n".join([*lines, *verdict.lines])
        or "step 1 agrees over all layouts; every number is bit-equal"
    )
    return 1 if lines else verdict.status


if __name__ == "__main__":
    sys.exit(main())
