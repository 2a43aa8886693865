"""The sampler: the distribution of its draws, and their independence of the batch.

B rows, V vocabulary. The models are small and their matrices wide, so that distributions are far from flat.
"""

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch
from model_cases import SMALL, build
from torch import Tensor

from phimini.model import sampler
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import Completion, SamplingParams, draw, sample, stream, uniforms

MICRO = dataclasses.replace(SMALL, num_layers=1, vocab_size=8)


def prompts_of(num: int, vocab_size: int = SMALL.vocab_size) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (num,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def params_of(**changes) -> SamplingParams:
    return SamplingParams(
        **({"temperature": 1.0, "max_new_tokens": 24, "stop_ids": (1, 2, 3)} | changes)
    )


def exact_logprobs(
    model: Phi4Mini, prompt: list[int], tokens: Iterable[int], temperature: float
) -> Tensor:
    """Return log-probs (len(tokens), V) at the given temperature, from one full forward."""
    with torch.no_grad():
        logits_BTV = model.logits(model(torch.tensor([prompt + [int(t) for t in tokens]])))
    return (logits_BTV[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


MODES = {
    "T 1": params_of(),
    "T 0.6": params_of(temperature=0.6),
    "top-p": params_of(temperature=0.8, top_p=0.9),
    "greedy": params_of(temperature=0.0),
}


@pytest.mark.parametrize("params", MODES.values(), ids=MODES)
def test_a_sample_does_not_depend_on_its_batch(params: SamplingParams) -> None:
    model = build()
    prompts = prompts_of(21)
    prompts[4] = prompts[5] = prompts[6]  # prefilled once
    seeds = list(range(100, 121))
    want = [c.tokens.tolist() for c in sample(model, prompts, params, seeds)]
    assert len({len(t) for t in want}) > 3, "expected completions of many lengths"
    for max_batch in (1, 4, 8):
        assert [
            c.tokens.tolist() for c in sample(model, prompts, params, seeds, max_batch=max_batch)
        ] == want
    backwards = sample(model, prompts[::-1], params, seeds[::-1], max_batch=16)
    assert [c.tokens.tolist() for c in backwards[::-1]] == want
    assert sample(model, [prompts[9]], params, [seeds[9]])[0].tokens.tolist() == want[9]


def test_a_batch_dependent_generator_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, seeds = build(), prompts_of(9), list(range(9))
    monkeypatch.setattr(
        sampler, "uniforms", lambda stream_B, *_: torch.rand(len(stream_B), dtype=torch.float64)
    )
    torch.manual_seed(0)
    want = [c.tokens.tolist() for c in sample(model, prompts, params_of(), seeds)]
    torch.manual_seed(0)
    assert [
        c.tokens.tolist() for c in sample(model, prompts, params_of(), seeds, max_batch=4)
    ] != want


def test_stragglers_are_parked_and_resumed() -> None:
    """Many short completions, a few up to the limit, and few slots, so that every kind of wave occurs."""
    model, prompts = build(), prompts_of(70)
    params = params_of(max_new_tokens=60, stop_ids=tuple(range(0, 96, 5)))
    want = sample(model, prompts, params, list(range(70)))
    assert max(len(c.tokens) for c in want) > 4 * sum(len(c.tokens) for c in want) / 70
    got = sample(model, prompts, params, list(range(70)), max_batch=16)
    assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in want]


def test_seeds_decide() -> None:
    model, prompt = build(), [7, 8, 9]
    a, b, c = sample(model, [prompt] * 3, params_of(), [5, 5, 6])
    a, b, c = (completion.tokens.tolist() for completion in (a, b, c))
    assert a == b and a != c
    # Any integer is a seed.
    d, e = sample(model, [prompt] * 2, params_of(), [2**200 + 5, -3])
    assert d.tokens.tolist() == a and e.tokens.tolist() != a


@pytest.mark.parametrize("name", ["T 1", "T 0.6", "greedy"])
def test_logprobs_are_those_of_the_full_forward(name: str) -> None:
    # Narrower matrices: the wide ones amplify the last bit of any two orders of summation beyond 1e-5.
    model, prompts, params = build(width=1.5), prompts_of(12), MODES[name]
    for prompt, c in zip(prompts, sample(model, prompts, params, list(range(12))), strict=True):
        logp = exact_logprobs(model, prompt, c.tokens, params.temperature or 1.0)
        chosen = logp.gather(1, torch.tensor(c.tokens).long()[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(c.logprobs), chosen, rtol=0, atol=1e-5)
        if params.temperature == 0:
            assert logp.argmax(-1).tolist() == c.tokens.tolist()
        elif params.temperature != 1:  # the model's own log-probs would be something else
            plain = exact_logprobs(model, prompt, c.tokens, 1.0).gather(
                1, torch.tensor(c.tokens).long()[:, None]
            )
            assert (plain.squeeze(1) - chosen).abs().max() > 1e-2


def test_top_p_logprobs_are_renormalised() -> None:
    model, prompts, params = build(width=1.5), prompts_of(12), MODES["top-p"]
    for prompt, c in zip(prompts, sample(model, prompts, params, list(range(12))), strict=True):
        p_TV = exact_logprobs(model, prompt, c.tokens, params.temperature).exp()
        for p_V, token, logprob in zip(p_TV, c.tokens, c.logprobs, strict=True):
            mass = p_V.sort(descending=True).values.cumsum(-1)
            n = int((mass < params.top_p).sum())  # the token that reaches top_p has rank n
            assert p_V[token] >= p_V.sort(descending=True).values[n] - 1e-6
            # Within rounding of top_p the set may hold one token more or less.
            possible = (p_V[token] / mass[max(n - 1, 0) : n + 2]).log()
            assert (possible - logprob).abs().min() < 1e-5


def counts(logits_V: Tensor, params: SamplingParams, num: int) -> Tensor:
    token_B, _ = draw(
        logits_V.expand(num, -1),
        params,
        stream(list(range(num))),
        torch.zeros(num, dtype=torch.long),
    )
    return torch.bincount(token_B, minlength=len(logits_V))


def assert_counts(got_V: Tensor, p_V: Tensor) -> None:
    """Assert that each count is within 5 standard deviations, and that impossible tokens do not occur."""
    num = int(got_V.sum())
    error = (got_V - num * p_V).abs()
    assert bool((error <= 5 * (num * p_V * (1 - p_V)).sqrt() + 1e-9).all()), (
        f"{got_V} for {num * p_V}"
    )


def test_temperature_by_counting() -> None:
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.9, 0.0, -torch.inf, 1.4])
    for temperature in (0.5, 1.0, 1.7):
        got_V = counts(logits_V, params_of(temperature=temperature), 40_000)
        assert_counts(got_V, (logits_V / temperature).softmax(-1))
        with pytest.raises(AssertionError):  # the count is sharp enough to see another temperature
            assert_counts(got_V, (logits_V / (temperature * 1.1)).softmax(-1))


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.8, 0.999])
def test_top_p_by_counting(top_p: float) -> None:
    p_V = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    kept = {0.3: [1], 0.5: [1, 3], 0.8: [1, 3, 4], 0.999: [0, 1, 2, 3, 4]}[top_p]
    want_V = torch.zeros(5)
    want_V[kept] = p_V[kept] / p_V[kept].sum()
    assert_counts(counts(p_V.log(), params_of(top_p=top_p), 40_000), want_V)


def test_a_small_top_p_on_a_flat_distribution() -> None:
    """Nearly every draw falls outside top_p, so the last attempt, which cannot, decides."""
    logits_V = torch.zeros(512)
    logits_V[[3, 200, 511]] = 0.5
    got_V = counts(logits_V, params_of(top_p=0.005), 3000)
    assert got_V.nonzero().squeeze(1).tolist() == [3, 200, 511]
    assert_counts(got_V, (logits_V == 0.5) / 3.0)


def test_completions_follow_the_model() -> None:
    """The joint distribution of the first two tokens, over prefill and one cached step."""
    model, prompt, num = build(MICRO), [5, 1, 6], 6000
    params = SamplingParams(temperature=0.7, max_new_tokens=2, stop_ids=())
    pairs = torch.tensor(
        [c.tokens.tolist() for c in sample(model, [prompt] * num, params, list(range(num)))]
    )
    rows = [exact_logprobs(model, prompt, [i, 0], 0.7).exp() for i in range(8)]
    want = torch.cat([row[0, i] * row[1] for i, row in enumerate(rows)])
    assert_counts(torch.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64), want)


def test_uniforms() -> None:
    # splitmix64 started at 0: the published first output.
    first = sampler._mix(torch.tensor([sampler._GOLDEN])).item()
    assert first % 2**64 == 0xE220A8397B1DCDAF
    step_B = torch.zeros(50_000, dtype=torch.long)
    streams_B = stream(list(range(50_000)))
    u = uniforms(streams_B, step_B, 0)
    for other in (uniforms(streams_B, step_B + 1, 0), uniforms(streams_B, step_B, 1), u.roll(1)):
        correlation = torch.corrcoef(torch.stack((u, other)))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(50_000)
    assert 0 <= u.min() and u.max() < 1
    assert torch.histc(u, 20, 0, 1).sub(2500).abs().max() < 5 * math.sqrt(2500)


def test_stop_and_length() -> None:
    model, prompts = build(), prompts_of(30)
    completions = sample(model, prompts, params_of(max_new_tokens=30), list(range(30)))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for c in completions:
        stops = [t in (1, 2, 3) for t in c.tokens]
        assert not any(stops[:-1])
        assert stops[-1] == (c.finish_reason == "stop")
        assert len(c.tokens) == 30 or stops[-1]
        assert len(c.logprobs) == len(c.tokens) <= 30


def test_one_token_and_no_prompts() -> None:
    model = build()
    (c,) = sample(model, [[4]], params_of(max_new_tokens=1, stop_ids=()), [0])
    assert (len(c.tokens), c.finish_reason) == (1, "length")
    assert sample(model, [], params_of(), []) == []
    assert isinstance(c, Completion)


def test_up_to_the_last_position() -> None:
    model = build(dataclasses.replace(MICRO, max_positions=160))
    (c,) = sample(model, [[1] * 150], params_of(max_new_tokens=10, stop_ids=()), [0])
    assert len(c.tokens) == 10


@pytest.mark.parametrize(
    ("prompts", "seeds", "changes", "message"),
    [
        ([[1]], [1, 2], {}, "one seed per prompt \\(1\\), got 2"),
        ([[1], []], [1, 2], {}, "prompt 1 is empty"),
        ([[1, 96]], [1], {}, "prompt 0 has token 96; expected 0 to 95"),
        ([[-1, 5]], [1], {}, "prompt 0 has token -1"),
        (
            [[1] * 500],
            [1],
            {},
            "500 tokens with max_new_tokens 24 exceeds the model's max_positions 512",
        ),
    ],
    ids=["seeds", "empty", "too large", "negative", "too long"],
)
def test_wrong_prompts(prompts: list, seeds: list, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(build(), prompts, params_of(**changes), seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected a number in \\(0, 1\\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
    ],
)
def test_wrong_params(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params_of(**changes)


def test_wrong_max_batch() -> None:
    with pytest.raises(ValueError, match="max_batch of at least 1, got 0"):
        sample(build(), [[1]], params_of(), [0], max_batch=0)
