"""Schedules: sums over everything on every rank, forward-only results in order, and loud failures."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import run_ranks
from parity_cases import (  # noqa: F401
    GROUPS,
    check,
    config,
    cross_entropy_head,
    documents,
    poison_uninitialised_memory,
    reference,
    share_of,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from phimini.model.reference import Phi4Mini
from phimini.parallel.megatron.builder import build_model
from phimini.parallel.megatron.hf_weights import gradients_to_hf
from phimini.parallel.ranks.layout import Layout
from phimini.parallel.ranks.world import initialize
from phimini.parallel.training.batch import Document, PackedBatch, pack
from phimini.parallel.training.nonfinite import NonFiniteError
from phimini.parallel.training.step import forward_backward, forward_only


def on_ranks(layout: Layout, world_size: int, job) -> list[Any]:
    """Return `job(model, this data rank's micro-batches)` of every rank."""

    def rank() -> Any:
        world = initialize(layout, config(), timeout_s=200)
        model = build_model(config(), world, seed=0)
        model.zero_grad()
        result = job(model, share_of(GROUPS, world.data_rank, world.data_size))
        world.close()
        return result

    return run_ranks(rank, world_size, timeout_s=240)


def log_probs(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> dict[str, Any]:
    logp_MV = (hidden_MD @ weight_VD.T).log_softmax(-1)
    logp_M = logp_MV.gather(1, batch.targets_T.clamp(min=0)[:, None])[:, 0]
    return {"logp": logp_M, "sums": (logp_M.sum(), logp_M[:, None].expand(-1, 2))}


def sums_by_document(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
    logp_M = log_probs(hidden_MD, weight_VD, batch, group=group)["logp"]
    return logp_M.new_zeros(batch.num_documents).index_add_(0, batch.document_ids_T, logp_M)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 1), (Layout(pipeline=2), 2), (Layout(pipeline=2, virtual_pipeline=2), 2), (Layout(pipeline=2), 4),
     (Layout(context=2), 2), (Layout(context=2, pipeline=2), 4)],
    ids=["single", "pp2", "pp2-vpp2", "pp2-dp2", "cp2", "cp2-pp2"],
)  # fmt: skip
def test_forward_only_gives_each_micro_batch_s_result_on_every_rank(
    layout: Layout, world_size: int
) -> None:
    reference = Phi4Mini(config())
    reference.init_weights(0)
    results = on_ranks(
        layout,
        world_size,
        lambda m, batches: (m.world.data_rank, forward_only(m, batches, log_probs)),
    )
    replicas = world_size // layout.model_size
    for data_rank, outputs in results:
        batches = share_of(GROUPS, data_rank, replicas)
        assert len(outputs) == len(batches)
        for output, batch in zip(outputs, batches, strict=True):
            hidden = reference(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens)[0]
            want = log_probs(hidden, reference.head_weight_VD, batch, group=None)
            for got, right in (
                (output["logp"], want["logp"]),
                *zip(output["sums"], want["sums"], strict=True),
            ):
                assert (
                    got.shape == right.shape
                )  # padding between stages and context ranks is cut off again
                assert (got - right).abs().max() <= 1e-5 * right.abs().max()


def test_sums_by_document_are_summed_whatever_their_number() -> None:
    """With two documents of two tokens, each of two context ranks holds as many tokens as there are documents."""
    batch = PackedBatch(
        tokens_T=torch.arange(4), targets_T=torch.arange(1, 5), cu_seqlens=torch.tensor([0, 2, 4])
    )
    reference = Phi4Mini(config())
    reference.init_weights(0)
    hidden = reference(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens)[0]
    want = sums_by_document(hidden, reference.head_weight_VD, batch, group=None)
    job = lambda model, _: forward_only(model, [batch], sums_by_document, summed=True)[0]
    for got in on_ranks(Layout(context=2), 2, job):
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


class OnGpu(Tensor):
    """Stand-in for a tensor on this rank's GPU: another rank that unpickles it would allocate it on that GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result: Any = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.cpu else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("a GPU's tensor is pickled")


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(context=2)], ids=["pp2", "cp2"])
def test_results_go_to_other_ranks_by_way_of_the_cpu(layout: Layout) -> None:
    def log_probs_on_gpu(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.as_subclass(OnGpu), log_probs(*args, **kwargs))

    for outputs in on_ranks(layout, 2, lambda m, batches: forward_only(m, batches, log_probs_on_gpu)):  # fmt: skip
        assert outputs and all(type(t) is Tensor for t in tree_leaves(outputs))


def weighted_head(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> tuple:
    """Return a loss whose count is a sum of fractional weights per document."""
    logp_M = log_probs(hidden_MD, weight_VD, batch, group=group)["logp"]
    weight_M = batch.document_fields["weight"][batch.document_ids_T] * (batch.targets_T >= 0)
    weight = batch.share_of_rank(batch.document_fields["weight"].sum())
    return -(logp_M * weight_M).sum(), weight, {"logp": logp_M.detach().sum()}


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 2), (Layout(pipeline=2), 2), (Layout(context=2), 2)],
    ids=["dp2", "pp2", "cp2"],
)
def test_counts_may_be_fractions_and_fields_per_document(layout: Layout, world_size: int) -> None:
    def weighted(group: list[int], i: int) -> PackedBatch:
        return pack(
            [
                Document(
                    tokens=d.tokens, targets=d.targets, document_fields={"weight": 0.25 * (i + 1)}
                )
                for d in documents(group)
            ]
        )

    batches = [weighted(group, i) for i, group in enumerate(GROUPS)]

    def job(model, _):
        r, n = model.world.data_rank, model.world.data_size
        result = forward_backward(model, batches[r * 8 // n : (r + 1) * 8 // n], weighted_head)
        return result.loss_sum, result.count, result.metrics["logp"]

    reference = Phi4Mini(config())
    reference.init_weights(0)
    totals = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        hidden = reference(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens)[0]
        loss, count, metrics = weighted_head(hidden, reference.head_weight_VD, batch, group=None)
        totals += torch.tensor(
            [loss.item(), count.item(), metrics["logp"].item()], dtype=torch.float64
        )
    for got in on_ranks(layout, world_size, job):
        assert torch.tensor(got, dtype=torch.float64).allclose(totals, rtol=1e-5)


def test_loss_is_the_sum_over_the_count() -> None:
    def job(model, batches):
        r = forward_backward(model, batches, cross_entropy_head)
        return r.loss, r.loss_sum, r.count, r.metrics

    (loss, loss_sum, count, metrics), other = on_ranks(Layout(), 2, job)
    targets = torch.cat([b.targets_T for b in share_of(GROUPS, 0, 1)])
    assert count == int((targets >= 0).sum()) and loss == loss_sum / count
    assert set(metrics) == {"right", "logit_sum"} and metrics["right"] == int(metrics["right"])
    assert other == (loss, loss_sum, count, metrics)


def poisoned(batches: list[PackedBatch], index: int) -> list[PackedBatch]:
    """Start document 1 of micro-batch `index` with the token whose embedding the job makes NaN."""
    out = [*batches]
    bad = out[index].tokens_T.clone()
    bad[int(out[index].cu_seqlens[1])] = 5
    names = tuple(f"rows.jsonl:{i}" for i in range(out[index].num_documents))
    out[index] = PackedBatch(
        tokens_T=bad, targets_T=out[index].targets_T, cu_seqlens=out[index].cu_seqlens, names=names
    )
    return out


@pytest.mark.parametrize(
    ("layout", "world_size"), [(Layout(), 2), (Layout(pipeline=2), 4)], ids=["dp2", "pp2-dp2"]
)
def test_a_loss_that_is_not_finite_is_named_on_every_rank(layout: Layout, world_size: int) -> None:
    def job(model, batches):
        for batch in batches:
            batch.tokens_T[batch.tokens_T == 5] = 6
        if model.world.data_rank == 1:
            batches = poisoned(batches, 2)
        model.num_updates = 17
        if model.world.pipeline_rank == 0:
            with torch.no_grad():
                model.gpts[0].embedding.word_embeddings.weight[5] = math.nan
        if model.world.is_last_stage and layout.pipeline == 1:

            def head(hidden_MD, weight_VD, batch, *, group):
                # tied embeddings: the head must not see the poisoned row
                return cross_entropy_head(hidden_MD, weight_VD.nan_to_num(0.0), batch, group=group)
        else:
            head = cross_entropy_head
        try:
            forward_backward(model, batches, head)
        except NonFiniteError as error:
            return str(error)
        return "nothing was raised"

    texts = on_ranks(layout, world_size, job)
    assert len(set(texts)) == 1, texts
    assert texts[0].startswith("step 17: the loss is not finite; no weight was changed")
    assert "data rank 1" in texts[0] and "micro-batch 2: loss nan" in texts[0]
    assert "document 1 (rows.jsonl:1)" in texts[0]
    assert texts[0].count("micro-batch") == 1


def test_nothing_to_train_on_is_an_error() -> None:
    def job(model, batches):
        for batch in batches:
            batch.targets_T.fill_(-100)
        with pytest.raises(
            ValueError, match="nothing to train on: .* sum to 0.0 over 4 micro-batches"
        ):
            forward_backward(model, batches, cross_entropy_head)
        return "refused"

    assert on_ranks(Layout(), 2, job) == ["refused"] * 2


def test_bad_micro_batch_lists_are_refused() -> None:
    def job(model, batches):
        with pytest.raises(ValueError, match="at least one micro-batch"):
            forward_only(model, [], log_probs)
        too_long = pack([Document(tokens=[1] * 65, targets=[1] * 65)])
        with pytest.raises(ValueError, match="a document of 65 tokens"):
            forward_only(model, [too_long] * 2, log_probs)
        return "refused"

    assert on_ranks(Layout(pipeline=2, virtual_pipeline=2), 2, job) == ["refused"] * 2


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tp2", "pp2"])
def test_ids_outside_the_vocabulary_are_refused_on_every_rank(layout: Layout) -> None:
    def job(model, batches):
        V = config().vocab_size
        for token, target, says in ((V, 1, f"token {V}"), (-1, 1, "token -1"), (1, V, "target")):
            batch = pack([Document(tokens=[1, token], targets=[1, target])])
            with pytest.raises(
                ValueError, match=f"micro-batch 1: {says} .*outside the model's voc"
            ):
                forward_backward(model, [batches[0], batch], cross_entropy_head)
        return "refused"

    assert on_ranks(layout, 2, job) == ["refused"] * 2


def test_interleaved_stages_take_any_number_of_micro_batches() -> None:
    """Three micro-batches on two interleaved stages need dummies, which do not affect loss and gradients."""

    def job(model, batches):
        outputs = forward_only(model, batches[:3], log_probs)
        result = forward_backward(model, batches[:3], cross_entropy_head)
        gradients = {name: g.clone() for name, g in gradients_to_hf(model)}
        return [o["logp"] for o in outputs], (result.loss, gradients, result.metrics)

    want = reference(config(), GROUPS[:3])
    results = on_ranks(Layout(pipeline=2, virtual_pipeline=2), 2, job)
    check([trained for _, trained in results], want)
    assert [len(logp) for logp in results[0][0]] == [sum(lengths) for lengths in GROUPS[:3]]


def test_gradients_add_up_until_they_are_zeroed() -> None:
    def job(model, batches):
        def first() -> Tensor:
            return next(
                p.main_grad.clone() for n, p in model.named_parameters() if "linear_qkv" in n
            )

        forward_backward(model, batches, cross_entropy_head)
        once = first()
        model.zero_grad()
        zero = first()
        forward_backward(model, batches, cross_entropy_head)
        return once, zero, first()

    ((once, zero, again),) = on_ranks(Layout(), 1, job)
    assert once.abs().max() > 0 and not zero.any() and F.mse_loss(once, again) == 0


def test_a_frozen_reference_stands_beside_the_model_it_judges() -> None:
    def job(model, batches):
        frozen = build_model(config(), model.world, seed=0, trainable=False)
        before = forward_only(frozen, batches, log_probs)
        forward_backward(model, batches, cross_entropy_head)
        # Not bit for bit: DDP lays the weights out anew, and a product rounds by alignment.
        same = all(
            a["logp"].allclose(b["logp"], rtol=1e-5)
            for a, b in zip(before, forward_only(model, batches, log_probs), strict=True)
        )
        return same, any(p.grad is not None for _, p in frozen.named_parameters())

    assert on_ranks(Layout(pipeline=2), 2, job) == [(True, False)] * 2
