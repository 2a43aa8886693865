"""`phimini plan`: a plan as text for a person, and as JSON for a program."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from phimini.model.config import ModelConfig
from phimini.model.suggest import nearest
from phimini.parallel.plan.choice import choices, shape_of
from phimini.parallel.plan.layouts import Plan, plan_stage
from phimini.parallel.plan.rates import GIB, GPUS
from phimini.parallel.plan.workload import Workload


def describe(plan: Plan) -> str:
    """Return a plan as text: GiB of each layout, and of each of its phases and parts."""
    per_step, before = plan.workload.samples_per_step, plan.workload.samples_before
    lines = [
        f"{plan.workload.stage}: {plan.tokens_per_step} tokens per step on {plan.world_size} x {plan.gpu.name}, "
        f"{plan.flops_per_token / 1e9:.2f} GFLOP per token",
        *(
            [f"  samples up to {per_step:,} answers per step and {before:,} before the first"]
            if per_step or before
            else []
        ),
        "fits:" if plan.fits else f"does not fit: {plan.because}",
    ]
    for planned in plan.layouts:
        lines.append(
            f"  {shape_of(planned.layout)} recompute={planned.recompute}: {planned.peak_bytes / GIB:.1f} GiB; predicted "
            f"{planned.time.total:.2f} s per step, {plan.tokens_per_second_per_gpu(planned):,.0f} tokens/s per GPU, MFU "
            f"{plan.mfu(planned):.1%}"
        )
        if planned.engine is not None:
            lines.append(
                f"    engine: {planned.engine.sequences} sequences at once, {planned.engine.share:.2f} of the memory"
            )
        for phase, parts in planned.phases.items():
            listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
            lines.append(f"    {phase} {sum(parts.values()) / GIB:.1f} GiB: {listed}")
    lines += ["assumptions:", *(f"  {a}" for a in plan.assumptions)]
    return "\n".join(lines)


def print_plans(
    config: ModelConfig,
    workloads: Mapping[str, Workload],
    gpu: str,
    gpus: int,
    json_path: str | None = None,
    steps: Mapping[str, int] | None = None,
) -> int:
    """Print a plan of each workload on `gpus` GPUs; return 0 if all fit, else 1.

    steps: of each stage of a whole run, whose first choice of a layout is printed too. The JSON is that of the stage that needs the most memory. Of several stages its "fits" is true if all fit, and
    "stages" holds each one's. Raises ValueError for an unknown GPU and for a file that cannot be written.
    """
    if gpu not in GPUS:
        raise ValueError(f"plan gpu={gpu}: {nearest(gpu, GPUS)}")
    plans = [plan_stage(config, workload, GPUS[gpu], gpus) for workload in workloads.values()]
    for plan in plans:
        print(describe(plan))
    fits = all(plan.fits for plan in plans)
    whole = choices(config, workloads, steps, GPUS[gpu], gpus) if steps is not None else []
    if steps is not None:
        print(f"first choice for all stages: {whole[0]}" if whole else "no layout fits every stage")
    if json_path is not None:
        largest = max(plans, key=lambda plan: plan.layouts[0].peak_bytes)
        document = largest.to_json() | {"fits": fits}
        if len(plans) > 1:
            document["stages"] = {plan.workload.stage: plan.to_json() for plan in plans}
        if steps is not None:
            document["first_choice"] = asdict(whole[0]) if whole else None
        try:
            Path(json_path).write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise ValueError(
                f"plan json={json_path}: cannot be written: {error.strerror}"
            ) from error
    return 0 if fits else 1
