"""The synthetic work of `phimini bench step`: a stage's micro-batch of given lengths, its head, its planned memory."""

import random
import re
from typing import Any

import numpy as np

from phimini.model.config import ModelConfig
from phimini.parallel.megatron.builder import Recompute
from phimini.parallel.plan.memory import Fp8, MemoryOptions, memory_bytes
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.training.batch import Document, PackedBatch, pack
from phimini.stages.config.recipes import recipe_config
from phimini.stages.rl.loss import policy_head
from phimini.stages.rl.mismatch import MismatchMeter
from phimini.stages.rollout_dpo import dpo_head
from phimini.stages.run.training import cross_entropy_head
from phimini.stages.run.workloads import workloads

STAGES = ("midtrain", "sft", "rollout_dpo", "rlvr")
_LOGNORMAL = re.compile(r"lognormal\((\d+),(\d+(?:\.\d+)?),(\d+)\)")


def lengths_of(text: str) -> list[int]:
    """Return the lengths of `16384`, `4x4096`, `8000,300` or `lognormal(MEDIAN,SIGMA,TOKENS)`.

    The last are drawn with a fixed seed until they fill TOKENS. Raises ValueError for other text.
    """
    try:
        drawn = _LOGNORMAL.fullmatch(text.replace(" ", ""))
        lengths = _drawn(int(drawn[1]), float(drawn[2]), int(drawn[3])) if drawn else _listed(text)
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise ValueError(
            "bench step: lengths: expected numbers of at least 2 as 16384, 4x4096, 8000,300 or "
            f"lognormal(2000,1.0,16384), got {text!r}"
        )
    return lengths


def _listed(text: str) -> list[int]:
    parts = [part.split("x") for part in text.split(",")]
    return [int(part[-1]) for part in parts for _ in range(int(part[0]) if part[1:] else 1)]


def _drawn(median: int, sigma: float, tokens: int) -> list[int]:
    """Return lengths whose sum is `tokens`; the last one is what was left."""
    chance, lengths = random.Random(0), []
    while tokens >= 4:
        length = min(max(2, round(median * chance.lognormvariate(0, sigma))), tokens)
        length += tokens - length if tokens - length < 2 else 0
        lengths.append(length)
        tokens -= length
    return lengths


def lengths_for(stage: str, lengths: list[int]) -> list[int]:
    """Return the lengths of a micro-batch of `stage`: an odd number of documents is halved into pairs of answers."""
    if stage != "rollout_dpo" or len(lengths) % 2 == 0:
        return lengths
    return [half for n in lengths for half in (n - n // 2, n // 2)]


def batch_of(stage: str, lengths: list[int], vocab_size: int) -> PackedBatch:
    """Return a micro-batch of random tokens, because a GPU is faster on zeros, with the fields of `stage`."""
    generator = np.random.default_rng(0)
    documents = []
    for i, n in enumerate(lengths):
        token_fields: dict[str, Any] = {}
        if stage == "rollout_dpo":
            token_fields = {"sequence": [i] * n}
        elif stage == "rlvr":
            names = ("advantage", "weight", "share", "temperature")
            token_fields = {name: [1.0] * n for name in names} | {"age": [0] * n}
            token_fields["old_logp"] = [-float(np.log(vocab_size))] * n
        fields = {"reference_logp": 0.0, "weight": 1.0} if stage == "rollout_dpo" else {}
        tokens, targets = generator.integers(0, vocab_size, (2, n))
        documents.append(
            Document(
                tokens=tokens, targets=targets, token_fields=token_fields, document_fields=fields
            )
        )
    return pack(documents)


def head_of(stage: str) -> Any:
    """Return the stage's head, as the paper's recipe sets it."""
    run = recipe_config("phi4_mini_reasoning")
    if stage == "rollout_dpo":
        return dpo_head(run.rollout_dpo)
    if stage == "rlvr":
        return policy_head(run.rlvr, MismatchMeter(), 0.0, "off")
    return cross_entropy_head


def pair_scratches_of(stage: str) -> int:
    """Return the plan's scratches of the stage's head; see `MemoryOptions`."""
    return workloads(recipe_config("phi4_mini_reasoning"))[stage].pair_scratches


def planned_peak_bytes(
    config: ModelConfig,
    stage: str,
    tokens: int,
    recompute: Recompute,
    fp8: Fp8 = "none",
    *,
    layout: Layout | None = None,
) -> int:
    """Return the plan's bytes of activations and head in bf16, beside weights, gradients and optimizer. layout: default one rank."""
    options = MemoryOptions(recompute=recompute, pair_scratches=pair_scratches_of(stage), fp8=fp8)
    planned = memory_bytes(
        config, layout or Layout(data=1), options, tokens=tokens, num_microbatches=1
    )["training"]
    return planned["activations"] + planned["head"]
