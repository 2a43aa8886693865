"""Stage 4, reinforcement learning with verifiable reward: +1 for a verified answer, -1 otherwise.

Group-relative policy gradient (GRPO, arXiv 2402.03300) with asymmetric clipping and a token-level
normaliser (DAPO, arXiv 2503.14476) and the paper's three remedies, each a function in `remedies.py`
with a switch in the config. Groups are keyed by prompt id. The sampling temperature is stored with
each rollout and divides the trainer's logits too, so that old and new log-probs are of one policy.
"""

import dataclasses
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from phimini.kernels import linear_logprob, linear_policy_loss
from phimini.model.chat import encode_prompt
from phimini.model.sampler import SamplingParams
from phimini.model.tokenizer import Tokenizer
from phimini.parallel.batch import Document, PackedBatch, pack
from phimini.parallel.builder import Model
from phimini.parallel.step import forward_backward, forward_only
from phimini.parallel.world import World
from phimini.stages.config import RlvrConfig, RunConfig
from phimini.stages.distill import PROBLEM_FIELDS
from phimini.stages.jsonl import read_json, read_rows, write_json, write_rows
from phimini.stages.metrics import MetricsLog
from phimini.stages.packing import EpochSampler, Example, chunks, shares
from phimini.stages.remedies import (
    advantages,
    is_hard,
    keeps_prompt,
    rebalance,
    select_uniform_length,
    temperature_at,
)
from phimini.stages.rollout import RolloutEngine, build_engine
from phimini.stages.seeds import derive
from phimini.stages.stage import Interrupt, Stage
from phimini.stages.training import Progress, load_model, start_optimizer
from phimini.stages.verify import verify


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer. `advantage` is set once its group is complete."""

    id: str
    prompt_id: str
    step: int
    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    """of the response's tokens, as sampled"""
    temperature: float
    reward: float
    truncated: bool
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response) - 1


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
    head = policy_head(config)

    state = {"tokens": 0, "sampled_tokens": 0, "waiting": []}
    progress = Progress(stage, world, model, optimizer, config.checkpoint_every, state)
    step = progress.resume()
    if step:
        engine.sync(model)
    if world.is_main:
        (stage.path / "rollouts").mkdir(exist_ok=True)
    log = MetricsLog(stage.path / "metrics.jsonl", config.steps, stage.name, world.is_main)
    with log, Interrupt() as interrupt:
        while step < config.steps:
            temperature = config.start_temperature
            if config.anneal:
                temperature = temperature_at(
                    step, config.steps, config.start_temperature, config.end_temperature
                )
            groups = sampler.sample_groups(
                [pool[i] for i in prompts.batch(step)], step, temperature
            )
            fresh = [rollout for group in groups for rollout in group]
            waiting = [Rollout(**row) for row in state["waiting"]]
            chosen = waiting + choose(groups, config, derive(run.seed, "rlvr", "choose", step))
            row = describe(groups, chosen, config, temperature)
            state["sampled_tokens"] += sum(len(r.response) for r in fresh)
            state["waiting"] = []
            if len(chosen) < config.min_rollouts:
                state["waiting"] = [dataclasses.asdict(rollout) for rollout in chosen]
            else:
                optimizer.zero_grad()
                microbatches = rollout_batches(chosen, config, world)
                if frozen is not None:
                    microbatches = with_reference_logps(frozen, microbatches)
                metrics = forward_backward(model, microbatches, head)
                info = optimizer.step()
                engine.sync(model)
                state["tokens"] += sum(map(len, chosen))
                rows = metrics.metrics.pop("rows")
                row |= {name: total / rows for name, total in metrics.metrics.items()}
                row |= {
                    "loss": metrics.loss,
                    "lr": info.lr,
                    "grad_norm": info.grad_norm,
                    "tokens": sum(map(len, chosen)),
                }
                check_mismatch(row["mismatch"], waiting, config)
            step += 1
            if world.is_main:
                write_rollouts(stage.path / "rollouts" / f"{step:06d}.jsonl", fresh, tokenizer)
            log.write(step - 1, **row)
            progress.after_step(step, step == config.steps, interrupt)
    state.pop("waiting")
    progress.finish(tokenizer, {"steps": config.steps, "pool": len(pool)})


class Sampler:
    """Prompts by id to scored rollouts, identical on every rank."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        problems: dict[str, dict],
    ) -> None:
        self.run, self.config, self.world = run, run.rlvr, world
        self.engine, self.tokenizer, self.problems = engine, tokenizer, problems
        self.prompts = {
            id: encode_prompt(tokenizer, p["question"], run.chat_template)
            for id, p in problems.items()
        }

    def sample(
        self, asked: list[tuple[str, int]], step: int, temperature: float, purpose: str
    ) -> list[Rollout]:
        """One rollout for each (prompt id, index within its group)."""
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
        )
        seeds = [derive(self.run.seed, "rlvr", purpose, step, id, k) for id, k in asked]
        completions = self.engine.generate([self.prompts[id] for id, _ in asked], params, seeds)
        return [
            Rollout(
                id=f"{purpose}/{step}/{id}/{k}",
                prompt_id=id,
                step=step,
                prompt=self.prompts[id],
                response=completion.tokens,
                logprobs=completion.logprobs,
                temperature=temperature,
                reward=reward(
                    self.tokenizer.decode(completion.tokens),
                    completion.finish_reason,
                    self.problems[id],
                ),
                truncated=completion.finish_reason == "length",
            )
            for (id, k), completion in zip(asked, completions, strict=True)
        ]

    def sample_groups(self, ids: list[str], step: int, temperature: float) -> list[list[Rollout]]:
        """A group per prompt; with remedy 2, groups that prove hard are oversampled."""
        first = self.config.rollouts_per_prompt
        groups: dict[str, list[Rollout]] = defaultdict(list)
        for rollout in self.sample(
            [(id, k) for id in ids for k in range(first)], step, temperature, "rollout"
        ):
            groups[rollout.prompt_id].append(rollout)
        if self.config.rebalance and self.config.oversample_to > first:
            hard = [
                id
                for id in ids
                if is_hard([r.reward for r in groups[id]], self.config.max_accuracy)
            ]
            more = [(id, k) for id in hard for k in range(first, self.config.oversample_to)]
            for rollout in self.sample(more, step, temperature, "rollout"):
                groups[rollout.prompt_id].append(rollout)
        return list(groups.values())


def reward(response: str, finish_reason: str, problem: dict) -> float:
    """+1 for a response that ended by itself with the right answer, -1 for any other."""
    return 1.0 if finish_reason == "stop" and verify(response, problem["answer"]) else -1.0


def select_prompts(stage: Stage, sampler: Sampler, config: RlvrConfig, world: World) -> list[str]:
    """Remedy 1: rounds of sampling on candidate prompts; keep those one can learn from, of uniform length.

    Written to `pool.json`, so that a resumed run goes on with the same pool.
    """
    path = stage.path / "pool.json"
    if path.exists():
        return read_json(path)["kept"]
    candidates = list(sampler.problems)[-config.probe_prompts :]
    seen: dict[str, list[Rollout]] = defaultdict(list)
    for round in range(config.probe_rounds):
        asked = [(id, k) for id in candidates for k in range(config.probe_rollouts)]
        for rollout in sampler.sample(asked, round, config.start_temperature, "probe"):
            seen[rollout.prompt_id].append(rollout)
    most = config.max_accuracy if config.rebalance else 1.0
    learnable = [
        id
        for id, rollouts in seen.items()
        if keeps_prompt([r.reward for r in rollouts], most) and any(r.reward < 0 for r in rollouts)
    ]
    if not learnable:
        raise ValueError(
            f"rlvr: of {len(candidates)} probed prompts none is answered sometimes right and sometimes wrong; "
            "the stage-3 model is too weak or too strong for them"
        )
    kept = learnable
    if config.uniform_length:
        lengths = {id: [len(r.response) for r in seen[id]] for id in learnable}
        kept = select_uniform_length(lengths, config.keep_share)
    world.barrier()
    if world.is_main:
        write_json(path, {"probed": len(candidates), "learnable": len(learnable), "kept": kept})
    return kept


def choose(groups: list[list[Rollout]], config: RlvrConfig, seed: int) -> list[Rollout]:
    """The rollouts to train on, with their advantages: remedy 2, and groups with unequal rewards only."""
    rng = random.Random(seed)
    chosen: list[Rollout] = []
    for group in groups:
        if config.truncated == "masked":
            group = [rollout for rollout in group if not rollout.truncated]
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


def rollout_batches(rollouts: list[Rollout], config: RlvrConfig, world: World) -> list[PackedBatch]:
    """This rank's micro-batches; the same number on each rank, shares of nearly equal tokens."""
    mine = shares([len(r) for r in rollouts], world.data_size)[world.data_rank]
    number = -(-len(rollouts) // (config.micro_rollouts * world.data_size))
    size = max(1, -(-len(mine) // number))
    return [
        rollout_batch([rollouts[i] for i in part], config, world) for part in chunks(mine, size)
    ]


def rollout_batch(rollouts: list[Rollout], config: RlvrConfig, world: World) -> PackedBatch:
    """Per position: old log-prob, advantage, weight and temperature (those of the token it predicts)."""
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
                },
            )
        )
    return pack(pieces, multiple_of=world.layout.token_multiple)


def with_reference_logps(frozen: Model, microbatches: list[PackedBatch]) -> list[PackedBatch]:
    """The batches with the frozen stage-3 model's log-probs of their tokens, at the rollouts' temperatures."""

    def logp(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        return linear_logprob(
            hidden_MD,
            weight_VD,
            batch.targets_T,
            temperature=batch.fields["temperature"],
            group=group,
        ).logp_M

    results = forward_only(frozen, microbatches, logp)
    return [
        dataclasses.replace(batch, fields=batch.fields | {"reference_logp": result})
        for batch, result in zip(microbatches, results, strict=True)
    ]


def policy_head(config: RlvrConfig):
    """The clipped policy loss; the count is trained tokens, or rollouts where each weighs the same."""

    def head(
        hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weight_M = batch.fields["weight"]
        loss, metrics = linear_policy_loss(
            hidden_MD,
            weight_VD,
            batch.targets_T,
            batch.fields["old_logp"],
            batch.fields["advantage"],
            row_weight_M=weight_M,
            temperature=batch.fields["temperature"],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            reference_logp_M=batch.fields.get("reference_logp"),
            kl_coef=config.kl_coef,
            group=group,
        )
        sums = {
            "rows": metrics.num_rows,
            "entropy": metrics.entropy_sum,
            "clipped": metrics.clipped_sum,
            "kl": metrics.kl_sum,
            "mismatch": metrics.logp_diff_sum,
        }
        return loss, weight_M.sum(), sums

    return head


def check_mismatch(mismatch: float, waiting: list[Rollout], config: RlvrConfig) -> None:
    """Sampler and trainer hold the same weights, so their log-probs agree but for rounding."""
    if not waiting and not mismatch <= config.max_mismatch:
        raise RuntimeError(
            f"rlvr: sampler and trainer differ by {mismatch:.4f} in mean |log-prob|, more than rlvr.max_mismatch="
            f"{config.max_mismatch}: stale weights, another rope table, or another temperature"
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
