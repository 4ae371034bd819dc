"""The frozen baseline arm: the modded-nanogpt medium track's record 5 recipe, on any number of processes.

    torchrun --standalone --nproc_per_node=8 baseline.py        # the record's setting: 8 GPUs, one 64k sequence each
    python baseline.py                                          # one process, GPU or CPU: same batch by accumulation

This file stands alone and is never edited (tests/test_baseline.py holds its sha256; SPEC.md says what may change it).
Every field of `Hyperparameters` can be set by the environment variable of the same name in capitals.

Shape suffixes: B batch (always 1), T tokens, H heads, D head dim, N blocks of 128 tokens, W list slots, V vocabulary.
"""

import copy
import glob
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # tokens in one block of the attention mask
ATTENTION_SCALE = 0.12
LOGIT_CAP, LOGIT_TEMPERATURE = 30.0, 7.5
FP8_X_SCALE, FP8_W_SCALE, FP8_GRAD_SCALE = 0.5, 2.0**-9, 2.0**-19
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


@dataclass(frozen=True)
class Hyperparameters:
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    doc_delimiter: int = 50256  # opens every document
    batch_tokens: int = 8 * 64 * 1024  # global, whatever the number of processes
    train_seq_len: int = 64 * 1024
    val_seq_len: int = 4 * 64 * 1024
    val_tokens: int = 10_485_760
    # model
    vocab_size: int = 50257
    num_layers: int = 16
    num_heads: int = 8
    head_dim: int = 128
    model_dim: int = 1024
    # optimisation
    num_iterations: int = 6950
    cooldown_frac: float = 0.6
    window_blocks: float = 13.5  # the long window grows from 1 to ceil(this) blocks
    warmup_steps: int = 10  # untimed, on random tokens; the state is restored afterwards
    val_loss_every: int = 125  # 0: only at the end
    seed: int = 0
    log_dir: str = "logs"
    run_name: str = "baseline"

    @classmethod
    def from_environment(cls) -> "Hyperparameters":
        values = {}
        for field in fields(cls):
            variable, kind = field.name.upper(), type(field.default)
            if variable in os.environ:
                try:
                    values[field.name] = kind(os.environ[variable])
                except ValueError:
                    raise SystemExit(f"error: {variable}={os.environ[variable]!r} is not of type {kind.__name__}") from None
        args = cls(**values)
        for name, least in dict(batch_tokens=1, train_seq_len=1, val_seq_len=1, val_tokens=1, vocab_size=1, num_layers=2,
                                num_heads=1, head_dim=4, model_dim=1, num_iterations=1, val_loss_every=0).items():
            if getattr(args, name) < least:
                raise SystemExit(f"error: {name.upper()}={getattr(args, name)} must be at least {least}")
        if args.head_dim % 4:
            raise SystemExit(f"error: HEAD_DIM={args.head_dim} is not a multiple of 4")
        if not (0 < args.window_blocks < math.inf and 0 <= args.cooldown_frac <= 1):
            raise SystemExit(f"error: WINDOW_BLOCKS={args.window_blocks} must be positive and "
                             f"COOLDOWN_FRAC={args.cooldown_frac} between 0 and 1")
        for name in ("train_seq_len", "val_seq_len"):
            if getattr(args, name) % BLOCK:
                raise SystemExit(f"error: {name.upper()}={getattr(args, name)} is not a multiple of {BLOCK}")
        for total, part in (("batch_tokens", "train_seq_len"), ("val_tokens", "val_seq_len")):
            if getattr(args, total) % getattr(args, part):
                raise SystemExit(f"error: {total.upper()}={getattr(args, total)} is not a multiple of "
                                 f"{part.upper()}={getattr(args, part)}")
        return args


# ---------------------------------------------------------------------------------------------------------------------
# FP8 head: e4m3 activations and weights, e5m2 gradients, fixed scales


@torch.library.custom_op("baseline::fp8_linear", mutates_args=())
def fp8_linear(x_TC: Tensor, w_VC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x @ w.T in FP8; returns bf16 logits and the two quantised operands that the backward needs."""
    x8 = x_TC.div(FP8_X_SCALE).to(torch.float8_e4m3fn)
    largest = torch.finfo(torch.float8_e4m3fn).max  # weights reach it, and a plain cast would make NaN of what is beyond
    w8 = w_VC.div(FP8_W_SCALE).clamp_(-largest, largest).to(torch.float8_e4m3fn)
    out = torch._scaled_mm(x8, w8.T, out_dtype=torch.bfloat16, scale_a=x_TC.new_full((), FP8_X_SCALE, dtype=torch.float32),
                           scale_b=x_TC.new_full((), FP8_W_SCALE, dtype=torch.float32), use_fast_accum=True)
    return out, x8, w8


@fp8_linear.register_fake
def _(x_TC, w_VC):
    return (x_TC.new_empty(x_TC.size(0), w_VC.size(0), dtype=torch.bfloat16),
            torch.empty_like(x_TC, dtype=torch.float8_e4m3fn), torch.empty_like(w_VC, dtype=torch.float8_e4m3fn))


@torch.library.custom_op("baseline::fp8_linear_backward", mutates_args=())
def fp8_linear_backward(grad_TV: Tensor, x8: Tensor, w8: Tensor) -> tuple[Tensor, Tensor]:
    x_scale, w_scale, grad_scale = (grad_TV.new_full((), s, dtype=torch.float32)
                                    for s in (FP8_X_SCALE, FP8_W_SCALE, FP8_GRAD_SCALE))
    grad8 = grad_TV.div(FP8_GRAD_SCALE).to(torch.float8_e5m2)
    grad_x = torch._scaled_mm(grad8, w8.T.contiguous().T, out_dtype=torch.bfloat16,
                              scale_a=grad_scale, scale_b=w_scale, use_fast_accum=False)
    grad_w = torch._scaled_mm(x8.T.contiguous(), grad8.T.contiguous().T, out_dtype=torch.float32,
                              scale_a=x_scale, scale_b=grad_scale, use_fast_accum=False).T
    return grad_x, grad_w.contiguous()


@fp8_linear_backward.register_fake
def _(grad_TV, x8, w8):
    return torch.empty_like(x8, dtype=torch.bfloat16), torch.empty_like(w8, dtype=torch.float32)


def _fp8_setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])


def _fp8_backward(ctx, grad_TV, _x8, _w8):
    return fp8_linear_backward(grad_TV.contiguous(), *ctx.saved_tensors)


fp8_linear.register_autograd(_fp8_backward, setup_context=_fp8_setup_context)


def fp8_available(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Sliding-window, document-causal attention over lists of blocks


@dataclass(frozen=True)
class WindowLists:
    """The key blocks that each query block reads, nearest first, split by whether the element mask is needed."""
    docs_T: Tensor
    num_N: Tensor  # all listed blocks: block i reads i, i-1, ..., i-num+1
    idx_NW: Tensor
    block_mask: BlockMask | None  # the same lists for FlexAttention (None on CPU)


def compact(keep_NW: Tensor, idx_NW: Tensor) -> tuple[Tensor, Tensor]:
    """Move the kept entries of every row to its front, in order; shapes [1, 1, N] and [1, 1, N, W]."""
    order = keep_NW.int().argsort(dim=-1, descending=True, stable=True)
    return keep_NW.sum(-1, dtype=torch.int32)[None, None], idx_NW.gather(-1, order).int()[None, None].contiguous()


def window_lists(tokens_T: Tensor, delimiter: int, window: Tensor, width: int) -> WindowLists:
    """Query block i reads key block j iff 0 <= i-j < max(window, 1) and their documents overlap."""
    docs_T = (tokens_T == delimiter).cumsum(0, dtype=torch.int32)
    n = len(tokens_T) // BLOCK
    low_N, high_N = docs_T.view(n, BLOCK)[:, 0], docs_T.view(n, BLOCK)[:, -1]
    i_N1 = torch.arange(n, device=tokens_T.device)[:, None]
    offset_W = torch.arange(min(width, n), device=tokens_T.device)
    j_NW = i_N1 - offset_W
    idx_NW = j_NW.clamp(min=0)
    listed_NW = (offset_W < window.clamp(min=1)) & (j_NW >= 0) & (low_N[i_N1] <= high_N[idx_NW])
    block_mask = None
    if tokens_T.is_cuda:
        one_doc_N = low_N == high_N
        full_NW = listed_NW & (offset_W > 0) & one_doc_N[i_N1] & one_doc_N[idx_NW] & (low_N[i_N1] == low_N[idx_NW])
        # Transpose for the backward: key block j is read by query block j + offset.
        q_NW = i_N1 + offset_W
        q_idx_NW = q_NW.clamp(max=n - 1)
        seen = [(lists[q_idx_NW, offset_W] & (q_NW < n)) for lists in (listed_NW & ~full_NW, full_NW)]
        kv_num, kv_idx = compact(listed_NW & ~full_NW, idx_NW)
        full_num, full_idx = compact(full_NW, idx_NW)
        q_num, q_idx = compact(seen[0], q_idx_NW)
        full_q_num, full_q_idx = compact(seen[1], q_idx_NW)

        def document_causal(b, h, q, kv):
            return (q >= kv) & (docs_T[q] == docs_T[kv])

        block_mask = BlockMask(seq_lengths=(len(tokens_T), len(tokens_T)), kv_num_blocks=kv_num, kv_indices=kv_idx,
                               full_kv_num_blocks=full_num, full_kv_indices=full_idx, q_num_blocks=q_num,
                               q_indices=q_idx, full_q_num_blocks=full_q_num, full_q_indices=full_q_idx,
                               BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=document_causal)
    return WindowLists(docs_T, listed_NW.sum(-1), idx_NW, block_mask)


def block_gather_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, lists: WindowLists) -> Tensor:
    """The same attention in plain PyTorch (FlexAttention has no CPU backward): gather the listed blocks, mask, softmax."""
    B, H, T, D = q_BHTD.shape
    N, W = lists.idx_NW.shape
    # One flat row per (batch, head, block): the backward of index_select adds in a fixed order, hence deterministic.
    rows = torch.arange(B * H, device=q_BHTD.device).view(B, H, 1, 1) * N + lists.idx_NW
    k_BHNSD, v_BHNSD = (x.reshape(B * H * N, BLOCK * D).index_select(0, rows.flatten()).view(B, H, N, W * BLOCK, D)
                        for x in (k_BHTD, v_BHTD))
    position = torch.arange(T, device=q_BHTD.device).view(N, BLOCK)
    kv_NS, q_NM = position[lists.idx_NW].view(N, 1, W * BLOCK), position[:, :, None]
    listed_NS = (torch.arange(W, device=q_BHTD.device) < lists.num_N[:, None]).repeat_interleave(BLOCK, 1)[:, None]
    visible_NMS = listed_NS & (kv_NS <= q_NM) & (lists.docs_T[kv_NS] == lists.docs_T[q_NM])
    scores = q_BHTD.reshape(B, H, N, BLOCK, D) @ k_BHNSD.mT * ATTENTION_SCALE
    weights = scores.masked_fill(~visible_NMS, float("-inf")).softmax(-1)
    return (weights @ v_BHNSD).view(B, H, T, D)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def uniform_weight(*shape: int) -> nn.Parameter:
    bound = 3**0.5 * 0.5 * shape[-1] ** -0.5  # half the usual standard deviation of a linear layer
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Rotary(nn.Module):
    """Rotary embedding of half the frequencies; the other half of the dimensions does not rotate."""

    def __init__(self, head_dim: int, max_seq_len: int):
        super().__init__()
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float64)
        frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 4)])
        theta = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequency)
        self.register_buffer("cos", theta.cos().float(), persistent=False)
        self.register_buffer("sin", theta.sin().float(), persistent=False)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        cos, sin = (t[None, : x_BTHD.size(1), None] for t in (self.cos, self.sin))
        x1, x2 = x_BTHD.float().chunk(2, dim=-1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x_BTHD)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv_w = uniform_weight(3, num_heads * head_dim, dim)
        self.out_w = nn.Parameter(torch.zeros(dim, num_heads * head_dim))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x: Tensor, ve: Tensor | None, rotary: Rotary, lists: WindowLists) -> Tensor:
        B, T, _ = x.shape
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1).type_as(x)).view(B, T, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        q, k = rotary(norm(q)), rotary(norm(k))
        lambdas = self.lambdas.type_as(x)
        v = lambdas[0] * v if ve is None else lambdas[0] * v + lambdas[1] * ve.view_as(v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if lists.block_mask is None:
            y = block_gather_attention(q, k, v, lists)
        else:
            y = flex_attention(q, k, v, block_mask=lists.block_mask, scale=ATTENTION_SCALE)
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), self.out_w.type_as(x))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc_w = uniform_weight(4 * dim, dim)
        self.proj_w = nn.Parameter(torch.zeros(dim, 4 * dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.fc_w.type_as(x)).relu().square(), self.proj_w.type_as(x))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, head_dim: int, has_attention: bool):
        super().__init__()
        self.attn = Attention(dim, num_heads, head_dim) if has_attention else None
        self.mlp = MLP(dim)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, rotary: Rotary, lists: WindowLists) -> Tensor:
        lambdas = self.lambdas.type_as(x)
        x = lambdas[0] * x + lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(norm(x), ve, rotary, lists)
        return x + self.mlp(norm(x))


def long_window_layers(num_layers: int) -> set[int]:
    """0, 4, 11, 15 of 16: both ends and the quarter points; the others have half the window."""
    quarter = num_layers // 4
    return {0, quarter, num_layers - 1 - quarter, num_layers - 1}


def attention_free_layer(num_layers: int) -> int | None:
    """Layer 7 of 16, the last of the U-net's first half; models under 8 layers keep all their attention."""
    return num_layers // 2 - 1 if num_layers >= 8 else None


class GPT(nn.Module):
    def __init__(self, args: Hyperparameters):
        super().__init__()
        self.args = args
        dim, value_dim = args.model_dim, args.num_heads * args.head_dim
        self.embed = nn.Embedding(args.vocab_size, dim)
        # Value embeddings, shared by the first three layers and the last three: (0, 13), (1, 14), (2, 15) of 16.
        self.value_embeds = nn.ModuleList(nn.Embedding(args.vocab_size, value_dim)
                                          for _ in range(min(3, args.num_layers // 2)))
        self.blocks = nn.ModuleList(Block(dim, args.num_heads, args.head_dim, i != attention_free_layer(args.num_layers))
                                    for i in range(args.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(args.num_layers // 2))
        self.head_w = nn.Parameter(torch.zeros(128 * math.ceil(args.vocab_size / 128), dim))
        self.rotary = Rotary(args.head_dim, max(args.train_seq_len, args.val_seq_len))

    def hidden(self, tokens_T: Tensor, lists: dict[bool, WindowLists]) -> Tensor:
        L = self.args.num_layers
        x = x0 = norm(self.embed(tokens_T)[None])
        ve = [table(tokens_T)[None] for table in self.value_embeds]
        ve = ve + [None] * (L - 2 * len(ve)) + ve
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= L - L // 2:
                x = x + self.skip_weights[i - (L - L // 2)].type_as(x) * skips.pop()
            x = block(x, x0, ve[i], self.rotary, lists[i in long_window_layers(L)])
            if i < L // 2:
                skips.append(x)
        return norm(x)

    def forward(self, tokens_T: Tensor, targets_T: Tensor, lists: dict[bool, WindowLists]) -> Tensor:
        """Mean cross-entropy in nats of one packed sequence."""
        x_TC = self.hidden(tokens_T, lists)[0]
        if self.training and fp8_available(x_TC.device):
            logits = fp8_linear(x_TC.contiguous(), self.head_w)[0]
        else:
            logits = F.linear(x_TC, self.head_w.type_as(x_TC))
        return F.cross_entropy(LOGIT_CAP * torch.sigmoid(logits.float() / LOGIT_TEMPERATURE), targets_T)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedules

NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                 (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))


def newton_schulz(g: Tensor) -> Tensor:
    """Approximate the polar factor U V^T of every matrix [..., rows, cols] by five odd quintic steps."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz. Every rank keeps all momenta (gradients are already averaged);
    the orthogonalisation is dealt out, and its results are gathered."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float):
        shapes = list(dict.fromkeys(p.shape for p in params))
        groups = [dict(params=[p for p in params if p.shape == shape]) for shape in shapes]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.rank, self.world_size = world()[:2]
        self.orthogonalise = torch.compile(newton_schulz, dynamic=False) if params[0].is_cuda else newton_schulz

    @torch.no_grad()
    def step(self):
        pending = []
        for group in self.param_groups:
            params, m = group["params"], group["momentum"]
            grads = [p.grad for p in params]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - m)
            share = math.ceil(len(params) / self.world_size)  # matrices a rank orthogonalises, the last ones padded
            mine = range(self.rank * share, min((self.rank + 1) * share, len(params)))
            nesterov = [grads[i].lerp(momenta[i], m) for i in mine]
            nesterov += [torch.zeros_like(params[0])] * (share - len(mine))
            updates = self.orthogonalise(torch.stack(nesterov))
            work = None
            if self.world_size > 1:
                local, updates = updates.contiguous(), updates.new_empty(self.world_size * share, *updates.shape[1:])
                work = dist.all_gather(list(updates.chunk(self.world_size)), local, async_op=True)
            pending.append((group, updates, work))
        for group, updates, work in pending:  # each gather overlaps the orthogonalisation of the next group
            if work is not None:
                work.wait()
            params, lr = group["params"], group["lr"]
            rows, cols = params[0].shape[-2:]
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, [u.to(params[0].dtype) for u in updates[: len(params)].unbind(0)],
                                alpha=-lr * max(1, rows / cols) ** 0.5)


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    embeddings = [table.weight for table in (model.embed, *model.value_embeds)]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    adam_groups = [dict(params=[model.head_w], lr=0.1 * model.args.model_dim**-0.5),
                   dict(params=embeddings, lr=0.3), dict(params=scalars, lr=0.015)]
    adam = torch.optim.Adam(adam_groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    optimizers = [adam, Muon(matrices, lr=0.025, weight_decay=0.01, momentum=0.95)]
    covered = [id(p) for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters()), "a parameter is in no group, or in two"
    for opt in optimizers:
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, args: Hyperparameters) -> float:
    x = step / args.num_iterations
    return 1.0 if x < 1 - args.cooldown_frac else (1 - x) / args.cooldown_frac


def muon_momentum(step: int) -> float:
    return 0.85 + 0.10 * min(step / 300, 1.0)


def window_size(step: int, args: Hyperparameters) -> int:
    """Long window in blocks."""
    return max(1, math.ceil(args.window_blocks * step / args.num_iterations))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def open_shard(path: str, vocab_size: int) -> np.memmap:
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise SystemExit(f"error: {path}: not a version-{SHARD_VERSION} token shard (magic {SHARD_MAGIC})")
    expected = 4 * SHARD_HEADER_INTS + 2 * int(header[2])
    if os.path.getsize(path) != expected:
        raise SystemExit(f"error: {path}: {os.path.getsize(path)} bytes, but the header promises {expected}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)
    if len(tokens) and tokens.max() >= vocab_size:
        raise SystemExit(f"error: {path}: holds token {tokens.max()}, outside the vocabulary of {vocab_size}")
    return tokens


def find_shards(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise SystemExit(f"error: no shard matches {pattern!r}; see data/ for the download and tokenising scripts")
    return paths


def token_batches(pattern: str, tokens_per_batch: int, vocab_size: int):
    """Yield contiguous slices of tokens_per_batch + 1 tokens, shard after shard; a shard's last part batch is dropped."""
    for path in find_shards(pattern):
        tokens = open_shard(path, vocab_size)
        for start in range(0, len(tokens) - tokens_per_batch - 1, tokens_per_batch):
            yield tokens[start : start + tokens_per_batch + 1]
    raise SystemExit(f"error: {pattern!r} has run out of tokens; add shards, or lower NUM_ITERATIONS (or VAL_TOKENS)")


def local_sequences(batch: np.ndarray, seq_len: int, device: torch.device):
    """This process's sequences of one global batch: (inputs int32 [T], targets int64 [T])."""
    rank, world_size, _ = world()
    for start in range(rank * seq_len, len(batch) - 1, world_size * seq_len):
        tokens = torch.from_numpy(batch[start : start + seq_len + 1].astype(np.int32))
        tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
        yield tokens[:-1], tokens[1:].long()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun gives them; (0, 1, 0) for plain python."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def set_up_device() -> torch.device:
    local_rank = world()[2]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def all_reduce(tensors: list[Tensor]) -> None:
    if dist.is_initialized():
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def build_model(args: Hyperparameters, device: torch.device) -> GPT:
    torch.manual_seed(args.seed)  # drawn on the CPU: the same weights on every rank and every machine
    model = GPT(args).to(device)
    if device.type == "cuda":  # embeddings carry the activation dtype; matrices stay fp32 and are cast in the forward
        for table in (model.embed, *model.value_embeds):
            table.bfloat16()
    return model


class Trainer:
    def __init__(self, args: Hyperparameters, device: torch.device):
        self.args, self.device = args, device
        self.num_sequences = args.batch_tokens // args.train_seq_len
        self.model = build_model(args, device)
        self.optimizers = make_optimizers(self.model)
        self.forward = torch.compile(self.model, dynamic=False, fullgraph=True) if device.type == "cuda" else self.model

    def lists(self, tokens_T: Tensor, step: int) -> dict[bool, WindowLists]:
        """Long and short window lists; the window is a tensor, so that its growth never recompiles."""
        long = window_size(step, self.args)
        width = math.ceil(self.args.window_blocks)
        windows = torch.tensor([long // 2, long], dtype=torch.int32).to(self.device, non_blocking=True)
        return {bool(i): window_lists(tokens_T, self.args.doc_delimiter, windows[i], width if i else max(1, width // 2))
                for i in (0, 1)}

    def train_step(self, sequences, step: int) -> Tensor:
        """One optimizer step; returns the mean loss over the global batch. Losses are not divided before the backward:
        the FP8 head's gradient scale is made for a mean over one sequence."""
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for tokens, targets in sequences:
            sequence_loss = self.forward(tokens, targets, self.lists(tokens, step))
            sequence_loss.backward()
            loss += sequence_loss.detach()
        grads = [p.grad for p in self.model.parameters()]
        all_reduce([*grads, loss])
        torch._foreach_div_(grads, self.num_sequences)
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(step, self.args)
                if isinstance(opt, Muon):
                    group["momentum"] = muon_momentum(step)
            opt.step()
        self.model.zero_grad(set_to_none=True)
        return loss / self.num_sequences

    @torch.no_grad()
    def validate(self, step: int) -> float:
        args = self.args
        self.model.eval()
        loss = torch.zeros((), device=self.device)
        batch = next(token_batches(args.val_files, args.val_tokens, args.vocab_size))
        for tokens, targets in local_sequences(batch, args.val_seq_len, self.device):
            loss += self.forward(tokens, targets, self.lists(tokens, step))
        all_reduce([loss])
        return (loss / (args.val_tokens // args.val_seq_len)).item()

    def warm_up(self) -> None:
        """Compile and tune on random tokens, then put every state back."""
        args = self.args
        saved = copy.deepcopy([self.model.state_dict()] + [opt.state_dict() for opt in self.optimizers])
        generator = torch.Generator().manual_seed(args.seed)
        for _ in range(args.warmup_steps):
            tokens = torch.randint(args.vocab_size, (args.train_seq_len + 1,), generator=generator,
                                   dtype=torch.int32).to(self.device)
            self.train_step([(tokens[:-1], tokens[1:].long())], step=0)
        self.model.load_state_dict(saved[0])
        for opt, state in zip(self.optimizers, saved[1:], strict=True):
            opt.load_state_dict(state)


def main() -> None:
    args = Hyperparameters.from_environment()
    rank, world_size, _ = world()
    if world_size > args.batch_tokens // args.train_seq_len:
        raise SystemExit(f"error: {world_size} processes, but BATCH_TOKENS / TRAIN_SEQ_LEN is only "
                         f"{args.batch_tokens // args.train_seq_len} sequences")
    for pattern in (args.train_files, args.val_files):  # a missing shard shows now, not after the compilation
        find_shards(pattern)
    batches = token_batches(args.train_files, args.batch_tokens, args.vocab_size)
    device = set_up_device()
    log_path = Path(args.log_dir) / f"{args.run_name}.txt"

    def log(line: str, echo: bool = True) -> None:
        if rank == 0:
            with log_path.open("a") as file:
                print(line, file=file)
            if echo:
                print(line, flush=True)

    if rank == 0:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.write_text(Path(__file__).read_text())
        log("=" * 100, echo=False)
        log(f"python {sys.version}\ntorch {torch.__version__}\n{args}", echo=False)
        if device.type == "cuda":
            log(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout, echo=False)

    trainer = Trainer(args, device)
    trainer.warm_up()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    losses, train_seconds, started = [], 0.0, now()
    for step in range(args.num_iterations + 1):
        last = step == args.num_iterations
        if last or (args.val_loss_every and step % args.val_loss_every == 0):
            train_seconds += now() - started  # the clock stands still during validation
            for offset, loss in enumerate(losses):
                log(json.dumps(dict(step=step - len(losses) + offset + 1, train_loss=loss.item())), echo=False)
            losses.clear()
            val_loss = trainer.validate(step)
            log(json.dumps(dict(step=step, val_loss=val_loss, train_seconds=round(train_seconds, 3),
                                step_ms=round(1000 * train_seconds / max(step, 1), 2))))
            started = now()
        if not last:
            losses.append(trainer.train_step(local_sequences(next(batches), args.train_seq_len, device), step))
    if device.type == "cuda":
        log(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated, "
            f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
