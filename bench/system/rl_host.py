"""Host work of an RL step and of the probe, on synthetic answers: CPU seconds and memory of a rank. No model, no GPU.

The functions are those of stage 4. An answer comes as from its engine: with `served`, as rank 0's message of
`vllm serve`; with `colocated`, as arrays on the rank that sampled it. Its tokens are words of a trained tokenizer, and it
ends in a box, which is right or wrong; the making of it is not counted. With `--judges` other processes decode and verify,
and their time is not a rank's. A row is the busiest rank's CPU time in one part, and the bytes held for a token over all
ranks at the part's end; `step` and `probe` are the sums, with the largest resident set of a rank.

    phimini bench rl-host --json rl_host.jsonl
"""

import argparse
import contextlib
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from phimini.bench.gate.options import at_least_one, output_file
from phimini.model.config import preset
from phimini.model.io.checked_files import describe_file
from phimini.model.io.json_files import write_rows
from phimini.model.io.tokenizer import Tokenizer, train_tiny_tokenizer
from phimini.model.sampler import SamplingParams
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training.batch import check_same_data
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.rl.groups import GroupSampler
from phimini.stages.rl.prompt_pool import select_prompts
from phimini.stages.rl.rollout_log import write_rollouts
from phimini.stages.rl.rollouts import Journal, Rollout, to_trainers
from phimini.stages.rlvr import choose, count_unused, describe, rollout_batches
from phimini.stages.rollout.dispatch import Progress, Request
from phimini.stages.rollout.engine import Arrived, First, Sampled, Span, share_of, unnoticed
from phimini.stages.rollout.messages import LOGPROBS, TOKENS, Answer, as_bytes, encode

CONFIG = preset("phi-4-mini")
ENGINES = ("colocated", "served")
GROUP = 8
"""rollouts of a prompt in the step, and PROBED in the probe"""
PROBED = 4
WORDS = 500


class Synthetic:
    """An engine whose answers are random words, of 0.5 to 1.5 times `tokens`; their making is timed apart."""

    def __init__(self, world: World, tokenizer: Tokenizer, served: bool, tokens: int) -> None:
        self._world, self._served, self._tokens = world, served, tokens
        self.making_s = 0.0
        words = np.array(tokenizer.encode(text_of(WORDS)), np.int32)
        self._text = np.resize(words, 2 * tokens + len(words))
        self._logprobs = np.linspace(-3, 0, len(self._text), dtype=np.float32)
        boxes = (r" \boxed{4}", r" \boxed{5}")
        self._ends = [[*tokenizer.encode(box), tokenizer.end_id] for box in boxes]

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        seeds: list[int],
        arrived: Arrived = unnoticed,
        first: First | None = None,
    ) -> list[Sampled | None]:
        """Return this rank's answers; see `Sampler`."""
        mine = share_of(prompts, self._world.rank, self._world.world_size)
        if self._served:
            mine = list(range(len(prompts))) if self._world.is_main else []
        done: list[Sampled | None] = [None] * len(prompts)
        for i in mine:
            begun = time.process_time()
            tokens, logprobs = self._answer(seeds[i])
            spans = [(0, 0, len(tokens))]
            message = encode(Answer(as_bytes(tokens, TOKENS), as_bytes(logprobs, LOGPROBS), "stop", spans)) if self._served else b""  # fmt: skip
            self.making_s += time.process_time() - begun
            if self._served:
                progress = Progress(Request(id=str(i), prompt=prompts[i], params=params, seed=seeds[i]))  # fmt: skip
                progress.add(msgspec.msgpack.decode(message, type=Answer))
                completion = progress.completion("stop")
            else:
                completion = Sampled(tokens=tokens, logprobs=logprobs, finish_reason="stop", versions=(Span(*spans[0]),))  # fmt: skip
            done[i] = completion
            arrived(i, completion)
        return done

    def _answer(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        length = int(rng.integers(self._tokens // 2, self._tokens * 3 // 2))
        start, end = int(rng.integers(WORDS)), self._ends[int(rng.integers(2))]
        tokens = self._text[start : start + length].copy()
        tokens[-len(end) :] = end
        return tokens, self._logprobs[start : start + length].copy()


def text_of(words: int) -> str:
    """Return words of two or three letters: 3.5 characters a token, about those of worked solutions."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (words, 3))
    return " ".join("".join(word[: 2 + i % 2]) for i, word in enumerate(letters))


class Parts:
    """CPU seconds of this rank, and bytes held, by part."""

    def __init__(self, engine: Synthetic) -> None:
        self.engine = engine
        self.cpu_s: dict[str, float] = {}
        self.held_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun, made = time.process_time(), self.engine.making_s
        yield
        spent = time.process_time() - begun - (self.engine.making_s - made)
        self.cpu_s[name] = spent
        if tracemalloc.is_tracing():
            self.held_bytes[name] = tracemalloc.get_traced_memory()[0]

    def add_held(self, name: str, num_bytes: int) -> None:
        """Add to the bytes held at a part's end, if they are counted."""
        if name in self.held_bytes:
            self.held_bytes[name] += num_bytes


def one_rank(
    work: Callable[..., int], run: RunConfig, engine: str, tokens: int, tracing: bool
) -> tuple[Parts, int, int]:
    """Return this rank's parts, its tokens of answers and its largest resident set."""
    world = initialize(Layout(), CONFIG)
    tokenizer = train_tiny_tokenizer([text_of(WORDS)], vocab_size=2000)
    problems = {f"p{i}": {"id": f"p{i}", "question": f"what is {i}?", "answer": "4"} for i in range(run.rlvr.probe_prompts)}  # fmt: skip
    synthetic: Any = Synthetic(world, tokenizer, engine == "served", tokens)
    journal = Journal(Path(run.out), run, world)
    journal.weights = {0: 0}
    sampler = GroupSampler(run, world, synthetic, tokenizer, problems, journal)
    pa.array([0])  # imports pandas if that is installed, once in a process
    if tracing:
        tracemalloc.start()
    parts = Parts(synthetic)
    number = work(run, sampler, parts)
    parts.engine = None  # pyright: ignore[reportAttributeAccessIssue]
    return parts, number, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(run: RunConfig, sampler: GroupSampler, parts: Parts) -> int:
    """Do what `reinforce` does on the host between sampling and the first forward pass. Return the sampled tokens."""
    world, config = sampler.world, run.rlvr
    model: Any = SimpleNamespace(world=world, config=CONFIG, num_updates=0)
    with parts.part("sample"):
        groups = sampler.sample_groups(list(sampler.problems), 0, 1.0)
    with parts.part("choose"):
        chosen: list[Rollout] = choose(groups, config, 0)
        row = describe(groups, chosen, config, 1.0) | {"too_stale": 0}
        count_unused({}, groups, row, config)
        number = sum(rollout.facts.length for group in groups for rollout in group)
        digests = [rollout.digest() for rollout in chosen]
        check_same_data(world, "bench", digests)
    with parts.part("log"):
        write_rollouts(folder_of(run), 0, groups, chosen, sampler)
        del groups
    with parts.part("deliver"):
        chosen = to_trainers(chosen, model)
    # What came from other ranks is in torch's memory, which tracemalloc does not see.
    came = [r.answer for r in chosen if r.answer is not None and world.world_size > 1]
    parts.add_held("deliver", sum(c.tokens.nbytes + c.logprobs.nbytes for c in came))
    del came
    with parts.part("pack"):
        batches = rollout_batches(chosen, model, config)
        check_same_data(world, "bench", digests, batches)
        del batches
    return number


def probe(run: RunConfig, sampler: GroupSampler, parts: Parts) -> int:
    """Choose the prompts to train on. Return the number of tokens, about."""
    with parts.part("probe"):
        select_prompts(folder_of(run), sampler, run.rlvr, sampler.world)
    config = run.rlvr
    return config.probe_prompts * config.probe_rollouts * config.probe_rounds * config.max_new_tokens  # fmt: skip


def folder_of(run: RunConfig) -> Any:
    """Return a stage that keeps its files, and no record of them."""
    path = Path(run.out)
    return SimpleNamespace(
        run=run, name="rlvr", path=path, made={}, record=lambda *names: None,
        note=lambda name, **more: describe_file(path / name),
    )  # fmt: skip


def measure(
    work: Callable[..., int], engine: str, rollouts: int, tokens: int, ranks: int, judges: int
) -> list[dict[str, Any]]:
    """Return the rows of one kind of work: once for CPU time, once more for held bytes."""
    size = PROBED if work is probe else GROUP
    prompts = max(1, rollouts // size)
    with tempfile.TemporaryDirectory(prefix="phimini-bench-") as folder:
        run = override(tiny(), [
            f"out={folder}", f"rollout.judges={judges}", f"rlvr.probe_prompts={prompts}", f"rlvr.prompts_per_step={prompts}",
            f"rlvr.rollouts_per_prompt={size}", f"rlvr.probe_rollouts={size}", f"rlvr.max_new_tokens={tokens}",
            f"rlvr.sequence_length={2 * tokens + 100}", f"rlvr.micro_tokens={2 * tokens + 100}", f"rlvr.oversample_to={size}", "rlvr.rebalance=false",
        ])  # fmt: skip
        timed = run_ranks(one_rank, ranks, work, run, engine, tokens, False)
        again = override(run, [f"out={folder}/again"])
        traced = timed if work is probe else run_ranks(one_rank, ranks, work, again, engine, tokens, True)  # fmt: skip
    of_parts = {name: max(parts.cpu_s[name] for parts, *_ in timed) for name in timed[0][0].cpu_s}
    whole = max(sum(parts.cpu_s.values()) for parts, *_ in timed)
    peak = max(rss for *_, rss in timed)
    number = timed[0][1]
    held = {
        name: sum(parts.held_bytes[name] for parts, *_ in traced) / number
        for name in traced[0][0].held_bytes
    }
    common = {"rollouts": prompts * size, "tokens": tokens, "data_ranks": ranks}
    rest = {"engine": engine, "judges": judges}
    rows = [
        {"part": name, "cpu_seconds_per_rank": round(cpu_s, 4), "held_bytes_per_token": held.get(name), "peak_rss_bytes": None}
        for name, cpu_s in (of_parts if work is step else {}).items()
    ]  # fmt: skip
    rows.append({
        "part": "step" if work is step else "probe", "cpu_seconds_per_rank": round(whole, 4),
        "held_bytes_per_token": max(held.values(), default=None), "peak_rss_bytes": peak,
    })  # fmt: skip
    return [common | row | rest for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Return 0."""
    parser = argparse.ArgumentParser(
        prog="phimini bench rl-host", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rollouts", type=at_least_one, default=1024)
    parser.add_argument("--probed", type=at_least_one, default=80_000, help="rollouts of the probe")
    parser.add_argument("--tokens", type=at_least_one, default=12_288, help="of an answer, on average")  # fmt: skip
    parser.add_argument("--data-ranks", type=at_least_one, default=8)
    parser.add_argument("--judges", type=int, default=2, help="processes of a served engine's rank")
    parser.add_argument("--json", type=output_file, help="write the rows here, as JSON lines")
    options = parser.parse_args(arguments)
    rows = []
    for engine in ENGINES:
        judges = options.judges if engine == "served" else 0
        rows += measure(step, engine, options.rollouts, options.tokens, options.data_ranks, judges)
    rows += measure(probe, "served", options.probed, options.tokens, options.data_ranks, options.judges)  # fmt: skip
    for row in rows:
        held, peak = row["held_bytes_per_token"], row["peak_rss_bytes"]
        print(
            f"{row['engine']:<10}{row['part']:<8}{row['rollouts']:>7,} rollouts x {row['tokens']:,}  "
            f"{row['cpu_seconds_per_rank']:8.3f} CPU s" + (f"  {held:6.2f} bytes a token" if held else "")
            + (f"  peak {peak / 2**30:.2f} GiB" if peak else ""),
            flush=True,
        )  # fmt: skip
    if options.json is not None:
        write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
