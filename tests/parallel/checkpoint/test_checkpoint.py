"""Resume at any step and on any layout, equal to an uninterrupted run. Failures are in test_checkpoint_failures.py."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint_cases import CONFIG, build, fake_steps
from forked_ranks import run_ranks
from torch import Tensor

from phimini.parallel.checkpoint.save_load import (
    begin_checkpoint,
    latest_step,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from phimini.parallel.checkpoint.sharded_state import _pieces
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.hf_weights import export_hf, load_hf, to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.training.batch import Document, PackedBatch, next_token_targets, pack
from phimini.parallel.training.optimizer import Optimizer
from phimini.parallel.training.step import forward_backward


def head(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy over the gathered vocabulary, computed in full on every rank."""
    shards = [torch.empty_like(weight_VD) for _ in range(group.size())]
    dist.all_gather(shards, weight_VD.detach(), group=group)
    shards[group.rank()] = weight_VD
    loss = F.cross_entropy(hidden_MD @ torch.cat(shards).T, batch.targets_T, reduction="sum")
    return loss, (batch.targets_T >= 0).sum(), {}


def train(model: Model, optimizer: Optimizer, steps: range) -> list[float]:
    """Train on documents that depend only on the step; return the losses."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batches = []
        for length in (16, 16):
            tokens = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator).tolist()
            targets = next_token_targets(tokens, [True] * length)
            batches.append(pack([Document(tokens=tokens, targets=targets)]))
        if model.world.data_size == 2:
            batches = [batches[model.world.data_rank]]
        optimizer.zero_grad()
        losses.append(forward_backward(model, batches, head).loss)
        optimizer.step()
    return losses


# --- resuming ------------------------------------------------------------------------------------
CHAINS = {
    "tp1": [(Layout(), False), (Layout(), False)],
    "tp2-pp2-tp2pp2-tp1": [
        (Layout(tensor=2), False),
        (Layout(pipeline=2), False),
        (Layout(tensor=2, pipeline=2), False),
        (Layout(), False),
    ],
    "zero1-vpp-tp2": [
        (Layout(data=2), True),
        (Layout(pipeline=2, virtual_pipeline=2), False),
        (Layout(tensor=2, sequence_parallel=True), False),
    ],
    "plain-zero1-tp2zero1-dp2": [
        (Layout(), False),
        (Layout(data=2), True),
        (Layout(tensor=2, data=2), True),
        (Layout(data=2), False),
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_layouts_goes_on_as_one_run(name: str, tmp_path: Path) -> None:
    """Two steps, then each layout loads and saves; the last one's next three losses are the first one's."""

    def first(layout: Layout, zero1: bool) -> list[float]:
        model, optimizer = build(layout, zero1=zero1)
        train(model, optimizer, range(2))
        save_checkpoint(tmp_path / "0", 2, model, optimizer, {"position": [7, "a"]})
        return train(model, optimizer, range(2, 5))

    def following(i: int, layout: Layout, zero1: bool, last: bool) -> list[float]:
        model, optimizer = build(layout, seed=99, zero1=zero1)
        # Something to be overwritten: moments, step counts and schedule of another run.
        fake_steps(model, optimizer, range(3))
        loaded = load_checkpoint(tmp_path / str(i - 1), model, optimizer)
        assert loaded == (2, {"position": [7, "a"]}) and model.num_updates == 2
        save_checkpoint(tmp_path / str(i), 2, model, optimizer, loaded[1])
        return train(model, optimizer, range(2, 5)) if last else []

    chain = CHAINS[name]
    size = lambda layout: layout.model_size * (layout.data or 1)
    expected = run_ranks(first, size(chain[0][0]), *chain[0])[0]
    losses: list[float] = []
    for i, (layout, zero1) in enumerate(chain[1:], 1):
        losses = run_ranks(following, size(layout), i, layout, zero1, i == len(chain) - 1)[0]
    assert len(set(expected)) == 3, "this test wants losses that change"
    assert losses == pytest.approx(expected, abs=1e-6)
    if len(chain) == 2:  # nothing was resharded: not a bit may differ
        assert losses == expected


def test_a_chain_through_hugging_face_goes_on_as_one_run(tmp_path: Path) -> None:
    """TP2, PP2, TP2PP2, TP1, an HF folder, TP2: weights come from the folder, other state from the checkpoint."""

    def first() -> list[float]:
        model, optimizer = build(Layout(tensor=2))
        train(model, optimizer, range(2))
        save_checkpoint(tmp_path / "0", 2, model, optimizer)
        return train(model, optimizer, range(2, 5))

    def following(i: int, layout: Layout) -> None:
        model, optimizer = build(layout, seed=99)
        load_checkpoint(tmp_path / str(i - 1), model, optimizer)
        save_checkpoint(tmp_path / str(i), 2, model, optimizer)
        if i == 3:
            export_hf(model, tmp_path / "hf", max_shard_bytes=100_000)

    def last(through_hf: bool) -> list[float]:
        model, optimizer = build(Layout(tensor=2), seed=99)
        load_checkpoint(tmp_path / "3", model, optimizer)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                parameter.zero_()  # nothing of the checkpoint's weights is left
        if through_hf:
            load_hf(model, tmp_path / "hf")
        return train(model, optimizer, range(2, 5))

    expected = run_ranks(first, 2)[0]
    chain = [Layout(pipeline=2), Layout(tensor=2, pipeline=2), Layout()]
    for i, layout in enumerate(chain, 1):
        run_ranks(following, layout.model_size, i, layout)
    assert run_ranks(last, 2, True)[0] == pytest.approx(expected, abs=1e-6)
    assert run_ranks(last, 2, False)[0] != pytest.approx(expected, abs=1e-2), "the control"


def test_losses_differ_without_the_optimizer_state(tmp_path: Path) -> None:
    """The control of the test above: weights alone do not continue the run."""

    def run() -> tuple[list[float], list[float]]:
        model, optimizer = build(Layout())
        train(model, optimizer, range(2))
        save_checkpoint(tmp_path, 2, model, optimizer)
        expected = train(model, optimizer, range(2, 5))
        model.world.close()
        model, optimizer = build(Layout(), seed=99)
        load_checkpoint(tmp_path, model)
        return expected, train(model, optimizer, range(2, 5))

    expected, losses = run_ranks(run, 1)[0]
    assert losses[0] == expected[0] and abs(losses[2] - expected[2]) > 1e-3


@pytest.mark.parametrize("zero1", [False, True], ids=["plain", "zero1"])
def test_bf16_masters_are_kept_in_fp32(zero1: bool, tmp_path: Path) -> None:
    layout, dtype = Layout(data=2), torch.bfloat16

    def first() -> tuple[list[Tensor], dict[str, Tensor]]:
        model, optimizer = build(layout, zero1=zero1, dtype=dtype)
        fake_steps(model, optimizer, range(3))
        save_checkpoint(tmp_path, 3, model, optimizer)
        masters = [p.main.detach().clone() for p in _pieces(optimizer.megatron).values()]
        return masters, fake_steps(model, optimizer, range(3, 5))

    def second(masters: list[Tensor], after: dict[str, Tensor]) -> None:
        model, optimizer = build(layout, seed=99, zero1=zero1, dtype=dtype)
        load_checkpoint(tmp_path, model, optimizer)
        if dist.get_rank() == 0:
            got = [p.main.detach() for p in _pieces(optimizer.megatron).values()]
            assert all(torch.equal(a, b) for a, b in zip(got, masters, strict=True))
        again = fake_steps(model, optimizer, range(3, 5))
        assert all(torch.equal(again[name], t) for name, t in after.items())

    masters, after = run_ranks(first, 2)[0]
    assert any((m != m.bfloat16()).any() for m in masters), "masters are finer than the weights"
    run_ranks(second, 2, masters, after)


def test_background_save_holds_the_state_of_its_beginning(tmp_path: Path) -> None:
    def run() -> None:
        model, optimizer = build(Layout(tensor=2))
        before = fake_steps(model, optimizer, range(2))
        extra = {"counts": {"steps": 2}}
        pending = begin_checkpoint(tmp_path, 2, model, optimizer, extra)
        assert latest_step(tmp_path) is None
        extra["counts"]["steps"] = 3
        after = fake_steps(model, optimizer, range(2, 4))
        pending.finish()
        assert pending.is_written() and latest_step(tmp_path) == 2
        assert load_checkpoint(tmp_path, model, optimizer) == (2, {"counts": {"steps": 2}})
        loaded = {name: t.clone() for name, t in to_hf(model)}
        assert all(torch.equal(loaded[name], t) for name, t in before.items())
        again = fake_steps(model, optimizer, range(2, 4))
        assert all(torch.equal(again[name], t) for name, t in after.items())

    run_ranks(run, 2)


def test_rng_state_goes_through_json() -> None:
    saved = json.loads(json.dumps(rng_state()))
    expected = torch.randn(5)
    set_rng_state(saved)
    assert torch.equal(torch.randn(5), expected)


# --- directory -----------------------------------------------------------------------------------
def test_retention_and_saving_a_step_again(tmp_path: Path) -> None:
    def run() -> None:
        model, optimizer = build(Layout())
        assert latest_step(tmp_path / "none") is None
        for step in (5, 10, 15):
            save_checkpoint(tmp_path, step, model, optimizer)
        assert latest_step(tmp_path) == 15
        # Back to step 10 and on from there: the newest writes stay, whatever their step.
        load_checkpoint(tmp_path, model, optimizer, step=10)
        save_checkpoint(tmp_path, 10, model, optimizer, {"again": True})
        assert latest_step(tmp_path) == 10
        assert load_checkpoint(tmp_path, model, optimizer) == (10, {"again": True})
        assert load_checkpoint(tmp_path, model, optimizer, step=10) == (10, {"again": True})
        save_checkpoint(tmp_path, 11, model, optimizer, keep=3)
        save_checkpoint(tmp_path, 12, model, optimizer, keep=1)

    def names() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir())

    run_ranks(run, 1)
    assert names() == ["latest.json", "step-00000012"]


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def run() -> None:
        model, optimizer = build(Layout())
        for arguments, message in (
            (dict(step=1, extra={"x": object()}), "extra is not JSON"),
            (dict(step=1, keep=0), "keep must be at least 1"),
            (dict(step=-1), "step must not be negative"),
        ):
            with pytest.raises(ValueError, match=message):
                save_checkpoint(tmp_path, model=model, optimizer=optimizer, **arguments)  # pyright: ignore[reportArgumentType]
        assert list(tmp_path.iterdir()) == []

    run_ranks(run, 1)
