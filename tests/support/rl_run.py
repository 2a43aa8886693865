"""A run directory ready for stage 4: random weights, and a reward that random answers sometimes get."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rollout_cases import LONG, reference

from phimini.model.io.chat import TEMPLATES
from phimini.model.io.huggingface import save_reference
from phimini.model.io.json_files import write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.stages import rlvr
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rl.rollouts import Rollout, facts_of
from phimini.stages.rollout.engine import Sampled, Span
from phimini.stages.run.outputs import write_summary
from phimini.stages.run.stage_folder import Stage
from phimini.stages.verify import verdict as scorer
from phimini.stages.verify.scorer import Score

SETTINGS = [
    "rlvr.steps=3", "rlvr.prompts_per_step=4", "rlvr.rollouts_per_prompt=4", "rlvr.probe_prompts=8",
    "rlvr.probe_rollouts=4", "rlvr.min_rollouts=2", "rlvr.max_new_tokens=20", "rlvr.rebalance=false",
    "rlvr.sequence_length=160", "rollout_dpo.sequence_length=160", "rlvr.optimizer.lr=3e-3",
    "rlvr.optimizer.warmup_ratio=0", "audit=0", "rollout.max_batch=16", "rollout.deadline_s=60",
]  # fmt: skip


def make_run(folder: Path) -> Path:
    """Write distill/prompts.jsonl and rollout_dpo/model, as if the earlier stages had run."""
    problems = [
        {"id": f"p{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)
    ]
    tokenizer = train_tiny_tokenizer([p["question"] for p in problems] * 3, vocab_size=256)
    for stage in ("distill", "rollout_dpo"):
        (folder / stage).mkdir(parents=True)
    write_rows(folder / "distill" / "prompts.jsonl", problems)
    model = reference(LONG, 1)
    save_reference(model, folder / "rollout_dpo" / "model", stop_ids=tokenizer.stop_ids)
    tokenizer.save(folder / "rollout_dpo" / "model", chat_template=TEMPLATES["instruct"])
    for stage in ("distill", "rollout_dpo"):
        write_summary(folder / stage, {"id": stage})
    return folder


def run_config(folder: Path, *more: str) -> RunConfig:
    return override(tiny(), [f"out={folder}", *SETTINGS, *more])


def even_length(question: str, answer: str, response: str, finish_reason: str) -> bool:
    """Return True for answers whose text has an even length."""
    return len(response) % 2 == 0


def reinforce(
    run: RunConfig,
    layout: Layout | None = None,
    is_right: Callable[[str, str, str, str], bool] = even_length,
) -> list[dict]:
    """Run stage 4 in this rank, with this verdict; return the log's rows."""
    scorer.is_right = is_right
    config = dataclasses.replace(LONG)
    world = initialize(layout or Layout(), config)
    stage = Stage.begin(run, "rlvr", world)
    rlvr.reinforce(run, world, stage, "rollout_dpo")
    return [json.loads(line) for line in (stage.path / "metrics.jsonl").read_text().splitlines()]


def rollout_of(
    id: str,
    prompt: list[int],
    response: list[int],
    logprob: float = -1.0,
    *,
    temperature: float = 1.0,
    advantage: float = 0.0,
) -> Rollout:
    """Return a rollout of the present weights, on this rank."""
    answer = Sampled(
        tokens=np.array(response, np.int32),
        logprobs=np.full(len(response), logprob, np.float32),
        finish_reason="stop",
        versions=(Span(0, 0, len(response)),),
    )
    return Rollout(
        id=id, prompt_id="p", step=0, prompt=np.array(prompt, np.int32), temperature=temperature, reward=1.0,
        facts=facts_of(answer, Score(1.0), 0), answer=answer, advantage=advantage,
    )  # fmt: skip
