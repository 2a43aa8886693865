"""Stage 1, mid-training: every verified-correct rollout, packed into rows, for several epochs.

Documents of a row do not see each other and each starts at position 0. Training ends at the step
budget, or when the held-out validation loss has stopped falling ("until performance saturates on a
validation dataset", arXiv 2504.21233).
"""

import math
from pathlib import Path

from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import pack
from phimini.parallel.training.same_data import check_same_data
from phimini.parallel.training.step import forward_backward
from phimini.stages.config.schema import MidtrainConfig, RunConfig
from phimini.stages.config.seeds import derive
from phimini.stages.data.packing import (
    EpochSampler,
    best_fit,
    check_lengths,
    documents,
    flops_of,
    micro_batches,
)
from phimini.stages.run.metrics import MetricsLog
from phimini.stages.run.stage_folder import Interrupt, Stage
from phimini.stages.run.training import (
    Progress,
    cross_entropy_head,
    load_model,
    means,
    read_examples,
    start_optimizer,
    validation_loss,
)


def midtrain(run: RunConfig, world: World, *, redo: bool = False) -> None:
    config = run.midtrain
    stage = Stage.begin(run, "midtrain", world, redo=redo)
    if stage.complete:
        return
    model, tokenizer = load_model(run, world, "base")

    curated, distilled = Path(run.out) / "curate", Path(run.out) / "distill"
    read = lambda path: read_examples(
        path, tokenizer, run.chat_template, loss_on_question=config.loss_on_question
    )
    examples, held_out = read(curated / "midtrain.jsonl"), read(distilled / "validation.jsonl")
    check_lengths(examples + held_out, config.sequence_length, "midtrain.sequence_length")
    digests = [example.digest() for example in examples]
    check_same_data(
        world, "midtrain, before step 1", [digests, [example.digest() for example in held_out]]
    )
    rows = best_fit([len(e) for e in examples], config.sequence_length)
    steps = step_budget(config, len(rows))
    optimizer = start_optimizer(run, model, config.optimizer, steps)
    sampler = EpochSampler(len(rows), config.rows_per_step, derive(run.seed, "midtrain"))

    def batch(some_rows: list[list[int]], of: list) -> list:
        """This rank's micro-batches of packed rows."""
        costs = [flops_of([len(of[i]) for i in row], model.config) for row in some_rows]
        make = lambda part: pack(
            documents([of[i] for row in part for i in row]),
            multiple_of=world.layout.token_multiple,
        )
        return micro_batches(some_rows, costs, config.micro_rows, world, make)

    validation = batch(best_fit([len(e) for e in held_out], config.sequence_length), held_out)
    state = {"tokens": 0, "best_validation_loss": None, "validations_since_best": 0}
    progress = Progress(stage, world, model, optimizer, config.checkpoint_every, state)
    step = progress.resume()
    log = MetricsLog(stage.path / "metrics.jsonl", steps, stage.name, world.is_main, run)
    with log, Interrupt() as interrupt:
        done = False
        while not done:
            optimizer.zero_grad()
            chosen = [rows[i] for i in sampler.batch(step)]
            microbatches = batch(chosen, examples)
            items = [[digests[i] for i in row] for row in chosen]
            check_same_data(world, f"midtrain, step {step + 1}", items, microbatches)
            metrics = forward_backward(model, microbatches, cross_entropy_head)
            info = optimizer.step()
            step += 1
            state["tokens"] += int(metrics.count)
            row = means(metrics) | {
                "lr": info.lr,
                "grad_norm": info.grad_norm,
                "tokens": int(metrics.count),
            }
            if step % config.validate_every == 0 or step == steps:
                row["validation_loss"] = validation_loss(model, validation, world)
                note_validation(state, row["validation_loss"])
            saturated = state["validations_since_best"] >= config.patience
            done = step == steps or (config.stop == "saturation" and saturated)
            log.write(step - 1, **row)
            progress.after_step(step, done, interrupt)
        progress.finish(
            tokenizer,
            {
                "steps": step,
                "documents": len(examples),
                "packing_efficiency": sum(map(len, examples))
                / (len(rows) * config.sequence_length),
                "epochs": step * config.rows_per_step / len(rows),
            },
            interrupt,
        )


def step_budget(config: MidtrainConfig, num_rows: int) -> int:
    """`steps`, or what `epochs` passes over the rows take. ValueError for both or neither."""
    if (config.steps is None) == (config.epochs is None):
        raise ValueError(
            f"midtrain: expected either steps or epochs, got steps={config.steps} and epochs={config.epochs}"
        )
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * num_rows / config.rows_per_step))


def note_validation(state: dict, loss: float) -> None:
    """Count the validations since the best one."""
    best = state["best_validation_loss"]
    improved = best is None or loss < best
    state["best_validation_loss"] = loss if improved else best
    state["validations_since_best"] = 0 if improved else state["validations_since_best"] + 1
