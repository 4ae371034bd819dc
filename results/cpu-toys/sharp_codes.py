"""Is it enough to sharpen what is read of codes, and values not? A toy on the CPU.

    python results/cpu-toys/sharp_codes.py SHARD LEARNED SEED        # 1,200 steps, then lines of JSON

The model, the text and the scores of sharpness.py; the head that copies reads values and codes with logits times a factor each.
Trained with factors of 1; LEARNED: 1 adds a learnt factor, in its logarithm, to the codes' logits, 2 one of each token's, from
e**-2 to e**2, linear in the layer's input before a tanh. Scored with factors besides; `learnt`: quantiles of the learnt one.
"""

import json
import sys
import time

import mix_shares as toy
import sharpness
import torch
import torch.nn.functional as F
from tied_head import common_text

FACTORS = ((1, 1), (1, 1.3), (1, 1.6), (1, 2), (1, 3), (1.6, 1), (1.6, 1.6))  # of values, codes
sharp_values = sharp_codes = 1.0


def copied(layer, q, k, v, codes):
    """As sharpness.copied, but with logits of their own for values and codes."""
    learnt = 1.0
    if hasattr(layer, "log_sharpness"):
        learnt = layer.log_sharpness.exp()
    elif hasattr(layer, "w_sharp"):
        learnt = layer.learnt = (2 * torch.tanh(F.linear(layer.stream, layer.w_sharp, layer.b_sharp) / 2)).exp()[:, None]
    far = F.scaled_dot_product_attention(sharp_values * q, k, v, is_causal=True, scale=0.35)
    return far, F.scaled_dot_product_attention(sharp_codes * learnt * q, k, codes, is_causal=True, scale=0.35)


def forward(self, x, ve, codes):
    self.stream = x
    return sharpness.forward(self, x, ve, codes)


def main(shard, learned, seed):
    global sharp_values, sharp_codes
    sharpness.copied, toy.Attention.forward = copied, forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model = toy.Model(1)
    optimizers, start = toy.make_optimizers(model), time.time()
    copying = [m for m in model.modules() if isinstance(m, toy.Attention) and m.copies] if int(learned) else []
    for layer in copying:
        if int(learned) == 1:
            layer.log_sharpness = torch.nn.Parameter(torch.zeros(()))
            optimizers.append(torch.optim.Adam([layer.log_sharpness], lr=0.01, betas=(0.8, 0.95)))
        else:
            layer.w_sharp, layer.b_sharp = (torch.nn.Parameter(torch.zeros(size)) for size in ((1, toy.C), (1,)))
            optimizers.append(torch.optim.Adam([layer.w_sharp, layer.b_sharp], lr=0.003, betas=(0.8, 0.95)))
    sharpness.train(model, optimizers, text[:-400_000], seed)
    for length, plain, again in sharpness.sequences(held_out):
        for sharp_values, sharp_codes in FACTORS:
            line = dict(learned=int(learned), seed=int(seed), length=length, values=sharp_values, codes=sharp_codes)
            scores = sharpness.scores(model, length, plain, again)
            if int(learned) == 2:
                levels = copying[0].learnt.flatten().quantile(torch.tensor([0.05, 0.5, 0.95]))
                line["learnt"] = [round(x, 2) for x in levels.tolist()]
            print(json.dumps(line | scores | dict(seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
