"""Stage 3, Rollout DPO: preference of a verified-correct over an incorrect rollout of the same question.

    loss = -log sigmoid(beta * ((log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))))

(DPO, arXiv 2305.18290), log-probs summed per answer in fp32, the reference frozen at stage 2's end.
The pairs come from rollouts of the stage-2 model, or from the teacher's rollouts that stages 1 and 2
rejected (as in the paper), at most `pairs_per_prompt` of a question. An optional
likelihood term keeps the chosen answers likely.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from phimini.kernels import linear_dpo, linear_logprob
from phimini.model.io.json_files import atomic_file, read_rows, write_rows
from phimini.model.io.tokenizer import Tokenizer
from phimini.parallel.megatron.builder import Model
from phimini.parallel.megatron.layers import main_grad_of
from phimini.parallel.ranks.timing import phase
from phimini.parallel.ranks.world import World, on_main
from phimini.parallel.training.batch import Document, PackedBatch, check_same_data, pack
from phimini.parallel.training.step import StepMetrics, forward_only, start_step
from phimini.stages.config.schema import RolloutDpoConfig, RunConfig
from phimini.stages.data.packing import (
    EpochSampler,
    best_fit,
    check_lengths,
    chunks,
    derive,
    flops_of,
    micro_batches,
)
from phimini.stages.rl.answers import sample_answers
from phimini.stages.rl.pairs import LOGPS, Pair, read_pairs
from phimini.stages.run.audits import Audited, write_audit
from phimini.stages.run.guards import check_trained_shares
from phimini.stages.run.progress import work
from phimini.stages.run.stage_folder import Stage
from phimini.stages.run.training import (
    Ahead,
    fp8_of,
    load_model,
    means,
    start_optimizer,
    sum_over_data,
    training_steps,
)

SHOWN = 256
"""pairs, the first ones, whose log-probs are written for the viewer"""
CHUNK = 16
"""micro-batches, per pipeline stage, between two reports of progress"""
LN2_TOLERANCE, LN2_TOLERANCE_ROUNDED = 1e-3, 5e-2


def rollout_dpo(run: RunConfig, world: World, *, redo: bool = False) -> None:
    """Train stage 2's model on pairs of answers, into the folder rollout_dpo/. Collective.

    redo: begin again even if the stage is complete. Raises ValueError for bad rows, too few pairs or bad settings,
    RuntimeError if policy and reference differ before the first update, Stopped if interrupted.
    """
    config = run.rollout_dpo
    stage = Stage.begin(run, "rollout_dpo", world, redo=redo)
    if stage.complete:
        return
    model, tokenizer = load_model(run, world, "sft")
    path = Path(run.out) / "curate" / "pairs.jsonl"
    if config.pairs == "policy":
        path = stage.path / "pairs.jsonl"
        sample_pairs(run, world, stage, model, tokenizer)
    pairs = read_pairs(path, tokenizer, tokenizer.chat_template, config.pairs_per_prompt)
    sides = [example for pair in pairs for example in (pair.chosen, pair.rejected)]
    limit, field = config.sequence_length, "rollout_dpo.sequence_length"
    check_lengths([len(side) for side in sides], limit, field, lambda i: sides[i].id)
    check_same_data(world, "rollout_dpo, before step 1", [pair.digest() for pair in pairs])
    shares = np.array([side.num_targets / len(side) for side in sides])
    check_trained_shares(run.guards, world, stage.name, shares, lambda i: sides[i].id)
    reference = reference_logps(model, pairs, config, world, run.out)
    steps = max(1, math.floor(config.epochs * len(pairs) / config.pairs_per_step))
    optimizer = start_optimizer(run, model, config.optimizer, steps)
    sampler = EpochSampler(len(pairs), config.pairs_per_step, derive(run.seed, "rollout_dpo"))
    head = dpo_head(config)

    def batches(indices: list[int]) -> list[PackedBatch]:
        """Return this rank's micro-batches of whole pairs."""
        costs = [flops_of(pairs[i].lengths, model.config) for i in indices]
        answer_tokens = sum(pairs[i].chosen.num_targets for i in indices)
        nll_scale = len(indices) / answer_tokens if config.nll_mean == "tokens" else None
        make = lambda part: pair_batch([pairs[i] for i in part], reference[part], world, nll_scale)
        lengths = [sum(pairs[i].lengths) for i in indices]
        return micro_batches(indices, lengths, costs, config.micro_tokens, world, make)

    def of_step(index: int) -> tuple[list[int], list[PackedBatch]]:
        """Return the step's pairs, and this rank's micro-batches of them."""
        indices = sampler.batch(index)
        return indices, batches(indices)

    ahead = Ahead(of_step, steps)
    summary = lambda _: {"pairs": len(pairs), "pairs_from": config.pairs}
    with training_steps(stage, model, optimizer, tokenizer, steps, config.checkpoint_every, {}, summary) as remaining:  # fmt: skip
        for step in remaining:
            optimizer.zero_grad()
            indices, microbatches = ahead.take(step.index)
            check_same_data(world, step.name, [pairs[i].digest() for i in indices], microbatches)
            running = start_step(model, microbatches, head)
            ahead.prepare(step.index + 1)
            metrics = running.metrics()
            if step.index == 0:
                check_first_step(metrics, config, exact=logps_are_exact(run, model))
            num_tokens = sum(sum(pairs[i].lengths) for i in indices)
            step.update(optimizer, metrics, num_tokens)
        trained = reference_logps(model, pairs[:SHOWN], config, world)
        on_main(world, lambda: write_logps(stage, torch.stack([reference[:SHOWN], trained], 1)))


def write_logps(stage: Stage, logps_P22: Tensor) -> None:
    """Write log-probs of pairs for the viewer: (P, before and after the stage, chosen and rejected answer)."""
    with atomic_file(stage.path / LOGPS) as file:
        np.save(file, logps_P22.numpy())


def sample_pairs(
    run: RunConfig, world: World, stage: Stage, model: Model, tokenizer: Tokenizer
) -> None:
    """Sample answers of stage 2's model, and write `rollouts/` and `pairs.jsonl` into the stage. Collective.

    Raises ValueError as `sample_answers`, and if the pairs are fewer than one step's.
    """
    # An interrupted run resumes with its pairs.
    if not on_main(world, lambda: "pairs.jsonl" in stage.made):
        files = sample_answers(run, world, stage, model, tokenizer)
        on_main(world, lambda: write_pairs(run, stage, files))


def write_pairs(run: RunConfig, stage: Stage, files: list[Path]) -> None:
    """Write the pairs of the rollouts in `files`, and the audit of their verdicts. Not collective.

    Raises ValueError if the pairs are fewer than one step's.
    """
    config = run.rollout_dpo
    rollouts = [row for file in files for row in read_rows(file, {"correct": bool}, ())]
    pairs = pair_up(rollouts, config.pairs_per_prompt, derive(run.seed, "rollout_dpo", "pairs"))
    if len(pairs) < config.pairs_per_step:
        raise ValueError(
            f"rollout_dpo: {len(rollouts)} rollouts gave {len(pairs)} pairs, fewer than one step's "
            f"{config.pairs_per_step}; raise rollout_dpo.num_prompts or rollouts_per_prompt"
        )
    write_rows(stage.path / "pairs.jsonl", pairs)
    stage.record("pairs.jsonl")
    is_verdict = run.rlvr.reward is None
    audited = [
        (row, Audited(row["correct"] if is_verdict else None, row["second"]))
        for row in rollouts
        if row.get("second")
    ]
    write_audit(stage, "pairs", audited)


def pair_up(rollouts: list[dict], pairs_per_prompt: int, seed: int) -> list[dict]:
    """Return rows of random pairs, up to `pairs_per_prompt` per question; no text is used twice."""
    rng = random.Random(seed)
    questions: dict[str, tuple[list[dict], list[dict]]] = {}
    texts: dict[tuple[str, str], dict] = {}
    for row in rollouts:
        texts.setdefault((row["problem_id"], row["response"]), row)
    for row in texts.values():
        questions.setdefault(row["problem_id"], ([], []))[not row["correct"]].append(row)
    pairs = []
    for correct, incorrect in questions.values():
        rng.shuffle(correct)
        rng.shuffle(incorrect)
        for chosen, rejected in list(zip(correct, incorrect, strict=False))[:pairs_per_prompt]:
            pairs.append(
                {
                    "id": f"{chosen['id']}|{rejected['id']}",
                    "problem_id": chosen["problem_id"],
                    "question": chosen["question"],
                    "answer": chosen["answer"],
                    "chosen": chosen["response"],
                    "rejected": rejected["response"],
                    "chosen_tokens": chosen["response_tokens"],
                    "rejected_tokens": rejected["response_tokens"],
                    "source": "policy",
                }
            )
    return pairs


@phase("data")
def pair_batch(
    pairs: Sequence[Pair], reference_P2: Tensor, world: World, nll_scale: float | None = None
) -> PackedBatch:
    """Return a micro-batch of the documents chosen, rejected, chosen, rejected, ...

    reference_P2: log-probs of each pair's answers. The field `sequence` is the document index of each position.
    nll_scale: factor of the chosen answers' summed negative log-likelihood; None for 1 / each one's tokens.
    """
    of_documents = {"weight": 1.0} | ({} if nll_scale is None else {"nll_scale": nll_scale})
    pieces = [
        Document(
            tokens=example.inputs,
            targets=example.targets,
            token_fields={"sequence": np.full(len(example), 2 * p + side)},
            document_fields={"reference_logp": float(reference_P2[p, side])} | of_documents,
        )
        for p, pair in enumerate(pairs)
        for side, example in enumerate((pair.chosen, pair.rejected))
    ]
    return pack(pieces, multiple_of=world.token_multiple)


def sequences_of(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sequence of each position (T,), reference log-prob of each sequence (2P,), weight of each pair (P,)).

    The padding document is left out. The weight is 1, and 0 in a micro-batch that only keeps this rank in step.
    """
    reference_N, weight_N = (batch.document_fields[name] for name in ("reference_logp", "weight"))
    end = len(reference_N) // 2 * 2
    return batch.fields["sequence"], reference_N[:end], weight_N[:end:2]


def rows_of_sequences(batch: PackedBatch, number: int) -> tuple[list[int], list[int]]:
    """Return the positions of each of `number` sequences on this rank, and the most on any context rank, for the host.

    The padding document's positions have the field 0: they count for sequence 0.
    """
    own, most = batch.document_rows
    own, most = ([n[0] + sum(n[number:]), *n[1:number]] for n in (own, most))
    return own, most


def reference_logps(
    model: Model, pairs: list[Pair], config: RolloutDpoConfig, world: World, out: str | None = None
) -> Tensor:
    """Return (P, 2) fp32: summed log-probs of each pair's chosen and rejected answer under `model`. Collective.

    Before the first update the model is the reference, stage 2's. Each data rank computes its share. out: the run's
    folder, for its progress.
    """

    def summed(hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group) -> Tensor:
        logp_M = linear_logprob(hidden_MD, weight_VD, batch.targets_T, group=group).logp_M
        sequence_T, reference_S, _ = sequences_of(batch)
        return torch.zeros_like(reference_S).index_add_(0, sequence_T, logp_M)

    logps = torch.zeros(len(pairs), 2)
    mine = list(range(world.data_rank, len(pairs), world.data_size))
    rows = best_fit([sum(pairs[i].lengths) for i in mine], config.micro_tokens)
    parts = [[mine[i] for i in row] for row in rows]
    batches = [
        pair_batch([pairs[i] for i in part], torch.zeros(len(part), 2), world) for part in parts
    ]
    # Data ranks do not communicate here, so a rank without pairs can skip the forward pass.
    together = chunks(list(zip(parts, batches, strict=True)), CHUNK * world.layout.pipeline)
    with work("rollout_dpo reference log-probs", len(batches), out, world.is_main) as progress:
        for some in together:
            results = forward_only(model, [batch for _, batch in some], summed, summed=True)
            for (part, _), result in zip(some, results, strict=True):
                logps[part] = result.view(-1, 2).cpu()
                progress.advance()
    return sum_over_data(logps, world).cpu()


def dpo_head(config: RolloutDpoConfig):
    """Return the head of the DPO loss, summed over pairs and counted in pairs; see `step.Head`."""

    def head(
        hidden_MD: Tensor, weight_VD: Tensor, batch: PackedBatch, *, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sequence_T, reference_S, weight_P = sequences_of(batch)
        nll_scale_N = batch.document_fields.get("nll_scale")
        loss, metrics = linear_dpo(
            hidden_MD,
            weight_VD,
            batch.targets_T,
            sequence_T,
            reference_S,
            beta=config.beta,
            nll_weight=config.nll_weight,
            loss=config.loss,
            length_normalized=config.length_normalized,
            pair_weight_P=weight_P,
            nll_scale_P=None if nll_scale_N is None else nll_scale_N[: len(reference_S) : 2],
            group=group,
            sequence_group=batch.context_group,
            sequence_rows=rows_of_sequences(batch, len(reference_S)),
            main_grad=main_grad_of(weight_VD),
        )
        sums = {
            "preference_loss": metrics.preference_loss_sum,
            "preference_accuracy": metrics.accuracy_sum,
            "margin": metrics.margin_sum,
            "chosen_reward": metrics.chosen_reward_sum,
            "rejected_reward": metrics.rejected_reward_sum,
            "chosen_nll": metrics.nll_sum,
        }
        # Pairs are whole on each context rank, which holds some of their tokens.
        whole = {name: batch.share_of_rank(total) for name, total in sums.items()}
        return batch.share_of_rank(loss), batch.share_of_rank(metrics.num_pairs), whole

    return head


def logps_are_exact(run: RunConfig, model: Model) -> bool:
    """Return True if log-probs are the same, up to fp32 rounding, whatever else is in the micro-batch.

    False where a micro-batch has one FP8 scale, and in bf16: for another number of rows cuBLAS may choose another
    kernel, which rounds its sums to bf16 differently, layer by layer, at each of thousands of tokens.
    """
    fp8 = fp8_of(run, model.world.device)
    in_fp32 = next(model.chunks[0].parameters()).dtype == torch.float32
    return in_fp32 and (fp8 is None or fp8.recipe != "tensorwise")


def check_first_step(metrics: StepMetrics, config: RolloutDpoConfig, *, exact: bool) -> None:
    """Raise RuntimeError unless the preference loss before the first update is that of margin 0: one model on both sides.

    That is ln 2 for DPO and 1 / (2 beta)^2 for IPO. exact: see `logps_are_exact`. If False the tolerance is wider: the
    reference's log-probs are from other micro-batches.
    """
    loss = means(metrics)["preference_loss"]
    expected, text, steepness = math.log(2), "ln 2", 1.0
    if config.loss == "ipo":  # its slope at margin 0 is so much that of DPO
        expected, text, steepness = 0.25 / config.beta**2, "1 / (2 beta)^2", 2 / config.beta**2
    tolerance = steepness * (LN2_TOLERANCE if exact else LN2_TOLERANCE_ROUNDED)
    if not abs(loss - expected) <= tolerance:
        raise RuntimeError(
            f"rollout_dpo: the preference loss before the first update is {loss:.6f}, expected {text} = "
            f"{expected:.6f}: policy and reference differ (other weights, rope table, or tokens)"
        )
