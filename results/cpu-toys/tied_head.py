"""Can a head say a token that it was hardly ever asked to say? A toy on the CPU in which the finding is given.

    python results/cpu-toys/tied_head.py SHARD TIE SEED [SCALE]        # 400 steps, a line of JSON every 100

Three layers of width 128 with the recipe's parts and optimizers, on text of the 4,096 commonest tokens of a shard. Every
sequence of 256 tokens holds six statements, each said twice: template word, key of two tokens, value of six, end word. A
quarter of the value tokens are of 1,024 ids that the text never holds. In layer 1, one head of width 32 is handed the value
vector of the token to be said, wherever a value is said again. TIE: own (the head's rows alone) or rotated (plus SCALE times
the normed embeddings, by a fixed rotation).
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scoped_medium import Muon, norm, uniform_weight

C, H, L, T, B, STEPS, TASKS = 128, 4, 3, 256, 8, 400, 6
D, TEXT, RARE = C // H, 4097, 1024
V = TEXT + RARE + 64
torch.set_num_threads(1)


def common_text(shard):
    tokens = np.fromfile(shard, dtype="<u2")[512:]
    counts = np.bincount(tokens, minlength=65536)
    counts[50256] = 0
    ids = np.full(65536, 65535)
    ids[np.argsort(-counts)[:4096]] = np.arange(4096)
    ids[50256] = 4096
    tokens = ids[tokens]
    return tokens[tokens != 65535].astype(np.uint16)


def batch(rng, text, tasks=TASKS):
    """Tokens; 1 or 2 where a text's or a rare token of a value is said again; where the token to be said stands."""
    tokens, role = np.empty((B, T + 1), np.int64), np.zeros((B, T + 1), np.int8)
    source = np.tile(np.arange(T + 1), (B, 1))
    for b in range(B):
        start = rng.randint(len(text) - T - 1)
        tokens[b] = text[start : start + T + 1]
        slots = np.sort(rng.permutation((T - 1) // 11)[: 2 * tasks].reshape(tasks, 2))
        for first, again in 1 + 11 * slots:
            key = rng.randint(300, 4096, 2)
            value = np.where(rng.rand(6) < 0.25, TEXT + rng.randint(RARE, size=6), rng.randint(100, 4096, 6))
            word = TEXT + RARE + rng.randint(8) * 2
            tokens[b, first : first + 10] = tokens[b, again : again + 10] = [word, *key, *value, word + 1]
            source[b, again + 2 : again + 9] = np.arange(first + 3, first + 10)
            role[b, again + 3 : again + 9] = np.where(value >= TEXT, 2, 1)
    return (torch.from_numpy(x) for x in (tokens, role, source[:, :T]))


def rotated(x_BTHD):
    """Normed, half of the dimensions rotated."""
    angle = torch.arange(x_BTHD.size(1))[:, None] * (1 / 1024) ** torch.linspace(0, 1, x_BTHD.size(-1) // 4)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    a, b, c, d = norm(x_BTHD).chunk(4, -1)
    return torch.cat([a * cos + c * sin, b, c * cos - a * sin, d], -1)


class Attention(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.given, self.qkv_w, self.out_w = given, uniform_weight(3 * C, C), nn.Parameter(torch.zeros(C, C))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x, ve, source):
        q, k, v = F.linear(x, self.qkv_w).view(B, T, 3, H, D).unbind(2)
        v = self.lambdas[0] * v if ve is None else self.lambdas[0] * v + self.lambdas[1] * ve.view_as(v)
        q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.35).transpose(1, 2)
        if self.given:
            found = v.transpose(1, 2)[:, :, :1].gather(1, source[:, :, None, None].expand(-1, -1, 1, D))
            y = torch.cat([found, y[:, :, 1:]], 2)
        return F.linear(y.reshape(B, T, C), self.out_w)


class Model(nn.Module):
    def __init__(self, tie, scale):
        super().__init__()
        self.embed, self.ves = nn.Embedding(V, C), nn.ModuleList(nn.Embedding(V, C) for _ in range(2))
        self.attn = nn.ModuleList(Attention(layer == 1) for layer in range(L))
        self.up = nn.ParameterList(uniform_weight(4 * C, C) for _ in range(L))
        self.down = nn.ParameterList(nn.Parameter(torch.zeros(C, 4 * C)) for _ in range(L))
        self.lambdas = nn.Parameter(torch.tensor([[1.0, 0.0]] * L))
        self.head_w, self.map, self.scale = nn.Parameter(torch.zeros(V, C)), None, scale
        if tie == "rotated":
            self.map = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(5)))[0]

    def forward(self, tokens, source):
        x = x0 = norm(self.embed(tokens))
        for i, ve in enumerate([None, *(table(tokens) for table in self.ves)]):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0
            x = x + self.attn[i](norm(x), ve, source)
            x = x + F.linear(F.linear(norm(x), self.up[i]).relu().square(), self.down[i])
        w = self.head_w if self.map is None else self.head_w + self.scale * norm(self.embed.weight.detach()) @ self.map
        return 30 * torch.sigmoid(F.linear(norm(x), w) / 7.5)


def main(shard, tie, seed, scale=0.15):
    text = common_text(shard)
    train, held_out = text[:-400_000], text[-400_000:]
    torch.manual_seed(int(seed))
    model = Model(tie, float(scale))
    matrices = [p for name, p in model.named_parameters() if name.split(".")[0] in ("attn", "up", "down") and p.ndim > 1]
    tables = [model.embed.weight, *(table.weight for table in model.ves)]
    scalars = [p for p in model.parameters() if all(p is not q for q in [*matrices, *tables, model.head_w])]
    adam = torch.optim.Adam([dict(params=[model.head_w], lr=0.1 * C**-0.5), dict(params=tables, lr=0.3),
                             dict(params=scalars, lr=0.015)], betas=(0.8, 0.95), eps=1e-10)
    optimizers = [adam, Muon(matrices, lr=0.025, weight_decay=0.01, momentum=0.95)]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    held = np.random.RandomState(99)
    asked = [list(batch(held, held_out)) for _ in range(24)]
    plain = [list(batch(held, held_out, tasks=0)) for _ in range(48)]
    rng, start = np.random.RandomState(int(seed) + 1), time.time()
    for step in range(1, STEPS + 1):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * max(0.05, min(1, (1 - (step - 1) / STEPS) / 0.6))
        tokens, _, source = batch(rng, train)
        F.cross_entropy(model(tokens[:, :-1], source).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if step % 100 == 0:
            with torch.no_grad():
                right = [(model(t[:, :-1], s).argmax(-1) == t[:, 1:], r[:, 1:]) for t, r, s in asked]
                common, rare = (torch.cat([hit[role == kind] for hit, role in right]).float().mean().item() for kind in (1, 2))
                losses = [F.cross_entropy(model(t[:, :-1], s).flatten(0, 1), t[:, 1:].flatten()).item() for t, _, s in plain]
            print(json.dumps(dict(tie=tie, scale=float(scale), seed=int(seed), step=step, common=round(common, 4),
                                  rare=round(rare, 4), text_loss=round(float(np.mean(losses)), 4),
                                  seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
