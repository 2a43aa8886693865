"""Checks for the first GPU, each with its command and its substitute on a CPU"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of a feature that needs a GPU."""

    what: str
    command: str
    without_a_gpu: str
    """how it was checked on a CPU"""
    tests: tuple[str, ...] = ()
    """the tests marked `gpu` that it runs; a test holds that none is missing from the list"""


CHECKS = (
    Check(
        what="every kernel, compiled: right values and gradients, no host synchronisation",
        command="pytest tests/kernels/head/test_head_triton.py -m gpu; "
        "pytest tests/kernels/test_rms_norm.py tests/kernels/test_rope.py tests/kernels/test_swiglu.py tests/kernels/test_checksum.py",
        without_a_gpu="Triton's interpreter with a GPU's rounding, fp32 and bf16; compiled for sm_80, sm_90 and sm_100: "
        "no spills, tensor-core instructions, 128-bit accesses",
        tests=(
            "tests/kernels/head/test_head_triton.py::test_on_a_gpu",
            "tests/kernels/head/test_head_triton.py::test_bad_target_on_a_gpu_is_named_later",
        ),
    ),
    Check(
        what="the chip's attention kernel under packed documents: values and gradients",
        command="pytest tests/parallel/attention/test_attention.py -m gpu",
        without_a_gpu="the calls are bound to recorded signatures and answered by the formula",
        tests=(
            "tests/parallel/attention/test_attention.py::test_flash_attention_and_gradients_match_the_formula",
        ),
    ),
    Check(
        what="the blocks of the context-parallel ring: FlashAttention 2, 3 or 4, given the whole attention's lse",
        command="pytest tests/parallel/attention/test_attention_blocks.py -m gpu",
        without_a_gpu="the calls are bound to signatures recorded from flash-attn-4's and flash_attn_3's sources and answered "
        "by the formula; flash-attn-4's kernels are compiled for sm_90 and sm_100; the ring itself runs over gloo",
        tests=(
            "tests/parallel/attention/test_attention_blocks.py::test_flash_blocks_match_the_formula_on_a_gpu",
        ),
    ),
    Check(
        what="speed and memory of the kernels against their targets",
        command="phimini bench kernels --json kernels.json",
        without_a_gpu="nothing: bytes are counted (`--traffic`) and registers read (`--static`), no time is claimed",
    ),
    Check(
        what="the ranks of a job: versions, GEMM checksums, all-reduce per group",
        command="torchrun --nproc-per-node 8 -m phimini.stages.cli doctor --dist tensor=2 context=2",
        without_a_gpu="the same checks on gloo ranks of a CPU, sick and silent ones among them",
    ),
    Check(
        what="every layout's losses and gradients over NCCL, bf16",
        command="torchrun --nproc-per-node 8 -m phimini.stages.cli recipe tiny out=runs/gpu tensor_parallel=2 "
        "context_parallel=2 sequence_parallel=true distributed_optimizer=true",
        without_a_gpu="gloo, fp32, up to 8 ranks: equal to the reference model; the full-size model on 64 and 1,024 "
        "fake ranks: shapes only",
    ),
    Check(
        what="memory of the full-size model against the plan",
        command="phimini recipe phi4_mini_reasoning --dry-run, then midtrain for a few steps",
        without_a_gpu="the plan's arithmetic equals published figures, and bytes counted on a CPU at small sizes",
    ),
    Check(
        what="vLLM on GPUs beside the trainer: weight sync by CUDA IPC and NCCL, sleep and wake, the mismatch guard in bf16",
        command="torchrun --nproc-per-node 2 -m phimini.stages.cli recipe tiny out=runs/vllm rollout.engine=vllm",
        without_a_gpu="the real vLLM engine on a CPU, fp32: in-process, shared memory and gloo; ipc and nccl by signature",
    ),
)


def checklist() -> str:
    """Return the text of all checks for a person, in the order to run them."""
    lines = ["Nothing below has run on a GPU yet. In this order:"]
    for number, check in enumerate(CHECKS, start=1):
        lines += [
            f"{number}. {check.what}",
            f"   run:           {check.command}",
            f"   without a GPU: {check.without_a_gpu}",
        ]
    return "\n".join(lines)
