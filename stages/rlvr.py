"""Stage 4, reinforcement learning with verifiable reward: +1 for a verified answer, -1 otherwise.

Group-relative policy gradient (GRPO, arXiv 2402.03300) with asymmetric clipping and a token-level
normaliser (DAPO, arXiv 2503.14476) and the paper's three remedies, each a function in `remedies.py`
with a switch in the config. Groups are keyed by prompt id. The sampling temperature is stored with
each rollout and divides the trainer's logits too, so that old and new log-probs are of one policy;
`mismatch.py` measures at every step whether they are.

With rollout.asynchronous the next step's answers are sampled while this step trains.
"""

import dataclasses
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from torch import Tensor

from phimini.model.io.json_files import read_json, read_rows, write_json, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import Document, PackedBatch, pack
from phimini.parallel.training.same_data import check_same_data
from phimini.parallel.training.step import forward_backward, forward_only
from phimini.stages.config.schema import RlvrConfig, RunConfig
from phimini.stages.config.seeds import derive
from phimini.stages.data.packing import EpochSampler, Example, flops_of, micro_batches
from phimini.stages.data.row_fields import PROBLEM_FIELDS
from phimini.stages.rl.groups import Rollout, Sampler, check_room
from phimini.stages.rl.loss import logps, policy_head, with_reference_logps
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
from phimini.stages.rl.remedies import (
    advantages,
    is_too_easy,
    keeps_prompt,
    rebalance,
    select_uniform_length,
    temperature_at,
)
from phimini.stages.rl.unused_rollouts import count_unused, is_masked, no_update
from phimini.stages.rollout.engine import RolloutEngine
from phimini.stages.rollout.local import build_engine
from phimini.stages.rollout.prefetch import Background, OnMain
from phimini.stages.run.metrics import MetricsLog
from phimini.stages.run.stage_folder import Interrupt, Stage
from phimini.stages.run.training import Progress, load_model, start_optimizer


def rlvr(run: RunConfig, world: World, *, redo: bool = False) -> None:
    stage = Stage.begin(run, "rlvr", world, redo=redo)
    if stage.complete:
        return
    reinforce(run, world, stage, "rollout_dpo")


def reinforce(run: RunConfig, world: World, stage: Stage, start: str) -> None:
    """Train the model of stage `start` into `stage`."""
    config = run.rlvr
    model, tokenizer = load_model(run, world, start)
    frozen = load_model(run, world, start)[0] if config.kl_coef else None
    engine = build_engine(run, model.config, world)
    engine.sync(model)
    problems = {
        p["id"]: p for p in read_rows(Path(run.out) / "distill" / "prompts.jsonl", PROBLEM_FIELDS)
    }
    sampler = Sampler(run, world, engine, tokenizer, problems)
    pool = select_prompts(stage, sampler, config, world)
    prompts = EpochSampler(
        len(pool), min(config.prompts_per_step, len(pool)), derive(run.seed, "rlvr")
    )
    optimizer = start_optimizer(run, model, config.optimizer, config.steps)
    meter = MismatchMeter()
    precision = precision_of(run.rollout, world.device.type == "cuda")
    head = policy_head(config, meter, ROUNDING[precision], importance_of(run))
    # Rank 0's own, for a thread beside the training: it talks to the engines and to no other rank.
    beside = Sampler(run, world, OnMain(engine), tokenizer, problems, alone=True)
    ahead: Background[list[list[Rollout]]] | None = None

    state = {"tokens": 0, "sampled_tokens": 0, "waiting": [], "unused": {}}
    progress = Progress(stage, world, model, optimizer, config.checkpoint_every, state)
    step = progress.resume()
    if step:
        engine.sync(model)
    if world.is_main:
        (stage.path / "rollouts").mkdir(exist_ok=True)
    log = MetricsLog(stage.path / "metrics.jsonl", config.steps, stage.name, world.is_main, run)
    with log, Interrupt() as interrupt:
        while step < config.steps:
            now = plan(step, config, pool, prompts)
            groups = ahead.result() if ahead is not None else sampler.sample_groups(*now)
            ahead, few = None, []
            last = step + 1 == config.steps
            if run.rollout.asynchronous and (run.rollout.partial or last):
                few = sampler.sample_few(*now)
            if run.rollout.asynchronous and not last:
                later = plan(step + 1, config, pool, prompts)
                ahead = Background(world, lambda later=later: beside.sample_groups(*later))
            fresh = [rollout for group in groups for rollout in group]
            waiting = [Rollout(**row) for row in state["waiting"]]
            chosen = waiting + choose(groups, config, derive(run.seed, "rlvr", "choose", step))
            young = [r for r in chosen if r.age(model.num_updates) <= run.rollout.max_staleness]
            row = describe(groups, young, config, now.temperature)
            row["too_stale"] = len(chosen) - len(young)
            count_unused(state["unused"], groups, row, config)
            chosen = young
            # Before anything depends on it: whether there is an update at all does.
            items = [r.digest() for r in chosen]
            check_same_data(world, f"{stage.name}, step {step + 1}", items)
            state["sampled_tokens"] += sum(len(r.response) for r in fresh)
            state["waiting"] = []
            if len(chosen) < config.min_rollouts:
                state["waiting"] = [dataclasses.asdict(rollout) for rollout in chosen]
                optimizer.skip()
            else:
                with phase("sync"):
                    engine.rest()
                optimizer.zero_grad()
                microbatches = rollout_batches(chosen, model, config)
                check_same_data(world, f"{stage.name}, step {step + 1}", items, microbatches)
                if frozen is not None:
                    microbatches = with_reference_logps(frozen, microbatches)
                metrics = forward_backward(model, microbatches, head)
                examined = chosen
                if run.rollout.asynchronous:
                    # Answers of one set of weights: these. What was trained on is of older ones.
                    examined = few or some_of(ahead, world)
                    measure(examined, model, config, meter)
                mismatch = meter.take(world)
                if mismatch.exceeds(alarm_level(config.max_mismatch, precision)):
                    if ahead is not None:
                        ahead.result()  # the engine is free for the doctor
                    stop_on_mismatch(mismatch, examined, engine, model, stage)
                info = optimizer.step()
                with phase("sync"):
                    engine.sync(model)
                state["tokens"] += sum(map(len, chosen))
                rows = metrics.metrics.pop("rows")
                row |= {name: total / rows for name, total in metrics.metrics.items()}
                row |= mismatch.row()
                row |= {
                    "loss": metrics.loss,
                    "lr": info.lr,
                    "grad_norm": info.grad_norm,
                    "tokens": sum(map(len, chosen)),
                }
            row["waiting"] = len(state["waiting"])
            step += 1
            if world.is_main:
                write_rollouts(stage.path / "rollouts" / f"{step:06d}.jsonl", fresh, tokenizer)
            log.write(step - 1, **row)
            progress.after_step(step, step == config.steps, interrupt)
        waiting, unused = len(state.pop("waiting")), state.pop("unused")
        if not model.num_updates:
            raise ValueError(no_update(unused, waiting, config, run.rollout.max_staleness))
        found = {"updates": model.num_updates, "waiting": waiting, "pool": len(pool)}
        progress.finish(tokenizer, {"steps": config.steps} | found, interrupt)


class Plan(NamedTuple):
    """What a step samples."""

    ids: list[str]
    step: int
    temperature: float


def plan(step: int, config: RlvrConfig, pool: list[str], prompts: EpochSampler) -> Plan:
    """The step's prompts, and remedy 3's temperature: like the learning rate, it follows the steps, not the updates."""
    temperature = config.start_temperature
    if config.anneal:
        temperature = temperature_at(
            step, config.steps, config.start_temperature, config.end_temperature
        )
    return Plan([pool[i] for i in prompts.batch(step)], step, temperature)


def select_prompts(stage: Stage, sampler: Sampler, config: RlvrConfig, world: World) -> list[str]:
    """Remedy 1: rounds of sampling on candidate prompts; keep those whose answers have like lengths.

    Too easy ones, which remedy 2 would drop at every step, are left out. Those without a right answer are not: a prompt
    that is answered once in 64 times is what remedy 2 oversamples.
    Written to `pool.json`, so that a resumed run goes on with the same pool.
    """
    path = stage.path / "pool.json"
    if path.exists():
        return read_json(path)["kept"]
    candidates = list(sampler.problems)[-config.probe_prompts :]
    check_room({id: sampler.prompts[id] for id in candidates}, config, "rlvr")
    seen: dict[str, list[Rollout]] = defaultdict(list)
    for round in range(config.probe_rounds):
        asked = [(id, k) for id in candidates for k in range(config.probe_rollouts)]
        for rollout in sampler.sample(asked, round, config.start_temperature, "probe"):
            seen[rollout.prompt_id].append(rollout)
    found = pool_of(seen, config)
    world.barrier()
    if world.is_main:
        write_json(path, found)
    return found["kept"]


def pool_of(seen: dict[str, list[Rollout]], config: RlvrConfig) -> dict[str, Any]:
    """`kept`, the prompts to train on, and how many were left out and why.

    The length of an answer that was cut off is not known: where all were, a prompt's lengths would look uniform.
    Raises ValueError where no answer is right, or no prompt is left.
    """
    probed = f"of {len(seen)} probed prompts"
    answers = [rollout for rollouts in seen.values() for rollout in rollouts]
    cut = sum(rollout.truncated for rollout in answers)
    if not any(rollout.reward > 0 for rollout in answers):
        raise ValueError(
            f"rlvr: {probed} none is answered right in {len(answers)} answers, {cut} of them cut off at "
            f"max_new_tokens={config.max_new_tokens}; the stage-3 model is too weak for them"
        )
    most = config.max_accuracy if config.rebalance else 1.0
    left = {id: rs for id, rs in seen.items() if not is_too_easy([r.reward for r in rs], most)}
    easy = len(seen) - len(left)
    if config.uniform_length:
        left = {id: rs for id, rs in left.items() if not all(r.truncated for r in rs)}
    unfinished = len(seen) - easy - len(left)
    if not left:
        raise ValueError(
            f"rlvr: {probed} {easy} are too easy (more than {most:g} of their answers right, or all) and {unfinished} were "
            f"never answered to the end within max_new_tokens={config.max_new_tokens}; none is left to train on"
        )
    kept = list(left)
    if config.uniform_length:
        lengths = {id: [len(r.response) for r in rollouts] for id, rollouts in left.items()}
        kept = select_uniform_length(lengths, config.keep_share)
    return {"probed": len(seen), "too_easy": easy, "unfinished": unfinished, "kept": kept}


def choose(groups: list[list[Rollout]], config: RlvrConfig, seed: int) -> list[Rollout]:
    """The rollouts to train on, with their advantages: remedy 2, and groups with unequal rewards only."""
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
        for rollout, advantage in zip(group, advantages(rewards), strict=True):
            chosen.append(dataclasses.replace(rollout, advantage=advantage))
    return chosen


@phase("data")
def rollout_batches(rollouts: list[Rollout], model: Model, config: RlvrConfig) -> list[PackedBatch]:
    """This rank's micro-batches; see `micro_batches`."""
    costs = [flops_of([len(r)], model.config) for r in rollouts]
    make = lambda part: rollout_batch(part, model.num_updates, config, model.world)
    return micro_batches(rollouts, costs, config.micro_rollouts, model.world, make)


def rollout_batch(
    rollouts: list[Rollout], version: int, config: RlvrConfig, world: World
) -> PackedBatch:
    """Per position: old log-prob, advantage, weight, temperature and age (those of the token it predicts)."""
    pieces = []
    for rollout in rollouts:
        example = Example(rollout.id, rollout.prompt + rollout.response, len(rollout.prompt))
        before, length = len(rollout.prompt) - 1, len(rollout.response)
        weight = 1.0 if config.normalizer == "token" else 1.0 / length
        pieces.append(
            Document(
                tokens=example.inputs,
                targets=example.targets,
                token_fields={
                    "old_logp": [0.0] * before + rollout.logprobs,
                    "advantage": [0.0] * before + [rollout.advantage] * length,
                    "weight": [0.0] * before + [weight] * length,
                    "temperature": [1.0] * before + [rollout.temperature] * length,
                    "age": [0] * before + rollout.ages(version),
                },
            )
        )
    return pack(pieces, multiple_of=world.layout.token_multiple)


def some_of(ahead: Background[list[list[Rollout]]] | None, world: World) -> list[Rollout]:
    """About as many as the doctor looks at, from all over the groups, and one for each data rank. Collective."""
    assert ahead is not None, "but for the last step, the next one's answers are under way"
    rollouts = [rollout for group in ahead.result() for rollout in group]
    return rollouts[:: max(1, len(rollouts) // max(EXAMINED, world.data_size))]


def measure(
    rollouts: list[Rollout], model: Model, config: RlvrConfig, meter: MismatchMeter
) -> None:
    """Fills the meter with answers that are not trained on. Collective."""

    def head(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        logp_M = logps(hidden_MD, weight_VD, batch, group)
        fields = batch.fields
        meter.add(logp_M - fields["old_logp"], fields["age"], fields["weight"] != 0)
        return logp_M

    if rollouts:
        forward_only(model, rollout_batches(rollouts, model, config), head)


def stop_on_mismatch(
    mismatch: Mismatch, rollouts: list[Rollout], engine: RolloutEngine, model: Model, stage: Stage
) -> NoReturn:
    """Before the update: finds out why sampler and trainer differ, writes `mismatch.txt` and raises MismatchError."""
    cases = [
        Case(prompt=r.prompt, response=r.response, logprobs=r.logprobs, temperature=r.temperature)
        for r in rollouts
        if r.age(model.num_updates) == 0
    ]
    page = "No answer is wholly of the present weights: the doctor has nothing to look at."
    if cases:
        page = diagnose(engine, model, cases[:EXAMINED]).page()
    if model.world.is_main:
        (stage.path / "mismatch.txt").write_text(page + "\n")
    raise MismatchError(
        f"rlvr: sampler and trainer differ by {mismatch.mean_abs:.4g} in mean |log-prob| (max {mismatch.max_abs:.4g}, "
        f"KL {mismatch.kl:.4g}) over {mismatch.tokens} tokens, more than the alarm level (rlvr.max_mismatch)",
        page,
    )


def describe(
    groups: list[list[Rollout]], chosen: list[Rollout], config: RlvrConfig, temperature: float
) -> dict:
    """What was sampled, for the log; accuracies over each group's first rollouts, before oversampling."""
    first = [rollout for group in groups for rollout in group[: config.rollouts_per_prompt]]
    zero = [len({r.reward for r in group}) == 1 for group in groups]
    return {
        "tokens": 0,
        "temperature": temperature,
        "reward": float(np.mean([r.reward for r in first])),
        "accuracy": float(np.mean([r.reward > 0 for r in first])),
        "response_length": float(np.mean([len(r.response) for r in first])),
        "truncated": float(np.mean([r.truncated for r in first])),
        "zero_groups": float(np.mean(zero)),
        "rollouts": sum(map(len, groups)),
        "used_rollouts": len(chosen),
    }


def write_rollouts(path: Path, rollouts: list[Rollout], tokenizer: Tokenizer) -> None:
    """Every rollout of a step with its reward and temperature; a row per rollout."""
    write_rows(
        path,
        [
            {
                "id": r.id,
                "prompt_id": r.prompt_id,
                "step": r.step,
                "temperature": r.temperature,
                "reward": r.reward,
                "truncated": r.truncated,
                "response": tokenizer.decode(r.response),
            }
            for r in rollouts
        ],
    )
