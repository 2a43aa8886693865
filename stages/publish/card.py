"""The model card of a stage's model, README.md, written from the sealed records of its run.

A card is public: of a path it shows the last part only, and of endpoints nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from phimini.model.io.checked_files import read_sealed
from phimini.model.io.huggingface import load_config
from phimini.model.io.json_files import write_text
from phimini.model.io.tokenizer import Tokenizer
from phimini.stages.benchmarks.scores import RESULTS
from phimini.stages.report import formats
from phimini.stages.report.page import STAGE_NAMES
from phimini.stages.run.outputs import SUMMARY

STAGES = list(STAGE_NAMES)
_TEMPLATE = Path(__file__).with_name("templates") / "card.md.j2"
_PRIVATE = ("distill.teacher.url", "distill.teacher.key_variable")


def write_card(stage: Path) -> Path:
    """Write `model/README.md` into a complete stage's folder, and return its path.

    Raises ValueError for a folder that is no complete stage with a model, and for a record that is damaged.
    """
    made = records(stage)
    out, own = stage.parent, made[stage.name]
    config, tokenizer = load_config(stage / "model"), Tokenizer.load(stage / "model")
    scores = evaluations(out, made)
    found = benchmarks(out, stage.name, own)
    settings = {key: value for record in made.values() for key, value in public(record["settings"])}
    title = f"{out.resolve().name}-{stage.name}"
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["phimini", "math", "reasoning"], model_name=title,
        eval_results=list(metadata(scores.get(stage.name), found)),
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(_TEMPLATE), title=title, stage=stage.name, names=STAGE_NAMES, made=made, config=config,
        stop=[tokenizer.decode([token]) for token in dict.fromkeys(tokenizer.stop_ids)], scores=scores, benchmarks=found,
        settings=settings, missing=list(not_done(stage.name, settings, scores, found)),
        percent=formats.percent, interval=formats.interval, duration=formats.duration, whole=formats.whole,
    )  # fmt: skip
    path = stage / "model" / "README.md"
    write_text(path, f"{card}\n")
    return path


def records(stage: Path) -> dict[str, dict[str, Any]]:
    """Return the summaries of a stage and of those before it, by name in their order. Raises ValueError as `write_card`."""
    if stage.name not in STAGES or not stage.is_dir():
        raise ValueError(
            f"{stage}: expected the folder of a stage in a run, e.g. runs/tiny/rlvr, one of {', '.join(STAGES)}"
        )
    if not (stage / SUMMARY).exists():
        raise ValueError(f"{stage} is not complete; run `phimini {stage.name}` first")
    if not (stage / "model" / "config.json").is_file():
        raise ValueError(f"{stage / 'model'}: the exported model is missing")
    names = ("distill", "curate", *STAGES[: STAGES.index(stage.name) + 1])
    return {name: read_sealed(stage.parent / name / SUMMARY) for name in names}


def evaluations(out: Path, made: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the evaluations of exactly these stages' models, by stage."""
    files = {name: out / "evaluate" / f"{name}.json" for name in made}
    found = {name: read_sealed(path) for name, path in files.items() if path.exists()}
    return {name: each for name, each in found.items() if each["model_id"] == made[name]["id"]}


def benchmarks(out: Path, stage: str, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the published benchmarks of exactly this model's files, by name."""
    path = out / "benchmarks" / stage / RESULTS
    results = read_sealed(path) if path.exists() else {"files": {}, "benchmarks": {}}
    described = {f"model/{name}": sha256 for name, sha256 in results["files"].items()}
    same = all(own["files"].get(name, {}).get("sha256") == sha256 for name, sha256 in described.items())  # fmt: skip
    return results["benchmarks"] if same else {}


def metadata(
    evaluation: dict[str, Any] | None, found: Mapping[str, dict[str, Any]]
) -> Iterator[EvalResult]:
    """Yield the scores for the head of the card."""
    kind: dict[str, Any] = {"task_type": "text-generation", "metric_type": "accuracy"}
    if evaluation is not None:
        yield EvalResult(
            **kind, dataset_type="held-out", dataset_name="held-out problems of the run", metric_name="mean@8",
            metric_value=round(100 * evaluation["mean_at_8"], 2),
        )  # fmt: skip
    for name, each in found.items():
        yield EvalResult(
            **kind, dataset_type=name, dataset_name=name, metric_name=f"mean@{each['k']}", metric_value=round(100 * each["strict"][0], 2)
        )  # fmt: skip


def public(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting's dotted name with its value as text, without folders and addresses of this machine."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from public(value, f"{name}.")
        elif name not in _PRIVATE:
            values = value if isinstance(value, list) else [value]
            yield name, ", ".join(str(each).rpartition("/")[2] for each in values)


def not_done(
    stage: str,
    settings: Mapping[str, str],
    scores: Mapping[str, dict[str, Any]],
    found: Mapping[str, dict[str, Any]],
) -> Iterator[str]:
    """Yield a sentence about each thing that this run leaves open."""
    later = [STAGE_NAMES[name] for name in STAGES[STAGES.index(stage) + 1 :]]
    if later:
        yield f"Later stages of the recipe are not part of this model: {', '.join(later)}."
    if stage not in scores:
        yield "This model was not evaluated on the run's held-out problems."
    if not found:
        yield "No published benchmark was run on it."
    yield f"This is one run, with seed {settings['seed']}: another seed may differ by more than the intervals say."
    if settings["base"] == "random":
        yield "It starts from random weights: it knows nothing but the data of this run."
    else:
        yield "The data that its base model was trained on were not compared with the problems of the evaluation."
    if settings["distill.source"] != "generator" and settings["distill.licence"] == "None":
        yield "No licence of the training data is recorded here; rows may carry their own."
    yield "There was no test of safety, bias, languages, tools or conversations of several turns."
