"""The command `phimini`.

    phimini recipe tiny seed=1 out=runs/s1   any field of the config can be set (also as --seed 1)
    phimini recipe mine.py:my_recipe         a recipe of your own: a Python function that returns the config
    phimini VERB --help                      every setting of a verb, with its default
    torchrun --nproc-per-node 2 -m phimini.stages.cli recipe tiny

A stage that is complete is not run again; `--redo` does. One command at a time writes into a run's folder. Exit status:
0 done, 1 a check or plan says no, a rank was lost, the folder is in use, a file cannot be read or written, 2 bad input,
3 a guard stopped and saved the run, 130 stopped and saved (Ctrl-C, SIGTERM); the same command goes on.
"""

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from phimini.model.suggest import nearest
from phimini.stages.config import options
from phimini.stages.config.cleaning import CleanOptions
from phimini.stages.config.dialect import Words, build, read_words
from phimini.stages.run.limits import limit_behind
from phimini.stages.run.output import lasting_output

# Errors by name, with the exit status of each: their classes would import torch, which a bad word does not need.
EXPECTED = {
    "ValueError": 2,
    "Stopped": 130,
    "GuardStop": 3,
    "KeyboardInterrupt": 130,
    "LostRanks": 1,
    "LostWorkerError": 1,
    "RolloutError": 1,  # all engines are lost
    "WeightSyncError": 1,
    "DivergedError": 1,
    "ImportError": 2,  # a package that the config asks for; a module of ours would be a ModuleNotFoundError
    # A full disk, an address in use, a missing path, a folder that is none or cannot be written.
    **dict.fromkeys(
        ("OSError", "ConnectionError", "FileNotFoundError", "FileExistsError", "NotADirectoryError", "IsADirectoryError", "PermissionError"), 1
    ),
}  # fmt: skip


class Verb(NamedTuple):
    """A row of the table of verbs."""

    line: str
    """its line of help"""
    options: type | None = None
    """the dataclass that its words become; None: the function takes the words"""
    function: str = "phimini.bench.cli:main"
    """imported when the verb is called: `function(verb, settings) -> exit status`"""
    writes: bool = False
    """its result is in files: lost standard output is no failure"""
    names: tuple[str, ...] = ()
    """fields of the options that words without `=` give, in this order"""


def _stage(line: str, function: str = "train", kind: type | None = options.StageOptions) -> Verb:
    return Verb(line, kind, f"phimini.stages.commands:{function}", writes=True)


def _prints(line: str, function: str, kind: type | None) -> Verb:
    return Verb(line, kind, f"phimini.stages.commands:{function}")


VERBS = {
    "recipe": _stage("all four stages, evaluation and report; --dry-run checks and plans only", "run_recipe", options.RecipeOptions),
    "clean": Verb("data: verify, annotate and clean a corpus: SOURCE OUT [executor=slurm] (extra `data`)", CleanOptions, "phimini.stages.corpus.clean:main", writes=True, names=("source", "out")),
    "distill": _stage("data: questions, the teacher's rollouts, verdicts", "prepare"),
    "curate": _stage("data: the subset for stage 2", "prepare"),
    "base": _stage("the model and tokenizer that stage 1 starts from", "prepare"),
    "tokenize": _stage("data: the rows of stages 1 and 2 as token ids, by all cores", "prepare"),
    "midtrain": _stage("stage 1: mid-training on every correct rollout"),
    "sft": _stage("stage 2: fine-tuning on the subset"),
    "rollout_dpo": _stage("stage 3: DPO on pairs of correct and incorrect rollouts"),
    "rlvr": _stage("stage 4: reinforcement learning with verified rewards"),
    "evaluate": _stage("evaluate one stage's model: stage=sft", "run_evaluate", options.EvaluateOptions),
    "evaluate MODEL": Verb("benchmarks of any model: benchmarks=aime24,math500 data=FOLDER", options.BenchmarkOptions, "phimini.stages.commands:run_benchmarks", writes=True, names=("model",)),
    "compare": Verb("two runs side by side, or paired differences of two results of `evaluate MODEL`: A B", options.CompareOptions, "phimini.stages.benchmarks.compare:compare", names=("before", "after")),
    "controls": _stage("the control arms of a complete run"),
    "report": _stage("write a run's report and pages of tokens as it is: report RUN, a folder or a recipe", "run_report", None),
    "watch": _prints("what a run does, every second: watch RUN, a folder or a recipe", "run_watch", None),
    "push": Verb("a stage's model and its card to the Hugging Face Hub: push runs/tiny/rlvr repo=OWNER/NAME", options.PushOptions, "phimini.stages.publish.push:push", names=("model",)),
    "serve": _stage("an engine of `vllm serve` for rollout.addresses of a run; its key is in PHIMINI_API_KEY", "run_serve", options.ServeOptions),
    "data trace": _prints("where the row ID came from, and what each step did with it: data trace ID RECIPE", "trace_row", None),
    "data pages": _prints("write a page about the data set of each stage", "write_pages", options.RunOptions),
    "config": Verb("the resolved config, and the origin of each value", None, "phimini.stages.config.origins:config"),
    "plan": _prints("memory, FLOPs and best layouts: [stage=sft] gpu=h100 gpus=8 [--json PATH]", "run_plan", options.PlanOptions),
    "launch torchrun": _prints("print a job script: [nodes=2 ...] -- recipe RECIPE ...", "launch", None),
    "launch slurm": _prints("the same for sbatch", "launch", None),
    "doctor": Verb("is this machine ready for a recipe? packages, GPU, disk, tokenizer; --parity, --json PATH", options.DoctorOptions, "phimini.stages.doctor.page:doctor"),
    "doctor --dist": _prints("under torchrun: are these ranks fit to train together?", "examine_job", options.DistOptions),
    "doctor --mismatch": _prints("why do sampler and trainer of a run differ?", "explain_mismatch", options.RunOptions),
    "gpu-day": Verb("every check that needs a GPU, within minutes=8; a rehearsal without one", options.GpuDayOptions, "phimini.bench.gpu_day.command:main", writes=True),
    "bench": Verb("measure; names its benches"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    with lasting_output() as output, sigterm_as_ctrl_c():
        status, writes = exit_status(arguments)
    if status in (2, 3) and "RANK" in os.environ:  # imported late: it loads torch
        function_of("phimini.parallel.ranks.process:end_job_without_restart")()
    return status or int(output.lost is not None and not writes)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGTERM, so that half-written files are removed, and ignore later ones.

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


def exit_status(arguments: list[str]) -> tuple[int, bool]:
    """Return the exit status, and whether the result is in files; an expected error becomes one line on stderr."""
    try:
        return dispatch(arguments)
    except SystemExit as end:  # tyro has printed the help
        return int(end.code or 0), False
    except (Exception, KeyboardInterrupt) as error:
        kind, message = type(error).__name__, str(error)
        if isinstance(error, ValueError):
            kind = "ValueError"
        elif kind == "RankFailure":  # a rank that died without an error is lost
            kind, message = getattr(error, "error", None) or ("LostRanks", message)
        limit = limit_behind(kind, message)
        if kind not in EXPECTED and limit is None:
            raise
        words = message or ("stopped" if limit is None else kind)
        # One write: ranks share this stream, and a line end of its own could come after another rank's line.
        print(f"phimini: {words}{f'; {limit}' if limit else ''}\n", end="", file=sys.stderr, flush=True)  # fmt: skip
        if type(error).__name__ == "LostRanks":
            # Without the interpreter's end: threads of gloo or NCCL may still wait for the missing ranks.
            os._exit(1)
        return 1 if limit else EXPECTED[kind], False


def dispatch(arguments: list[str]) -> tuple[int, bool]:
    """Find the verb, build its settings and call its function."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{page(VERBS)}")
        return 0, False
    name, words = verb_of(arguments)
    if name == "bench":
        return function_of("phimini.bench.cli:main")(words), False
    if name not in VERBS:  # `doctor --help`
        print(page([verb for verb in VERBS if verb.startswith(f"{name} ")]))
        return 0, False
    verb = VERBS[name]
    settings: Any = words
    if verb.options is not None and issubclass(verb.options, options.RunOptions):
        settings = options.of_recipe(verb.options, read_words(words, verb.options, name, names=1))
    elif verb.options is not None:
        settings = build(
            verb.options,
            _with_names(verb, read_words(words, verb.options, name, names=len(verb.names))),
        )
    writes = verb.writes and not getattr(settings, "dry_run", False)
    return function_of(verb.function)(name, settings), writes


def _with_names(verb: Verb, words: Words) -> Words:
    """Give the bare words to the fields that they are for."""
    given = dict(zip(verb.names, words.names, strict=False)) | words.given
    return dataclasses.replace(words, given=given)


def verb_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the verb, which may be of two words, and the other words. ValueError if there is no such verb."""
    first, *rest = arguments
    if first == "evaluate" and _is_of_benchmarks(rest):
        return "evaluate MODEL", [word for word in rest if word != "MODEL"]
    seconds = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if first in VERBS and not (set(seconds) - {"MODEL"}) & set(rest):
        return first, rest
    if not seconds:
        raise ValueError(
            f"unknown command {first!r:.60}; {nearest(first, dict.fromkeys(name.split()[0] for name in VERBS))}"
        )
    own = rest[: rest.index("--")] if "--" in rest else rest
    for second in seconds:
        if second in own:
            rest.remove(second)
            return f"{first} {second}", rest
    if "--help" in own or "-h" in own:
        return first, rest
    got = rest[0] if rest else "nothing"
    raise ValueError(f"{first}: got {got}; {nearest(got, seconds)}")


def _is_of_benchmarks(words: list[str]) -> bool:
    keys = {word.removeprefix("--").partition("=")[0] for word in words}
    return bool({"benchmarks", "MODEL"} & keys) or "stage" not in keys and any(map(os.path.isdir, words))  # fmt: skip


def page(verbs: Any) -> str:
    return "\n".join(f"    {name:<23} {VERBS[name].line}" for name in verbs)


def function_of(path: str) -> Any:
    """Import `module:function`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
