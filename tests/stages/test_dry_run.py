"""The dry run finds missing inputs before any rank starts, and its costs follow the model card's arithmetic."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from phimini.model.config import preset
from phimini.model.io.chat import TEMPLATES
from phimini.model.io.huggingface import load_config, save_config, save_reference
from phimini.model.io.json_files import write_rows
from phimini.model.io.tokenizer import train_tiny_tokenizer
from phimini.model.reference import Phi4Mini
from phimini.parallel.plan.choice import choices
from phimini.parallel.plan.rates import GPUS
from phimini.stages import commands
from phimini.stages.cli import main
from phimini.stages.config.recipes import RECIPES, phi4_mini_reasoning
from phimini.stages.config.schema import RunConfig, override
from phimini.stages.dry_run import (
    CARD_TOKENS,
    check_max_batch,
    dry_run,
    gpu_at_hand,
    is_ready,
    number_of_steps,
    planned_layout,
    stage_costs,
)
from phimini.stages.run.workloads import workloads

PAPER = [
    ("midtrain.sequence_length", 16384), ("midtrain.rows_per_step", 128), ("midtrain.epochs", 5.0),
    ("midtrain.optimizer.lr", 1e-5), ("midtrain.optimizer.warmup_ratio", 0.1),
    ("sft.sequence_length", 20480), ("sft.optimizer.lr", 1e-5), ("sft.epochs", 5.0), ("sft.examples_per_step", 128),
    ("rollout_dpo.sequence_length", 16384), ("rollout_dpo.optimizer.lr", 5e-7), ("rollout_dpo.epochs", 1.0),
    ("rollout_dpo.pairs", "teacher"), ("rollout_dpo.nll_weight", 0.0),
    ("rlvr.sequence_length", 25600), ("rlvr.optimizer.lr", 5e-7), ("rlvr.max_accuracy", 0.5),
    ("rlvr.start_temperature", 1.0), ("rlvr.end_temperature", 0.6), ("rlvr.anneal", True), ("rlvr.rebalance", True),
    ("rlvr.uniform_length", True), ("evaluate.temperature", 0.6), ("evaluate.top_p", 0.95), ("rope_factors", "long"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "want"), PAPER, ids=[key for key, _ in PAPER])
def test_the_papers_values(key: str, want: object) -> None:
    value = phi4_mini_reasoning()
    for name in key.split("."):
        value = getattr(value, name)
    assert value == want


@pytest.fixture
def small(tmp_path: Path) -> RunConfig:
    """Make the paper's recipe with a tiny base model and its data."""
    source = tmp_path / "data"
    row = {"question": "What is 1 + 2?", "answer": "3", "response": "\\boxed{3}"}
    for name in ("rollouts", "validation", "prompts", "heldout"):
        write_rows(source / f"{name}.jsonl", [row] * 3)
    tokenizer = train_tiny_tokenizer([row["question"]] * 50, vocab_size=256)
    base = tmp_path / "base"
    save_reference(Phi4Mini(preset("tiny")), base, stop_ids=tokenizer.stop_ids)
    tokenizer.save(base, chat_template=TEMPLATES["reasoning"])
    return override(
        phi4_mini_reasoning(),
        ["model=tiny", f"base={base}", f"distill.source={source}", f"out={tmp_path / 'run'}",
         "midtrain.sequence_length=256", "sft.sequence_length=256", "rollout_dpo.sequence_length=256",
         "rlvr.sequence_length=256", "rlvr.max_new_tokens=128"],
    )  # fmt: skip


def test_a_run_that_is_ready_says_so_and_writes_nothing(
    small: RunConfig, capsys: pytest.CaptureFixture
) -> None:
    assert dry_run(small) == 0
    out = capsys.readouterr().out
    assert "ready: every path" in out and "NOT READY" not in out
    assert "samples at most 8,352,000 answers, 2.14 B tokens: 160,000 before the first step, 16,384 in each" in out  # fmt: skip
    assert not Path(small.out).exists()


def break_nothing_there(run: RunConfig) -> RunConfig:
    return dataclasses.replace(run, base="nowhere", distill=dataclasses.replace(run.distill, source="nodata"))  # fmt: skip


def break_other_model(run: RunConfig) -> RunConfig:
    config = Path(run.base) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    return run


def break_other_table(run: RunConfig) -> RunConfig:
    save_config(load_config(run.base, "short"), run.base)
    return run


def break_lost_tensor_file(run: RunConfig) -> RunConfig:
    next(Path(run.base).glob("*.safetensors")).unlink()
    return run


def break_tokenizer(run: RunConfig) -> RunConfig:
    (Path(run.base) / "tokenizer.json").unlink()
    return run


def break_row(run: RunConfig) -> RunConfig:
    with (Path(run.distill.source) / "prompts.jsonl").open("a") as file:
        file.write('{"id": "b", "question": "?", "answer": 3}\n')
    return run


def break_missing_file(run: RunConfig) -> RunConfig:
    (Path(run.distill.source) / "heldout.jsonl").unlink()
    return run


def break_out(run: RunConfig) -> RunConfig:
    blocked = Path(run.out).parent / "file"
    blocked.write_text("")
    return dataclasses.replace(run, out=str(blocked / "run"))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (break_nothing_there, ["base=nowhere: expected a Hugging Face folder", "distill.source=nodata: expected a file or folder of rollouts"]),
        (break_other_model, ["config.json: num_layers is 3, but model=tiny has 4"]),
        (break_other_table, ["config.json: the model was trained with its short rope table, got rope_factors=long; expected rope_factors=short"]),
        (break_lost_tensor_file, ["safetensors"]),
        (break_tokenizer, ["tokenizer.json"]),
        (break_row, ["prompts.jsonl, line 4", "answer"]),
        (break_missing_file, ["heldout.jsonl: missing"]),
        (break_out, ["is not a folder that can be written"]),
    ],
    ids=lambda x: x.__name__.removeprefix("break_") if callable(x) else "",
)  # fmt: skip
def test_everything_that_is_missing_or_wrong_is_named(
    broken, words: list[str], small: RunConfig, capsys: pytest.CaptureFixture
) -> None:
    run = broken(small)
    assert dry_run(run) == 1
    out = capsys.readouterr().out
    for word in words:
        assert word in out, out
    # A plain run says the same of it, whatever it runs on.
    assert not is_ready(run, None, gpus=8)
    refused = [line for line in out.splitlines() if line.startswith("NOT READY")]
    assert refused and capsys.readouterr().err.splitlines() == refused


def words_of(run: RunConfig) -> list[str]:
    return ["phi4_mini_reasoning", "model=tiny", f"base={run.base}", f"distill.source={run.distill.source}",
            f"out={run.out}", "midtrain.sequence_length=256", "sft.sequence_length=256",
            "rollout_dpo.sequence_length=256", "rlvr.sequence_length=256", "rlvr.max_new_tokens=128"]  # fmt: skip


PLAIN = [
    (break_row, [], 1, "NOT READY: {source}/prompts.jsonl, line 4"),
    (break_tokenizer, [], 1, "NOT READY: {base}/tokenizer.json"),
    (None, ["gpu=h100", "midtrain.rows_per_step=4194304", "midtrain.micro_rows=2097152"], 1, "NOT READY: midtrain does not fit: "),
    (None, ["gpu=v100"], 2, "gpu=v100: did you mean h100?"),
    (None, ["processes=5"], 2, "Layout: world size 5 is not a multiple of tensor 1 x pipeline 1 x context 2"),
    (None, ["processes=12", "tensor_parallel=3"], 2, "Layout.tensor: 3 does not divide"),
    (None, ["midtrain.epochs=none"], 2, "expected either steps or epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "more", "status", "message"), PLAIN, ids=lambda v: v.__name__ if callable(v) else str(v)[:30])  # fmt: skip
def test_a_plain_recipe_is_refused_before_its_first_rank_starts(
    broken, more: list[str], status: int, message: str, small: RunConfig, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(commands, "start", lambda *_: pytest.fail("a rank was started"))
    if broken is not None:
        broken(small)
    message = message.format(source=small.distill.source, base=small.base)
    assert main(["recipe", *words_of(small), "processes=8", *more]) == status
    plain = capsys.readouterr().err
    assert message in plain and not Path(small.out).exists()
    # And in the same words by the dry run, which is told the number of GPUs.
    ranks = next((w.removeprefix("processes=") for w in more if w.startswith("processes=")), "8")
    assert main(["recipe", *words_of(small), *more, "--dry-run", f"gpus={ranks}"]) == status
    got = capsys.readouterr()
    said = next(line for line in (got.out + got.err).splitlines() if message in line)
    assert said in plain.splitlines()


def test_a_plain_recipe_that_is_ready_starts(small: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    started = []
    monkeypatch.setattr(commands, "start", lambda run, verb, *_: started.append((run.model, verb)))
    assert main(["recipe", *words_of(small), "processes=8"]) == 0
    assert started == [("tiny", "recipe")] and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")  # torchrun's, not `processes`
    assert main(["recipe", *words_of(small), "processes=8"]) == 2
    assert len(started) == 1


def test_batches_that_the_data_ranks_do_not_divide_are_planned(small: RunConfig, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    """The paper's 128 rows, examples and pairs and 2,048 rollouts a step on 6 replicas, and fewer of them than replicas."""
    odd = ["sft.examples_per_step=2", "rollout_dpo.pairs_per_step=1", "rlvr.min_rollouts=1"]
    for more in ([], odd):
        assert dry_run(override(small, more), gpus=12) == 0
        assert "ready: " in capsys.readouterr().out


def test_answers_that_leave_no_room_for_a_question_are_named(small: RunConfig, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    assert dry_run(override(small, ["rlvr.max_new_tokens=256", "rollout_dpo.max_new_tokens=300"])) == 1  # fmt: skip
    out = capsys.readouterr().out
    assert "NOT READY: rlvr.max_new_tokens: 256 leave no room for a question in rlvr.sequence_length=256" in out  # fmt: skip
    assert "rollout_dpo.max_new" not in out, "the teacher's pairs are not sampled"
    assert dry_run(override(small, ["rollout_dpo.pairs=policy"])) == 1, "its 15,360 in rows of 256"


def test_the_gpu_at_hand_is_planned_for(small: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    assert gpu_at_hand() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu_at_hand() == "h100"
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: asked.append(1) or "NVIDIA H200")
    assert gpu_at_hand() == "h200" and not asked, (
        "not here: CUDA would start, and no rank be forked"
    )
    large = override(small, ["midtrain.rows_per_step=4194304", "midtrain.micro_rows=2097152"])
    assert not is_ready(large, None, gpus=8)
    assert "NOT READY: midtrain does not fit" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert is_ready(large, None, gpus=8)
    assert "memory was not planned: expected one of a100, h100" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [8, 64, 128])
def test_the_recipe_is_the_plan_s_first_choice(gpus: int) -> None:
    run = phi4_mini_reasoning()
    config, stages = preset(run.model), workloads(run)
    steps = {stage: number_of_steps(run, stage)[0] for stage in stages}
    first = choices(config, stages, steps, GPUS["h100"], gpus)[0]
    layout = planned_layout(run).resolve(gpus, config)
    assert (first.layout, first.recompute) == (layout, run.recompute)
    assert layout.tensor == 1 and run.distributed_optimizer and run.overlap
    costs = {c.stage: c for c in stage_costs(run, config, layout, GPUS["h100"], gpus)}
    assert all(cost.plan.fits for cost in costs.values())
    # 150 B tokens at 128 rows of 16,384 are 71.5 thousand steps.
    assert costs["midtrain"].steps == 71_526
    assert costs["midtrain"].tokens == pytest.approx(CARD_TOKENS, rel=1e-4)
    trained = sum(c.gpu_hours - c.sampling_hours for c in costs.values())
    assert trained == pytest.approx(first.gpu_hours)
    # 128 H100 for two days mean 222 TFLOP/s per GPU, 22 % of its peak.
    mfu = CARD_TOKENS * costs["midtrain"].plan.flops_per_token / (128 * 48 * 3600 * 989e12)
    assert mfu == pytest.approx(0.224, abs=0.002)
    # 500 steps of 128 prompts that all prove hard, and the probe.
    assert costs["rlvr"].samples == 500 * 128 * 128 + 20_000 * 2 * 4
    assert costs["rlvr"].sampled_tokens == costs["rlvr"].samples * 25_600
    # A sampled token reads half of 25,600 positions of 32 layers, 2 x 8 heads of 128 bf16 numbers, and its share of weights.
    engine = costs["rlvr"].plan.layouts[0].engine
    assert engine is not None and 30 <= engine.sequences <= 40
    read = 25_600 / 2 * 32 * 2 * 8 * 128 * 2 + 2 * config.num_parameters / engine.sequences
    sampling = costs["rlvr"].sampled_tokens * read / 3.35e12 / 3600
    assert costs["rlvr"].sampling_hours == pytest.approx(sampling, rel=1e-6) and sampling > 1e4
    assert costs["midtrain"].sampling_hours == 0


def test_a_max_batch_below_half_of_what_memory_holds_is_refused() -> None:
    def problems(*words: str) -> list[str]:
        run = override(phi4_mini_reasoning(), list(words))
        config = preset(run.model)
        layout = planned_layout(run).resolve(8, config)
        costs = stage_costs(run, config, layout, GPUS["h100"], 8)
        return check_max_batch(run, config, GPUS["h100"], costs[-1].plan)

    assert problems() == problems("rollout.max_batch=17") == []
    (problem,) = problems("rollout.max_batch=16")
    assert problem.startswith(
        "rollout.max_batch: expected at least 17, half of the 33 sequences that a h100 holds"
    )
    assert problem.endswith("got 16; none takes all 33")
    assert "131,072 bytes a token, 32,768 tokens at most" in problem
    (in_fp8,) = problems("rollout.max_batch=17", "rollout.kv_cache_dtype=fp8")
    assert "half of the 66 sequences" in in_fp8
    assert problems("rollout.max_batch=16", "rollout.engine=local") == []
    (separate,) = problems("rollout.max_batch=16", "rollout.placement=separate")
    assert "none takes all 62" in separate


def test_a_model_that_does_not_fit_is_not_ready(
    small: RunConfig, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["recipe", "phi4_mini_reasoning", "--dry-run", f"distill.source={small.distill.source}",
             f"out={tmp_path}", "context_parallel=1",
             "midtrain.micro_rows=16", "base=random"]  # fmt: skip
    assert main(words) == 1
    assert "NOT READY: midtrain does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_plan_of_every_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", name, "gpu=h100", "gpus=8", "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["fits"] and set(plan["stages"]) == {"midtrain", "sft", "rollout_dpo", "rlvr"}
    best = plan["layouts"][0]
    assert best["peak_bytes"] == sum(best["memory_bytes"].values())
    assert plan["assumptions"]
    assert "GFLOP per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "tiny", "gpu=v100"], "plan gpu=v100: did you mean h100? expected one of a100"),
        (
            ["plan", "tiny", "stage=pretrain"],
            "stage: did you mean midtrain? expected one of midtrain, sft, rollout_dpo, rlvr, got 'pretrain'",
        ),
        (["plan", "tiny", "--json"], "plan: --json: expected a value after it"),
        (["plan"], "plan: name a recipe"),
        (["doctor"], "doctor: name a recipe, e.g. `phimini doctor tiny`"),
        (["doctor", "--mismatch"], "doctor --mismatch: name a recipe"),
        (["launch", "ssh"], "launch: got ssh; expected one of torchrun, slurm"),
        (
            ["recipe", "tiny", "--dry-run", "gpus=many"],
            "gpus: expected a whole number from 1 to 1000000000 or none, got 'many'",
        ),
        (
            ["recipe", "tiny", "--dry-run", "gpu=v100"],
            "dry run: gpu=v100: did you mean h100? expected one of a100",
        ),
        (
            ["recipe", "phi4_mini_reasoning", "midtrain.epochs=none", "--dry-run"],
            "expected either steps or epochs",
        ),
    ],
)
def test_bad_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_launch_prints_a_script(capsys: pytest.CaptureFixture) -> None:
    assert main(["launch", "slurm", "nodes=2", "--", "recipe", "phi4_mini_reasoning"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH" in script and "recipe phi4_mini_reasoning" in script
