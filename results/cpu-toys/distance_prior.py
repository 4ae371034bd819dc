"""Do far blocks serve text and values better with a prior that falls with their distance? A toy on the CPU.

    python results/cpu-toys/distance_prior.py SHARD SEED [STATE]        # 1,200 steps (or the weights in STATE), lines of JSON

The toy of two_heads.py with one head and QUIET 10, trained on 256 tokens, that is 16 blocks, with a floor of 2, and scored with
4,096. GROWTH: the floor grows by it with the logarithm of the past beyond 16 blocks (model/selection.py up to round 19). PRIOR:
a block d blocks away weighs min(1, (d / 16)^-PRIOR) in the odds, and in the number of blocks that the floor is relative to.
"""

import json
import sys
import time
from pathlib import Path

import claims
import mix_shares as toy
import sharpness
import torch
import two_heads
from tied_head import common_text

TRAINED = 16  # blocks
SETTINGS = ((0, 0), (0.25, 0), (0, 0.25), (0, 0.5), (0, 1), (0, 2))
growth, prior = SETTINGS[0]


@torch.no_grad()
def readable(logits_BHTT):
    """As claims.readable; codes are read where values are."""
    T = logits_BHTT.size(-1)
    N, block = T // claims.BLOCK, torch.arange(T) // claims.BLOCK
    away = block[:, None] - torch.arange(N)
    weight = -prior * (away / TRAINED).clamp(min=1).log()
    best = logits_BHTT.unflatten(-1, (N, claims.BLOCK)).amax(-1) + weight  # -inf beyond the token
    total = best.exp().sum(-1, keepdim=True)
    odds = best - (total - best.exp()).clamp(min=1e-20).log()
    number = (weight.exp() * (away >= 0)).sum(-1)
    bar = claims.floor + growth * ((block + 1.0) / TRAINED).clamp(min=1).log() - number.log()
    odds = odds.masked_fill((away < claims.LOCAL) | (odds <= bar[:, None]), float("-inf"))
    chosen = odds.topk(min(claims.SLOTS, N), -1)
    claimed = torch.zeros_like(odds).scatter(-1, chosen.indices, chosen.values.isfinite().float()).bool()
    near = (away[:, block] < claims.LOCAL) & (torch.arange(T) <= torch.arange(T)[:, None])
    seen = claimed.repeat_interleave(claims.BLOCK, -1) | near
    return seen, seen, claimed.float().sum(-1).mean().item()


def main(shard, seed, state=None):
    global growth, prior
    toy.Attention.forward, two_heads.readable = sharpness.forward, readable
    text = common_text(shard)
    torch.manual_seed(int(seed))
    model, start = two_heads.Model(0, 10), time.time()
    if state and Path(state).exists():
        model.load_state_dict(torch.load(state))
    else:
        sharpness.train(model, two_heads.optimizers_of(model), text[:-400_000], seed)
    _, (length, plain, again) = sharpness.sequences(text[-400_000:])
    for growth, prior in SETTINGS:
        line = dict(seed=int(seed), length=length, growth=growth, prior=prior)
        line |= sharpness.scores(model, length, plain, again) | dict(claims=round(model.attn[1].claims, 2))
        print(json.dumps(line | dict(seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
