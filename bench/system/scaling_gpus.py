"""The paper's recipe on 8 to 1,024 H100: a table from `parallel/plan/layouts.py`, with its assumptions. Nothing here was measured"""

import csv
from dataclasses import asdict, replace
from pathlib import Path

from phimini.model.config import preset
from phimini.parallel.plan.layouts import Plan, Workload, plan_stage
from phimini.parallel.plan.memory import GIB, GPUS
from phimini.stages.config.recipes import recipe_config
from phimini.stages.run.workloads import workloads

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
MFU = 0.45
ROWS_PER_GPU = 16
COLUMNS = ["stage", "batch", "gpus", "layout", "recompute", "num_microbatches", "peak_gib", "fits",
           "tokens_per_step", "overhead", "planned_tokens_per_second", "planned_seconds_per_step", "because"]  # fmt: skip


def write_gpus(folder: Path) -> None:
    """gpus.csv, and gpus.md with what it rests on."""
    rows, assumptions = table()
    with (folder / "gpus.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "The recipe phi4_mini_reasoning on H100, planned and not measured (`phimini bench scaling --out DIR`).",
        "",
        "| stage | batch | GPUs | layout | recompute | GiB per GPU | tokens/s | s per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = [row["layout"], row["recompute"], row["peak_gib"], row["planned_tokens_per_second"],
                 row["planned_seconds_per_step"]]  # fmt: skip
        if row["fits"] != "True":
            shown = ["does not fit: " + row["because"], "", row["peak_gib"], "", ""]
        lines.append("| " + " | ".join([row["stage"], row["batch"], row["gpus"], *shown]) + " |")
    lines += ["", "Assumptions:", "", *(f"- {a}" for a in assumptions)]
    (folder / "gpus.md").write_text("\n".join(lines) + "\n")


def table() -> tuple[list[dict[str, str]], list[str]]:
    """(rows, assumptions): each stage with the recipe's batch, and mid-training with a batch that grows."""
    run = recipe_config("phi4_mini_reasoning")
    rows, assumptions = [], {}
    for workload in workloads(run).values():
        for gpus in COUNTS:
            cases = {"recipe": workload}
            if workload.stage == "midtrain":
                cases[f"{ROWS_PER_GPU} rows per GPU"] = replace(workload, rows_per_step=ROWS_PER_GPU * gpus)  # fmt: skip
            for name, case in cases.items():
                row, stated = _row(case, name, gpus)
                rows.append(row)
                assumptions |= dict.fromkeys(stated)
    rows.sort(key=lambda row: (row["stage"] != "midtrain", row["stage"], row["batch"] != "recipe"))
    own = [
        f"tokens/s are {MFU:.0%} MFU divided by the plan's estimated overhead of the layout (tensor and context "
        "parallelism, the pipeline's bubble, recomputation); 45 % is a goal for one H100, not a measurement",
        "batch `recipe`: the paper's batch, split ever finer, up to more tensor, context and pipeline parallelism; "
        "no slow-down of the network with the number of nodes, no stragglers, no time for data or checkpoints",
        "rlvr is its training part: rollouts, verification and weight sync are not in it",
    ]
    return rows, own + list(assumptions)


def _row(workload: Workload, batch: str, gpus: int) -> tuple[dict[str, str], list[str]]:
    row = dict.fromkeys(COLUMNS, "") | {"stage": workload.stage, "batch": batch, "gpus": str(gpus)}
    try:
        plan = plan_stage(preset("phi-4-mini"), workload, GPUS["h100"], gpus, best=1)
    except ValueError as reason:  # the batch has too few rows for so many GPUs
        return row | {"fits": "", "because": str(reason)}, []
    return row | _planned(plan), plan.assumptions


def _planned(plan: Plan) -> dict[str, str]:
    best = plan.layouts[0]
    layout = {k: v for k, v in asdict(best.layout).items() if v not in (1, False, "auto")}
    layout.pop("sequence_parallel", None)
    planned = {
        "layout": " ".join(f"{k}={v}" for k, v in layout.items()),
        "recompute": best.recompute,
        "num_microbatches": str(best.num_microbatches),
        "peak_gib": f"{best.peak_bytes / GIB:.1f}",
        "fits": str(plan.fits),
        "tokens_per_step": str(plan.tokens_per_step),
        "overhead": f"{best.relative_cost:.3f}",
        "because": plan.because or "",
    }
    if plan.fits:
        per_gpu = plan.tokens_per_second_per_gpu(MFU) / best.relative_cost
        planned["planned_tokens_per_second"] = f"{per_gpu * plan.world_size:.0f}"
        planned["planned_seconds_per_step"] = f"{plan.tokens_per_step / (per_gpu * plan.world_size):.2f}"  # fmt: skip
    return planned
