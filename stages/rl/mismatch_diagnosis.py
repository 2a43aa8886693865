"""Diagnosis of a difference between sampler and trainer: one hypothesis after the other, until one explains it.

The arbiter is the reference model with the trainer's present weights. It defines the policy, so the side that differs
from it is wrong. Each hypothesis predicts the sampler's log-probs; the one whose prediction is right
is the cause. Hypotheses that need new samples (prefix cache, stale weights) are tried in the order that destroys
least: as it is, after a prefix cache reset, after a new sync.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phimini.kernels import checksum, linear_logprob
from phimini.model.config import ModelConfig
from phimini.model.io.json_files import read_rows
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.world import World
from phimini.parallel.training.batch import IGNORE, Document, PackedBatch, pack
from phimini.parallel.training.step import forward_only
from phimini.parallel.weight_sync.fp8_blocks import dequantise_blocks, is_quantised, quantise_blocks
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.packing import derive
from phimini.stages.data.row_fields import PROBLEM_FIELDS, encode_problems
from phimini.stages.rl.mismatch import alarm_level, precision_of
from phimini.stages.rollout.build import build_engine
from phimini.stages.rollout.engine import (
    RolloutEngine,
    Sampled,
    SleepingEngine,
    VllmEngine,
    on_all_ranks,
)
from phimini.stages.run.outputs import check_inputs
from phimini.stages.run.training import load_model

TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)
TOP_PS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
EXAMINED = 16
"""answers that the doctor looks at"""
EXPLAINS = 0.2
"""a hypothesis is the cause if it leaves less than this share of the difference"""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One sampled answer as the sampler reported it."""

    prompt: Sequence[int] | np.ndarray
    response: np.ndarray
    logprobs: np.ndarray
    temperature: float

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and response, int64."""
        return np.concatenate([self.prompt, self.response]).astype(np.int64)


def cases_of(
    world: World,
    prompts: Sequence[Sequence[int] | np.ndarray],
    held: Sequence[Sampled | None],
    temperature: float,
) -> list[Case]:
    """Return on every rank the cases of an engine's completions, each of which some rank has. Collective."""
    pairs = zip(prompts, on_all_ranks(world, held), strict=True)
    return [Case(p, c.tokens, c.logprobs, temperature) for p, c in pairs if c is not None]


def reported_logprobs(cases: Sequence[Case]) -> Tensor:
    """Return the sampler's log-probs of all cases' response tokens, concatenated."""
    return torch.from_numpy(np.concatenate([case.logprobs for case in cases]))


@dataclass(frozen=True, slots=True)
class Evidence:
    """A hypothesis and the difference that it leaves."""

    hypothesis: str
    mean_abs: float
    """mean |predicted - reported| log-prob if the hypothesis is true"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The cause of a difference, with the evidence.

    `cause` is one of: none, trainer kernel, weights, temperature, top-p, rope table, precision, prefix cache, stale
    weights, engine.
    """

    cause: str
    detail: str
    evidence: list[Evidence]

    def page(self) -> str:
        """Return the text of one page about the cause and the evidence."""
        lines = [
            f"phimini doctor --mismatch: {self.cause}",
            self.detail,
            "",
            f"  {'if the cause were':<44}{'mean |dlogp| left':>18}",
        ]
        for e in self.evidence:
            lines.append(f"  {e.hypothesis:<44}{e.mean_abs:>18.3g}")
        return "\n".join(lines)


class Arbiter:
    """The reference model with the trainer's weights, for log-probs under changed circumstances. Collective."""

    def __init__(self, model: Model) -> None:
        self.weights = {name: tensor.clone() for name, tensor in to_hf(model)}
        self.model = Phi4Mini(model.config).to(model.world.device).eval()
        self.model.load_state_dict(self.weights, strict=False)

    @torch.no_grad()
    def logprobs(
        self,
        cases: Sequence[Case],
        *,
        model: Phi4Mini | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
    ) -> Tensor:
        """Return the log-probs of all cases' response tokens, concatenated, on the CPU."""
        model = model or self.model
        device = model.head_weight_VD.device
        values = []
        for case in cases:
            tokens_1T = torch.from_numpy(case.tokens)[None].to(device)
            hidden_MD = model(tokens_1T[:, :-1])[0, len(case.prompt) - 1 :]
            logits_MV = (hidden_MD @ model.head_weight_VD.T).float()
            logits_MV = logits_MV / (temperature or case.temperature or 1.0)
            p_MV = logits_MV.softmax(-1)
            targets_M1 = tokens_1T[0, len(case.prompt) :, None]
            p_M1 = p_MV.gather(1, targets_M1)
            if top_p < 1:
                sorted_MV = p_MV.sort(-1, descending=True).values
                kept_MV = sorted_MV.where(sorted_MV.cumsum(-1) - sorted_MV < top_p, 0.0)
                p_M1 = p_M1 / kept_MV.sum(-1, keepdim=True)
            values.append(p_M1[:, 0].clamp_min(1e-30).log())
        return torch.cat(values).cpu()

    def with_other_table(self) -> Phi4Mini:
        """Return the model with the other rope table, short or long."""
        config = self.model.config
        other = replace(config, rope_factors="short" if config.rope_factors == "long" else "long")
        return self._variant(other, lambda name, t: t)

    def in_bf16(self) -> Phi4Mini:
        """Return the model with weights rounded to bfloat16; bfloat16 matrix products are 40 times slower on a CPU."""
        return self._variant(self.model.config, lambda name, t: t.bfloat16().to(t.dtype))

    def in_fp8(self) -> Phi4Mini:
        """Return the model with weights rounded as `fp8_blocks.py` does."""

        def rounded(name: str, t: Tensor) -> Tensor:
            return dequantise_blocks(*quantise_blocks(t)).to(t.dtype) if is_quantised(name) else t

        return self._variant(self.model.config, rounded)

    def _variant(self, config: ModelConfig, change: Callable[[str, Tensor], Tensor]) -> Phi4Mini:
        model = Phi4Mini(config).to(self.model.head_weight_VD.device).eval()
        weights = {name: change(name, t) for name, t in self.weights.items()}
        model.load_state_dict(weights, strict=False)
        return model


def diagnose(
    engine: RolloutEngine,
    model: Model,
    cases: Sequence[Case],
    *,
    tolerance: float = 1e-4,
    max_new_tokens: int = 32,
) -> Verdict:
    """Return the cause of the difference between the sampler's log-probs in `cases` and the trainer's. Collective.

    tolerance: mean |difference| that is none. Samples from the engine and, if need be, syncs it. Raises ValueError without
    cases.
    """
    if not cases:
        raise ValueError("doctor: expected at least one sampled answer, got none")
    arbiter = Arbiter(model)
    reported = reported_logprobs(cases)
    evidence: list[Evidence] = []

    def left(hypothesis: str, predicted: Tensor) -> float:
        size = (predicted - reported).abs().mean().item()
        evidence.append(Evidence(hypothesis, size))
        return size

    truth = arbiter.logprobs(cases)
    whole = left("nothing is wrong", truth)
    own = (trainer_logprobs(model, cases) - truth).abs().mean().item()
    evidence.append(Evidence("(trainer against the reference model)", own))
    if own > max(tolerance, whole):
        detail = "The sampler agrees with the reference model; the trainer does not."
        return Verdict("trainer kernel", detail, evidence)
    if whole <= tolerance:
        return Verdict("none", "Sampler and reference model agree on these answers.", evidence)
    if found := _other_weights(engine, arbiter):
        return Verdict("weights" if "tensors" in found else "stale weights", found, evidence)
    for cause, predictions in _predictions(arbiter, cases).items():
        sizes = {name: left(name, predict()) for name, predict in predictions.items()}
        best = min(sizes, key=lambda name: sizes[name])
        if sizes[best] < EXPLAINS * whole:
            return Verdict(cause, f"The sampler's log-probs are those of: {best}.", evidence)
    if verdict := _sample_again(
        engine, model, arbiter, cases, evidence, whole, tolerance, max_new_tokens
    ):
        return verdict
    rounded = arbiter.in_bf16()
    size = (arbiter.logprobs(cases, model=rounded) - truth).abs().mean().item()
    evidence.append(Evidence("(bfloat16 against float32, reference model)", size))
    if size > whole / 4:
        return Verdict(
            "precision",
            "The difference is of the size that bfloat16 makes in this model.",
            evidence,
        )
    return Verdict(
        "engine", "Nothing here explains it: the engine computes another function.", evidence
    )


def trainer_logprobs(model: Model, cases: Sequence[Case]) -> Tensor:
    """Return the trainer's log-probs of all cases' response tokens, concatenated, on the CPU. Collective."""
    documents = [
        Document(
            tokens=case.tokens[:-1],
            targets=np.concatenate([np.full(len(case.prompt) - 1, IGNORE), case.response]),
            document_fields={"temperature": case.temperature or 1.0},
        )
        for case in cases
    ]

    def logprobs(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        temperature_M = batch.document_fields["temperature"][batch.document_ids_T]
        return linear_logprob(
            hidden_MD, weight_VD, batch.targets_T, temperature=temperature_M, group=group
        ).logp_M

    batch = pack(documents, multiple_of=model.world.token_multiple)
    return forward_only(model, [batch], logprobs)[0].cpu()[batch.targets_T != IGNORE]


def doctor(run: RunConfig, world: World, *, samples: int = EXAMINED) -> Verdict:
    """Diagnose this run's latest model after a fresh sync, on new answers; print and return the verdict. Collective.

    For `phimini doctor NAME --mismatch`. A cause that existed only in an engine that has ended (stale weights, its prefix
    cache) is in the stage's `mismatch.txt`, written when the run stopped. Raises ValueError without a trained model.
    """
    out = Path(run.out)
    stages = [s for s in ("rlvr", "rollout_dpo", "sft", "midtrain") if (out / s / "model").exists()]
    if not stages:
        raise ValueError(
            f"doctor: {out} has no trained model yet; run `phimini recipe {run.name}` first"
        )
    check_inputs(run, world, "distill", stages[0])
    model, tokenizer = load_model(run, world, stages[0])
    engine = build_engine(run, model.config, world)
    engine.sync(model)
    problems = read_rows(out / "distill" / "prompts.jsonl", PROBLEM_FIELDS)[:samples]
    prompts = list(encode_problems(tokenizer, problems, tokenizer.chat_template).values())
    params = SamplingParams(
        temperature=run.rlvr.start_temperature,
        max_new_tokens=run.rlvr.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
    )
    done = engine.generate(prompts, params, [derive(run.seed, "doctor", p["id"]) for p in problems])
    cases = cases_of(world, prompts, done, params.temperature)
    precision = precision_of(run.rollout, world.device.type == "cuda")
    tolerance = alarm_level(run.rlvr.max_mismatch, precision)
    verdict = diagnose(engine, model, cases, tolerance=tolerance)
    if world.is_main:
        print(f"{stages[0]}, {run.rollout.engine} engine, {len(cases)} answers\n{verdict.page()}")
    return verdict


def _predictions(
    arbiter: Arbiter, cases: Sequence[Case]
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return, by cause and hypothesis, functions that compute the sampler's log-probs if the hypothesis is true."""
    predictions: dict[str, dict[str, Callable[[], Tensor]]] = {}
    if arbiter.model.config.long_factor is not None:
        other = arbiter.with_other_table()
        name = f"rope table {other.config.rope_factors}"
        predictions["rope table"] = {name: lambda: arbiter.logprobs(cases, model=other)}
    asked = {case.temperature for case in cases}
    predictions["temperature"] = {
        f"temperature {t:g}": lambda t=t: arbiter.logprobs(cases, temperature=t)
        for t in TEMPERATURES
        if asked != {t}
    }
    predictions["top-p"] = {
        f"top-p {p:g}": lambda p=p: arbiter.logprobs(cases, top_p=p) for p in TOP_PS
    }
    predictions["precision"] = {
        "FP8 weights": lambda: arbiter.logprobs(cases, model=arbiter.in_fp8())
    }
    return predictions


def _other_weights(engine: RolloutEngine, arbiter: Arbiter) -> str:
    """Compare the weights last sent to the engine with the trainer's present ones, by checksum."""
    if not isinstance(engine, VllmEngine) or engine.last_sync is None:
        return ""
    last = engine.last_sync
    now = {name: checksum(t) for name, t in engine.as_sent(arbiter.weights.items())}
    differ = [name for name, value in now.items() if last.checksums.get(name) != value]
    if not differ:
        return ""
    if len(differ) > len(now) // 2:
        return (
            f"The engine has the weights of version {last.version}; the trainer has moved on since."
        )
    return f"The engine was sent something else for the tensors {', '.join(differ)}."


def _sample_again(
    engine: RolloutEngine,
    model: Model,
    arbiter: Arbiter,
    cases: Sequence[Case],
    evidence: list[Evidence],
    whole: float,
    tolerance: float,
    max_new_tokens: int,
) -> Verdict | None:
    params = SamplingParams(
        temperature=cases[0].temperature, max_new_tokens=max_new_tokens, stop_ids=()
    )
    prompts = [np.asarray(case.prompt).tolist() for case in cases]

    def again(name: str) -> float:
        done = engine.generate(prompts, params, list(range(len(prompts))))
        fresh = cases_of(model.world, prompts, done, params.temperature)
        reported = reported_logprobs(fresh)
        size = (arbiter.logprobs(fresh) - reported).abs().mean().item()
        evidence.append(Evidence(name, size))
        return size

    enough = max(tolerance, EXPLAINS * whole)
    detail = "A new sync makes the difference go away: the engine had other weights"
    if isinstance(engine, SleepingEngine) and engine.asleep:
        detail += ", or keys and values of older ones in its cache; both went when it slept"
    elif isinstance(engine, VllmEngine):
        now = again("(sampled again, as it is)")
        engine.reset_prefix_cache()
        if again("(sampled again, prefix cache reset)") <= enough < now:
            return Verdict(
                "prefix cache", "Cached keys and values of older weights were used.", evidence
            )
    engine.sync(model)
    if again("(sampled again, after a new sync)") <= enough:
        return Verdict("stale weights", f"{detail}.", evidence)
    return None
