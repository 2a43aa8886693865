"""Guards of training: each one's value, threshold, sentence and action, in stages that run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked_ranks import run_ranks
from parity_cases import config
from recipe_cases import MICRO, command, with_data
from rl_run import make_run, reinforce, run_config

from phimini.model.io.json_files import read_json
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import World, initialize
from phimini.stages.cli import main
from phimini.stages.config.guards import GUARDS, GuardsConfig
from phimini.stages.config.recipes import tiny
from phimini.stages.config.schema import OptimizerSettings, override
from phimini.stages.run import guards
from phimini.stages.run.guards import Guards, GuardStop, check_trained_shares
from phimini.stages.run.training import start_optimizer
from phimini.stages.verify.symbolic import Outcome


class OneRank:
    """A world of one rank."""

    world_size, is_main = 1, True


def guarded(*words: str, state: dict | None = None, world: Any = None) -> Guards:
    settings = override(tiny(), [f"guards.{word}" for word in words]).guards
    one: Any = OneRank()
    return Guards(settings, world or one, {} if state is None else state)


def looked_at(own: Guards, metric: str, values: list[float]) -> list[dict]:
    """Show a guard a metric of one step after another; return the rows."""
    rows = []
    for index, value in enumerate(values):
        row: dict = {}
        own.allow(f"sft, step {index + 1}", index, {metric: value}, row)
        rows.append(row)
    return rows


def test_the_table_has_the_fields_of_the_config() -> None:
    assert list(GUARDS) == [field.name for field in dataclasses.fields(GuardsConfig)]


STEADY = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1] * 3
# Of each guard: its metric, its values in steps that are well, and the one after them that is not, with what the log says.
CASES = {
    "loss_spike": ("loss", STEADY, 9.0, "the loss is 70 deviations above the median of the last 64 steps, above guards.loss_spike.threshold=30"),
    "grad_norm": ("grad_norm", STEADY, 100.0, "the gradient norm is 50 times the median of the last 64 steps, above guards.grad_norm.threshold=30"),
    "entropy_collapse": ("entropy", [1.0] * 8 + [0.001] * 15, 0.0, "the mean entropy of 8 steps is 0.000875 times that of the first 8, below guards.entropy_collapse.threshold=0.05"),
    "length_explosion": ("response_length", [100.0] * 16 + [310.0] * 7, 320.0, "the mean length of the answers of 8 steps is 3.112 times that of the first 8, above guards.length_explosion.threshold=3"),
    "reward_hacking": ("unconfirmed", [0.0] * 16 + [0.1] * 7, 0.6, "the share of rewarded answers that the audit refuses rose by 0.1625, above guards.reward_hacking.threshold=0.15"),
    "equal_groups": ("zero_groups", [0.95], 0.96875, "the share of groups whose answers all have one reward is 0.9688, above guards.equal_groups.threshold=0.95"),
    "truncated": ("truncated", [0.5], 0.75, "the share of answers that were cut off is 0.75, above guards.truncated.threshold=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_guard_trips_beyond_its_threshold_and_says_so(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    metric, well, ill, said = CASES[name]
    rows = looked_at(guarded(), metric, [*well, ill])
    first = next(i for i, row in enumerate(rows) if row)
    if name != "entropy_collapse":  # its mean crosses the threshold before the last step
        assert first == len(well), rows
    assert set(rows[-1]) == {f"alarm_{name}"}, "a warning holds no update back"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"sft, step {first + 1}: {name}: ")
    if name != "entropy_collapse":
        assert said in lines[0] and lines[0].endswith("; training goes on"), lines
    off = guarded(f"{name}.action=off")
    assert not any(looked_at(off, metric, [*well, ill])), "off"


def test_every_guard_of_steps_has_a_case() -> None:
    assert [*CASES] + ["trained_share_low", "trained_share_high"] == list(GUARDS)


def test_no_guard_trips_while_there_is_little_to_compare_with() -> None:
    assert not any(looked_at(guarded(), "loss", [2.0, 2.1, 50.0]))
    assert not any(looked_at(guarded(), "loss", [2.0] * 20 + [2.05])), "equal losses deviate by 0"


def test_a_line_comes_at_the_1st_2nd_4th_and_8th_time_only(capsys: pytest.CaptureFixture) -> None:
    own = guarded()
    looked_at(own, "truncated", [0.1, *[0.9] * 10])
    steps = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == [f"sft, step {n}" for n in (2, 3, 5, 9)]
    assert own.counts == {"truncated": {"steps": 10, "first": 2, "skipped": 0}}


def test_a_resumed_guard_decides_as_one_that_was_not_interrupted() -> None:
    whole, state = guarded("grad_norm.action=skip"), {}
    first = guarded("grad_norm.action=skip", state=state)
    looked_at(first, "grad_norm", STEADY[:12])
    resumed = guarded("grad_norm.action=skip", state=json.loads(json.dumps(state)))
    rest = [*STEADY[12:], 100.0, 3.0]
    assert looked_at(whole, "grad_norm", STEADY[:12] + rest)[12:] == looked_at(resumed, "grad_norm", rest)  # fmt: skip
    assert resumed.counts["grad_norm"]["skipped"] == 1


@pytest.mark.parametrize("name", [n for n, rule in GUARDS.items() if rule.no_skip])
def test_an_action_that_cannot_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^guards\.{name}\.action: expected off, warn or stop, because .*, got skip$"):  # fmt: skip
        guarded(f"{name}.action=skip")


@pytest.mark.parametrize("name", [n for n, rule in GUARDS.items() if not rule.no_skip])
def test_a_held_back_update_is_counted(name: str) -> None:
    metric, well, ill, _ = CASES[name]
    own = guarded(f"{name}.action=skip")
    *_, row = looked_at(own, metric, [*well, ill])
    assert row["skipped"] == 1 and own.counts[name]["skipped"] == 1 and own.stop is None


# --- shares of trained tokens ----------------------------------------------------------------------
def shares_of(*words: str, shares: list[float], **kwargs: Any) -> None:
    settings = override(tiny(), [f"guards.{word}" for word in words]).guards
    world: Any = OneRank()
    check_trained_shares(settings, world, "sft", np.array(shares), "rows.jsonl:{}".format, **kwargs)


def test_the_start_of_a_stage_prints_the_shares_of_trained_tokens(
    capsys: pytest.CaptureFixture,
) -> None:
    shares_of(shares=[0.5, 0.25, 0.75, 0.5])
    assert capsys.readouterr().out == (
        "sft: share of trained tokens per document: lowest 0.250 (rows.jsonl:1), median 0.500, highest 0.750 (rows.jsonl:2)\n"
    )


def test_a_document_without_loss_or_with_loss_everywhere_is_named(
    capsys: pytest.CaptureFixture,
) -> None:
    shares_of(shares=[0.5, 1.0, 0.0])
    low, high = capsys.readouterr().out.splitlines()[1:]
    assert low == (
        "sft, rows.jsonl:2: trained_share_low: the smallest share of trained tokens of a document is 0, below "
        "guards.trained_share_low.threshold=0.01; training goes on"
    )
    assert high.startswith("sft, rows.jsonl:1: trained_share_high: the largest share")
    with pytest.raises(GuardStop, match="rows.jsonl:1: trained_share_high: .* is 1, above"):
        shares_of("trained_share_high.action=stop", shares=[0.5, 1.0])
    shares_of("trained_share_high.action=stop", shares=[1.0, 1.0], all_tokens=True)


# --- in stages that run ----------------------------------------------------------------------------
def test_a_refused_update_leaves_weights_and_moments_and_moves_the_schedule() -> None:
    def rank() -> tuple[list[float], list[bool], bool]:
        world = initialize(Layout(), config())
        model = build_model(config(), world, seed=0)
        run: Any = dataclasses.make_dataclass("Run", ["distributed_optimizer"])(False)
        optimizer = start_optimizer(run, model, OptimizerSettings(lr=1e-3, decay="linear"), 4)
        lrs, moved = [], []
        for step in range(3):
            state = {n: p.detach().clone() for n, p in model.named_parameters()}
            moments = {n: t.clone() for n, t in moments_of(optimizer).items()}
            optimizer.zero_grad()
            for _, p in model.named_parameters():
                p.main_grad.fill_(1e-3)  # pyright: ignore[reportAttributeAccessIssue]
            info = optimizer.step(lambda norm, step=step: step != 1)
            lrs.append(info.lr)
            same = all(p.detach().equal(state[n]) for n, p in model.named_parameters())
            same &= bool(moments) and all(t.equal(moments[n]) for n, t in moments_of(optimizer).items())  # fmt: skip
            moved.append((info.made, not same))
        return lrs, moved, model.num_updates == 2

    lrs, moved, two = run_ranks(rank, 1, timeout_s=200)[0]
    assert moved == [(True, True), (False, False), (True, True)] and two
    assert lrs == pytest.approx([1e-3, 0.75e-3, 0.5e-3]), "the schedule follows the steps"


def moments_of(optimizer: Any) -> dict[str, Any]:
    """Return the tensors of the optimizer's state by parameter and name."""
    inner = optimizer.megatron.chained_optimizers[0].optimizer
    return {
        f"{i}/{name}": value
        for i, state in enumerate(inner.state.values())
        for name, value in state.items()
        if name.startswith("exp_avg")
    }


def test_ranks_decide_alike_even_where_they_measured_different_numbers() -> None:
    def rank() -> list[bool]:
        world: World = initialize(Layout(), config())
        own = guarded("truncated.action=skip", world=world)
        return [
            own.allow("rlvr, step 1", 0, {"truncated": share + 0.1 * world.rank}, {})
            for share in (0.45, 0.55, 0.3)
        ]

    assert run_ranks(rank, 2, timeout_s=200) == [[True, False, True]] * 2, "as rank 0 says"


def metrics(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def midtrain(run: Path, *words: str) -> int:
    """Run mid-training, whose gradient norm counts as a spike from step 3 on."""

    def at_once() -> int:
        guards.FEWEST = 2
        return main(
            ["midtrain", "tiny", f"out={run}", *MICRO, "guards.grad_norm.threshold=0", *words]
        )

    return run_ranks(at_once, 1)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_data(tmp_path_factory.mktemp("guards") / "data")


def run_of(data: Path, folder: Path) -> Path:
    """Return a new run with these data."""
    folder.mkdir()
    for name in ("distill", "curate", "base", "tokenize"):
        (folder / name).symlink_to(data / name)
    return folder


def test_a_warning_changes_no_number(data: Path, tmp_path: Path) -> None:
    warned, plain = run_of(data, tmp_path / "warned"), run_of(data, tmp_path / "plain")
    assert midtrain(warned) == midtrain(plain, "guards.grad_norm.action=off") == 0
    rows, want = metrics(warned, "midtrain"), metrics(plain, "midtrain")
    assert [row["loss"] for row in rows] == [row["loss"] for row in want]
    assert ["alarm_grad_norm" in row for row in rows] == [False, False, True, True, True, True]
    summary = read_json(warned / "midtrain" / "summary.json")
    assert summary["guards"] == {"grad_norm": {"steps": 4, "first": 3, "skipped": 0}}
    assert read_json(plain / "midtrain" / "summary.json")["guards"] == {}


def test_skipped_steps_leave_the_model_as_it_is(data: Path, tmp_path: Path) -> None:
    run = run_of(data, tmp_path / "run")
    assert midtrain(run, "guards.grad_norm.action=skip") == 0
    rows = metrics(run, "midtrain")
    assert [row.get("skipped") for row in rows] == [None, None, 1, 1, 1, 1]
    assert rows[2]["validation_loss"] == rows[5]["validation_loss"]
    assert read_json(run / "midtrain/summary.json")["guards"]["grad_norm"]["skipped"] == 4


def test_a_stop_saves_names_everything_and_can_go_on(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = run_of(data, tmp_path / "run")
    assert midtrain(run, "guards.grad_norm.action=stop") == 3
    said = capfd.readouterr().err
    assert "phimini: midtrain, step 3: grad_norm: the gradient norm is " in said, said
    assert "above guards.grad_norm.threshold=0; the run stops without this update; saved after step 3" in said  # fmt: skip
    assert read_json(run / "midtrain/checkpoints/latest.json")["step"] == 3
    assert midtrain(run) == 0
    rows = metrics(run, "midtrain")
    assert [row.get("skipped") for row in rows] == [None, None, 1, None, None, None]
    assert rows[5]["validation_loss"] != rows[2]["validation_loss"]


def test_a_stop_before_step_1_names_the_document(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = run_of(data, tmp_path / "run")
    words = ["midtrain.loss_on_question=false", "guards.trained_share_low.threshold=0.9"]
    stop = [
        "midtrain",
        "tiny",
        f"out={run}",
        *MICRO,
        *words,
        "guards.trained_share_low.action=stop",
    ]
    assert command(stop) == 3
    assert "curate/midtrain.jsonl:" in capfd.readouterr().err


def test_a_step_of_stage_4_that_a_guard_holds_back_makes_no_update(tmp_path: Path) -> None:
    """Random weights never end an answer, so every step has more cut off than the threshold."""
    words = [
        "guards.truncated.threshold=0.0",
        "guards.truncated.action=skip",
        "rlvr.min_rollouts=2",
    ]
    run = run_config(make_run(tmp_path / "run"), *words, "guards.equal_groups.action=off")
    with pytest.raises(
        Exception, match="no update was made in 3 steps.* guards held back 3 updates"
    ):
        run_ranks(reinforce, 1, run, timeout_s=200)


def confirmed(response: str, answer: str) -> Outcome:
    return "equal" if len(response) % 4 == 0 else "different"


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_audit_counts_the_rewards_that_it_refuses(tmp_path: Path, ranks: int) -> None:
    """An answer of even length has a reward, and the second check confirms those that end of every second such length."""

    def rank(run: Any) -> list[dict]:
        from phimini.stages.verify import symbolic

        symbolic.second.compare = confirmed  # pyright: ignore[reportAttributeAccessIssue]
        return reinforce(run)

    run = run_config(make_run(tmp_path / "run"), "audit=1.0")
    for row in run_ranks(rank, ranks, run, timeout_s=200)[0]:
        assert row["audited"] and row["accuracy"] == row["audited_accuracy"] + row["unconfirmed"]
    table = pq.read_table(Path(run.out) / "rlvr/rollouts/000001.parquet").to_pylist()
    for row in table:
        is_confirmed = row["finish_reason"] == "stop" and len(row["text"]) % 4 == 0
        assert row["second"] == ("right" if is_confirmed else "wrong")
    assert {row["second"] for row in table if row["reward"] > 0} == {"right", "wrong"}
