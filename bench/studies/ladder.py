"""`phimini bench ladder [RUN ...]`: the README's tables of accuracy, from the results of complete runs

With run directories, their results replace the rows of the same seed in `bench/results/ladder.jsonl`; then the
tables are printed as the README has them (a test holds it to these rows). A run's controls come along if it has some.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phimini.model.io.json_files import read_json, read_rows, write_rows

ROWS = Path(__file__).parents[1] / "results" / "ladder.jsonl"
FIELDS = {"seed": int, "stages": list, "machine": str, "date": str, "wall_seconds": float}
NAMES = {"midtrain": "mid-training", "sft": "SFT", "rollout_dpo": "Rollout DPO", "rlvr": "RL",
         "controls/sft_continued": "SFT continued", "controls/rejection_sft": "SFT on own correct rollouts",
         "controls/rl_without_dpo": "RL without DPO",
         "controls/rl_without_uniform_length": "RL without uniform-length selection",
         "controls/rl_without_rebalance": "RL without rebalancing",
         "controls/rl_without_anneal": "RL without annealing",
         "controls/rl_without_remedies": "RL without all three"}  # fmt: skip

Row = Mapping[str, Any]


def collect(run: Path) -> dict[str, Any]:
    """What of a run's results.json (and controls.json) is kept. ValueError for a run that is not complete."""
    if not (run / "results.json").exists():
        raise ValueError(
            f"{run}: no results.json; `phimini recipe` writes it when all stages are complete"
        )
    results = read_json(run / "results.json")
    controls = run / "controls" / "controls.json"
    kept = (*FIELDS, "num_problems", "num_samples", "peak_rss_bytes", "versions")
    return {key: results[key] for key in kept} | {
        "commit": _commit(),
        "controls": read_json(controls)["arms"] if controls.exists() else [],
    }


def tables(rows: Sequence[Row]) -> str:
    """The stages of each seed, then the control arms, as Markdown."""
    parts = [_stages(rows)]
    if any(row["controls"] for row in rows):
        parts.append(_controls(rows))
    return "\n\n".join(parts)


def _stages(rows: Sequence[Row]) -> str:
    head = "| seed | after | mean@8 | gain | greedy | pass@8 | steps | tokens | seconds | CPU seconds |"
    lines = [head, "|" + "---|" * 10]
    for row in rows:
        for stage in row["stages"][1:]:
            lines.append(
                f"| {row['seed']} | {NAMES[stage['stage']]} | {stage['mean_at_8']:.3f} {_interval(stage['ci95'])} "
                f"| {stage['gain']:+.3f} {_interval(stage['gain_ci95'], '+')} | {stage['greedy']:.3f} "
                f"| {stage['pass_at_8']:.3f} | {stage['steps']:,} | {stage['tokens']:,} | {stage['seconds']:.0f} "
                f"| {stage['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


def _controls(rows: Sequence[Row]) -> str:
    lines = ["| seed | arm | mean@8 | gain over SFT | against RL (stage 4) | greedy | pass@8 | steps | CPU seconds |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        for arm in row["controls"]:
            if arm["arm"] == "sft":
                continue
            lines.append(
                f"| {row['seed']} | {NAMES[arm['arm']]} | {arm['mean_at_8']:.3f} {_interval(arm['ci95'])} "
                f"| {arm['gain_over_sft']:+.3f} {_interval(arm['gain_ci95'], '+')} "
                f"| {arm['against_rlvr']:+.3f} {_interval(arm['against_rlvr_ci95'], '+')} | {arm['greedy']:.3f} "
                f"| {arm['pass_at_8']:.3f} | {arm['steps']:,} | {arm['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


def _interval(ends: Sequence[float], sign: str = "") -> str:
    low, high = (f"{end:{sign}.3f}" for end in ends)
    return f"[{low}, {high}]"


def _commit() -> str:
    done = subprocess.run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.strip()


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for a run that is not complete."""
    try:
        new = [collect(Path(run)) for run in argv]
    except ValueError as error:
        print(f"phimini: bench ladder: {error}", file=sys.stderr)
        return 2
    old = read_rows(ROWS, FIELDS) if ROWS.exists() else []
    by_seed = {row["seed"]: row for row in [*old, *new]}
    rows = [by_seed[seed] for seed in sorted(by_seed)]
    if new:
        ROWS.parent.mkdir(exist_ok=True)
        write_rows(ROWS, rows)
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
