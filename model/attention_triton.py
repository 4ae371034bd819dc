"""The `triton` backend of `pointer_attention`: block-sparse attention over compact lists in both directions.

Forward, one program a query block: online softmax over the listed key blocks [Milakov & Gimelshein 2018; FlashAttention-2].
Backward, one program a key block for dk and dv, which reads the transposed lists, and one a query block for dq: every sum
has a fixed order, so two runs agree bitwise. The bias is a second, narrow dot product of features beside q . k; the content
keeps its whole head dim. List entries that need an element mask (the diagonal, document borders) come first, the others
skip it.

Tensors are read through TMA descriptors of the [B * T, H * D] view, as the projections lay them out.

Shape suffixes as in `model.attention`; F features (padded to a power of two), R = B H N rows of lists.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.attention import BLOCK, TRITON_HEAD_DIMS

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MAX_INT32 = 2**31 - 1
MAX_BLOCKS = 2**16  # a list entry packs its slot above 16 bits of block id


class Tiling(NamedTuple):
    """How a kernel cuts its work, by measurement on an H200."""

    block: int  # rows of the operand that the loop streams
    warps: int
    stages: int


FORWARD = Tiling(block=128, warps=8, stages=3)
FORWARD_BIAS = Tiling(block=128, warps=8, stages=2)  # the features leave no room for a third stage
FORWARD_WIDE = Tiling(block=64, warps=8, stages=3)  # more than 64 features
BACKWARD_KV = Tiling(block=64, warps=8, stages=3)
BACKWARD_Q = Tiling(block=64, warps=8, stages=3)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


@triton.jit
def _union_kernel(delta_ptr, start_ptr, local_ptr, radius_ptr, globals_ptr, num_ptr, idx_ptr, N, LOCAL: tl.constexpr,
                  HALF: tl.constexpr, GLOBALS: tl.constexpr, M: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr,
                  BLOCK: tl.constexpr):
    """One program a row: candidates as in `attn_bias.block_lists`; each distinct one goes to the place of its rank."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row = bh.to(tl.int64) * N + n
    slot = tl.arange(0, W_PAD)
    SPAN: tl.constexpr = 2 * HALF + 1
    first = tl.load(start_ptr + n)
    near = tl.where(slot < tl.load(local_ptr), n - slot, n)
    block = near
    if M > 0:
        pointer, around = (slot - LOCAL) // SPAN, (slot - LOCAL) % SPAN - HALF
        in_window = (slot >= LOCAL) & (pointer < M)
        delta = tl.load(delta_ptr + row * M + pointer, mask=in_window, other=0.0)
        target = n - ((tl.floor(delta + 0.5).to(tl.int32) + BLOCK - 1) // BLOCK)  # floor((128 n - offset) / 128)
        window = tl.where(tl.abs(around) <= tl.load(radius_ptr), target + around, n)
        block = tl.where(in_window, window, block)
    anchor = slot - LOCAL - M * SPAN
    block = tl.where(anchor >= 0, tl.where(anchor < tl.load(globals_ptr), first + anchor, n), block)
    block = tl.minimum(tl.maximum(block, first), n)
    block = tl.where(anchor < GLOBALS, block, -1)  # the padding
    earlier = slot[None, :] < slot[:, None]
    repeats = tl.sum(((block[None, :] == block[:, None]) & earlier).to(tl.int32), 1)
    distinct = (repeats == 0) & (block >= 0)
    value = tl.where(distinct, block, -1)
    rank = tl.sum((value[None, :] > block[:, None]).to(tl.int32), 1)
    num = tl.sum(distinct.to(tl.int32), 0)
    tl.store(idx_ptr + row * W + rank, block, mask=distinct)
    tl.store(idx_ptr + row * W + slot, tl.zeros_like(slot), mask=(slot >= num) & (slot < W))
    tl.store(num_ptr + row, num)


def union_lists(delta_BHNM: Tensor, start_block_N: Tensor, local: Tensor, radius: Tensor, globals_: Tensor,
                local_slots: int, half_slots: int, global_slots: int) -> tuple[Tensor, Tensor]:
    """`attn_bias.block_lists` in one kernel."""
    B, H, N, M = delta_BHNM.shape
    slots = local_slots + M * (2 * half_slots + 1) + global_slots
    W = min(slots, N)
    num = torch.empty(B, H, N, device=delta_BHNM.device, dtype=torch.int32)
    idx = torch.empty(B, H, N, W, device=delta_BHNM.device, dtype=torch.int32)
    _union_kernel[(N, B * H)](delta_BHNM.float().contiguous(), start_block_N, local, radius, globals_, num, idx, N,
                              local_slots, half_slots, global_slots, M, W, triton.next_power_of_2(slots), BLOCK, num_warps=1)
    return num, idx


@triton.jit
def _split_kernel(num_ptr, idx_ptr, doc_ptr, entries_ptr, counts_ptr, keys_ptr, B_lists, H_lists, N,
                  W: tl.constexpr, W_PAD: tl.constexpr, MASK_ALL: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: entries that need the element mask first; and the sort keys of the transposition."""
    n, bh = tl.program_id(0), tl.program_id(1)
    row = bh.to(tl.int64) * N + n
    slot = tl.arange(0, W_PAD)
    listed = slot < tl.minimum(tl.load(num_ptr + row), W)
    key = tl.load(idx_ptr + row * W + slot, mask=listed, other=0)
    first_q, last_q = tl.load(doc_ptr + n * BLOCK), tl.load(doc_ptr + n * BLOCK + BLOCK - 1)
    first_k = tl.load(doc_ptr + key * BLOCK)
    last_k = tl.load(doc_ptr + key * BLOCK + BLOCK - 1)
    masked = (key == n) | (first_k != last_q) | (last_k != first_q) | (first_k != first_q)
    if MASK_ALL:
        masked = key == key
    masked, full = listed & masked, listed & ~masked
    num_masked = tl.sum(masked.to(tl.int32), 0)
    place = tl.where(masked, tl.cumsum(masked.to(tl.int32), 0) - 1,
                     num_masked + tl.cumsum(full.to(tl.int32), 0) - 1)
    tl.store(entries_ptr + row * W + place, (slot << 16) | key, mask=listed)
    tl.store(counts_ptr + row * 2, num_masked)
    tl.store(counts_ptr + row * 2 + 1, tl.sum(listed.to(tl.int32), 0))
    if KEYS:
        # ((row of the key block, masked before full), query block, slot): one number, sorted as a whole.
        ELEMENT: tl.constexpr = keys_ptr.dtype.element_ty
        half = (bh * N + key) * 2 + full.to(tl.int32)
        value = (half.to(ELEMENT) * N + n) * W_PAD + slot
        nothing = tl.full([W_PAD], 1, ELEMENT) * (B_lists * H_lists * 2) * N * N * W_PAD
        tl.store(keys_ptr + row * W + slot, tl.where(listed, value, nothing), mask=slot < W)


def _key_dtype(idx_BHNW: Tensor) -> torch.dtype:
    B, H, N, W = idx_BHNW.shape
    return torch.int32 if 2 * B * H * N * N * triton.next_power_of_2(W) <= MAX_INT32 else torch.int64


@torch.library.custom_op("scope::split_lists", mutates_args=())
def split_lists(num_BHN: Tensor, idx_BHNW: Tensor, doc_id_T: Tensor, mask_all: bool, transpose: bool) -> list[Tensor]:
    """entries [B, H, N, W] = slot << 16 | key block, those that need the element mask first; counts [B, H, N, 2] of those
    and of all. With `transpose` also pairs [R * W], the sorted (key row, full, query block, slot), and bounds [2 R + 1]:
    key row r's masked readers are pairs[bounds[2r] : bounds[2r + 1]], the others follow up to bounds[2r + 2]."""
    B, H, N, W = idx_BHNW.shape
    num_BHN, idx_BHNW = num_BHN.contiguous(), idx_BHNW.contiguous()
    if N > MAX_BLOCKS:
        raise ValueError(f"{N} blocks are more than the {MAX_BLOCKS} that a list entry can name")
    W_PAD = triton.next_power_of_2(W)
    entries, counts = torch.empty_like(idx_BHNW), num_BHN.new_empty(B, H, N, 2)
    keys = torch.empty(B * H * N * W if transpose else 0, device=num_BHN.device, dtype=_key_dtype(idx_BHNW))
    _split_kernel[(N, B * H)](num_BHN, idx_BHNW, doc_id_T, entries, counts, keys, B, H, N, W, W_PAD, mask_all, transpose,
                              BLOCK, num_warps=1)
    if not transpose:
        return [entries, counts]
    pairs = keys.sort().values
    edges = torch.arange(2 * B * H * N + 1, device=keys.device, dtype=keys.dtype) * (N * W_PAD)
    return [entries, counts, pairs, torch.searchsorted(pairs, edges, out_int32=True)]


@split_lists.register_fake
def _(num_BHN, idx_BHNW, doc_id_T, mask_all, transpose):
    B, H, N, W = idx_BHNW.shape
    out = [idx_BHNW.new_empty(B, H, N, W), num_BHN.new_empty(B, H, N, 2)]
    if transpose:
        out += [idx_BHNW.new_empty(B * H * N * W, dtype=_key_dtype(idx_BHNW)),
                num_BHN.new_empty(2 * B * H * N + 1)]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _visible(slot, q_pos, k_pos, doc_ptr, seen_ptr, seen_row, words, SEEN: tl.constexpr):
    """[queries, keys] element mask: causal, same document, and the slot seen by the token."""
    visible = (q_pos[:, None] >= k_pos[None, :]) & (tl.load(doc_ptr + q_pos)[:, None] == tl.load(doc_ptr + k_pos)[None, :])
    if SEEN:
        word = tl.load(seen_ptr + (seen_row + q_pos) * words + slot // 32)
        visible = visible & (((word >> (slot % 32)) & 1) != 0)[:, None]
    return visible


@triton.jit
def _forward_tile(acc, m, total, q, qf, entry, part, MASKED: tl.constexpr, b, h, k_desc, v_desc, kf_desc, doc_ptr, seen_ptr,
                  seen_row, words, scale2, T, q_pos, D: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`ROWS` keys of one listed key block in the online softmax. Logits are in units of ln 2."""
    first = (entry & 0xFFFF) * BLOCK + part * ROWS
    k = k_desc.load([b * T + first, h * D])
    s = tl.dot(q, k.T)
    if BIAS:
        kf = kf_desc.load([first, 0])
        s = tl.dot(qf, kf.T, s)
    if MASKED:
        visible = _visible(entry >> 16, q_pos, first + tl.arange(0, ROWS), doc_ptr, seen_ptr, seen_row, words, SEEN)
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * scale2 - shift[:, None])
    fade = tl.exp2(m - shift)
    total = total * fade + tl.sum(p, 1)
    acc = acc * fade[:, None]
    v = v_desc.load([b * T + first, h * D])
    acc = tl.dot(p.to(v.dtype), v, acc)
    return acc, m_new, total


@triton.jit
def _forward_kernel(q_desc, k_desc, v_desc, qf_desc, kf_desc, out_desc, lse_ptr, entries_ptr, counts_ptr, doc_ptr, seen_ptr,
                    words, scale, T, H, N, H_lists, B_lists, W: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
                    SEEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    list_bh = (b % B_lists) * H_lists + h % H_lists
    row = list_bh.to(tl.int64) * N + n
    PER: tl.constexpr = BLOCK // ROWS
    scale2 = scale * LOG2_E
    q = q_desc.load([b * T + n * BLOCK, h * D])
    qf = q
    if BIAS:
        qf = qf_desc.load([bh * T + n * BLOCK, 0])
    q_pos = n * BLOCK + tl.arange(0, BLOCK)
    seen_row = list_bh.to(tl.int64) * T
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    num_masked, num = tl.load(counts_ptr + row * 2), tl.load(counts_ptr + row * 2 + 1)
    entries_ptr += row * W
    last = tl.maximum(num - 1, 0)
    # The next entry is read a turn ahead: the copies of a turn would otherwise wait for their address.
    entry = tl.load(entries_ptr, mask=num > 0, other=0)
    for i in tl.range(0, num_masked * PER, num_stages=STAGES):
        following = tl.load(entries_ptr + tl.minimum((i + 1) // PER, last))
        acc, m, total = _forward_tile(acc, m, total, q, qf, entry, i % PER, True, b, h, k_desc, v_desc, kf_desc, doc_ptr,
                                      seen_ptr, seen_row, words, scale2, T, q_pos, D, BIAS, SEEN, ROWS, BLOCK)
        entry = following
    if not SEEN:
        for i in tl.range(num_masked * PER, num * PER, num_stages=STAGES):
            following = tl.load(entries_ptr + tl.minimum((i + 1) // PER, last))
            acc, m, total = _forward_tile(acc, m, total, q, qf, entry, i % PER, False, b, h, k_desc, v_desc, kf_desc,
                                          doc_ptr, seen_ptr, seen_row, words, scale2, T, q_pos, D, BIAS, SEEN, ROWS, BLOCK)
            entry = following
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_desc.store([b * T + n * BLOCK, h * D], out.to(out_desc.dtype))
    tl.store(lse_ptr + bh.to(tl.int64) * T + q_pos, (m + tl.log2(total)) * LN_2)


@triton.jit
def _delta_kernel(out_ptr, dout_ptr, dlse_ptr, delta_ptr, T, H, D: tl.constexpr, ROWS: tl.constexpr):
    """sum_d out dout - dlse, the row constant of the softmax's backward."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    at = ((b.to(tl.int64) * T + t)[:, None] * H + h) * D + tl.arange(0, D)[None, :]
    product = tl.load(out_ptr + at).to(tl.float32) * tl.load(dout_ptr + at).to(tl.float32)
    at = bh.to(tl.int64) * T + t
    tl.store(delta_ptr + at, tl.sum(product, 1) - tl.load(dlse_ptr + at))


@triton.jit
def _kv_tile(dk, dv, k, v, kf, pair, part, MASKED: tl.constexpr, b, h, bh, q_desc, dout_desc, qf_desc, lse_ptr,
             delta_ptr, doc_ptr, seen_ptr, seen_row, words, scale, T, N, k_pos, D: tl.constexpr, W_PAD: tl.constexpr,
             BIAS: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`ROWS` queries of one reading query block; tiles are [keys, queries]."""
    slot = (pair % W_PAD).to(tl.int32)
    n = ((pair // W_PAD) % N).to(tl.int32)
    first = n * BLOCK + part * ROWS
    q_pos = first + tl.arange(0, ROWS)
    q = q_desc.load([b * T + first, h * D])
    s = tl.dot(k, q.T)
    if BIAS:
        qf = qf_desc.load([bh * T + first, 0])
        s = tl.dot(kf, qf.T, s)
    at = bh.to(tl.int64) * T + q_pos
    lse = tl.load(lse_ptr + at)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    p = tl.exp2(s * (scale * LOG2_E) - lse2[None, :])
    if MASKED:
        visible = _visible(slot, q_pos, k_pos, doc_ptr, seen_ptr, seen_row, words, SEEN)
        p = tl.where(tl.trans(visible), p, 0.0)
    dout = dout_desc.load([b * T + first, h * D])
    dv = tl.dot(p.to(dout.dtype), dout, dv)
    dp = tl.dot(v, dout.T)
    ds = p * (dp - tl.load(delta_ptr + at)[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _backward_kv_kernel(q_desc, k_desc, v_desc, qf_desc, kf_desc, dout_desc, dk_desc, dv_desc, lse_ptr, delta_ptr,
                        pairs_ptr, bounds_ptr, doc_ptr, seen_ptr, words, scale, T, H, N, H_lists, B_lists,
                        W_PAD: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr, STAGES: tl.constexpr):
    # Heads of one key block beside each other: documents' first blocks, read by everyone, are then started early.
    bh, key = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    list_bh = (b % B_lists) * H_lists + h % H_lists
    row = list_bh * N + key
    PER: tl.constexpr = BLOCK // ROWS
    k = k_desc.load([b * T + key * BLOCK, h * D])
    v = v_desc.load([b * T + key * BLOCK, h * D])
    kf = k
    if BIAS:
        kf = kf_desc.load([key * BLOCK, 0])
    k_pos = key * BLOCK + tl.arange(0, BLOCK)
    seen_row = list_bh.to(tl.int64) * T
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    start, middle, end = (tl.load(bounds_ptr + 2 * row), tl.load(bounds_ptr + 2 * row + 1),
                          tl.load(bounds_ptr + 2 * row + 2))
    last = tl.maximum(end - 1, start)
    pair = tl.load(pairs_ptr + start, mask=end > start, other=0)
    for i in tl.range(start * PER, middle * PER, num_stages=STAGES):
        following = tl.load(pairs_ptr + tl.minimum((i + 1) // PER, last))
        dk, dv = _kv_tile(dk, dv, k, v, kf, pair, i % PER, True, b, h, bh, q_desc, dout_desc, qf_desc, lse_ptr,
                          delta_ptr, doc_ptr, seen_ptr, seen_row, words, scale, T, N, k_pos, D, W_PAD, BIAS, SEEN, ROWS,
                          BLOCK)
        pair = following
    if not SEEN:
        for i in tl.range(middle * PER, end * PER, num_stages=STAGES):
            following = tl.load(pairs_ptr + tl.minimum((i + 1) // PER, last))
            dk, dv = _kv_tile(dk, dv, k, v, kf, pair, i % PER, False, b, h, bh, q_desc, dout_desc, qf_desc, lse_ptr,
                              delta_ptr, doc_ptr, seen_ptr, seen_row, words, scale, T, N, k_pos, D, W_PAD, BIAS, SEEN, ROWS,
                              BLOCK)
            pair = following
    dk_desc.store([b * T + key * BLOCK, h * D], (dk * scale).to(dk_desc.dtype))
    dv_desc.store([b * T + key * BLOCK, h * D], dv.to(dv_desc.dtype))


@triton.jit
def _q_tile(dq, dqf, q, dout, qf, lse2, delta, entry, part, MASKED: tl.constexpr, b, h, k_desc, v_desc, kf_desc,
            doc_ptr, seen_ptr, seen_row, words, scale, T, q_pos, D: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`ROWS` keys of one listed key block; tiles are [queries, keys]."""
    first = (entry & 0xFFFF) * BLOCK + part * ROWS
    k = k_desc.load([b * T + first, h * D])
    s = tl.dot(q, k.T)
    kf = k
    if BIAS:
        kf = kf_desc.load([first, 0])
        s = tl.dot(qf, kf.T, s)
    p = tl.exp2(s * (scale * LOG2_E) - lse2[:, None])
    if MASKED:
        visible = _visible(entry >> 16, q_pos, first + tl.arange(0, ROWS), doc_ptr, seen_ptr, seen_row, words, SEEN)
        p = tl.where(visible, p, 0.0)
    v = v_desc.load([b * T + first, h * D])
    dp = tl.dot(dout, v.T)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    dq = tl.dot(ds, k, dq)
    if BIAS:
        dqf = tl.dot(ds, kf, dqf)
    return dq, dqf


@triton.jit
def _backward_q_kernel(q_desc, k_desc, v_desc, qf_desc, kf_desc, dout_desc, dq_desc, dqf_ptr, lse_ptr, delta_ptr,
                       entries_ptr, counts_ptr, doc_ptr, seen_ptr, words, scale, T, H, N, H_lists, B_lists,
                       W: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    list_bh = (b % B_lists) * H_lists + h % H_lists
    row = list_bh.to(tl.int64) * N + n
    PER: tl.constexpr = BLOCK // ROWS
    q = q_desc.load([b * T + n * BLOCK, h * D])
    dout = dout_desc.load([b * T + n * BLOCK, h * D])
    qf = q
    if BIAS:
        qf = qf_desc.load([bh * T + n * BLOCK, 0])
    q_pos = n * BLOCK + tl.arange(0, BLOCK)
    seen_row = list_bh.to(tl.int64) * T
    at = bh.to(tl.int64) * T + q_pos
    lse = tl.load(lse_ptr + at)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(delta_ptr + at)
    dq = tl.zeros([BLOCK, D], tl.float32)
    dqf = tl.zeros([BLOCK, F], tl.float32)
    num_masked, num = tl.load(counts_ptr + row * 2), tl.load(counts_ptr + row * 2 + 1)
    entries_ptr += row * W
    last = tl.maximum(num - 1, 0)
    entry = tl.load(entries_ptr, mask=num > 0, other=0)
    for i in tl.range(0, num_masked * PER, num_stages=STAGES):
        following = tl.load(entries_ptr + tl.minimum((i + 1) // PER, last))
        dq, dqf = _q_tile(dq, dqf, q, dout, qf, lse2, delta, entry, i % PER, True, b, h, k_desc, v_desc, kf_desc, doc_ptr,
                          seen_ptr, seen_row, words, scale, T, q_pos, D, BIAS, SEEN, ROWS, BLOCK)
        entry = following
    if not SEEN:
        for i in tl.range(num_masked * PER, num * PER, num_stages=STAGES):
            following = tl.load(entries_ptr + tl.minimum((i + 1) // PER, last))
            dq, dqf = _q_tile(dq, dqf, q, dout, qf, lse2, delta, entry, i % PER, False, b, h, k_desc, v_desc, kf_desc,
                              doc_ptr, seen_ptr, seen_row, words, scale, T, q_pos, D, BIAS, SEEN, ROWS, BLOCK)
            entry = following
    dq_desc.store([b * T + n * BLOCK, h * D], (dq * scale).to(dq_desc.dtype))
    if BIAS:
        tl.store(dqf_ptr + at[:, None] * F + tl.arange(0, F)[None, :], dqf * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _rows(x_BTHD: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head."""
    B, T, H, D = x_BTHD.shape
    return TensorDescriptor(x_BTHD, [B * T, H * D], [H * D, 1], [rows, D])


def _feature_rows(x: Tensor | None, rows: int, absent: TensorDescriptor) -> TensorDescriptor:
    if x is None:
        return absent
    return TensorDescriptor(x, [x.numel() // x.size(-1), x.size(-1)], [x.size(-1), 1], [rows, x.size(-1)])


@torch.library.custom_op("scope::pointer_attention", mutates_args=())
def attend(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, qf_BHTF: Tensor | None, kf_TF: Tensor | None,
           entries_BHNW: Tensor, counts: Tensor, pairs: Tensor | None, bounds: Tensor | None, doc_id_T: Tensor,
           seen_BHTw: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, T, H, D] and lse [B, H, T]; all inputs contiguous."""
    B, T, H, D = q_BTHD.shape
    tiling = FORWARD if qf_BHTF is None else FORWARD_BIAS if qf_BHTF.size(-1) <= 64 else FORWARD_WIDE
    N, rows = T // BLOCK, tiling.block
    out, lse = torch.empty_like(q_BTHD), torch.empty(B, H, T, device=q_BTHD.device, dtype=torch.float32)
    q, k = _rows(q_BTHD, BLOCK), _rows(k_BTHD, rows)
    _forward_kernel[(N, B * H)](
        q, k, _rows(v_BTHD, rows), _feature_rows(qf_BHTF, BLOCK, q), _feature_rows(kf_TF, rows, k), _rows(out, BLOCK), lse,
        entries_BHNW, counts, doc_id_T, seen_BHTw, 0 if seen_BHTw is None else seen_BHTw.size(-1), scale, T, H, N,
        entries_BHNW.size(1), entries_BHNW.size(0), entries_BHNW.size(-1), D, qf_BHTF is not None, seen_BHTw is not None,
        rows, BLOCK, tiling.stages, num_warps=tiling.warps)
    return out, lse


@attend.register_fake
def _(q_BTHD, k_BTHD, v_BTHD, qf_BHTF, kf_TF, entries_BHNW, counts, pairs, bounds, doc_id_T, seen_BHTw, scale):
    B, T, H, _ = q_BTHD.shape
    return torch.empty_like(q_BTHD), q_BTHD.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("scope::pointer_attention_backward", mutates_args=())
def attend_backward(dout_BTHD: Tensor, dlse_BHT: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor,
                    qf_BHTF: Tensor | None, kf_TF: Tensor | None, out_BTHD: Tensor, lse_BHT: Tensor, entries_BHNW: Tensor,
                    counts: Tensor, pairs: Tensor, bounds: Tensor, doc_id_T: Tensor, seen_BHTw: Tensor | None,
                    scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the features' dqf (float32; empty without features)."""
    B, T, H, D = q_BTHD.shape
    N, W, bias, seen = T // BLOCK, entries_BHNW.size(-1), qf_BHTF is not None, seen_BHTw is not None
    words = seen_BHTw.size(-1) if seen else 0
    dout_BTHD, dlse_BHT = dout_BTHD.contiguous(), dlse_BHT.contiguous()
    delta = torch.empty_like(lse_BHT)
    _delta_kernel[(T // 64, B * H)](out_BTHD, dout_BTHD, dlse_BHT, delta, T, H, D, 64, num_warps=4)

    dq, dk, dv = torch.empty_like(q_BTHD), torch.empty_like(k_BTHD), torch.empty_like(v_BTHD)
    rows = BACKWARD_KV.block
    k, v = _rows(k_BTHD, BLOCK), _rows(v_BTHD, BLOCK)
    _backward_kv_kernel[(B * H, N)](
        _rows(q_BTHD, rows), k, v, _feature_rows(qf_BHTF, rows, k), _feature_rows(kf_TF, BLOCK, k), _rows(dout_BTHD, rows),
        _rows(dk, BLOCK), _rows(dv, BLOCK), lse_BHT, delta, pairs, bounds, doc_id_T, seen_BHTw, words, scale, T, H, N,
        entries_BHNW.size(1), entries_BHNW.size(0), triton.next_power_of_2(W), D, bias, seen, rows, BLOCK,
        BACKWARD_KV.stages, num_warps=BACKWARD_KV.warps)
    rows = BACKWARD_Q.block
    q = _rows(q_BTHD, BLOCK)
    F = qf_BHTF.size(-1) if bias else 16
    dqf = torch.empty(B, H, T, F, device=q_BTHD.device, dtype=torch.float32) if bias else lse_BHT.new_empty(0)
    _backward_q_kernel[(N, B * H)](
        q, _rows(k_BTHD, rows), _rows(v_BTHD, rows), _feature_rows(qf_BHTF, BLOCK, q), _feature_rows(kf_TF, rows, q),
        _rows(dout_BTHD, BLOCK), _rows(dq, BLOCK), dqf, lse_BHT, delta, entries_BHNW, counts, doc_id_T, seen_BHTw, words,
        scale, T, H, N, entries_BHNW.size(1), entries_BHNW.size(0), W, D, F, bias, seen, rows, BLOCK, BACKWARD_Q.stages,
        num_warps=BACKWARD_Q.warps)
    return dq, dk, dv, dqf


@attend_backward.register_fake
def _(dout_BTHD, dlse_BHT, q_BTHD, k_BTHD, v_BTHD, qf_BHTF, *rest):
    dqf = torch.empty_like(qf_BHTF, dtype=torch.float32) if qf_BHTF is not None else dlse_BHT.new_empty(0)
    return torch.empty_like(q_BTHD), torch.empty_like(k_BTHD), torch.empty_like(v_BTHD), dqf


def _save(ctx, inputs, output):
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale


def _differentiate(ctx, dout, dlse):
    q, k, v, qf, kf, entries, counts, pairs, bounds, doc_id, seen, out, lse = ctx.saved_tensors
    if pairs is None:
        raise ValueError("these lists have no transpose for a backward: prepare them with needs_grad=True")
    dq, dk, dv, dqf = attend_backward(dout, dlse, q, k, v, qf, kf, out, lse, entries, counts, pairs, bounds, doc_id, seen,
                                      ctx.scale)
    return dq, dk, dv, (None if qf is None else dqf.to(qf.dtype)), *[None] * 8


attend.register_autograd(_differentiate, setup_context=_save)


def pad_features(x: Tensor) -> Tensor:
    """The last dimension padded with zeros to a power of two of at least 16, which a tensor core asks for."""
    F = x.size(-1)
    return torch.nn.functional.pad(x, (0, max(16, triton.next_power_of_2(F)) - F)).contiguous()


def triton_attention(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, features=None) -> tuple[Tensor, Tensor]:
    """`features`: None or (query [B, H, T, F], key [T, F]), whose dot product is added to the logits after the scale."""
    D = q_BHTD.size(-1)
    if D not in TRITON_HEAD_DIMS or v_BHTD.size(-1) != D:
        raise ValueError(f"backend triton takes head dims {TRITON_HEAD_DIMS} for q, k and v alike, not {D} and "
                         f"{v_BHTD.size(-1)}: take backend flex")
    if q_BHTD.is_cuda and not q_BHTD.dtype == k_BHTD.dtype == v_BHTD.dtype == torch.bfloat16:
        raise ValueError(f"backend triton takes bfloat16 on a GPU, not {q_BHTD.dtype}, {k_BHTD.dtype}, {v_BHTD.dtype}")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BHTD, k_BHTD, v_BHTD))
    qf = kf = None
    if features is not None:
        qf, kf = pad_features((features[0] / scale).type_as(q)), pad_features(features[1][: q.size(1)].type_as(q))
    entries, counts, *transposed = lists.prepared
    pairs, bounds = transposed or (None, None)
    out, lse = attend(q, k, v, qf, kf, entries, counts, pairs, bounds, documents.id_T, lists.seen_BHTw, scale)
    return out.transpose(1, 2), lse
