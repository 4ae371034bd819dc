"""Is it enough to sharpen what is read of codes, and values not? A toy on the CPU.

    python results/cpu-toys/sharp_codes.py SHARD LEARNED SEED        # 1,200 steps, then lines of JSON

The model, the text and the scores of sharpness.py; the head that copies reads values and codes with logits times a factor each.
Trained with factors of 1; LEARNED: 1 adds a learnt factor, in its logarithm, to the codes' logits.
"""

import json
import sys
import time

import mix_shares as toy
import numpy as np
import torch
import torch.nn.functional as F
from sharpness import WINDOW, scored
from tied_head import common_text, rotated

FACTORS = ((1, 1), (1, 1.3), (1, 1.6), (1, 2), (1, 3), (1.6, 1), (1.6, 1.6))  # of values, codes
sharp_values = sharp_codes = 1.0


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
    learnt = self.log_sharpness.exp() if hasattr(self, "log_sharpness") else 1.0
    far = F.scaled_dot_product_attention(sharp_values * q[:, :1], k[:, :1], v[:, :1], is_causal=True, scale=0.35)
    again = sharp_codes * learnt * q[:, :1]
    found = F.scaled_dot_product_attention(again, k[:, :1], codes[:, None], is_causal=True, scale=0.35)
    rest = F.scaled_dot_product_attention(q[:, 1:], k[:, 1:], v[:, 1:], near, scale=0.35)
    return F.linear(torch.cat([far, rest], 1).transpose(1, 2).reshape(B, T, C), self.out_w), found[:, 0]


def main(shard, learned, seed):
    global sharp_values, sharp_codes
    toy.Attention.forward = forward
    text = common_text(shard)
    train, held_out = text[:-400_000], text[-400_000:]
    torch.manual_seed(int(seed))
    model = toy.Model(1)
    optimizers, start = toy.make_optimizers(model), time.time()
    copying = [m for m in model.modules() if isinstance(m, toy.Attention) and m.copies] if int(learned) else []
    for layer in copying:
        layer.log_sharpness = torch.nn.Parameter(torch.zeros(()))
        optimizers.append(torch.optim.Adam([layer.log_sharpness], lr=0.01, betas=(0.8, 0.95)))
    rates, rng = [g["lr"] for o in optimizers for g in o.param_groups], np.random.RandomState(int(seed) + 1)
    for step in range(1, toy.STEPS + 1):
        for g, rate in zip([g for o in optimizers for g in o.param_groups], rates, strict=True):
            g["lr"] = rate * max(0.0, min(1, (1 - (step - 1) / toy.STEPS) / 0.6))
        tokens, _ = toy.batch(rng, train, 0, 0.085)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for o in optimizers:
            o.step()
        model.zero_grad()
    for length, number in ((256, 256), (4096, 12)):
        held = np.random.RandomState(99)
        plain = [scored(held, held_out, length, False)[0] for _ in range(number)]
        again = [scored(held, held_out, length, True) for _ in range(number)]
        for sharp_values, sharp_codes in FACTORS:
            with torch.no_grad():
                half = length // 2
                loss = np.mean([F.cross_entropy(model(t[:, :-1])[0, half:], t[0, half + 1 :]).item() for t in plain])
                hit = torch.cat([(model(t[:, :-1]).argmax(-1) == t[:, 1:])[r[:, 1:]] for t, r in again]).float().mean()
            line = dict(learned=int(learned), seed=int(seed), length=length, values=sharp_values, codes=sharp_codes,
                        text_loss=round(float(loss), 4), statement=round(hit.item(), 4), seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
