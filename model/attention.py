"""Block-sparse causal attention over fixed-width lists of key blocks: one interface, its backends, its oracle.

A sequence of T tokens is cut into N = T / 128 blocks. For every query block a `BlockLists` row names the key blocks it
may read; inside a listed block token i sees token j iff j <= i, both belong to the same document, and, where the lists say
so token by token, i sees the block's slot. No backend ever holds a [T, T] tensor.

Shape suffixes: B batch, H heads (1: shared by all heads), T tokens, N blocks, W list slots, D head dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128  # tokens in one block
REFERENCE_ROWS = 64  # query blocks that the reference gathers at once, to bound its memory
BACKENDS = ("reference", "flex", "flex_standalone", "triton")
TRITON_CAPABILITY = (9, 0)  # Hopper: the kernels read by TMA
TRITON_HEAD_DIMS = (16, 32, 64, 128)
MAX_TABLE_BLOCKS = 1024  # FlexAttention's transpose of per-head lists is an [N, N] table, allowed up to 128k tokens


class Documents(NamedTuple):
    """Where documents lie in one packed sequence; the delimiter opens its document."""

    id_T: Tensor  # int32, counts delimiters so far
    start_block_N: Tensor  # int32, block that holds the first token of the document of each block's first token

    @classmethod
    def of(cls, tokens_T: Tensor, delimiter: int) -> "Documents":
        opens_T = tokens_T == delimiter
        position_T = torch.arange(len(tokens_T), device=tokens_T.device)
        start_T = torch.where(opens_T, position_T, 0).cummax(0).values
        return cls(opens_T.cumsum(0, dtype=torch.int32), (start_T[::BLOCK] // BLOCK).int())


class BlockLists(NamedTuple):
    """Key blocks read by each query block: distinct ids <= the query block's own."""

    num_BHN: Tensor  # int32, how many of the W slots count
    idx_BHNW: Tensor  # int32; slots past `num` hold some valid id
    seen_BHTw: Tensor | None = None  # int32 words, bit w % 32 of word w // 32: the token sees slot w; None: all see all
    prepared: tuple[Tensor, ...] = ()  # what a backend works out of them, where several layers share it: `prepare`
    readers: int | None = None  # a bound on the query blocks that list one key block, where one is known


def pack_seen(seen_BHTW: Tensor) -> Tensor:
    """Booleans per (token, slot) as the bit words of `BlockLists.seen_BHTw`."""
    words = -(-seen_BHTW.size(-1) // 32)
    bits = torch.nn.functional.pad(seen_BHTW.long(), (0, 32 * words - seen_BHTW.size(-1))).unflatten(-1, (words, 32))
    word = (bits << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).int()


def unpack_seen(seen_BHTw: Tensor, slots: int) -> Tensor:
    return ((seen_BHTw[..., None] >> torch.arange(32, device=seen_BHTw.device)) & 1).bool().flatten(-2)[..., :slots]


def prepare(lists: BlockLists, documents: Documents, *, backend: str, needs_grad: bool) -> BlockLists:
    """Work out once what `backend` makes of the lists; for lists that several layers share."""
    if backend == "triton":
        from model.attention_triton import split_lists

        return lists._replace(prepared=tuple(split_lists(lists.num_BHN, lists.idx_BHNW, documents.id_T,
                                                         lists.seen_BHTw is not None, needs_grad)))
    return lists if backend == "reference" else _prepare_flex(lists, documents, needs_grad)


def pointer_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, lists: BlockLists, documents: Documents, *,
                      scale: float, backend: str, bias=None) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the listed blocks, causal and within the document: [B, H, T, Dv], and the
    log-sum-exp of its logits [B, H, T], with which branches are merged. A token that sees nothing gets 0 and -inf.

    `bias` is None or a `model.attn_bias.BiasCoefficients`, in logits after the scale. `backend` is `reference` (plain
    PyTorch, any device, the oracle), `flex` (FlexAttention inside a compiled graph; a bias becomes its score_mod),
    `flex_standalone` (FlexAttention compiled by itself, behind a graph break) or `triton` (our kernels, bf16 on a GPU; a
    bias becomes a second dot product). ValueError says which lengths, widths and backends do not go together.
    """
    T = q_BHTD.size(2)
    if T % BLOCK:
        raise ValueError(f"{T} tokens are not a multiple of the block of {BLOCK}: pad the sequence")
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "reference":
        return _reference(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, bias)
    needs_grad = torch.is_grad_enabled() and (q_BHTD.requires_grad or k_BHTD.requires_grad or v_BHTD.requires_grad)
    if backend == "triton":
        from model.attention_triton import triton_attention

        if not lists.prepared:
            lists = prepare(lists, documents, backend=backend, needs_grad=needs_grad)
        features = None if bias is None else (bias.query_features(), bias.tables.key_TF)
        return triton_attention(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, features)
    run = _flex if backend == "flex" else _flex_standalone
    return run(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, bias, needs_grad)


# ---------------------------------------------------------------------------------------------------------------------
# reference


def _reference(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, bias):
    B, H, T, D = q_BHTD.shape
    N, W, device = T // BLOCK, lists.idx_BHNW.size(-1), q_BHTD.device
    # All W slots, also where the fullest list is shorter: a width read off the lists would let a later token change the
    # rounding of earlier outputs.
    num_BHN, idx_BHNW = lists.num_BHN.expand(B, H, N), lists.idx_BHNW.expand(B, H, N, W).long()
    first_row_BH = torch.arange(B * H, device=device).view(B, H, 1, 1) * N
    position_NM = torch.arange(T, device=device).view(N, BLOCK)
    out, lse = [], []
    for start in range(0, N, REFERENCE_ROWS):
        rows = slice(start, min(start + REFERENCE_ROWS, N))
        idx, n = idx_BHNW[:, :, rows], min(start + REFERENCE_ROWS, N) - start
        # One flat row per (batch, head, block): the backward of index_select adds in a fixed order, so it is
        # deterministic where the atomic adds of advanced indexing are not.
        k, v = (x.reshape(B * H * N, BLOCK * x.size(-1)).index_select(0, (first_row_BH + idx).flatten())
                .view(B, H, n, W * BLOCK, x.size(-1)) for x in (k_BHTD, v_BHTD))
        kv_index = position_NM[idx].view(B, H, n, 1, W * BLOCK)
        q_index = position_NM[rows, :, None]
        listed = torch.arange(W, device=device) < num_BHN[:, :, rows, None]
        visible = (listed.repeat_interleave(BLOCK, -1)[:, :, :, None] & (kv_index <= q_index)
                   & (documents.id_T[kv_index] == documents.id_T[q_index]))
        scores = q_BHTD.reshape(B, H, N, BLOCK, D)[:, :, rows] @ k.mT * scale
        if lists.seen_BHTw is not None:
            seen = unpack_seen(lists.seen_BHTw, W).expand(B, H, T, W).view(B, H, N, BLOCK, W)[:, :, rows]
            visible = visible & seen.repeat_interleave(BLOCK, -1)
        if bias is not None:
            scores = scores + bias.at(q_index, kv_index)
        blind = ~visible.any(-1, keepdim=True)  # rows that see nothing: a softmax of -inf alone would be NaN
        scores = scores.masked_fill(~(visible | blind), float("-inf"))
        p = scores.softmax(-1)
        out.append((p @ v).masked_fill(blind, 0))
        # log sum exp s = s_max - log p_max, without another pass of exponentials
        lse.append((scores.amax(-1) - p.amax(-1).log()).masked_fill(blind[..., 0], float("-inf")))
    return torch.cat(out, dim=2).view(B, H, T, -1), torch.cat(lse, dim=2).view(B, H, T)


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention


@torch.library.custom_op("scope::flex_lists", mutates_args=())
def flex_lists(num_BHN: Tensor, idx_BHNW: Tensor, doc_id_T: Tensor, q_width: int, seen: bool) -> list[Tensor]:
    """Split lists into partial blocks (element mask needed; all, if tokens see slots of their own) and full ones, and
    transpose both.

    Returns num, idx for partial and full blocks, then for q_width > 0 the same of the transpose, whose rows have
    q_width slots, then for `seen` the slot [B, H, N, N] in which a query block lists a key block. An operator of its own,
    because the kernels rely on contiguous lists and the compiler may permute the layout of buffers that it computes itself.
    Partial and full lists share one shape: torch 2.11 reads both with the strides of the first.
    """
    N = idx_BHNW.size(2)
    first_N, last_N = doc_id_T.view(N, BLOCK)[:, 0], doc_id_T.view(N, BLOCK)[:, -1]
    one_doc_N = first_N == last_N
    query = torch.arange(N, device=idx_BHNW.device)[:, None]
    key = idx_BHNW.long()
    listed = torch.arange(idx_BHNW.size(-1), device=idx_BHNW.device) < num_BHN[..., None]
    same_doc = one_doc_N[query] & one_doc_N[key] & (first_N[query] == first_N[key])
    full = listed & (key < query) & same_doc & (not seen)
    out = []
    for kept in (listed & ~full, full):
        order = kept.int().argsort(dim=-1, descending=True, stable=True)
        out += [kept.sum(-1, dtype=torch.int32), idx_BHNW.gather(-1, order)]
    if q_width:
        for num, idx in (out[0:2], out[2:4]):
            out += transpose_lists(num, idx, q_width)
    if seen:
        slots = torch.arange(idx_BHNW.size(-1), device=idx_BHNW.device, dtype=torch.int32).expand_as(idx_BHNW)
        table = slots.new_zeros(*idx_BHNW.shape[:3], N + 1)  # what is not listed goes to the last column
        out.append(table.scatter(-1, torch.where(listed, key, N), slots)[..., :N].contiguous())
    return out


@flex_lists.register_fake
def _(num_BHN, idx_BHNW, doc_id_T, q_width, seen):
    lists = [torch.empty_like(num_BHN, memory_format=torch.contiguous_format),
             torch.empty_like(idx_BHNW, memory_format=torch.contiguous_format)]
    transposed = [torch.empty_like(lists[0]), num_BHN.new_empty(*num_BHN.shape, q_width)]
    table = [num_BHN.new_empty(*num_BHN.shape, num_BHN.size(-1))] if seen else []
    return [t.clone() for t in (lists * 2 + (transposed * 2 if q_width else []) + table)]


def transpose_lists(num_BHN: Tensor, idx_BHNW: Tensor, q_width: int) -> list[Tensor]:
    """For every key block the query blocks that list it, ascending: one sort of the (key, query) pairs, static shapes."""
    B, H, N, W = idx_BHNW.shape
    device = idx_BHNW.device
    listed = torch.arange(W, device=device) < num_BHN[..., None]
    pairs = torch.where(listed, idx_BHNW.long() * N + torch.arange(N, device=device)[:, None], N * N)
    pairs = pairs.view(B, H, N * W).sort(-1).values
    bounds = (torch.arange(N + 1, device=device) * N).expand(B, H, N + 1).contiguous()
    start = torch.searchsorted(pairs, bounds)
    slot = (start[..., :-1, None] + torch.arange(q_width, device=device)).clamp(max=N * W - 1)
    q_idx = (pairs.gather(-1, slot.view(B, H, N * q_width)) % N).int().view(B, H, N, q_width)
    return [start.diff(dim=-1).int(), q_idx]


def _prepare_flex(lists: BlockLists, documents: Documents, needs_grad: bool) -> BlockLists:
    """A sliding window's transpose is as narrow as it is (`readers`); a hub block of other lists can be read by every query
    block, so there the transpose has N slots. Visibility by token needs the slot of a key block, another [N, N] table."""
    N, W = lists.idx_BHNW.shape[2:]
    seen, readers = lists.seen_BHTw is not None, lists.readers or N
    if N > MAX_TABLE_BLOCKS and (seen or (needs_grad and readers == N)):
        raise ValueError(f"FlexAttention's {'visibility by token' if seen else 'backward over pointer lists'} is limited to "
                         f"{MAX_TABLE_BLOCKS * BLOCK} tokens (it needs a [{N}, {N}] table): shorten the sequence or take "
                         f"ATTN_BACKEND=triton")
    q_width = min(readers, N) if needs_grad else 0
    parts = flex_lists(lists.num_BHN, lists.idx_BHNW, documents.id_T, q_width, seen)
    if seen:
        parts = [*parts, unpack_seen(lists.seen_BHTw, W).to(torch.int8)]
    return lists._replace(prepared=tuple(parts))


def flex_block_mask(lists: BlockLists, documents: Documents) -> BlockMask:
    T, doc_id_T, parts = len(documents.id_T), documents.id_T, lists.prepared
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
             "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")

    def document_causal(b, h, q, kv):
        return (q >= kv) & (doc_id_T[q] == doc_id_T[kv])

    mask_mod = document_causal
    if lists.seen_BHTw is not None:
        *parts, slot_BHNN, seen_BHTW = parts
        batched, by_head = slot_BHNN.size(0) > 1, slot_BHNN.size(1) > 1

        def mask_mod(b, h, q, kv):
            b, h = b if batched else 0, h if by_head else 0
            return document_causal(b, h, q, kv) & (seen_BHTW[b, h, q, slot_BHNN[b, h, q // BLOCK, kv // BLOCK]] != 0)

    parts = dict.fromkeys(names) | dict(zip(names, parts, strict=False))  # no transpose without a backward
    return BlockMask(seq_lengths=(T, T), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod, **parts)


def _flex(q_BHTD, k_BHTD, v_BHTD, lists, documents, scale, bias, needs_grad, attend=flex_attention):
    if not lists.prepared:  # here, behind any graph break: torch 2.11 cannot carry a replaced NamedTuple over one
        lists = _prepare_flex(lists, documents, needs_grad)
    score_mod = None if bias is None else bias.score_mod()
    out, aux = attend(q_BHTD, k_BHTD, v_BHTD, score_mod=score_mod, block_mask=flex_block_mask(lists, documents), scale=scale,
                      return_aux=AuxRequest(lse=True))
    return out, aux.lse


_compiled_flex = torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable
def _flex_standalone(*args):
    return _flex(*args, attend=_compiled_flex)
