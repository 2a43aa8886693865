"""Mistakes planted in the kernels, one at a time, each of which a test must catch.

    python tests/support/kernels/mutations.py [word ...]          all mutations, or those whose name has one of the words

Each mutation changes one piece of source in a copy of `kernels/`, and runs the few tests that ought to notice, in a
process forked from this one (torch and triton are imported once). The same tests pass on the unchanged copy first.
A mutation counts as caught when a test fails by what it compares or by what the interpreter reports, not because
the changed source cannot run. Exit status 1 where a mutation survives.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton  # noqa: F401

ROOT = Path(__file__).parents[3]
# What a failing comparison, a refusal that did not come, or the interpreter's reports look like.
CAUGHT_BY = (
    "AssertionError", "assert ", "Failed: DID NOT RAISE", "OutOfBoundsError", "RaceError",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutation:
    name: str
    file: str
    """in kernels/"""
    old: str
    """text that occurs exactly once in the file"""
    new: str
    tests: str
    """test files and -k expression: "file.py file.py -k words" """


FWD_FP32 = "test_head_triton.py -k 'fp32_equals_fp64 and ragged'"
BF16 = "test_head_triton.py -k 'bf16_keeps'"
SPLITS = "test_head_triton.py -k 'splits_the_vocabulary'"
TILES = "test_head_triton.py -k 'many_tiles'"
PAIRS = "test_head_triton.py -k 'pairs_longer'"
CE = "test_linear_cross_entropy.py -k definition"
LOGPROB = "test_linear_logprob.py -k definition"
DPO = "test_linear_dpo.py -k definition"
POLICY = "test_linear_policy_loss.py -k definition"
EDGES = "test_head_triton.py -k edges"
OFFSETS = "test_row_offsets.py -k 64_bit"
RAW = "test_linear_logprob.py -k 'raw_target and torch'"
CLAMP = "test_linear_policy_loss.py -k clamp"
RANKS = "test_head_parallel.py -k 'one_rank and 2'"

MUTATIONS = [
    # --- head: triton kernels
    Mutation(
        "no mask of the classes beyond V", "head/triton_kernels.py",
        "    z = tl.where((cols < V)[None, :], z, MASKED)\n", "", FWD_FP32,
    ),
    Mutation(
        "forward-only: no mask at the end of a split", "head/triton_kernels.py",
        "z = tl.where((cols < last)[None, :], z * scale[:, None], MASKED)",
        "z = z * scale[:, None]", SPLITS,
    ),
    Mutation(
        "pointer path: the width is not masked", "head/triton_kernels.py",
        "x + rows[:, None] * D + depth[None, :], mask=inside[None, :], other=0.0",
        "x + rows[:, None] * D + depth[None, :]", BF16,
    ),
    Mutation(
        "pointer path: W's stride is V", "head/triton_kernels.py",
        "w + cols[None, :] * D + depth[:, None]", "w + cols[None, :] * V + depth[:, None]", BF16,
    ),
    Mutation(
        "the last slice of the width is skipped", "head/triton_kernels.py",
        "        for k in range(0, D, BLOCK_K):\n            z = tl.dot(x.load",
        "        for k in range(0, D - BLOCK_K, BLOCK_K):\n            z = tl.dot(x.load", FWD_FP32,
    ),
    Mutation(
        "logits accumulated in fp16", "head/triton_kernels.py",
        "            z = tl.dot(x.load([row, k]), w.load([col, k]).T, z, input_precision=PRECISION)",
        "            z = tl.dot(x.load([row, k]), w.load([col, k]).T, z, input_precision=PRECISION)"
        ".to(tl.float16).to(tl.float32)", FWD_FP32,
    ),
    Mutation(
        "forward-only: the sum is not rescaled", "head/triton_kernels.py",
        "total = total * tl.exp2((m - new_m) * LOG2E)\n", "total = total * 1.0\n", TILES,
    ),
    Mutation(
        "exp2 without log2 e", "head/triton_kernels.py",
        "        p = tl.exp2(below * LOG2E)\n        if PERSISTENT", "        p = tl.exp2(below)\n        if PERSISTENT", FWD_FP32,
    ),
    Mutation(
        "entropy: the maximum's move is forgotten", "head/triton_kernels.py",
        "weighted = (weighted + shift * total) * decay + tl.sum(p * below, axis=1)",
        "weighted = weighted * decay + tl.sum(p * below, axis=1)", TILES,
    ),
    Mutation(
        "merge: the last block of tiles is skipped", "head/triton_kernels.py",
        "for first in range(0, S, BLOCK_S):", "for first in range(0, S - 1, BLOCK_S):",
        TILES,
    ),
    Mutation(
        "merge: entropy parts are not shifted", "head/triton_kernels.py",
        "(part_weighted + part_shift * part_total) * part_decay", "part_weighted * part_decay", FWD_FP32,
    ),
    Mutation(
        "gradient: the target's column is not set", "head/triton_kernels.py",
        "            dz = tl.where(cols[None, :] == targets[:, None], at_target[:, None], dz)\n", "", FWD_FP32,
    ),
    Mutation(
        "gradient: the tile's maximum is a tile behind", "head/triton_kernels.py",
        "            tile_max_ptr += stride_s\n", "            tile_max_ptr += stride_s * i\n", FWD_FP32,
    ),
    Mutation(
        "gradient: rows beyond M are written", "head/triton_kernels.py",
        "inside = in_rows[:, None] & (cols < last_col)[None, :]",
        "inside = (in_rows | True)[:, None] & (cols < last_col)[None, :]", FWD_FP32,
    ),
    Mutation(
        "gradient: entropy's sign", "head/triton_kernels.py",
        "dz = p * (softmax[:, None] - entropy[:, None] * above)",
        "dz = p * (softmax[:, None] + entropy[:, None] * above)", FWD_FP32,
    ),
    Mutation(
        "gradient: rows that do not count keep their logits", "head/triton_kernels.py",
        "e = tl.load(at, mask=inside & counts[:, None], other=0.0).to(tl.float32)",
        "e = tl.load(at, mask=inside, other=0.0).to(tl.float32)", "test_head_triton.py -k 'equals_fp64 or counts'",
    ),
    Mutation(
        "forward-only: two splits write a target at their edge", "head/triton_kernels.py",
        "is_here = (targets >= first) & (targets < last)", "is_here = (targets >= first) & (targets <= last)", EDGES,
    ),
    Mutation(
        "forward-only: no split writes its first target", "head/triton_kernels.py",
        "is_here = (targets >= first) & (targets < last)", "is_here = (targets > first) & (targets < last)", EDGES,
    ),
    Mutation(
        "forward-only: a tile takes the next one's first target", "head/triton_kernels.py",
        "        is_here = (targets >= col) & (targets < col + BLOCK_N)\n        if",
        "        is_here = (targets > col) & (targets <= col + BLOCK_N)\n        if", EDGES,
    ),
    Mutation(
        "logits: two tiles write a target at their edge", "head/triton_kernels.py",
        "(targets < col + BLOCK_N) & (targets < V)", "(targets <= col + BLOCK_N) & (targets < V)", EDGES,
    ),
    Mutation(
        "logits: the right half of a tile of E is stored over the left", "head/triton_kernels.py",
        "e.store([row, col + BLOCK_N // 2], right)", "e.store([row, col], right)", FWD_FP32,
    ),
    Mutation(
        "logits: a persistent program skips its later tiles", "head/triton_kernels.py",
        "num_tiles, tl.num_programs(0)\n", "num_tiles, num_tiles\n", FWD_FP32,
    ),
    Mutation(
        "logits: a persistent program counts row blocks that hold no row", "head/triton_kernels.py",
        "num_row_blocks = tl.cdiv(tl.minimum(tl.load(num_rows_ptr), M), BLOCK_M)\n",
        "num_row_blocks = tl.cdiv(tl.load(num_rows_ptr), BLOCK_M) + 1\n", FWD_FP32,
    ),
    Mutation(
        "logits: row offsets in 32 bits", "head/triton_kernels.py",
        "at = e + rows[:, None].to(tl.int64) * stride_e_m", "at = e + rows[:, None] * stride_e_m", OFFSETS,
    ),
    Mutation(
        "gradient: row offsets in 32 bits", "head/triton_kernels.py",
        "at = e_ptr + rows[:, None].to(tl.int64) * stride_e_m", "at = e_ptr + rows[:, None] * stride_e_m", OFFSETS,
    ),
    Mutation(
        "logits: offsets of a tile's statistics in 32 bits", "head/triton_kernels.py",
        "    out = tile.to(tl.int64) * stride_s + rows", "    out = tile * stride_s + rows", OFFSETS,
    ),
    Mutation(
        "swiglu: row offsets in 32 bits", "swiglu.py",
        "    row = tl.program_id(0).to(tl.int64)\n    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)\n"
        "    inside = cols < F\n    gate_ptr = gate_up_ptr + row * stride_gate_up_m + cols\n"
        "    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)\n"
        "    up = tl.load(gate_ptr + F, mask=inside, other=0.0).to(tl.float32)\n    tl.store(y_ptr",
        "    row = tl.program_id(0)\n    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)\n"
        "    inside = cols < F\n    gate_ptr = gate_up_ptr + row * stride_gate_up_m + cols\n"
        "    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)\n"
        "    up = tl.load(gate_ptr + F, mask=inside, other=0.0).to(tl.float32)\n    tl.store(y_ptr", OFFSETS,
    ),
    # --- head: around the kernels
    Mutation(
        "temperature in the forward only (triton)", "head/triton_backend.py",
        "softmax_M, at_target_M = softmax_M * inverse_M, at_target_M * inverse_M", "pass", FWD_FP32,
    ),
    Mutation(
        "temperature in the forward only (torch)", "head/torch_backend.py",
        "else scale_M * self.inverse_temperature_M[rows]", "else scale_M", CE,
    ),
    Mutation(
        "dW takes unscaled rows", "head/torch_backend.py",
        "add_outer(self.dw_VD, dz_MV, x_MD * scale_M[:, None])", "add_outer(self.dw_VD, dz_MV, x_MD)", CE,
    ),
    Mutation(
        "dW is overwritten, not added to", "head/torch_backend.py",
        "add_outer(self.dw_VD, dz_MV", "add_outer(self.dw_VD.zero_(), dz_MV", CE,
    ),
    Mutation(
        "the last block of dW's rows is skipped (oneDNN)", "backend/cpu_gemm.py",
        "range(0, total_NK.shape[0], block)", "range(0, total_NK.shape[0] - block, block)",
        "test_linear_cross_entropy.py -k several_blocks",
    ),
    Mutation(
        "filled up with something else than zeros (oneDNN)", "backend/cpu_gemm.py",
        "(0, 0, 0, -M % quantum)", "(0, 0, 0, -M % quantum), value=1.0", "test_linear.py",
    ),
    Mutation(
        "the gradient of a weight takes its rows in another order (oneDNN)", "linear.py",
        "outer(dy_MN, x_MK)", "outer(dy_MN, x_MK.flip(0))", "test_linear.py",
    ),
    Mutation(
        "the last chunk is skipped", "head/rows.py",
        "range(0, num_rows, max(1, rows))", "range(0, num_rows - rows + 1, max(1, rows))", CE,
    ),
    Mutation(
        "results are not put back in their places", "head/rows.py",
        "return out.index_copy_(0, self.kept_M, value_M)",
        "return out.index_copy_(0, torch.arange(len(value_M)), value_M)", LOGPROB,
    ),
    Mutation(
        "logits without their maximum taken off", "head/torch_backend.py",
        "            z -= torch.amax(z, 1, keepdim=True, out=max_M1[block])",
        "            max_M1[block] = 0", "test_linear_cross_entropy.py -k extreme",
    ),
    Mutation(
        "entropy's gradient misses the shift", "head/chunked.py",
        "shift_M = -self.mean_shift_M", "shift_M = 0 * self.mean_shift_M", LOGPROB,
    ),
    Mutation(
        "ranks: sums are added without rescaling", "head/chunked.py",
        "(factor_RM * sum_RM).sum(0)", "sum_RM.sum(0)", RANKS,
    ),
    Mutation(
        "ranks: dX is not summed", "head/chunked.py",
        "            dist.all_reduce(self.dx_MD, group=self.group)\n", "            pass\n", RANKS,
    ),
    Mutation(
        "ranks: targets are taken for this rank's", "head/chunked.py",
        "rows.targets_M - V * group.rank()", "rows.targets_M", RANKS,
    ),
    Mutation(
        "accuracy: a class nearly as good counts as the best", "head/chunked.py",
        "is_top_M=target_M >= 0,", "is_top_M=target_M >= -1e-6,", "test_linear_cross_entropy.py -k accuracy",
    ),
    Mutation(
        "accuracy: an equal class is taken for a better one", "head/chunked.py",
        "is_top_M=target_M >= 0,", "is_top_M=target_M > 0,", "test_linear_cross_entropy.py -k accuracy",
    ),
    Mutation(
        "a raw target logit has no gradient", "head/torch_backend.py",
        "scale_M = torch.where(scale_M.abs() < least_M, least_M, scale_M)", "pass", RAW,
    ),
    Mutation(
        "the least scale underflows with small rows", "head/torch_backend.py",
        "least_M = target_M.abs() * torch.finfo(target_M.dtype).eps ** 2", "least_M = target_M.abs() * 1e-35", RAW,
    ),
    # --- losses
    Mutation(
        "label smoothing leaves the target's gradient alone", "linear_cross_entropy.py",
        "(smoothing - 1) * w_M, smoothing * w_M, -smoothing * w_M",
        "-w_M, smoothing * w_M, -smoothing * w_M", CE,
    ),
    Mutation(
        "z-loss: its gradient lacks the 2", "linear_cross_entropy.py",
        "dz_M = 2 * z_loss * w_M * lse_M", "dz_M = z_loss * w_M * lse_M", CE,
    ),
    Mutation(
        "DPO: chosen and rejected swapped", "linear_dpo.py",
        "torch.stack([chosen_P, rejected_P], 1)).flatten()", "torch.stack([rejected_P, chosen_P], 1)).flatten()", DPO,
    ),
    Mutation(
        "DPO: beta once instead of twice", "linear_dpo.py",
        "            dh_P = beta * (\n", "            dh_P = 1.0 * (\n", DPO,
    ),
    Mutation(
        "DPO: a long pair's rejected half keeps its sign", "linear_dpo.py",
        "signs = (1.0, -1.0) if is_antisymmetric else (1.0, 1.0)", "signs = (1.0, 1.0)", PAIRS,
    ),
    Mutation(
        "DPO: a long pair of mean log-probs has one scratch", "linear_dpo.py",
        "not self.nll_weight and not self.options.length_normalized", "not self.nll_weight", DPO,
    ),
    Mutation(
        "DPO: the rejected mean has the chosen answer's length", "linear_dpo.py",
        "rejected_P / length_S[1::2]", "rejected_P / length_S[::2]", DPO,
    ),
    Mutation(
        "DPO: IPO's derivative lacks its factor 2", "linear_dpo.py",
        "dh_P = 2 * (margin_P - 0.5) / beta", "dh_P = (margin_P - 0.5) / beta", DPO,
    ),
    Mutation(
        "DPO: a long pair is cut in the wrong place", "head/pairs.py",
        "chosen_rows = lengths[2 * first]", "chosen_rows = lengths[2 * first + 1]", DPO,
    ),
    Mutation(
        "policy: the clip is symmetric", "linear_policy_loss.py",
        "bounded_M = ratio_M.clamp(1 - options.clip_low, 1 + options.clip_high)\n    if",
        "bounded_M = ratio_M.clamp(1 - options.clip_low, 1 + options.clip_low)\n    if", POLICY,
    ),
    Mutation(
        "policy: a clipped row still has a gradient", "linear_policy_loss.py",
        "-unclipped_M * inside_M * (1 - is_limited_M), is_limited_M", "-unclipped_M * inside_M, is_limited_M", POLICY,
    ),
    Mutation(
        "policy: the dual clip holds for good answers too", "linear_policy_loss.py",
        ".where(advantage_M < 0, -math.inf)", ".where(advantage_M < math.inf, -math.inf)", POLICY,
    ),
    Mutation(
        "policy: CISPO's factor is not limited", "linear_policy_loss.py",
        "dlogp_M = -bounded_M * advantage_M", "dlogp_M = -ratio_M * advantage_M", POLICY,
    ),
    Mutation(
        "policy: GSPO's ratio is the token's", "linear_policy_loss.py",
        "difference_M = inputs.sequence_log_ratio_M.to(stats.logp_M.dtype)", "pass", POLICY,
    ),
    Mutation(
        "policy: the importance weight is not in the gradient", "linear_policy_loss.py",
        "            dlogp_M * inputs.importance_weight_M,\n", "            dlogp_M,\n", POLICY,
    ),
    Mutation(
        "policy: k3's derivative has the other sign", "linear_policy_loss.py",
        'return d_M if kl == "k2" else -torch.expm1(-d_M)', 'return d_M if kl == "k2" else torch.expm1(-d_M)', POLICY,
    ),
    Mutation(
        "policy: a ratio beyond the clamp has a gradient", "linear_policy_loss.py",
        "-unclipped_M * inside_M * (1 - is_limited_M), is_limited_M", "-unclipped_M * (1 - is_limited_M), is_limited_M", CLAMP,
    ),
    Mutation(
        "policy: a KL beyond the clamp has a gradient", "linear_policy_loss.py",
        "options.kl_coef * dkl_M * inside_M", "options.kl_coef * dkl_M", CLAMP,
    ),
    Mutation(
        "policy: the clamp is at 19", "linear_policy_loss.py",
        "clamped_M = d_M.clamp(-MAX_EXPONENT, MAX_EXPONENT)", "clamped_M = d_M.clamp(-19, 19)", CLAMP,
    ),
    # --- the other ops
    Mutation(
        "rms norm: the weight's gradient sums half the programs", "rms_norm.py",
        "dw_partial_PD.sum(0)", "dw_partial_PD[::2].sum(0)", "test_rms_norm.py -k 'test_rms_norm and triton'",
    ),
    Mutation(
        "rms norm: the mean is over the padded block", "rms_norm.py",
        "tl.sum(x * x, axis=1, keep_dims=True) / D + eps", "tl.sum(x * x, axis=1, keep_dims=True) / BLOCK_D + eps",
        "test_rms_norm.py -k 'test_rms_norm and triton and float32'",
    ),
    Mutation(
        "rms norm: no mask within a row", "rms_norm.py",
        "x = tl.load(x_ptr + rows * stride_x_m + cols, mask=inside, other=0.0)",
        "x = tl.load(x_ptr + rows * stride_x_m + cols, mask=rows < M, other=0.0)",
        "test_rms_norm.py -k 'test_rms_norm and triton and float32'",
    ),
    Mutation(
        "rope: the backward turns forward", "rope.py", "s = -s if JOIN else s", "s = s",
        "test_rope.py -k 'test_rope and triton and float32'",
    ),
    Mutation(
        "rope: v is rotated", "rope.py",
        "BLOCK_REST, False, JOIN)", "BLOCK_REST, True, JOIN)",
        "test_rope.py -k 'test_rope and triton and float32'",
    ),
    Mutation(
        "linear: main_grad is overwritten", "backend/cpu_gemm.py",
        "        add_outer(total_NK, a_NM.t().to(total_NK.dtype), b_MK.to(total_NK.dtype))",
        "        total_NK.zero_()\n        add_outer(total_NK, a_NM.t().to(total_NK.dtype), b_MK.to(total_NK.dtype))",
        "test_linear.py -k main_grad",
    ),
    Mutation(
        "swiglu: silu's derivative without the gate", "swiglu.py",
        "dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))", "dy * up * sigmoid",
        "test_swiglu.py -k 'test_swiglu and triton and float32'",
    ),
    Mutation(
        "swiglu: gate and value swapped", "swiglu.py",
        "tl.store(y_ptr + row * F + cols, gate * tl.sigmoid(gate) * up, mask=inside)",
        "tl.store(y_ptr + row * F + cols, up * tl.sigmoid(up) * gate, mask=inside)",
        "test_swiglu.py -k 'test_swiglu and triton and float32'",
    ),
    Mutation(
        "checksum: the last column is not summed", "checksum.py",
        "        last_column += last\n", "",
        "test_checksum.py -k docstring_says",
    ),
    Mutation(
        "checksum: a block's place does not count", "checksum.py",
        "total * tl.load(of_block_ptr + k)", "total",
        "test_checksum.py -k docstring_says",
    ),
    Mutation(
        "checksum: top bits are left to cancel", "checksum.py",
        "    sums_KS += sums_KS >> 32\n", "",
        "test_checksum.py -k signs",
    ),
]  # fmt: skip


def mutated(mutation: Mutation) -> str:
    """Return the file's source with the change. Raises ValueError unless `old` occurs exactly once."""
    source = (ROOT / "kernels" / mutation.file).read_text()
    count = source.count(mutation.old)
    if count != 1:
        raise ValueError(
            f"mutation {mutation.name!r}: expected its text once in kernels/{mutation.file}, found it {count} times"
        )
    return source.replace(mutation.old, mutation.new)


def _package(folder: Path, mutation: Mutation | None) -> Path:
    """Make a package `phimini` with a copy of `kernels/`, changed by the mutation if there is one."""
    package = folder / "phimini"
    package.mkdir(parents=True)
    for name in ("model", "parallel", "stages", "bench"):
        (package / name).symlink_to(ROOT / name)
    shutil.copytree(
        ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    if mutation is not None:
        (package / "kernels" / mutation.file).write_text(mutated(mutation))
    return folder


def _arguments(tests: str) -> list[str]:
    files, _, words = tests.partition(" -k ")
    chosen = ["-k", words.strip("'")] if words else []
    found = [str(path) for name in files.split() for path in (ROOT / "tests").rglob(name)]
    return found + chosen


def run_tests(tests: str, folder: Path) -> tuple[int, str]:
    """Run pytest in a child whose `phimini` is the one in `folder`; return exit status and output."""
    log = folder / "log"
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            sys.path.insert(0, str(folder))
            with log.open("w") as file, contextlib.redirect_stdout(file):
                options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=line"]
                code = int(pytest.main(["--rootdir", str(ROOT), *options, *_arguments(tests)]))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, log.read_text()


def caught_by(code: int, output: str) -> str | None:
    """Return the test that failed because of a wrong result, with its reason; otherwise None."""
    failed = re.search(r"^FAILED \S*?(test_\w+\.py::.+?)(?: - .*)?$", output, re.MULTILINE)
    reasons = re.findall(r"^(?:E  +|/\S+:\d+: )(.*)$", output, re.MULTILINE)
    reason = next((r for r in reasons if any(word in r for word in CAUGHT_BY)), None)
    if code != 1 or failed is None or reason is None:
        return None
    return f"{failed.group(1)}: {reason}"


def main(words: list[str]) -> int:
    """Print a table: mutation, verdict, and the test that caught it."""
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    torch.set_num_threads(1)
    start, survived = time.process_time(), []
    with tempfile.TemporaryDirectory() as scratch:
        clean = _package(Path(scratch) / "clean", None)
        for tests in dict.fromkeys(m.tests for m in chosen):
            code, output = run_tests(tests, clean)
            if code != 0:
                print(f"{tests} fails on the unchanged kernels:\n{output[-2000:]}")
                return 1
        for i, mutation in enumerate(chosen):
            code, output = run_tests(
                mutation.tests, _package(Path(scratch) / f"mutant{i}", mutation)
            )
            test = caught_by(code, output)
            if test is None:
                survived.append(mutation.name)
                print(output[-1500:])
            verdict = "caught by " + test[:150] if test else f"SURVIVED {mutation.tests}"
            print(f"{mutation.file:24} {mutation.name:56} {verdict}", flush=True)
    times = os.times()
    cpu_seconds = time.process_time() - start + times.children_user + times.children_system
    print(
        f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught, {cpu_seconds:.0f} CPU seconds"
    )
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
