"""The command `phimini`: `bench` is answered here, every other verb by `phimini.stages.cli`.

phimini bench kernels [op ...] [--static] [--traffic] [--quick] [--json PATH]
phimini bench all [--quick] [--only PART,...] [--json PATH]
phimini bench data [--quick] [--json PATH]
phimini bench compare [BASE] NEW
phimini bench bless NEW --reason TEXT
phimini bench readme [--write]
phimini bench golden [--layouts 1,tp2]
phimini bench rollout|weight-sync [--quick] [--json PATH]
phimini bench train [midtrain|sft|dpo|rlvr ...] [--run DIR] [--profile DIR] [--quick] [--json PATH] [key=value ...]
phimini bench sampler|scaling [--quick] [--json PATH]
phimini bench ladder [RUN ...]
phimini bench peers [sft|dpo|grpo ...] [--json PATH]
"""

import importlib
import sys

from phimini.stages.cli import main as stages_main

# A bench is imported when it is asked for: some decide at import whether Triton interprets or compiles.
BENCHES = {
    "all": "phimini.bench.all",
    "data": "phimini.bench.data",
    "peers": "phimini.bench.peers",
    "kernels": "phimini.bench.kernels",
    "compare": "phimini.bench.compare",
    "bless": "phimini.bench.bless",
    "golden": "phimini.bench.golden",
    "ladder": "phimini.bench.ladder",
    "readme": "phimini.bench.readme",
    "rollout": "phimini.bench.rollout",
    "sampler": "phimini.bench.sampler",
    "train": "phimini.bench.train",
    "scaling": "phimini.bench.scaling",
    "weight-sync": "phimini.bench.weight_sync",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; 2 for an unknown bench."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] != "bench":
        return stages_main(arguments)
    if len(arguments) < 2 or arguments[1] not in BENCHES:
        named = repr(arguments[1]) if len(arguments) > 1 else "nothing"
        print(f"phimini: bench: expected one of {', '.join(BENCHES)}, got {named}", file=sys.stderr)
        return 2
    return importlib.import_module(BENCHES[arguments[1]]).main(arguments[2:])


if __name__ == "__main__":
    sys.exit(main())
