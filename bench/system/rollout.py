"""Tokens per second of the local engine, of vLLM in the process, and of `vllm serve`, in turns, on the same prompts and weights.

An engine is timed only if its log-probs are those of the reference model; max |dlogp| is the row's error. On a CPU the
unit is tokens per second of CPU time, with one thread; the served engine's own processes count. `phimini` is the local
engine; its reference is `vllm`, the colocated one.
"""

import contextlib
import statistics
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch

from phimini.bench.gate.options import at_least_one, finish, parser
from phimini.bench.gate.rows import Row
from phimini.bench.system.weight_sync import MODELS
from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.model.sampler import SamplingParams
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.rollout.colocated_vllm import ColocatedVllm
from phimini.stages.rollout.engine import LocalEngine, RolloutEngine, Sampled
from phimini.stages.rollout.launch import transport_of
from phimini.stages.rollout.separate_vllm import SeparateVllm
from phimini.stages.rollout.vllm_settings import engine_settings, require_vllm

ENGINES = {"phimini": "local", "vllm": "colocated", "vllm-served": "served"}
"""the engine of each provider"""
LIMIT = {"float32": 1e-4, "bfloat16": 0.5}
"""largest max |dlogp| of a timed row, by dtype"""
SHAPES = ((1, 32, 64), (32, 32, 64), (128, 32, 64), (128, 128, 64))
"""batch, prompt tokens, new tokens"""


def main(argv: list[str] | None = None) -> int:
    """Return 0; 1 where an engine's log-probs are not the reference model's."""
    options = parser("rollout", __doc__)
    options.add_argument("--model", choices=MODELS, default="tiny")
    options.add_argument("--rounds", type=at_least_one, default=15)
    options.add_argument("--quick", action="store_true", help="one small shape, five rounds")
    args = options.parse_args(argv)
    require_vllm()
    shapes, rounds = (SHAPES[1:2], 5) if args.quick else (SHAPES, args.rounds)
    rows = run_ranks(measure, 1, MODELS[args.model], shapes, rounds)[0]
    for row in rows:
        print(line(row))
    status = finish(args.json, rows, [plain(row) for row in rows])
    return status if all(row.correct for row in rows) else 1


def measure(
    config: ModelConfig, shapes: tuple[tuple[int, int, int], ...], rounds: int
) -> list[Row]:
    largest = max(batch for batch, _, _ in shapes)
    run = override(tiny(), ["rollout.engine=vllm", f"rollout.max_batch={largest}"])
    separate = override(run, ["rollout.placement=separate"])
    world = initialize(Layout(), config)
    model = build_model(config, world, seed=0)
    settings = engine_settings(run, config, "inproc")
    served_settings = engine_settings(separate, config, transport_of(separate))
    served = SeparateVllm(separate, config, served_settings, world)
    engines: dict[str, RolloutEngine] = {
        "phimini": LocalEngine(config, world, largest),
        "vllm": ColocatedVllm(config, settings, world, run.rollout.deadline_s),
        "vllm-served": served,
    }
    for engine in engines.values():
        engine.sync(model)
    reference = Phi4Mini(config).to(world.device).eval()
    reference.load_state_dict(dict(to_hf(model)), strict=False)
    rows = [
        row
        for shape in shapes
        for row in measure_shape(engines, reference, shape, rounds, LIMIT[settings.dtype])
    ]
    served.close()
    return rows


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the engines that it started."""
    spent = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            spent += sum(child.cpu_times()[:2])
    return spent


def measure_shape(
    engines: dict[str, RolloutEngine],
    reference: Phi4Mini,
    shape: tuple[int, int, int],
    rounds: int,
    limit: float,
) -> list[Row]:
    batch, prompt_tokens, new_tokens = shape
    params = SamplingParams(temperature=1.0, max_new_tokens=new_tokens, stop_ids=())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    errors: dict[str, float] = {}
    for number in range(rounds + 1):  # the first round is checked, not timed
        # Other prompts every round, because an engine may cache prefixes.
        generator = torch.Generator().manual_seed(number)
        vocabulary = reference.config.vocab_size
        prompts = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator).tolist()
        order = list(engines)[:: 1 if number % 2 else -1]
        for name in order:
            clock = cpu_seconds if name == "vllm-served" else time.process_time
            wall, cpu = time.perf_counter(), clock()
            held = engines[name].generate(prompts, params, list(range(batch)))
            spent = time.perf_counter() - wall, clock() - cpu
            done = [c for c in held if c is not None]
            assert sum(len(c.tokens) for c in done) == batch * new_tokens, "no answer stops early"
            if number == 0:
                errors[name] = error_of(reference, prompts, done)
            else:
                seconds[name].append(spent)
    # On a GPU the process's CPU time does not measure the work.
    unit, which = ("tokens/s", 0) if torch.cuda.is_available() else ("tokens/cpu_s", 1)
    rates = {n: [batch * new_tokens / spent[which] for spent in seconds[n]] for n in engines}
    rows = []
    for name in engines:
        right = errors[name] <= limit
        held = name == "phimini" and right and errors["vllm"] <= limit
        rows.append(
            Row(
                bench="rollout",
                case={"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
                provider=name,
                unit=unit,
                samples=rates[name] if right else [],
                correct=right,
                reference="vllm" if held else None,
                reference_samples=rates["vllm"] if held else [],
                error=errors[name],
                info={
                    f"tokens_per_{clock}": statistics.median(
                        batch * new_tokens / s[i] for s in seconds[name]
                    )
                    for i, clock in enumerate(("second", "cpu_second"))
                },
            )
        )
    return rows


@torch.no_grad()
def error_of(reference: Phi4Mini, prompts: list[list[int]], done: list[Sampled]) -> float:
    """Return the largest |reported log-prob - the reference model's|."""
    device = reference.head_weight_VD.device
    answers_BT = torch.from_numpy(np.stack([c.tokens for c in done])).long()
    tokens_BT = torch.cat([torch.tensor(prompts), answers_BT], 1).to(device)
    first = len(prompts[0])
    hidden_BTD = reference(tokens_BT[:, :-1])[:, first - 1 :]
    logp_BTV = (hidden_BTD @ reference.head_weight_VD.T).float().log_softmax(-1)
    expected = logp_BTV.gather(2, tokens_BT[:, first:, None])[..., 0].cpu()
    return (expected - torch.from_numpy(np.stack([c.logprobs for c in done]))).abs().max().item()


def plain(row: Row) -> dict[str, Any]:
    """Return one engine's row in JSON types; its rates are None where its log-probs are wrong."""
    rates = {
        name: row.info[name] if row.correct else None
        for name in ("tokens_per_second", "tokens_per_cpu_second")
    }
    return {"engine": ENGINES[row.provider], **row.case, **rates, "max_abs_dlogp": row.error}


def line(row: Row) -> str:
    sizes = "  ".join(f"{k.replace('_', ' ')} {v:>4}" for k, v in row.case.items())
    if row.value is None:
        return f"{ENGINES[row.provider]:<10}{sizes}  WRONG: max |dlogp| {row.error}"
    return (
        f"{ENGINES[row.provider]:<10}{sizes}  {row.value.p50:>9.0f} {row.unit} ({row.value.p20:.0f} to {row.value.p80:.0f})  "
        f"{row.info['tokens_per_second']:>9.0f} tokens/s  max |dlogp| {row.error:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
