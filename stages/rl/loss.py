"""Stage 4's head: the clipped policy loss of a micro-batch, its importance weights, and what it reports of itself."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels import linear_logprob, linear_policy_loss
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.layers import main_grad_of
from phimini.parallel.training.batch import PackedBatch
from phimini.parallel.training.step import forward_only
from phimini.stages.config.schema import RlvrConfig
from phimini.stages.rl.mismatch import MismatchMeter, importance_weights, sums_of_documents


def weight_of(normalizer: str, length: int, max_new_tokens: int) -> float:
    """Return the weight in the loss of each token of an answer of `length` tokens; see `rlvr.normalizer`."""
    weights = {"token": 1.0, "sequence": 1.0 / length, "constant": 1.0 / max_new_tokens}
    return weights[normalizer]


def with_reference_logps(frozen: Model, microbatches: list[PackedBatch]) -> list[PackedBatch]:
    """Return the batches with the log-probs of the frozen stage-3 model, at the rollouts' temperatures. Collective."""

    def logp(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        return linear_logprob(
            hidden_MD,
            weight_VD,
            batch.targets_T,
            temperature=batch.fields["temperature"],
            group=group,
        ).logp_M

    results = forward_only(frozen, microbatches, logp)
    return [
        dataclasses.replace(batch, fields=batch.fields | {"reference_logp": result})
        for batch, result in zip(microbatches, results, strict=True)
    ]


def logps(
    hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, group: dist.ProcessGroup | None
) -> Tensor:
    """Return (M,): the trainer's log-probs of the sampled tokens, at the temperatures of their sampling."""
    temperature = batch.fields["temperature"]
    return linear_logprob(
        hidden_MD, weight_VD, batch.targets_T, temperature=temperature, group=group, with_entropy=False
    ).logp_M  # fmt: skip


def mean_of_documents(value_M: Tensor, counts_M: Tensor, batch: PackedBatch) -> Tensor:
    """Return (M,): for each row the mean of `value_M` over the rows of its document that count."""
    documents_M, num, group = batch.document_ids_T, batch.num_documents, batch.context_group
    sums_N = sums_of_documents(value_M.where(counts_M, 0), documents_M, num, group)
    rows_N = sums_of_documents(counts_M.to(value_M.dtype), documents_M, num, group)
    return (sums_N / rows_N.clamp_min(1))[documents_M]


def policy_head(config: RlvrConfig, meter: MismatchMeter, rounding: float, importance: str):
    """Return the head of the policy loss of `config.objective`; the count is trained tokens, or rollouts.

    importance: as `config.importance`, but not auto. rounding: |difference of log-probs| that counts as 0. The loss gives the
    trainer's log-probs of the sampled tokens, which the meter adds up; importance weights and GSPO need them before the
    loss, which costs another matrix product.
    """
    is_sequence_level = config.objective == "gspo"

    def head(
        hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weight_M, sampled_logp_M = batch.fields["weight"], batch.fields["old_logp"]
        counts_M, old_logp_M, importance_M = weight_M != 0, sampled_logp_M, None
        logp_M = log_ratio_M = None
        if importance != "off" or is_sequence_level:
            with torch.no_grad():
                logp_M = logps(hidden_MD, weight_VD, batch, group)
        if logp_M is not None and importance != "off":
            old_logp_M = logp_M
            importance_M = importance_weights(
                old_logp_M - sampled_logp_M,
                counts_M,
                importance,
                cap=config.importance_cap,
                low=config.importance_low,
                documents_M=batch.document_ids_T,
                num_documents=batch.num_documents,
                context_group=batch.context_group,
                rounding=rounding,
            )
        if logp_M is not None and is_sequence_level:
            log_ratio_M = mean_of_documents(logp_M - old_logp_M, counts_M, batch)
        loss, metrics = linear_policy_loss(
            hidden_MD,
            weight_VD,
            batch.targets_T,
            old_logp_M,
            batch.fields["advantage"],
            row_weight_M=weight_M,
            importance_weight_M=importance_M,
            objective="cispo" if config.objective == "cispo" else "clip",
            dual_clip=config.dual_clip,
            sequence_log_ratio_M=log_ratio_M,
            temperature=batch.fields["temperature"],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            reference_logp_M=batch.fields.get("reference_logp"),
            kl_coef=config.kl_coef,
            group=group,
            main_grad=main_grad_of(weight_VD),
        )
        meter.add(metrics.logp_M - sampled_logp_M, batch.fields["age"], counts_M)
        sums = {
            "rows": metrics.num_rows,
            "entropy": metrics.entropy_sum,
            "clipped": metrics.clipped_sum,
        }
        if config.kl_coef:  # else there is no reference that it could be to
            sums["kl"] = metrics.kl_sum
        return loss, batch.fields["share"].sum(), sums

    return head
