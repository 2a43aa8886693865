"""The common start of both sides of `phimini bench peers`: models and rows of a small run, and our loss of one batch."""

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phimini.kernels import linear_logprob
from phimini.model.io.chat import encode_example, render
from phimini.model.io.json_files import read_rows, write_json, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.megatron.builder import Model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training.batch import IGNORE, PackedBatch, pack
from phimini.parallel.training.step import forward_backward, forward_only
from phimini.stages import rlvr, rollout_dpo
from phimini.stages.base import base_config
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.data.packing import Example, documents
from phimini.stages.data.row_fields import GIVEN_FIELDS
from phimini.stages.data.token_files import TokenSet
from phimini.stages.recipe import DATA, TRAINING
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rl.rollouts import Rollout, facts_of
from phimini.stages.rollout.engine import Sampled, Span
from phimini.stages.run.outputs import TOKENIZED
from phimini.stages.run.training import cross_entropy_head, load_model
from phimini.stages.verify.scorer import Score

TASKS = ("sft", "dpo", "grpo")
BATCH = {"sft": 32, "dpo": 32, "grpo": 192}
GROUP, MAX_NEW_TOKENS, BETA = 8, 160, 0.1
SETTINGS = [
    "processes=1", "distill.num_problems=1500", "distill.rollouts_per_problem=4", "distill.num_prompts=600",
    "distill.num_heldout=24", "distill.num_validation=24", "curate.sft_examples=1500", "midtrain.steps=500",
    "midtrain.validate_every=500", "sft.epochs=2", "sft.validate_every=1000000", "sft.examples_per_step=32",
]  # fmt: skip


def prepare(folder: Path) -> RunConfig:
    """Make a small run up to stage 2, and the files of it that TRL reads: models, rows of token ids, settings."""
    run = override(tiny(), [f"out={folder / 'run'}", *SETTINGS])
    run_ranks(_train, 1, run)
    out = folder / "run"
    tokenizer = Tokenizer.load(out / "sft" / "model")
    for task in TASKS:
        start = "midtrain" if task == "sft" else "sft"
        shutil.copytree(out / start / "model", folder / task / "model")
        shutil.copytree(out / "midtrain" / "model", folder / task / "reference")
    examples = sft_examples(run)
    write_rows(
        folder / "sft" / "sft.jsonl",
        [
            {
                "input_ids": e.tokens.tolist(),
                "labels": [IGNORE] * e.loss_from + e.tokens[e.loss_from :].tolist(),
            }
            for e in examples
        ],
    )
    pairs = rollout_dpo.read_pairs(out / "curate" / "pairs.jsonl", tokenizer, run.chat_template)
    rows = []
    for pair in pairs:
        prompt, chosen, rejected = pair.chosen.loss_from, pair.chosen.tokens.tolist(), pair.rejected.tokens.tolist()  # fmt: skip
        rows.append({"prompt": "", "prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:],
                     "rejected_ids": rejected[prompt:]})  # fmt: skip
    write_rows(folder / "dpo" / "dpo.jsonl", rows)
    problems = read_rows(out / "distill" / "prompts.jsonl", {"question": str, "answer": str})
    write_rows(
        folder / "grpo" / "grpo.jsonl",
        [{"prompt": _prompt(p["question"], run), "answer": p["answer"]} for p in problems],
    )  # fmt: skip
    tokens = statistics.mean(len(e.tokens) - e.loss_from for e in examples) * BATCH["sft"]
    for task in TASKS:
        write_json(folder / task / "settings.json", {"batch": BATCH[task], "beta": BETA, "group": GROUP,
                   "max_new_tokens": MAX_NEW_TOKENS, "tokens_per_step": tokens})  # fmt: skip
    return run


def sft_examples(run: RunConfig) -> list[Example]:
    out = Path(run.out)
    return list(TokenSet(out / "tokenize" / "sft", out / TOKENIZED["sft"]))


def _prompt(question: str, run: RunConfig) -> str:
    message = {"role": "user", "content": question}
    return render([message], run.chat_template, add_generation_prompt=True)


def _train(run: RunConfig) -> None:
    for stage in DATA.values():
        stage(run)
    world = initialize(Layout(), base_config(run))
    for stage in ("midtrain", "sft"):
        TRAINING[stage](run, world)
    world.close()


# --- the loss of the same batch ------------------------------------------------------------------
def sft_loss(run: RunConfig, world: World, folder: Path) -> float:
    model, _ = load_model(run, world, "midtrain")
    examples = sft_examples(run)[: BATCH["sft"]]
    return forward_backward(model, [pack(documents(examples))], cross_entropy_head).loss


def dpo_loss(run: RunConfig, world: World, folder: Path) -> float:
    """Return the DPO loss against stage 1's model: with stage 2's as the reference it is ln 2 for any batch."""
    model, tokenizer = load_model(run, world, "sft")
    frozen, _ = load_model(run, world, "midtrain")
    rows = Path(run.out) / "curate" / "pairs.jsonl"
    pairs = rollout_dpo.read_pairs(rows, tokenizer, run.chat_template)[: BATCH["dpo"]]
    reference = rollout_dpo.reference_logps(frozen, pairs, run.rollout_dpo, world)
    batch = rollout_dpo.pair_batch(pairs, reference, world)
    return forward_backward(model, [batch], rollout_dpo.dpo_head(run.rollout_dpo)).loss


def grpo_loss(run: RunConfig, world: World, folder: Path) -> float:
    """Return the GRPO loss of teacher rollouts with advantages of both signs and shifted old log-probs, so that some clip."""
    model, tokenizer = load_model(run, world, "sft")
    rows = read_rows(Path(run.out) / "distill" / "rollouts.jsonl", GIVEN_FIELDS)[:64]
    encode = lambda row: encode_example(tokenizer, row["question"], row["response"], run.chat_template)  # fmt: skip
    examples = [Example(row["id"], *encode(row)) for row in rows]
    logps = _logps(model, pack(documents(examples))).split([len(e.tokens) - 1 for e in examples])
    generator = torch.Generator().manual_seed(0)
    rollouts, rows = [], []
    for i, (example, logp) in enumerate(zip(examples, logps, strict=True)):
        mine, tokens = logp[example.loss_from - 1 :], np.array(example.tokens, np.int32)
        prompt, response = np.split(tokens, [example.loss_from])
        old = (mine + 0.2 * torch.randn(len(mine), generator=generator)).numpy()
        answer = Sampled(tokens=response, logprobs=old, finish_reason="stop", versions=(Span(0, 0, len(old)),))  # fmt: skip
        rollouts.append(Rollout(
            id=str(i), prompt_id=str(i), step=0, prompt=prompt, temperature=1.0, reward=0.0,
            facts=facts_of(answer, Score(0.0), world.rank), answer=answer, advantage=(-1.0) ** i * (1 + i % 3),
        ))  # fmt: skip
        lists = {"prompt": prompt, "response": response, "old_logps": old}
        row = {name: array.tolist() for name, array in lists.items()}
        rows.append(row | {"advantage": rollouts[-1].advantage})
    write_json(folder / "grpo_batch.json", rows)
    head = rlvr.policy_head(run.rlvr, MismatchMeter(), 0.0, "off")
    batch = rlvr.rollout_batch(rollouts, 0, run.rlvr, world)
    return forward_backward(model, [batch], head).loss


def _logps(model: Model, batch: PackedBatch) -> torch.Tensor:
    def fn(hidden_MD: torch.Tensor, weight_VD: torch.Tensor, batch: PackedBatch, *, group: Any):
        return linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M

    return forward_only(model, [batch], fn)[0].cpu()


FIRST_LOSS: dict[str, Callable[[RunConfig, World, Path], float]] = {
    "sft": sft_loss,
    "dpo": dpo_loss,
    "grpo": grpo_loss,
}
