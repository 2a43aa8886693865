"""A kernel is compiled once: what changes from batch to batch is no part of what triton specialises on."""

import json
import os
import subprocess
import sys

# In a process of its own, without the interpreter: launches are replaced by triton's own binder for sm_90.
SCRIPT = """
import collections, json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

seen = collections.defaultdict(set)
backend = make_backend(GPUTarget("cuda", 90, 32))

def bind(self, *args, grid, warmup, **options):
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, _ = binder(*args, debug=False, **options)
    # flags and None arguments are chosen by the caller: each choice may be a kernel of its own
    choice = [(k, v) for k, v in bound.items() if isinstance(v, bool) or v is None]
    seen[f"{self.__name__} {choice}"].add(str(specialization))

JITFunction.run = bind
from phimini.kernels import linear_cross_entropy, linear_dpo, linear_logprob, linear_policy_loss
from phimini.kernels import rms_norm, rms_norm_add, swiglu

D, V = 64, 3008
weight, gain = (torch.randn(V, D).bfloat16().requires_grad_(), torch.ones(D).bfloat16().requires_grad_())
for M in (1, 17, 129, 300, 301):
    x = torch.randn(M, D).bfloat16().requires_grad_()
    targets, zeros_M, temperature_M = torch.zeros(M, dtype=torch.int64), torch.zeros(M), torch.ones(M)
    for budget in (None, 128 * V * 2):
        head = {"_backend": "triton", "chunk_bytes": budget}
        linear_cross_entropy(x, weight, targets, temperature=temperature_M, **head)
        linear_policy_loss(x, weight, targets, zeros_M, zeros_M, entropy_coef=0.1, **head)
        linear_dpo(x, weight, targets, torch.arange(M) * 6 // M, torch.zeros(6), **head)
        linear_logprob(x, weight, targets, **head).logp_M.sum().backward()
    rms_norm(x, gain, _backend="triton").sum().backward()
    rms_norm_add(x, x, gain, _backend="triton")[0].sum().backward()
    swiglu(x, _backend="triton").sum().backward()
print(json.dumps({kernel: sorted(found) for kernel, found in seen.items()}))
"""


def test_the_number_of_rows_compiles_nothing_anew() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    seen = json.loads(ran.stdout)
    kernels = {name.split()[0] for name in seen}
    assert kernels == {
        "_head_fwd_kernel", "_head_logits_kernel", "_head_merge_kernel", "_head_gradient_kernel",
        "_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel", "_swiglu_fwd_kernel", "_swiglu_bwd_kernel",
    }  # fmt: skip
    for name, found in seen.items():
        assert len(found) == 1, f"{name} is compiled {len(found)} times: {found}"
