"""The head's Triton back-end: the launches of the kernels of `triton_kernels.py`, and the GEMMs between them.

Without gradients: one kernel over row blocks and vocabulary splits; logits stay on the chip. 2 M V D FLOPs; reads x and
W once from HBM.

With gradients, per chunk:
    1. logits kernel       E = exp(z - tile max), statistics per tile          2 M V D FLOPs, writes M V elements
    2. merge kernel        statistics per row; ranks exchange them; the loss gives the coefficients
    3. gradient kernel     E -> dz in place                                    reads and writes M V elements
    4. cuBLAS              dX = dz W, dW += dz^T X with fp32 results           4 M V D FLOPs
The statistics come out of the GEMM's own epilogue, in fp32, so that the row pass reads the logits once (a row of
200,064 fits no SM: any kernel on finished logits reads them twice, as Liger's does). The gradient GEMMs are plain
matrix products without an epilogue. cuBLAS, with its clusters and multicast, is the faster plan there, and its beta=1
adds to dW in fp32 without another pass.

Row counts stay on the GPU. Kernels return early beyond `num_rows`, and the gradient kernel writes zeros there, which
cuBLAS multiplies. `max_rows` of the ops shortens these products.

On a CPU (tests) the kernels run in Triton's interpreter, and the GEMMs in fp32.
"""

# launches: triton types constexpr parameters as tl.constexpr, and knows num_warps
# pyright: reportArgumentType=false, reportCallIssue=false
import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phimini.kernels.backend.launch import num_sms
from phimini.kernels.head.block_sizes import (
    GRADIENT_ROWS,
    GRADIENT_TILES,
    GRADIENT_WARPS,
    MATMUL,
    MERGE_ROWS,
    MERGE_SPLITS,
    MERGE_WARPS,
    vocabulary_splits,
)
from phimini.kernels.head.chunked import MAX, SUM, TARGET, WEIGHTED, ChunkedHead, LogitGrads
from phimini.kernels.head.rows import HeadRows
from phimini.kernels.head.triton_kernels import (
    _head_fwd_kernel,
    _head_gradient_kernel,
    _head_logits_kernel,
    _head_merge_kernel,
)


@functools.cache
def generation(device: torch.device) -> int:
    """Return 80, 90 or 100: the newest generation of MATMUL that is not newer than the GPU; 90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"head kernels need compute capability 8.0 or newer, got {major}.{minor}")
    # sm_120 has neither tcgen05 nor sm_100's shared memory: it runs sm_80's plan
    return 80 if major in (8, 12) else min(100, 10 * major)


class TritonHead(ChunkedHead):
    CHUNK_MULTIPLE = 128

    def __init__(self, rows: HeadRows, weight_VD: Tensor, chunk_rows: int, **options) -> None:
        super().__init__(rows, weight_VD, chunk_rows, **options)
        V, D = weight_VD.shape
        if D * weight_VD.itemsize % 16:
            raise ValueError(
                f"head kernels: the width D must be a multiple of {16 // weight_VD.itemsize} for {weight_VD.dtype} "
                f"(rows of 16 bytes), got {D}"
            )
        self.x_MD = rows.x_MD
        self.blocks = MATMUL[generation(weight_VD.device)]
        self.precision = "ieee" if weight_VD.dtype == torch.float32 else "tf32"
        self.e_MV: Tensor | None = None
        if self.dx_MD is not None or self.dw_VD is not None:
            # rows start at multiples of 16 bytes, as TMA and 128-bit accesses need
            stride = triton.cdiv(V, 16) * 16
            self.e_MV = torch.empty(
                chunk_rows, stride, dtype=weight_VD.dtype, device=weight_VD.device
            )[:, :V]

    def scaled_rows(self, rows: slice) -> Tensor:
        x_MD = self.x_MD[rows].to(self.dtype)
        if self.inverse_temperature_M is None:
            return x_MD
        return x_MD * self.inverse_temperature_M[rows, None]

    def logits(self, rows: slice) -> Tensor:
        M, V = rows.stop - rows.start, self.weight_VD.shape[0]
        b, device = self.blocks, self.weight_VD.device
        num_row_blocks, num_tiles = triton.cdiv(M, b.block_m), triton.cdiv(V, b.block_n)
        if self.e_MV is None:
            num_splits = vocabulary_splits(num_row_blocks, num_tiles, num_sms(device))
            tiles_per_split = triton.cdiv(num_tiles, num_splits)
            num_splits = triton.cdiv(num_tiles, tiles_per_split)
        else:
            num_splits = num_tiles
        # Kernels write whole row blocks: no masks, so that the merge kernel reads 128 bits at a time.
        kinds = 3 if self.with_entropy else 2
        parts = torch.empty(
            kinds, num_splits, num_row_blocks * b.block_m, dtype=torch.float32, device=device
        )
        part_max, part_sum, part_weighted = (*parts.unbind(), None)[:3]
        # The target's logit is written by the one program whose tile has it: 0 where there is none.
        stats_KM = torch.zeros(kinds + 1, parts.shape[2], dtype=torch.float32, device=device)
        temperature_M = self.inverse_temperature_M
        if self.rows.active_M is None:
            self.count_1 = torch.full((1,), M, dtype=torch.int32, device=device)
        else:
            self.count_1 = self.rows.active_M[rows].sum(0, dtype=torch.int32)[None]
        x_MD, w_VD = self.x_MD[rows], self.weight_VD
        common = dict(
            x=TensorDescriptor.from_tensor(x_MD, [b.block_m, b.block_k]) if b.use_tma else x_MD,
            w=TensorDescriptor.from_tensor(w_VD, [b.block_n, b.block_k]) if b.use_tma else w_VD,
            targets_ptr=self.targets_M[rows],
            inverse_temperature_ptr=None if temperature_M is None else temperature_M[rows],
            num_rows_ptr=self.count_1, max_ptr=part_max, sum_ptr=part_sum, weighted_ptr=part_weighted,
            target_logit_ptr=stats_KM[TARGET], M=M, V=V, D=self.weight_VD.shape[1], stride_s=parts.stride(1),
            USE_TMA=b.use_tma, WITH_ENTROPY=self.with_entropy, PRECISION=self.precision,
            BLOCK_M=b.block_m, BLOCK_N=b.block_n, BLOCK_K=b.block_k, num_warps=b.num_warps, num_stages=b.num_stages,
        )  # fmt: skip
        grid = (num_row_blocks * num_splits,)
        if self.e_MV is None:
            _head_fwd_kernel[grid](**common, tiles_per_split=tiles_per_split)  # pyright: ignore
        else:
            e = self.e_MV[:M]
            if b.use_tma:
                e = TensorDescriptor.from_tensor(e, [b.block_m, b.block_n // (1 + b.persistent)])
            if b.persistent:
                grid = (min(*grid, num_sms(device)),)
            _head_logits_kernel[grid](
                **common, e=e, stride_e_m=self.e_MV.stride(0), PERSISTENT=b.persistent
            )
        self.parts = parts
        if num_splits > 1:
            self.merge(stats_KM)
        else:
            stats_KM[:kinds] = parts[:, 0]
        return stats_KM[:, :M]

    def merge(self, stats_KM: Tensor) -> None:
        """Write max, sum and weighted sum of each row, from those of the tiles or splits of the latest logits."""
        parts = self.parts
        kinds, num_splits, M = parts.shape
        _head_merge_kernel[(triton.cdiv(M, MERGE_ROWS),)](
            parts[0], parts[1], parts[2] if kinds == 3 else None,
            stats_KM[MAX], stats_KM[SUM], stats_KM[WEIGHTED] if kinds == 3 else None,
            num_splits, parts.stride(1),
            WITH_ENTROPY=kinds == 3, BLOCK_S=MERGE_SPLITS, BLOCK_M=MERGE_ROWS, num_warps=MERGE_WARPS,
        )  # fmt: skip

    def gradients(self, rows: slice, grads: LogitGrads) -> None:
        dz_MV, w_VD, x_MD = self.row_pass(rows, grads), self.weight_VD, self.x_MD[rows]
        wide = {"out_dtype": self.dtype}
        if not self.on_gpu:  # no CPU GEMM widens its result
            dz_MV, w_VD, x_MD = dz_MV.to(self.dtype), w_VD.to(self.dtype), x_MD.to(self.dtype)
            wide = {}
        if self.dx_MD is not None:
            torch.mm(dz_MV, w_VD, out=self.dx_MD[rows], **wide)
        if self.dw_VD is not None:
            # in place: dW is the C operand of one cuBLAS call
            torch.addmm(self.dw_VD, dz_MV.t(), x_MD, out=self.dw_VD, **wide)

    def row_pass(self, rows: slice, grads: LogitGrads) -> Tensor:
        """Turn E into dz, in place, and return it.

        The kernel's per-row numbers are divided by the temperature. At the target dz is a small difference for a
        confident row, p - 1: it is computed here, from the fp32 statistics.
        """
        assert self.e_MV is not None, "a head opened without gradients keeps no logits"
        M, V = rows.stop - rows.start, self.weight_VD.shape[0]
        dz_MV = self.e_MV[:M]
        softmax_M, entropy_M, shift_M = grads.softmax_M, grads.entropy_M, grads.shift_M
        of_p_M = softmax_M
        if entropy_M is not None:
            assert self.entropy_M is not None, "an entropy gradient needs entropy_gradient=True"
            of_p_M = of_p_M - entropy_M * (self.logp_M + self.entropy_M)
        at_target_M = self.logp_M.exp() * of_p_M + grads.target_M
        if self.inverse_temperature_M is not None:
            inverse_M = self.inverse_temperature_M[rows]
            softmax_M, at_target_M = softmax_M * inverse_M, at_target_M * inverse_M
            entropy_M = None if entropy_M is None else entropy_M * inverse_M
        per_row = [self.local_max_M, grads.scale_M, softmax_M, at_target_M]
        for i, value_M in enumerate(per_row):
            per_row[i] = value_M.float().contiguous()
        if entropy_M is not None and shift_M is not None:
            entropy_M, shift_M = entropy_M.float().contiguous(), shift_M.float().contiguous()
        num_tiles = triton.cdiv(V, self.blocks.block_n)
        _head_gradient_kernel[triton.cdiv(M, GRADIENT_ROWS), triton.cdiv(num_tiles, GRADIENT_TILES)](
            dz_MV, self.parts[0], self.targets_M[rows], self.count_1, *per_row, entropy_M, shift_M,
            M, V, dz_MV.stride(0), self.parts.stride(1), GRADIENT_TILES,
            BLOCK_M=GRADIENT_ROWS, BLOCK_N=self.blocks.block_n, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        return dz_MV
