"""Do two heads that search and copy tell text from stated values, where one does both? Or a token that silences the head's own
opinion? Toys on the CPU.

    python results/cpu-toys/two_heads.py SHARD HEADS LEARNED SEED [QUIET]        # 1,200 steps, then lines of JSON

As claims.py, with HEADS heads of layer 1 that search and copy, each with taps, claims and a gate of its own. LEARNED: 1 gives
each a sharpness that every token sets, as in sharp_codes.py. QUIET, how copies are said: 0, added to the logits before their
cap; 1, and the other logits are multiplied by 1 - sigmoid(w x - 3), w learnt from 0: where a stated value goes on, what mostly
follows a word should not count; 3, behind the cap; 5, as 1, and w x grows with the sum of squares of what is looked at; 6, as 5
and the gate of the copies too; 7, as 0, and the gate grows with the shares that the last eight tokens got before they came;
9, as 7 and 1, with a gate that is the stream's times the mean of those shares, and a w x that grows with them; 10, as 7 and 1;
11, as 10, and codes are read again, the more sharply the larger the last eight tokens' shares of a first reading; 12, as 10,
with the products of the last 1, ..., 8 shares instead of single ones.
"""

import json
import sys
import time

import claims
import mix_shares as toy
import sharpness
import torch
import torch.nn.functional as F
from claims import readable
from tied_head import common_text, rotated
from torch import nn

SETTINGS = ((2, 1, 8), (2, 1.3, 8), (2.5, 1, 8))
heads = 1
through = False  # the gradient passes the shrinking as if there were none
shrink = 0  # standard deviations of what codes say by chance, by which all that they say is brought nearer to 0
fair = False  # and then multiplied by what gives a token that has all of the attention its gate again
focus = None  # (a, n): codes are read again, the factor of the logits 1 + a times the mean of the last n tokens' shares, or
runs = False  # of the products of the last 1, ..., n
follow = None  # (nats, n, p, latest): codes are read again, a place's logit larger by so much times the mean of the shares that
# the last n tokens gave to the places as many tokens before it, or, latest, times their sum, each times the sum of its squares,
# the share of the token that came then and what those of later tokens leave of 1; and times the p-th power of what the squares
# of the shares of all tokens found leave of 1


def softshrink(x, by):
    return x - x.clamp(-by, by)


def shares(found, codes):
    """[B, h, T, 8], what part of its attention a head gave to each of the last eight tokens before they came."""
    right = F.pad((found[:, :, :-1] * codes[:, None, 1:]).sum(-1) / codes.size(-1), (1, 0))
    return torch.stack([F.pad(right, (lag, 0))[..., : right.size(-1)] for lag in range(8)], -1)


class Reader(toy.Attention):
    """The layer that searches."""

    def __init__(self, learned, again):
        super().__init__(False)
        taps = 0.2 * torch.randn(2, toy.TAPS, heads, toy.D)
        taps[:, 0] += 1
        self.taps, self.w_copy = nn.Parameter(taps), nn.Parameter(torch.zeros(heads, toy.C))
        self.w_sharp = nn.Parameter(torch.zeros(heads, toy.C), requires_grad=bool(learned))
        self.b_sharp = nn.Parameter(torch.zeros(heads), requires_grad=bool(learned))
        self.w_again = nn.Parameter(torch.zeros(heads, 8)) if again else None

    def forward(self, x, ve, codes):
        B, T, C = x.shape
        q, k, v = F.linear(x, self.qkv_w).view(B, T, 3, toy.H, toy.D).unbind(2)

        def mixed(x, w):
            first = sum(F.pad(x[:, :, :heads], (0, 0, 0, 0, lag, 0))[:, :T] * w[lag] for lag in range(toy.TAPS))
            return torch.cat([first, x[:, :, heads:]], 2)

        q, k = mixed(q, self.taps[0]), mixed(k, self.taps[1])
        v = self.lambdas[0] * v if ve is None else self.lambdas[0] * v + self.lambdas[1] * ve.view_as(v)
        q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
        age = torch.arange(T)[:, None] - torch.arange(T)
        logits = 0.35 * q[:, :heads] @ k[:, :heads].mT
        of_values, of_codes, self.claims = readable(logits.masked_fill(age < 0, float("-inf")))
        self.factor = (2 * torch.tanh(F.linear(x, self.w_sharp, self.b_sharp) / 2)).exp().mT[..., None]
        values = logits.masked_fill(~of_values, float("-inf")).softmax(-1)
        onward = 0
        if focus or follow or self.w_again is not None:
            with torch.no_grad():
                first = (claims.sharp_codes * logits).masked_fill(~of_codes, float("-inf")).softmax(-1)
                right = shares(first @ codes[:, None], codes)
                if follow:
                    nats, n, power, latest = follow
                    onward, left, sure = 0, 1, first.square().sum(-1, keepdim=True)
                    for lag in range(1, n + 1):
                        weight = (F.pad(sure[..., :-lag, :], (0, 0, lag, 0)) * right[..., lag - 1 : lag]).clamp(0, 1)
                        weight = weight if latest else 1 / n
                        onward = onward + left * weight * F.pad(first[..., :-lag, :-lag], (lag, 0, lag, 0))
                        left = left * (1 - weight) if latest else 1
                    of_token = (first @ codes[:, None]).square().sum(-1, keepdim=True) / codes.size(-1)
                    onward = nats * onward * (1 - of_token).clamp(min=0) ** power
        if self.w_again is not None:
            self.factor = (2 * torch.tanh(3 * (right * self.w_again[:, None]).sum(-1) / 2)).exp()[..., None]
        elif focus:
            right = right[..., : focus[1]]
            self.factor = 1 + focus[0] * (right.cumprod(-1) if runs else right).mean(-1, keepdim=True)
        of_codes = (claims.sharp_codes * self.factor * logits + onward).masked_fill(~of_codes, float("-inf")).softmax(-1)
        near = (age >= 0) & (age < sharpness.WINDOW)
        rest = F.scaled_dot_product_attention(*(x[:, heads:] for x in (q, k, v)), near, scale=0.35)
        y = torch.cat([values @ v[:, :heads], rest], 1)
        return F.linear(y.transpose(1, 2).reshape(B, T, C), self.out_w), of_codes @ codes[:, None]


class Model(toy.Model):
    def __init__(self, learned, quiet):
        super().__init__(0)
        self.attn[1] = Reader(learned, quiet == 11)
        self.how = quiet
        self.w_quiet = nn.Parameter(torch.zeros(toy.C)) if quiet in (1, 5, 6, 9, 10, 11, 12) else None
        self.w_sure = nn.Parameter(torch.zeros(1)) if quiet in (5, 6) else None
        self.w_trust = nn.Parameter(torch.zeros(heads, 8)) if quiet >= 7 else None
        self.w_loud = nn.Parameter(torch.zeros(heads, 8)) if quiet == 9 else None
        self.v_copy = nn.Parameter(torch.zeros(heads, toy.C)) if quiet in (6, 9) else None

    def learnt(self):
        return [p for p in (self.w_quiet, self.w_sure, self.w_trust, self.w_loud, self.v_copy, self.attn[1].w_again)
                if p is not None]

    def forward(self, tokens):
        x = x0 = toy.norm(self.embed(tokens))
        codes, said = self.codes[tokens], []
        for i, ve in enumerate([None, *(table(tokens) for table in self.ves)]):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0
            y, found = self.attn[i](toy.norm(x), ve, codes)
            said = [*said, found] if found is not None else said
            x = x + y
            x = x + F.linear(F.linear(toy.norm(x), self.up[i]).relu().square(), self.down[i])
        x = toy.norm(x)
        gates = F.linear(x, self.attn[1].w_copy).mT[..., None]
        own, quiet = x, None if self.w_quiet is None else x @ self.w_quiet - 3
        if self.w_sure is not None:
            sure = said[0].square().sum(-1).sum(1) / codes.size(-1)
            quiet = quiet + 10 * self.w_sure * sure
            if self.v_copy is not None:
                gates = gates + F.linear(x, self.v_copy).mT[..., None] * sure[:, None, :, None]
        if self.w_trust is not None:
            right = shares(said[0], codes)
            right = right.clamp(0, 1).cumprod(-1) if self.how == 12 else right
            gates = gates + 10 * (right * self.w_trust[:, None]).sum(-1)[..., None]
            if self.v_copy is not None:
                gates = gates + F.linear(x, self.v_copy).mT[..., None] * right.mean(-1)[..., None]
                quiet = quiet + 10 * (right * self.w_loud[:, None]).sum((1, 3))
        if quiet is not None:
            self.quiet = quiet.sigmoid()[..., None]
            own = x * (1 - self.quiet)
        F_BTD = (gates * said[0]).sum(1)
        copied = F.linear(F_BTD / codes.size(-1), self.codes)
        if shrink:
            less = softshrink(copied, shrink * F_BTD.norm(dim=-1, keepdim=True) / codes.size(-1))
            less = less / (1 - fair * shrink * codes.size(-1) ** -0.5)
            copied = copied + (less - copied).detach() if through else less
        if self.how == 3:
            return 30 * torch.sigmoid(F.linear(own, self.head_w) / 7.5) + copied
        z = F.linear(own, self.head_w) + copied
        return 30 * torch.sigmoid(z / 7.5)


def optimizers_of(model):
    reader, optimizers = model.attn[1], toy.make_optimizers(model)
    if learnt := [p for p in (reader.w_sharp, reader.b_sharp, *model.learnt()) if p.requires_grad]:
        ours = {id(p) for p in learnt}
        for group in optimizers[0].param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        optimizers.append(torch.optim.Adam(learnt, lr=0.003, betas=(0.8, 0.95)))
    return optimizers


def main(shard, count, learned, seed, quiet=0):
    global heads
    heads, toy.Attention.forward = int(count), sharpness.forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model, start = Model(int(learned), int(quiet)), time.time()
    reader = model.attn[1]
    sharpness.train(model, optimizers_of(model), text[:-400_000], seed)
    for length, plain, again in sharpness.sequences(held_out):
        for claims.floor, claims.sharp_codes, claims.code_blocks in SETTINGS:
            line = dict(heads=heads, learned=int(learned), how=int(quiet), seed=int(seed), length=length, floor=claims.floor,
                        codes=claims.sharp_codes)
            scores = sharpness.scores(model, length, plain, again)
            if int(learned) or reader.w_again is not None:
                levels = reader.factor.transpose(0, 1).flatten(1).quantile(torch.tensor([0.05, 0.5, 0.95]), -1)
                line["learnt"] = [[round(x, 2) for x in head] for head in levels.T.tolist()]
            if model.w_trust is not None:
                line["trust"] = [[round(10 * w, 2) for w in head] for head in model.w_trust.tolist()]
            if reader.w_again is not None:
                line["again"] = [[round(3 * w, 2) for w in head] for head in reader.w_again.tolist()]
            if model.w_quiet is not None:
                tokens, role = again[0]
                model(tokens[:, :-1])
                line["quiet"] = [round(model.quiet[..., 0][role[:, 1:] == kind].median().item(), 2) for kind in (False, True)]
            line |= scores | dict(claims=round(reader.claims, 2), seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
