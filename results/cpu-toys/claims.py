"""Where far text is read by claims, does a higher floor or sharper reading of codes serve values, and text? A toy on the CPU.

    python results/cpu-toys/claims.py SHARD SEED        # 1,200 steps, then lines of JSON

As sharp_codes.py, but the head that copies reads its own block of 16 tokens, the three before it, and at most 8 far blocks,
those whose best logit exceeds the log-sum of the other blocks' best by the floor - ln(number of blocks), every token for
itself. Trained with a floor of 2 and a factor of 1 on 256 tokens, scored with other floors, factors of the codes' logits, and
fewer far blocks whose codes are read, each token's best.
"""

import json
import sys
import time

import mix_shares as toy
import sharpness
import torch
from tied_head import common_text

BLOCK, LOCAL, SLOTS = 16, 4, 8
SETTINGS = ((2, 1, 8), (2, 1.3, 8), (2, 2, 8), (2, 1, 2), (2, 1, 1), (2.5, 1, 8), (2.5, 1.3, 8), (3, 1, 8), (4, 1, 8))
floor, sharp_codes, code_blocks = SETTINGS[0]  # log-odds, a factor, far blocks


@torch.no_grad()
def readable(logits_BHTT):
    """bool [B, H, T, T], what every token reads of values, and of codes; and how many blocks it claims on average."""
    T = logits_BHTT.size(-1)
    N, block = T // BLOCK, torch.arange(T) // BLOCK
    best = logits_BHTT.unflatten(-1, (N, BLOCK)).amax(-1)  # -inf beyond the token
    total = best.exp().sum(-1, keepdim=True)
    odds = best - (total - best.exp()).clamp(min=1e-20).log()
    far = torch.arange(N) <= (block - LOCAL)[:, None]
    bar = floor - (block + 1.0).log()[:, None]
    odds = odds.masked_fill(~far | (odds <= bar), float("-inf"))
    near = (block > (block - LOCAL)[:, None]) & (torch.arange(T) <= torch.arange(T)[:, None])

    def read(slots):
        chosen = odds.topk(min(slots, N), -1)
        claimed = torch.zeros_like(odds).scatter(-1, chosen.indices, chosen.values.isfinite().float()).bool()
        return claimed.repeat_interleave(BLOCK, -1) | near, claimed.float().sum(-1).mean().item()

    values, claims = read(SLOTS)
    return values, read(code_blocks)[0], claims


def copied(layer, q, k, v, codes):
    """As sharpness.copied, of what the claims let every token read."""
    T = q.size(2)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    logits = (0.35 * q @ k.mT).masked_fill(~causal, float("-inf"))
    of_values, of_codes, layer.claims = readable(logits)
    values, again = (logits.masked_fill(~seen, float("-inf")) for seen in (of_values, of_codes))
    return values.softmax(-1) @ v, (sharp_codes * again).softmax(-1) @ codes


def main(shard, seed):
    global floor, sharp_codes, code_blocks
    sharpness.copied, toy.Attention.forward = copied, sharpness.forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model, start = toy.Model(1), time.time()
    sharpness.train(model, toy.make_optimizers(model), text[:-400_000], seed)
    reading = next(m for m in model.modules() if isinstance(m, toy.Attention) and m.copies)
    for length, plain, again in sharpness.sequences(held_out):
        for floor, sharp_codes, code_blocks in SETTINGS:
            line = dict(seed=int(seed), length=length, floor=floor, codes=sharp_codes, code_blocks=code_blocks)
            scores = sharpness.scores(model, length, plain, again)
            line |= scores | dict(claims=round(reading.claims, 2), seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
