"""Megatron's optimizer behind `Optimizer` equals torch's AdamW; the schedule; failures before any update."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    config,
    cross_entropy_head,
    documents,
    poison_uninitialised_memory,
    share_of,
)
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from transformers import get_scheduler

from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.nonfinite import NonFiniteError
from phimini.parallel.training.optimizer import OptimizerConfig, StepInfo, build_optimizer
from phimini.parallel.training.step import forward_backward

# eps is large, or the sign of a gradient that is zero up to rounding would decide the step.
ADAMW = OptimizerConfig(
    lr=1e-2, min_lr=1e-3, total_steps=3, decay="linear", weight_decay=0.1, eps=1e-5, clip=0.5
)  # fmt: skip
LEARNING_RATES = [1e-2, 0.7e-2, 0.4e-2]
STEPS = 3


def torch_steps(weight_decay_of_vectors: float = 0.0) -> tuple[list[float], dict[str, Tensor]]:
    """Return gradient norms and final weights of the reference model under torch.optim.AdamW, in fp64."""
    model = Phi4Mini(config())
    model.init_weights(0)
    model.double()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=weight_decay_of_vectors)],
        betas=ADAMW.betas, eps=ADAMW.eps,
    )  # fmt: skip
    norms = []
    for lr in LEARNING_RATES:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss, count = torch.zeros((), dtype=torch.float64), 0
        for d in (d for lengths in GROUPS for d in documents(lengths)):
            targets = torch.tensor(d.targets)
            logits = model.logits(model(torch.tensor([d.tokens])))[0]
            loss = loss + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets >= 0).sum())
        (loss / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip)))
        optimizer.step()
    return norms, model.state_dict()


def train_rank(layout: Layout, options: dict) -> tuple[list[StepInfo], dict[str, Tensor], int]:
    world = initialize(layout, config(), timeout_s=200)
    model = build_model(config(), world, seed=0, **options)
    optimizer = build_optimizer(
        model, ADAMW, distributed=options.get("distributed_optimizer", False)
    )
    infos = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        forward_backward(
            model, share_of(GROUPS, world.data_rank, world.data_size), cross_entropy_head
        )
        infos.append(optimizer.step())
    weights = {name: w.clone() for name, w in to_hf(model)}
    world.close()
    return infos, weights, model.num_updates


@pytest.fixture(scope="module")
def want() -> tuple[list[float], dict[str, Tensor]]:
    return torch_steps()


def largest_difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max((got[name] - w).abs().max().item() for name, w in want.items())


LAYOUTS = {
    "single": (1, Layout(), {}),
    "dp2": (2, Layout(), {}),
    "tp2-sp": (2, Layout(tensor=2, sequence_parallel=True), {}),
    "pp2": (2, Layout(pipeline=2), {}),
    "dp2-zero1": (2, Layout(), dict(distributed_optimizer=True)),
    "dp2-zero1-overlap": (2, Layout(), dict(distributed_optimizer=True, overlap=True)),
    # The last stage reads its copy of the embedding outside of any Megatron layer.
    "pp2-dp2-zero1-overlap": (
        4,
        Layout(pipeline=2),
        dict(distributed_optimizer=True, overlap=True),
    ),
    "tp2-pp2-dp2-zero1": (8, Layout(tensor=2, pipeline=2), dict(distributed_optimizer=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_equal_torch_adamw(name: str, want: tuple) -> None:
    world_size, layout, options = LAYOUTS[name]
    for infos, weights, num_updates in run_ranks(
        train_rank, world_size, layout, options, timeout_s=240
    ):
        assert num_updates == STEPS
        assert [i.lr for i in infos] == pytest.approx(LEARNING_RATES)
        assert [i.grad_norm for i in infos] == pytest.approx(want[0], rel=1e-5)
        assert min(want[0]) > ADAMW.clip, "the test must clip"
        assert largest_difference(weights, want[1]) <= 1e-5


def test_decayed_vectors_are_seen(want: tuple) -> None:
    """Control of the test above: weight decay moves norm weights by far more than its limit."""
    assert largest_difference(torch_steps(weight_decay_of_vectors=0.1)[1], want[1]) > 1e-3


def lr_rank(optimizer_config: OptimizerConfig, steps: int, skipped: tuple[int, ...] = ()) -> list[float]:  # fmt: skip
    """Return the learning rates of the updates, which the steps in `skipped` lack."""
    world = initialize(Layout(), config())
    model = build_model(config(), world, seed=0)
    optimizer = build_optimizer(model, optimizer_config)
    optimizer.zero_grad()
    lrs = [optimizer.skip() if k in skipped else optimizer.step().lr for k in range(steps)]
    lrs = [lr for lr in lrs if lr is not None]
    assert model.num_updates == len(lrs) == steps - len(skipped)
    world.close()
    return lrs


def values_of(schedule: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Return the value before each step, as in a torch loop or in transformers' Trainer."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    scheduler, values = schedule(optimizer), []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def warmed_up(name: str) -> Callable[[torch.optim.Optimizer], Any]:
    return lambda optimizer: get_scheduler(
        name, optimizer, num_warmup_steps=4, num_training_steps=12
    )


THEIRS = {
    "constant": (warmed_up("constant_with_warmup"), {"warmup_steps": 4}),
    "linear": (warmed_up("linear"), {"warmup_steps": 4}),
    "cosine": (warmed_up("cosine"), {"warmup_steps": 4}),
    "linear, torch": (lambda o: LinearLR(o, 1.0, 0.2, total_iters=12), {"min_lr": 0.2}),
    "cosine, torch": (lambda o: CosineAnnealingLR(o, T_max=12, eta_min=0.2), {"min_lr": 0.2}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_learning_rates_are_those_of_torch_and_transformers(name: str) -> None:
    schedule, fields = THEIRS[name]
    decay: Any = name.split(",")[0]
    ours = OptimizerConfig(lr=1.0, total_steps=12, decay=decay, **fields)
    (lrs,) = run_ranks(lr_rank, 1, ours, 12, timeout_s=200)
    assert lrs == pytest.approx(values_of(schedule, 12))
    assert lrs[-1] > 0


def test_after_its_last_step_a_schedule_stays_at_its_end() -> None:
    ours = OptimizerConfig(lr=1.0, min_lr=0.2, total_steps=3)
    (lrs,) = run_ranks(lr_rank, 1, ours, 5, timeout_s=200)
    assert lrs[:1] + lrs[3:] == [1.0, 0.2, 0.2] and lrs[2] > 0.2


def test_a_skipped_step_moves_the_schedule_and_no_weight() -> None:
    ours = OptimizerConfig(lr=1.0, warmup_steps=2, total_steps=8, decay="linear")
    (every,) = run_ranks(lr_rank, 1, ours, 8, timeout_s=200)
    (some,) = run_ranks(lr_rank, 1, ours, 8, (0, 3, 4), timeout_s=200)
    assert some == [every[k] for k in (1, 2, 5, 6, 7)]


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    def rank() -> tuple[str, bool]:
        world = initialize(Layout(tensor=2), config(), timeout_s=200)
        model = build_model(config(), world, seed=0)
        optimizer = build_optimizer(model, ADAMW)
        optimizer.zero_grad()
        forward_backward(model, share_of(GROUPS, 0, 1), cross_entropy_head)
        before = [p.detach().clone() for _, p in model.named_parameters()]
        if world.rank == 1:
            name, parameter = next((n, p) for n, p in model.named_parameters() if "linear_fc1" in n)
            parameter.main_grad[0, 0] = math.inf  # pyright: ignore[reportAttributeAccessIssue]
        try:
            optimizer.step()
            text = "nothing was raised"
        except NonFiniteError as error:
            text = str(error)
        same = all(a.equal(p) for a, (_, p) in zip(before, model.named_parameters(), strict=True))
        return text, same and model.num_updates == optimizer.scheduler.num_steps == 0

    results = run_ranks(rank, 2, timeout_s=200)
    assert all(unchanged for _, unchanged in results)
    assert len({text for text, _ in results}) == 1
    assert "step 0: the gradient norm is inf" in results[0][0]
    assert "rank 1: chunks.0.decoder.layers.0.mlp.linear_fc1.weight" in results[0][0]
    assert "rank 0:" not in results[0][0]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(lr=0.0), "expected a finite lr > 0 and 0 <= min_lr <= lr"),
        (dict(lr=math.inf), "expected a finite lr > 0"),
        (dict(lr=1.0, min_lr=2.0), "min_lr 2.0"),
        (dict(lr=1.0, warmup_steps=5, total_steps=5), "expected 0 <= warmup_steps < total_steps"),
        (dict(lr=1.0, decay="steps"), "expected cosine, linear or constant, got 'steps'"),
        (dict(lr=1.0, clip=-1.0), "OptimizerConfig.clip: expected a finite number >= 0"),
        (dict(lr=1.0, clip=math.nan), "OptimizerConfig.clip: .* got nan"),
        (dict(lr=1.0, weight_decay=math.nan), "OptimizerConfig.weight_decay: .* got nan"),
        (dict(lr=1.0, betas=(0.9, 1.0)), "OptimizerConfig.betas: expected two numbers in"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_nonsense_is_refused(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**fields)


def test_model_and_optimizer_must_agree() -> None:
    def rank() -> str:
        world = initialize(Layout(), config())
        frozen = build_model(config(), world, trainable=False)
        with pytest.raises(ValueError, match="the model is frozen"):
            build_optimizer(frozen, ADAMW)
        with pytest.raises(
            ValueError, match="distributed=True, but the model was built with .*=False"
        ):
            build_optimizer(build_model(config(), world), ADAMW, distributed=True)
        return "refused"

    assert run_ranks(rank, 1, timeout_s=200) == ["refused"]


def bf16_rank(distributed: bool) -> tuple[list[float], list[float], set[torch.dtype]]:
    world = initialize(Layout(), config())
    model = build_model(config(), world, dtype=torch.bfloat16, distributed_optimizer=distributed)
    optimizer = build_optimizer(model, ADAMW, distributed=distributed)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        batches = share_of(GROUPS, world.data_rank, world.data_size)
        losses.append(forward_backward(model, batches, cross_entropy_head).loss)
        norms.append(optimizer.step().grad_norm)
    gradients = {p.main_grad.dtype for _, p in model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
    world.close()
    return losses, norms, gradients


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "zero1"])
def test_bf16_parameters_train_through_fp32_masters(distributed: bool, want: tuple) -> None:
    for losses, norms, gradients in run_ranks(bf16_rank, 2, distributed, timeout_s=240):
        assert gradients == {torch.float32}
        assert norms == pytest.approx(
            want[0], rel=0.03
        )  # eight bits of mantissa through four layers
        assert losses[2] < losses[1] < losses[0]
