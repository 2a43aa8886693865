"""Small models, prompts and comparisons for the tests against the real vLLM, without an import of vLLM."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phimini.kernels import linear_logprob
from phimini.model.config import ModelConfig, preset
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import Completion, SamplingParams, sample
from phimini.parallel.megatron.builder import Model, build_model
from phimini.parallel.megatron.hf_weights import from_hf
from phimini.parallel.megatron.weight_names import hf_names
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, pack
from phimini.parallel.training.step import forward_only
from phimini.stages.rl.mismatch_diagnosis import Case
from phimini.stages.rollout.engine import Sampled, on_all_ranks
from phimini.stages.rollout.vllm_settings import EngineSettings

BOUNDARY = 64
LONG = dataclasses.replace(preset("tiny"), num_layers=2, original_max_positions=BOUNDARY)
SHORT = dataclasses.replace(LONG, rope_factors="short")
UNTIED = dataclasses.replace(LONG, tie_embeddings=False)
SETTINGS = EngineSettings(
    max_model_len=256, max_num_seqs=32, dtype="float32", transport="inproc", kv_cache_bytes=1 << 25
)
STOP = 7
LIMIT = 1e-4
"""largest difference between two fp32 implementations, in log-prob"""
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, stop_ids=(STOP,))
SAMPLING = SamplingParams(temperature=0.8, max_new_tokens=24, stop_ids=())
# Prompts that end before the boundary, answers that cross it, prompts beyond it, one that fills cached blocks.
LENGTHS = (1, 9, 33, 50, 62, 64, 65, 90, 150)


def weights(seed: int, config: ModelConfig = LONG) -> dict[str, Tensor]:
    """Return weights of a distribution far from uniform, so that rounding does not decide a greedy token."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.08 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in hf_names(config).items()
    }


def reference(config: ModelConfig, seed: int) -> Phi4Mini:
    model = Phi4Mini(config).eval()
    model.load_state_dict(weights(seed, config), strict=False)
    return model


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 256, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def sampled_by(
    engine: Any, asked: list[list[int]], params: SamplingParams, seeds: list[int]
) -> list[Sampled]:
    """Return an engine's completions on every rank, each of which one rank has."""
    held = engine.generate(asked, params, seeds)
    ranks = engine._world.all_gather_objects([completion is not None for completion in held])
    assert all(sum(of_one) == 1 for of_one in zip(*ranks, strict=True)), ranks
    everywhere = on_all_ranks(engine._world, held)
    return [completion for completion in everywhere if completion is not None]


def tokens_of(done: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in done]


def logprobs(
    model: Phi4Mini, prompt: list[int], response: np.ndarray, temperature: float = 1.0
) -> Tensor:
    """Return teacher-forced log-probs of each token of the response."""
    tokens_1T = torch.tensor([prompt + response.tolist()])
    hidden_TD = model(tokens_1T[:, :-1])[0, len(prompt) - 1 :]
    logp_TV = (hidden_TD @ model.head_weight_VD.T / (temperature or 1.0)).log_softmax(-1)
    return logp_TV.gather(1, torch.from_numpy(response).long()[:, None])[:, 0]


def difference(
    model: Phi4Mini, asked: list[list[int]], done: Sequence[Sampled], temperature: float = 1.0
) -> float:
    """Return max |reported log-prob - log-prob of the reference model| over all sampled tokens."""
    return max(
        (logprobs(model, p, c.tokens, temperature) - torch.tensor(c.logprobs)).abs().max().item()
        for p, c in zip(asked, done, strict=True)
    )


def trainer_difference(model: Model, asked: list[list[int]], done: Sequence[Sampled]) -> float:
    """Return the same difference from the trainer at its layout, on every rank."""
    documents = [
        Document(
            tokens=(p + c.tokens.tolist())[:-1],
            targets=[-100] * (len(p) - 1) + c.tokens.tolist(),
            token_fields={"reported": [0.0] * (len(p) - 1) + c.logprobs.tolist()},
        )
        for p, c in zip(asked, done, strict=True)
    ]

    def worst(hidden_MD, weight_VD, batch, *, group) -> Tensor:
        logp_M = linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M
        d_M = (logp_M - batch.fields["reported"]).abs()
        return d_M[batch.targets_T >= 0].max()[None]

    return max(float(x) for x in forward_only(model, [pack(documents)], worst))


def greedy_agrees(model: Phi4Mini, asked: list[list[int]], done: Sequence[Sampled]) -> list[int]:
    """Return the prompts whose greedy answer differs from the reference sampler's."""
    expected = sample(model, asked, GREEDY, [0] * len(asked))
    return [
        i
        for i, (e, c) in enumerate(zip(expected, done, strict=True))
        if (tokens_of([e]), e.finish_reason) != (tokens_of([c]), c.finish_reason)
    ]


def trainer(config: ModelConfig, layout: Layout, seed: int) -> Model:
    model = build_model(config, initialize(layout, config), seed=None)
    from_hf(model, weights(seed, config))
    return model


def move(model: Model, seed: int) -> None:
    """Change weights and version as an optimizer step does."""
    from_hf(model, weights(seed, model.config))
    model.num_updates += 1


def cases(asked: list[list[int]], done, temperature: float) -> list[Case]:
    return [Case(p, c.tokens, c.logprobs, temperature) for p, c in zip(asked, done, strict=True)]


def parity(engine: Any, model: Model, seed: int) -> dict[str, Any]:
    asked, expected = prompts(), reference(model.config, seed)
    done = sampled_by(engine, asked, GREEDY, [0] * len(asked))
    return {
        "other tokens": greedy_agrees(expected, asked, done),
        "reference": difference(expected, asked, done),
        "trainer": trainer_difference(model, asked, done),
        "versions": {span.version for c in done for span in c.versions},
        "spans": all(
            c.versions[0].start == 0 and c.versions[-1].end == len(c.tokens) for c in done
        ),
    }


def assert_parity(found: dict[str, Any], version: int) -> None:
    assert found["other tokens"] == [], "prompts whose greedy answer differs"
    assert found["reference"] <= LIMIT and found["trainer"] <= LIMIT
    assert found["versions"] == {version} and found["spans"]
