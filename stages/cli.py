"""The command `phimini`.

    phimini recipe tiny                      all four stages, evaluation and report
    phimini recipe tiny seed=1 out=runs/s1   any field of the config can be set
    phimini sft tiny                         one stage of a run: midtrain, sft, rollout_dpo, rlvr
                                             (data: distill, curate, base)
    phimini evaluate tiny stage=sft          evaluate one stage's model
    phimini controls tiny                    the control arms of a complete run
    phimini report tiny                      write the report again
    phimini serve tiny address=0.0.0.0:8765  a vLLM engine for rollout.addresses of a run on this or another node
    phimini recipe phi4_mini_reasoning --dry-run [gpu=h100 gpus=8]
                                             check paths, tokenizer and memory; steps, tokens, GPU hours
                                             (a plain `recipe` makes the same checks first)
    phimini plan phi4_mini_reasoning [stage=sft] gpu=h100 gpus=8 [--json PATH]
                                             memory by part, FLOPs and the best layouts of its stages
    phimini launch torchrun|slurm [nodes=2 ...] -- recipe phi4_mini_reasoning
                                             print the script that starts a job on a cluster
    phimini doctor --dist                    under torchrun: are these ranks fit to train together?
    phimini doctor --mismatch tiny           why do sampler and trainer differ? (a run's config as above)
    phimini doctor --gpu-checklist           what to run on the first GPU, and how it was checked without
    phimini bench                            list the benches (`phimini.bench.cli`)
    torchrun --nproc-per-node 2 -m phimini.stages.cli recipe tiny tensor_parallel=2

A stage that is complete is not run again; `--redo` does. One command at a time writes into a run's folder. Exit status:
0 done, 1 a check or plan says no, a rank was lost, the folder is in use, a file cannot be read or written, 2 bad input,
130 stopped and saved (Ctrl-C, SIGTERM; the same command goes on).
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from phimini.model.config import preset
from phimini.model.suggest import nearest
from phimini.parallel.cluster import job_scripts as launch_scripts
from phimini.parallel.cluster import preflight as doctor
from phimini.parallel.plan import command as plan_command
from phimini.parallel.ranks.local_launch import RankFailure, run_ranks
from phimini.parallel.ranks.lost_ranks import LostRanks, closing_or_naming_lost_ranks
from phimini.parallel.ranks.world import World, initialize
from phimini.parallel.training.same_data import DivergedError
from phimini.stages.base import base_config
from phimini.stages.config.recipes import recipe_config
from phimini.stages.config.schema import RunConfig, override, parse_value
from phimini.stages.controls import controls
from phimini.stages.dry_run import dry_run, is_ready
from phimini.stages.evaluate import evaluate
from phimini.stages.recipe import DATA, TRAINING, recipe
from phimini.stages.report.page import write_report
from phimini.stages.rl.mismatch_diagnosis import doctor as mismatch_doctor
from phimini.stages.rollout.separate_vllm import serve
from phimini.stages.run.gpu_checklist import checklist
from phimini.stages.run.lock import RunLock, held_by_main
from phimini.stages.run.output import lasting_output
from phimini.stages.run.stage_folder import Stopped
from phimini.stages.run.trackers import missing_packages
from phimini.stages.run.training import layout_of
from phimini.stages.run.workloads import workloads

# What a rank may raise that is no fault of the program, and the exit status that it gives.
EXPECTED = {
    "ValueError": 2,
    "Stopped": 130,
    "KeyboardInterrupt": 130,
    "LostRanks": 1,
    "DivergedError": 1,
    "ImportError": 2,  # a package that the config asks for; a module of ours would be a ModuleNotFoundError
    # A full disk, an address in use, a path that is not there, no folder or not ours to write.
    **dict.fromkeys(
        ("OSError", "FileNotFoundError", "FileExistsError", "NotADirectoryError", "IsADirectoryError", "PermissionError"), 1
    ),
}  # fmt: skip
VERBS = (
    "recipe",
    *DATA,
    *TRAINING,
    "evaluate",
    "controls",
    "report",
    "serve",
    "plan",
    "launch",
    "doctor",
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a check or plan that says no, 2 bad input, 130 stopped by the user."""
    arguments = sys.argv[1:] if argv is None else argv
    with lasting_output() as output, sigterm_as_ctrl_c():
        status = exit_status(arguments)
    writes_files = {*arguments} & {
        *VERBS[: VERBS.index("serve") + 1]
    } and "--dry-run" not in arguments
    # Of a command that only prints, lost output is the result.
    return status or int(output.lost is not None and not writes_files)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A first SIGTERM raises KeyboardInterrupt, so that what is half written goes; another one does not disturb that.

    A step loop and an export, which have something to save, take the signal over (`stage.Interrupt`).
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only a process's main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def exit_status(arguments: list[str]) -> int:
    """`dispatch`, with expected errors as one line on standard error."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments[0] == "bench":  # lazily: the benches import the stages
        return importlib.import_module("phimini.bench.cli").main(arguments[1:])
    try:
        return dispatch(arguments)
    except ValueError as error:
        print(f"phimini: {error}", file=sys.stderr)
        return 2
    except (OSError, ImportError) as error:
        if type(error).__name__ not in EXPECTED:
            raise
        print(f"phimini: {error}", file=sys.stderr)
        return EXPECTED[type(error).__name__]
    except DivergedError as error:
        print(f"phimini: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"phimini: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except LostRanks as lost:
        print(f"phimini: {lost}", file=sys.stderr, flush=True)
        # Not the interpreter's way: threads of gloo or NCCL may still wait for the missing.
        os._exit(1)
    except RankFailure as failure:
        # Without an error it died, and is named.
        name, message = failure.error or ("", str(failure))
        if failure.error is not None and name not in EXPECTED:
            raise
        print(f"phimini: {message}", file=sys.stderr)
        return EXPECTED.get(name, 1)


def dispatch(arguments: list[str]) -> int:
    verb, *rest = arguments
    if verb not in VERBS:
        raise ValueError(f"unknown command {verb!r}; {nearest(verb, (*VERBS, 'bench'))}")
    if verb == "launch":
        return launch_scripts.main(rest)
    if verb == "doctor":
        return examine(rest)
    if verb == "plan":
        run, words = split(verb, rest, own=("stage", "gpu", "gpus"), options=("--json",))
        there = run.base == "random" or Path(run.base).exists()  # else the preset will do
        return plan_command.main(
            words, base_config(run) if there else preset(run.model), workloads(run)
        )
    if verb == "serve":
        run, words = split(verb, rest, own=("address",))
        if len(words) != 1:
            raise ValueError("serve: expected address=HOST:PORT, e.g. address=0.0.0.0:8765")
        serve(run, base_config(run), words[0].removeprefix("address="))
        return 0
    if verb == "recipe" and "--dry-run" in rest:
        rest.remove("--dry-run")
        run, words = split(verb, rest, own=("gpu", "gpus"))
        return dry_run(run, **machine_of(words))
    own = {"evaluate": ("stage",), "recipe": ("gpu",)}.get(verb, ())
    flags = {"recipe": ("--redo", "--dry-run"), "report": ()}.get(verb, ("--redo",))
    run, words = split(verb, rest, own, flags=flags)
    redo = "--redo" in words
    words = [word for word in words if word != "--redo"]
    if verb == "recipe" and not is_ready(run, machine_of(words).get("gpu"), num_ranks(run)):
        return 1
    stage = None
    if verb == "evaluate":
        if len(words) != 1:
            raise ValueError(f"evaluate: expected stage=NAME, one of base, {', '.join(TRAINING)}")
        stage = words[0].removeprefix("stage=")
        if stage not in (known := ("base", *TRAINING)):
            raise ValueError(f"evaluate stage={stage}: {nearest(stage, known)}")
    if verb == "report":
        with RunLock(run.out):
            write_report(Path(run.out))
        return 0
    if verb in DATA:
        with RunLock(run.out, make=verb == "distill"):
            DATA[verb](run, redo=redo)
        return 0
    start(run, verb, stage, redo)
    return 0


def split(
    verb: str,
    rest: list[str],
    own: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
) -> tuple[RunConfig, list[str]]:
    """`NAME key=value ...` as the recipe's config, and the words that are the verb's `own` keys, its `options` (a
    value follows) and its `flags`."""
    words, kept = [], []
    remaining = iter(rest)
    for word in remaining:
        if word in options:
            kept += [word, *([value] if (value := next(remaining, None)) is not None else [])]
        elif word in flags:
            kept.append(word)
        elif word.partition("=")[0] in own and "=" in word:
            kept.append(word)
        elif word.startswith("-"):
            known = nearest(word, (*options, *flags, *(f"{key}=" for key in own), "KEY=VALUE"))
            raise ValueError(f"{verb}: unknown option {word}; {known}")
        else:
            words.append(word)
    if not words or "=" in words[0]:
        raise ValueError(f"{verb}: name a recipe, e.g. `phimini {verb} tiny`")
    return override(recipe_config(words[0]), words[1:]), kept


def machine_of(words: list[str]) -> dict[str, Any]:
    """gpu= and gpus= as arguments of `dry_run`."""
    values: dict[str, Any] = dict(word.split("=", 1) for word in words)
    if "gpus" in values:
        values["gpus"] = parse_value(values["gpus"], int, "gpus")
    return values


def examine(rest: list[str]) -> int:
    """`phimini doctor`: one of its three examinations."""
    if "--gpu-checklist" in rest:
        print(checklist())
        return 0
    if "--mismatch" in rest:
        run, _ = split("doctor --mismatch", [word for word in rest if word != "--mismatch"])
        start(run, "doctor", None, redo=False)
        return 0
    if "--dist" in rest:
        return doctor.main(rest)
    got = rest[0] if rest else "nothing"
    raise ValueError(
        f"doctor: got {got}; {nearest(got, ('--dist', '--mismatch', '--gpu-checklist'))}"
    )


def num_ranks(run: RunConfig) -> int:
    """Of the job that torchrun started, or that `start` will."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else run.processes


def start(run: RunConfig, verb: str, stage: str | None, redo: bool) -> None:
    """Run the verb in this rank of torchrun's, or in `run.processes` ranks of our own."""
    for problem in missing_packages(run):
        raise ImportError(problem)
    if "RANK" in os.environ or run.processes == 1:
        run_rank(run, verb, stage, redo)
    else:
        run_ranks(run_rank, run.processes, run, verb, stage, redo)


def run_rank(run: RunConfig, verb: str, stage: str | None, redo: bool) -> None:
    """One rank's part of a training verb."""
    world: World = initialize(
        layout_of(run), base_config(run), timeout_s=run.collective_deadline_s, seed=run.seed
    )
    reads_only = verb == "doctor"
    lock = contextlib.nullcontext() if reads_only else held_by_main(world, run.out, make=verb == "recipe")  # fmt: skip
    with closing_or_naming_lost_ranks(world), lock:
        if verb == "recipe":
            recipe(run, world, redo=redo)
        elif verb == "controls":
            controls(run, world, redo=redo)
        elif verb == "doctor":
            mismatch_doctor(run, world)
        elif stage is not None:
            evaluate(run, world, stage, redo=redo)
        else:
            TRAINING[verb](run, world, redo=redo)


if __name__ == "__main__":
    sys.exit(main())
