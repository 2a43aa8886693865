"""The head's Triton kernels, launched by `triton_backend.py` with the block sizes of `block_sizes.py`.

    _head_fwd_kernel       logits tile by tile, statistics only: nothing of size M * V is ever written
    _head_logits_kernel    one tile of logits -> E = exp(z - tile max) and the tile's statistics
    _head_merge_kernel     statistics of tiles or of vocabulary splits -> of rows
    _head_gradient_kernel  E -> dz in place: one read, one write

All deterministic: each number has one writer, and sums run in a fixed order. exp(z - max) is computed as
exp2((z - max) * log2 e), with the difference first: exact also at logits of 1e4.

E is stored in the inputs' dtype relative to its tile's own maximum, so its rounding is a relative 2^-9 of each
probability in bf16; a logit z stored in bf16 would be off by |z| * 2^-9, the probability by that factor.

Letters: M rows, D model width, V vocabulary rows of this rank, S splits or tiles of the vocabulary.
"""

# triton types constexpr parameters as tl.constexpr, not int
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalOperand=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
# Logit of a missing class: finite, so that exp(z - max) * (z - max) is 0 and not NaN.
MASKED = tl.constexpr(-1e30)

# A chunk's rows start anywhere; their alignment must not cause a recompilation.
PER_ROW = ["targets_ptr", "inverse_temperature_ptr"]


@triton.jit
def _logit_tile(
    x, w, row, col, M, V, D,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK_M, BLOCK_N) fp32: x[row:] @ w[col:]^T; x and w are descriptors with USE_TMA, else pointers.

    Off the end TMA reads zeros. Pointers read the last row instead, without a mask; the caller masks those logits.
    """
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if USE_TMA:
        for k in range(0, D, BLOCK_K):
            z = tl.dot(x.load([row, k]), w.load([col, k]).T, z, input_precision=PRECISION)
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        cols = tl.minimum(col + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        for k in range(0, D, BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            inside = depth < D
            x_tile = tl.load(
                x + rows[:, None] * D + depth[None, :], mask=inside[None, :], other=0.0
            )
            w_tile = tl.load(
                w + cols[None, :] * D + depth[:, None], mask=inside[:, None], other=0.0
            )
            z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
    return z


@triton.jit(do_not_specialize=["M", "tiles_per_split"], do_not_specialize_on_alignment=PER_ROW)
def _head_fwd_kernel(
    x, w,  # (M, D), (V, D): descriptors with USE_TMA, else pointers
    targets_ptr, inverse_temperature_ptr, num_rows_ptr,  # (M,) int64, (M,) or None, (1,) int32
    max_ptr, sum_ptr, weighted_ptr,  # (S, M) each, weighted or None; rows padded to whole blocks
    target_logit_ptr,  # (M,)
    M, V, D, stride_s, tiles_per_split,
    USE_TMA: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a split, so that they read the same tiles of W at the same time.
    num_row_blocks = tl.cdiv(M, BLOCK_M)
    row = (tl.program_id(0) % num_row_blocks) * BLOCK_M
    split = tl.program_id(0) // num_row_blocks
    if row >= tl.load(num_rows_ptr):
        return
    rows = row + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    targets = tl.load(targets_ptr + rows, mask=in_rows, other=-1).to(tl.int32)
    scale = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if inverse_temperature_ptr is not None:
        scale = tl.load(inverse_temperature_ptr + rows, mask=in_rows, other=1.0)
    m = tl.full((BLOCK_M,), NEGATIVE_INFINITY, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)  # sum of exp(z - m) * (z - m)
    at_target = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = split * tiles_per_split * BLOCK_N
    last = tl.minimum(first + tiles_per_split * BLOCK_N, V)
    for col in range(first, last, BLOCK_N):
        z = _logit_tile(x, w, row, col, M, V, D, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        cols = col + tl.arange(0, BLOCK_N)
        z = tl.where((cols < last)[None, :], z * scale[:, None], MASKED)
        # Most tiles hold no target of the block's rows. Without the branch the compared column numbers also stay in
        # registers throughout the loop: 30 to 50 spills on sm_100.
        is_here = (targets >= col) & (targets < col + BLOCK_N)
        if tl.max(is_here.to(tl.int32), axis=0) > 0:
            at_target += tl.sum(tl.where(cols[None, :] == targets[:, None], z, 0.0), axis=1)
        new_m = tl.maximum(m, tl.max(z, axis=1))
        if WITH_ENTROPY:
            # moving the maximum by d changes sum of e^d' * d' from old terms: weighted + d * total, scaled
            shift = tl.where(m == NEGATIVE_INFINITY, 0.0, m - new_m)
            decay = tl.exp2(shift * LOG2E)
            below = z - new_m[:, None]
            p = tl.exp2(below * LOG2E)
            weighted = (weighted + shift * total) * decay + tl.sum(p * below, axis=1)
            total = total * decay + tl.sum(p, axis=1)
        else:
            total = total * tl.exp2((m - new_m) * LOG2E)
            total += tl.sum(tl.exp2((z - new_m[:, None]) * LOG2E), axis=1)
        m = new_m
    out = split.to(tl.int64) * stride_s + rows
    tl.store(max_ptr + out, m)
    tl.store(sum_ptr + out, total)
    if WITH_ENTROPY:
        tl.store(weighted_ptr + out, weighted)
    is_here = (targets >= first) & (targets < last)
    tl.store(target_logit_ptr + rows, at_target, mask=in_rows & is_here)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=PER_ROW)
def _head_logits_kernel(
    x, w, e,  # (M, D), (V, D), (M, V): descriptors with USE_TMA, else pointers
    targets_ptr, inverse_temperature_ptr, num_rows_ptr,  # (M,) int64, (M,) or None, (1,) int32
    max_ptr, sum_ptr, weighted_ptr,  # (S, M) each, weighted or None; rows padded to whole blocks
    target_logit_ptr,  # (M,)
    M, V, D, stride_s, stride_e_m,
    USE_TMA: tl.constexpr, WITH_ENTROPY: tl.constexpr, PRECISION: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Row blocks vary fastest: the programs that run together hold all rows of the chunk (25 MB of x fit the L2
    # cache) and stream through W once. Row blocks without a row that counts are left out.
    num_row_blocks = tl.cdiv(tl.minimum(tl.load(num_rows_ptr), M), BLOCK_M)
    num_tiles = num_row_blocks * tl.cdiv(V, BLOCK_N)
    if PERSISTENT:
        first, last, step = tl.program_id(0), num_tiles, tl.num_programs(0)
    else:
        if tl.program_id(0) >= num_tiles:
            return
        first, last, step = 0, 1, 1  # the compiler drops this loop
    for i in tl.range(first, last, step, flatten=PERSISTENT):
        number = i if PERSISTENT else tl.program_id(0)
        row = (number % num_row_blocks) * BLOCK_M
        tile = number // num_row_blocks
        col = tile * BLOCK_N
        z = _logit_tile(x, w, row, col, M, V, D, USE_TMA, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        rows = row + tl.arange(0, BLOCK_M)
        cols = col + tl.arange(0, BLOCK_N)
        in_rows = rows < M
        if inverse_temperature_ptr is not None:
            z *= tl.load(inverse_temperature_ptr + rows, mask=in_rows, other=1.0)[:, None]
        z = tl.where((cols < V)[None, :], z, MASKED)
        targets = tl.load(targets_ptr + rows, mask=in_rows, other=-1).to(tl.int32)
        at_target = tl.sum(tl.where(cols[None, :] == targets[:, None], z, 0.0), axis=1)
        m = tl.max(z, axis=1)
        below = z - m[:, None]
        p = tl.exp2(below * LOG2E)
        if PERSISTENT:
            # Half a tile at a time: the stages of the next tile's loads leave room for no more.
            halves = tl.permute(tl.reshape(p.to(e.dtype), (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            e.store([row, col], left)
            e.store([row, col + BLOCK_N // 2], right)
        elif USE_TMA:
            e.store([row, col], p.to(e.dtype))
        else:
            at = e + rows[:, None].to(tl.int64) * stride_e_m + cols[None, :]
            tl.store(at, p.to(e.dtype.element_ty), mask=in_rows[:, None] & (cols < V)[None, :])
        out = tile.to(tl.int64) * stride_s + rows
        tl.store(max_ptr + out, m)
        tl.store(sum_ptr + out, tl.sum(p, axis=1))
        if WITH_ENTROPY:
            tl.store(weighted_ptr + out, tl.sum(p * below, axis=1))
        is_here = (targets >= col) & (targets < col + BLOCK_N) & (targets < V)
        tl.store(target_logit_ptr + rows, at_target, mask=in_rows & is_here)


@triton.jit(do_not_specialize=["S"])
def _head_merge_kernel(
    max_ptr, sum_ptr, weighted_ptr,  # (S, M) each, weighted or None; M a multiple of BLOCK_M
    row_max_ptr, row_sum_ptr, row_weighted_ptr,  # (M,) each
    S, stride_s,
    WITH_ENTROPY: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.full((BLOCK_M,), NEGATIVE_INFINITY, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, S, BLOCK_S):
        splits = first + tl.arange(0, BLOCK_S)
        inside = (splits < S)[:, None]
        at = splits[:, None].to(tl.int64) * stride_s + rows[None, :]
        part_m = tl.load(max_ptr + at, mask=inside, other=NEGATIVE_INFINITY)
        part_total = tl.load(sum_ptr + at, mask=inside, other=0.0)
        new_m = tl.maximum(m, tl.max(part_m, axis=0))
        shift = tl.where(m == NEGATIVE_INFINITY, 0.0, m - new_m)
        part_shift = tl.where(inside, part_m - new_m[None, :], 0.0)
        decay, part_decay = tl.exp2(shift * LOG2E), tl.exp2(part_shift * LOG2E)
        if WITH_ENTROPY:
            part_weighted = tl.load(weighted_ptr + at, mask=inside, other=0.0)
            weighted = (weighted + shift * total) * decay
            weighted += tl.sum((part_weighted + part_shift * part_total) * part_decay, axis=0)
        total = total * decay + tl.sum(part_total * part_decay, axis=0)
        m = new_m
    tl.store(row_max_ptr + rows, m)
    tl.store(row_sum_ptr + rows, total)
    if WITH_ENTROPY:
        tl.store(row_weighted_ptr + rows, weighted)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=PER_ROW)
def _head_gradient_kernel(
    e_ptr, tile_max_ptr,  # (M, V), becomes dz; (S, M)
    targets_ptr, num_rows_ptr,  # (M,) int64, (1,) int32
    max_ptr, scale_ptr, softmax_ptr, at_target_ptr, entropy_ptr, shift_ptr,  # (M,) each, the last two or None
    M, V, stride_e_m, stride_s, tiles_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dz = scale exp(z - max) (softmax - entropy (z - max + shift)); at the target, at_target; 0 in other rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    counts = rows < tl.load(num_rows_ptr)
    targets = tl.load(targets_ptr + rows, mask=counts, other=-1).to(tl.int32)
    row_max = tl.load(max_ptr + rows, mask=counts, other=0.0)
    scale = tl.load(scale_ptr + rows, mask=counts, other=0.0)
    softmax = tl.load(softmax_ptr + rows, mask=counts, other=0.0)
    at_target = tl.load(at_target_ptr + rows, mask=counts, other=0.0)
    entropy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    shift = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + rows, mask=counts, other=0.0)
        shift = tl.load(shift_ptr + rows, mask=counts, other=0.0)
    first = tl.program_id(1) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.cdiv(V, BLOCK_N))
    last_col = tl.minimum(last * BLOCK_N, V)
    tile_max_ptr += first.to(tl.int64) * stride_s
    for tile in range(first, last, 2):
        for i in tl.static_range(2):  # two tiles in flight  # pyright: ignore
            cols = (tile + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            at = e_ptr + rows[:, None].to(tl.int64) * stride_e_m + cols[None, :]
            inside = in_rows[:, None] & (cols < last_col)[None, :]
            e = tl.load(at, mask=inside & counts[:, None], other=0.0).to(tl.float32)
            tile_max = tl.load(
                tile_max_ptr + rows, mask=counts & (rows * 0 + tile + i < last), other=0.0
            )
            tile_max_ptr += stride_s
            below = tile_max - row_max
            p = e * (scale * tl.exp2(below * LOG2E))[:, None]
            if entropy_ptr is not None:
                # e = 0 has no logarithm, and p = 0 makes the term 0
                above = tl.log2(tl.where(e > 0, e, 1.0)) * LN2 + (below + shift)[:, None]
                dz = p * (softmax[:, None] - entropy[:, None] * above)
            else:
                dz = p * softmax[:, None]
            dz = tl.where(cols[None, :] == targets[:, None], at_target[:, None], dz)
            tl.store(at, dz.to(e_ptr.dtype.element_ty), mask=inside)
