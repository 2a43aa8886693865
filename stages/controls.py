"""Control arms: other explanations for the gain after stage 2, and the share of stage 4's remedies in it.

Three arms start from the stage-2 model and get the processor time of stages 3 and 4 together, sampling included:

- `sft_continued`: stage 2 goes on, on its own data;
- `rejection_sft`: fine-tuning on the stage-2 model's own verified-correct rollouts (those of stage 3);
- `rl_without_dpo`: stage 4 from the stage-2 model, with as many more steps as stage 3's time buys.

Four are stage 4 again, from the stage-3 model and with as many steps, without one of the paper's three remedies or
without all of them.

Writes `controls/`: a folder per arm, and `controls.json` with each arm's evaluation beside stages 2, 3 and 4.
"""

import dataclasses
from pathlib import Path

from phimini.model.io.checked_files import read_sealed, write_sealed
from phimini.model.io.json_files import read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.ranks.world import World, on_main
from phimini.stages.config.schema import RunConfig
from phimini.stages.data.token_files import shards_of, write_shard
from phimini.stages.evaluate import evaluate
from phimini.stages.report.intervals import paired_gain
from phimini.stages.rlvr import reinforce
from phimini.stages.run.stage_folder import Stage
from phimini.stages.sft import fine_tune

ARMS = ("sft_continued", "rejection_sft", "rl_without_dpo")
WITHOUT = {
    "rl_without_uniform_length": {"uniform_length": False},
    "rl_without_rebalance": {"rebalance": False},
    "rl_without_anneal": {"anneal": False},
    "rl_without_remedies": {"uniform_length": False, "rebalance": False, "anneal": False},
}


def controls(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Run the arms that are not complete, and write `controls.json`. Collective.

    Raises ValueError if the run's four stages are not complete, or stage 3 sampled no rollouts.
    """
    sampled = Path(run.out) / "rollout_dpo" / "rollouts"
    if (sampled.parent / "summary.json").exists() and not sampled.exists():
        raise ValueError(
            f"controls: {sampled} is missing, which rejection_sft trains on: stage 3 was run with "
            f"rollout_dpo.pairs={run.rollout_dpo.pairs}, not policy"
        )
    for arm in (*ARMS, *WITHOUT):
        name = f"controls/{arm}"
        stage = Stage.begin(run, name, world, redo=redo)
        if not stage.complete:
            if arm in WITHOUT:
                without = dataclasses.replace(run.rlvr, **WITHOUT[arm])
                reinforce(dataclasses.replace(run, rlvr=without), world, stage, "rollout_dpo")
            else:
                train_from_stage_2(run, world, stage, arm)
        evaluate(run, world, name, redo=redo)
    if world.is_main:
        write_sealed(Path(run.out) / "controls" / "controls.json", summary(run))


def train_from_stage_2(run: RunConfig, world: World, stage: Stage, arm: str) -> None:
    """Train an arm for as many steps as the processor time of stages 3 and 4 buys. Collective."""
    out = Path(run.out)
    spent = {s: read_sealed(out / s / "summary.json") for s in ("sft", "rollout_dpo", "rlvr")}
    budget = spent["rollout_dpo"]["cpu_seconds"] + spent["rlvr"]["cpu_seconds"]
    if arm == "rl_without_dpo":
        steps = round(spent["rlvr"]["steps"] * budget / spent["rlvr"]["cpu_seconds"])
        longer = dataclasses.replace(run, rlvr=dataclasses.replace(run.rlvr, steps=steps))
        reinforce(longer, world, stage, "sft")
        return
    steps = round(spent["sft"]["steps"] * budget / spent["sft"]["cpu_seconds"])
    tokens = out / "tokenize" / "sft"
    if arm == "rejection_sft":
        tokens = stage.path / "correct"
        on_main(world, lambda: write_correct(run, tokens))
    fine_tune(run, world, stage, "sft", tokens, steps=steps)


def write_correct(run: RunConfig, folder: Path) -> None:
    """Write the tokens of stage 3's correct rollouts into `folder`, and their rows beside it."""
    out, rows = Path(run.out), folder.with_suffix(".jsonl")
    files = sorted((out / "rollout_dpo" / "rollouts").glob("*.jsonl"))
    rollouts = (row for file in files for row in read_rows(file, {"correct": bool}))
    tokenizer = Tokenizer.load(out / "sft" / "model")
    write_rows(rows, (plain(r, tokenizer) for r in rollouts if r["correct"]))
    for shard in shards_of(rows, folder):
        write_shard(shard, tokenizer, tokenizer.chat_template)


def plain(rollout: dict, tokenizer: Tokenizer) -> dict:
    """Return the rollout without the end token of its text, which the chat template adds to a training example."""
    end, eos = (tokenizer.decode([token]) for token in tokenizer.stop_ids)
    return rollout | {"response": rollout["response"].removesuffix(end).removesuffix(eos)}


def summary(run: RunConfig) -> dict:
    """Return rows of each arm and of stages 2 to 4: accuracies, and paired gains over stage 2 and against stage 4."""
    out = Path(run.out)
    read = lambda name: read_sealed(out / "evaluate" / f"{name}.json")
    before, whole = read("sft"), read("rlvr")
    rows = []
    names = ("sft", "rollout_dpo", "rlvr", *(f"controls/{arm}" for arm in (*ARMS, *WITHOUT)))
    for name in names:
        after = read(name)
        stage = read_sealed(out / name / "summary.json")
        gain, low, high = paired_gain(before["per_problem_mean"], after["per_problem_mean"])
        against, worst, best = paired_gain(whole["per_problem_mean"], after["per_problem_mean"])
        rows.append(
            {
                "arm": name,
                "mean_at_8": after["mean_at_8"],
                "ci95": after["ci95"],
                "gain_over_sft": gain,
                "gain_ci95": [low, high],
                "against_rlvr": against,
                "against_rlvr_ci95": [worst, best],
                "greedy": after["greedy"]["accuracy"],
                "pass_at_8": after["pass_at_8"],
                "steps": stage["steps"],
                "seconds": stage["seconds"],
                "cpu_seconds": stage["cpu_seconds"],
            }
        )
    return {"seed": run.seed, "arms": rows}
