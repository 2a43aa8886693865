"""Megatron-Bridge, verl and NeMo-RL: their settings exist, their lines are read, Bridge's head is our loss. No GPU, none of them here."""

import ast
import importlib.util
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from phimini.bench.gate.rows import measured, write
from phimini.bench.peers import command as peers
from phimini.bench.peers import gpu_frameworks as peers_gpu
from phimini.bench.peers.gpu_frameworks import OURS, PROVIDERS, Job, nemo_settings, verl_settings
from phimini.bench.peers.megatron_bridge import RECIPE, bridge_style, materialised_head
from phimini.bench.system import train
from phimini.model.config import preset
from phimini.model.io.json_files import write_rows
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.local_launch import run_ranks
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import PackedBatch
from phimini.stages import sft
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import override
from phimini.stages.run.training import cross_entropy_head

RECORDED = json.loads((Path(__file__).parent / "peers_recorded.json").read_text())
"""the keys of their own configuration files, at the commits that it names"""


def job_in(folder: Path, task: str = "sft", gpus: int = 8) -> Job:
    run = override(tiny(), [f"out={folder}", "sft.examples_per_step=32"])
    return Job(task, run, folder, folder / "model", 5, gpus, 1000.0)


@pytest.mark.parametrize("task", ["sft", "grpo"])
@pytest.mark.parametrize("name, settings", [("verl", verl_settings), ("nemo_rl", nemo_settings)])
def test_every_setting_is_one_of_theirs(
    name: str, settings: Any, task: str, tmp_path: Path
) -> None:
    theirs = RECORDED[name][task]
    known, commented = theirs["keys"].split(), theirs.get("in_comments", "").split()
    for key in settings(job_in(tmp_path, task)):
        if key.startswith("+"):
            assert key[1:].rpartition(".")[0] in known and key.split(".")[-1] in commented, key
        else:
            assert key in known, key
    assert "data.no_such_key" not in known


def test_bridge_s_settings_are_those_of_its_recipe() -> None:
    values = RECORDED["megatron_bridge"]["values"]
    assert {key: values[key] for key in RECIPE} == RECIPE


# --- what they print -----------------------------------------------------------------------------
# As verl/utils/logger/aggregate_logger.py joins them.
VERL_SFT = [
    (10.0, "(TaskRunner pid=7) chatter\n"),
    (20.0, "step:1 - train/loss:2.5 - train/grad_norm:1.0 - train/global_tokens:np.int64(4000) - train/mfu:0.3\n"),
    (22.0, "step:2 - train/loss:2.25 - train/global_tokens:4000 - train/lr:1e-05\n"),
    (22.5, "step:2 - val/loss:2.0\n"),
    (24.0, "step:3 - train/loss:np.float64(2.0) - train/global_tokens:6000\n"),
]  # fmt: skip
VERL_GRPO = [
    (0.0, f"step:{i} - actor/pg_loss:{0.5 * i} - perf/time_per_step:{t} - perf/max_memory_allocated_gb:{g}\n")
    for i, t, g in ((1, 90.0, 40.0), (2, 8.0, 41.5), (3, 10.0, 41.0))
]  # fmt: skip
# As nemo_rl/algorithms/sft.py and grpo.py print them.
NEMO = [
    (0.0, line)
    for loss, s in ((2.5, 60.0), (2.25, 4.0), (2.0, 5.0))
    for line in ("▶ Taking a training step...\n", f"  • Loss: {loss:.4f}\n", f"  • Total step time: {s:.2f}s\n")
]  # fmt: skip


def test_their_lines_are_read(tmp_path: Path) -> None:
    job, grpo = job_in(tmp_path), job_in(tmp_path, "grpo")
    samples = grpo.run.rlvr.prompts_per_step * grpo.run.rlvr.rollouts_per_prompt
    got = peers_gpu.parse_verl(job, VERL_SFT)
    assert (got.step_s, got.units, got.first_loss) == ([2.0, 2.0], 5000.0, 2.5)
    assert got.rate(gpus=2) == 1250.0
    got = peers_gpu.parse_verl(grpo, VERL_GRPO)
    assert (got.step_s, got.units, got.first_loss) == ([8.0, 10.0], samples, 0.5)
    assert got.peak_bytes == int(41.5 * 2**30)
    got = peers_gpu.parse_nemo(job, NEMO)
    assert (got.step_s, got.units, got.first_loss) == ([4.0, 5.0], 1000.0, 2.5)
    assert peers_gpu.parse_nemo(grpo, NEMO).units == samples
    for parse, lines in ((peers_gpu.parse_verl, VERL_SFT[:2]), (peers_gpu.parse_nemo, NEMO[:3])):
        with pytest.raises(RuntimeError, match="expected at least 2 steps in its output, got 1"):
            parse(job, lines)


# --- what is launched ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "provider, module",
    [
        (OURS, "phimini.bench.cli"),
        (PROVIDERS["megatron_bridge"], "phimini.bench.peers.megatron_bridge"),
    ],
)
def test_ours_is_a_bench_of_the_stage_on_all_gpus(
    provider: peers_gpu.Provider, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = provider.command(job_in(tmp_path), "python")
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    assert command[5:7] == ["-m", module] and importlib.util.find_spec(module) is not None
    asked: list[Any] = []
    row = measured(
        bench="train", case={"stage": "sft"}, provider="phimini", unit="tokens/s", samples=[1.0]
    )
    monkeypatch.setattr(train, "bench", lambda *args: asked.append(args) or row)
    monkeypatch.setattr(train, "describe", lambda row: "")
    assert train.main(command[command.index("sft") :]) == 0
    stage, assignments, source, steps, *_ = asked[0]
    assert (stage, source, steps) == ("sft", tmp_path, 5)
    override(tiny(), assignments)  # every one is a field of the run
    assert "distributed_optimizer=True" in assignments and "overlap=True" in assignments


def test_theirs_are_launched_as_they_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft_words = peers_gpu.verl_command(job_in(tmp_path), "python")
    assert sft_words[5:8] == ["-m", "verl.trainer.sft_trainer", "engine=fsdp"]
    assert (
        f"model.path={tmp_path / 'model'}" in sft_words
        and 'trainer.logger=["console"]' in sft_words
    )
    assert peers_gpu.verl_command(job_in(tmp_path, "grpo"), "python")[1:3] == [
        "-m",
        "verl.trainer.main_ppo",
    ]
    monkeypatch.setattr(peers_gpu, "_said", lambda *_: "/opt/nemo-rl/nemo_rl/__init__.py")
    words = peers_gpu.nemo_command(job_in(tmp_path, "grpo"), "python")
    assert words[1:4] == ["/opt/nemo-rl/examples/run_grpo.py", "--config", "/opt/nemo-rl/examples/configs/grpo_math_1B.yaml"]  # fmt: skip


# --- what cannot be compared with ------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot do")
def test_without_a_gpu_a_row_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.json"
    providers = [word for name in PROVIDERS for word in ("--provider", name)]
    assert peers.main(["sft", "dpo", *providers, "--json", str(path)]) == 2
    rows = json.loads(path.read_text())
    assert [(r["provider"], r["task"]) for r in rows] == [
        (p, t) for p in PROVIDERS for t in ("sft", "dpo")
    ]
    assert (
        rows[0]["verdict"]
        == "not measured: megatron_bridge needs a CUDA GPU; this machine has none"
    )
    assert rows[3]["verdict"] == "not measured: verl is compared in sft and grpo, not in dpo"
    assert all(r["ratio"] is None and r["per_cpu_second"] is None for r in rows)
    assert "nemo_rl needs a CUDA GPU" in capsys.readouterr().err


def test_with_a_gpu_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = peers_gpu.why_not("nemo_rl", "sft", sys.executable)
    assert why is not None and "needs the module nemo_rl" in why
    monkeypatch.setitem(
        PROVIDERS, "x", peers_gpu.Provider(("sft",), ("json",), OURS.command, OURS.parse)
    )
    assert peers_gpu.why_not("x", "sft", sys.executable) is None


FAKE = "import sys; print('step:1 - train/loss:2.5 - train/global_tokens:10', flush=True); import time; time.sleep(0.1); print('step:2 - train/loss:2.4 - train/global_tokens:10')"  # fmt: skip


def test_turns_alternate_and_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curate").mkdir()
    write_rows(tmp_path / "curate" / "sft.jsonl", [{"question": "1+1", "response": "2"}])
    turns: list[str] = []

    def fake(name: str) -> Any:
        def command(job: Job, python: str) -> list[str]:
            turns.append(name)
            return [python, "-c", FAKE]

        return peers_gpu.Provider(("sft",), (), command, peers_gpu.parse_verl, ("torch",))

    monkeypatch.setattr(peers_gpu, "OURS", fake("ours"))
    monkeypatch.setitem(PROVIDERS, "verl", fake("verl"))
    rows = peers_gpu.compare("verl", job_in(tmp_path), sys.executable, rounds=2)
    assert turns == ["ours", "verl", "verl", "ours"]
    ours, theirs = rows
    assert (
        0 < ours["per_gpu_second"] < 10 / 0.1 / 8 * 1.2
        and ours["ratio"] > 0
        and theirs["ratio"] is None
    )
    assert theirs["first_loss"] == 2.5 and theirs["versions"]["torch"] == torch.__version__
    assert "against verl's" in peers_gpu.describe(rows)
    assert json.loads((tmp_path / "sft_nemo.jsonl").read_text()) == {"input": "1+1", "output": "2"}
    monkeypatch.setattr(peers_gpu, "OURS", peers_gpu.Provider(("sft",), (), lambda *_: [sys.executable, "-c", "raise SystemExit('no memory')"], peers_gpu.parse_verl))  # fmt: skip
    with pytest.raises(RuntimeError, match="(?s)phimini ended with status 1:.*no memory"):
        peers_gpu.compare("verl", job_in(tmp_path), sys.executable, rounds=1)


def test_our_row_becomes_a_rate(tmp_path: Path) -> None:
    row = measured(bench="train", case={"stage": "sft"}, provider="phimini", unit="tokens/s", samples=[100.0, 200.0, 400.0],
                   peak_bytes=7, info={"first_loss": 1.5})  # fmt: skip
    write(tmp_path / "own.jsonl", [row])
    got = peers_gpu.parse_own(job_in(tmp_path), [])
    assert (got.rate(gpus=2), got.first_loss, got.peak_bytes) == (pytest.approx(100.0), 1.5, 7)


# --- Bridge's head -----------------------------------------------------------------------------------
def both_heads(ranks: int) -> list[list[torch.Tensor]]:
    """(loss, count, gradients of hidden states and weight) of ours and Bridge's, on this rank's rows of the vocabulary."""
    world = initialize(Layout(tensor=ranks), preset("tiny"))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(12, 16, generator=generator),
        torch.randn(32, 16, generator=generator),
    )
    targets = torch.randint(0, 32, (12,), generator=generator)
    targets[::3] = -100
    batch = PackedBatch(
        tokens_T=targets.clamp(min=0),
        targets_T=targets,
        cu_seqlens=torch.tensor([0, 12], dtype=torch.int32),
    )
    size, rank = world.layout.tensor, world.tensor_group.rank()
    results = []
    for head in (cross_entropy_head, materialised_head):
        h = hidden.clone().requires_grad_()
        w = weight.chunk(size)[rank].clone().requires_grad_()
        loss, count, _ = head(h, w, batch, group=world.tensor_group)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        results.append([loss.detach(), count, h.grad, w.grad])
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_bridge_s_head_gives_our_loss_and_gradients(ranks: int) -> None:
    for ours, theirs in run_ranks(both_heads, ranks, ranks):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def test_the_stage_runs_with_it_and_has_our_first_loss() -> None:
    small = [
        "distill.num_problems=60",
        "distill.num_prompts=30",
        "curate.sft_examples=60",
        "sft.examples_per_step=8",
    ]
    ours = train.bench("sft", small, steps=5)
    with bridge_style(transformer_engine=False):
        assert sft.cross_entropy_head is materialised_head
        theirs = train.bench("sft", small, steps=5)
    assert sft.cross_entropy_head is cross_entropy_head
    assert theirs.info["first_loss"] == pytest.approx(ours.info["first_loss"], abs=1e-5)


def test_transformer_engine_s_cross_entropy_takes_what_we_give_it() -> None:
    """Its module cannot be imported here; Megatron's source can be read."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "extensions" / "transformer_engine.py").read_text()
    functions = {n.name: n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}
    names = [a.arg for a in functions["te_parallel_cross_entropy"].args.args]
    assert names[:3] == ["logits", "labels", "tp_group"]
    assert "te_parallel_cross_entropy(logits, targets, group)" in inspect.getsource(sys.modules[bridge_style.__module__])  # fmt: skip
