"""First choice of a whole run: one layout and recompute mode that serve every stage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from phimini.model.config import ModelConfig
from phimini.parallel.plan.layouts import Plan, plan_stage
from phimini.parallel.plan.memory import Recompute
from phimini.parallel.plan.rates import Gpu
from phimini.parallel.plan.workload import Workload
from phimini.parallel.ranks.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A layout that fits every stage, and the predicted time of the run at it."""

    layout: Layout
    recompute: Recompute
    gpu_hours: float
    """predicted, of the stages' training steps; sampling is not in it"""

    def __str__(self) -> str:
        return f"{shape_of(self.layout)} recompute={self.recompute}, {self.gpu_hours:,.0f} GPU hours of training predicted"


def choices(
    config: ModelConfig, workloads: Mapping[str, Workload], steps: Mapping[str, int], gpu: Gpu, world_size: int
) -> list[Choice]:  # fmt: skip
    """Return the layouts and recompute modes that fit every stage, with the lowest sum of predicted times first.

    steps: of each stage. Raises ValueError as `plan_stage`.
    """
    plans = {
        name: plan_stage(config, workload, gpu, world_size, best=10_000)
        for name, workload in workloads.items()
    }
    hours = {name: _hours(plan, steps[name]) for name, plan in plans.items()}
    common = set.intersection(*(set(of_stage) for of_stage in hours.values()))
    found = [
        Choice(
            layout=layout, recompute=recompute,
            gpu_hours=sum(of_stage[layout, recompute] for of_stage in hours.values()),
        )
        for layout, recompute in common
    ]  # fmt: skip
    return sorted(found, key=lambda choice: (choice.gpu_hours, choice.layout.model_size))


def shape_of(layout: Layout) -> str:
    """Return a layout's sizes as words."""
    words = (f"{n}={v}" for n, v in asdict(layout).items() if v not in (1, False, "auto"))
    return " ".join(words) or "one GPU"


def _hours(plan: Plan, steps: int) -> dict[tuple[Layout, Recompute], float]:
    """Return the predicted GPU hours of a stage at each layout that fits it."""
    return {
        (p.layout, p.recompute): steps * p.time.total * plan.world_size / 3600
        for p in plan.layouts
        if p.fits
    }
