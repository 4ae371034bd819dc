"""The content pointers' search: which far key blocks each query block reads. Forward only, and strictly causal.

A pointer head scores a query token i against a key token j with p_i . l_j. Of every tile (a query block of 128 tokens) at
most R tokens *ask*. An asker finds its two best far blocks and the log-odds of each against all others of its past; a
tile's tokens then *claim* blocks in token order, at most W, where the log-odds exceed a threshold that the tiles before
have set: each its best, or its second where the best is listed already. A claimed block is seen from its claim on.

Every step is an operator of its own: plain PyTorch on the CPU, which is the oracle, `model.selection_triton` on a GPU.
Nothing of size [T, T] exists, and shapes depend on the arguments' shapes alone.

Shape suffixes: B batch, H pointer heads, T tokens, d pointer dim, N blocks, R askers, W claims of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.attention import BLOCK, BlockLists, Documents, pack_seen

COUNTS = (16, 32, 64, 128)  # of a tile's askers
POINTER_DIMS = (16, 32, 64)
MAX_CLAIMS = 32
MAX_LOG_ODDS = 30.0
PLAIN_SCORES = 2**24  # scores that the plain search holds at once


class Found(NamedTuple):
    """What every asker found: its best far block and its second-best. An unused slot, or none: block -1 and log-odds -inf;
    without a best there is no second."""

    block_BHNR: Tensor  # int32
    log_odds_BHNR: Tensor  # float32, nats, at most MAX_LOG_ODDS
    second_BHNR: Tensor  # int32
    second_odds_BHNR: Tensor  # float32, nats, at most 0: the best is among the others


class Claims(NamedTuple):
    """The far blocks that a tile reads, in the order in which its tokens claimed them: `time` never falls."""

    num_BHN: Tensor  # int32, how many of the W slots count
    block_BHNW: Tensor  # int32; 0 in unused slots
    time_BHNW: Tensor  # int32, position in the tile of the claiming token; BLOCK in unused slots


def _check_slots(slots: int) -> None:
    if slots not in COUNTS:
        raise ValueError(f"{slots} slots of askers are none of {', '.join(map(str, COUNTS))}")


def _check_tokens(T: int) -> None:
    if T % BLOCK:
        raise ValueError(f"{T} tokens are not a multiple of the block of {BLOCK}: pad the sequence")


# ---------------------------------------------------------------------------------------------------------------------
# Choice of askers


def _mean_before(value_BHN: Tensor, memory: int) -> Tensor:
    """Mean of the finite values of the `memory` tiles before each tile; none: -inf. Summed from the nearest on."""
    total, count = torch.zeros_like(value_BHN), torch.zeros_like(value_BHN)
    for back in range(1, memory + 1):
        value = pad(value_BHN, (back, 0), value=float("-inf"))[..., : value_BHN.size(-1)]
        finite = value > float("-inf")
        total, count = total + torch.where(finite, value, 0), count + finite
    return torch.where(count > 0, total / count.clamp(min=1), float("-inf"))


@torch.library.custom_op("scope::ask", mutates_args=())
def _ask(score_BHT: Tensor, slots: int, memory: int, pacing: float) -> Tensor:
    if score_BHT.is_cuda:
        from model.selection_triton import ask_tokens

        return ask_tokens(score_BHT, slots, memory, pacing)
    score_BHNx = score_BHT.unflatten(-1, (-1, BLOCK))
    threshold_BHN = _mean_before(score_BHNx.sort(-1, descending=True).values[..., slots // 4 - 1], memory)
    num, asks = torch.zeros_like(threshold_BHN, dtype=torch.int32), []
    for x, score_BHN in enumerate(score_BHNx.unbind(-1)):
        asks.append((num < slots) & (score_BHN > threshold_BHN + pacing * (num / slots - x / BLOCK).clamp(min=0)))
        num = num + asks[-1]
    position = torch.arange(BLOCK, device=score_BHT.device, dtype=torch.int32)
    return torch.where(torch.stack(asks, -1), position, BLOCK).sort(-1).values[..., :slots].contiguous()


@_ask.register_fake
def _(score_BHT, slots, memory, pacing):
    B, H, T = score_BHT.shape
    return score_BHT.new_empty(B, H, T // BLOCK, slots, dtype=torch.int32)


def ask(score_BHT: Tensor, slots: int, memory: int = 8, pacing: float = 32.0) -> Tensor:
    """Positions in their tile, ascending, of the at most `slots` tokens that ask, int32 [B, H, N, slots]; BLOCK in unused
    slots. In token order, as long as slots are free: the token at position x asks, after c others, if its score exceeds the
    mean, over the `memory` tiles before, of a tile's r-th largest score, r = slots / 4, by pacing * max(0, c / slots - x /
    BLOCK): most slots are kept for tiles that have more to ask than those before, and there a tile's first tokens leave some
    to its last. With a slot for every token, all ask."""
    _check_slots(slots)
    _check_tokens(score_BHT.size(-1))
    if slots == BLOCK:
        B, H, T = score_BHT.shape
        position = torch.arange(BLOCK, device=score_BHT.device, dtype=torch.int32)
        return position.expand(B, H, T // BLOCK, BLOCK).contiguous()
    return _ask(score_BHT.detach(), slots, memory, pacing)


# ---------------------------------------------------------------------------------------------------------------------
# Search


@torch.library.custom_op("scope::search", mutates_args=())
def _search(p_BTHd: Tensor, l_BTHd: Tensor, ask_BHNR: Tensor, doc_id_T: Tensor, start_block_N: Tensor,
            local: Tensor, globals_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if p_BTHd.is_cuda:
        from model.selection_triton import search_blocks

        return search_blocks(p_BTHd, l_BTHd, ask_BHNR, doc_id_T, start_block_N, local, globals_, MAX_LOG_ODDS)
    return search_plain(p_BTHd, l_BTHd, ask_BHNR, doc_id_T, start_block_N, local, globals_)


@_search.register_fake
def _(p_BTHd, l_BTHd, ask_BHNR, doc_id_T, start_block_N, local, globals_):
    return tuple(ask_BHNR.new_empty(ask_BHNR.shape, dtype=dtype) for dtype in 2 * (torch.int32, torch.float32))


def search_plain(p_BTHd: Tensor, l_BTHd: Tensor, ask_BHNR: Tensor, doc_id_T: Tensor,
                 start_block_N: Tensor, local: Tensor, globals_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle of the search, on any device: all scores of some tiles at once."""
    B, H, N, R = ask_BHNR.shape
    T, device, minus_inf = N * BLOCK, p_BTHd.device, float("-inf")
    block = torch.arange(N, device=device)
    batch, head = torch.arange(B, device=device).view(B, 1, 1, 1), torch.arange(H, device=device).view(1, H, 1, 1)
    wide = torch.promote_types(p_BTHd.dtype, torch.float32)
    key_BHdT = l_BTHd.to(wide).permute(0, 2, 3, 1)
    found = []
    tiles = max(1, PLAIN_SCORES // (B * H * R * T))
    for n in block.split(tiles):
        asks = ask_BHNR[:, :, n] < BLOCK
        at = n[:, None] * BLOCK + ask_BHNR[:, :, n].long().clamp(max=BLOCK - 1)
        score = (p_BTHd[batch, at, head].to(wide).flatten(2, 3) @ key_BHdT).unflatten(2, (len(n), R))  # [B, H, n, R, T]
        score = score.masked_fill(doc_id_T[at][..., None] != doc_id_T, minus_inf).unflatten(-1, (N, BLOCK)).amax(-1)
        own = n[:, None, None]
        score = score.masked_fill(block >= own, minus_inf)
        far = (block <= own - local) & (block >= start_block_N[n][:, None, None] + globals_)
        far_score = score.masked_fill(~far, minus_inf)
        found.append([])
        for _ in range(2):
            best = far_score.argmax(-1, keepdim=True)  # the first of equal ones
            value = far_score.gather(-1, best).squeeze(-1)
            others = score.scatter(-1, best, minus_inf).logsumexp(-1)
            some = asks & (value > minus_inf)
            found[-1] += [torch.where(some, best.squeeze(-1), -1).int(),
                          torch.where(some, (value - others).clamp(max=MAX_LOG_ODDS), minus_inf).float()]
            far_score = far_score.scatter(-1, best, minus_inf)
    return tuple(torch.cat(x, 2) for x in zip(*found, strict=True))


def search(p_BTHd: Tensor, l_BTHd: Tensor, ask_BHNR: Tensor, documents: Documents, local: Tensor,
           globals_: Tensor) -> Found:
    """Every asker's two best far blocks and their log-odds.

    For the asker i of tile n, s_ib is the maximum of p_i . l_j over the tokens j of block b < n in the document of i. Far are
    the blocks b <= n - local from the document's block start_block_N[n] + globals_ on (int32 scalars on the device). The best
    is the far block of highest s_ib (ties: the lowest), the second the best of the other far ones; a block's log-odds are its
    s_ib - log sum exp s_ib over all other blocks of the past, the near ones too, at most MAX_LOG_ODDS. On a GPU p and l are
    bfloat16.
    """
    B, T, H, d = p_BTHd.shape
    _check_tokens(T)
    _check_slots(ask_BHNR.size(-1))
    if ask_BHNR.shape[:3] != (B, H, T // BLOCK):
        raise ValueError(f"ask is {list(ask_BHNR.shape)}: {B} sequences of {T} tokens and {H} heads want "
                         f"[{B}, {H}, {T // BLOCK}, slots]")
    if l_BTHd.shape != p_BTHd.shape or d not in POINTER_DIMS:
        raise ValueError(f"p {list(p_BTHd.shape)} and l {list(l_BTHd.shape)} must have one shape, its last dimension one of "
                         f"{', '.join(map(str, POINTER_DIMS))}")
    if p_BTHd.is_cuda and not p_BTHd.dtype == l_BTHd.dtype == torch.bfloat16:
        raise ValueError(f"the search takes bfloat16 on a GPU, not {p_BTHd.dtype} and {l_BTHd.dtype}")
    return Found(*_search(p_BTHd.detach(), l_BTHd.detach(), ask_BHNR, documents.id_T, documents.start_block_N,
                          local, globals_))


# ---------------------------------------------------------------------------------------------------------------------
# Admission


@torch.library.custom_op("scope::admit", mutates_args=())
def _admit(block_BHNR: Tensor, log_odds_BHNR: Tensor, second_BHNR: Tensor, second_odds_BHNR: Tensor, ask_BHNR: Tensor,
           floor_N: Tensor, last_N: Tensor, slots: int, rank: int, pacing: float,
           memory: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if block_BHNR.is_cuda:
        from model.selection_triton import admit_claims

        return admit_claims(block_BHNR, log_odds_BHNR, second_BHNR, second_odds_BHNR, ask_BHNR, floor_N, last_N, slots, rank,
                            pacing, memory)
    return admit_plain(block_BHNR, log_odds_BHNR, second_BHNR, second_odds_BHNR, ask_BHNR, floor_N, last_N, slots, rank, pacing,
                       memory)


@_admit.register_fake
def _(block_BHNR, log_odds_BHNR, second_BHNR, second_odds_BHNR, ask_BHNR, floor_N, last_N, slots, rank, pacing, memory):
    rows = block_BHNR.shape[:3]
    return tuple(block_BHNR.new_empty(*rows, *width) for width in ((), (slots,), (slots,), ()))


def admit_plain(block_BHNR: Tensor, log_odds_BHNR: Tensor, second_BHNR: Tensor, second_odds_BHNR: Tensor, ask_BHNR: Tensor,
                floor_N: Tensor, last_N: Tensor, slots: int, rank: int, pacing: float,
                memory: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle of the admission, on any device: one asker of every tile after the other."""
    B, H, N, R = block_BHNR.shape
    device = block_BHNR.device
    # The highest log-odds of every block a tile's askers found, once a block: by block, the highest first.
    order = log_odds_BHNR.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, block_BHNR.gather(-1, order).argsort(dim=-1, stable=True))
    block, odds = block_BHNR.gather(-1, order), log_odds_BHNR.gather(-1, order)
    repeats = pad(block[..., 1:] == block[..., :-1], (1, 0))
    highest = odds.masked_fill(repeats | (block < 0), float("-inf")).sort(-1, descending=True).values
    nth_BHN = highest[..., rank - 1] if rank <= R else torch.full_like(highest[..., 0], float("-inf"))
    threshold_BHN = _mean_before(nth_BHN, memory).maximum(floor_N)

    slot = torch.arange(slots, device=device)
    num, claims, refused = torch.zeros(3, B, H, N, device=device, dtype=torch.int32)
    claimed = torch.full((B, H, N, slots), -1, device=device, dtype=torch.int32)
    time = torch.full_like(claimed, BLOCK)
    askers = zip(*(t.unbind(-1) for t in (block_BHNR, log_odds_BHNR, second_BHNR, second_odds_BHNR, ask_BHNR)), strict=True)
    for block, odds, second, second_odds, x in askers:
        listed = (claimed == block[..., None]).any(-1)
        block, odds = torch.where(listed, second, block), torch.where(listed, second_odds, odds)
        bar = threshold_BHN + pacing * (claims / rank - x / BLOCK)
        wants = (block >= 0) & (odds > bar) & (odds > floor_N) & ~(claimed == block[..., None]).any(-1)
        takes = wants & (num < slots)
        claims, refused = claims + takes.int(), refused + (wants & ~takes).int()
        for taken, one in ((block, takes), (block + 1, takes & (block < last_N))):
            one = one & (num < slots) & ~(claimed == taken[..., None]).any(-1)
            here = one[..., None] & (slot == num[..., None])
            claimed, time = torch.where(here, taken[..., None], claimed), torch.where(here, x[..., None], time)
            num = num + one.int()
    return num, claimed.clamp(min=0), time, refused


def admit(found: Found, ask_BHNR: Tensor, slots: int, rank: int, pacing: float = 4.0, memory: int = 8,
          floor_N: Tensor | None = None, last_N: Tensor | None = None) -> tuple[Claims, Tensor]:
    """Which tokens claim their best block, or their second; and, int32 [B, H, N], how many of a tile find no slot left.

    The threshold of a tile is the mean, over the `memory` tiles before, of the `rank`-th largest log-odds of a best block
    (a block counts once, with its highest; tiles that found fewer do not count), or the tile's floor (float32, nats) where
    that is higher or no tile counts. In token order, the token at position x with c claims before it claims its best block,
    or its second where a slot holds the best, if no slot holds it, one is free, and its log-odds exceed threshold + pacing *
    (c / rank - x / BLOCK) as well as the floor, which keeps heads that retrieve nothing from reading. With last_N (int32), the
    last block that each tile may claim, a claim also takes the block behind its own, into a free slot of its own, up to that
    last one: what begins near a block's end goes on there.
    """
    if slots < 1 or slots & (slots - 1) or slots > MAX_CLAIMS:
        raise ValueError(f"{slots} slots for claims are no power of two of at most {MAX_CLAIMS}")
    if rank < 1 or memory < 1:
        raise ValueError(f"rank {rank} and memory {memory} of the admission must be at least 1")
    if any(x.shape != ask_BHNR.shape for x in found):
        raise ValueError(f"blocks and log-odds {', '.join(str(list(x.shape)) for x in found)} and askers "
                         f"{list(ask_BHNR.shape)} must have one shape")
    if floor_N is None:
        floor_N = torch.full(ask_BHNR.shape[2:3], float("-inf"), device=ask_BHNR.device)
    if last_N is None:
        last_N = torch.full_like(floor_N, -1, dtype=torch.int32)
    *claims, refused_BHN = _admit(*found, ask_BHNR, floor_N, last_N, slots, rank, pacing, memory)
    return Claims(*claims), refused_BHN


def odds_floor(documents: Documents, floor: float) -> Tensor:
    """[N], the log-odds of a block that is exp(floor) times as good as the average of a tile's past: log-odds fall with the
    logarithm of the past, and a constant would stop all reading of long contexts."""
    past_N = torch.arange(len(documents.start_block_N), device=documents.id_T.device) - documents.start_block_N
    return floor - past_N.clamp(min=1).float().log()


def far_end(documents: Documents, local: Tensor) -> Tensor:
    """int32 [N], the last far block of each tile: behind it lies the local band."""
    start_N = documents.start_block_N
    return torch.arange(len(start_N), device=start_N.device, dtype=torch.int32) - local


# ---------------------------------------------------------------------------------------------------------------------
# Lists


@torch.library.custom_op("scope::content_lists", mutates_args=())
def _content_lists(num_BHN: Tensor, block_BHNW: Tensor, time_BHNW: Tensor, start_block_N: Tensor, local: Tensor,
                   globals_: Tensor, window: Tensor, local_slots: int, global_slots: int, window_slots: int,
                   heads: int, readers: int) -> tuple[Tensor, Tensor, Tensor]:
    if num_BHN.is_cuda:
        from model.selection_triton import write_lists

        return write_lists(num_BHN, block_BHNW, time_BHNW, start_block_N, local, globals_, window, local_slots, global_slots,
                           window_slots, heads, readers)
    B, Hp, N, W = block_BHNW.shape
    own, head = torch.arange(N, device=num_BHN.device), torch.arange(heads, device=num_BHN.device)
    points = head[:, None] < Hp
    width = list_width(local_slots, global_slots, window_slots, W, N, readers > Hp)
    reach = own - start_block_N + 1  # blocks of the document so far
    band = torch.where(points, local.clamp(1, local_slots), window.clamp(1, window_slots)).minimum(reach)  # [H, N]
    fixed = band + torch.where(points, globals_.clamp(0, global_slots), 0).minimum(reach - band)
    band, fixed = band[..., None], fixed[..., None]
    claim_block, claim_time = block_BHNW[:, head % Hp], time_BHNW[:, head % Hp]
    kept = torch.arange(W, device=num_BHN.device) < num_BHN[:, head % Hp, :, None]
    kept &= points[..., None] | ((head[:, None, None] < readers) & (claim_block <= own[:, None] - band))  # not in the window
    num_claims, order = kept.sum(-1, keepdim=True, dtype=torch.int32), (~kept).int().argsort(dim=-1, stable=True)
    claim_block, claim_time = claim_block.gather(-1, order), claim_time.gather(-1, order)
    slot = torch.arange(width, device=num_BHN.device)
    claim = (slot - fixed).clamp(0, W - 1).expand(B, heads, N, width)
    is_claim = (slot >= fixed) & (slot < fixed + num_claims)
    near = torch.where(slot < band, own[:, None] - slot, start_block_N[:, None] + slot - band)
    idx = torch.where(slot < fixed, near, torch.where(is_claim, claim_block.gather(-1, claim), 0)).int()
    first_seen = torch.where(is_claim, claim_time.gather(-1, claim), torch.where(slot < fixed, 0, BLOCK))
    position = torch.arange(BLOCK, device=num_BHN.device)[:, None]
    seen = pack_seen((position >= first_seen[..., None, :]).flatten(2, 3))
    return (fixed + num_claims)[..., 0].int(), idx.contiguous(), seen


@_content_lists.register_fake
def _(num_BHN, block_BHNW, time_BHNW, start_block_N, local, globals_, window, local_slots, global_slots, window_slots, heads,
      readers):
    B, Hp, N, W = block_BHNW.shape
    width = list_width(local_slots, global_slots, window_slots, W, N, readers > Hp)
    return (num_BHN.new_empty(B, heads, N), num_BHN.new_empty(B, heads, N, width),
            num_BHN.new_empty(B, heads, N * BLOCK, -(-width // 32)))


def list_width(local_slots: int, global_slots: int, window_slots: int, claims: int, blocks: int, shared: bool = False) -> int:
    return min(max(local_slots + global_slots + claims, window_slots + (claims if shared else 0)), blocks)


def content_lists(claims: Claims, documents: Documents, local: Tensor, globals_: Tensor, window: Tensor, local_slots: int,
                  global_slots: int, window_slots: int, heads: int, readers: int = 0) -> BlockLists:
    """The lists of all `heads` attention heads. The first ones, one of `claims` each: the local band (own block, the one
    before, ..., at most `local`), the anchors (the document's first `globals_` blocks, where the band does not hold them), and
    the claims, seen from the claiming token on; ids are distinct if the claims come from a `search` with the same `local` and
    `globals_`. The other heads: a sliding window of `window` blocks, and those among the first `readers` heads the claims of
    head h % P, P pointer heads, that the window does not hold. The three are int32 scalars on the device, of at most so many
    slots; the width is that of the wider kind, whatever the schedule says."""
    Hp = claims.num_BHN.size(1)
    if heads < max(Hp, readers):
        raise ValueError(f"{heads} attention heads cannot be {Hp} pointer heads and {readers} readers")
    if local_slots < 1 or global_slots < 0 or window_slots < 1:
        raise ValueError(f"{local_slots} local, {global_slots} global and {window_slots} window slots: at least 1, 0 and 1 are "
                         f"needed")
    return BlockLists(*_content_lists(*claims, documents.start_block_N, local, globals_, window, local_slots, global_slots,
                                      window_slots, heads, readers))


@torch.library.custom_op("scope::append_claims", mutates_args=())
def _append_claims(num_BHN: Tensor, idx_BHNW: Tensor, claimed_BHN: Tensor, block_BHNC: Tensor,
                   time_BHNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, W = idx_BHNW.shape
    Hp, C = block_BHNC.size(1), block_BHNC.size(-1)
    width, device = min(W + C, N), idx_BHNW.device
    slot, position = torch.arange(W, device=device), torch.arange(BLOCK, device=device, dtype=torch.int32)
    listed = (slot < num_BHN[:, :Hp, :, None])[..., None, :]
    double = ((block_BHNC[..., None] == idx_BHNW[:, :Hp, :, None]) & listed).any(-1)
    kept = (torch.arange(C, device=device) < claimed_BHN[..., None]) & ~double
    place = torch.where(kept, num_BHN[:, :Hp, :, None] + kept.cumsum(-1) - 1, width).long()  # behind the end: dropped
    idx, first_seen = pad(idx_BHNW, (0, C + 1)), torch.where(slot < num_BHN[..., None], 0, BLOCK).int()
    first_seen = pad(first_seen, (0, C + 1), value=BLOCK)
    idx[:, :Hp] = idx[:, :Hp].scatter(-1, place, block_BHNC)
    first_seen[:, :Hp] = first_seen[:, :Hp].scatter(-1, place, time_BHNC)
    num = num_BHN.clone()
    num[:, :Hp] += kept.sum(-1, dtype=torch.int32)
    seen = torch.zeros(B, H, N, BLOCK, -(-width // 32), device=device, dtype=torch.int32)
    for w in range(width):  # slot by slot: the booleans of all slots would be many times the words
        seen[..., w // 32] |= (position >= first_seen[..., w, None]).int() << (w % 32)
    return num, idx[..., :width].contiguous(), seen.flatten(2, 3)


@_append_claims.register_fake
def _(num_BHN, idx_BHNW, claimed_BHN, block_BHNC, time_BHNC):
    B, H, N, W = idx_BHNW.shape
    width = min(W + block_BHNC.size(-1), N)
    return (num_BHN.new_empty(B, H, N), idx_BHNW.new_empty(B, H, N, width),
            num_BHN.new_empty(B, H, N * BLOCK, -(-width // 32)))


def append_claims(lists: BlockLists, claims: Claims) -> BlockLists:
    """Lists that hold the first heads' claims, one of `claims` each, behind what they hold already; what stands in a list
    already, for all its tokens to see, is not claimed again. At most min(slots + W, N) slots."""
    return BlockLists(*_append_claims(*lists[:2], *claims))
