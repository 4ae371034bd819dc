"""Does it help, in evaluation alone, to look more sharply where the head that copies has just been right, and not to say what
codes say by chance? A toy on the CPU.

    python results/cpu-toys/focus.py SHARD SEED [QUIET [STATEMENTS]]        # 1,200 steps, then lines of JSON

The toy of two_heads.py with one head and QUIET (10 if it is not said), STATEMENTS (0.085) of the training tokens in statements,
scored with a floor of 2. Where a first reading of codes gave the last n tokens the shares r of its attention before they came,
a second one multiplies its logits by 1 + a mean(r). SHRINK: what codes say comes nearer to 0 by so many standard deviations of
what they say of tokens that were not read. Fair: and is then multiplied by what gives a token that has all of the attention
its gate again. Runs: mean of the products of the last 1, ..., n shares instead, which counts only what was found without a gap.
"""

import json
import sys
import time

import mix_shares as toy
import sharpness
import torch
import two_heads
from tied_head import common_text

FOCUS = (None, (0.5, 1), (1, 1), (0.5, 3), (1, 3), (2, 3), (1, 6))  # (a, n)
SETTINGS = [*((0, focus, False, False) for focus in FOCUS), *((k, None, False, False) for k in (0.5, 1, 1.5, 2, 2.5, 3)),
            (1, (0.5, 3), False, False), (1, (1, 3), False, False), (1, None, True, False), (1, (0.5, 3), True, False),
            (1, (1, 3), True, False), (1.5, (0.5, 3), True, False), (1, (1, 3), True, True)]  # (SHRINK, focus, fair, runs)


def main(shard, seed, quiet=10, statements=0.085):
    toy.Attention.forward = sharpness.forward
    text = common_text(shard)
    torch.manual_seed(int(seed))
    model, start = two_heads.Model(0, int(quiet)), time.time()
    sharpness.train(model, two_heads.optimizers_of(model), text[:-400_000], seed, statements=float(statements))
    for length, plain, again in sharpness.sequences(text[-400_000:]):
        for two_heads.shrink, two_heads.focus, two_heads.fair, two_heads.runs in SETTINGS:
            line = dict(seed=int(seed), how=int(quiet), statements=float(statements), length=length, shrink=two_heads.shrink,
                        focus=two_heads.focus, fair=two_heads.fair, runs=two_heads.runs)
            line |= sharpness.scores(model, length, plain, again)
            print(json.dumps(line | dict(seconds=round(time.time() - start))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
