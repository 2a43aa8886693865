"""Batched sampling from the reference model with a key/value cache.

Every row draws its uniforms from its own seed and counts its own steps, so a sample does not depend on the
batch it was drawn in: the same prompt and seed give the same tokens alone, in another order and at
another batch size. (Exactly so in real arithmetic; a matrix product of another shape rounds its last bit
differently, which can move a draw that lies within about 1e-7 of a boundary.)

B rows alive, V vocabulary, S cached tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from phimini.model.reference import KVCache, Phi4Mini


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw from the model."""

    temperature: float
    """logits are divided by it; 0 takes the likeliest token"""
    top_p: float = 1.0
    """smallest set of likeliest tokens whose mass reaches this is kept; 1 keeps all"""
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    """a row ends after any of these"""

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(
                f"temperature: expected a finite number >= 0, got {self.temperature!r}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model wrote after one prompt."""

    tokens: list[int]
    """with the stop token, if one came"""
    logprobs: list[float]
    """of each token under the distribution it was drawn from, so after temperature and top_p;
    at temperature 0 the model's own, at temperature 1"""
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def sample(
    model: Phi4Mini,
    prompts: list[list[int]],
    params: SamplingParams,
    seeds: list[int],
    *,
    max_batch: int = 256,
) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    ValueError: an empty prompt, a token outside the vocabulary, a number of seeds that differs, or a prompt
    that with max_new_tokens exceeds the model's max_positions.
    """
    _check(model, prompts, params, seeds, max_batch)
    # Prompts of like length share a batch, so little of a prefill is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Completion | None] = [None] * len(prompts)
    for start in range(0, len(order), max_batch):
        chunk = order[start : start + max_batch]
        done = _sample_batch(model, [prompts[i] for i in chunk], params, [seeds[i] for i in chunk])
        for i, completion in zip(chunk, done, strict=True):
            completions[i] = completion
    return [c for c in completions if c is not None]


def _sample_batch(
    model: Phi4Mini, prompts: list[list[int]], params: SamplingParams, seeds: list[int]
) -> list[Completion]:
    """`rows[b]` is the prompt that row b of the cache serves; a finished row's place is taken by the last one."""
    weight = model.head_weight_VD
    device = weight.device
    lengths = [len(p) for p in prompts]
    cache = KVCache(
        model.config,
        len(prompts),
        max(lengths) + params.max_new_tokens,
        device=device,
        dtype=weight.dtype,
    )
    padded_BT = torch.tensor([p + [0] * (max(lengths) - len(p)) for p in prompts], device=device)
    hidden_BTD = model(padded_BT, cache=cache)
    cache.set_lengths(lengths)
    hidden_BD = hidden_BTD[torch.arange(len(prompts)), cache.lengths_B - 1]

    rows = torch.arange(len(prompts), device=device)
    streams_B = _stream(torch.tensor([_signed(s) for s in seeds], device=device))
    stops = torch.tensor(params.stop_ids, dtype=torch.long, device=device)
    tokens_BN = torch.zeros(len(prompts), params.max_new_tokens, dtype=torch.long, device=device)
    logprobs_BN = torch.zeros(len(prompts), params.max_new_tokens, device=device)
    num_tokens = torch.zeros(len(prompts), dtype=torch.long, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(params.max_new_tokens):
        token_B, logprob_B = draw(model.logits(hidden_BD), params, _uniform(streams_B, step))
        tokens_BN[rows, step] = token_B
        logprobs_BN[rows, step] = logprob_B
        num_tokens[rows] = step + 1
        stop_B = torch.isin(token_B, stops)
        finished = stop_B.nonzero().squeeze(1).tolist()
        if finished:
            stopped[rows[finished]] = True
            rows, streams_B, token_B = _drop_rows(cache, finished, rows, streams_B, token_B)
        if not len(rows) or step + 1 == params.max_new_tokens:
            break
        hidden_BD = model(token_B[:, None], cache=cache)[:, 0]
    return [
        Completion(tokens=t[:n], logprobs=p[:n], finish_reason="stop" if s else "length")
        for t, p, n, s in zip(
            tokens_BN.tolist(),
            logprobs_BN.tolist(),
            num_tokens.tolist(),
            stopped.tolist(),
            strict=True,
        )
    ]


def _drop_rows(cache: KVCache, finished: list[int], *per_row: Tensor) -> list[Tensor]:
    """Fills each finished row's place with the last living row; costs one row's copy per finished row."""
    order = list(range(len(cache.lengths_B)))
    for b in reversed(finished):
        last = len(order) - 1
        if b != last:
            cache.move_row(last, b)
            order[b] = order[last]
        order.pop()
    cache.keep_first(len(order))
    cache.longest = int(cache.lengths_B.max()) if order else 0
    return [x[order] for x in per_row]


def draw(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the cumulative distribution, in vocabulary order -> (token_B, logprob_B).

    A token whose probability rounds to 0 or that top_p leaves out is never drawn.
    """
    logits_BV = logits_BV.float()
    if params.temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)
    p_BV = (logits_BV / params.temperature).softmax(-1)
    if params.top_p < 1:
        p_BV = _nucleus(p_BV, params.top_p)
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * total_B1, right=True)
    p_B1 = p_BV.gather(1, token_B)
    return token_B.squeeze(1), (p_B1 / total_B1).log().squeeze(1).float()


def _nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """Zeroes what is less likely than the last token needed to reach top_p; equals of that token stay.

    Not renormalised. Only values are sorted and the order of the vocabulary stays, so two tokens that
    are nearly equal never swap places under the same uniform.
    """
    sorted_BV = p_BV.sort(-1, descending=True).values
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    last_B1 = (before_BV < top_p).sum(-1, keepdim=True) - 1
    return p_BV.where(p_BV >= sorted_BV.gather(1, last_B1), 0.0)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) on int64; shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _stream(seeds_B: Tensor) -> Tensor:
    """Neighbouring seeds become unrelated places in splitmix64's sequence."""
    return _mix(seeds_B * _GOLDEN + _GOLDEN)


def _uniform(streams_B: Tensor, step: int) -> Tensor:
    """The step-th number of each stream, fp64 in [0, 1); a function of seed and step, on any device."""
    bits = _mix(streams_B + _signed((step + 1) * _GOLDEN))
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def _check(
    model: Phi4Mini,
    prompts: list[list[int]],
    params: SamplingParams,
    seeds: list[int],
    max_batch: int,
) -> None:
    config = model.config
    if len(seeds) != len(prompts):
        raise ValueError(
            f"sample: expected one seed per prompt ({len(prompts)}), got {len(seeds)} seeds"
        )
    if max_batch < 1:
        raise ValueError(f"sample: expected max_batch of at least 1, got {max_batch}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"sample: prompt {i} is empty; expected at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"sample: prompt {i} has token {max(prompt) if min(prompt) >= 0 else min(prompt)}; "
                f"expected 0 to {config.vocab_size - 1}"
            )
        if len(prompt) + params.max_new_tokens > config.max_positions:
            raise ValueError(
                f"sample: prompt {i} of {len(prompt)} tokens with max_new_tokens {params.max_new_tokens} exceeds "
                f"the model's max_positions {config.max_positions}"
            )
