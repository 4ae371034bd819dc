"""What does it cost text that the codes of two tokens agree by chance? A toy on the CPU.

    python results/cpu-toys/code_width.py SHARD WIDTH SHRINK SEED THROUGH        # 1,200 steps, then lines of JSON

The toy of two_heads.py with one head and QUIET 10, with codes of WIDTH signs instead of 64: what is read of codes says, beside
the tokens that stand there, every other one, by sqrt(sum of a^2 / WIDTH) times the gate. SHRINK: what codes say comes nearer to
0 by so many standard deviations of that, and what is smaller is not said. THROUGH: 1 passes the gradient as if nothing were
shrunk; 0, and copies are never learnt, as nothing is said at the start.
"""

import json
import sys
import time

import mix_shares as toy
import sharpness
import torch
import two_heads
from tied_head import common_text

from model.content import token_codes


def main(shard, width, shrink, seed, through):
    two_heads.shrink, two_heads.through = float(shrink), bool(int(through))
    toy.Attention.forward = sharpness.forward
    text = common_text(shard)
    torch.manual_seed(int(seed))
    model, start = two_heads.Model(0, 10), time.time()
    model.codes = token_codes(toy.V, toy.V, int(width)).float()
    sharpness.train(model, two_heads.optimizers_of(model), text[:-400_000], seed)
    for length, plain, again in sharpness.sequences(text[-400_000:]):
        line = dict(seed=int(seed), width=int(width), shrink=float(shrink), through=int(through), length=length)
        if model.w_trust is not None:
            line["trust"] = [[round(10 * w, 2) for w in head] for head in model.w_trust.tolist()]
        line |= sharpness.scores(model, length, plain, again) | dict(seconds=round(time.time() - start))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
