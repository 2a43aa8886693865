"""The command `phimini bench` (also installed as `phimini-bench`): the table of benches and their exit statuses.

A bench is a module of this package with `main(arguments) -> status`: 0 done, 1 a check fails, 2 bad input. Modules are
imported only when their bench is called, because some of them decide at import whether Triton interprets or compiles.
"""

import importlib
import sys
from typing import NamedTuple

from phimini.model.suggest import nearest
from phimini.stages.cli import EXPECTED
from phimini.stages.run.output import lasting_output


class Bench(NamedTuple):
    module: str
    """below phimini.bench"""
    usage: str
    summary: str


BENCHES = {
    "kernels": Bench(
        "ops.kernels", "[OP ...] [--static | --traffic] [--quick [--compile]] [--json PATH]",
        "Time every op, compile it for GPUs that are not there, or count the bytes it asks for",
    ),
    "train": Bench(
        "system.train", "[STAGE ...] [--run DIR] [--steps N] [--quick] [--profile DIR] [--json PATH] [key=value ...]",
        "Time steps of the real training stages: speed, share of each phase, memory",
    ),
    "step": Bench(
        "system.step", "[STAGE ...] [--model NAME] [--lengths N,...] [--recompute MODE] [--fp8 MODE] [--timed] [--profile DIR] [--json PATH]",
        "Time a full-size step on a GPU; without one count it: kernels, bytes, peak, host time, and a predicted time",
    ),
    "rollout": Bench(
        "system.rollout", "[--model NAME] [--rounds N] [--quick] [--json PATH]",
        "Tokens per second of the local engine and of vLLM, in turns",
    ),
    "rl-host": Bench(
        "system.rl_host", "[--rollouts N] [--probed N] [--tokens N] [--data-ranks N] [--judges N] [--json PATH]",
        "CPU seconds and memory of a rank in an RL step and the probe, on synthetic answers",
    ),
    "weight-sync": Bench(
        "system.weight_sync", "[--model NAME] [--repeats N] [--quick] [--json PATH]",
        "Time a weight sync into vLLM by phase, over every layout and transport",
    ),
    "data": Bench(
        "system.data", "[--rounds N] [--quick] [--json PATH]",
        "Time reading, packing and verifying: the Python work around the GPU",
    ),
    "verifier": Bench(
        "system.verifier", "[--workers N] [--rounds N] [--quick] [--json PATH]",
        "Verdicts per second through the pool of judges, on integers and on expressions",
    ),
    "scaling": Bench(
        "system.scaling", "[--quick] [--json PATH]",
        "Time a step as sequence, batch, vocabulary and data set grow",
    ),
    "peers": Bench(
        "peers.command", "[sft] [dpo] [grpo] [--rounds N] [--steps N] [--python PATH] [--json PATH]",
        "Compare stages 2, 3 and 4 with TRL's trainers, in turns",
    ),
    "all": Bench(
        "gate.run_all", "[--quick | --shortest] [--only PART,...] [--json PATH]",
        "Run every bench and collect the rows in one file",
    ),
    "compare": Bench(
        "gate.compare", "[BASE] NEW [--baselines DIR] [--absolute auto|always|never] [--partial] [--verbose]",
        "Compare the rows of a run with a baseline; fail where one is slower or larger",
    ),
    "bless": Bench(
        "gate.bless", "NEW [NEW ...] --reason TEXT [--baselines DIR]",
        "Make the rows of a run the baseline of their device",
    ),
    "golden": Bench(
        "gate.golden", "[--layouts 1,tp2] [--bless --reason TEXT] [--baselines DIR]",
        "Compare losses of the first steps with the committed ones, bit by bit, and across layouts",
    ),
    "readme": Bench(
        "results_page", "[RUN ...] [--baselines DIR]",
        "Write bench/results/README.md from the committed rows",
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one bench and return its exit status; 2 for an unknown name, 1 where the standard output was lost."""
    with lasting_output() as output:
        status = run(sys.argv[1:] if argv is None else argv)
    return status or int(output.lost is not None)


def run(arguments: list[str]) -> int:
    """Return the exit status of the bench that `arguments` names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        for name, bench in BENCHES.items():
            print(f"phimini bench {name} {bench.usage}\n    {bench.summary}")
        return 0
    name, *rest = arguments
    if name not in BENCHES:
        print(f"phimini: unknown bench {name!r:.60}; {nearest(name, BENCHES)}", file=sys.stderr)
        return 2
    from phimini.parallel.ranks.local_launch import RankFailure  # late: it loads torch

    try:
        return importlib.import_module(f"phimini.bench.{BENCHES[name].module}").main(rest)
    except (ValueError, OSError, RankFailure) as error:
        kind, message = type(error).__name__, str(error)
        if isinstance(error, RankFailure):
            kind, message = error.error or (kind, message)
        elif isinstance(error, ValueError):  # its subclasses too
            kind = "ValueError"
        if kind not in EXPECTED:
            raise
        print(f"phimini: bench {name}: {message}", file=sys.stderr)
        return EXPECTED[kind]


if __name__ == "__main__":
    sys.exit(main())
