"""Batched sampling from the reference model with a key/value cache.

Every row draws its random numbers from its seed and its step, so a sample does not depend on its batch: the same
prompt and seed give the same tokens alone, in another order and at another batch size. This is exact in real
arithmetic. A matrix product of another shape may round its last bit differently, which can move a draw within about
1e-7 of a boundary.

B rows still sampling, V vocabulary, S cached tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from phimini.model.decode_step import Decoder
from phimini.model.reference import KVCache, Phi4Mini

PREFILL_TOKENS = 4096
"""tokens per prefill group, about; small enough for the caches of a CPU"""
MAX_ATTEMPTS = 16
"""limit of the draws per token until one lies within top_p"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of the sampling distribution and its end."""

    temperature: float
    """divisor of the logits; 0 takes the most probable token"""
    top_p: float = 1.0
    """probability mass of the smallest set of most probable tokens to keep; 1 keeps all"""
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """Tokens that the model sampled after one prompt, with their log-probs: 8 bytes a token."""

    tokens: np.ndarray
    """(n,) int32, with the stop token, if one was sampled"""
    logprobs: np.ndarray
    """(n,) float32, of each token under the distribution it was drawn from, after temperature and top_p;
    for greedy decoding (temperature 0) under the model's distribution at temperature 1"""
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def sample(
    model: Phi4Mini,
    prompts: list[list[int]],
    params: SamplingParams,
    seeds: list[int],
    *,
    max_batch: int = 256,
    arrived: Callable[[int, Completion], None] = lambda i, completion: None,
) -> list[Completion]:
    """Return one completion per prompt, in the order of the prompts, with at most `max_batch` rows in the cache.

    arrived: called with each prompt's number and completion as soon as it is complete.
    Raises ValueError for an empty prompt, a token outside the vocabulary, another number of seeds than prompts, or a
    prompt that with max_new_tokens exceeds the model's max_positions.
    """
    _check(model, prompts, params, seeds, max_batch)
    if not prompts:
        return []
    # Sorting puts similar lengths together, which needs less padding and reads less of the cache per step, and equal
    # prompts together, so that each is prefilled once.
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    slots = _Slots(model, params, min(max_batch, len(prompts)), max(map(len, prompts)), arrived)
    parked = 0
    while waiting or parked:
        # A batch of a few rows wastes the machine. The last few rows of a wave wait in the first slots until they
        # make a full wave, or until no prompt is left.
        few = slots.num_slots // 8 if waiting else 0
        if waiting and parked <= slots.num_slots // 4:
            wave = waiting[: slots.num_slots - parked]
            del waiting[: len(wave)]
            end = slots.admit(parked, wave, [prompts[i] for i in wave], [seeds[i] for i in wave])
            parked = slots.decode(parked, end, few)
        else:
            parked = slots.decode(0, parked, few)
    return [slots.completions[i] for i in range(len(prompts))]


class _Slots:
    """Rows being sampled. The active rows of a wave are contiguous: the last one replaces one that has ended."""

    def __init__(
        self,
        model: Phi4Mini,
        params: SamplingParams,
        num_slots: int,
        longest_prompt: int,
        arrived: Callable[[int, Completion], None],
    ) -> None:
        device = model.head_weight_VD.device
        self.model, self.params, self.num_slots, self.arrived = model, params, num_slots, arrived
        self.decoder = Decoder(model, num_slots, longest_prompt + params.max_new_tokens)
        self.stop_ids = torch.tensor(params.stop_ids, dtype=torch.long, device=device)
        # One entry per slot: prompt number, random stream, position of the next token, tokens so far.
        self.prompt_N, self.stream_N, self.position_N, self.count_N = (
            torch.zeros(num_slots, dtype=torch.long, device=device) for _ in range(4)
        )
        self.tokens_NM = torch.zeros(
            num_slots, params.max_new_tokens, dtype=torch.long, device=device
        )
        self.logprobs_NM = torch.zeros(num_slots, params.max_new_tokens, device=device)
        self.completions: dict[int, Completion] = {}

    def admit(
        self, start: int, numbers: list[int], prompts: list[list[int]], seeds: list[int]
    ) -> int:
        """Prefill prompts into the slots from `start`, draw their first tokens and return the end of active rows."""
        device, end = self.prompt_N.device, start + len(prompts)
        hidden_BD = self._prefill(start, prompts)
        self.prompt_N[start:end] = torch.tensor(numbers, device=device)
        self.stream_N[start:end] = stream(seeds).to(device)
        self.position_N[start:end] = torch.tensor([len(p) for p in prompts], device=device)
        self.count_N[start:end] = 0
        return self._emit(start, end, hidden_BD)

    def _prefill(self, start: int, prompts: list[list[int]]) -> Tensor:
        """Compute each distinct prompt once, a few thousand tokens at a time; return hidden_BD of the last tokens."""
        device, dtype = self.prompt_N.device, self.model.head_weight_VD.dtype
        hidden = []
        i = 0
        while i < len(prompts):
            different: dict[tuple[int, ...], int] = {}
            rows: list[int] = []
            for prompt in map(tuple, prompts[i:]):
                if (
                    prompt not in different
                    and (len(different) + 1) * len(prompt) > PREFILL_TOKENS
                    and rows
                ):
                    break
                rows.append(different.setdefault(prompt, len(different)))
            lengths = [len(p) for p in different]
            padded_BT = torch.tensor([[*p] + [0] * (lengths[-1] - len(p)) for p in different])
            cache = KVCache(
                self.model.config, len(different), lengths[-1], device=device, dtype=dtype
            )
            hidden_BTD = self.model(padded_BT.to(device), cache=cache)
            rows_B = torch.tensor(rows, device=device)
            last_B = torch.tensor(lengths, device=device) - 1
            hidden.append(hidden_BTD[rows_B, last_B[rows_B]])
            self.decoder.admit(start + i, cache, rows_B)
            i += len(rows)
        return torch.cat(hidden)

    def decode(self, start: int, end: int, few: int) -> int:
        """Sample until at most `few` rows of the wave are active; return the end of active rows."""
        while end - start > few:
            positions_B = self.position_N[start:end]
            token_B = self.tokens_NM[self.decoder.slots_N[start:end], self.count_N[start:end] - 1]
            hidden_BD = self.decoder.step(token_B, positions_B, start, int(positions_B.max()) + 1)
            self.position_N[start:end] += 1
            end = self._emit(start, end, hidden_BD)
        return end

    def _emit(self, start: int, end: int, hidden_BD: Tensor) -> int:
        """Draw one token per row and remove rows that have ended; return the end of active rows."""
        slots_B, count_B = self.decoder.slots_N[start:end], self.count_N[start:end]
        logits_BV = self.model.logits(hidden_BD)
        token_B, logprob_B = draw(logits_BV, self.params, self.stream_N[start:end], count_B)
        self.tokens_NM[slots_B, count_B] = token_B
        self.logprobs_NM[slots_B, count_B] = logprob_B
        count_B += 1
        stop_B = torch.isin(token_B, self.stop_ids)
        finished_B = stop_B | (count_B == self.params.max_new_tokens)
        # From the back, so that the last active row, which moves, is never one that has ended.
        for b in reversed(finished_B.nonzero().squeeze(1).tolist()):
            self._complete(start + b, bool(stop_B[b]))
            end -= 1
            if start + b != end:
                self._move(end, start + b)
        return end

    def _complete(self, slot: int, stopped: bool) -> None:
        n, prompt = int(self.count_N[slot]), int(self.prompt_N[slot])
        self.completions[prompt] = completion = Completion(
            tokens=self.tokens_NM[slot, :n].to(torch.int32).cpu().numpy(),
            logprobs=self.logprobs_NM[slot, :n].clone().cpu().numpy(),
            finish_reason="stop" if stopped else "length",
        )
        self.arrived(prompt, completion)

    def _move(self, source: int, target: int) -> None:
        self.decoder.move(source, target, int(self.position_N[source]))
        for per_slot in (self.prompt_N, self.stream_N, self.position_N, self.count_N):
            per_slot[target] = per_slot[source]
        self.tokens_NM[target] = self.tokens_NM[source]
        self.logprobs_NM[target] = self.logprobs_NM[source]


def draw(
    logits_BV: Tensor, params: SamplingParams, stream_B: Tensor, step_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from random number step_B[b] of stream b; return (token_B, logprob_B).

    Inverts the cumulative distribution in vocabulary order. A token outside top_p is rejected and drawn again. Cutting
    the distribution before the draw would move every boundary when rounding adds or removes one token; with rejection
    only draws of that token change. A token of probability 0 is never drawn.
    """
    logits_BV = logits_BV.float()
    if params.temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)
    p_BV = (logits_BV / params.temperature).softmax(-1)
    token_B = _invert(p_BV, uniforms(stream_B, step_B, 0))
    if params.top_p < 1:
        least_B1 = _least_kept(p_BV, params.top_p)
        kept_BV = p_BV.where(p_BV >= least_B1, 0.0)
        for attempt in range(1, MAX_ATTEMPTS):
            out = (p_BV.gather(1, token_B[:, None]) < least_B1).squeeze(1).nonzero().squeeze(1)
            if not len(out):
                break
            # The last attempt must succeed; a small top_p on a flat distribution reaches it.
            source_BV = p_BV if attempt + 1 < MAX_ATTEMPTS else kept_BV
            token_B[out] = _invert(source_BV[out], uniforms(stream_B[out], step_B[out], attempt))
        p_BV = kept_BV / kept_BV.sum(-1, keepdim=True)
    return token_B, p_BV.gather(1, token_B[:, None]).squeeze(1).log()


def _invert(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True).squeeze(1)


def _least_kept(p_BV: Tensor, top_p: float) -> Tensor:
    """Return the (B, 1) probability of the last token that top_p needs; ties are kept too."""
    least_B1 = p_BV.amax(-1, keepdim=True)
    spread = (
        (least_B1 < top_p).squeeze(1).nonzero().squeeze(1)
    )  # in other rows one token reaches top_p
    if len(spread):
        sorted_BV = p_BV[spread].sort(-1, descending=True).values
        before_BV = sorted_BV.cumsum(-1, dtype=torch.float64) - sorted_BV
        last_B1 = (before_BV < top_p).sum(-1, keepdim=True) - 1
        least_B1[spread] = sorted_BV.gather(1, last_B1)
    return least_B1


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


def _signed(x: int) -> int:
    """Return the int64 with the low 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014) to int64; masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def stream(seeds: list[int]) -> Tensor:
    """Turn integer seeds into int64 stream states; neighbouring seeds get unrelated states."""
    return _mix(torch.tensor([_signed(s) for s in seeds]) * _GOLDEN + _GOLDEN)


def uniforms(stream_B: Tensor, step_B: Tensor, attempt: int) -> Tensor:
    """Return fp64 numbers in [0, 1) from seed, step and attempt, the same on any device and in any batch."""
    bits = _mix(stream_B + (step_B * MAX_ATTEMPTS + attempt + 1) * _GOLDEN)
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
