"""Time one layer's attention on a CUDA GPU: ours against dense, sliding-window and pointer attention, and against peers.

    python bench/attention.py --json attention.json                                  # everything, 16k to 1M tokens
    python bench/attention.py --tokens 65536 --variants triton,flex_append           # one comparison
    python bench/attention.py --tokens 1048576 --passes forward --variants triton,dense_cudnn
    python bench/plot_attention.py attention.json                                    # time against length

bf16, B=1, H=8, head dim 128, blocks of 128, random pointers of each head in lists of 36 blocks (16 local + 2 x 9 + 2 global;
all of them different wherever the past holds as many), document mask on, bias of K=6 bands and slope. Peers run at the same
width and key budget, as their rows note.

ms       the attention operator alone: lists and bias coefficients are given, their gradients are included
all      predicting the bias, building the lists, and attention: what a layer adds to its projections
select   the lists, their split by mask and (with a backward) their transpose; and its share of `ms`
TFLOP/s  on listed blocks: 4 D per query and key forward, 2.5 times that backward; and the share of this GPU's matrix ceiling
GB/s     of the bytes that must move (each operand once); `gather`: of every listed block's operands, cached or not
peak     memory above the inputs; `lists`: bytes of the lists of both directions

Times are medians between CUDA events of runs without a pause; the host is ahead of the device, and small inputs take turns
to stay out of the cache.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import peers
from model.attention import BLOCK, Documents, flex_block_mask, pointer_attention, prepare
from model.attn_bias import (
    MAX_POSITION,
    BiasCoefficients,
    ListShape,
    PointerState,
    PositionTables,
    SpectralBias,
    SpectralShape,
    augment,
    place_frequencies,
    pointer_lists,
    read_codes,
    window_lists,
)
from model.content import ContentPointers, ContentShape, Heads, token_codes

SCALE, B, H, D = 0.12, 1, 8, 128
LISTS = ListShape(local_blocks=16, half_blocks=4, global_blocks=2)
POINTERS, WINDOW = 2, 14  # offsets of a query; blocks of the sliding window
SLOTS = LISTS.slots(POINTERS)
FIRST_DOCUMENT = 1000  # tokens; the second document begins inside a block
INPUT_SETS, CACHE_BYTES = 3, 256 * 2**20  # inputs smaller than this many bytes take turns
LEAST_RUNS, MOST_RUNS, MOST_COVER_MS = 3, 1000, 500
SECONDS, MOST_TOKENS = (1e-3, 3600), 2**31  # limits of arguments
CYCLES_PER_MS = 2_000_000  # of the device's clock, at most
PASSES = {"forward": False, "forward+backward": True}

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def attention_flops(T: int, blocks: float, backward: bool) -> float:
    """Two products of 2 D per query and listed key forward, five backward."""
    return 4 * D * B * H * T * blocks * BLOCK * (3.5 if backward else 1)


def least_bytes(T: int, backward: bool) -> int:
    """q, k, v in and out; backward: those, out and its gradient in, three gradients out. bf16; the log-sum-exp in fp32."""
    return B * H * T * ((12 if backward else 4) * 2 * D + (2 if backward else 1) * 4)


def gathered_bytes(T: int, blocks: float, backward: bool) -> float:
    """k and v of every listed block; backward: again for dq, and q and the output's gradient for dk and dv."""
    return B * H * (T // BLOCK) * blocks * 2 * BLOCK * D * 2 * (3 if backward else 1)


def dense_blocks(T: int) -> float:
    """Mean number of key blocks that a query block reads under the causal mask alone."""
    return (T // BLOCK + 1) / 2


def budget_blocks(T: int, budget: int) -> float:
    """The same where each query reads its nearest or best `budget` blocks, or all while there are fewer."""
    N = T // BLOCK
    few = min(N, budget)
    return (few * (few + 1) / 2 + (N - few) * budget) / N


def tensor_bytes(tree) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(tree)
                if isinstance(t, Tensor)}
    return sum(storages.values())


# ---------------------------------------------------------------------------------------------------------------------
# Variants


class Inputs(NamedTuple):
    """One input set; the heads are laid out as the projections give them, the output's gradient likewise."""

    q_BTHD: Tensor
    k_BTHD: Tensor
    v_BTHD: Tensor
    grad_BTHD: Tensor
    delta_BHTM: Tensor  # tokens
    coefficients: tuple[Tensor, ...]  # of the bias, landmarks, or ()
    documents: Documents
    lists: tuple | Tensor  # prepared BlockLists, or what a peer has instead

    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q_BTHD, self.k_BTHD, self.v_BTHD, *self.coefficients)


class Bias(NamedTuple):
    """The layer's predictor and the position tables."""

    spectral: SpectralBias
    tables: PositionTables

    @classmethod
    def make(cls, max_tokens: int, device: str) -> "Bias":
        shape, generator = SpectralShape(H, D), torch.Generator().manual_seed(0)
        spectral = SpectralBias(shape, generator)
        torch.nn.init.normal_(spectral.w2, std=0.05, generator=generator)  # all outputs live, as after some training
        return cls(spectral.to(device), PositionTables(shape.frequencies(), max_tokens).to(device))


@dataclass(frozen=True)
class Cell:
    """What is timed: closures over one input set, which run the pass that the cell is about."""

    inputs: list
    attend: Callable
    blocks: float  # mean number of listed blocks
    everything: Callable | None = None
    select: Callable | None = None
    both_directions: Callable | None = None  # the prepared lists, transpose included
    note: str = ""


@dataclass(frozen=True)
class Setting:
    tokens: int
    backward: bool
    document_tokens: int  # mean length; 0: one document after a first short one
    bias: Bias
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bf16 where it is measured; some CPUs, which only test this, multiply float32 25 times as fast."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def documents(self, generator: torch.Generator) -> Documents:
        opens = torch.zeros(self.tokens, device=self.device, dtype=torch.bool)
        if self.document_tokens:
            opens = torch.rand(self.tokens, device=self.device, generator=generator) < 1 / self.document_tokens
        else:
            opens[FIRST_DOCUMENT : FIRST_DOCUMENT + 1] = True
        opens[0] = True
        return Documents.of(opens.int(), 1)

    def pointers(self, documents: Documents, heads: int, generator: torch.Generator) -> Tensor:
        """Offsets [B, heads, T, M], the same block for all tokens of a block: at random places whose windows touch neither
        each other nor the local band nor the anchors, so that lists are full wherever the document's past has room."""
        T, device = self.tokens, self.device
        own, span = torch.arange(T // BLOCK, device=device)[:, None], 2 * LISTS.half_blocks + 1
        lowest = documents.start_block_N.long()[:, None] + LISTS.global_blocks
        room = own - LISTS.local_blocks + 1 - lowest - POINTERS * span  # blocks left over by the windows
        random = torch.rand(B, heads, T // BLOCK, POINTERS, device=device, generator=generator).sort(-1).values
        apart = lowest + (random * (room + 1)).floor().long() + torch.arange(POINTERS, device=device) * span + LISTS.half_blocks
        centre = torch.where(room >= 0, apart, (random * (own + 1)).long())
        position = torch.arange(T, device=device)[:, None]
        return (position - centre.repeat_interleave(BLOCK, 2) * BLOCK - BLOCK // 2).float()

    def input_sets(self, heads: int = H, kv_heads: int = H, head_dim: int = D, with_bias: bool = False, lists=None) -> list:
        """As many as it takes to leave the cache between two uses of one."""
        T, device = self.tokens, self.device
        count = min(INPUT_SETS, -(-CACHE_BYTES // (3 * B * T * heads * head_dim * 2)))
        sets = []
        for seed in range(count):
            generator = torch.Generator(device).manual_seed(seed)

            def normal(num_heads, generator=generator):
                return torch.randn(B, T, num_heads, head_dim, device=device, dtype=self.dtype, generator=generator)

            q, k, v = (normal(n).requires_grad_(self.backward) for n in (heads, kv_heads, kv_heads))
            documents, coefficients = self.documents(generator), ()
            delta = self.pointers(documents, heads, generator)
            if with_bias:
                with torch.no_grad():
                    predicted, _ = self.bias.spectral(q, self.bias.tables())
                coefficients = tuple(x.detach().clone().requires_grad_(self.backward) for x in predicted[:-1])
            prepared = () if lists is None else lists(delta, documents, self.backward)
            sets.append(Inputs(q, k, v, normal(heads) if self.backward else q.new_empty(0), delta, coefficients, documents,
                               prepared))
        return sets

    def run(self, function: Callable, leaves: Callable) -> Callable:
        """`function(inputs) -> out [B, T, H, D]` as the pass of this cell; a backward returns the gradients of `leaves`."""
        def forward(x):
            with torch.no_grad():
                return function(x)

        def both(x):
            return torch.autograd.grad(function(x), leaves(x), x.grad_BTHD, allow_unused=True)

        return both if self.backward else forward


def listed(setting: Setting, backend: str, layout: str | None, window: bool = False) -> Cell:
    """`pointer_attention` over pointer lists or a sliding window; `layout` is the bias's, None: without bias."""
    spectral, tables = setting.bias
    state = PointerState(*(torch.tensor(x, dtype=torch.int32, device=setting.device) for x in LISTS))
    width = torch.tensor(WINDOW, dtype=torch.int32, device=setting.device)

    def build(delta_BHTM, documents):
        return window_lists(documents, width, WINDOW) if window else pointer_lists(delta_BHTM, documents, state, LISTS)

    def select(delta_BHTM, documents, needs_grad):
        return prepare(build(delta_BHTM, documents), documents, backend=backend, needs_grad=needs_grad)

    def attend(q, k, v, bias, lists, documents):
        if bias is not None and (layout == "fold" or backend != "triton"):
            q, k = augment(q, k, bias, SCALE, layout)
            bias = None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return pointer_attention(q, k, v, lists, documents, scale=SCALE, backend=backend, bias=bias)[0].transpose(1, 2)

    def operator(q, k, v, coefficients, lists, documents):
        bias = BiasCoefficients(*coefficients, tables()) if layout else None
        return attend(q, k, v, bias, lists, documents)

    def layer(q, k, v, delta_BHTM, documents):
        bias = spectral(q, tables())[0] if layout else None
        return attend(q, k, v, bias, build(delta_BHTM, documents), documents)

    operator, layer = (torch.compile(f, dynamic=False, fullgraph=True) for f in (operator, layer))
    parameters = tuple(spectral.parameters()) if layout else ()
    inputs = setting.input_sets(with_bias=bool(layout), lists=select)
    return Cell(
        inputs, blocks=statistics.fmean(x.lists.num_BHN.float().mean().item() for x in inputs),
        attend=setting.run(lambda x: operator(*x[:3], x.coefficients, x.lists, x.documents), Inputs.leaves),
        everything=setting.run(lambda x: layer(*x[:3], x.delta_BHTM, x.documents), lambda x: (*x[:3], *parameters)),
        select=lambda x: select(x.delta_BHTM, x.documents, setting.backward),
        both_directions=lambda x: select(x.delta_BHTM, x.documents, True))


def content(setting: Setting, tokens: int, backend: str = "triton", shared: bool = False, copying: bool = True,
            again: bool = False) -> Cell:
    """Content pointers: `tokens` of a block search; `shared`: all heads read what is found; `copying`: pointer heads read codes
    too, here added to their values, so that one gradient reaches both; `again`: places too, and then codes again, focused and
    behind the places found. No log-odds are too low here, so on random data the threshold of the blocks before fills the lists.
    `ms` holds the selection too."""
    shape = ContentShape(head_dim=D, asking=tokens, floor=-math.inf, readers=H * shared, copying=copying)
    module = ContentPointers(shape, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.w_ask, generator=torch.Generator().manual_seed(1))
    module = module.to(setting.device).eval()
    state = PointerState(*(torch.tensor(x, dtype=torch.int32, device=setting.device) for x in LISTS))
    window = torch.tensor(WINDOW, dtype=torch.int32, device=setting.device)
    places = PositionTables(place_frequencies(D), setting.tokens).to(setting.device) if again else None
    codes_TD = token_codes(1024, 1024, D)[torch.arange(setting.tokens) % 1024].to(setting.device, setting.dtype)

    def choose(marks, documents):
        return module.point(marks, documents, state, LISTS, H, window, WINDOW).lists

    def select(marks, documents, needs_grad):
        return prepare(choose(marks, documents), documents, backend=backend, needs_grad=needs_grad)

    def attend(q, k, v, marks, documents):
        def read(heads):
            return heads.read(documents, SCALE, backend)

        heads = Heads(q, k, v, choose(marks, documents))
        if not copying:
            return read(heads)
        twice = (places(), 1.0, 8.0) if again else ()
        y, found = read_codes(module, heads, codes_TD, documents, read, *twice)
        return torch.cat([y[:, :, : shape.heads] + found, y[:, :, shape.heads :]], 2)

    def layer(q, k, v, documents):
        marks = module(q, k)
        return attend(module.fold(q, marks.p_BTPr / SCALE, 0), module.fold(k, marks.l_BTPr, 0), v, marks, documents)

    inputs = setting.input_sets()
    with torch.no_grad():
        marks = [module(x.q_BTHD, x.k_BTHD) for x in inputs]
    inputs = [x._replace(coefficients=m, lists=select(m, x.documents, setting.backward))
              for x, m in zip(inputs, marks, strict=True)]
    operator, layer = (torch.compile(f, dynamic=False, fullgraph=True) for f in (attend, layer))
    learnt = (module.w_query, module.w_key)

    def blocks(num_BHN):  # a head's; those of a pointer head once more for every reading of codes or places
        return (num_BHN.sum(1) + (copying + 2 * again) * num_BHN[:, : shape.heads].sum(1)).float().mean().item() / H

    extras = " (all read what is found)" * shared + ", with copies" * copying + ", codes read twice" * again
    return Cell(
        inputs, blocks=statistics.fmean(blocks(x.lists.num_BHN) for x in inputs),
        attend=setting.run(lambda x: operator(*x[:3], x.coefficients, x.documents), lambda x: x[:3]),
        everything=setting.run(lambda x: layer(*x[:3], x.documents), lambda x: (*x[:3], *learnt)),
        select=lambda x: select(x.coefficients, x.documents, setting.backward),
        both_directions=lambda x: select(x.coefficients, x.documents, True),
        note=f"pointer heads: {shape.heads}{extras}, up to {shape.far_blocks} far blocks, {tokens} of {BLOCK} tokens search; "
             f"selection inside ms")


def dense(setting: Setting, kernel: SDPBackend) -> Cell:
    def attend(x):
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x[:3]), is_causal=True,
                                                  scale=SCALE).transpose(1, 2)

    return Cell(setting.input_sets(), setting.run(attend, Inputs.leaves), dense_blocks(setting.tokens),
                note="causal, no documents")


def flash_4(setting: Setting) -> Cell:
    """FlexAttention's FLASH backend, which is flash-attn-4's block-sparse kernel."""
    peers.require("flash_attn.cute", "flash-attn-4")
    from torch.nn.attention.flex_attention import flex_attention

    cell = listed(setting, "flex", None)

    def operator(q, k, v, lists, documents):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=flex_block_mask(lists, documents), scale=SCALE,
                              kernel_options={"BACKEND": "FLASH"}).transpose(1, 2)

    operator = torch.compile(operator, dynamic=False, fullgraph=True)
    return dataclasses.replace(
        cell, everything=None, note="no bias, through FlexAttention",
        attend=setting.run(lambda x: operator(*x[:3], x.lists, x.documents), Inputs.leaves))


def native_sparse(setting: Setting) -> Cell:
    heads, kv_heads, head_dim = 16, 1, H * D // 16  # its kernels want 16 query heads to a key head: the same width
    selected = 32  # a power of two, or the kernels round it up
    attend, everything, choose = peers.native_sparse(BLOCK, selected)
    inputs = [x._replace(lists=choose(*x[:3])) for x in setting.input_sets(heads, kv_heads, head_dim)]
    return Cell(inputs, setting.run(lambda x: attend(*x[:3], x.lists), Inputs.leaves), budget_blocks(setting.tokens, selected),
                everything=setting.run(lambda x: everything(*x[:3]), Inputs.leaves),
                note=f"{heads} heads of {head_dim} on {kv_heads} key head, {selected} blocks a token, no documents; all: with "
                     f"compression and selection")


def mixture_of_blocks(setting: Setting) -> Cell:
    chunk = 4 * BLOCK
    attend, whose = peers.mixture_of_blocks(chunk, SLOTS * BLOCK // chunk)
    return Cell(setting.input_sets(), setting.run(lambda x: attend(*x[:3]), Inputs.leaves),
                budget_blocks(setting.tokens, SLOTS),
                note=f"{SLOTS * BLOCK // chunk} chunks of {chunk} a token, selection inside ms, no documents, on {whose}")


VARIANTS: dict[str, Callable[[Setting], Cell]] = {
    "triton": lambda s: listed(s, "triton", "append"),
    "triton_fold": lambda s: listed(s, "triton", "fold"),
    "triton_nobias": lambda s: listed(s, "triton", None),
    "content": lambda s: content(s, ContentShape.asking),
    "content_again": lambda s: content(s, ContentShape.asking, again=True),
    "content_values": lambda s: content(s, ContentShape.asking, copying=False),
    "content_shared": lambda s: content(s, ContentShape.asking, shared=True),
    "content_exact": lambda s: content(s, BLOCK),
    "flex_append": lambda s: listed(s, "flex", "append"),
    "flex_fold": lambda s: listed(s, "flex", "fold"),
    "flex_nobias": lambda s: listed(s, "flex", None),
    "flex_window": lambda s: listed(s, "flex", None, window=True),
    "dense_cudnn": lambda s: dense(s, SDPBackend.CUDNN_ATTENTION),
    "dense_flash": lambda s: dense(s, SDPBackend.FLASH_ATTENTION),
    "nsa": native_sparse,
    "moba": mixture_of_blocks,
    "flash_4": flash_4,
}

# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def times_ms(run: Callable, inputs: list, seconds: float) -> list[float]:
    """Device milliseconds of each run after a first one, which compiles: as many as fit into `seconds`, without a pause
    between them, so that short and long sequences are timed at the clocks of a busy device."""
    turn = itertools.cycle(inputs)
    run(next(turn))
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    start.record()
    run(next(turn))
    end.record()
    enqueued = 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    first = start.elapsed_time(end)
    most = MOST_RUNS if enqueued < first / 2 else min(MOST_RUNS, int(MOST_COVER_MS / 1.5 / enqueued))
    count = max(LEAST_RUNS, min(most, int(1e3 * seconds / max(first, 1e-3))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    if enqueued > first / 2:  # the device waits until the host is ahead: gaps between launches don't count
        torch.cuda._sleep(int(min(MOST_COVER_MS, 1.5 * enqueued * count) * CYCLES_PER_MS))
    marks[0].record()
    for mark in marks[1:]:
        run(next(turn))
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Median, and the width of the middle 80% of the runs as a share of it."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    median = statistics.median(times)
    return median, (tenths[-1] - tenths[0]) / median


def peak_bytes(run: Callable, inputs) -> int:
    """Most memory that one run holds above what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(inputs)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def measure(cell: Cell, setting: Setting, seconds: float, ceilings: dict, row: dict) -> None:
    """Fills the row figure by figure: what is there stays there if a later one fails."""
    T, backward = setting.tokens, setting.backward
    ms, spread = median_and_spread(runs := times_ms(cell.attend, cell.inputs, seconds))
    flops = attention_flops(T, cell.blocks, backward)
    row |= dict(ms=ms, spread=spread, runs=len(runs), blocks=cell.blocks, tflops=flops / ms / 1e9, note=cell.note,
                gbps=least_bytes(T, backward) / ms / 1e6, gathered_gbps=gathered_bytes(T, cell.blocks, backward) / ms / 1e6,
                peak_gib=peak_bytes(cell.attend, cell.inputs[0]) / 2**30)
    row["ceiling_share"] = row["tflops"] / ceilings["matmul_tflops"]
    if cell.everything:
        row["all_ms"], row["all_spread"] = median_and_spread(times_ms(cell.everything, cell.inputs, seconds))
        row["all_peak_gib"] = peak_bytes(cell.everything, cell.inputs[0]) / 2**30
    if cell.select:
        row["select_ms"], _ = median_and_spread(times_ms(cell.select, cell.inputs, seconds / 4))
        row["select_share"] = row["select_ms"] / ms
        row["select_peak_gib"] = peak_bytes(cell.select, cell.inputs[0]) / 2**30
    if cell.both_directions:
        with contextlib.suppress(ValueError):  # FlexAttention's table of long sequences
            row["lists_gib"] = tensor_bytes(cell.both_directions(cell.inputs[0])) / 2**30
            row["lists_peak_gib"] = peak_bytes(cell.both_directions, cell.inputs[0]) / 2**30  # while they are made


def measure_ceilings() -> dict:
    """What this GPU gives a large matrix product of random data, and a large copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(times_ms(lambda _: a @ b, [None], 0.1))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(times_ms(lambda _: target.copy_(source), [None], 0.1))
    return dict(matmul_tflops=2 * 8192**3 / product / 1e9, copy_gbps=2 * tensor_bytes(source) / copy / 1e6)


# ---------------------------------------------------------------------------------------------------------------------
# Report

COLUMNS = (("ms", "ms", "9.3f", 1), ("spread", "±%", "4.1f", 100), ("all_ms", "all", "9.3f", 1),
           ("select_ms", "select", "7.3f", 1), ("select_share", "%", "5.1f", 100), ("blocks", "blocks", "6.1f", 1),
           ("tflops", "TFLOP/s", "7.0f", 1), ("ceiling_share", "%", "4.0f", 100), ("gbps", "GB/s", "5.0f", 1),
           ("gathered_gbps", "gather", "6.0f", 1), ("peak_gib", "peak", "6.2f", 1), ("lists_gib", "lists", "6.3f", 1))


def heading() -> str:
    return f"{'variant':13} {'pass':16} {'tokens':>9}" + "".join(
        f" {title:>{int(form.split('.')[0])}}" for _, title, form, _ in COLUMNS)


def line(row: dict) -> str:
    """One row of the table; what a variant has not, or could not do, stays a dash or becomes its reason."""
    head = f"{row['variant']:13} {row['pass']:16} {row['tokens']:9,}"
    reason = f" {row['error']}" if "error" in row else ""
    if "ms" not in row:
        return head + reason
    cells = (f"{row[key] * factor:{form}}" if row.get(key) is not None else "-".rjust(int(form.split(".")[0]))
             for key, _, form, factor in COLUMNS)
    return head + "".join(f" {cell}" for cell in cells) + reason


def summary(rows: list[dict]) -> list[str]:
    """How many times faster than dense cuDNN, and how the time of a token grows with the length."""
    ms = {(r["variant"], r["pass"], r["tokens"]): r["ms"] for r in rows if "ms" in r}
    lines = []
    for name in dict.fromkeys(variant for variant, _, _ in ms):
        for which in PASSES:
            mine = {T: t for (v, p, T), t in ms.items() if (v, p) == (name, which)}
            faster = [f"{T:,}: {ms['dense_cudnn', which, T] / t:.1f}x" for T, t in sorted(mine.items())
                      if ("dense_cudnn", which, T) in ms and name != "dense_cudnn"]
            if faster:
                lines.append(f"{name}, {which}, faster than dense cuDNN at {', '.join(faster)}")
            if len(mine) > 1:
                low, high = min(mine), max(mine)
                growth = mine[high] / high * low / mine[low]
                lines.append(f"{name}, {which}, ms a token from {low:,} to {high:,}: x{growth:.2f}")
    return lines


def write_json(path: Path, report: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, peers.NotImportable) else f"{type(error).__name__}: {text}"


def run_cells(args, build=VARIANTS, timed=measure, make_bias=Bias.make) -> list[dict]:
    """All cells in the order of lengths, passes and variants; every row is printed and written as soon as it is there."""
    report = dict(setting=dict(B=B, H=H, D=D, block=BLOCK, slots=SLOTS, document_tokens=args.document_tokens), rows=[])
    if torch.cuda.is_available():
        report |= dict(device=torch.cuda.get_device_name(), torch=str(torch.__version__), ceilings=measure_ceilings())
        print(f"{report['device']}, torch {report['torch']}; matrix ceiling {report['ceilings']['matmul_tflops']:.0f} TFLOP/s, "
              f"copy {report['ceilings']['copy_gbps']:.0f} GB/s")
    bias = make_bias(max(args.tokens), "cuda" if torch.cuda.is_available() else "cpu")
    print(heading(), flush=True)
    absent = set()
    for T, which, variant in itertools.product(args.tokens, args.passes, args.variants):
        if PASSES[which] and T >= args.forward_only_from:
            continue
        setting = Setting(T, PASSES[which], args.document_tokens, bias)
        row = {"variant": variant, "pass": which, "tokens": T}
        began = time.perf_counter()
        cell = None
        try:
            cell = build[variant](setting)
            timed(cell, setting, args.seconds, report.get("ceilings", {}), row)
        except Exception as error:  # one variant that refuses, or runs out of memory, must not hide the others
            row |= dict(error=first_line(error)[:200], details=str(error)[:4000])
        del cell
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        row["cell_seconds"] = time.perf_counter() - began
        if row.get("error") not in absent:  # a peer that is not there says so once
            print(line(row), flush=True)
        absent |= {row["error"]} if row.get("error", "").startswith("not importable") else set()
        report["rows"].append(row)
        if args.json:
            write_json(args.json, report)
    notes = dict.fromkeys(f"{r['variant']}: {r['note']}" for r in report["rows"] if r.get("note"))
    print("\n".join([*notes, *summary(report["rows"])]), flush=True)
    return report["rows"]


def whole_numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers separated by commas") from None
    bad = [v for v in values if v < BLOCK or v % BLOCK]
    if bad:
        raise argparse.ArgumentTypeError(f"{bad[0]} tokens are not a positive multiple of the block of {BLOCK}")
    if max(values) > MAX_POSITION:
        raise argparse.ArgumentTypeError(f"{max(values)} tokens are more than the {MAX_POSITION} positions that the bias knows")
    return values


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # no NaN is
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low:,} to {high:,}")

    return parse


def names_from(known) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return chosen

    return names


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("--tokens", type=whole_numbers, default="16384,65536,262144,1048576", help="lengths, e.g. 16384,65536")
    parser.add_argument("--variants", type=names_from(VARIANTS), default=",".join(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--passes", type=names_from(PASSES), default="forward+backward,forward", help=" and ".join(PASSES))
    parser.add_argument("--forward-only-from", type=number(int, 0, MOST_TOKENS), default=1_048_576, metavar="TOKENS",
                        help="no backward at this length and above (default: %(default)s)")
    parser.add_argument("--document-tokens", type=number(int, 0, MOST_TOKENS), default=0, metavar="TOKENS",
                        help=f"mean length of the documents; 0: one, after a first of {FIRST_DOCUMENT:,}: the fullest lists")
    parser.add_argument("--seconds", type=number(float, *SECONDS), default=1.0,
                        help="of timed runs for each figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, after each one")
    args = parser.parse_args(arguments)
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"{args.json}: its directory does not exist")
    if all(PASSES[which] for which in args.passes) and min(args.tokens) >= args.forward_only_from:
        parser.error(f"--forward-only-from {args.forward_only_from} leaves nothing of --passes {','.join(args.passes)}")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if not torch.cuda.is_available():
        sys.exit("error: bench/attention.py needs a CUDA GPU")
    torch._dynamo.config.recompile_limit = 64  # beyond it FlexAttention would run dense and eager, silently
    rows = run_cells(args)
    if not any("ms" in row for row in rows):
        sys.exit(f"error: none of {len(rows)} cells could be measured; the last: {rows[-1]['error']}")


if __name__ == "__main__":
    main()
