"""Stage 2, supervised fine-tuning: a compact, balanced subset, not packed, with loss on the answer and its end.

Not packed: a step is a number of examples, not a budget of tokens, and each example is a sequence of
its own that ends with `<|end|><|endoftext|>`, "where the model is taught to decide where to stop
generating" (arXiv 2504.21233). The sequences of a micro-batch are computed without padding between them.
"""

import math
from pathlib import Path

from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import PackedBatch, check_same_data, pack
from phimini.parallel.training.step import start_step
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.packing import (
    EpochSampler,
    Example,
    derive,
    documents,
    flops_of,
    micro_batches,
)
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


def sft(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Train stage 1's model on the tokens of curate/sft.jsonl, into the folder sft/. Collective.

    redo: begin again even if the stage is complete. Raises ValueError for bad rows or settings, Stopped if interrupted.
    """
    stage = Stage.begin(run, "sft", world, redo=redo)
    if stage.complete:
        return
    fine_tune(run, world, stage, "midtrain", Path(run.out) / "tokenize" / "sft")


def fine_tune(
    run: RunConfig,
    world: World,
    stage: Stage,
    start: str,
    tokens: Path,
    *,
    steps: int | None = None,
) -> None:
    """Train the model of stage `start` on the token set in the folder `tokens`, into `stage`. Collective.

    steps: default `sft.epochs` passes over the examples.
    """
    config = run.sft
    examples, held_out = open_tokens(run, world, start, tokens)
    limit = config.sequence_length
    check_tokens(world, stage.name, (examples, held_out), limit, "sft.sequence_length")
    check_trained_shares(run.guards, world, stage.name, examples.trained_shares, examples.name_of)
    model, tokenizer = load_model(run, world, start)
    if steps is None:
        steps = max(1, math.ceil(config.epochs * len(examples) / config.examples_per_step))
    optimizer = start_optimizer(run, model, config.optimizer, steps)
    sampler = EpochSampler(len(examples), config.examples_per_step, derive(run.seed, "sft"))
    order = shared_array(stage, world, "steps", lambda: sampler.batches(steps))

    def batches(some: list[Example]) -> list[PackedBatch]:
        """Return this rank's micro-batches of whole examples."""
        lengths = list(map(len, some))
        costs = [flops_of([length], model.config) for length in lengths]
        make = lambda part: pack(documents(part), multiple_of=world.token_multiple)
        return micro_batches(some, lengths, costs, config.micro_tokens, world, make)

    def of_step(index: int) -> tuple[list[PackedBatch], list[int]]:
        """Return this rank's micro-batches, and the digests of the whole step."""
        some = [examples[i] for i in order[index]]
        return batches(some), [example.digest() for example in some]

    ahead = Ahead(of_step, steps)
    validation = batches(list(held_out))
    summary = lambda steps: {
        "examples": len(examples),
        "epochs": steps * config.examples_per_step / len(examples),
    }
    with training_steps(stage, model, optimizer, tokenizer, steps, config.checkpoint_every, {}, summary) as remaining:  # fmt: skip
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
