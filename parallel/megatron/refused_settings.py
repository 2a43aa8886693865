"""Checks that refuse settings with which megatron-core is silently wrong, before the first step.

A run's config cannot reach any of them; a later change of `builder.py` or `optimizer.py` could.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def refuse_wrong_settings(config: TransformerConfig) -> None:
    """Raise AssertionError that says what would go wrong with a setting."""
    interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    if config.pipeline_model_parallel_size == 2 and interleaved:
        assert config.overlap_p2p_comm and not config.batch_p2p_comm, (
            "two interleaved stages with batched sends: both sends and both receives go between the same two ranks "
            "and are matched wrongly; the loss is off by a tenth"
        )
    assert not config.apply_rope_fusion, (
        "apply_rope_fusion: Megatron's fused rotation ignores LongRoPE's attention factor on packed documents"
    )
    native = config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "native"
    assert not (native and config.params_dtype == torch.float32), (
        "cross_entropy_loss_fusion 'native' rounds its gradient to bfloat16, in fp32 too"
    )
    assert config.calculate_per_token_loss, (
        "without calculate_per_token_loss gradients are means of means: micro-batches of unequal size weigh alike"
    )


def refuse_unmarked_norms(config: TransformerConfig, chunk: nn.Module) -> None:
    """Refuse norms without the `sequence_parallel` mark.

    Under sequence parallelism a rank's norm sees only some tokens, and Megatron sums only marked gradients.
    """
    for name, parameter in chunk.named_parameters():
        if config.sequence_parallel and parameter.ndim == 1:
            assert getattr(parameter, "sequence_parallel", False), (
                f"{name} is not marked sequence_parallel: its gradient would be that of one rank's tokens"
            )


def refuse_unscheduled_decay(groups: Iterable[dict[str, Any]], weight_decay: float) -> None:
    """Refuse weight decay of vectors, from which only a run of the scheduler exempts them.

    groups: the parameter groups just before an update.
    """
    for group in groups:
        expected = weight_decay * group.get("wd_mult", 1.0)
        assert group["weight_decay"] == expected, (
            f"weight decay is {group['weight_decay']} where the scheduler would have set {expected}: it did not run"
        )
