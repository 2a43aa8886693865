"""What the four training stages share: reading examples, loading, saving, batches, the heads."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels import linear_cross_entropy, linear_logprob
from phimini.model.io.chat import TemplateName, encode_example
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer
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
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.optimizer import Optimizer, OptimizerConfig, build_optimizer
from phimini.parallel.training.step import StepMetrics, forward_only
from phimini.stages.config.schema import OptimizerSettings, RunConfig
from phimini.stages.data.packing import Example
from phimini.stages.run.stage_folder import Interrupt, Stage, Stopped

Row = dict[str, Any]


def read_examples(
    path: Path, tokenizer: Tokenizer, template: TemplateName, *, loss_on_question: bool = False
) -> list[Example]:
    """The rows' `question` and `response` as examples whose ids name file and line."""
    rows = read_rows(path, {"question": str, "response": str})
    examples = []
    for line, row in enumerate(rows, 1):
        tokens, loss_from = encode_example(tokenizer, row["question"], row["response"], template)
        examples.append(Example(f"{path}:{line}", tokens, 0 if loss_on_question else loss_from))
    return examples


def fp8_of(run: RunConfig, device: torch.device | None = None) -> Fp8 | None:
    """What `fp8` and `fp8_recipe` mean on this machine; ValueError says what it can do."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return choose(run.fp8, run.fp8_recipe, device)


def layout_of(run: RunConfig) -> Layout:
    """The run's layout, before the number of ranks is known."""
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
    """The model that `stage` of this run ended with, on this run's layout, and its tokenizer."""
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
    """Return the optimizer of a stage of `steps` steps, the last of which is never one of warm-up."""
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
    """A training stage's place: resumes from its checkpoints, saves when due or when stopped, exports at the end.

    `state` is what the loop wants back after a resume beside model, optimizer and step; plain JSON.
    A checkpoint that was due is written while training goes on, and counts from the first step after which
    every rank has written its part.
    """

    def __init__(
        self, stage: Stage, world: World, model: Model, optimizer: Optimizer, every: int, state: Row
    ) -> None:
        self.stage, self.world, self.model, self.optimizer = stage, world, model, optimizer
        self.every, self.state = every, state
        self.path = stage.path / "checkpoints"
        self.pending: PendingCheckpoint | None = None

    def resume(self) -> int:
        """The step to go on from: 0, or that of the newest checkpoint, which is loaded."""
        self.state |= {"seconds": 0.0, "cpu_seconds": 0.0}
        if latest_step(self.path) is None:
            return 0
        step, state = load_checkpoint(self.path, self.model, self.optimizer)
        set_rng_state(state.pop("rng"))
        self.state.update(state)
        if self.world.is_main:
            print(f"{self.stage.name}: going on after step {step}", flush=True)
        return step

    def after_step(self, step: int, last: bool, interrupt: Interrupt) -> None:
        """Save when due. Raises Stopped, after saving, when the run was asked to stop; after the last step `finish` does."""
        asked = interrupt.requested(self.world)
        due = not last and (asked or step % self.every == 0)
        if self.pending is not None:
            written = self.world.all_gather_objects(self.pending.is_written())
            if last or due or all(written):
                self.pending.finish()
                self.pending = None
        if due:
            extra = self.state | self.time_spent() | {"rng": rng_state()}
            if asked or not self.stage.run.background_checkpoints:
                save_checkpoint(self.path, step, self.model, self.optimizer, extra=extra)
            else:
                self.pending = begin_checkpoint(
                    self.path, step, self.model, self.optimizer, extra=extra
                )
        if asked and not last:
            raise Stopped(
                f"{self.stage.name} stopped after step {step} and saved; the same command goes on from there"
            )

    def time_spent(self) -> dict[str, float]:
        """Wall seconds, and processor seconds of all ranks, in this stage; those of interrupted processes included."""
        cpu = sum(self.world.all_gather_objects(time.process_time() - self.stage.started_cpu_s))
        return {
            "seconds": self.state["seconds"] + time.perf_counter() - self.stage.started_s,
            "cpu_seconds": self.state["cpu_seconds"] + cpu,
        }

    def finish(self, tokenizer: Tokenizer, summary: Row, interrupt: Interrupt) -> None:
        """Export the model as a Hugging Face folder and mark the stage complete. Raises Stopped, after that, when the run was
        asked to stop: the steps since the last checkpoint are saved nowhere else."""
        directory = self.stage.path / "model"
        export_hf(self.model, directory, tokenizer=tokenizer)
        spent = self.time_spent()
        if self.world.is_main:
            self.stage.finish(self.state | spent | summary)
        self.world.barrier()
        if interrupt.requested(self.world):
            raise Stopped(
                f"{self.stage.name} is complete; the same command goes on with what follows"
            )


def cross_entropy_head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token loss, summed; the count is the number of trained tokens."""
    loss, metrics = linear_cross_entropy(hidden_MD, weight_VD, batch.targets_T, group=group)
    sums = {"accuracy": metrics.accuracy_sum, "entropy": metrics.entropy_sum}
    return loss, metrics.num_rows, sums


def means(metrics: StepMetrics) -> Row:
    """The loss and every other sum of a step, divided by its count."""
    return {"loss": metrics.loss} | {
        name: total / metrics.count for name, total in metrics.metrics.items()
    }


def validation_loss(model: Model, microbatches: list[PackedBatch], world: World) -> float:
    """Mean negative log-likelihood per target token over all data ranks' micro-batches."""

    def nll(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        logp_M = linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M
        return torch.stack([-logp_M.double().sum(), (batch.targets_T >= 0).sum().double()])

    parts = [torch.zeros(2).double()]
    if microbatches:
        parts = forward_only(model, microbatches, nll, summed=True)
    total, count = sum_over_data(torch.stack(parts).sum(0), world).tolist()
    return total / count


def sum_over_data(x: Tensor, world: World) -> Tensor:
    """The sum of the data ranks' `x`, on each of them."""
    total = x.to(world.device)
    if world.data_size > 1:
        dist.all_reduce(total, group=world.data_group)
    return total
