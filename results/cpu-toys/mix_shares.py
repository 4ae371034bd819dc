"""What do copied passages and statements cost natural text, where a model can copy? A toy on the CPU.

    python results/cpu-toys/mix_shares.py SHARD COPIES PASSAGES STATEMENTS SEED        # 1,200 steps, a line of JSON every 300

Three layers of width 128 with the recipe's parts and optimizers on text of the 4,096 commonest tokens of a shard, sequences of
256 tokens, dense attention. COPIES: 1 gives head 0 of layer 1 blended queries and keys over 8 tokens, and the codes of the
tokens that it reads to the output head (model/content.py). PASSAGES and STATEMENTS: shares of the training tokens that are
overwritten, by copies of 8 to 32 tokens of the same sequence, and by a word, a key of two, a value of six and a word, all
said twice.
Held out: natural text; where a passage of it stands again, and where a statement does.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tied_head import common_text, rotated
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model.content import token_codes
from scoped_medium import Muon, norm, uniform_weight

C, H, L, T, B, STEPS, TAPS = 128, 4, 3, 256, 8, 1200, 8
D, V = C // H, 4097
torch.set_num_threads(1)


def batch(rng, text, passages, statements):
    """Tokens, and 1 or 2 where a passage or a value stands again."""
    tokens, role = np.empty((B, T + 1), np.int64), np.zeros((B, T + 1), np.int8)
    for b in range(B):
        start = rng.randint(len(text) - T - 1)
        tokens[b] = text[start : start + T + 1]
        free = np.ones(T + 1, bool)
        free[0] = False

        def place(n, low, free=free):
            for _ in range(50):
                at = rng.randint(low, T + 1 - n)
                if free[at : at + n].all():
                    free[at : at + n] = False
                    return at

        left = rng.poisson(passages * T / 20) if passages else 0
        for _ in range(left):
            n = int(8 * 4 ** rng.rand())
            at = place(n, n + 40)
            if at is None:
                continue
            src = rng.randint(1, at - n)
            tokens[b, at : at + n] = tokens[b, src : src + n]
            role[b, at + 2 : at + n] = 1
        left = rng.poisson(statements * T / 20) if statements else 0
        for _ in range(left):
            piece = np.concatenate([[rng.randint(60)], rng.randint(300, 4096, 2), rng.randint(100, 4096, 6), [rng.randint(60)]])
            p, q = place(10, 1), place(10, 1)
            if p is None or q is None:
                continue
            p, q = sorted((p, q))
            tokens[b, p : p + 10] = tokens[b, q : q + 10] = piece
            role[b, q + 3 : q + 9] = 2
    return torch.from_numpy(tokens), torch.from_numpy(role)


class Attention(nn.Module):
    def __init__(self, copies):
        super().__init__()
        self.copies, self.qkv_w, self.out_w = copies, uniform_weight(3 * C, C), nn.Parameter(torch.zeros(C, C))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        if copies:
            taps = 0.2 * torch.randn(2, TAPS, D)
            taps[:, 0] += 1
            self.taps, self.w_copy = nn.Parameter(taps), nn.Parameter(torch.zeros(C))

    def forward(self, x, ve, codes):
        q, k, v = F.linear(x, self.qkv_w).view(B, T, 3, H, D).unbind(2)
        if self.copies:

            def mixed(x, w):
                head = sum(F.pad(x[:, :, 0], (0, 0, lag, 0))[:, :T] * w[lag] for lag in range(TAPS))
                return torch.cat([head[:, :, None], x[:, :, 1:]], 2)

            q, k = mixed(q, self.taps[0]), mixed(k, self.taps[1])
        v = self.lambdas[0] * v if ve is None else self.lambdas[0] * v + self.lambdas[1] * ve.view_as(v)
        q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.35).transpose(1, 2)
        found = (
            F.scaled_dot_product_attention(q[:, :1], k[:, :1], codes[:, None], is_causal=True, scale=0.35)[:, 0]
            if self.copies
            else None
        )
        return F.linear(y.reshape(B, T, C), self.out_w), found


class Model(nn.Module):
    def __init__(self, copies):
        super().__init__()
        self.embed, self.ves = nn.Embedding(V, C), nn.ModuleList(nn.Embedding(V, C) for _ in range(2))
        self.attn = nn.ModuleList(Attention(copies and layer == 1) for layer in range(L))
        self.up = nn.ParameterList(uniform_weight(4 * C, C) for _ in range(L))
        self.down = nn.ParameterList(nn.Parameter(torch.zeros(C, 4 * C)) for _ in range(L))
        self.lambdas = nn.Parameter(torch.tensor([[1.0, 0.0]] * L))
        self.head_w = nn.Parameter(torch.zeros(V, C))
        self.register_buffer("codes", token_codes(V, V, 64).float())

    def forward(self, tokens):
        x = x0 = norm(self.embed(tokens))
        said = None
        codes = self.codes[tokens]
        for i, ve in enumerate([None, *(table(tokens) for table in self.ves)]):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0
            y, found = self.attn[i](norm(x), ve, codes)
            said = found if found is not None else said
            x = x + y
            x = x + F.linear(F.linear(norm(x), self.up[i]).relu().square(), self.down[i])
        x = norm(x)
        z = F.linear(x, self.head_w)
        if said is not None:
            z = z + F.linear((x @ self.attn[1].w_copy)[..., None] * said / 64, self.codes)
        return 30 * torch.sigmoid(z / 7.5)


def make_optimizers(model):
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if n.split(".")[0] in ("up", "down") or n.endswith(("qkv_w", "out_w"))]
    tables = [model.embed.weight, *(t.weight for t in model.ves)]
    pointer = [p for n, p in named.items() if "taps" in n or "w_copy" in n]
    scalars = [p for p in named.values() if all(p is not q for q in [*matrices, *tables, *pointer, model.head_w])]
    groups = [dict(params=[model.head_w], lr=0.1 * C**-0.5), dict(params=tables, lr=0.3), dict(params=scalars, lr=0.015)]
    if pointer:
        groups.append(dict(params=pointer, lr=0.003))
    return [
        torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10),
        Muon(matrices, lr=0.025, weight_decay=0.01, momentum=0.95),
    ]


def main(shard, copies, passages, statements, seed):
    text = common_text(shard)
    train, held_out = text[:-400_000], text[-400_000:]
    torch.manual_seed(int(seed))
    model = Model(int(copies))
    optimizers = make_optimizers(model)
    rates = [g["lr"] for o in optimizers for g in o.param_groups]
    held = np.random.RandomState(99)
    plain = [batch(held, held_out, 0, 0) for _ in range(96)]
    again = [batch(held, held_out, 0.15, 0) for _ in range(16)] + [batch(held, held_out, 0, 0.15) for _ in range(16)]
    rng, start = np.random.RandomState(int(seed) + 1), time.time()
    for step in range(1, STEPS + 1):
        for g, rate in zip([g for o in optimizers for g in o.param_groups], rates, strict=True):
            g["lr"] = rate * max(0.0, min(1, (1 - (step - 1) / STEPS) / 0.6))
        tokens, _ = batch(rng, train, float(passages), float(statements))
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
        if step % 300 == 0:
            with torch.no_grad():
                hit = [(model(t[:, :-1]).argmax(-1) == t[:, 1:], r[:, 1:]) for t, r in again]
                acc = [torch.cat([h[r == kind] for h, r in hit]).float().mean().item() for kind in (1, 2)]
                loss = np.mean([F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten()).item() for t, _ in plain])
            print(
                json.dumps(
                    dict(
                        copies=int(copies),
                        passages=float(passages),
                        statements=float(statements),
                        seed=int(seed),
                        step=step,
                        text_loss=round(float(loss), 4),
                        passage=round(acc[0], 4),
                        statement=round(acc[1], 4),
                        seconds=round(time.time() - start),
                    )
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
