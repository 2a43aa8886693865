"""Stage 4, reinforcement learning with verifiable reward: +1 for a verified answer, -1 otherwise.

Group-relative policy gradient (GRPO, arXiv 2402.03300) with asymmetric clipping and a token-level
normaliser (DAPO, arXiv 2503.14476) and the paper's three remedies, each a function in `rl/remedies.py`
with a switch in the config. A group is the answers to one prompt. The sampling temperature is stored with
each rollout and divides the trainer's logits too, so that old and new log-probs are of one policy;
`rl/mismatch.py` measures at every step whether they are.

With rollout.asynchronous the next step's answers are sampled while this step trains.
"""

import dataclasses
import random
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from phimini.model.io.json_files import read_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import IGNORE, Document, PackedBatch, check_same_data, pack
from phimini.parallel.training.optimizer import StepInfo
from phimini.parallel.training.step import StepMetrics, forward_backward, forward_only
from phimini.stages.config.schema import RlvrConfig, RunConfig
from phimini.stages.data.packing import derive, micro_batches
from phimini.stages.data.row_fields import PROBLEM_FIELDS
from phimini.stages.rl.groups import GroupSampler, RolloutSource
from phimini.stages.rl.loss import logps, policy_head, weight_of, with_reference_logps
from phimini.stages.rl.mismatch import (
    ROUNDING,
    Mismatch,
    MismatchError,
    MismatchMeter,
    alarm_level,
    importance_of,
    precision_of,
)
from phimini.stages.rl.mismatch_diagnosis import EXAMINED, Case, diagnose
from phimini.stages.rl.prompt_pool import select_prompts
from phimini.stages.rl.remedies import advantages, is_too_easy, keeps_prompt, rebalance
from phimini.stages.rl.rollout_log import audit_metrics, from_row, waiting_rows, write_rollouts
from phimini.stages.rl.rollouts import Journal, Rollout, costs_of, to_trainers
from phimini.stages.rollout.build import build_engine
from phimini.stages.rollout.engine import RolloutEngine, on_all_ranks, release_memory
from phimini.stages.run.stage_folder import Stage
from phimini.stages.run.training import Row, load_model, start_optimizer, training_steps


def rlvr(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Train stage 3's model on its own verified answers, into the folder rlvr/. Collective.

    redo: begin again even if the stage is complete. Raises as `reinforce`.
    """
    stage = Stage.begin(run, "rlvr", world, redo=redo)
    if stage.complete:
        return
    reinforce(run, world, stage, "rollout_dpo")


def reinforce(run: RunConfig, world: World, stage: Stage, start: str) -> None:
    """Train the model of stage `start` into `stage`. Collective.

    Each step samples groups, judges them, chooses what to train on, takes one policy gradient step and syncs the engine.
    Raises ValueError if no step made an update, MismatchError if sampler and trainer differ, Stopped if interrupted.
    """
    config = run.rlvr
    model, tokenizer = load_model(run, world, start)
    reference = load_model(run, world, start)[0] if config.kl_coef else None
    engine, journal = build_engine(run, model.config, world), Journal(stage.path, run, world)
    give_weights(model, engine, journal)
    source = rollout_source(run, world, stage, engine, tokenizer, journal)
    optimizer = start_optimizer(run, model, config.optimizer, config.steps)
    meter = MismatchMeter()
    rounding = ROUNDING[precision_of(run.rollout, world.device.type == "cuda")]
    head = policy_head(config, meter, rounding, importance_of(run))
    state = {"sampled_tokens": 0, "waiting": [], "unused": {}, "weights": []}
    summary = lambda _: {"updates": model.num_updates, "pool": len(source.pool)}
    with training_steps(stage, model, optimizer, tokenizer, config.steps, config.checkpoint_every, state, summary) as remaining:  # fmt: skip
        if model.num_updates:  # resumed
            journal.weights = dict(state["weights"])
            give_weights(model, engine, journal)
        for step in remaining:
            groups = source.groups(step.index)
            usable = choose(groups, config, derive(run.seed, "rlvr", "choose", step.index))
            write_rollouts(stage, step.index, groups, usable, source.sampler)
            waiting = [from_row(row, source.sampler.prompts, world) for row in state["waiting"]]
            usable = waiting + usable
            chosen = [r for r in usable if r.age(model.num_updates) <= run.rollout.max_staleness]
            step.row = describe(groups, chosen, config, source.temperature(step.index))
            step.row["too_stale"] = len(usable) - len(chosen)
            count_unused(state["unused"], groups, step.row, config)
            state["sampled_tokens"] += sum(r.facts.length for group in groups for r in group)
            # Before anything depends on the rollouts: even their number decides whether there is an update.
            digests = [rollout.digest() for rollout in chosen]
            check_same_data(world, step.name, digests)
            if not step.allows(step.row):
                chosen = []
            del groups, waiting, usable  # their tokens
            if len(chosen) < config.min_rollouts:
                state["waiting"] = waiting_rows(chosen, world)
                optimizer.skip()
            else:
                state["waiting"] = []
                release_memory(engine)
                optimizer.zero_grad()
                chosen = to_trainers(chosen, model)
                microbatches = rollout_batches(chosen, model, config)
                check_same_data(world, step.name, digests, microbatches)
                if reference is not None:
                    microbatches = with_reference_logps(reference, microbatches)
                metrics = forward_backward(model, microbatches, head)
                mismatch = check_mismatch(run, source, chosen, model, engine, meter, stage)
                watched = {"entropy": metrics.metrics["entropy"] / metrics.metrics["rows"]}
                info = optimizer.step(
                    lambda norm, of=watched, step=step: step.allows(of | {"grad_norm": norm})
                )
                step.row |= policy_metrics(metrics, mismatch, info, chosen)
                with phase("sync"):
                    give_weights(model, engine, journal)
            step.row["waiting"] = len(state["waiting"])
            state["weights"] = list(journal.weights.items())
        del state["weights"]
        state["waiting"], unused = len(state["waiting"]), state.pop("unused")  # for the summary
        if not model.num_updates:
            held = sum(count["skipped"] for count in state["guards"]["counts"].values())
            raise ValueError(
                no_update(unused, state["waiting"], held, config, run.rollout.max_staleness)
            )


def give_weights(model: Model, engine: RolloutEngine, journal: Journal) -> None:
    """Sync the engine; the journal knows the weights before an answer has tokens of them. Collective."""
    journal.note_weights(model)
    engine.sync(model)


def rollout_source(
    run: RunConfig,
    world: World,
    stage: Stage,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    journal: Journal,
) -> RolloutSource:
    """Return the source of rollouts to the run's prompts, chosen by remedy 1. Collective."""
    rows = read_rows(Path(run.out) / "distill" / "prompts.jsonl", PROBLEM_FIELDS)
    problems = {row["id"]: row for row in rows}
    sampler = GroupSampler(run, world, engine, tokenizer, problems, journal)
    return RolloutSource(sampler, engine, select_prompts(stage, sampler, run.rlvr, world))


def choose(groups: list[list[Rollout]], config: RlvrConfig, seed: int) -> list[Rollout]:
    """Return the rollouts to train on, with their advantages: of groups with unequal rewards, after remedy 2.

    seed: of the random choice among negatives.
    """
    rng = random.Random(seed)
    chosen: list[Rollout] = []
    for group in groups:
        group = [rollout for rollout in group if not is_masked(rollout, config)]
        rewards = [rollout.reward for rollout in group]
        if not rewards or min(rewards) == max(rewards):
            continue
        if config.rebalance:
            if not keeps_prompt(rewards, config.max_accuracy):
                continue
            group = [group[i] for i in rebalance(rewards, rng)]
            rewards = [rollout.reward for rollout in group]
        for rollout, advantage in zip(group, advantages(rewards, config.advantage), strict=True):
            chosen.append(dataclasses.replace(rollout, advantage=advantage))
    return chosen


@phase("data")
def rollout_batches(rollouts: list[Rollout], model: Model, config: RlvrConfig) -> list[PackedBatch]:
    """Return this rank's micro-batches of what `to_trainers` gave it; see `micro_batches`."""
    costs = costs_of(rollouts, model.config)
    make = lambda part: rollout_batch(part, model.num_updates, config, model.world)
    lengths = list(map(len, rollouts))
    return micro_batches(rollouts, lengths, costs, config.micro_tokens, model.world, make)


def rollout_batch(
    rollouts: list[Rollout], version: int, config: RlvrConfig, world: World
) -> PackedBatch:
    """Return a micro-batch; its fields per position, of the token that the position predicts, are:

    old_logp, advantage, weight (of the row in the loss; 0 in the prompt), share (of the rollout, in the count that the
    loss is divided by), temperature, age (staleness at `version`).
    """
    documents = [document_of(rollout, version, config) for rollout in rollouts]
    return pack(documents, multiple_of=world.token_multiple)


def document_of(rollout: Rollout, version: int, config: RlvrConfig) -> Document:
    """Return a rollout, whose answer this rank has, with the fields of `rollout_batch`."""
    assert rollout.answer is not None, f"the tokens of {rollout.id} are on another rank"
    tokens = np.concatenate([rollout.prompt, rollout.answer.tokens])
    before, length = len(rollout.prompt) - 1, rollout.facts.length
    weight = weight_of(config.normalizer, length, config.max_new_tokens)

    def per_token(
        of_answer: np.ndarray | float, of_prompt: float = 0, kind: type = np.float32
    ) -> np.ndarray:
        values = np.full(before + length, of_prompt, kind)
        values[before:] = of_answer
        return values

    return Document(
        tokens=tokens[:-1],
        targets=per_token(rollout.answer.tokens, IGNORE, np.int64),
        token_fields={
            "old_logp": per_token(rollout.answer.logprobs),
            "advantage": per_token(rollout.advantage),
            "weight": per_token(weight),
            "share": per_token(1.0 if config.normalizer == "token" else 1.0 / length),
            "temperature": per_token(rollout.temperature, of_prompt=1.0),
            "age": per_token(rollout.ages(version), kind=np.int64),
        },
    )


def check_mismatch(
    run: RunConfig,
    source: RolloutSource,
    chosen: list[Rollout],
    model: Model,
    engine: RolloutEngine,
    meter: MismatchMeter,
    stage: Stage,
) -> Mismatch:
    """Return the difference of sampler and trainer in this step, before its update. Collective.

    Measured on the rollouts that are trained on or, if those are of older weights, on others of the present ones.
    Raises MismatchError above the alarm level.
    """
    config, world = run.rlvr, model.world
    measured = chosen
    if run.rollout.asynchronous:
        measured = source.on_policy()
        measure(measured, model, config, meter)
    mismatch = meter.collect(world)
    precision = precision_of(run.rollout, world.device.type == "cuda")
    if mismatch.exceeds(alarm_level(config.max_mismatch, precision)):
        source.wait()  # the diagnosis samples too
        stop_on_mismatch(mismatch, measured, engine, model, stage)
    return mismatch


def measure(
    rollouts: list[Rollout], model: Model, config: RlvrConfig, meter: MismatchMeter
) -> None:
    """Add rollouts that are not trained on to the meter. Collective."""

    def head(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        logp_M = logps(hidden_MD, weight_VD, batch, group)
        fields = batch.fields
        meter.add(logp_M - fields["old_logp"], fields["age"], fields["weight"] != 0)
        return logp_M

    if rollouts:
        batches = rollout_batches(to_trainers(rollouts, model), model, config)
        forward_only(model, batches, head)


def stop_on_mismatch(
    mismatch: Mismatch, rollouts: list[Rollout], engine: RolloutEngine, model: Model, stage: Stage
) -> NoReturn:
    """Diagnose why sampler and trainer differ, write the page `mismatch.txt`, and raise MismatchError. Collective."""
    fresh = [r for r in rollouts if r.age(model.num_updates) == 0][:EXAMINED]
    answers = on_all_ranks(model.world, [rollout.answer for rollout in fresh])
    cases = [
        Case(r.prompt, a.tokens, a.logprobs, r.temperature)
        for r, a in zip(fresh, answers, strict=True)
        if a is not None
    ]
    page = "No diagnosis: every answer has tokens of older weights."
    if cases:
        page = diagnose(engine, model, cases).page()
    if model.world.is_main:
        (stage.path / "mismatch.txt").write_text(page + "\n")
    raise MismatchError(
        f"rlvr: sampler and trainer differ by {mismatch.mean_abs:.4g} in mean |log-prob| (max {mismatch.max_abs:.4g}, "
        f"KL {mismatch.kl:.4g}) over {mismatch.tokens} tokens, more than the alarm level (rlvr.max_mismatch)",
        page,
    )


def policy_metrics(
    metrics: StepMetrics, mismatch: Mismatch, info: StepInfo, chosen: list[Rollout]
) -> Row:
    """Return the fields of a step's log that only a step with an update has."""
    sums = dict(metrics.metrics)
    rows = sums.pop("rows")
    means = {name: total / rows for name, total in sums.items()}
    update = {"loss": metrics.loss, "lr": info.lr, "grad_norm": info.grad_norm}
    return means | mismatch.row() | update | {"tokens": sum(map(len, chosen))}


def describe(
    groups: list[list[Rollout]], chosen: list[Rollout], config: RlvrConfig, temperature: float
) -> dict:
    """Return the fields of a step's log about its rollouts; accuracies are of each group before remedy 2 oversamples it."""
    first = [rollout for group in groups for rollout in group[: config.rollouts_per_prompt]]
    rewards = np.array([r.reward for r in first])
    zero = [len({r.reward for r in group}) == 1 for group in groups]
    return {
        "tokens": 0,
        "temperature": temperature,
        "reward": float(rewards.mean()),
        "accuracy": float((rewards > 0).mean()),
        "response_length": float(np.mean([r.facts.length for r in first])),
        "truncated": float(np.mean([r.truncated for r in first])),
        "zero_groups": float(np.mean(zero)),
        "rollouts": sum(map(len, groups)),
        "used_rollouts": len(chosen),
    } | audit_metrics(first, config)


def is_masked(rollout: Rollout, config: RlvrConfig) -> bool:
    """Return True for a rollout that was cut off, if `truncated` leaves those out of their group."""
    return rollout.truncated and config.truncated == "masked"


def count_unused(
    unused: dict[str, int], groups: list[list[Rollout]], row: dict, config: RlvrConfig
) -> None:
    """Add a step's groups and rollouts to the counts of those that were not trained on, by reason.

    row: the step's log, for `too_stale`.
    """
    rewards = [[r.reward for r in group if not is_masked(r, config)] for group in groups]
    most = config.max_accuracy if config.rebalance else 1.0
    for name, number in {
        "groups": len(groups),
        "all_cut_off": sum(not group for group in rewards),
        "all_wrong": sum(bool(group) and max(group) <= 0 for group in rewards),
        "too_easy": sum(bool(group) and is_too_easy(group, most) for group in rewards),
        "too_stale": row["too_stale"],
    }.items():
        unused[name] = unused.get(name, 0) + number


def no_update(
    unused: dict[str, int], waiting: int, held: int, config: RlvrConfig, max_staleness: int
) -> str:
    """Return the error message of a stage that made no update, from the counts of `count_unused`.

    waiting: usable rollouts at the end. held: updates that guards held back.
    """
    return (
        f"rlvr: no update was made in {config.steps} steps. Of {unused['groups']} groups {unused['all_wrong']} had no right "
        f"answer, {unused['too_easy']} were too easy (all right, or above rlvr.max_accuracy with rlvr.rebalance) and "
        f"{unused['all_cut_off']} were cut off at rlvr.max_new_tokens={config.max_new_tokens}; {unused['too_stale']} rollouts "
        f"were older than rollout.max_staleness={max_staleness} updates; {waiting} usable rollouts were left at the end, "
        f"fewer than rlvr.min_rollouts={config.min_rollouts}{f'; guards held back {held} updates' if held else ''}"
    )
