"""The command `phimini plan`: its arguments, a plan as text for a person, and as JSON for a program

phimini plan RECIPE [stage=NAME] [gpu=h100] [gpus=8] [--json PATH]
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from phimini.model.config import ModelConfig
from phimini.model.suggest import nearest
from phimini.parallel.plan.layouts import MFUS, Plan, Workload, plan_stage
from phimini.parallel.plan.memory import GIB, GPUS


def describe(plan: Plan) -> str:
    """For a person: GiB of each layout, and of each of its phases and parts."""
    per_step, before = plan.workload.samples_per_step, plan.workload.samples_before
    lines = [
        f"{plan.workload.stage}: {plan.tokens_per_step} tokens per step on {plan.world_size} x {plan.gpu.name}, "
        f"{plan.flops_per_token / 1e9:.2f} GFLOP per token",
        *(
            f"  at {mfu:.0%} MFU: {plan.tokens_per_second_per_gpu(mfu):,.0f} tokens/s per GPU, "
            f"{plan.seconds_per_step(mfu):.1f} s per step"
            for mfu in MFUS
        ),
        *(
            [f"  samples up to {per_step:,} answers per step and {before:,} before the first"]
            if per_step or before
            else []
        ),
        "fits:" if plan.fits else f"does not fit: {plan.because}",
    ]
    for planned in plan.layouts:
        shape = " ".join(
            f"{name}={value}"
            for name, value in asdict(planned.layout).items()
            if value not in (1, False, "auto")
        )
        lines.append(
            f"  {shape or 'one GPU'} recompute={planned.recompute}: {planned.peak_bytes / GIB:.1f} GiB"
        )
        for phase, parts in planned.phases.items():
            listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
            lines.append(f"    {phase} {sum(parts.values()) / GIB:.1f} GiB: {listed}")
    lines += ["assumptions:", *(f"  {a}" for a in plan.assumptions)]
    return "\n".join(lines)


def main(arguments: list[str], config: ModelConfig, workloads: Mapping[str, Workload]) -> int:
    """`[stage=NAME] [gpu=NAME] [gpus=N] [--json PATH]` for a recipe's model and stages; 0 if all fits, else 1.

    Without `stage` every stage is planned; the JSON is then that of the stage that needs the most memory,
    fits if all do, and has each one's under "stages". Raises ValueError for unknown words and values.
    """
    values, path = _parse(arguments)
    gpu_name, stage = values.get("gpu", "h100"), values.get("stage")
    if gpu_name not in GPUS:
        raise ValueError(f"plan gpu={gpu_name}: {nearest(gpu_name, GPUS)}")
    if stage is not None and stage not in workloads:
        raise ValueError(f"plan stage={stage}: {nearest(stage, workloads)}")
    if not values.get("gpus", "8").isdecimal():
        raise ValueError(f"plan gpus={values['gpus']}: expected a number")
    world_size = int(values.get("gpus", "8"))
    chosen = [workloads[stage]] if stage is not None else list(workloads.values())
    plans = [plan_stage(config, w, GPUS[gpu_name], world_size) for w in chosen]
    for plan in plans:
        print(describe(plan))
    fits = all(plan.fits for plan in plans)
    if path is not None:
        largest = max(plans, key=lambda plan: plan.layouts[0].peak_bytes)
        document = largest.to_json() | {"fits": fits}
        if len(plans) > 1:
            document["stages"] = {plan.workload.stage: plan.to_json() for plan in plans}
        try:
            path.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"plan --json {path}: cannot be written: {error.strerror}") from error
    return 0 if fits else 1


def _parse(arguments: list[str]) -> tuple[dict[str, str], Path | None]:
    values, path = {}, None
    words = iter(arguments)
    for word in words:
        key, separator, value = word.partition("=")
        if word == "--json":
            following = next(words, None)
            if following is None:
                raise ValueError("plan --json: expected a path after it")
            path = Path(following)
        elif separator and key in ("stage", "gpu", "gpus"):
            values[key] = value
        else:
            raise ValueError(
                f"plan: unknown argument {word!r}; {nearest(key, ('stage', 'gpu', 'gpus', '--json'))}"
            )
    return values, path
