"""AdamW with warm-up, decay and clipping: Megatron's optimizer and scheduler behind four calls.

A step's learning rate is the schedule's value before the step, as in torch, transformers and Megatron. With s warm-up
steps of n, step k (from 0) has lr * k / s while k < s, then decays towards `min_lr`, which step n would have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from phimini.parallel.megatron.builder import Model, only_known
from phimini.parallel.megatron.refused_settings import refuse_unscheduled_decay
from phimini.parallel.ranks.timing import phase
from phimini.parallel.training.nonfinite import raise_for_gradient

Decay = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW and its schedule. Vectors (norm weights) have no weight decay."""

    lr: float
    """the highest learning rate, that of step `warmup_steps` (from 0)"""
    min_lr: float = 0.0
    """the learning rate after `total_steps` steps"""
    warmup_steps: int = 0
    """step k of the first `warmup_steps` (k from 0) uses lr * k / warmup_steps"""
    total_steps: int = 1
    """steps before `min_lr`; later steps stay there"""
    decay: Decay = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    """the global gradient norm is scaled down to this; 0 turns it off"""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"OptimizerConfig: expected a finite lr > 0 and 0 <= min_lr <= lr, got lr {self.lr}, min_lr {self.min_lr}"
            )
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"OptimizerConfig: expected 0 <= warmup_steps < total_steps, got warmup_steps {self.warmup_steps}, "
                f"total_steps {self.total_steps}"
            )
        if self.decay not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"OptimizerConfig.decay: expected cosine, linear or constant, got {self.decay!r}"
            )
        for name in ("weight_decay", "clip", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"OptimizerConfig.{name}: expected a finite number >= 0, got {getattr(self, name)}"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"OptimizerConfig.betas: expected two numbers in [0, 1), got {self.betas}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """Figures of one update; equal on every rank."""

    grad_norm: float
    """over all parameters, before clipping"""
    lr: float
    made: bool = True
    """False for an update that was refused"""


class Optimizer:
    """AdamW with its schedule: call `zero_grad`, then `forward_backward`, then `step`; or `skip`.

    The schedule follows the steps, not the updates: a skipped step advances it like any other. A gradient of zeros
    is not skipped, because moments and weight decay still move the weights. Checkpoints use `megatron` and
    `scheduler`.
    """

    def __init__(
        self,
        model: Model,
        config: OptimizerConfig,
        megatron: megatron_optimizer.ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        self.model = model
        self.config = config
        self.megatron = megatron
        self.scheduler = scheduler

    @phase("optimizer")
    def zero_grad(self) -> None:
        self.model.zero_grad()
        self.megatron.zero_grad()

    @phase("optimizer")
    @torch.no_grad()
    def step(self, accept: Callable[[float], bool] = lambda grad_norm: True) -> StepInfo:
        """Make one update, unless `accept` refuses its gradient norm: a refused one is skipped, as by `skip`.

        accept: called with what is equal on every rank; it must decide alike. Raises NonFiniteError on every rank, before weights or schedule change, if the gradient is not finite.
        """
        lr = self.megatron.param_groups[0]["lr"]
        refuse_unscheduled_decay(self.megatron.param_groups, self.config.weight_decay)
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm() or 0.0)
        if not math.isfinite(grad_norm):
            raise_for_gradient(self.model, grad_norm)
        if not accept(grad_norm):
            self.skip()
            return StepInfo(grad_norm=grad_norm, lr=lr, made=False)
        if self.config.clip > 0:
            for part in self.megatron.chained_optimizers:
                parameters: list[torch.Tensor] = [*part.get_parameters()]
                if parameters:
                    clip_grad_by_total_norm_fp32(
                        parameters, max_norm=self.config.clip, total_norm=grad_norm
                    )
        self.megatron.step_with_ready_grads()
        self.model.num_updates += 1
        self.skip()
        return StepInfo(grad_norm=grad_norm, lr=lr)

    def skip(self) -> None:
        """Advance the schedule by one step without an update."""
        self.scheduler.step(1)


def build_optimizer(
    model: Model, config: OptimizerConfig, *, distributed: bool = False
) -> Optimizer:
    """Build AdamW over the model's trainable parameters.

    Build it after the weights are loaded, because it copies them into its fp32 masters.

    distributed: each data-parallel rank keeps its share of the state (ZeRO-1). The model must have been built with
    `distributed_optimizer=True`.
    """
    ddp_config = getattr(model.chunks[0], "ddp_config", None)
    if ddp_config is None:
        raise ValueError("build_optimizer: the model is frozen (build_model(..., trainable=False))")
    if ddp_config.use_distributed_optimizer != distributed:
        raise ValueError(
            f"build_optimizer: distributed={distributed}, but the model was built with "
            f"distributed_optimizer={ddp_config.use_distributed_optimizer}"
        )
    dtype = model.transformer_config.params_dtype
    values = dict(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=ddp_config.overlap_param_gather,
        fp8_recipe=model.transformer_config.fp8_recipe if model.transformer_config.fp8 else None,
    )
    megatron = megatron_optimizer.get_megatron_optimizer(
        megatron_optimizer.OptimizerConfig(
            **only_known(megatron_optimizer.OptimizerConfig, values)
        ),
        model.chunks,  # pyright: ignore[reportArgumentType]
        use_gloo_process_groups=False,
    )
    assert isinstance(megatron, megatron_optimizer.ChainedOptimizer), type(megatron)
    # Required: only the scheduler writes weight_decay 0 into the group of vectors.
    scheduler = OptimizerParamScheduler(
        megatron,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.total_steps,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    return Optimizer(model, config, megatron, scheduler)
