"""Compare the losses of the first steps of all four training stages with the committed ones, and across layouts.

The stages are the real ones, in torch's deterministic mode, on a tiny model and data made from a seed. Every layout
starts each stage from the one-rank model, so that step 1 is the same computation. Two checks:

    step 1    every layout has the loss and gradient norm of one rank (within STEP_1: sums have another order)
    golden    every number is bit-equal to the one committed for this device in DIR/<device>/golden.json

Exit status: 0 both hold; 1 one fails; 2 bad input; 3 step 1 holds, but this device has no committed numbers, or numbers
of other versions, so bit-equality was not checked, which is no pass. A layout that needs more GPUs than this machine has
is named and left out; if the committed file has it, the status is 3.
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

from phimini.bench.gate.bless import folder_to_bless
from phimini.bench.gate.compare import BASELINES
from phimini.bench.gate.environment import Environment, environment
from phimini.bench.gate.options import parser, status_of
from phimini.model.io.json_files import read_json, read_rows, write_json
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.stages import cli
from phimini.stages.verify import verdict as scorer

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
    "sft.examples_per_step=8", "sft.micro_tokens=256", "sft.epochs=1", "sft.validate_every=1000",
    "rollout_dpo.pairs=teacher", "rollout_dpo.pairs_per_step=4", "rollout_dpo.micro_tokens=512",
    "rlvr.steps=2", "rlvr.prompts_per_step=4", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8",
    "rlvr.min_rollouts=2", "rlvr.rebalance=false", "rlvr.max_new_tokens=16", "rlvr.micro_tokens=256",
    "rlvr.optimizer.warmup_ratio=0", "rlvr.uniform_length=false",
)  # fmt: skip
BITS_DEPEND_ON = (
    "device", "threads", "torch", "cuda", "triton", "megatron-core", "transformer-engine", "flash-attn",
)  # fmt: skip
Losses = dict[str, dict[str, list[list[float]]]]
"""stage -> layout -> step -> FIELDS"""


def measure(layouts: list[str]) -> Losses:
    """Return the numbers of `layouts` and of one rank. ValueError for an unknown layout."""
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise ValueError(f"unknown layout {unknown[0]!r}; expected some of {list(LAYOUTS)}")
    losses: Losses = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "1"
        for stage in ("distill", "curate", "base", "tokenize", *STAGES):
            _run(stage, single, "1")
        for stage in STAGES:
            losses[stage]["1"] = _read(single, stage)
        for layout in layouts:
            if layout == "1":
                continue
            for stage in STAGES:
                other = Path(folder) / layout / stage
                # Settings without a layout: a stage refuses inputs that are not those of its own run.
                own = lambda where, _, stage=stage: [stage] if Path(where) == single else []
                shutil.copytree(single, other, ignore=own)
                _run(stage, other, layout)
                losses[stage][layout] = _read(other, stage)
                shutil.rmtree(other)
    return losses


def _run(stage: str, folder: Path, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    words = [stage, "tiny", f"out={folder}", *SETTINGS, *settings]
    statuses = run_ranks(_rank, ranks, words)
    if any(statuses):
        raise RuntimeError(f"bench golden: {stage} at layout {layout} ended with status {statuses}")


def _rank(words: list[str]) -> int:
    """Run a stage on one rank, deterministically, with a reward that an untrained model sometimes gets."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    scorer.is_right = lambda question, answer, response, finish_reason: len(response) % 2 == 0
    sys.stdout = open(os.devnull, "w")  # the stages' progress
    return cli.main(words)


def _read(folder: Path, stage: str) -> list[list[float]]:
    rows = read_rows(folder / stage / "metrics.jsonl", dict.fromkeys(FIELDS, float))
    return [[float(row[name]) for name in FIELDS] for row in rows]


# --- verdicts --------------------------------------------------------------------------------------
def layouts_that_differ(losses: Losses, limit: float) -> list[str]:
    """Return a line per stage, layout and field whose step 1 differs from one rank's by more than `limit`, relatively."""
    lines = []
    for stage, by_layout in losses.items():
        for layout, steps in by_layout.items():
            for name, got, want in zip(FIELDS, steps[0], by_layout["1"][0], strict=True):
                # A rebalanced policy loss is a mean of terms of size 1 that cancel: only its rounding is left.
                if not abs(got - want) <= limit * max(abs(want), 0.1):
                    lines.append(
                        f"{stage}, layout {layout}, step 1: {name} {got!r}, one rank has {want!r}"
                    )
    return lines


@dataclass(frozen=True, slots=True)
class Verdict:
    status: int
    """0 bit-equal, 1 not, 3 not compared"""
    lines: list[str]


def compare_with(
    losses: Losses, here: Environment, path: Path, *, partial: bool = False
) -> Verdict:
    """Compare the measured numbers with the committed file. ValueError for a file of another kind.

    `partial`: layouts that only the file has were not measured.
    """
    if not path.exists():
        return Verdict(3, [f"no baseline: {path} does not exist"])
    committed = _committed(path)
    if changes := _stale(committed, here):
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


def _stale(committed: dict[str, Any], here: Environment) -> list[str]:
    """Describe the changes besides our code that decide about bits."""
    changes = Environment(**committed["environment"]).changes(here, BITS_DEPEND_ON)
    if committed["settings"] != list(SETTINGS):
        changes.append("it was measured with other settings")
    return changes


def bless(losses: Losses, here: Environment, path: Path, reason: str) -> None:
    """Write the file, whole or not at all. It keeps the reasons of earlier blessings."""
    if not reason.strip():
        raise ValueError("--reason: expected a sentence, got nothing")
    if here.dirty:
        raise ValueError(f"uncommitted changes on {here.commit}; commit, then measure again")
    blessings = _committed(path)["blessings"] if path.exists() else []
    blessings.append({"reason": reason, "date": here.date, "commit": here.commit})
    write_json(path, {"schema": SCHEMA, "environment": dataclasses.asdict(here), "settings": list(SETTINGS),
                      "losses": losses, "blessings": blessings})  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = parser("golden", __doc__, json=False)
    options.add_argument("--layouts", help="only these, of " + ",".join(LAYOUTS))
    options.add_argument("--bless", action="store_true", help="commit the numbers of this run")
    options.add_argument("--reason", default="", help="why, with --bless")
    options.add_argument("--baselines", type=Path, default=BASELINES)
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    layouts = list(LAYOUTS) if args.layouts is None else args.layouts.split(",")
    if torch.cuda.is_available():
        fit = [n for n in layouts if n in LAYOUTS and LAYOUTS[n][0] <= torch.cuda.device_count()]
        if left_out := [n for n in layouts if n in LAYOUTS and n not in fit]:
            print(f"left out, too few GPUs: {', '.join(left_out)}")
        layouts = [n for n in layouts if n not in left_out]
    return status_of("golden", lambda: _run_and_judge(layouts, args))


def _run_and_judge(layouts: list[str], args: argparse.Namespace) -> int:
    losses = measure(layouts)
    here = environment()  # after the forks: it starts CUDA
    lines = layouts_that_differ(losses, STEP_1[here.device_kind])
    path = args.baselines / here.slug / "golden.json"
    if args.bless and not lines:
        folder_to_bless(args.baselines)
        bless(losses, here, path, args.reason)
        print(f"wrote {path}")
    verdict = compare_with(losses, here, path, partial=args.layouts is not None)
    agreed = "step 1 agrees over all layouts; every number is bit-equal"
    print("\n".join([*lines, *verdict.lines]) or agreed)
    return 1 if lines else verdict.status


if __name__ == "__main__":
    sys.exit(main())
