"""The command `phimini` (and `phimini bench`, see `phimini.bench.cli`).

    phimini recipe tiny                      all four stages, evaluation and report
    phimini recipe tiny seed=1 out=runs/s1   any field of the config can be set
    phimini sft tiny                         one stage of a run (data: distill, curate, base)
    phimini evaluate tiny stage=sft          evaluate one stage's model
    phimini controls tiny                    the control arms of a complete run
    phimini report tiny                      write the report again
    torchrun --nproc-per-node 2 -m phimini.stages.cli recipe tiny tensor_parallel=2

A stage that is complete is not run again; `--redo` does.
"""

import os
import signal
import sys
from pathlib import Path

from phimini.model.config import ModelConfig, preset
from phimini.model.huggingface import load_config
from phimini.parallel.launch import RankFailure, run_ranks
from phimini.parallel.layout import Layout
from phimini.parallel.world import World, initialize
from phimini.stages.config import RunConfig, override
from phimini.stages.controls import controls
from phimini.stages.evaluate import evaluate
from phimini.stages.recipe import DATA, TRAINING, recipe
from phimini.stages.recipes import recipe_config
from phimini.stages.report import write_report
from phimini.stages.stage import Stopped

# What a rank may raise that is no fault of the program, and the exit status that it gives.
EXPECTED = {"ValueError": 2, "Stopped": 130, "KeyboardInterrupt": 130}
VERBS = ("recipe", *DATA, *TRAINING, "evaluate", "controls", "report")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 bad input, 130 stopped by the user."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        return dispatch(arguments)
    except ValueError as error:
        print(f"phimini: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"phimini: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except RankFailure as failure:
        if failure.error is None or failure.error[0] not in EXPECTED:
            raise
        print(f"phimini: {failure.error[1]}", file=sys.stderr)
        return EXPECTED[failure.error[0]]


def dispatch(arguments: list[str]) -> int:
    verb, *rest = arguments
    if verb not in VERBS:
        raise ValueError(f"unknown command {verb!r}; expected one of {', '.join(VERBS)}")
    redo = "--redo" in rest
    words = [word for word in rest if word != "--redo"]
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; expected --redo or key=value")
    if not words:
        raise ValueError(f"{verb}: name a recipe, e.g. `phimini {verb} tiny`")
    name, *assignments = words
    stage = None
    if verb == "evaluate":
        named = [a for a in assignments if a.startswith("stage=")]
        if len(named) != 1:
            raise ValueError(f"evaluate: expected stage=NAME, one of base, {', '.join(TRAINING)}")
        stage = named[0].removeprefix("stage=")
        assignments.remove(named[0])
    run = override(recipe_config(name), assignments)
    if verb == "report":
        write_report(Path(run.out))
        return 0
    if verb in DATA:
        DATA[verb](run, redo=redo)
        return 0
    if "RANK" in os.environ or run.processes == 1:
        run_rank(run, verb, stage, redo)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the ranks save first
        run_ranks(run_rank, run.processes, run, verb, stage, redo)
    return 0


def run_rank(run: RunConfig, verb: str, stage: str | None, redo: bool) -> None:
    """One rank's part of a training verb."""
    layout = Layout(
        tensor=run.tensor_parallel,
        pipeline=run.pipeline_parallel,
        virtual_pipeline=run.virtual_pipeline,
        context=run.context_parallel,
        sequence_parallel=run.sequence_parallel,
    )
    world: World = initialize(layout, model_config(run), seed=run.seed)
    try:
        if verb == "recipe":
            recipe(run, world, redo=redo)
        elif verb == "controls":
            controls(run, world, redo=redo)
        elif stage is not None:
            evaluate(run, world, stage, redo=redo)
        else:
            TRAINING[verb](run, world, redo=redo)
    finally:
        world.close()


def model_config(run: RunConfig) -> ModelConfig:
    return preset(run.model) if run.base == "random" else load_config(Path(run.base))


if __name__ == "__main__":
    sys.exit(main())
