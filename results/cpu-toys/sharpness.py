"""What does a sharper pointer head cost natural text, and does training at many sharpnesses mend it? A toy on the CPU.

    python results/cpu-toys/sharpness.py SHARD STRETCHED SEED        # 1,200 steps, then lines of JSON

The model, the text and the optimizers of mix_shares.py with copies and 8.5 % of the tokens in statements, but all heads but the
one that copies see 64 tokens. STRETCHED: 1 multiplies that head's logits, in every other step, by a factor drawn from 1 to 1.9;
0 never does. Scored with factors 1, 1.3, 1.6 and 1.9 on sequences of 256 and 4,096 tokens of held-out text (the second half of
the tokens): the loss where nothing is overwritten, and how many tokens of values are said right, their statements log-uniformly
far.
"""

import json
import sys
import time

import mix_shares as toy
import numpy as np
import torch
import torch.nn.functional as F
from tied_head import common_text, rotated

WINDOW, FACTORS = 64, (1.0, 1.3, 1.6, 1.9)
sharpness = 1.0


def copied(layer, q, k, v, codes):
    """What the head that sees all of the past reads of values and of codes, [B, 1, T, D] each."""
    both = F.scaled_dot_product_attention(sharpness * q, k, torch.cat([v, codes], -1), is_causal=True, scale=0.35)
    return both[..., : toy.D], both[..., toy.D :]


def forward(self, x, ve, codes):
    B, T, C = x.shape
    q, k, v = F.linear(x, self.qkv_w).view(B, T, 3, toy.H, toy.D).unbind(2)
    if self.copies:

        def mixed(x, w):
            head = sum(F.pad(x[:, :, 0], (0, 0, lag, 0))[:, :T] * w[lag] for lag in range(toy.TAPS))
            return torch.cat([head[:, :, None], x[:, :, 1:]], 2)

        q, k = mixed(q, self.taps[0]), mixed(k, self.taps[1])
    v = self.lambdas[0] * v if ve is None else self.lambdas[0] * v + self.lambdas[1] * ve.view_as(v)
    q, k, v = (x.transpose(1, 2) for x in (rotated(q), rotated(k), v))
    age = torch.arange(T)[:, None] - torch.arange(T)
    near = (age >= 0) & (age < WINDOW)
    if not self.copies:
        y = F.scaled_dot_product_attention(q, k, v, near, scale=0.35)
        return F.linear(y.transpose(1, 2).reshape(B, T, C), self.out_w), None
    far, found = copied(self, q[:, :1], k[:, :1], v[:, :1], codes[:, None])
    rest = F.scaled_dot_product_attention(q[:, 1:], k[:, 1:], v[:, 1:], near, scale=0.35)
    y = torch.cat([far, rest], 1)
    return F.linear(y.transpose(1, 2).reshape(B, T, C), self.out_w), found[:, 0]


def scored(rng, text, length, statements):
    """One sequence, and where a value is said again in its second half."""
    start = rng.randint(len(text) - length - 1)
    tokens, role = text[start : start + length + 1].astype(np.int64), np.zeros(length + 1, bool)
    taken = set()
    for at in range(length // 2, length - 10, 32) if statements else ():
        piece = np.concatenate([[rng.randint(60)], rng.randint(300, 4096, 2), rng.randint(100, 4096, 6), [rng.randint(60)]])
        source = (at - 16 - int(16 * ((at - 16) / 16) ** rng.rand())) // 32 * 32 + 16  # between two questions
        if source < 0 or source in taken:
            continue
        taken.add(source)
        tokens[at : at + 10] = tokens[source : source + 10] = piece
        role[at + 3 : at + 9] = True
    return torch.from_numpy(tokens)[None], torch.from_numpy(role)[None]


def sequences(text):
    """(length, sequences with nothing overwritten, sequences with statements and their roles) for each length scored."""
    for length, number in ((256, 256), (4096, 12)):
        held = np.random.RandomState(99)
        plain = [scored(held, text, length, False)[0] for _ in range(number)]
        yield length, plain, [scored(held, text, length, True) for _ in range(number)]


def train(model, optimizers, text, seed, passages=0, statements=0.085, before=None):
    """toy.STEPS steps, the learning rates falling over the last 0.6 of them; before(step) comes first in each."""
    rng, groups = np.random.RandomState(int(seed) + 1), [g for o in optimizers for g in o.param_groups]
    rates = [g["lr"] for g in groups]
    for step in range(1, toy.STEPS + 1):
        for g, rate in zip(groups, rates, strict=True):
            g["lr"] = rate * max(0.0, min(1, (1 - (step - 1) / toy.STEPS) / 0.6))
        if before:
            before(step)
        tokens, _ = toy.batch(rng, text, passages, statements)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for o in optimizers:
            o.step()
        model.zero_grad()


@torch.no_grad()
def scores(model, length, plain, again):
    half = length // 2
    loss = np.mean([F.cross_entropy(model(t[:, :-1])[0, half:], t[0, half + 1 :]).item() for t in plain])
    hit = torch.cat([(model(t[:, :-1]).argmax(-1) == t[:, 1:])[r[:, 1:]] for t, r in again]).float().mean()
    return dict(text_loss=round(float(loss), 4), statement=round(hit.item(), 4))


def main(shard, stretched, seed):
    global sharpness
    toy.Attention.forward = forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model, draw, start = toy.Model(1), np.random.RandomState(int(seed) + 2), time.time()

    def stretch(step):
        global sharpness
        sharpness = 1 + 0.9 * draw.rand() if int(stretched) and step % 2 else 1.0

    train(model, toy.make_optimizers(model), text[:-400_000], seed, before=stretch)
    for length, plain, again in sequences(held_out):
        for sharpness in FACTORS:
            line = dict(stretched=int(stretched), seed=int(seed), length=length, factor=sharpness)
            print(json.dumps(line | scores(model, length, plain, again) | dict(seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
