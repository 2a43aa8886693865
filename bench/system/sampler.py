"""`phimini bench sampler [--quick] [--json PATH]`: tokens per CPU second of the local sampler and of HF's `generate`

The same tiny model and prompts, one thread each, in turns; no two prompts are equal (which the sampler would make use
of). Both must give the same greedy tokens before either is timed. Two kinds of answers: `whole`, where every one has
64 tokens, the best case of a fixed batch; and `ending`, where one token in 64 is a stop token, as in stage 4, where
HF's batch goes on until its longest answer ends. Tokens after an end count for nobody.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from phimini.bench.gate.rows import Row, measured, write
from phimini.bench.gate.yardsticks import seconds
from phimini.model.config import preset
from phimini.model.io.huggingface import save_reference
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams, sample

BATCHES = (64, 128, 256)
PROMPT_TOKENS = 32
ANSWERS: dict[str, tuple[int, tuple[int, ...]]] = {"whole": (64, ()), "ending": (96, (0, 1, 2, 3))}
"""most new tokens, stop tokens"""
ROUNDS = 5
MOST_DIFFERENT = 0.05
"""share of greedy answers that may differ: two likeliest tokens may lie within a rounding of each other"""
CPU = torch.device("cpu")
# Short factors, and no longer than the length at which HF would change to the long ones.
CONFIG = dataclasses.replace(preset("tiny"), rope_factors="short")
# prompts, temperature, most new tokens, stop tokens
Generate = Callable[[list[list[int]], float, int, tuple[int, ...]], list[list[int]]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="phimini bench sampler", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="batch 64 only")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # CPU seconds of a pool include its waiting
    providers = {"phimini": local(), "hf-generate": hugging_face()}
    batches = BATCHES[: 1 if args.quick else None]
    rows = [row for b in batches for answers in ANSWERS for row in measure(providers, b, answers)]
    for row in rows:
        print(describe(row), flush=True)
    if args.json is not None:
        write(args.json, rows)
    return 0 if all(row.correct for row in rows) else 1


def model() -> Phi4Mini:
    reference = Phi4Mini(CONFIG).eval()
    reference.init_weights(0)
    return reference


def local() -> Generate:
    """As `LocalEngine` calls it."""
    reference = model()

    def generate(
        prompts: list[list[int]], temperature: float, most: int, stop_ids: tuple[int, ...]
    ) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, max_new_tokens=most, stop_ids=stop_ids)
        seeds = list(range(len(prompts)))
        return [c.tokens for c in sample(reference, prompts, params, seeds, max_batch=len(prompts))]

    return generate


def hugging_face() -> Generate:
    """Phi3ForCausalLM with its own cache. ValueError if transformers is not installed."""
    try:
        from transformers import Phi3ForCausalLM
    except ImportError:
        raise ValueError("bench sampler: needs transformers (pip install '.[test]')") from None
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        save_reference(model(), Path(folder), stop_ids=())
        peer: Any = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(
        prompts: list[list[int]], temperature: float, most: int, stop_ids: tuple[int, ...]
    ) -> list[list[int]]:
        ids = torch.tensor(prompts)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        result = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
            **(drawn if temperature else {"do_sample": False}),
        )
        return [_ended(row, stop_ids) for row in result[:, ids.shape[1] :].tolist()]

    return generate


def _ended(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Up to and with the first stop token."""
    ends = (i for i, token in enumerate(tokens, 1) if token in stop_ids)
    return tokens[: next(ends, len(tokens))]


def measure(providers: dict[str, Generate], batch: int, answers: str) -> list[Row]:
    """A row per provider. Ours is held to the other's: it is ours that must not get slower."""
    most, stop_ids = ANSWERS[answers]
    greedy = [generate(_prompts(batch, 0), 0.0, most, stop_ids) for generate in providers.values()]
    pairs = list(zip(*greedy, strict=True))
    wrong = sum(a != b for a, b in pairs) / batch
    right = wrong <= MOST_DIFFERENT and all(pairs)
    rates: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(1, ROUNDS + 1 if right else 1):
        prompts = _prompts(batch, number)
        for name in list(providers)[:: 1 if number % 2 else -1]:
            made: list[list[int]] = []
            run = lambda name=name, prompts=prompts, made=made: made.extend(
                providers[name](prompts, 1.0, most, stop_ids)
            )
            spent = seconds(run, CPU)
            rates[name].append(sum(map(len, made)) / spent)
    ours, theirs = providers
    return [
        measured(
            bench="sampler",
            case={"batch": batch, "prompt_tokens": PROMPT_TOKENS, "answers": answers},
            provider=name,
            unit="tokens/cpu_s",
            samples=rates[name],
            correct=right,
            reference=theirs if name == ours else None,
            reference_samples=rates[theirs] if name == ours else [],
            error=wrong,
        )
        for name in providers
    ]


def _prompts(batch: int, number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, CONFIG.vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()


def describe(row: Row) -> str:
    name = f"{row.provider:<12} batch {row.case['batch']:>4}  {row.case['answers']:<7}"
    if row.value is None:
        return (
            f"{name}  WRONG, not timed: {100 * (row.error or 1):.1f} % of the greedy answers differ"
        )
    ratio = "" if row.ratio is None else f"  {row.ratio.p50:.2f} times {row.reference} ({row.ratio.p20:.2f} to {row.ratio.p80:.2f})"  # fmt: skip
    return f"{name}  {row.value.p50:>8,.0f} {row.unit}{ratio}"


if __name__ == "__main__":
    sys.exit(main())
