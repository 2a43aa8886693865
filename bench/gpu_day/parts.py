"""The parts of the GPU day, in their order: the command of each on a GPU, and its rehearsal at small shapes on a CPU.

In a command {rows} is the file of JSON lines that the part writes while it runs, {folder} a folder of its own, and
{recompute} what lets an FP8 step fit into this GPU.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = {
    "tests/kernels/head/test_head_triton.py::test_on_a_gpu": "tests/kernels/head/test_head_triton.py::test_fp32_equals_fp64[ragged-cross-entropy]",
    "tests/kernels/head/test_head_triton.py::test_bad_target_on_a_gpu_is_named_later": "tests/kernels/head/test_head_triton.py::test_bad_target_is_named_on_the_fused_path",
    "tests/parallel/attention/test_attention.py::test_flash_attention_and_gradients_match_the_formula": "tests/parallel/attention/test_attention.py::test_attention_and_gradients_match_the_formula",
    "tests/parallel/attention/test_attention_blocks.py::test_flash_blocks_match_the_formula_on_a_gpu": "tests/parallel/attention/test_attention_blocks.py::test_the_cpu_s_kernel_is_the_formula",
}  # fmt: skip
"""every test that is marked `gpu`, and its form on a CPU"""
ON_ANY_DEVICE = tuple(
    f"tests/kernels/test_{name}.py" for name in ("rms_norm", "rope", "swiglu", "checksum")
)
"""test files that use the GPU where there is one"""
SHORT_RECIPE = (
    "processes=1", "distill.num_problems=400", "distill.num_prompts=80", "distill.num_heldout=24", "distill.num_validation=24",
    "curate.sft_examples=256", "midtrain.steps=60", "sft.epochs=1", "rollout_dpo.pairs=teacher", "rollout_dpo.epochs=1",
    "rlvr.steps=3", "rlvr.prompts_per_step=8", "rlvr.probe_prompts=16", "rlvr.rebalance=false", "rlvr.max_accuracy=1.0",
    "rlvr.max_new_tokens=48", "evaluate.max_new_tokens=48",
    f"rlvr.reward={Path(__file__).with_name('reward.py')}:even_length",
)  # fmt: skip
"""The recipe `tiny` with few steps. A coin is the reward, because so short a training rarely gives right answers."""
SHORTEST_RECIPE = (
    *SHORT_RECIPE, "distill.num_problems=40", "distill.rollouts_per_problem=2", "distill.num_prompts=24", "curate.sft_examples=16",
    "midtrain.steps=2", "midtrain.rows_per_step=2", "sft.examples_per_step=16", "rollout_dpo.pairs_per_step=8",
    "rlvr.steps=1", "rlvr.prompts_per_step=2", "rlvr.probe_prompts=8", "rlvr.probe_rollouts=4", "rlvr.rollouts_per_prompt=4",
    "rlvr.min_rollouts=2", "rlvr.max_new_tokens=32", "evaluate.max_new_tokens=4", "distill.num_heldout=4", "distill.num_validation=4",
)  # fmt: skip
TESTS = ("-m", "phimini.bench.gpu_day.pytest_rows", "{rows}")
CLI = ("-m", "phimini.stages.cli")
STEP = (*CLI, "bench", "step", "--json", "{rows}")
SMALL_STEP = (*STEP, "--timed", "--model", "tiny", "--lengths", "32", "--rounds", "2")
MEGATRON = ("megatron.core",)
RECIPE_NEEDS = ("tokenizers", "safetensors", "pyarrow", "plotly", *MEGATRON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One check, in a process of its own."""

    name: str
    what: str
    command: tuple[str, ...]
    """words after `python`"""
    rehearsal: tuple[str, ...] | None
    """the same on a CPU; None: other tests cover it there"""
    share: float
    """of the time, relative to the other parts"""
    needs: tuple[str, ...] = ()
    """modules without which it cannot run"""
    rehearsal_needs: tuple[str, ...] = MEGATRON
    gpus: int = 1
    results: tuple[str, ...] = ()
    """JSON files in its folder that become rows at its end"""

    def missing(self, rehearse: bool, gpus: int) -> str | None:
        """Return why the part cannot run here, or None."""
        if rehearse and self.rehearsal is None:
            return "not rehearsed"
        absent = [n for n in (self.rehearsal_needs if rehearse else self.needs) if not _is_installed(n)]  # fmt: skip
        if absent:
            return f"not installed: {', '.join(absent)}"
        if not rehearse and gpus < self.gpus:
            return f"not possible: it needs {self.gpus} GPUs, here {gpus}"
        return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _tests(*names: str) -> tuple[str, ...]:
    return (*TESTS, *(str(ROOT / name) for name in names))


RECIPE_RESULTS = ("run/results.json", "run/*/summary.json")
PARTS = (
    Part(
        name="tests",
        what="every kernel, compiled, and the chip's attention: values, gradients, no host synchronisation",
        command=_tests(*GPU_TESTS, *ON_ANY_DEVICE),
        rehearsal=_tests(*GPU_TESTS.values()),
        share=60,
        needs=("pytest", "hypothesis", *MEGATRON),
        rehearsal_needs=("pytest", "hypothesis", *MEGATRON),
    ),
    Part(
        name="kernels",
        what="speed and memory of the kernels beside eager, torch.compile and Liger, at Phi-4-mini's shapes",
        command=(*CLI, "bench", "kernels", "--quick", "--compile", "--json", "{rows}"),
        rehearsal=(*CLI, "bench", "kernels", "swiglu", "--quick", "--json", "{rows}"),
        share=110,
        rehearsal_needs=(),
    ),
    Part(
        name="step",
        what="a step of every stage, bf16, 16k tokens, the full model: speed, MFU, memory beside the plan's",
        command=(*STEP, "--lengths", "16384"),
        rehearsal=SMALL_STEP,
        share=130,
        needs=MEGATRON,
    ),
    Part(
        name="fp8",
        what="the same step with Transformer Engine's FP8 linears",
        command=(*STEP, "midtrain", "--lengths", "16384", "--fp8", "te", "--recompute", "{recompute}"),
        rehearsal=(*SMALL_STEP, "midtrain", "--fp8", "emulate"),
        share=40,
        needs=("transformer_engine", *MEGATRON),
    ),
    Part(
        name="recipe",
        what="all four stages of the recipe `tiny`, shortened, with the local engine",
        command=(*CLI, "recipe", "tiny", "out={folder}/run", *SHORT_RECIPE),
        rehearsal=(*CLI, "recipe", "tiny", "out={folder}/run", *SHORTEST_RECIPE),
        share=80,
        needs=RECIPE_NEEDS,
        rehearsal_needs=RECIPE_NEEDS,
        results=RECIPE_RESULTS,
    ),
    Part(
        name="vllm-sync",
        what="weight sync into vLLM, by phase",
        command=(*CLI, "bench", "weight-sync", "--quick", "--json", "{rows}"),
        rehearsal=_tests(
            "tests/parallel/weight_sync/test_weight_sync.py::test_every_transport_brings_every_tensor_twice"
        ),
        share=40,
        needs=("vllm", *MEGATRON),
        rehearsal_needs=("pytest", *MEGATRON),
    ),
    Part(
        name="vllm-mismatch",
        what="vLLM beside the trainer: sleep and wake, sync, and the mismatch guard in bf16",
        command=(*CLI, "recipe", "tiny", "out={folder}/run", *SHORT_RECIPE, "rollout.engine=vllm"),
        rehearsal=_tests(
            "tests/stages/rl/test_mismatch.py::test_the_alarm_is_by_precision_and_hears_nan",
            "tests/stages/rl/test_mismatch.py::test_the_doctor_finds_nothing_where_nothing_is",
        ),
        share=60,
        needs=("vllm", *RECIPE_NEEDS),
        rehearsal_needs=("pytest", *MEGATRON),
        results=("run/rlvr/metrics.jsonl", *RECIPE_RESULTS),
    ),
    Part(
        name="ranks",
        what="the ranks of a job: versions, GEMM checksums, all-reduce per group",
        command=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{gpus}", "-m", "phimini.stages.cli", "doctor", "--dist"),
        rehearsal=None,
        share=15,
        needs=MEGATRON,
    ),
    Part(
        name="layouts",
        what="losses and gradients of a layout over NCCL, bf16",
        command=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "phimini.stages.cli", "recipe", "tiny",
                 "out={folder}/run", *SHORT_RECIPE[1:], "tensor_parallel=2", "context_parallel=2", "sequence_parallel=true",
                 "distributed_optimizer=true"),
        rehearsal=None,
        share=40,
        needs=RECIPE_NEEDS,
        gpus=4,
        results=RECIPE_RESULTS,
    ),
)  # fmt: skip
