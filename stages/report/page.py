"""The report of a run: everything in its directory on one page, `report.html`, that needs nothing else.

Reads results.json, evaluate/STAGE.json, STAGE/metrics.jsonl and, where it exists, controls/controls.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phimini.model.io.json_files import Row, read_json, read_rows, write_text
from phimini.stages.report.charts import (
    Rung,
    Series,
    gain_chart,
    ladder_chart,
    line_chart,
    time_chart,
)
from phimini.stages.report.html import (
    duration,
    figure,
    interval,
    legend,
    minus,
    page,
    percent,
    section,
    short,
    table,
    text,
)

STAGE_NAMES = {
    "base": "Base",
    "midtrain": "Mid-training",
    "sft": "SFT",
    "rollout_dpo": "Rollout DPO",
    "rlvr": "RL",
}
SHORT_NAMES = STAGE_NAMES | {"midtrain": "Mid-train", "rollout_dpo": "DPO"}
# Phi-4-Mini-Reasoning after each stage, pass@1 in percent (arXiv 2504.21233): AIME 2024, MATH-500, GPQA Diamond.
PAPER = {
    "base": (10.0, 71.8, 36.9),
    "midtrain": (30.0, 82.9, 42.6),
    "sft": (43.3, 89.3, 48.3),
    "rollout_dpo": (50.0, 93.6, 49.0),
    "rlvr": (57.5, 94.6, 52.0),
}
# Charts in this order: title, fields drawn together. Other fields of a metrics.jsonl follow.
CURVES = [
    ("Loss", ["loss"]),
    ("Validation loss", ["validation_loss"]),
    ("Reward", ["reward"]),
    ("Response length, tokens", ["response_length"]),
    ("Entropy, nats", ["entropy"]),
    ("Preference loss, ln 2 at first", ["preference_loss"]),
    ("Implicit rewards", ["chosen_reward", "rejected_reward"]),
    ("Margin", ["margin"]),
    ("Preference accuracy", ["preference_accuracy"]),
    ("NLL of the chosen answer", ["chosen_nll"]),
    ("Groups with one reward only", ["zero_groups"]),
    ("Truncated responses", ["truncated"]),
    ("Sampling temperature", ["temperature"]),
]
# Of interest when something went wrong: folded away.
_FOLDED = ["accuracy", "grad_norm", "lr", "tokens_per_second"]
_NOT_CURVES = {"step", "tokens", "seconds"}


def write_report(run_dir: str | Path) -> None:
    """Writes `run_dir`/report.html. FileNotFoundError or ValueError names a file that is missing or damaged."""
    run = Path(run_dir)
    results = read_json(run / "results.json")
    wanted = {"stages", "seed", "num_problems", "peak_rss_bytes", "versions"}
    if not isinstance(results, dict) or not wanted <= results.keys() or not results["stages"]:
        raise ValueError(f"{run / 'results.json'}: expected an object with {sorted(wanted)}, as `recipe` writes it")  # fmt: skip
    names = [row["stage"] for row in results["stages"]]
    evaluations = {name: read_json(run / "evaluate" / f"{name}.json") for name in names}
    metrics = {
        name: read_rows(run / name / "metrics.jsonl", {"step": int})
        for name in names
        if (run / name / "metrics.jsonl").exists()
    }
    controls = run / "controls" / "controls.json"
    body = [
        header(results),
        ladder_section(results),
        *([controls_section(read_json(controls))] if controls.exists() else []),
        breakdown_section(evaluations),
        curves_section(metrics),
        samples_section(evaluations),
        run_section(results),
    ]
    title = (
        f"PhiMini: run {results.get('config', {}).get('name', run.name)}, seed {results['seed']}"
    )
    write_text(run / "report.html", page(title, "\n".join(body)))


def header(results: Row) -> str:
    stages = results["stages"]
    first, last = stages[0], stages[-1]
    gains = [row["gain_ci95"] for row in stages if row["gain_ci95"] is not None]
    sure = sum(low > 0 for low, _ in gains)
    count = "each of the" if sure == len(gains) else f"{sure} of the"
    facts = {
        "Date": results.get("date", "unknown"),
        "Machine": results.get("machine", "unknown"),
        "From data to report": duration(results.get("wall_seconds")),
        "Peak memory": f"{results['peak_rss_bytes'] / 2**30:.2f} GiB",
        "Seed": results["seed"],
        "Held-out problems": f"{results['num_problems']:,}",
    }
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<header><p class="overline">PhiMini · run {text(results.get("config", {}).get("name", ""))}</p>'
        f"<h1>From {percent(first['mean_at_8'])} to {percent(last['mean_at_8'])} in four stages</h1>"
        f'<p class="lead">Sampled accuracy (mean@8) on problems that no stage has seen. '
        f"<strong>{count.capitalize()} {len(gains)} gains</strong> "
        f"{'has' if sure in (1, len(gains)) else 'have'} a paired 95 % interval above zero.</p>"
        f'<dl class="facts">{rows}</dl></header>'
    )


def ladder_section(results: Row) -> str:
    stages = results["stages"]
    labels = [SHORT_NAMES.get(row["stage"], str(row["stage"])) for row in stages]
    rungs = lambda key, ci=None: [
        Rung(100 * row[key], *(100 * x for x in (row[ci] if ci else ()))) for row in stages
    ]
    ours = [("mean@8", "c1", rungs("mean_at_8", "ci95")), ("greedy", "c3", rungs("greedy")),
            ("pass@8", "c0", rungs("pass_at_8"))]  # fmt: skip
    known = [row["stage"] for row in stages if row["stage"] in PAPER]
    benchmarks = [("AIME 24", "c1"), ("MATH-500", "c3"), ("GPQA", "c2")]
    paper = [
        (name, colour, [Rung(PAPER[stage][index]) for stage in known])
        for index, (name, colour) in enumerate(benchmarks)
    ]
    gains = [
        (label, 100 * row["gain"], *(100 * x for x in row["gain_ci95"]))
        for label, row in zip(labels, stages, strict=True)
        if row["gain"] is not None
    ]
    charts = [
        figure("This run, held-out problems", ladder_chart(labels, ours), "whiskers: 95 % interval")
    ]
    if known == list(PAPER):
        charts.append(
            figure(
                "The paper, Phi-4-Mini 3.8 B",
                ladder_chart(labels, paper),
                "pass@1, arXiv 2504.21233",
            )
        )
    if gains:
        charts.append(
            figure(
                "What each stage adds, points of mean@8",
                gain_chart(gains),
                "paired by problem, 95 % interval",
            )
        )
    charts.append(time_figure(labels, stages))
    return section(
        "The ladder",
        "The paper's ladder is other benchmarks on the model of 3.8 billion parameters: compare the shapes of the "
        "two, not their heights.",
        f'<div class="cards wide">{"".join(charts)}</div>{ladder_table(stages)}',
    )


def time_figure(labels: Sequence[str], stages: Sequence[Row]) -> str:
    rows = []
    for label, row in zip(labels, stages, strict=True):
        evaluation = row.get("evaluation_seconds", 0.0)
        rows.append((label, row["seconds"], evaluation, duration(row["seconds"] + evaluation)))
    return figure(
        "Where the time went",
        time_chart(rows),
        legend([("c1", "training"), ("c0", "evaluation")]),
        note_is_html=True,
    )


def ladder_table(stages: Sequence[Row]) -> str:
    rows = []
    for row in stages:
        gain = row["gain_ci95"]
        paper = PAPER.get(row["stage"])
        rows.append([
            text(stage_name(row["stage"])),
            f"<strong>{percent(row['mean_at_8'])}</strong> <small>{interval(row['ci95'])}</small>",
            "" if gain is None else f"{100 * row['gain']:+.1f} <small>{interval(gain, sign='+')}</small>",
            percent(row["greedy"]),
            percent(row["pass_at_8"]),
            *((f"{row['steps']:,}", f"{row['tokens']:,}", duration(row["seconds"])) if row["steps"] else [""] * 3),
            "" if paper is None else " / ".join(f"{value:.1f}" for value in paper),
        ])  # fmt: skip
    head = ["Stage", "mean@8 [95 %]", "Gain [95 %]", "Greedy", "pass@8", "Steps", "Tokens", "Time", "Paper: AIME / MATH / GPQA"]  # fmt: skip
    return table(head, rows)


def controls_section(controls: Row) -> str:
    rows = [
        [
            text(str(row["arm"]).removeprefix("controls/").replace("_", " ")),
            f"<strong>{percent(row['mean_at_8'])}</strong> <small>{interval(row['ci95'])}</small>",
            f"{100 * row['gain_over_sft']:+.1f} <small>{interval(row['gain_ci95'], sign='+')}</small>",
            f"{100 * row['against_rlvr']:+.1f} <small>{interval(row['against_rlvr_ci95'], sign='+')}</small>",
            percent(row["greedy"]),
            percent(row["pass_at_8"]),
            f"{row['steps']:,}",
            duration(row["seconds"]),
        ]
        for row in controls["arms"]
    ]
    head = ["Arm", "mean@8 [95 %]", "Gain over SFT [95 %]", "Against stage 4 [95 %]", "Greedy", "pass@8", "Steps", "Time"]  # fmt: skip
    return section(
        "Controls",
        "What else the time of stages 3 and 4 could have bought from the stage-2 model; and stage 4 again, from the "
        "stage-3 model, without the remedy that the arm names.",
        table(head, rows),
    )


def breakdown_section(evaluations: Mapping[str, Row]) -> str:
    parts = []
    for kind, title in (("families", "By family"), ("levels", "By level")):
        groups = list(dict.fromkeys(g for e in evaluations.values() for g in e.get(kind, {})))
        if not groups:
            continue
        rows = []
        for group in groups:
            cells = [e.get(kind, {}).get(group) for e in evaluations.values()]
            size = next(cell["n"] for cell in cells if cell)
            label = f"{'Level ' if kind == 'levels' else ''}{group.replace('_', ' ')}"
            shares = [cell and cell["mean_at_8"] for cell in cells]
            rows.append(
                f"<tr><td>{text(label)} <small>n = {size}</small></td>"
                + "".join(
                    "<td></td>" if share is None
                    else f'<td style="--share: {share:.3f}">{percent(share)}</td>'
                    for share in shares
                )
                + "</tr>"
            )  # fmt: skip
        head = "".join(f"<th>{text(SHORT_NAMES.get(name, name))}</th>" for name in evaluations)
        parts.append(
            f'<h3>{title}</h3><div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    return section("Where the accuracy comes from", "mean@8 after each stage.", "".join(parts))


def curves_section(metrics: Mapping[str, list[Row]]) -> str:
    parts = []
    for name, rows in metrics.items():
        known = [field for _, fields in CURVES for field in fields]
        others = sorted({field for row in rows for field in row} - {*known, *_FOLDED, *_NOT_CURVES})
        shown = [curve(title, fields, rows) for title, fields in CURVES]
        folded = [
            curve(field.replace("_", " ").capitalize(), [field], rows) for field in others + _FOLDED
        ]
        parts.append(
            f'<h3>{text(stage_name(name))}</h3><div class="cards curves">{"".join(shown)}</div>'
        )
        if any(folded):
            parts.append(
                f'<details class="more"><summary>More curves of {text(stage_name(name))}</summary>'
                f'<div class="cards curves">{"".join(folded)}</div></details>'
            )
    return section(
        "How each stage went",
        "Pale: every step. Strong: running mean. Validation loss is on rollouts that no stage trained on.",
        "".join(parts),
    )


def curve(title: str, fields: Sequence[str], rows: Sequence[Row]) -> str:
    """A figure of `fields` over the steps; nothing if no row has any of them."""
    series = []
    for index, field in enumerate(fields):
        points = [
            (row["step"] + 1, float(row[field])) for row in rows if _is_number(row.get(field))
        ]
        if points:
            series.append(Series(field.replace("_", " "), points, f"c{index + 1}"))
    if not series:
        return ""
    values = [y for _, y in series[0].points]
    scale = max(map(abs, values))
    note = f"{short(values[0], scale)} → {short(values[-1], scale)}"
    if len(fields) > 1:
        note = legend([(one.colour, one.name) for one in series])
    elif fields == ["validation_loss"] and len(values) >= 4 and values[-1]:
        quarter = values[-1 - len(values) // 4]
        note += minus(f", last quarter {100 * (values[-1] - quarter) / quarter:+.1f} %")
    return figure(title, line_chart(series), note, note_is_html=True)


def samples_section(evaluations: Mapping[str, Row]) -> str:
    """A card per question, the stages' answers under each other."""
    asked: dict[str, list[tuple[str, Row]]] = {}
    for name, evaluation in evaluations.items():
        for sample in evaluation.get("samples", []):
            asked.setdefault(sample["question"], []).append((name, sample))
    cards = []
    for index, (question, answers) in enumerate(asked.items()):
        sample = answers[0][1]
        marks = "".join(
            f'<span class="{"right" if s["correct"] else "wrong"}" title="{text(stage_name(name))}">'
            f"{'✓' if s['correct'] else '✗'}</span>"
            for name, s in answers
        )
        about = f"answer {sample['answer']} · {str(sample.get('family', '')).replace('_', ' ')}, level {sample.get('level', '')}"
        rows = "".join(
            f'<div class="answer{" ok" if s["correct"] else ""}"><b>{text(stage_name(name))}'
            f'<span class="{"right" if s["correct"] else "wrong"}">{"✓ right" if s["correct"] else "✗ wrong"}</span></b>'
            f"<pre>{text(s['response']) or '(empty)'}</pre></div>"
            for name, s in answers
        )
        cards.append(
            f'<details class="sample"{" open=" + chr(34) + "open" + chr(34) if index == 0 else ""}><summary>'
            f'<span class="question">{text(question)}<small>{text(about)}</small></span>'
            f'<span class="marks">{marks}</span></summary><div class="answers">{rows}</div></details>'
        )
    return section(
        "What the model writes", "Greedy answers of each stage, first to last.", "".join(cards)
    )


def run_section(results: Row) -> str:
    versions = "".join(
        f"<tr><td>{text(name)}</td><td>{text(version)}</td></tr>"
        for name, version in results["versions"].items()
    )
    return section(
        "Versions and settings",
        "",
        f'<div class="settings"><div><h4>versions</h4><table>{versions}</table></div>'
        f"{settings_tables(results.get('config', {}))}</div>",
    )


def settings_tables(config: Mapping[str, Any], prefix: str = "") -> str:
    """A small table for the values of `config`, then one for each dict in it."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    rows = "".join(
        f"<tr><td>{text(key)}</td><td>{text(value)}</td></tr>" for key, value in plain.items()
    )
    own = f"<div><h4>{text(prefix or 'run')}</h4><table>{rows}</table></div>" if plain else ""
    return own + "".join(
        settings_tables(value, f"{prefix}.{key}" if prefix else str(key))
        for key, value in nested.items()
    )


def stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage)


def _is_number(value: object) -> bool:
    """One that a chart can show: JSON has 1e999 too, which reads as infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
