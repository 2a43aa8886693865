"""Write bench/results/README.md: every committed measurement as a table, with its date, machine and commit.

The text around the tables is bench/results/README.md.j2. With directories of complete runs, their results first replace
the rows of the same seed in bench/results/ladder.jsonl, the table of accuracy. A test compares the page with the rows.
"""

import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy import stats

from phimini.bench.gate.compare import BASELINES
from phimini.bench.gate.environment import environment
from phimini.bench.gate.options import parser
from phimini.bench.gate.rows import Row, read
from phimini.bench.peers.command import TARGETS
from phimini.model.io.checked_files import read_sealed
from phimini.model.io.json_files import read_rows, write_rows, write_text

RESULTS = Path(__file__).parent / "results"
PAGE, TEMPLATE = "README.md", "README.md.j2"
NAMES = {"midtrain": "mid-training", "sft": "SFT", "rollout_dpo": "Rollout DPO", "rlvr": "RL",
         "controls/sft_continued": "SFT continued", "controls/rejection_sft": "SFT on own correct rollouts",
         "controls/rl_without_dpo": "RL without DPO",
         "controls/rl_without_uniform_length": "RL without uniform-length selection",
         "controls/rl_without_rebalance": "RL without rebalancing",
         "controls/rl_without_anneal": "RL without annealing",
         "controls/rl_without_remedies": "RL without all three"}  # fmt: skip
FP8_ARMS = ("fp32 again", "fp32 nudged", "tensorwise", "blockwise")
BENCHES = ("train", "rollout", "weight-sync", "data", "kernels", "scaling", "sampler", "verifier")
LADDER_FIELDS = {"seed": int, "stages": list, "machine": str, "date": str, "wall_seconds": float}
Json = Mapping[str, Any]


def page(results: Path = RESULTS, baselines: Path = BASELINES) -> str:
    """Return the text of the page from the rows in `results` and `baselines`."""
    rows = {
        name: read_rows(results / f"{name}.jsonl", {})
        for name in ("ladder", "engines", "peers", "fp8_stage1")
    }
    sampler, verifier = (read(results / f"{name}.jsonl") for name in ("sampler", "verifier"))
    tables = {
        "ladder_origin": _origins(rows["ladder"]),
        "ladder": ladder(rows["ladder"]),
        "controls": controls(rows["ladder"]),
        "engine_runs": engine_runs(rows["engines"]),
        "engines": engines(rows["engines"]),
        "peers": peers(rows["peers"]),
        "fp8": fp8(rows["fp8_stage1"]),
        "sampler": speeds(sampler),
        "verifier": speeds(verifier),
        "verifier_per_cpu_second": " and ".join(
            f"{row.info['verdicts_per_cpu_second']:,.0f} {row.case['answers']}" for row in verifier
        ),
        "scaling": scaling(results / "scaling" / "scaling.csv"),
        "speed": "\n\n".join(
            speeds([row for path in sorted(folder.glob("*.jsonl")) for row in read(path)])
            for folder in sorted(baselines.iterdir())
            if any(folder.glob("*.jsonl"))
        ),
    }
    loader = jinja2.FileSystemLoader(results)
    template = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return template.get_template(TEMPLATE).render(tables)


def markdown(head: str, lines: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; `head` names its columns, separated by |."""
    names = [name.strip() for name in head.split("|")]
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) with Student's 95 % interval."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return statistics.fmean(values), float(low), float(high)


def _band(values: Sequence[float], form: str = ".3f") -> str:
    """Format (middle, low, high)."""
    middle, low, high = (f"{value:{form}}" for value in values)
    return f"{middle} [{low}, {high}]"


def _origins(rows: Sequence[Json]) -> str:
    origins = {f"{row['machine']}, {row['date']}, commit {row['commit']}" for row in rows}
    return "; ".join(sorted(origins))


# --- accuracy --------------------------------------------------------------------------------------
def ladder(rows: Sequence[Json]) -> str:
    head = "seed | after | mean@8 | gain | greedy | pass@8 | steps | tokens | seconds | CPU seconds"
    return markdown(head, (
        (row["seed"], NAMES[s["stage"]], _band([s["mean_at_8"], *s["ci95"]]),
         _band([s["gain"], *s["gain_ci95"]], "+.3f"), f"{s['greedy']:.3f}", f"{s['pass_at_8']:.3f}", f"{s['steps']:,}",
         f"{s['tokens']:,}", f"{s['seconds']:.0f}", f"{s['cpu_seconds']:.0f}")
        for row in rows for s in row["stages"][1:]
    ))  # fmt: skip


def summary(rows: Sequence[Json]) -> str:
    """Return the table of the top README: mean@8 after each stage, a line for each seed."""
    head = " | ".join(["seed", *(NAMES[s["stage"]] for s in rows[0]["stages"][1:])])
    return markdown(head, (
        (row["seed"], *(_band([s["mean_at_8"], *s["ci95"]]) for s in row["stages"][1:])) for row in rows
    ))  # fmt: skip


def controls(rows: Sequence[Json]) -> str:
    head = "seed | arm | mean@8 | gain over SFT | against RL (stage 4) | greedy | pass@8 | steps | CPU seconds"
    return markdown(head, (
        (row["seed"], NAMES[arm["arm"]], _band([arm["mean_at_8"], *arm["ci95"]]),
         _band([arm["gain_over_sft"], *arm["gain_ci95"]], "+.3f"),
         _band([arm["against_rlvr"], *arm["against_rlvr_ci95"]], "+.3f"), f"{arm['greedy']:.3f}",
         f"{arm['pass_at_8']:.3f}", f"{arm['steps']:,}", f"{arm['cpu_seconds']:.0f}")
        for row in rows for arm in row["controls"] if arm["arm"] != "sft"
    ))  # fmt: skip


def collect(run: Path) -> dict[str, Any]:
    """Return the ladder row of a run. ValueError for a run that is not complete."""
    if not (run / "results.json").exists():
        raise ValueError(f"{run}: no results.json; `phimini recipe` writes it after each stage")
    results, arms = read_sealed(run / "results.json"), run / "controls" / "controls.json"
    last = results["stages"][-1]["stage"]
    if last != "rlvr":
        raise ValueError(
            f"{run / 'results.json'}: expected all stages up to rlvr, the last is {last}"
        )
    kept = (*LADDER_FIELDS, "num_problems", "num_samples", "peak_rss_bytes", "versions")
    return {key: results[key] for key in kept} | {
        "commit": (environment().commit or "unknown")[:7],
        "controls": read_sealed(arms)["arms"] if arms.exists() else [],
    }


# --- engines ---------------------------------------------------------------------------------------
def engine_runs(rows: Sequence[Json]) -> str:
    """Return the whole runs of each seed; vLLM's are compared with the local one, paired by problem."""
    runs = [row for row in rows if row["kind"] == "recipe"]
    local = {row["seed"]: row["per_problem_mean"] for row in runs if row["engine"] == "local"}
    lines = []
    for row in sorted(runs, key=lambda row: (row["seed"], row["engine"] != "local")):
        pairs = zip(row["per_problem_mean"], local[row["seed"]], strict=True)
        against = _band(mean_interval([a - b for a, b in pairs]), "+.3f")
        lines.append((
            row["seed"], row["engine"], _band(row["dpo"]), _band(row["rl"]), "" if row["engine"] == "local" else against,
            row["steps"], f"{row['mismatch_max']:.0e}", row["max_age"], row["machine"], row["date"],
        ))  # fmt: skip
    head = "seed | stages 3 and 4 sample with | after DPO | after RL | vs local | updates | max dlogp | max age | machine | date"
    return markdown(head, lines)


def engines(rows: Sequence[Json]) -> str:
    """Return vLLM - local, where both sample one model and after RL from one model."""
    lines: list[tuple[str, ...]] = []
    for row in (row for row in rows if row["kind"] == "same model"):
        unit = f"{row['prompts']} prompts, {row['samples']} answers each"
        for name, difference in row["difference"].items():
            means = (f"{row['means'][engine][name]:.3f}" for engine in ("local", "vllm"))
            lines.append((f"same model, {row['what']}: {name}", unit, *means, _band(difference, "+.3f")))  # fmt: skip
    local, vllm = (
        np.array([
            [correct / row["samples"] for correct in row["correct"]]
            for row in rows if row["kind"] == "after RL" and row["engine"] == engine
        ])
        for engine in ("local", "vllm")
    )  # fmt: skip
    runs = [f"{len(s)} runs from {s.mean(1).min():.3f} to {s.mean(1).max():.3f}" for s in (local, vllm)]  # fmt: skip
    difference = _band(run_difference(local, vllm), "+.3f")
    lines.append(("mean@16 after RL", " and ".join(runs), f"{local.mean():.3f}", f"{vllm.mean():.3f}", difference))  # fmt: skip
    return markdown("question | unit | local | vLLM | vLLM - local", lines)


def run_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of second - first, each (runs, problems), with a bootstrapped 95 % interval.

    A draw takes the same problems for all runs and the runs of each side independently. `scipy.stats.bootstrap` does
    not resample two axes. With few runs the interval is too narrow, by sqrt(1 - 1 / runs) in the runs' part.
    """
    rng, draws = np.random.default_rng(0), []
    for _ in range(4000):
        problems = rng.integers(0, first.shape[1], first.shape[1])
        a, b = (s[rng.integers(0, len(s), len(s))].mean(0)[problems].mean() for s in (first, second))  # fmt: skip
        draws.append(b - a)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(second.mean() - first.mean()), float(low), float(high)


# --- peers, FP8 ------------------------------------------------------------------------------------
def peers(rows: Sequence[Json]) -> str:
    lines = []
    for ours, trl in zip(rows[::2], rows[1::2], strict=True):
        mib = " and ".join(f"{row['peak_rss_bytes'] / 2**20:,.0f}" for row in (ours, trl))
        loss = " and ".join(f"{row['first_loss']:.6f}" for row in (ours, trl))
        rates = (f"{ours['per_cpu_second']:,.1f}", f"{trl['per_cpu_second']:,.1f} {ours['unit']} per CPU second")  # fmt: skip
        lines.append((ours["task"], *rates, f"{ours['ratio']:.2f}", TARGETS[ours["task"]], f"{mib} MiB", loss))  # fmt: skip
    head = (
        "task | ours | TRL | ratio | target | peak memory, ours and TRL | loss of one batch, both"
    )
    return markdown(head, lines)


def fp8(rows: Sequence[Json]) -> str:
    """Return, per arm, the relative difference of the loss from fp32 of the same seed, in per cent."""
    base = {(row["steps"], row["seed"]): row for row in rows if row["arm"] == "fp32"}
    mean = lambda row: statistics.fmean(row["tenths"])
    lines = []
    for steps in sorted({row["steps"] for row in rows}):
        for arm in FP8_ARMS:
            pairs = [(r, base[steps, r["seed"]]) for r in rows if (r["steps"], r["arm"]) == (steps, arm)]  # fmt: skip
            if not pairs:
                continue
            found = [
                [mean(r) / mean(b) for r, b in pairs],
                [r["tenths"][-1] / b["tenths"][-1] for r, b in pairs],
                [r["validation_loss"] / b["validation_loss"] for r, b in pairs],
                [b["same_state"][arm] / b["same_state"]["fp32"] for _, b in pairs if arm in b.get("same_state", ())],
                [b["same_weights"][arm] / b["same_weights"]["own"] for _, b in pairs if arm in b["same_weights"]],
                [r["same_weights"]["own"] / r["same_weights"]["fp32"] for r, _ in pairs if r["same_weights"]],
            ]  # fmt: skip
            cells = [values and _per_cent(values) or "" for values in found]
            commits = " and ".join(sorted({r["commit"] for pair in pairs for r in pair}))
            lines.append((f"{steps:,}", arm, len(pairs), *cells, commits))
    head = (
        "steps | arm | seeds | mean over the stage | last tenth | validation at the end | 20 steps from the same state "
        "| same weights | same weights, trained in FP8 | commits"
    )
    return markdown(head, lines)


def _per_cent(ratios: Sequence[float]) -> str:
    mean, low, high = mean_interval([100 * (ratio - 1) for ratio in ratios])
    return f"{mean:+.2f} % [{low:+.2f}, {high:+.2f}]"


# --- speed -----------------------------------------------------------------------------------------
def scaling(path: Path) -> str:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return markdown("axis | x | median (p20 to p80) | of a matrix product | memory of a step", (
        (row["axis"], f"{int(row['x']):,}",
         f"{float(row['p50']):,.0f} ({float(row['p20']):,.0f} to {float(row['p80']):,.0f}) {row['unit']}",
         row["share_of_gemm"], f"{int(row['peak_bytes']) / 2**20:.1f} MiB" if row["peak_bytes"] else "")
        for row in rows
    ))  # fmt: skip


def speeds(rows: Sequence[Row]) -> str:
    """Return our rows on one device as a table below a line with its environment."""
    ours = [row for row in rows if row.provider == "phimini" and row.value is not None]
    ours.sort(key=lambda row: (BENCHES.index(row.bench), row.key))
    head = "bench | case | median (p20 to p80) | relative to | memory"
    return f"{_environment(ours)}\n\n{markdown(head, map(_speed, ours))}"


def _environment(rows: Sequence[Row]) -> str:
    environments = [row.environment for row in rows if row.environment]
    here = environments[0]
    dates = " and ".join(sorted({e.date for e in environments}))
    commits = " and ".join(sorted({(e.commit or "unknown")[:7] for e in environments}))
    power = "" if here.power_cap_w is None else f", {here.power_cap_w:.0f} W"
    versions = ", ".join(f"{k} {here.versions[k]}" for k in ("torch", "triton", "megatron-core", "vllm") if here.versions.get(k))  # fmt: skip
    rounds = sorted({len(row.samples) for row in rows})
    return (
        f"{here.device}{power}, threads {here.threads}, {dates}, commit {commits}, {versions}, "
        f"{rounds[0]} to {rounds[-1]} rounds."
    )


def _speed(row: Row) -> tuple[str, ...]:
    assert row.value is not None
    digits = 0 if row.value.p50 >= 1000 else 1 if row.value.p50 >= 10 else 3
    p20, p50, p80 = (f"{v:,.{digits}f}" for v in (row.value.p20, row.value.p50, row.value.p80))
    return (
        row.bench,
        ", ".join(f"{k} {v}" for k, v in row.case.items()),
        f"{p50} ({p20} to {p80}) {row.unit}",
        "" if row.ratio is None else f"{row.ratio.p50:.3g} of {row.reference}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
    )


def main(argv: list[str] | None = None) -> int:
    """Return 0. ValueError for a run that is not complete."""
    options = parser("readme", __doc__, json=False)
    options.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--baselines", type=Path, default=BASELINES)
    args = options.parse_args(argv)
    if new := [collect(run) for run in args.runs]:
        path = args.results / "ladder.jsonl"
        rows = {row["seed"]: row for row in [*read_rows(path, LADDER_FIELDS), *new]}
        write_rows(path, [rows[seed] for seed in sorted(rows)])
        print(f"README.md, for these rows:\n{summary([rows[seed] for seed in sorted(rows)])}")
    write_text(args.results / PAGE, page(args.results, args.baselines))
    print(f"wrote {args.results / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
