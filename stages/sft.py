"""Stage 2, supervised fine-tuning: a compact, balanced subset, not packed, loss on the answer and its end.

Not packed: a step is a number of examples, not a budget of tokens, and each example is a sequence of
its own that ends with `<|end|><|endoftext|>`, "where the model is taught to decide where to stop
generating" (arXiv 2504.21233). The sequences of a micro-batch are computed without padding between them.
"""

import math
from pathlib import Path

from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import pack
from phimini.parallel.training.same_data import check_same_data
from phimini.parallel.training.step import forward_backward
from phimini.stages.config.schema import RunConfig
from phimini.stages.config.seeds import derive
from phimini.stages.data.packing import (
    EpochSampler,
    Example,
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


def sft(run: RunConfig, world: World, *, redo: bool = False) -> None:
    stage = Stage.begin(run, "sft", world, redo=redo)
    if stage.complete:
        return
    fine_tune(run, world, stage, "midtrain", Path(run.out) / "curate" / "sft.jsonl")


def fine_tune(
    run: RunConfig, world: World, stage: Stage, start: str, rows: Path, *, steps: int | None = None
) -> None:
    """Train the model of stage `start` on `rows`, for `sft.epochs` or `steps`, into `stage`."""
    config = run.sft
    model, tokenizer = load_model(run, world, start)
    examples = read_examples(rows, tokenizer, run.chat_template)
    held_out = read_examples(
        Path(run.out) / "distill" / "validation.jsonl", tokenizer, run.chat_template
    )
    check_lengths(examples + held_out, config.sequence_length, "sft.sequence_length")
    digests = [example.digest() for example in examples]
    check_same_data(
        world, f"{stage.name}, before step 1", [digests, [example.digest() for example in held_out]]
    )
    if steps is None:
        steps = max(1, math.ceil(config.epochs * len(examples) / config.examples_per_step))
    optimizer = start_optimizer(run, model, config.optimizer, steps)
    sampler = EpochSampler(len(examples), config.examples_per_step, derive(run.seed, "sft"))

    def batch(some: list[Example]) -> list:
        """This rank's micro-batches, examples of like length together."""
        costs = [flops_of([len(example)], model.config) for example in some]
        make = lambda part: pack(documents(part), multiple_of=world.layout.token_multiple)
        return micro_batches(some, costs, config.micro_examples, world, make)

    validation = batch(held_out)
    state = {"tokens": 0}
    progress = Progress(stage, world, model, optimizer, config.checkpoint_every, state)
    step = progress.resume()
    log = MetricsLog(stage.path / "metrics.jsonl", steps, stage.name, world.is_main, run)
    with log, Interrupt() as interrupt:
        while step < steps:
            optimizer.zero_grad()
            indices = sampler.batch(step)
            microbatches = batch([examples[i] for i in indices])
            items = [digests[i] for i in indices]
            check_same_data(world, f"{stage.name}, step {step + 1}", items, microbatches)
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
            log.write(step - 1, **row)
            progress.after_step(step, step == steps, interrupt)
        progress.finish(
            tokenizer,
            {
                "steps": step,
                "examples": len(examples),
                "epochs": steps * config.examples_per_step / len(examples),
            },
            interrupt,
        )
