"""The doctor's lines about the base model's folder: tokenizer, chat template, and the chain of implementations.

The chain runs texts of random tokens below, at and above the rope boundary through transformers, our reference, Megatron
and the sampling engine, and compares the log-probs of the same tokens with the reference's. transformers takes the short
rope table up to the boundary and the long one above, so each length is compared under the table of its side; an export of
ours has one table at all lengths.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phimini.kernels import linear_logprob
from phimini.model.config import ModelConfig
from phimini.model.io.chat import encode_example, encode_prompt, render, template_of
from phimini.model.io.huggingface import ROPE_FACTORS_KEY, load_config, load_reference
from phimini.model.io.json_files import read_object
from phimini.model.io.tokenizer import Tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import load_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import RankFailure, run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack
from phimini.parallel.training.step import forward_only
from phimini.stages.config.schema import RunConfig
from phimini.stages.doctor.machine import Line
from phimini.stages.rollout.build import build_engine

TEXTS = (
    "What is 12 + 30?",
    r"Let $f(x) = \frac{1}{2}x^2 - \sqrt{3}$. Find $f'(x)$, and \boxed{it}.",
    "def f(n):\n\treturn [i ** 2 for i in range(n)]  # indented\n\n",
    "naïve café — 東京 ½ ≤ π, 🙂",
)
"""a tokenizer of every byte gives them back"""
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""largest mean |difference| of a log-prob from the reference's; fp32 of real models is below 1e-5, bf16 about 0.01"""
SAMPLED = 8
"""tokens that the engine samples after a text"""


def tokenizer_lines(run: RunConfig, folder: Path) -> Iterator[Line]:
    """Yield lines about the round trips of text and of the chat template."""
    try:
        tokenizer = Tokenizer.load(folder)
    except (ValueError, OSError) as error:
        yield Line("fail", "tokenizer", str(error))
        return
    lost = [text for text in TEXTS if not _comes_back(tokenizer, text)]
    if lost:
        yield Line("warn", "tokenizer", f"{len(lost)} of {len(TEXTS)} texts do not come back, first {lost[0]!r:.60}", len(lost))  # fmt: skip
    else:
        yield Line("ok", "tokenizer", f"{tokenizer.vocab_size:,} tokens, {len(TEXTS)} texts come back")  # fmt: skip
    try:
        yield _template_line(run, tokenizer)
    except ValueError as error:
        yield Line("fail", "template", str(error))


def _comes_back(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return tokenizer.decode(tokenizer.encode(text)) == text
    except ValueError:  # no token for a character
        return False


def _template_line(run: RunConfig, tokenizer: Tokenizer) -> Line:
    """Compare the ids of a conversation with its text. Raises ValueError for a template that cannot be encoded."""
    question, response = TEXTS[0], "12 + 30"
    template = template_of(run.chat_template)
    prompt = encode_prompt(tokenizer, question, template)
    ids, loss_from = encode_example(tokenizer, question, response, template)
    text = render([{"role": "user", "content": question}], template, True, tokenizer.named_tokens)
    if tokenizer.decode(prompt) != text:
        return Line("fail", "template", f"chat_template={run.chat_template!s:.40}: expected the prompt {text!r:.90}, its ids give {tokenizer.decode(prompt)!r:.90}")  # fmt: skip
    if question not in text or tokenizer.decode(ids[loss_from:], skip_special=True) != response:
        return Line("fail", "template", f"chat_template={run.chat_template!s:.40}: question or response does not come back from {text!r:.90}")  # fmt: skip
    if ids[-1] not in tokenizer.stop_ids:
        return Line("fail", "template", f"the last id {ids[-1]} of an example is no stop id of {tokenizer.stop_ids}")  # fmt: skip
    return Line("ok", "template", f"a question is {len(prompt)} ids and comes back; an answer ends with {ids[-2:]}")  # fmt: skip


class Case(NamedTuple):
    """A text of random tokens, and the rope table that it is read with."""

    place: str
    tokens: list[int]
    table: Any
    """short or long"""


def cases_of(config: ModelConfig, trained: str | None = None) -> list[Case]:
    """Return texts below, at and above the boundary; one text for a model without it. trained: the table of an export."""
    boundary = config.original_max_positions if config.long_factor is not None else 64
    lengths = {"below": max(2, boundary - 7), "at": boundary, "above": boundary + 9}
    if config.long_factor is None:
        lengths = {"any": boundary}
    generator = torch.Generator().manual_seed(0)
    return [
        Case(
            f"{place} ({n} tokens)",
            torch.randint(0, config.vocab_size, (n,), generator=generator).tolist(),
            trained or ("long" if n > boundary else "short"),
        )
        for place, n in lengths.items()
        if n <= config.max_positions - SAMPLED
    ]


def parity_lines(run: RunConfig, folder: Path) -> Iterator[Line]:
    """Yield a line per implementation and length: the mean difference of log-probs from the reference's."""
    try:
        config = load_config(folder)
        cases = cases_of(config, read_object(folder / "config.json").get(ROPE_FACTORS_KEY))
        wanted = [reference_logps(folder, case) for case in cases]
    except (ValueError, OSError) as error:
        yield Line("fail", "parity: reference", str(error))
        return
    if not all(bool(logps.isfinite().all()) for logps in wanted):
        yield Line("fail", "parity: reference", f"{folder}: log-probs that are not finite")
        return
    mean = sum(float(logps.mean()) for logps in wanted) / len(wanted)
    yield Line("ok", "parity: reference", f"{len(cases)} texts, mean log-prob {mean:.4f}", mean)
    if importlib.util.find_spec("transformers") is None:
        yield Line("warn", "parity: transformers", "not installed")
    else:
        yield from _compared("transformers", transformers_logps, folder, cases, wanted)
    in_a_rank = lambda folder, case: run_ranks(megatron_logps, 1, folder, case)[0]
    yield from _compared("megatron", in_a_rank, folder, cases, wanted)
    engine = "vllm" if importlib.util.find_spec("vllm") else "local"
    if engine == "local":
        yield Line("warn", "parity: vllm", "not installed; the local engine is compared instead")
    for case in cases:
        yield compared(
            f"parity: {engine}, {case.place}",
            lambda c=case: run_ranks(engine_logps, 1, run, engine, folder, c)[0],
        )


def _compared(
    name: str,
    logps: Callable[[Path, Case], Tensor],
    folder: Path,
    cases: Sequence[Case],
    wanted: Sequence[Tensor],
) -> Iterator[Line]:
    for case, of_case in zip(cases, wanted, strict=True):
        ask = partial(logps, folder, case)
        yield compared(f"parity: {name}, {case.place}", lambda a=ask, w=of_case: (a(), w))


def compared(name: str, logps: Callable[[], tuple[Tensor, Tensor]]) -> Line:
    """Return the line of one comparison of (given, wanted) log-probs; a failure is a line too."""
    try:
        given, wanted = logps()
    except (ValueError, OSError, ImportError, RankFailure, RuntimeError) as error:
        return Line("fail", name, f"{type(error).__name__}: {error}"[:300])
    dtype = torch.bfloat16 if torch.cuda.is_available() and "transformers" not in name else torch.float32  # fmt: skip
    mean = float((given.float() - wanted.float()).abs().mean())
    status = "ok" if mean <= LIMITS[dtype] else "fail"
    return Line(status, name, f"mean |difference| {mean:.2e}, at most {LIMITS[dtype]:g} in {str(dtype)[6:]}", mean)  # fmt: skip


def _logps_of(logits_TV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the log-probs of tokens[1:], given those before, on the CPU."""
    targets = torch.tensor(tokens[1:], device=logits_TV.device)
    return -F.cross_entropy(logits_TV[:-1].float(), targets, reduction="none").cpu()


@torch.no_grad()
def reference_logps(folder: Path, case: Case) -> Tensor:
    """Return (T - 1,) log-probs of the reference in fp32. Raises ValueError as `load_reference`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_reference(folder, dtype=torch.float32, device=device, rope_factors=case.table)
    tokens = torch.tensor([case.tokens], device=device)
    return _logps_of(model.logits(model(tokens))[0], case.tokens)


@torch.no_grad()
def transformers_logps(folder: Path, case: Case) -> Tensor:
    """Return the same of `AutoModelForCausalLM`."""
    from transformers import AutoModelForCausalLM  # late: it takes seconds

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")  # fmt: skip
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return _logps_of(model(torch.tensor([case.tokens], device=model.device)).logits[0], case.tokens)


def megatron_logps(folder: Path, case: Case) -> Tensor:
    """Return the same of the trainer's model, in a rank of its own."""
    config = load_config(folder, case.table)
    world = initialize(Layout(), config)
    model = build_model(config, world, seed=None, trainable=False)
    load_hf(model, folder)
    tokens = case.tokens[:-1]
    targets = next_token_targets(case.tokens, [True] * len(case.tokens))[: len(tokens)]
    batch = pack([Document(tokens=tokens, targets=targets)], multiple_of=world.token_multiple)

    def head(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: Any) -> Tensor:
        return linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M

    logps = forward_only(model, [batch], head)[0].cpu()[: len(tokens)]
    world.close()
    return logps


def engine_logps(run: RunConfig, engine: Any, folder: Path, case: Case) -> tuple[Tensor, Tensor]:
    """Return the engine's log-probs of the tokens that it samples after the text, and the reference's of the same."""
    config = load_config(folder, case.table)
    longest = len(case.tokens) + SAMPLED
    rollout = replace(run.rollout, engine=engine, max_model_len=longest, asynchronous=False, partial=False, oversample=1.0, addresses=())  # fmt: skip
    run = replace(run, base=str(folder), rope_factors=case.table, rollout=rollout)
    world = initialize(Layout(), config)
    asked = build_engine(run, config, world)
    asked.load(folder)
    params = SamplingParams(temperature=1.0, max_new_tokens=SAMPLED, stop_ids=())
    (answer,) = asked.generate([case.tokens], params, [0], lambda number, completion: None)
    assert answer is not None, "one rank has every answer"
    world.close()
    whole = case._replace(tokens=[*case.tokens, *answer.tokens.tolist()])
    wanted = reference_logps(folder, whole)[-len(answer.tokens) :]
    return torch.from_numpy(answer.logprobs.copy()), wanted
