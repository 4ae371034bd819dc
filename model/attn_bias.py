"""The spectral bias on attention logits, the pointer lists that it steers, and their telemetry.

For a query at position i and a key at j = i - delta, with M pointers and K frequencies,

    b_i(delta) = beta * ( sum_m pi_m sum_k a_mk cos(omega_k (delta - delta*_m)) + c delta - b_i(0) - gate )

where the offsets delta*, the envelopes a, the weights pi, the slope c and the gate are predicted from the query by a small
MLP, and b_i(0) stands for the cosine sum at delta = 0. By cos(x - y) = cos x cos y + sin x sin y the whole bias is one dot
product of 2K + 4 query features with key features that depend on the position alone: nothing of size [T, T] exists.

Shape suffixes: B batch, H heads, T tokens, D head dim, M pointers, K frequencies, N blocks of 128 tokens, F features,
W list slots, L spectral layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import BLOCK, BlockLists, Documents
from model.content import ContentPointers, ContentTelemetry, Heads, before, content_stats

RADIX = 128  # base in which positions are split: digits up to 128 are exact in bf16 (8 significant bits)
MAX_POSITION = RADIX**3  # three digits: 2,097,152 tokens
PLACE_BANDS = 24  # of what is read of places, at most: with six of the bias and the digits they fill 64 features
FOLLOWED = 7  # tokens whose finds can draw the next one
REGULARISERS = ("high_band", "zero_mean", "entropy_floor", "edge")


@dataclass(frozen=True)
class SpectralShape:
    """The constants of the bias. Lengths are in tokens, logits in nats."""

    num_heads: int
    head_dim: int
    bands: int = 6  # K
    pointers: int = 2  # M
    hidden: int = 64
    beta: float = 1.0
    l_train: int = 65_536  # shortest wavelength
    l_max: int = 1_048_576  # longest wavelength and largest offset
    slope: bool = True
    gate: bool = True
    subtract_zero: bool = True
    share_heads: bool = True
    entropy_floor: float = 0.3  # nats

    @property
    def num_features(self) -> int:
        return 2 * self.bands + 4

    def frequencies(self) -> Tensor:
        """omega_k, log-spaced and rising over [2 pi / l_max, 2 pi / l_train], in radians per token (float64)."""
        lowest, highest = (math.log(2 * math.pi / length) for length in (self.l_max, self.l_train))
        return torch.linspace(lowest, highest, self.bands, dtype=torch.float64).exp()


class Tables(NamedTuple):
    """Functions of the position alone; float32 but in tests."""

    cos_TK: Tensor
    sin_TK: Tensor
    key_TF: Tensor  # cos, sin, the position's three digits, and 1


class PositionTables(nn.Module):
    """cos and sin of omega_k t for every position t, computed in float64, and the key features made of them."""

    def __init__(self, frequencies_K: Tensor, max_seq_len: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        if max_seq_len > MAX_POSITION:
            raise ValueError(f"positions are exact up to {MAX_POSITION} tokens, not {max_seq_len}")
        position = torch.arange(max_seq_len)
        phase = torch.outer(position.double(), frequencies_K)
        digits = [position // RADIX**d % RADIX for d in range(3)]
        key = torch.cat([phase.cos(), phase.sin(), torch.stack([*digits, torch.ones_like(position)], 1).double()], 1)
        self.register_buffer("cos_TK", phase.cos().to(dtype), persistent=False)
        self.register_buffer("sin_TK", phase.sin().to(dtype), persistent=False)
        self.register_buffer("key_TF", key.to(dtype), persistent=False)

    def forward(self) -> Tables:
        return Tables(self.cos_TK, self.sin_TK, self.key_TF)


class BiasCoefficients(NamedTuple):
    """b_i(i - j) = sum_k cos_k[i] cos(omega_k j) + sin_k[i] sin(omega_k j) - slope[i] j + constant[i], float32."""

    cos_BHTK: Tensor
    sin_BHTK: Tensor
    slope_BHT: Tensor
    constant_BHT: Tensor  # slope * i - b(0) - gate: the softmax of a row does not see it, its log-sum-exp does
    tables: Tables

    def query_features(self) -> Tensor:
        """[B, H, T, 2K + 4], to be dotted with `tables.key_TF`. The slope is multiplied by powers of two only, so after
        the rounding to bf16 the digits of a position still carry one and the same slope."""
        slope = self.slope_BHT[..., None]
        return torch.cat([self.cos_BHTK, self.sin_BHTK, -slope, -RADIX * slope, -(RADIX**2) * slope,
                          self.constant_BHT[..., None]], -1)

    def plus(self, other: "BiasCoefficients") -> "BiasCoefficients":
        """The sum of two biases of the same heads, with the frequencies of both."""
        a, b, K = self.tables, other.tables, self.cos_BHTK.size(-1)
        cos_TK, sin_TK = (torch.cat(x, -1) for x in ((a.cos_TK, b.cos_TK), (a.sin_TK, b.sin_TK)))
        tables = Tables(cos_TK, sin_TK, torch.cat([cos_TK, sin_TK, a.key_TF[:, 2 * K :]], -1))
        return BiasCoefficients(torch.cat([self.cos_BHTK, other.cos_BHTK], -1), torch.cat([self.sin_BHTK, other.sin_BHTK], -1),
                                self.slope_BHT + other.slope_BHT, self.constant_BHT + other.constant_BHT, tables)

    def times(self, factor_BHT: Tensor) -> "BiasCoefficients":
        waves = (x * factor_BHT[..., None] for x in (self.cos_BHTK, self.sin_BHTK))
        return BiasCoefficients(*waves, self.slope_BHT * factor_BHT, self.constant_BHT * factor_BHT, self.tables)

    def at(self, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """The bias between given positions; q_index [n, 128, 1] holds whole consecutive blocks, the result has the shape
        of their broadcast behind [B, H]."""
        rows = slice(int(q_index[0, 0, 0]), int(q_index[-1, -1, 0]) + 1)
        n = q_index.size(0)

        def per_query(x):  # [B, H, T, ...] -> [B, H, n, 128, 1, ...]
            return x[:, :, rows].unflatten(2, (n, BLOCK)).unsqueeze(4)

        waves = ((per_query(self.cos_BHTK) * self.tables.cos_TK[kv_index]).sum(-1)
                 + (per_query(self.sin_BHTK) * self.tables.sin_TK[kv_index]).sum(-1))
        return waves - per_query(self.slope_BHT) * kv_index + per_query(self.constant_BHT)

    def score_mod(self):
        """The bias as a FlexAttention score_mod. Every captured tensor is read once, by scalar index: the compiler can
        differentiate nothing else. Its backward adds 2K + 2 values per score atomically: correct, and very slow."""
        cos, sin = ([x.contiguous() for x in table.unbind(-1)] for table in (self.cos_BHTK, self.sin_BHTK))
        key_cos, key_sin = ([x.contiguous() for x in table[: self.slope_BHT.size(2)].unbind(-1)]
                            for table in (self.tables.cos_TK, self.tables.sin_TK))
        slope, constant = self.slope_BHT, self.constant_BHT

        def add_bias(score, b, h, q, kv):
            for c, s, kc, ks in zip(cos, sin, key_cos, key_sin, strict=True):
                score = score + c[b, h, q] * kc[kv] + s[b, h, q] * ks[kv]
            return score - slope[b, h, q] * kv + constant[b, h, q]

        return add_bias


def place_frequencies(head_dim: int) -> Tensor:
    """[K], radians per token, uniform over [0, pi), the same in every run: the mean over them of cos(omega (j - j')) is 1 at
    j = j', and elsewhere noise with a standard deviation of (2 K)**-0.5 (random Fourier features, Rahimi and Recht 2007)."""
    return torch.tensor(np.random.RandomState(0).uniform(0, math.pi, min(PLACE_BANDS, head_dim // 2)))


def place_codes(tables: Tables, tokens: int, head_dim: int) -> Tensor:
    """[T, D], cos and sin of omega_k j for every place j, and zeros: as values, they tell where a head looks."""
    codes_TF = tables.key_TF[:tokens, : 2 * tables.cos_TK.size(-1)]
    return F.pad(codes_TF, (0, head_dim - codes_TF.size(-1)))


def follow(placed_BTPD: Tensor, right_TPn: Tensor, nats_BTP: Tensor, tables: Tables, documents: Documents) -> BiasCoefficients:
    """A bias towards what stands behind the place that was found last, surely and rightly: of token i and place j

        nats_i sum_l w_il sum_j' a_{i-l}(j') mean_k cos(omega_k (j - j' - l)),   w_il = s_il prod_{m<l} (1 - s_im),

    l, m = 1 ... FOLLOWED, a the shares of a first reading, and s_il the sum of the squares of those of token i - l, 1 where it
    looked at one place alone, times the share that it gave to the token that came then. So this is nats times the share that
    the last token to be sure and right gave to the place as many tokens before j, and noise. placed_BTPD: what the first
    reading found of `place_codes`, nothing in another document. right_TPn: `ContentPointers.trust`. nats_BTP: float32."""
    K = tables.cos_TK.size(-1)
    placed_BTPF = placed_BTPD[..., : 2 * K].float()
    sure_BTP1 = placed_BTPF.square().sum(-1, keepdim=True) / K
    cos = sin = torch.zeros_like(placed_BTPF[..., :K])
    left_BTP1 = nats_BTP[..., None] / K
    for lag in range(1, FOLLOWED + 1):
        found_BTP1 = (before(sure_BTP1, lag, documents) * right_TPn[..., lag - 1 : lag].float()).clamp(0, 1)
        c, s = (left_BTP1 * found_BTP1 * before(placed_BTPF, lag, documents)).split(K, -1)
        turn_cos, turn_sin = tables.cos_TK[lag], tables.sin_TK[lag]
        cos, sin = cos + c * turn_cos - s * turn_sin, sin + s * turn_cos + c * turn_sin
        left_BTP1 = left_BTP1 * (1 - found_BTP1)
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    zeros = torch.zeros_like(cos[..., 0])
    return BiasCoefficients(cos, sin, zeros, zeros, tables)


def read_codes(content: ContentPointers, heads: Heads, codes_TD: Tensor, documents: Documents, read: Callable[[Heads], Tensor],
               places: Tables | None = None, focus: float = 0.0, nats: float = 0.0,
               draw: Callable[[Heads, BiasCoefficients], Heads] = Heads.drawn) -> tuple[Tensor, Tensor]:
    """What a layer's heads read of values, [B, T, H, D], and its pointer heads of the tokens' codes, [B, T, P, D]. With `focus`
    or `nats` codes are read once more: sharper where the last tokens were found, and drawn to what stands behind their places
    (`places`, the tables of `place_frequencies`), by what the first reading found of codes and of places. A token whose first
    reading found one token alone is not drawn: behind a link the next token stands elsewhere."""
    H, P = heads.q_BTHD.size(2), content.shape.heads
    seen = codes = heads.first(P).seeing(codes_TD)
    if nats:
        seen = codes.beside(codes.seeing(place_codes(places, *codes_TD.shape).type_as(codes_TD)))
    y, found_BTPD, placed_BTPD = read(heads.beside(seen)).split([H, P, P if nats else 0], 2)
    if not (focus or nats):
        return y, found_BTPD
    right_TPn = content.trust(found_BTPD[0], codes_TD, documents)
    if focus:
        codes = codes.focused(right_TPn, focus)
    if nats:
        unsure_BTP = (1 - found_BTPD.float().square().mean(-1)).clamp(min=0)  # 1 - the sum of the squares of tokens' shares
        codes = draw(codes, follow(placed_BTPD, right_TPn, nats * unsure_BTP.square(), places, documents))
    return y, read(codes)


class Prediction(NamedTuple):
    """What the MLP says of every query, for the lists, the telemetry and the regularisers."""

    delta_BHTM: Tensor  # predicted offsets in tokens, fractional
    pi_entropy: Tensor  # mean over queries, nats
    penalties: Tensor  # [4], mean over queries, in the order of REGULARISERS

    def detached(self) -> "Prediction":
        """For the telemetry; the penalties stay in the graph, they are part of what is minimised. Not by `_replace`: torch 2.11
        cannot return such a tuple from a compiled graph."""
        return Prediction(self.delta_BHTM.detach(), self.pi_entropy.detach(), self.penalties)


class SpectralBias(nn.Module):
    """Predicts the bias of one layer from its QK-normed, pre-rotary query heads.

    The output columns of the amplitudes, the slope and the gate start at zero, so training starts as a no-op; the offsets
    start log-spaced over [128, l_train], a different one for every head and pointer.
    """

    def __init__(self, shape: SpectralShape, generator: torch.Generator):
        super().__init__()
        self.shape = shape
        H, M = shape.num_heads, shape.pointers
        sets = 1 if shape.share_heads else H
        self.sizes = [M, M, M, M, M, 1, 1]  # offset, pi, centre, width, amplitude, slope, gate
        outputs, live = sum(self.sizes), 4 * M
        self.w1 = nn.Parameter(torch.randn(sets, shape.head_dim, shape.hidden, generator=generator) * shape.head_dim**-0.5)
        w2 = torch.randn(sets, shape.hidden, outputs, generator=generator) * (0.1 * shape.hidden**-0.5)
        w2[..., live:] = 0
        self.w2 = nn.Parameter(w2)
        bias = torch.zeros(H, outputs)
        reach = math.log(shape.l_train / BLOCK) / math.log(shape.l_max / BLOCK)
        bias[:, :M] = torch.logit((torch.arange(H * M).view(H, M) + 0.5) / (H * M) * reach)
        self.bias = nn.Parameter(bias)
        self.register_buffer("omega", shape.frequencies(), persistent=False)

    def forward(self, q_BTHD: Tensor, tables: Tables) -> tuple[BiasCoefficients, Prediction]:
        """q_BTHD: normed query heads before rotation, any float dtype. Positions are 0 .. T-1."""
        s, T = self.shape, q_BTHD.size(1)
        w1, w2 = (w.expand(s.num_heads, -1, -1).type_as(q_BTHD) for w in (self.w1, self.w2))
        hidden = torch.einsum("bthd,hde->bhte", q_BTHD, w1).relu().square()
        z = torch.einsum("bhte,hef->bhtf", hidden, w2)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) + self.bias[:, None]
        z_delta, z_pi, z_centre, z_width, amplitude, z_slope, z_gate = z.split(self.sizes, -1)

        u_BHTM = z_delta.sigmoid()
        delta_BHTM = BLOCK * torch.exp(u_BHTM * math.log(s.l_max / BLOCK))
        log_pi = z_pi.log_softmax(-1)
        pi = log_pi.exp()
        envelope = self.envelope(z_centre, z_width)
        weight = (pi * amplitude)[..., None] * envelope  # [B, H, T, M, K], signed: a negative amplitude repels

        omega = self.omega.to(z.dtype)
        phase = delta_BHTM[..., None] * omega
        even, odd = (weight * phase.cos()).sum(-2), (weight * phase.sin()).sum(-2)  # [B, H, T, K]
        cos_i, sin_i = tables.cos_TK[:T], tables.sin_TK[:T]
        slope = z_slope.squeeze(-1).tanh() / s.l_train if s.slope else torch.zeros_like(z_slope).squeeze(-1)
        position = torch.arange(T, device=z.device)
        constant = slope * position
        if s.subtract_zero:
            constant = constant - even.sum(-1)
        if s.gate:
            constant = constant - z_gate.squeeze(-1)
        coefficients = BiasCoefficients(s.beta * (cos_i * even + sin_i * odd), s.beta * (sin_i * even - cos_i * odd),
                                        s.beta * slope, s.beta * constant, tables)
        entropy = -(pi * log_pi).sum(-1)
        penalties = self.penalties(omega, even, odd, weight, slope, entropy, u_BHTM)
        return coefficients, Prediction(delta_BHTM, entropy.mean(), penalties)

    def envelope(self, z_centre: Tensor, z_width: Tensor) -> Tensor:
        """Log-normal over the bands, summing to one: exp(-(ln omega - mu)^2 / 2 sigma^2) / sum, [..., M, K]."""
        log_omega = self.omega.log().to(z_centre.dtype)
        low, high = log_omega[0], log_omega[-1]
        spacing = (high - low) / max(self.shape.bands - 1, 1) + 1e-6
        mu = (low + high) / 2 + (high - low) / 2 * z_centre.tanh()
        sigma = spacing * (0.5 + 2 * z_width.sigmoid())
        return torch.softmax(-0.5 * ((log_omega - mu[..., None]) / sigma[..., None]).square(), dim=-1)

    def penalties(self, omega, even, odd, weight, slope, entropy, u_BHTM) -> Tensor:
        """Means over the queries, in the order of REGULARISERS."""
        s = self.shape
        ramp = torch.linspace(0, 1, s.bands, device=weight.device, dtype=weight.dtype).square()  # the upper bands pay
        high_band = (weight.square() * ramp).sum((-1, -2)).mean()
        # Mean of the bias over delta in [0, l_train], in closed form.
        x = omega * s.l_train
        mean_bias = (even * (x.sin() / x) + odd * ((1 - x.cos()) / x)).sum(-1) + slope * s.l_train / 2
        edge = (0.05 - u_BHTM).relu().square() + (u_BHTM - 0.95).relu().square()
        return torch.stack([high_band, mean_bias.square().mean(), (s.entropy_floor - entropy).relu().mean(),
                            400 * edge.mean()])


def augment(q_BTHD: Tensor, k_BTHD: Tensor, bias: BiasCoefficients, scale: float, layout: str) -> tuple[Tensor, Tensor]:
    """Add the bias to q . k as F = 2K + 4 extra dimensions; `scale` is the attention scale, divided out beforehand.

    `append`: head dim D + F, the content is untouched. `fold`: the features take the place of the last F/2 dimensions of
    each half of the head. With half-truncated rotary embeddings these do not rotate, and the head dim stays D, for which
    the kernels are tuned.
    """
    query = (bias.query_features() / scale).transpose(1, 2).type_as(q_BTHD)
    key = bias.tables.key_TF[: k_BTHD.size(1), None].expand(*k_BTHD.shape[:3], -1).type_as(k_BTHD)
    if layout == "append":
        return torch.cat([q_BTHD, query], -1), torch.cat([k_BTHD, key], -1)
    half, taken = q_BTHD.size(-1) // 2, query.size(-1) // 2

    def fold(x, features):
        return torch.cat([x[..., : half - taken], features[..., :taken],
                          x[..., half : 2 * half - taken], features[..., taken:]], -1)

    return fold(q_BTHD, query), fold(k_BTHD, key)


# ---------------------------------------------------------------------------------------------------------------------
# Pointer lists


class PointerState(NamedTuple):
    """The schedule's values at one step, as int32 scalars on the device: they change, no shape does."""

    local_blocks: Tensor
    radius: Tensor  # blocks on each side of a pointer; -1 switches the pointers off
    global_blocks: Tensor


class ListShape(NamedTuple):
    """The fixed width of the lists: local + M (2 half + 1) + global slots."""

    local_blocks: int
    half_blocks: int
    global_blocks: int

    def slots(self, pointers: int) -> int:
        return self.local_blocks + pointers * (2 * self.half_blocks + 1) + self.global_blocks


@torch.library.custom_op("scope::block_lists", mutates_args=())
def block_lists(delta_BHNM: Tensor, start_block_N: Tensor, local: Tensor, radius: Tensor, globals_: Tensor,
                local_slots: int, half_slots: int, global_slots: int) -> tuple[Tensor, Tensor]:
    """Union of the local band, the pointer windows and the document's first blocks; see `pointer_lists`.

    An operator of its own so that the compiler cannot permute the layout of its results. On a GPU it is one kernel.
    """
    if delta_BHNM.is_cuda:
        from model.attention_triton import union_lists

        return union_lists(delta_BHNM, start_block_N, local, radius, globals_, local_slots, half_slots, global_slots)
    B, H, N, M = delta_BHNM.shape
    device = delta_BHNM.device
    own = torch.arange(N, device=device)[:, None]
    first = start_block_N.long()[:, None]

    def slots(count):
        return torch.arange(count, device=device)

    # An inactive slot repeats the query block's own id and is dropped with the other duplicates.
    near = torch.where(slots(local_slots) < local, own - slots(local_slots), own).expand(B, H, N, -1)
    anchors = torch.where(slots(global_slots) < globals_, first + slots(global_slots), own).expand(B, H, N, -1)
    target = (own * BLOCK - (delta_BHNM + 0.5).floor().long()).div(BLOCK, rounding_mode="floor")[..., None]
    around = slots(2 * half_slots + 1) - half_slots
    window = torch.where(around.abs() <= radius, target + around, own[..., None]).flatten(-2)
    blocks = torch.cat([near, window, anchors], -1).maximum(first).minimum(own)
    blocks = blocks.sort(-1, descending=True).values
    repeated = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
    blocks = torch.where(repeated, -1, blocks).sort(-1, descending=True).values[..., : min(blocks.size(-1), N)]
    return (blocks >= 0).sum(-1, dtype=torch.int32), blocks.clamp(min=0).int().contiguous()


@block_lists.register_fake
def _(delta_BHNM, start_block_N, local, radius, globals_, local_slots, half_slots, global_slots):
    B, H, N, M = delta_BHNM.shape
    width = min(ListShape(local_slots, half_slots, global_slots).slots(M), N)
    return (start_block_N.new_empty(B, H, N, dtype=torch.int32), start_block_N.new_empty(B, H, N, width, dtype=torch.int32))


def pointer_lists(delta_BHTM: Tensor, documents: Documents, state: PointerState, shape: ListShape) -> BlockLists:
    """The key blocks of every query block: local band, +-radius blocks around i - delta*_m, global anchors; clamped to the
    document of the block's first token, without duplicates, at most `shape`'s slots.

    Strict causality: block n's list is read by all of its tokens, so it may depend on none but its first, i = 128 n, which
    all of them see. The pointers are those of that leader.
    """
    leaders = delta_BHTM.detach()[:, :, ::BLOCK]
    return BlockLists(*block_lists(leaders, documents.start_block_N, *state, *shape))


def window_lists(documents: Documents, window: Tensor, width: int) -> BlockLists:
    """A sliding window of `window` (int32 scalar, at least 1 is used) blocks of at most `width`, shared by all heads."""
    no_pointers = documents.start_block_N.new_empty(1, 1, len(documents.start_block_N), 0, dtype=torch.float32)
    nothing = torch.zeros_like(window)
    lists = block_lists(no_pointers, documents.start_block_N, window.clamp(min=1), nothing, nothing, width, 0, 0)
    return BlockLists(*lists, readers=width)


def past_lists(documents: Documents) -> BlockLists:
    """All of the document's past, for all heads: dense attention, whose N slots a block and N^2 in all bound the length."""
    start = documents.start_block_N
    own = torch.arange(len(start), device=start.device, dtype=torch.int32)
    num = (own - start + 1)[None, None]
    return BlockLists(num.contiguous(), (own[:, None] - own).clamp(min=0)[None, None].contiguous())


def length_scale(documents: Documents) -> Tensor:
    """[T], sqrt(2 ln(t / 10 + 1) + 1) for the token t places into its document: scale-invariant attention (arXiv 2505.17083,
    tau = 10, alpha = beta = sqrt(e)), whose added constant a softmax does not see."""
    id_T = documents.id_T
    position = torch.arange(len(id_T), device=id_T.device)
    opens = F.pad(id_T[1:] != id_T[:-1], (1, 0), value=True)
    place = position - torch.where(opens, position, 0).cummax(0).values
    return (2 * (place / 10 + 1).log() + 1).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry

DELTA_EDGES = [0] + [2**e for e in range(7, 21)]  # tokens
CENTRE_EDGES = [i / 16 for i in range(17)]  # pointer centre as a fraction of the positions up to the query


class LayerTelemetry(NamedTuple):
    """Device tensors that a forward leaves behind; reading them is left to the logging steps."""

    num_BHN: Tensor
    prediction: Prediction | None  # of the spectral bias
    pointing: ContentTelemetry | None  # of the content pointers


def scope_bins() -> dict:
    return dict(tag="SCOPE_BINS", delta_edges=DELTA_EDGES, centre_edges=CENTRE_EDGES)


def histogram(x: Tensor, edges: list) -> list[float]:
    """Share of the values in [edge_i, edge_i+1); what lies beyond the ends counts in the end bins."""
    inner = torch.tensor(edges[1:-1], device=x.device, dtype=x.dtype)
    counts = torch.bincount(torch.bucketize(x.flatten(), inner, right=True), minlength=len(edges) - 1)
    return (counts / x.numel()).tolist()


def scope_stats(layers: list[LayerTelemetry], documents: Documents, local_blocks: int) -> dict:
    """SCOPE_STATS over the spectral layers of one forward; reads the device, so call it on logging steps only."""
    num = torch.stack([layer.num_BHN.expand_as(layers[0].num_BHN) for layer in layers]).float()
    stats = dict(kv_unique_blocks=dict(mean=num.mean().item()) | quantiles(num),
                 kv_unique_blocks_by_layer=num.flatten(1).mean(1).tolist())
    if layers[0].prediction is not None:
        stats |= offset_stats([layer.prediction for layer in layers], documents, local_blocks)
    if layers[0].pointing is not None:
        stats |= content_stats([layer.pointing for layer in layers])
    return stats


def quantiles(x: Tensor) -> dict:
    x = x.flatten().sort().values
    return {name: x[min(int(p * len(x)), len(x) - 1)].item() for name, p in (("p50", 0.5), ("p90", 0.9), ("max", 1))}


def offset_stats(predictions: list[Prediction], documents: Documents, local_blocks: int) -> dict:
    delta = torch.stack([p.delta_BHTM for p in predictions]).float()  # [L, B, H, T, M]
    T = delta.size(3)
    position = torch.arange(T, device=delta.device)
    block, first = position // BLOCK, documents.start_block_N.repeat_interleave(BLOCK)
    centre = (position[:, None] - delta).clamp(min=0)
    centre_block = (centre / BLOCK).long()
    penalties = torch.stack([p.penalties for p in predictions]).mean(0).tolist()
    return dict(
        delta_histogram=histogram(delta, DELTA_EDGES), delta_mean=delta.mean().item(),
        centre_histogram=histogram(centre / (position[:, None] + 1), CENTRE_EDGES),
        outside_local=(centre_block <= block[:, None] - local_blocks).float().mean().item(),
        at_block_zero=(centre_block == 0).float().mean().item(),
        at_document_start=(centre_block <= first[:, None]).float().mean().item(),
        pi_entropy=torch.stack([p.pi_entropy for p in predictions]).mean().item(),
        penalties=dict(zip(REGULARISERS, penalties, strict=True)))
