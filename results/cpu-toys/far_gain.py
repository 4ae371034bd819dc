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
    train, held = text[:-400_000], text[-400_000:]
    torch.manual_seed(int(seed))
    model = toy.Model(1)
    gates = [m.w_copy for m in model.modules() if isinstance(m, toy.Attention) and m.copies]
    optimizers = toy.make_optimizers(model)
    rates, rng = [g["lr"] for o in optimizers for g in o.param_groups], np.random.RandomState(int(seed) + 1)
    for step in range(1, toy.STEPS + 1):
        for g, rate in zip([g for o in optimizers for g in o.param_groups], rates, strict=True):
            g["lr"] = rate * max(0.0, min(1, (1 - (step - 1) / toy.STEPS) / 0.6))
        tokens, _ = toy.batch(rng, train, float(passages), float(statements))
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if not int(copies):
            for gate in gates:
                gate.grad.zero_()  # they stay 0: nothing is said
        for o in optimizers:
            o.step()
        model.zero_grad()

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
