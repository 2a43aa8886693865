"""Stage 1, mid-training: all verified-correct rollouts of the teacher, packed into rows, for several epochs.

Documents of a row do not attend to one another, and each starts at position 0. Training ends at the step
budget, or when the held-out validation loss has stopped falling ("until performance saturates on a
validation dataset", arXiv 2504.21233).
"""

import math
from pathlib import Path

from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import PackedBatch, check_same_data, pack
from phimini.parallel.training.step import start_step
from phimini.stages.config.schema import MidtrainConfig, RunConfig
from phimini.stages.data.packing import (
    EpochSampler,
    Example,
    Rows,
    best_fit,
    derive,
    documents,
    flops_of,
    micro_batches,
)
from phimini.stages.data.token_files import TokenSet
from phimini.stages.run.guards import check_trained_shares
from phimini.stages.run.stage_folder import Stage
from phimini.stages.run.training import (
    Ahead,
    check_tokens,
    cross_entropy_head,
    load_model,
    open_tokens,
    shared_array,
    start_optimizer,
    training_steps,
    validation_loss,
)


def midtrain(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Train the base model on the tokens of curate/midtrain.jsonl, into the folder midtrain/. Collective.

    redo: begin again even if the stage is complete. Raises ValueError for bad rows or settings, Stopped if interrupted.
    """
    config, out = run.midtrain, Path(run.out)
    stage = Stage.begin(run, "midtrain", world, redo=redo)
    if stage.complete:
        return
    folder = out / "tokenize" / "midtrain"
    examples, held_out = open_tokens(
        run, world, "base", folder, loss_on_question=config.loss_on_question
    )
    limit = config.sequence_length
    check_tokens(world, stage.name, (examples, held_out), limit, "midtrain.sequence_length")
    check_trained_shares(
        run.guards, world, stage.name, examples.trained_shares, examples.name_of, all_tokens=config.loss_on_question
    )  # fmt: skip
    model, tokenizer = load_model(run, world, "base")
    rows = packed_rows(stage, world, examples, limit)
    steps = step_budget(config, len(rows))
    optimizer = start_optimizer(run, model, config.optimizer, steps)
    sampler = EpochSampler(len(rows), config.rows_per_step, derive(run.seed, "midtrain"))
    order = shared_array(stage, world, "steps", lambda: sampler.batches(steps))

    def batches(some: list[list[Example]]) -> list[PackedBatch]:
        """Return this rank's micro-batches of packed rows."""
        costs = [flops_of([len(e) for e in row], model.config) for row in some]
        make = lambda part: pack(
            documents([e for row in part for e in row]),
            multiple_of=world.token_multiple,
        )
        return micro_batches(some, [1] * len(some), costs, config.micro_rows, world, make)

    packed = best_fit(held_out.lengths, limit)
    validation = batches([[held_out[i] for i in row] for row in packed])
    summary = lambda steps: {
        "documents": len(examples),
        "packing_efficiency": int(examples.lengths.sum()) / (len(rows) * limit),
        "epochs": steps * config.rows_per_step / len(rows),
    }

    def of_step(index: int) -> tuple[list[PackedBatch], list[list[int]]]:
        """Return this rank's micro-batches, and the digests of the whole step."""
        some = [[examples[i] for i in rows[r]] for r in order[index]]
        return batches(some), [[example.digest() for example in row] for row in some]

    ahead = Ahead(of_step, steps)
    state = {"best_validation_loss": None, "validations_since_best": 0}
    with training_steps(stage, model, optimizer, tokenizer, steps, config.checkpoint_every, state, summary) as remaining:  # fmt: skip
        for step in remaining:
            optimizer.zero_grad()
            microbatches, digests = ahead.take(step.index)
            check_same_data(world, step.name, digests, microbatches)
            running = start_step(model, microbatches, cross_entropy_head)
            ahead.prepare(step.index + 1)
            metrics = running.metrics()
            step.update(optimizer, metrics, int(metrics.count))
            if (step.index + 1) % config.validate_every == 0 or step.is_last:
                step.row["validation_loss"] = validation_loss(model, validation, world)
                note_validation(state, step.row["validation_loss"])
            if config.stop == "saturation" and state["validations_since_best"] >= config.patience:
                step.is_last = True


def packed_rows(stage: Stage, world: World, examples: TokenSet, limit: int) -> Rows:
    """Return the examples in packed rows, which rank 0 computes from their lengths. Collective."""
    rows = best_fit(examples.lengths, limit) if world.is_main else None
    made = lambda field: shared_array(stage, world, field, lambda: getattr(rows, field))
    return Rows(made("documents"), made("ends"))


def step_budget(config: MidtrainConfig, num_rows: int) -> int:
    """Return `steps`, or the number of steps of `epochs` passes over the rows. Raises ValueError for both or neither."""
    if (config.steps is None) == (config.epochs is None):
        raise ValueError(
            f"midtrain: expected either steps or epochs, got steps={config.steps} and epochs={config.epochs}"
        )
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, math.ceil(config.epochs * num_rows / config.rows_per_step))


def note_validation(state: dict, loss: float) -> None:
    """Update the best validation loss in `state`, and the number of validations since."""
    best = state["best_validation_loss"]
    improved = best is None or loss < best
    state["best_validation_loss"] = loss if improved else best
    state["validations_since_best"] = 0 if improved else state["validations_since_best"] + 1
