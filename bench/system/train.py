"""A training step of the real stages: its speed, the share of each phase, its memory.

    phimini bench train [midtrain|sft|dpo|rlvr ...] [--run DIR] [--steps N] [--quick] [--profile DIR] [--json PATH] [key=value ...]

Runs the stages themselves for a few steps. The phases are the marks of `parallel/ranks/timing.py`, which every run
has. Layout and sizes are the recipe's fields, e.g. `processes=2 tensor_parallel=2`; under torchrun each rank takes part.
With `--run` the stages start from the models of a finished run, which is only read. Without it they start from a new
model, whose answers in stage 4 get a random reward (after the verifier's real work).

FLOPs are counted as in `model/config.py` (multiply-add is 2, causal attention within the real documents, recomputation
and rollouts not counted), over all phases but rollout, verify and sync. MFU is relative to the device's dense bf16 peak,
whatever the precision, and is left out for a device without a known peak. On a CPU the yardstick is an fp32 matrix
product of 1024, measured between the steps. Seconds are wall time on a GPU (the marks synchronise) and the ranks' CPU
time on a CPU. Synchronising undoes overlap on a GPU: half of the steps are marked, for the shares, and half are not, for
the speed. Peak memory is from torch's allocator on a GPU, and on a CPU the bytes that one step allocates.
"""

import contextlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phimini.bench.gate.options import at_least_one, finish, parser
from phimini.bench.gate.peak_memory import AllocationMeter, peak_rss_bytes
from phimini.bench.gate.rows import Row
from phimini.bench.gate.yardsticks import gemm_factors, gemm_flops
from phimini.bench.system.train_rows import RankResult, describe, make_row
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.timing import Recorder, phase
from phimini.parallel.ranks.world import World, initialize
from phimini.stages.base import base_config
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.data.packing import derive
from phimini.stages.recipe import DATA, TRAINING
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.stage_folder import INPUTS
from phimini.stages.run.training import layout_of
from phimini.stages.verify import verdict as scorer

STAGES = {"midtrain": "midtrain", "sft": "sft", "dpo": "rollout_dpo", "rlvr": "rlvr"}
WARM_UP = 3
"""uncounted steps at the start"""
STEPS = {"midtrain": 100, "sft": 60, "dpo": 30, "rlvr": 8}
QUICK_STEPS = {"midtrain": 24, "sft": 16, "dpo": 10, "rlvr": 10}
QUICK = ["rlvr.prompts_per_step=8", "rlvr.probe_prompts=16", "rlvr.max_new_tokens=48", "rlvr.min_rollouts=8"]  # fmt: skip
SMALL_DATA = [
    "distill.num_problems=600", "distill.num_prompts=300", "distill.num_heldout=24", "distill.num_validation=24",
    "curate.sft_examples=600", "rlvr.probe_prompts=128",
]  # fmt: skip
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_into_tensor_coalesced",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "broadcast", "reduce", "gather",
    "scatter", "alltoall", "alltoall_base", "send", "recv", "barrier",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where a loss or a gradient is not finite."""
    options = parser("train", __doc__)
    options.add_argument("words", nargs="*", metavar="stage | key=value")
    options.add_argument("--run", type=Path, help="start from the models of this finished run")
    options.add_argument("--steps", type=at_least_one, help="steps that count; default: by stage")
    options.add_argument("--quick", action="store_true", help="few steps, few rollouts")
    options.add_argument("--profile", type=Path, help="write a trace of two steps into this folder")
    args = options.parse_intermixed_args(argv)  # stages before the options, key=value after them
    assignments = [word for word in args.words if "=" in word]
    stages = [word for word in args.words if "=" not in word] or list(STAGES)
    if unknown := [stage for stage in stages if stage not in STAGES]:
        options.error(f"{unknown[0]}: expected one of {', '.join(STAGES)}, or key=value")
    rows, is_first = [], os.environ.get("RANK", "0") == "0"
    for stage in stages:
        rows.append(bench(stage, assignments, args.run, args.steps, args.quick, args.profile))
        if is_first:
            print(describe(rows[-1]), flush=True)
    return finish(args.json if is_first else None, rows)


def bench(
    stage: str,
    assignments: list[str],
    source: Path | None = None,
    steps: int | None = None,
    quick: bool = False,
    profile: Path | None = None,
) -> Row:
    """Time one stage of the tiny recipe with the fields of `assignments`."""
    num_steps = steps or (QUICK_STEPS if quick else STEPS)[stage]
    # Four more: one under the memory meter, two under the profiler, and the last one, which validates.
    total = WARM_UP + num_steps + 4
    with _shared_folder() as folder:
        settings = ["processes=1", *(SMALL_DATA if source is None else []), *(QUICK if quick else [])]  # fmt: skip
        run = override(recipe_config("tiny"), [*settings, *assignments, f"out={folder}"])
        if os.environ.get("RANK", "0") == "0":
            prepare(run, STAGES[stage], source)
        return _launch(
            measure_stage, run, stage, total, num_steps, profile, source is None and stage == "rlvr"
        )


def _launch(fn: Callable[..., Row], run: RunConfig, *args: Any) -> Row:
    if "RANK" in os.environ:
        return fn(run, *args)
    return run_ranks(fn, run.processes, run, *args)[0]


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """Yield a temporary folder; under torchrun one named by the job's port, which all ranks of the machine share."""
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
            yield Path(folder)
        return
    folder = Path(tempfile.gettempdir()) / f"phimini-bench-{os.environ['MASTER_PORT']}"
    yield folder
    if os.environ["RANK"] == "0":
        shutil.rmtree(folder, ignore_errors=True)


def prepare(run: RunConfig, stage: str, source: Path | None) -> None:
    """Make the inputs of `stage`: small data and a new model, or links to a finished run's."""
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    needed = {"distill", "curate", "base", "tokenize", *INPUTS[stage]}
    if source is not None:
        for name in sorted(needed):
            if not (source / name / "summary.json").exists():
                raise ValueError(f"--run {source}: expected a finished stage {name}, found none")
            (out / name).symlink_to((source / name).resolve())
        return
    for name, make in DATA.items():
        if not (out / name).exists():
            with contextlib.redirect_stdout(sys.stderr):
                make(run)
    for name in sorted(needed - DATA.keys()):
        (out / name).mkdir()
        (out / name / "model").symlink_to((out / "base" / "model").resolve())
        write_summary(out / name, {"id": name})


def _for_steps(run: RunConfig, stage: str, total: int) -> RunConfig:
    """Return `run` with exactly `total` steps of `stage`, without validations and checkpoints."""
    never = 10**9
    settings = [f"{STAGES[stage]}.checkpoint_every={never}"]
    lines = lambda name: len((Path(run.out) / "curate" / name).read_text().splitlines())
    if stage in ("midtrain", "sft"):
        settings.append(f"{stage}.validate_every={never}")
    if stage == "sft":
        epochs = (total - 0.5) * run.sft.examples_per_step / lines("sft.jsonl")
        settings.append(f"sft.epochs={epochs}")
    elif stage == "dpo":
        epochs = (total + 0.5) * run.rollout_dpo.pairs_per_step / lines("pairs.jsonl")
        settings += [
            f"rollout_dpo.epochs={epochs}",
            "rollout_dpo.pairs=teacher",
            f"rollout_dpo.pairs_per_prompt={never}",
        ]
    else:
        settings.append(f"{stage}.steps={total}")
    return override(run, settings)


def measure_stage(
    run: RunConfig, stage: str, total: int, num_steps: int, profile: Path | None, coin: bool
) -> Row:
    """Run the stage on one rank and return the row of all ranks."""
    run = _for_steps(run, stage, total)
    world = initialize(layout_of(run), base_config(run), seed=run.seed)
    watcher = _Watcher(world, stage, num_steps, profile)
    recorder = Recorder(world.device, lambda done: watcher.after_step(done, recorder))
    with _coin_rewards(coin), timed_collectives(), recorder:
        # The stages' own output would hide the bench's lines.
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            TRAINING[STAGES[stage]](run, world)
    # Uncounted: warm-up, the metered and the profiled steps, and the last one, which validates.
    steps = recorder.steps[WARM_UP : WARM_UP + num_steps]
    unmarked = 0 if world.device.type == "cpu" else num_steps // 2
    mine = RankResult(
        steps=steps[unmarked:],
        marked=steps[: unmarked or None],
        gemm_flops=watcher.gemm_flops[unmarked:],
        peak_bytes=watcher.peak_bytes(),
        peak_rss_bytes=peak_rss_bytes(),
        model_size=world.layout.model_size,
    )
    ranks = world.all_gather_objects(mine)
    logged = [
        json.loads(line)
        for line in (Path(run.out) / STAGES[stage] / "metrics.jsonl").read_text().splitlines()
    ]
    trained = [row for row in logged if "loss" in row]
    reward = "coin" if coin else "verified"
    row = make_row(run, stage, world, ranks, trained, reward if stage == "rlvr" else None)
    world.barrier()
    world.close()
    return row


class _Watcher:
    """Measure between the steps: the yardstick, the memory of one step, the trace of two."""

    def __init__(self, world: World, stage: str, num_steps: int, profile: Path | None) -> None:
        self.gemm_flops: list[float] = []
        self._device, self._world, self._stage = world.device, world, stage
        self._last = WARM_UP + num_steps
        self._profile = profile
        self._meter = AllocationMeter()
        self._profiler: Any = None
        self._factors = gemm_factors(world.device)

    def after_step(self, done: int, recorder: Recorder) -> None:
        cuda = self._device.type == "cuda"
        if done == WARM_UP + (self._last - WARM_UP) // 2:
            recorder.exact = False
        if done == WARM_UP and cuda:
            torch.cuda.reset_peak_memory_stats()
        if WARM_UP < done <= self._last:
            self.gemm_flops.append(gemm_flops(*self._factors))
        if not cuda and done == self._last:
            self._meter.__enter__()
        if not cuda and done == self._last + 1:
            self._meter.__exit__(None, None, None)
        if self._profile is not None and done == self._last + 1:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()
        if self._profiler is not None and done == self._last + 3:
            self._profiler.stop()
            assert self._profile is not None
            self._profile.mkdir(parents=True, exist_ok=True)
            path = self._profile / f"{self._stage}-rank{self._world.rank}.trace.json.gz"
            self._profiler.export_chrome_trace(str(path))
            print(f"trace: {path}", file=sys.stderr, flush=True)
            self._profiler = None

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self._meter.peak_bytes


@contextlib.contextmanager
def timed_collectives() -> Iterator[None]:
    """Mark communication between ranks as a phase, at the process groups: Megatron keeps references to some functions of
    torch.distributed, so replacing those would miss calls."""
    names = [(dist.Work, "wait"), *((dist.ProcessGroup, name) for name in COLLECTIVES)]
    # Static: an attribute bound to its class would not be a method once it is put back.
    real = [(kind, name, inspect.getattr_static(kind, name)) for kind, name in names]
    for kind, name, _ in real:
        setattr(kind, name, phase("communication")(getattr(kind, name)))
    try:
        yield
    finally:
        for kind, name, function in real:
            setattr(kind, name, function)


@contextlib.contextmanager
def _coin_rewards(on: bool) -> Iterator[None]:
    """Replace the rewards by random ones after the verifier's work: a new model's answers are all wrong."""
    real = scorer.is_right

    def is_right(question: str, answer: str, response: str, finish_reason: str) -> bool:
        real(question, answer, response, finish_reason)
        return derive(0, "coin", response, question) % 3 == 0

    if on:
        scorer.is_right = is_right
    try:
        yield
    finally:
        scorer.is_right = real


if __name__ == "__main__":
    sys.exit(main())
