"""Parts that the four training stages share: data, model, optimizer, the steps with their log and checkpoints."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels import linear_cross_entropy, linear_logprob
from phimini.model.io.checked_files import read_sealed
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import atomic_file
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.attention.core import attention_name
from phimini.parallel.checkpoint.save_load import (
    PendingCheckpoint,
    begin_checkpoint,
    latest_step,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.fp8 import Fp8, choose
from phimini.parallel.megatron.hf_weights import export_hf, load_hf
from phimini.parallel.megatron.layers import main_grad_of
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World, on_every, on_main
from phimini.parallel.training.batch import PackedBatch, check_same_data
from phimini.parallel.training.optimizer import (
    Optimizer,
    OptimizerConfig,
    build_optimizer,
)
from phimini.parallel.training.step import StepMetrics, forward_only
from phimini.stages.config.schema import OptimizerSettings, RunConfig
from phimini.stages.data.packing import check_lengths
from phimini.stages.data.token_files import TokenSet, fingerprint
from phimini.stages.run.guards import Guards, GuardStop
from phimini.stages.run.metrics import MetricsLog
from phimini.stages.run.outputs import METRICS, SUMMARY, TOKENIZED
from phimini.stages.run.stage_folder import PACKING, Interrupt, Stage, Stopped

Row = dict[str, Any]
T = TypeVar("T")


def open_tokens(
    run: RunConfig, world: World, start: str, folder: Path, *, loss_on_question: bool = False
) -> tuple[TokenSet, TokenSet]:  # fmt: skip
    """Return the token set in `folder` and the one of the validation, both mapped. Collective.

    start: the stage whose model is trained. loss_on_question: train on the question's tokens too. Raises ValueError if
    tokenizer, chat template, a setting or a file is not that which the tokens were made with.
    """
    out = Path(run.out)

    def opened() -> tuple[TokenSet, TokenSet]:
        stage = Stage.open(run, "tokenize")
        made = read_sealed(stage.path / SUMMARY)["fingerprint"]
        model = out / start / "model"
        tokenizer = Tokenizer.load(model)
        for name, sha256 in fingerprint(tokenizer, tokenizer.chat_template).items():
            if made[name] != sha256:
                raise ValueError(
                    f"{stage.path}: was made with another {name} (sha256 {made[name]:.12}) than that of {model} "
                    f"({sha256:.12}); run `phimini tokenize` with --redo"
                )
        validation = out / TOKENIZED["validation"]
        rows = out / TOKENIZED.get(folder.name, f"{folder.relative_to(out)}.jsonl")
        return (
            TokenSet(folder, rows, loss_on_question=loss_on_question),
            TokenSet(stage.path / "validation", validation, loss_on_question=loss_on_question),
        )

    return on_every(world, opened)


def check_tokens(
    world: World, stage: str, sets: Iterable[TokenSet], limit: int, field: str
) -> None:
    """Check, before step 1, that examples have at most `limit` tokens and are the same on every rank. Collective.

    field: the setting that `limit` comes from. Raises ValueError, or DivergedError on every rank.
    """
    for tokens in sets:
        check_lengths(tokens.lengths, limit, field, tokens.name_of)
    check_same_data(world, f"{stage}, before step 1", [tokens.digest() for tokens in sets])


def shared_array(
    stage: Stage, world: World, name: str, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Return an array that rank 0 makes and writes into the stage's folder, and that every rank maps. Collective."""
    path = stage.path / PACKING / f"{name}.npy"

    def write() -> None:
        with atomic_file(path) as file:
            np.save(file, make())

    on_main(world, write)
    return np.load(path, mmap_mode="r")


def fp8_of(run: RunConfig, device: torch.device | None = None) -> Fp8 | None:
    """Return the FP8 recipe that `fp8` and `fp8_recipe` choose on this machine, or None.

    Raises ValueError that names the recipes of the machine.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose(run.fp8, run.fp8_recipe, device)


def layout_of(run: RunConfig) -> Layout:
    """Return the run's layout, before the number of ranks is known."""
    fp8 = fp8_of(run)
    return Layout(
        tensor=run.tensor_parallel,
        pipeline=run.pipeline_parallel,
        virtual_pipeline=run.virtual_pipeline,
        context=run.context_parallel,
        context_keys=run.context_keys,
        sequence_parallel=run.sequence_parallel,
        token_alignment=fp8.token_alignment if fp8 is not None else 1,
    )


def load_model(run: RunConfig, world: World, stage: str) -> tuple[Model, Tokenizer]:
    """Return the model of the complete stage `stage`, on this run's layout, and its tokenizer. Collective."""
    directory = Path(run.out) / stage / "model"
    model = build_model(
        load_config(directory),
        world,
        seed=None,
        recompute=run.recompute,
        distributed_optimizer=run.distributed_optimizer,
        overlap=run.overlap,
        fp8=fp8_of(run, world.device),
    )
    load_hf(model, directory)
    return model, Tokenizer.load(directory)


def start_optimizer(
    run: RunConfig, model: Model, settings: OptimizerSettings, steps: int
) -> Optimizer:
    """Return the optimizer of a stage of `steps` steps; warm-up ends before the last one."""
    config = OptimizerConfig(
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        warmup_steps=min(round(settings.warmup_ratio * steps), steps - 1),
        total_steps=steps,
        decay=settings.decay,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        clip=settings.clip,
    )
    return build_optimizer(model, config, distributed=run.distributed_optimizer)


class Progress:
    """The checkpoints of a training stage: resume, save when due or when stopped, export at the end.

    every: steps between checkpoints. state: JSON values that the loop needs after a resume, beside model, optimizer
    and step. A checkpoint is written while training goes on; it is complete once every rank has written its part.
    """

    def __init__(
        self, stage: Stage, world: World, model: Model, optimizer: Optimizer, every: int, state: Row
    ) -> None:
        self.stage, self.world, self.model, self.optimizer = stage, world, model, optimizer
        self.every, self.state = every, state
        self.path = stage.path / "checkpoints"
        self.pending: PendingCheckpoint | None = None

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one. Return the number of steps that are done. Collective.

        Rank 0 prints the name of the attention kernel.
        """
        if self.world.is_main:
            print(
                f"{self.stage.name}: attention by {attention_name(self.world.device)}", flush=True
            )
        self.state |= {"seconds": 0.0, "cpu_seconds": 0.0}
        if latest_step(self.path) is None:
            return 0
        step, state = load_checkpoint(self.path, self.model, self.optimizer)
        files = state.pop("files")
        on_main(self.world, lambda: self.stage.go_on_with(files))
        set_rng_state(state.pop("rng"))
        self.state.update(state)
        if self.world.is_main:
            print(f"{self.stage.name}: going on after step {step}", flush=True)
        return step

    def after_step(self, step: int, last: bool, interrupt: Interrupt, guard: str | None) -> None:
        """Save a checkpoint if one is due after `step` steps. Collective.

        guard: why a guard stops the run. Raises GuardStop, after saving, if there is such a reason; Stopped if the run was asked
        to stop, after the last step `finish` does.
        """
        asked = interrupt.requested(self.world) or guard is not None
        due = guard is not None or not last and (asked or step % self.every == 0)
        if self.pending is not None:
            written = self.world.all_gather_objects(self.pending.is_written())
            if last or due or all(written):
                self.pending.finish()
                self.pending = None
        if due:
            if self.world.is_main:
                self.stage.note(METRICS)
            extra = self.state | self.time_spent() | {"rng": rng_state(), "files": self.stage.made}
            if asked or not self.stage.run.background_checkpoints:
                save_checkpoint(self.path, step, self.model, self.optimizer, extra=extra)
            else:
                self.pending = begin_checkpoint(
                    self.path, step, self.model, self.optimizer, extra=extra
                )
        if guard is not None:
            raise GuardStop(
                f"{guard}; saved after step {step}: the same command goes on, also with other guards"
            )
        if asked and not last:
            raise Stopped(
                f"{self.stage.name} stopped after step {step} and saved; the same command goes on from there"
            )

    def time_spent(self) -> dict[str, float]:
        """Return wall seconds, and processor seconds of all ranks, in this stage, including interrupted processes."""
        cpu = sum(self.world.all_gather_objects(time.process_time() - self.stage.started_cpu_s))
        return {
            "seconds": self.state["seconds"] + time.perf_counter() - self.stage.started_s,
            "cpu_seconds": self.state["cpu_seconds"] + cpu,
        }

    def finish(self, tokenizer: Tokenizer, summary: Row, interrupt: Interrupt) -> None:
        """Export the model as a Hugging Face folder and mark the stage complete. Collective.

        Raises Stopped, after that, if the run was asked to stop: the steps since the last checkpoint are only there.
        """
        directory = self.stage.path / "model"
        export_hf(self.model, directory, tokenizer=tokenizer)
        spent = self.time_spent()
        on_main(self.world, lambda: self.stage.finish(self.state | spent | summary))
        if interrupt.requested(self.world):
            raise Stopped(
                f"{self.stage.name} is complete; the same command goes on with what follows"
            )


@dataclass(slots=True)
class Step:
    """One step of a stage, in which the loop trains and fills in `row`."""

    index: int
    """counted from 0"""
    name: str
    """for error messages, e.g. `sft, step 3`"""
    is_last: bool
    """no step follows; the loop may set it to end early"""
    guards: Guards
    row: Row = field(default_factory=dict)
    """the step's metrics, with `tokens`; logged after the step"""

    def allows(self, values: Mapping[str, float]) -> bool:
        """Return False if a guard holds this step's update back, for one of these metrics. Collective; see `Guards.allow`."""
        return self.guards.allow(self.name, self.index, values, self.row)

    def update(self, optimizer: Optimizer, metrics: StepMetrics, num_tokens: int) -> None:
        """Make the update, unless a guard holds it back; fill in the row with means, learning rate and gradient norm. Collective.

        num_tokens: of all ranks.
        """
        watched = {"loss": metrics.loss}
        info = optimizer.step(lambda grad_norm: self.allows(watched | {"grad_norm": grad_norm}))
        of_update = {"lr": info.lr, "grad_norm": info.grad_norm, "tokens": num_tokens}
        self.row = means(metrics) | of_update | self.row


class Ahead(Generic[T]):
    """Batches of a stage's steps, each made while the step before it runs on the GPU."""

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        """make: a function of the step's index alone. steps: their number."""
        self._make, self._steps = make, steps
        self._made: dict[int, T] = {}

    def prepare(self, index: int) -> None:
        """Make the batch of step `index`, if there is such a step."""
        if index < self._steps:
            self._made = {index: self._make(index)}

    def take(self, index: int) -> T:
        """Return the batch of step `index`, made now unless it was prepared. Raises AssertionError for another's."""
        if not self._made:
            self.prepare(index)
        assert list(self._made) == [index], (
            f"step {index} would train on the batch of {list(self._made)}"
        )
        return self._made.pop(index)


@contextmanager
def training_steps(
    stage: Stage,
    model: Model,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    steps: int,
    checkpoint_every: int,
    state: Row,
    summary: Callable[[int], Row],
) -> Iterator[Iterator[Step]]:
    """Resume the stage, and give the steps that are left; log and save after each; export after the last. Collective.

        with training_steps(...) as remaining:
            for step in remaining:
                ...
                step.update(optimizer, metrics, num_tokens)

    state: JSON values of the loop that a checkpoint keeps; `tokens` is added. summary: fields of the stage's
    summary.json, by the number of steps that were made. Raises Stopped when the run was asked to stop, GuardStop by a guard.
    """
    state |= {"tokens": 0, "guards": {}}
    progress = Progress(stage, model.world, model, optimizer, checkpoint_every, state)
    done = progress.resume()
    guards = Guards(stage.run.guards, model.world, state["guards"])
    kept = stage.made[METRICS]["bytes"] if METRICS in stage.made else 0
    log = MetricsLog(stage.path / METRICS, steps, stage.name, model.world.is_main, stage.run, kept)
    with log, Interrupt() as interrupt:

        def remaining() -> Iterator[Step]:
            nonlocal done
            is_last = done >= steps
            while not is_last:
                step = Step(done, f"{stage.name}, step {done + 1}", done + 1 == steps, guards)
                yield step
                done, is_last = done + 1, step.is_last
                state["tokens"] += step.row["tokens"]
                log.write(step.index, **step.row)
                progress.after_step(done, is_last, interrupt, guards.stop)

        yield remaining()
        state["guards"] = guards.counts
        progress.finish(tokenizer, {"steps": done} | summary(done), interrupt)


def cross_entropy_head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed next-token loss, the number of trained tokens, and sums for the log; see `step.Head`."""
    loss, metrics = linear_cross_entropy(
        hidden_MD, weight_VD, batch.targets_T, group=group, main_grad=main_grad_of(weight_VD)
    )
    sums = {"accuracy": metrics.accuracy_sum, "entropy": metrics.entropy_sum}
    return loss, metrics.num_rows, sums


def means(metrics: StepMetrics) -> Row:
    """Return the loss and every other sum of a step, divided by its count."""
    return {"loss": metrics.loss} | {
        name: total / metrics.count for name, total in metrics.metrics.items()
    }


def validation_loss(model: Model, microbatches: list[PackedBatch], world: World) -> float:
    """Return the mean negative log-likelihood per target token, over all data ranks' micro-batches. Collective."""

    def nll(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        logp_M = linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M
        return torch.stack([-logp_M.double().sum(), (batch.targets_T >= 0).sum().double()])

    parts = [torch.zeros(2).double()]
    if microbatches:
        parts = forward_only(model, microbatches, nll, summed=True)
    total, count = sum_over_data(torch.stack(parts).sum(0), world).tolist()
    return total / count


def sum_over_data(x: Tensor, world: World) -> Tensor:
    """Return the sum of the data ranks' `x`, on each of them. Collective."""
    total = x.to(world.device)
    if world.data_size > 1:
        dist.all_reduce(total, group=world.data_group)
    return total
