"""Published sparse attention of others behind one call each, as far as it can be imported.

flash-linear-attention (wheels flash-linear-attention and fla-core, pure Python) has NSA [Yuan et al. 2025] and MoBA
[Lu et al. 2025]; MoBA calls the package flash-attn, in whose absence PyTorch's build of the same FlashAttention-2 kernels
takes its place. Shapes here are [B, T, H, D].
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


class NotImportable(Exception):
    """A peer whose package is not installed, or does not import here."""


def require(module: str, package: str):
    try:
        return importlib.import_module(module)
    except Exception as error:  # packages of kernels fail at import in many ways: each means that this peer is not here
        raise NotImportable(f"not importable: {package} ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from None


def native_sparse(block: int, selected: int) -> tuple[Callable, Callable, Callable]:
    """(attention over given blocks, the whole of it, the choice of blocks) of NSA: compression and selection, no window."""
    nsa = require("fla.ops.nsa.parallel", "flash-linear-attention")

    def choose(q, k, v) -> Tensor:
        """Each token's best blocks by its compressed attention, [B, T, H_kv, selected]."""
        with torch.no_grad():
            k, v = nsa.mean_pooling(k, block), nsa.mean_pooling(v, block)
            sizes = dict(TK=q.size(1), block_size=block, scale=q.size(-1) ** -0.5)
            _, lse = nsa.parallel_nsa_compression(q=q, k=k, v=v, **sizes)
            return nsa.parallel_nsa_topk(q=q, k=k, lse=lse, block_counts=selected, **sizes)

    def attend(q, k, v, chosen) -> Tensor:
        return nsa.parallel_nsa(q, k, v, block_indices=chosen, block_counts=selected, block_size=block)

    def everything(q, k, v) -> Tensor:
        gate = q.new_full(q.shape[:3], 0.5)
        return nsa.parallel_nsa(q, k, v, g_cmp=gate, g_slc=gate, block_counts=selected, block_size=block)

    return attend, everything, choose


def mixture_of_blocks(chunk: int, selected: int) -> tuple[Callable, str]:
    """MoBA with `selected` chunks a token, its own included, and whose FlashAttention-2 it runs on."""
    moba = require("fla.ops.moba.parallel", "flash-linear-attention")
    whose = "flash-attn"
    if moba.flash_attn_varlen_func is None:
        whose = "PyTorch's FlashAttention-2"
        moba.flash_attn_varlen_func = lambda *args, **kwargs: _varlen_forward(*args, **kwargs)[0]
        moba._flash_attn_varlen_forward, moba._flash_attn_varlen_backward = _varlen_forward, _varlen_backward

    def attend(q, k, v) -> Tensor:
        T = q.size(1)
        bounds = torch.tensor([0, T], dtype=torch.int32, device=q.device)
        return moba.parallel_moba(q, k, v, cu_seqlens=bounds, max_seqlen=T, chunk_size=chunk, topk=selected)

    return attend, whose


def _varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, dropout_p):
    """flash-attn's forward over packed sequences, on PyTorch's own operator: out, lse [H, tokens] and two of no use here."""
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                                   causal, False, scale=softmax_scale)[:4]


def _varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                     softmax_scale, causal, dropout_p, **_):
    """The same of its backward, which writes into dq, dk and dv."""
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is off
    grads = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, state,
        state.new_empty(()), scale=softmax_scale)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)
