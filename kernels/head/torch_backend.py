"""The head in plain torch, one chunk of fp32 logits at a time: for CPUs, and for fp32 and fp64 on any device.

After the forward the chunk holds E = exp(z - max). dz = c E + g onehot has one c per row, so c is not multiplied into the
logits: it scales the rows of dX after their GEMM and the rows of X before dW's, and g / c is added to the M target
entries. A gradient of the entropy needs a pass: dz = c E (a - b (z - max + shift)).

The passes over the logits (max, subtract, exp, sum) work on blocks that stay in the L2 cache: measured 0.4 to 0.5 of the
CPU time of whole-chunk passes. Bound: the GEMMs, 6 * M * V * D FLOPs, in the library that backend/cpu_gemm.py chooses.
Narrow inputs are widened once, because an AVX2 CPU runs bf16 GEMMs 40 times slower than fp32 ones.

Deterministic for a fixed number of threads. Letters: M rows, D model width, V classes of this rank.
"""

import torch
from torch import Tensor

from phimini.kernels.backend.cpu_gemm import add_outer, matmul
from phimini.kernels.head.chunked import ChunkedHead, LogitGrads
from phimini.kernels.head.rows import HeadRows

SEVERAL_THREADS_ELEMENTS = 1 << 21
ONE_THREAD_ELEMENTS = 1 << 17
"""Elements of a chunk in one block. One thread: 512 KiB of fp32, a quarter of a 2 MiB L2 cache, which also
holds the block of exponentials. Several: 8 MiB, because each operation is a parallel region whose end is waited for."""


class TorchHead(ChunkedHead):
    def __init__(self, rows: HeadRows, weight_VD: Tensor, chunk_rows: int, **options) -> None:
        super().__init__(rows, weight_VD, chunk_rows, **options)
        self.wide_weight_VD = weight_VD.to(self.dtype)
        self.x_MD = rows.x_MD.to(self.dtype)
        if self.inverse_temperature_M is not None:
            self.x_MD = self.x_MD * self.inverse_temperature_M[:, None]
        V = weight_VD.shape[0]
        self.logits_MV = self.x_MD.new_empty(0)
        elements = ONE_THREAD_ELEMENTS if torch.get_num_threads() == 1 else SEVERAL_THREADS_ELEMENTS
        self.block_rows = chunk_rows
        if weight_VD.device.type == "cpu":
            self.block_rows = min(chunk_rows, max(1, elements // V))
        self.block_MV = None
        if self.with_entropy:
            self.block_MV = self.x_MD.new_empty(self.block_rows, V)

    def scaled_rows(self, rows: slice) -> Tensor:
        return self.x_MD[rows]

    def logits(self, rows: slice) -> Tensor:
        x_MD = self.x_MD[rows]
        M = x_MD.shape[0]
        self.logits_MV = self.x_MD.new_empty(0)  # free the previous chunk first
        self.logits_MV = z_MV = matmul(x_MD, self.wide_weight_VD.t())
        targets_M1, V = self.targets_M[rows, None], z_MV.shape[1]
        self.column_M1, self.is_here_M1 = targets_M1, None
        if not self.has_all_targets:
            self.is_here_M1 = (targets_M1 >= 0) & (targets_M1 < V)
            self.column_M1 = targets_M1.clamp(0, V - 1)
        target_M1 = z_MV.gather(1, self.column_M1)
        if self.is_here_M1 is not None:
            target_M1 = target_M1.where(self.is_here_M1, 0)
        max_M1, sum_M = torch.empty_like(target_M1), torch.empty_like(target_M1[:, 0])
        weighted_M = torch.empty_like(sum_M) if self.with_entropy else None
        for a in range(0, M, self.block_rows):
            block = slice(a, min(a + self.block_rows, M))
            z = z_MV[block]
            z -= torch.amax(z, 1, keepdim=True, out=max_M1[block])
            if weighted_M is None or self.block_MV is None:
                torch.sum(z.exp_(), 1, out=sum_M[block])
                continue
            e = torch.exp(z, out=self.block_MV[: z.shape[0]])
            torch.sum(e, 1, out=sum_M[block])
            if self.entropy_gradient:
                torch.linalg.vecdot(e, z, out=weighted_M[block])
            else:
                torch.sum(z.mul_(e), 1, out=weighted_M[block])
                z.copy_(e)
        weighted = [] if weighted_M is None else [weighted_M]
        return torch.stack([max_M1[:, 0], sum_M, *weighted, target_M1[:, 0]])

    def gradients(self, rows: slice, grads: LogitGrads) -> None:
        x_MD = self.x_MD[rows]
        dz_MV = self.logits_MV
        scale_M, target_M = grads.scale_M * grads.softmax_M, grads.target_M
        if self.entropy_gradient:
            scale_M = grads.scale_M
            self._entropy_pass(dz_MV, grads)
        # dz = scale * (buffer + target / scale * onehot). Where d logp = -d lse, scale is 0 or a rounding error: a least
        # scale, far below the target's rounding, keeps the target.
        least_M = target_M.abs() * torch.finfo(target_M.dtype).eps ** 2
        scale_M = torch.where(scale_M.abs() < least_M, least_M, scale_M)
        at_target_M1 = (target_M / torch.where(scale_M == 0, 1, scale_M))[:, None]
        if self.is_here_M1 is not None:
            at_target_M1 = at_target_M1.where(self.is_here_M1, 0)
        dz_MV.scatter_add_(1, self.column_M1, at_target_M1)
        if self.dx_MD is not None:
            row_scale_M = (
                scale_M
                if self.inverse_temperature_M is None
                else scale_M * self.inverse_temperature_M[rows]
            )
            dx_MD = matmul(dz_MV, self.wide_weight_VD)
            torch.mul(dx_MD, row_scale_M[:, None], out=self.dx_MD[rows])
        if self.dw_VD is not None:
            add_outer(self.dw_VD, dz_MV, x_MD * scale_M[:, None])

    def _entropy_pass(self, z_MV: Tensor, grads: LogitGrads) -> None:
        """Turn z - max into exp(z - max) * (softmax - entropy * (z - max + shift)), in place."""
        assert self.block_MV is not None, "entropy_gradient allocates the block"
        minus_M1 = torch.zeros_like(grads.softmax_M)[:, None]
        offset_M1 = grads.softmax_M[:, None]
        if grads.entropy_M is not None and grads.shift_M is not None:
            minus_M1 = -grads.entropy_M[:, None]
            offset_M1 = (grads.softmax_M - grads.entropy_M * grads.shift_M)[:, None]
        for a in range(0, z_MV.shape[0], self.block_rows):
            z = z_MV[a : a + self.block_rows]
            e = torch.exp(z, out=self.block_MV[: z.shape[0]])
            torch.addcmul(
                offset_M1[a : a + self.block_rows], z, minus_M1[a : a + self.block_rows], out=z
            )
            z *= e
