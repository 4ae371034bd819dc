"""Does a mix of copied passages and statements teach a head that copies to use a text's own past? A toy on the CPU.

    python results/cpu-toys/far_gain.py SHARD COPIES PASSAGES STATEMENTS SEED        # 1,200 steps, then a line of JSON

The model, the text and the optimizers of mix_shares.py, trained on 256 tokens; one head sees all of the past (COPIES: 1 says
what it finds by codes, 0 has values alone), the others 64 tokens. Scored: the loss of the same 32 tokens of held-out text
behind 64 to 1,024 tokens, its own or, all but the last 64, another place's; how many tokens of values are said right at 256.
"""

import json
import sys

import mix_shares as toy
import numpy as np
import sharpness
import torch
import torch.nn.functional as F
from tied_head import common_text

TARGETS, CONTEXTS, NEAR, SCORED = 640, (64, 128, 256, 512, 1024), 64, 32


def main(shard, copies, passages, statements, seed):
    toy.Attention.forward = sharpness.forward
    text = common_text(shard)
    held = text[-400_000:]
    torch.manual_seed(int(seed))
    model = toy.Model(1)
    optimizers = toy.make_optimizers(model)
    for layer in model.modules():
        if isinstance(layer, toy.Attention) and layer.copies and not int(copies):
            layer.w_copy.requires_grad_(False)  # it stays 0: nothing is said
    sharpness.train(model, optimizers, text[:-400_000], seed, float(passages), float(statements))
    line = dict(copies=int(copies), passages=float(passages), statements=float(statements), seed=int(seed))
    ends = np.linspace(2000, len(held) - SCORED - 8, TARGETS).astype(int)
    for context in CONTEXTS:
        for kind in ("own", "other")[: 1 + (context > NEAR)]:
            losses = []
            for some in np.split(ends, TARGETS // 32):
                rows = np.stack([held[end - context : end + SCORED + 1] for end in some]).astype(np.int64)
                if kind == "other":
                    far = (some + 150_000) % (len(held) - 2000) + 1500
                    rows[:, : context - NEAR] = np.stack([held[at - context : at - NEAR] for at in far])
                tokens = torch.from_numpy(rows)
                with torch.no_grad():
                    said = model(tokens[:, :-1])[:, -SCORED:]
                losses.append(F.cross_entropy(said.flatten(0, 1), tokens[:, -SCORED:].flatten()).item())
            line[f"{kind}_{context}"] = round(float(np.mean(losses)), 4)
    rng = np.random.RandomState(99)
    again = [sharpness.scored(rng, held, 256, True) for _ in range(256)]
    with torch.no_grad():
        hit = torch.cat([(model(t[:, :-1]).argmax(-1) == t[:, 1:])[r[:, 1:]] for t, r in again]).float().mean()
    print(json.dumps(line | dict(statement=round(hit.item(), 4))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
