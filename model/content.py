"""Content pointers: heads that find far places by what stands there.

A pointer head gives every token a *landmark* of r dimensions and every query a *probe* vector of as many. Their product is
added to the head's logits, so the language model's own loss teaches it, and its maximum over a block says which far blocks
the query wants (`model.selection`). Where the loss cannot reach, because a far block was never read, a second teacher can:
the distribution that the head's content logits alone would give, over the whole past, for a few rows of each sequence.

Shape suffixes: B batch, T tokens, P pointer heads (the first of a layer's heads), D head dim, r landmark dims, S sampled rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import BLOCK, BlockLists, Documents, pointer_attention
from model.selection import Claims, admit, append_claims, ask, content_lists, far_end, odds_floor, search

CODE = 0.5  # of an entry of a code in the head's weight: FP8 holds it exactly
TAPS = 8  # tokens that the query and the key of a head that reads claims see
TRUST = 10.0  # of a gate, for a head that was right with all of its attention, times a weight
LEAST_PAST = 512  # tokens of its document that a sampled row must have behind it
LOSSES = ("landmark_kl", "ask_bce")


def token_codes(tokens: int, rows: int, dim: int) -> Tensor:
    """int8 [rows, dim]: for every token a random code of +-1, the same in every run; rows beyond the vocabulary are 0. Two
    codes agree by chance alone: the mean of their product is 0, with a standard deviation of dim**-0.5."""
    codes = np.zeros((rows, dim), np.int8)
    codes[:tokens] = 2 * np.random.RandomState(0).randint(2, size=(tokens, dim)) - 1  # its stream is the same in every release
    return torch.from_numpy(codes)


def before(x_THD: Tensor, lag: int, documents: Documents) -> Tensor:
    """[..., T, H, D]: what stands `lag` tokens earlier in the document, 0 where it has no such token. Always T rows: torch
    2.11's compiler fails where the lengths of a sum's terms differ."""
    T, id_T = x_THD.size(-3), documents.id_T
    same_T = F.pad(id_T, (lag, 0), value=-1)[:T] == id_T
    return F.pad(x_THD, (0, 0, 0, 0, lag, 0))[..., :T, :, :] * same_T[:, None, None]


@dataclass(frozen=True)
class ContentShape:
    """The constants of a layer's content pointers."""

    heads: int = 1
    head_dim: int = 128
    stream_dim: int = 0  # of the layer's input, which the gate sees beside q; 0: it does not
    dim: int = 32  # r
    asking: int = 16  # tokens of a block that search, at most; in training all do
    far_blocks: int = 16  # W, blocks that a query block may claim
    floor: float = 2.0  # log-odds, over those of an average block of the past, below which nothing is claimed
    rows: int = 128  # S
    readers: int = 0  # heads that read the claims, the first of the layer; 0: the pointer heads alone do
    copying: bool = False  # the pointer heads' findings are said: `say`
    trusting: bool = False  # as loud as they have just been right: `trust`
    pooled: bool = False  # no landmarks: the mean over a block of its keys' non-rotating dimensions, for comparison
    ask_pacing: float = 32.0  # nats; the slots of a tile that has more to ask than those before must last to its end
    claim_pacing: float = 4.0  # nats; of what a tile's first tokens find, only the better is claimed
    memory: int = 8  # blocks of the past from which thresholds are taken

    @property
    def matching(self) -> int:
        """Heads, the first of the layer, whose queries and keys are blended: those that read the claims."""
        return max(self.readers, self.heads)

    @property
    def target(self) -> int:
        """Claims of a block at which its threshold aims: three quarters of what its slots hold, two to a claim with its
        follower."""
        return max(1, 3 * self.far_blocks // (4 if self.pooled else 8))


class Landmarks(NamedTuple):
    p_BTPr: Tensor  # of the queries, scaled
    l_BTPr: Tensor  # of the keys: p . l is in nats
    ask_BPT: Tensor | None  # logit: is a far place worth searching from here; float32


class Heads(NamedTuple):
    """What attention takes of some of a layer's heads."""

    q_BTHD: Tensor
    k_BTHD: Tensor
    v_BTHD: Tensor
    lists: BlockLists
    bias: Any = None  # a model.attn_bias.BiasCoefficients

    def read(self, documents: Documents, scale: float, backend: str) -> Tensor:
        """[B, T, H, D], the attention."""
        q, k, v = (x.transpose(1, 2) for x in self[:3])
        y, _ = pointer_attention(q, k, v, self.lists, documents, scale=scale, backend=backend, bias=self.bias)
        return y.transpose(1, 2)

    def seeing(self, values_TD: Tensor) -> "Heads":
        """The same heads with the same values for all of them."""
        return self._replace(v_BTHD=values_TD[None, :, None].expand(*self.q_BTHD.shape[:3], -1))

    def focused(self, right_THn: Tensor, part: float) -> "Heads":
        """The same heads, their queries times 1 + part times the mean of the shares (`ContentPointers.trust`) of the last
        token, of the last two (their product) and of the last three, and their bias as well."""
        a_TH, b_TH, c_TH = right_THn[..., :3].unbind(-1)
        grown_TH = 1 + part * a_TH * (1 + b_TH * (1 + c_TH)) / 3
        bias = None if self.bias is None else self.bias.times(grown_TH.T[None].float())
        return self._replace(q_BTHD=self.q_BTHD * grown_TH[..., None].type_as(self.q_BTHD), bias=bias)

    def drawn(self, bias) -> "Heads":
        """The same heads with a BiasCoefficients more."""
        return self._replace(bias=bias if self.bias is None else self.bias.plus(bias))

    def first(self, P: int) -> "Heads":
        q, k, v = (x[:, :, :P] for x in self[:3])
        lists = BlockLists(*(x[:, :P] for x in self.lists[:3]), readers=self.lists.readers)
        bias = None if self.bias is None else type(self.bias)(*(x[:, :P] for x in self.bias[:-1]), self.bias[-1])
        return Heads(q, k, v, lists, bias)

    def beside(self, others: "Heads") -> "Heads":
        q, k, v = (torch.cat(x, 2) for x in zip(self[:3], others[:3], strict=True))
        lists = (torch.cat(x, 1) for x in zip(self.lists[:3], others.lists[:3], strict=True))
        bias = None
        if self.bias is not None:
            bias = (torch.cat(x, 1) for x in zip(self.bias[:-1], others.bias[:-1], strict=True))
            bias = type(self.bias)(*bias, self.bias[-1])
        return Heads(q, k, v, BlockLists(*lists, readers=self.lists.readers), bias)


class Pointing(NamedTuple):
    """What the search came to."""

    lists: BlockLists  # of all heads
    claims: Claims  # of the pointer heads
    refused_BPN: Tensor  # tokens that found no slot for a claim
    log_odds_BPNR: Tensor  # of every asking token's best block
    asked_BPT: Tensor | None  # in training: what each token's search was worth, in [0, 1]


class Rows(NamedTuple):
    """A sample of a sequence's rows."""

    at_S: Tensor
    past_ST: Tensor  # bool, of the row's document
    weight_S: Tensor  # sums to 1; those with little past have none
    logits_PST: Tensor  # what they would be without the landmarks; detached


class ContentTelemetry(NamedTuple):
    """Detached device tensors; reading them is left to the logging steps."""

    claims: Claims  # of the pointer heads
    refused_BPN: Tensor  # tokens that found no slot for a claim
    log_odds_BPNR: Tensor  # of every asking token's best block
    losses: Tensor  # [2], in the order of LOSSES, nats
    far_mass_P: Tensor  # share of the sampled rows' attention that claimed blocks get; 0 outside training


class ContentPointers(nn.Module):
    """The landmarks of one layer. Both maps start equal, so that p . l starts as an estimate of q . k / sqrt(D)."""

    def __init__(self, shape: ContentShape, generator: torch.Generator):
        super().__init__()
        self.shape = s = shape
        taps = 0.2 * torch.randn(2, TAPS, s.matching, s.head_dim, generator=generator)
        taps[:, 0] += 1
        self.taps = nn.Parameter(taps)
        if s.pooled:
            return
        maps = torch.randn(s.heads, s.head_dim, s.dim, generator=generator) * s.dim**-0.5
        self.w_query, self.w_key = nn.Parameter(maps.clone()), nn.Parameter(maps.clone())
        self.w_ask = nn.Parameter(torch.zeros(s.heads, s.head_dim + s.stream_dim + 1))
        self.w_copy = nn.Parameter(torch.zeros(s.heads, s.stream_dim)) if s.copying else None
        self.w_trust = nn.Parameter(torch.zeros(s.heads, TAPS)) if s.trusting else None

    def blend(self, q_BTHD: Tensor, k_BTHD: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Queries and keys, before their norm, of the heads that read the claims become weighted sums over the last TAPS tokens
        of the document, channel by channel, so that one layer can match what stands before a place."""
        R = self.shape.matching

        def mixed(x_BTHD, taps):
            x = x_BTHD[:, :, :R]
            total = x * taps[0]
            for lag in range(1, TAPS):
                total = total + before(x, lag, documents) * taps[lag]
            return torch.cat([total, x_BTHD[:, :, R:]], 2)

        return tuple(mixed(x, w) for x, w in zip((q_BTHD, k_BTHD), self.taps.type_as(q_BTHD), strict=True))

    def project(self, q_BTPD: Tensor, k_BTPD: Tensor) -> tuple[Tensor, Tensor]:
        w_query, w_key = (w.type_as(q_BTPD) for w in (self.w_query * self.shape.head_dim**-0.5, self.w_key))
        return torch.einsum("btpd,pde->btpe", q_BTPD, w_query), torch.einsum("btpd,pde->btpe", k_BTPD, w_key)

    def forward(self, q_BTHD: Tensor, k_BTHD: Tensor, x_BTC: Tensor | None = None) -> Landmarks:
        """Normed, pre-rotary heads of a layer, of which the first P are looked at, and its normed input."""
        q, k = (x[:, :, : self.shape.heads] for x in (q_BTHD, k_BTHD))
        if self.shape.pooled:
            return self.pool(q, k)

        w_head, w_stream, bias = self.w_ask.type_as(q).split([self.shape.head_dim, self.shape.stream_dim, 1], -1)
        ask = torch.einsum("btpd,pd->bpt", q.detach(), w_head) + bias
        if x_BTC is not None:
            ask = ask + torch.einsum("btc,pc->bpt", x_BTC.detach(), w_stream)
        return Landmarks(*self.project(q, k), ask.float())

    def pool(self, q_BTPD: Tensor, k_BTPD: Tensor) -> Landmarks:
        """All tokens of a block have the block's mean key; only later blocks search it."""
        q, k = (torch.cat([x[..., D // 4 : D // 2], x[..., D - D // 4 :]], -1) for x in (q_BTPD, k_BTPD) for D in [x.size(-1)])
        mean = k.unflatten(1, (-1, BLOCK)).mean(2, keepdim=True).expand(-1, -1, BLOCK, -1, -1).flatten(1, 2)
        return Landmarks(q * self.shape.head_dim**-0.5, mean, None)

    @torch.no_grad()
    def point(self, marks: Landmarks, documents: Documents, state, list_shape, heads: int, window: Tensor, window_slots: int,
              offsets: BlockLists | None = None) -> Pointing:
        """Pointer heads read the local band, the anchors and their claims, the other heads a sliding window of `window` blocks
        (int32 scalar, at most `window_slots`); with `offsets`, the lists of predicted offsets, all of the `heads` read those,
        and the pointer heads their claims too. Other readers read the claims of head h % P. `state` is a
        PointerState, whose negative radius switches the claims off."""
        s = self.shape
        if s.pooled:  # all tokens ask
            asking = ask(torch.zeros(marks.p_BTPr.shape[:3], device=marks.p_BTPr.device).transpose(1, 2), BLOCK)
        else:
            asking = ask(marks.ask_BPT, BLOCK if self.training else s.asking, s.memory, s.ask_pacing)
        found = search(marks.p_BTPr, marks.l_BTPr, asking, documents, state.local_blocks, state.global_blocks)
        last_N = None if s.pooled else far_end(documents, state.local_blocks)
        floor_N = odds_floor(documents, s.floor)
        claims, refused = admit(found, asking, s.far_blocks, s.target, s.claim_pacing, s.memory, floor_N, last_N)
        num, refused = (torch.where(state.radius < 0, 0, x) for x in (claims.num_BHN, refused))
        claims = Claims(num, claims.block_BHNW, claims.time_BHNW)
        if offsets is not None:
            finder_H = torch.arange(s.matching, device=num.device) % s.heads
            lists = append_claims(offsets, Claims(*(x[:, finder_H] for x in claims)))
        else:
            lists = content_lists(claims, documents, state.local_blocks, state.global_blocks, window, list_shape.local_blocks,
                                  list_shape.global_blocks, window_slots, heads, s.readers)
        asked = self.worth(found.log_odds_BHNR, claims.time_BHNW) if self.training and not s.pooled else None
        return Pointing(lists, claims, refused, found.log_odds_BHNR, asked)

    @staticmethod
    def worth(log_odds_BHNR: Tensor, time_BHNW: Tensor) -> Tensor:
        """[B, H, T], what every token's search was good for, where all search: the square of its find's share of the past, as
        many unsure finds are not worth a sure one; a quarter of it where the token claimed nothing, as one before it had."""
        claims = torch.zeros(*time_BHNW.shape[:3], BLOCK + 1, device=time_BHNW.device).scatter(-1, time_BHNW.long(), 1)
        return (log_odds_BHNR.sigmoid().square() * (0.25 + 0.75 * claims[..., :BLOCK])).flatten(2)

    def say(self, x_TC: Tensor, found_TPD: Tensor, codes_TD: Tensor, documents: Documents) -> Tensor:
        """[T, D]; its product with a token's code is the token's share of the attention, times a gate of the final stream's and
        of the trust, summed over the pointer heads, plus what other codes have in common with its own by chance."""
        gate_TP = F.linear(x_TC, self.w_copy.type_as(x_TC))
        if self.w_trust is not None:
            right_TPn = self.trust(found_TPD, codes_TD, documents)
            gate_TP = gate_TP + TRUST * (right_TPn * self.w_trust.type_as(right_TPn)).sum(-1)
        return (gate_TP[..., None] * found_TPD).sum(1) / self.shape.head_dim

    def trust(self, found_TPD: Tensor, codes_TD: Tensor, documents: Documents) -> Tensor:
        """[T, P, TAPS], for each of the document's last TAPS tokens, latest first, the share of its attention that the head
        gave to it one token earlier; 0 where the document has none."""
        right_TP1 = (before(found_TPD, 1, documents) * codes_TD[:, None]).sum(-1, keepdim=True) / self.shape.head_dim
        return torch.cat([before(right_TP1, lag, documents) for lag in range(TAPS)], -1)

    def losses(self, marks: Landmarks, found: Pointing, q_BTHD: Tensor, k_BTHD: Tensor, rows: Rows) -> Tensor:
        """[2], in the order of LOSSES; their gradients reach this module's parameters alone, taps excepted.

        q_BTHD, k_BTHD: normed, pre-rotary; B must be 1. Teacher of the landmarks: softmax of the rows' logits over their past.
        Teacher of `ask`: what the search from all tokens found.
        """
        s, (rows_S, past_ST, weight_S, logits_PST) = self.shape, rows
        teacher_PST = logits_PST.masked_fill(~past_ST, float("-inf")).softmax(-1)
        q, k = (x[:, :, : s.heads].detach() for x in (q_BTHD, k_BTHD))
        p_BSPr, l_BTPr = self.project(q[:, rows_S], k)
        student_PST = torch.einsum("bspe,btpe->pst", p_BSPr, l_BTPr).float().masked_fill(~past_ST, float("-inf"))
        log_student = student_PST.log_softmax(-1).clamp(min=-50)  # finite where the teacher is 0
        kl_PS = (torch.special.entr(teacher_PST).neg() - teacher_PST * log_student).sum(-1)
        return torch.stack([(kl_PS * weight_S).sum(-1).mean(),
                            F.binary_cross_entropy_with_logits(marks.ask_BPT, found.asked_BPT)])

    @torch.no_grad()
    def sample(self, content_logits, documents: Documents, phase: Tensor) -> Rows:
        """content_logits(rows_S) -> [P, S, T]."""
        T = len(documents.id_T)
        rows_S = torch.arange(self.shape.rows, device=phase.device) * (T // self.shape.rows) + phase
        position_T = torch.arange(T, device=phase.device)
        past_ST = (position_T <= rows_S[:, None]) & (documents.id_T == documents.id_T[rows_S, None])
        counts_S = (past_ST.sum(-1) >= LEAST_PAST).float()
        return Rows(rows_S, past_ST, counts_S / counts_S.sum().clamp(min=1), content_logits(rows_S))

    @torch.no_grad()
    def far_mass(self, marks: Landmarks, claims: Claims, rows: Rows, documents: Documents, state) -> Tensor:
        """[P], the share of its attention that a sampled row would give to the blocks that its heads claimed if there were
        neither a bias nor predicted offsets; B must be 1."""
        rows_S, past_ST, weight_S, logits_PST = rows
        block_T = torch.arange(len(documents.id_T), device=rows_S.device) // BLOCK
        tile_S, x_S = rows_S // BLOCK, rows_S % BLOCK
        near_ST = ((block_T > tile_S[:, None] - state.local_blocks)
                   | (block_T < documents.start_block_N[tile_S, None] + state.global_blocks))
        num_PS, block_PSW, time_PSW = (x[0][:, tile_S] for x in claims)
        slot = torch.arange(block_PSW.size(-1), device=rows_S.device)
        seen_PSW = (slot < num_PS[..., None]) & (time_PSW <= x_S[:, None])
        claimed_PSN = torch.zeros(*num_PS.shape, len(documents.start_block_N), device=rows_S.device)
        claimed_PSN = claimed_PSN.scatter_reduce(-1, block_PSW.long(), seen_PSW.float(), "amax")
        claimed_PST = (claimed_PSN[..., block_T] > 0) & past_ST & ~near_ST
        logits_PST = logits_PST + torch.einsum("bspe,btpe->pst", marks.p_BTPr[:, rows_S], marks.l_BTPr).float()
        share_PST = logits_PST.masked_fill(~(claimed_PST | (near_ST & past_ST)), float("-inf")).softmax(-1)
        return ((share_PST * claimed_PST).sum(-1) * weight_S).sum(-1)

    def fold(self, x_BTHD: Tensor, mark_BTPr: Tensor | None, reserved: int) -> Tensor:
        """Put the marks in the place of the pointer heads' last non-rotating dimensions but `reserved`, which the spectral
        bias takes; None: zeros in the place of both, which leaves the content alone."""
        P, r, half = self.shape.heads, self.shape.dim, x_BTHD.size(-1) // 2
        if mark_BTPr is None:
            r, reserved = r + reserved, 0
        end = half - reserved // 2
        start, x = end - r // 2, x_BTHD[:, :, :P]
        a, b = (x.new_zeros(*x.shape[:3], r) if mark_BTPr is None else mark_BTPr.type_as(x)).chunk(2, -1)
        folded = torch.cat([x[..., :start], a, x[..., end : half + start], b, x[..., half + end :]], -1)
        return torch.cat([folded, x_BTHD[:, :, P:]], 2)


def content_stats(layers: list[ContentTelemetry]) -> dict:
    """What the content pointers add to SCOPE_STATS; reads the device. Each list has one entry a layer."""
    def by_layer(values):
        return torch.stack([v.float() for v in values]).tolist()

    log_odds = [layer.log_odds_BPNR[layer.log_odds_BPNR.isfinite()] for layer in layers]
    losses = by_layer([layer.losses for layer in layers])
    return dict(
        claimed_blocks=by_layer([layer.claims.num_BHN.float().mean() for layer in layers]),
        claimed_blocks_max=by_layer([layer.claims.num_BHN.max() for layer in layers]),
        refused_claims=by_layer([layer.refused_BPN.float().mean() for layer in layers]),
        far_mass=by_layer([layer.far_mass_P for layer in layers]),
        log_odds=[[x.quantile(q).item() for q in (0.5, 0.9, 0.99)] if len(x) else None
                  for x in (x[:: max(1, len(x) // 2**20)] for x in log_odds)],
        **{name: list(values) for name, values in zip(LOSSES, zip(*losses, strict=True), strict=True)})
