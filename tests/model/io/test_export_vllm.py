"""An exported folder in a vLLM engine with default settings: the same answers below, at and above the boundary."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from rollout_cases import (  # fmt: skip
    GREEDY,
    LENGTHS,
    LIMIT,
    LONG,
    SHORT,
    STOP,
    difference,
    prompts,
    reference,
    tokens_of,
)
from vllm_process import in_vllm

from phimini.model.config import ModelConfig
from phimini.model.io.huggingface import save_reference
from phimini.model.sampler import sample
from phimini.stages.rollout.engine import Sampled

pytestmark = pytest.mark.vllm

MOST = 600
"""tokens, more than the models have positions: an answer ends where vLLM's own max_model_len does"""


def default_engine(folder: str) -> dict[str, Any]:
    """Start an engine with the default settings but for precision, and for options that save CPU time and memory."""
    from vllm import LLM
    from vllm import SamplingParams as VllmSamplingParams

    llm = LLM(
        model=folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 25,
    )
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.logprobs = 0.0, GREEDY.max_new_tokens, 0
    params.detokenize = False
    long = VllmSamplingParams(
        temperature=0.0, max_tokens=MOST, logprobs=0, ignore_eos=True, detokenize=False
    )

    def ask(asked: list[list[int]], params: VllmSamplingParams) -> list[Sampled]:
        done = llm.generate([{"prompt_token_ids": p} for p in asked], params, use_tqdm=False)
        outputs: list[Any] = [request.outputs[0] for request in done]
        return [
            Sampled(
                tokens=np.array(c.token_ids, np.int32),
                logprobs=np.array(
                    [at[t].logprob for t, at in zip(c.token_ids, c.logprobs, strict=True)],
                    np.float32,
                ),
                finish_reason=c.finish_reason,
                versions=(),
            )
            for c in outputs
        ]

    return {
        "answers": ask(prompts(), params),
        "to the end": ask(prompts((50,)), long),
        "length": llm.llm_engine.model_config.max_model_len,
    }


@pytest.mark.parametrize("config", [LONG, SHORT], ids=["long table", "short table"])
def test_a_default_engine_answers_as_we_do(config: ModelConfig, tmp_path) -> None:
    model, asked = reference(config, 5), prompts()
    save_reference(model, tmp_path, stop_ids=(STOP, 3))
    found = in_vllm(default_engine, str(tmp_path))[0]
    params = dataclasses.replace(GREEDY, stop_ids=(STOP, 3))
    ours = sample(model, asked, params, [0] * len(asked))
    boundary = config.original_max_positions
    assert min(LENGTHS) < boundary < max(LENGTHS) and boundary in LENGTHS
    for c, done in zip(ours, found["answers"], strict=True):
        assert tokens_of([done]) == tokens_of([c]) and done.finish_reason == c.finish_reason
    assert difference(model, asked, found["answers"]) <= LIMIT
    # The other table is told apart, below the boundary and above it.
    other = reference(SHORT if config is LONG else LONG, 5)
    for i in (LENGTHS.index(50), LENGTHS.index(150)):
        assert difference(other, asked[i : i + 1], found["answers"][i : i + 1]) > 100 * LIMIT
    # By itself the engine goes as far as the model does.
    assert found["length"] == config.max_positions > boundary
    (answer,) = found["to the end"]
    assert len(answer.tokens) == config.max_positions - 50
    assert difference(model, prompts((50,)), found["to the end"]) <= LIMIT
