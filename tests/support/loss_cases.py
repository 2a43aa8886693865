"""The four losses under parallel layouts, with their references."""

import torch
from parity_cases import (  # noqa: F401
    LAYOUTS,
    LIMIT,
    config,
    documents,
    poison_uninitialised_memory,
    worst_error,
)
from torch import Tensor

from phimini import kernels
from phimini.model.config import ModelConfig
from phimini.model.reference import Phi4Mini
from phimini.parallel.training.batch import Document, PackedBatch, pack


def batch_of(lengths: list[int]) -> PackedBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    docs = []
    for i, d in enumerate(documents(lengths)):
        n = len(d.tokens)
        fields = {
            "sequence": [i] * n,
            "old_logp": (-5 + 0.3 * torch.randn(n, generator=generator)).tolist(),
            "advantage": torch.randn(n, generator=generator).tolist(),
        }
        docs.append(Document(tokens=d.tokens, targets=d.targets, token_fields=fields,
                             document_fields={"reference_logp": -5.0 * n}))  # fmt: skip
    return pack(docs)


def cross_entropy(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group):
    loss, m = kernels.linear_cross_entropy(hidden_MD, weight_VD, batch.targets_T, group=group)
    return loss, m.num_rows, {"nll": m.nll_sum, "entropy": m.entropy_sum}


def policy(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group):
    f = batch.fields
    loss, m = kernels.linear_policy_loss(
        hidden_MD, weight_VD, batch.targets_T, f["old_logp"], f["advantage"], group=group
    )
    return loss, m.num_rows, {}


def dpo(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group):
    loss, m = kernels.linear_dpo(
        hidden_MD, weight_VD, batch.targets_T, batch.fields["sequence"], batch.document_fields["reference_logp"],
        nll_weight=0.2, group=group, sequence_group=batch.context_group,
    )  # fmt: skip
    return (
        batch.share_of_rank(loss),
        batch.share_of_rank(m.num_pairs),
        {"margin": batch.share_of_rank(m.margin_sum)},
    )


HEADS = {"cross_entropy": cross_entropy, "policy": policy, "dpo": dpo}


def reference_losses(
    model_config: ModelConfig, groups: list[list[int]]
) -> dict[str, tuple[float, dict[str, Tensor]]]:
    out = {}
    for name in HEADS:
        model = Phi4Mini(model_config)
        model.init_weights(0)
        model.double()
        loss, count = torch.zeros((), dtype=torch.float64), 0.0
        for batch in map(batch_of, groups):
            hidden = model(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens)[0]
            weight, targets, f = model.head_weight_VD, batch.targets_T, batch.fields
            if name == "cross_entropy":
                part, m = kernels.linear_cross_entropy_reference(hidden, weight, targets)
                number = m.num_rows
            elif name == "policy":
                part, m = kernels.linear_policy_loss_reference(
                    hidden, weight, targets, f["old_logp"].double(), f["advantage"].double()
                )
                number = m.num_rows
            else:
                part, m = kernels.linear_dpo_reference(
                    hidden,
                    weight,
                    targets,
                    f["sequence"],
                    batch.document_fields["reference_logp"].double(),
                    nll_weight=0.2,
                )
                number = m.num_pairs
            loss, count = loss + part, count + float(number)
        (loss / count).backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        out[name] = ((loss / count).item(), gradients)
    return out
