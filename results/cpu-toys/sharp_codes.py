"""Is it enough to sharpen what is read of codes, and values not? A toy on the CPU.

    python results/cpu-toys/sharp_codes.py SHARD LEARNED SEED        # 1,200 steps, then lines of JSON

The model, the text and the scores of sharpness.py; the head that copies reads values and codes with logits times a factor each.
Trained with factors of 1; LEARNED: 1 adds a learnt factor, in its logarithm, to the codes' logits.
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
    learnt = layer.log_sharpness.exp() if hasattr(layer, "log_sharpness") else 1.0
    far = F.scaled_dot_product_attention(sharp_values * q, k, v, is_causal=True, scale=0.35)
    return far, F.scaled_dot_product_attention(sharp_codes * learnt * q, k, codes, is_causal=True, scale=0.35)


def main(shard, learned, seed):
    global sharp_values, sharp_codes
    sharpness.copied, toy.Attention.forward = copied, sharpness.forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model = toy.Model(1)
    optimizers, start = toy.make_optimizers(model), time.time()
    copying = [m for m in model.modules() if isinstance(m, toy.Attention) and m.copies] if int(learned) else []
    for layer in copying:
        layer.log_sharpness = torch.nn.Parameter(torch.zeros(()))
        optimizers.append(torch.optim.Adam([layer.log_sharpness], lr=0.01, betas=(0.8, 0.95)))
    sharpness.train(model, optimizers, text[:-400_000], seed)
    for length, plain, again in sharpness.sequences(held_out):
        for sharp_values, sharp_codes in FACTORS:
            line = dict(learned=int(learned), seed=int(seed), length=length, values=sharp_values, codes=sharp_codes)
            scores = sharpness.scores(model, length, plain, again)
            print(json.dumps(line | scores | dict(seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
