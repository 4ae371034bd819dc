"""The kernels of `model.selection`: what its operators run on a GPU, equal to their plain PyTorch up to rounding.

The search is the quadratic part, and bounded by two pipes of equal speed: the tensor cores' dot products and the maxima
over each block's tokens. So the maximum must cost one instruction a score and nothing else. The result of a
tensor core leaves every thread columns 8 j + 2 c + {0, 1} of its rows, c = lane mod 4. The tokens of four blocks,
a group, are therefore laid out interleaved, token k of block c in row 8 (k // 2) + 2 c + k % 2: each thread then
reduces one block within its registers, without a shuffle, and keeps the running values of every fourth block. What is done
once a block (one exponential, the comparisons with the best two so far) costs little beside the maxima over its tokens.

Shape suffixes as in `model.selection`; M rows (askers) of a program, Q blocks of a group, G groups.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.attention import BLOCK
from model.selection import list_width

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
GROUP = 4  # blocks interleaved in one group: the lanes that share a row of a tensor core's result
NOTHING = tl.constexpr(-1e30)  # below every score, and finite: differences with it are no NaN
NO_BLOCK = tl.constexpr(2**30)


class SearchTiling(NamedTuple):
    """How the search cuts its work."""

    rows: int  # askers of a program: a multiple of 128
    columns: int  # keys of one dot product, a power of two of at most 128
    warps: int
    stages: int
    registers: int  # a thread's at most, so that several programs share a processor: one multiplies, another compares


# The best of those in results/h200-selection/search.txt.
SEARCH = SearchTiling(rows=256, columns=64, warps=8, stages=3, registers=128)
SEARCH_SMALL = SearchTiling(rows=128, columns=128, warps=8, stages=3, registers=128)
SMALL = 1024  # fewer programs of the large tiling than this would leave processors idle


# ---------------------------------------------------------------------------------------------------------------------
# Choice of askers


@triton.jit
def _rank(score, place):
    """How many come before each in descending order, the earlier first among equals."""
    above = score[None, :] > score[:, None]
    tied = (score[None, :] == score[:, None]) & (place[None, :] < place[:, None])
    return tl.sum((above | tied).to(tl.int32), 1)


@triton.jit
def _nth_score_kernel(score_ptr, nth_ptr, NTH: tl.constexpr, BLOCK: tl.constexpr):
    row, x = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(score_ptr + row * BLOCK + x).to(tl.float32)
    tl.store(nth_ptr + row, tl.sum(tl.where(_rank(score, x) == NTH - 1, score, 0.0), 0))


@triton.jit
def _mean_before(value_ptr, row, n, MEMORY: tl.constexpr):
    """Mean of the finite values of the MEMORY tiles before tile n, summed from the nearest on; none: -inf."""
    total, count = 0.0, 0.0
    for back in tl.static_range(1, MEMORY + 1):
        value = tl.load(value_ptr + row - back, mask=n >= back, other=float("-inf"))
        finite = value > float("-inf")
        total += tl.where(finite, value, 0.0)
        count += finite.to(tl.float32)
    return tl.where(count > 0, tl.div_rn(total, tl.maximum(count, 1.0)), float("-inf"))


@triton.jit
def _ask_kernel(score_ptr, nth_ptr, idx_ptr, N, pacing, MEMORY: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """One tile, its tokens in order."""
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    threshold = _mean_before(nth_ptr, row, row % N, MEMORY)
    chosen, num = tl.full([R], BLOCK, tl.int32), tl.full([], 0, tl.int32)
    for x in range(BLOCK):
        score = tl.load(score_ptr + row * BLOCK + x).to(tl.float32)
        bar = threshold + pacing * tl.maximum(num.to(tl.float32) * (1.0 / R) - x / BLOCK, 0.0)
        asks = (num < R) & (score > bar)
        chosen = tl.where(asks & (slot == num), x, chosen)
        num += asks.to(tl.int32)
    tl.store(idx_ptr + row * R + slot, chosen)


def ask_tokens(score_BHT: Tensor, slots: int, memory: int, pacing: float) -> Tensor:
    B, H, T = score_BHT.shape
    N, score = T // BLOCK, score_BHT.contiguous()
    idx = torch.empty(B, H, N, slots, device=score.device, dtype=torch.int32)
    nth = torch.empty(B, H, N, device=score.device, dtype=torch.float32)
    _nth_score_kernel[(B * H * N,)](score, nth, slots // 4, BLOCK, num_warps=4)
    _ask_kernel[(B * H * N,)](score, nth, idx, N, pacing, memory, slots, BLOCK, num_warps=1)
    return idx


# ---------------------------------------------------------------------------------------------------------------------
# Search


@triton.jit
def _interleave_kernel(l_ptr, doc_ptr, out_ptr, out_doc_ptr, T, H, N, G, D: tl.constexpr, Q: tl.constexpr,
                       BLOCK: tl.constexpr):
    """The keys of one group of Q = 4 blocks, interleaved, and their documents; past the end, document -2."""
    group, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, Q * BLOCK)
    token = place // (2 * Q) * 2 + place % 2
    block = group * Q + place // 2 % Q
    real = block < N
    at = block * BLOCK + token
    row = (bh.to(tl.int64) * G + group) * (Q * BLOCK) + place
    tl.store(out_doc_ptr + row, tl.load(doc_ptr + at, mask=real, other=-2))
    d = tl.arange(0, D)
    value = tl.load(l_ptr + ((b.to(tl.int64) * T + at) * H + h)[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    tl.store(out_ptr + row[:, None] * D + d[None, :], value)


@triton.jit
def _maxima(q, q_doc, l_desc, key_doc_ptr, row, MASKED: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
            Q: tl.constexpr):
    """[M, 4]: for every asker the maximum of each block over the interleaved tokens [row, row + COLUMNS)."""
    s = tl.dot(q, l_desc.load([row, 0]).T)
    if MASKED:
        key_doc = tl.load(key_doc_ptr + row + tl.arange(0, COLUMNS))
        s = tl.where(q_doc[:, None] == key_doc[None, :], s, float("-inf"))
    return tl.max(tl.max(tl.reshape(s, [M, COLUMNS // (2 * Q), Q, 2]), 3), 1)


@triton.jit
def _update(best, best_group, rest, second, second_group, s, group, better, closer):
    """One more block a lane, `better` than the best or `closer` than the second: the smaller of its score and the best so far
    goes to the sum over the rest, which is relative to the best, and may be the new second. One exponential."""
    fade = tl.exp2(-tl.abs(s - best) * LOG2_E)
    rest = tl.fma(rest, tl.where(better, fade, 1.0), fade)
    second_group = tl.where(better, best_group, tl.where(closer, group, second_group))
    second = tl.maximum(second, tl.minimum(best, s))
    return tl.maximum(best, s), tl.where(better, group, best_group), rest, second, second_group


@triton.jit
def _search_kernel(p_ptr, ask_ptr, l_desc, key_doc_ptr, doc_ptr, start_ptr, local_ptr, globals_ptr, block_ptr, odds_ptr,
                   second_ptr, second_odds_ptr, T, H, N, G, most, R: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
                   COLUMNS: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The two best far blocks and their log-odds for M askers of M / R tiles. Longest programs first, the heads beside each
    other."""
    bh, part = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = bh // H, bh % H
    first_n = part * (M // R)
    last_n = tl.minimum(first_n + M // R, N) - 1
    row = part * M + tl.arange(0, M)
    asker = bh.to(tl.int64) * N * R + row
    at = row // R * BLOCK + tl.load(ask_ptr + asker, mask=row < N * R, other=BLOCK)
    d = tl.arange(0, D)
    q = tl.load(p_ptr + ((b.to(tl.int64) * T + at) * H + h)[:, None] * D + d[None, :], mask=(at < T)[:, None], other=0.0)

    # Blocks from `begin` on are searched by some asker. Groups [open_, close) are far for all askers; they come first, and
    # without masks if all tokens of the tiles are of one document. The order of the sums must not depend on that: a later
    # tile's new document would move the rounding of an earlier one's.
    local, globals_ = tl.load(local_ptr), tl.load(globals_ptr)
    begin = tl.load(start_ptr + first_n)
    one_document = tl.load(doc_ptr + first_n * BLOCK) == tl.load(doc_ptr + last_n * BLOCK + BLOCK - 1)
    first_group, last_group = begin // Q, (last_n + Q - 1) // Q
    open_ = tl.minimum((begin + tl.maximum(globals_, 1) + Q - 1) // Q, last_group)
    close = tl.maximum(tl.maximum(first_n - tl.maximum(local, 1) + 1, 0) // Q, open_)
    middle = close - open_
    unmasked = tl.where(one_document, middle, 0)

    first_row = bh * G * (Q * BLOCK)
    best = tl.full([M, Q], NOTHING, tl.float32)  # of the far blocks
    best_group = tl.full([M, Q], -1, tl.int32)
    rest = tl.zeros([M, Q], tl.float32)  # sum over the other far blocks of exp(s - best)
    second, second_group = best, best_group  # the best of those others
    highest = best  # of the group so far
    for i in tl.range(open_ * Q, (open_ + unmasked) * Q, num_stages=STAGES):  # a quarter of a group at a time
        s = _maxima(q, q, l_desc, key_doc_ptr, first_row + i * BLOCK, False, COLUMNS, M, Q)
        for j in tl.static_range(COLUMNS, BLOCK, COLUMNS):
            s = tl.maximum(s, _maxima(q, q, l_desc, key_doc_ptr, first_row + i * BLOCK + j, False, COLUMNS, M, Q))
        highest = tl.where(i % Q == 0, s, tl.maximum(highest, s))
        if i % Q == Q - 1:
            best, best_group, rest, second, second_group = _update(best, best_group, rest, second, second_group, highest,
                                                                   i // Q, highest > best, highest > second)

    n = row // R
    at = n * BLOCK + tl.load(ask_ptr + asker, mask=n < N, other=BLOCK)
    asks = (n < N) & (at < n * BLOCK + BLOCK)
    q_doc = tl.load(doc_ptr + at, mask=asks, other=-1)
    start = tl.load(start_ptr + n, mask=n < N, other=0)
    lane = tl.arange(0, Q)
    near = tl.full([M, Q], NOTHING, tl.float32)  # maximum over the past blocks that are not far
    near_sum = tl.zeros([M, Q], tl.float32)  # sum of exp(s - near)
    for i in range(unmasked, last_group - first_group):
        group = first_group + i - middle  # before the middle, or the middle itself, or behind it
        group = tl.where(i < middle, open_ + i, tl.where(group < open_, group, group + middle))
        s = tl.full([M, Q], float("-inf"), tl.float32)
        for j in range(0, Q * BLOCK, COLUMNS):
            s = tl.maximum(s, _maxima(q, q_doc, l_desc, key_doc_ptr, first_row + group * (Q * BLOCK) + j, True, COLUMNS, M, Q))
        block = group * Q + lane[None, :]
        past = block < n[:, None]
        far = past & (block <= n[:, None] - local) & (block >= start[:, None] + globals_)
        s_far = tl.where(far, s, float("-inf"))
        better = (s_far > best) | ((s_far == best) & (group < best_group))
        closer = (s_far > second) | ((s_far == second) & (group < second_group))
        best, best_group, rest, second, second_group = _update(best, best_group, rest, second, second_group, s_far, group,
                                                               better, closer)
        s_near = tl.where(past & ~far, s, float("-inf"))
        new = tl.maximum(near, s_near)
        near_sum = near_sum * tl.exp2((near - new) * LOG2_E) + tl.exp2((s_near - new) * LOG2_E)
        near = new

    # The four lanes of a row, relative to the best of them.
    top = tl.max(best, 1)
    block = tl.where(best_group >= 0, best_group * Q + lane[None, :], NO_BLOCK)
    winner = tl.min(tl.where(best == top[:, None], block, NO_BLOCK), 1)
    lost = block != winner[:, None]
    far_sum = tl.sum((rest + lost.to(tl.float32)) * tl.exp2((best - top[:, None]) * LOG2_E), 1)
    nearest = tl.max(near, 1)
    near_sum = tl.sum(near_sum * tl.exp2((near - nearest[:, None]) * LOG2_E), 1)
    shift = tl.maximum((nearest - top) * LOG2_E, 0.0)
    total = far_sum * tl.exp2(-shift) + near_sum * tl.exp2((nearest - top) * LOG2_E - shift)
    odds = tl.minimum(-(shift + tl.log2(tl.maximum(total, 1e-30))) * LN_2, most)  # no others at all: `most`
    found = asks & (winner < NO_BLOCK)
    tl.store(block_ptr + asker, tl.where(found, winner, -1), mask=n < N)
    tl.store(odds_ptr + asker, tl.where(found, odds, float("-inf")), mask=n < N)

    # The runner-up is the best of another lane or the winner lane's second. Its others are the winner's others with the winner
    # in its own place, which is no smaller: no digits cancel. Its odds are at most 0.
    block = tl.where(lost, block, tl.where(second_group >= 0, second_group * Q + lane[None, :], NO_BLOCK))
    second = tl.where(lost, best, second)
    next_top = tl.max(second, 1)
    runner_up = tl.min(tl.where(second == next_top[:, None], block, NO_BLOCK), 1)
    behind = (top - next_top) * LOG2_E
    total += tl.exp2(-shift) - tl.exp2(-behind - shift)
    odds = -(behind + shift + tl.log2(tl.maximum(total, 1e-30))) * LN_2
    found = asks & (runner_up < NO_BLOCK)
    tl.store(second_ptr + asker, tl.where(found, runner_up, -1), mask=n < N)
    tl.store(second_odds_ptr + asker, tl.where(found, odds, float("-inf")), mask=n < N)


def search_blocks(p_BTHd: Tensor, l_BTHd: Tensor, ask_BHNR: Tensor, doc_id_T: Tensor, start_block_N: Tensor,
                  local: Tensor, globals_: Tensor, most: float,
                  tiling: SearchTiling | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, D = p_BTHd.shape
    N, R = T // BLOCK, ask_BHNR.size(-1)
    G = triton.cdiv(N, GROUP)
    if tiling is None:
        tiling = SEARCH if B * H * N * R >= SMALL * SEARCH.rows else SEARCH_SMALL
    keys = torch.empty(B * H * G * GROUP * BLOCK, D, device=l_BTHd.device, dtype=l_BTHd.dtype)
    key_doc = torch.empty(B * H * G * GROUP * BLOCK, device=l_BTHd.device, dtype=torch.int32)
    _interleave_kernel[(G, B * H)](l_BTHd.contiguous(), doc_id_T, keys, key_doc, T, H, N, G, D, GROUP, BLOCK, num_warps=4)
    found = tuple(torch.empty(B, H, N, R, device=p_BTHd.device, dtype=dtype) for dtype in 2 * (torch.int32, torch.float32))
    _search_kernel[(B * H, triton.cdiv(N * R, tiling.rows))](
        p_BTHd.contiguous(), ask_BHNR.contiguous(), TensorDescriptor.from_tensor(keys, [tiling.columns, D]), key_doc, doc_id_T,
        start_block_N, local, globals_, *found, T, H, N, G, most, R, D, tiling.rows, tiling.columns, GROUP, BLOCK,
        tiling.stages, num_warps=tiling.warps, maxnreg=tiling.registers)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Admission


@triton.jit
def _nth_odds_kernel(block_ptr, odds_ptr, nth_ptr, NTH: tl.constexpr, R: tl.constexpr):
    """The NTH-largest over blocks of the highest log-odds among a tile's askers for the block; fewer blocks: -inf."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, R)
    block, odds = tl.load(block_ptr + row * R + i), tl.load(odds_ptr + row * R + i)
    before = (odds[None, :] > odds[:, None]) | ((odds[None, :] == odds[:, None]) & (i[None, :] < i[:, None]))
    before = before & (block >= 0)[None, :]
    rivals = tl.sum((before & (block[None, :] == block[:, None])).to(tl.int32), 1)
    speaks = (rivals == 0) & (block >= 0)  # one asker a block
    rank = tl.sum((before & speaks[None, :]).to(tl.int32), 1)
    tl.store(nth_ptr + row, tl.max(tl.where(speaks & (rank == NTH - 1), odds, float("-inf")), 0))


@triton.jit
def _admit_kernel(block_ptr, odds_ptr, second_ptr, second_odds_ptr, ask_ptr, nth_ptr, floor_ptr, last_ptr, num_ptr, claim_ptr,
                  time_ptr, refused_ptr, N, rank, pacing, MEMORY: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
                  BLOCK: tl.constexpr):
    """One tile: its askers in token order, the claims so far in registers."""
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, W)
    floor, last = tl.load(floor_ptr + row % N), tl.load(last_ptr + row % N)
    threshold = tl.maximum(_mean_before(nth_ptr, row, row % N, MEMORY), floor)
    claimed, time = tl.full([W], -1, tl.int32), tl.full([W], BLOCK, tl.int32)
    num, claims, refused = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for i in range(R):
        block, odds = tl.load(block_ptr + row * R + i), tl.load(odds_ptr + row * R + i)
        second, second_odds = tl.load(second_ptr + row * R + i), tl.load(second_odds_ptr + row * R + i)
        listed = tl.max((claimed == block).to(tl.int32), 0) > 0
        block, odds = tl.where(listed, second, block), tl.where(listed, second_odds, odds)
        x = tl.load(ask_ptr + row * R + i)
        bar = threshold + pacing * (tl.div_rn(claims.to(tl.float32), rank) - x.to(tl.float32) / BLOCK)
        wants = (block >= 0) & (odds > bar) & (odds > floor) & (tl.max((claimed == block).to(tl.int32), 0) == 0)
        takes = wants & (num < W)
        claims += takes.to(tl.int32)
        refused += (wants & ~takes).to(tl.int32)
        here = takes & (slot == num)
        claimed, time = tl.where(here, block, claimed), tl.where(here, x, time)
        num += takes.to(tl.int32)
        follows = takes & (block < last) & (num < W) & (tl.max((claimed == block + 1).to(tl.int32), 0) == 0)
        here = follows & (slot == num)
        claimed, time = tl.where(here, block + 1, claimed), tl.where(here, x, time)
        num += follows.to(tl.int32)
    tl.store(num_ptr + row, num)
    tl.store(refused_ptr + row, refused)
    tl.store(claim_ptr + row * W + slot, tl.maximum(claimed, 0))
    tl.store(time_ptr + row * W + slot, time)


def admit_claims(block_BHNR: Tensor, odds_BHNR: Tensor, second_BHNR: Tensor, second_odds_BHNR: Tensor, ask_BHNR: Tensor,
                 floor_N: Tensor, last_N: Tensor, slots: int, rank: int, pacing: float,
                 memory: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, R = block_BHNR.shape
    found = block, odds, *_ = [x.contiguous() for x in (block_BHNR, odds_BHNR, second_BHNR, second_odds_BHNR)]
    nth = torch.empty(B, H, N, device=odds.device, dtype=torch.float32)
    num, refused = (torch.empty(B, H, N, device=odds.device, dtype=torch.int32) for _ in range(2))
    claim, time = (torch.empty(B, H, N, slots, device=odds.device, dtype=torch.int32) for _ in range(2))
    _nth_odds_kernel[(B * H * N,)](block, odds, nth, rank, R, num_warps=4)
    _admit_kernel[(B * H * N,)](*found, ask_BHNR.contiguous(), nth, floor_N.contiguous(), last_N.contiguous(), num, claim, time,
                                refused, N, float(rank), pacing, memory, R, slots, BLOCK, num_warps=1)
    return num, claim, time, refused


# ---------------------------------------------------------------------------------------------------------------------
# Lists


@triton.jit
def _lists_kernel(claims_ptr, claim_ptr, time_ptr, start_ptr, local_ptr, globals_ptr, window_ptr, num_ptr, idx_ptr, seen_ptr,
                  H, Hp, readers, N, LOCAL: tl.constexpr, GLOBALS: tl.constexpr, WINDOW: tl.constexpr, W: tl.constexpr,
                  WIDTH: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of `selection.content_lists`; SLOTS is WIDTH or more, a power of two."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    row = bh.to(tl.int64) * N + n
    claims_row = (b * Hp + h % Hp).to(tl.int64) * N + n
    start = tl.load(start_ptr + n)
    if h < Hp:
        band = tl.minimum(tl.minimum(tl.maximum(tl.load(local_ptr), 1), LOCAL), n - start + 1)
        anchors = tl.minimum(tl.minimum(tl.maximum(tl.load(globals_ptr), 0), GLOBALS), n - start + 1 - band)
    else:
        band = tl.minimum(tl.minimum(tl.maximum(tl.load(window_ptr), 1), WINDOW), n - start + 1)
        anchors = 0
    fixed = band + anchors
    claims = tl.load(claims_ptr + claims_row, mask=(h < Hp) | (h < readers), other=0)
    farthest = tl.where(h < Hp, n, n - band)  # of a claim that the window does not hold
    slot, x = tl.arange(0, SLOTS), tl.arange(0, BLOCK)
    idx = tl.where(slot < band, n - slot, tl.where(slot < fixed, start + slot - band, 0))
    seen = tl.zeros([BLOCK], tl.int32) + fixed  # claims are in token order: a token sees a leading run of the slots
    num = fixed
    for i in range(claims):
        block = tl.load(claim_ptr + claims_row * W + i)
        kept = (block <= farthest).to(tl.int32)
        idx = tl.where((slot == num) & (kept > 0), block, idx)
        seen += (tl.load(time_ptr + claims_row * W + i) <= x).to(tl.int32) * kept
        num += kept
    tl.store(num_ptr + row, num)
    tl.store(idx_ptr + row * WIDTH + slot, idx, mask=slot < WIDTH)
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    for word in tl.static_range(WORDS):
        bits = tl.minimum(tl.maximum(seen - 32 * word, 0), 32)
        ones = tl.where(bits == 32, -1, (1 << (bits % 32)) - 1)
        tl.store(seen_ptr + (row * BLOCK + x) * WORDS + word, ones)


def write_lists(num_BHN: Tensor, block_BHNW: Tensor, time_BHNW: Tensor, start_block_N: Tensor, local: Tensor,
                globals_: Tensor, window: Tensor, local_slots: int, global_slots: int, window_slots: int,
                heads: int, readers: int) -> tuple[Tensor, Tensor, Tensor]:
    B, Hp, N, W = block_BHNW.shape
    width = list_width(local_slots, global_slots, window_slots, W, N, readers > Hp)
    num = torch.empty(B, heads, N, device=num_BHN.device, dtype=torch.int32)
    idx = torch.empty(B, heads, N, width, device=num_BHN.device, dtype=torch.int32)
    seen = torch.empty(B, heads, N * BLOCK, -(-width // 32), device=num_BHN.device, dtype=torch.int32)
    _lists_kernel[(N, B * heads)](num_BHN.contiguous(), block_BHNW.contiguous(), time_BHNW.contiguous(), start_block_N, local,
                                  globals_, window, num, idx, seen, heads, Hp, readers, N, local_slots, global_slots,
                                  window_slots, W, width, triton.next_power_of_2(width), BLOCK, num_warps=1)
    return num, idx, seen
