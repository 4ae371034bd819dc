"""Does being drawn to what stands behind the places just found keep a head from jumping, as a link asks? A toy on the CPU.

    python results/cpu-toys/links.py SHARD SEED             # 2,400 steps, then lines of JSON
    python results/cpu-toys/links.py SHARD SEED longer      # chains of up to four links among the training tasks

The toy of keys.py, but of the training tasks 20 % ask through one link and 10 % through two: K2 := K1 stated with other words
than K1 := V, and the answer spells the way, K1 between its value behind K2 and the link's words. At K1's end the last seven
tokens were found in the statement of K2, and the next one stands in that of K1. Scored as there, on its eight statements of one
template and on 128 sequences for none, one and two links: the first words of the answer, those behind a link and those behind
the jump to the next statement, and whole answers; and text and values of other statements, as in sharpness.py.

`longer`: as many tasks ask through links, 12 %, 8 %, 5 % and 5 % of all through one, two, three and four.
"""

import functools
import json
import sys
import time

import keys
import mix_shares as toy
import numpy as np
import sharpness
import torch
import two_heads
from tied_head import common_text

HOPS, LONGER, STEPS, ASKED = (0.7, 0.2, 0.1), (0.7, 0.12, 0.08, 0.05, 0.05), 2400, 128
ASKED_HOPS = (0, 1, 2, 4)
FOLLOWS = (None, (8, 7, 0, 0), (8, 7, 2, 0), (2, 7, 2, 1), (4, 7, 2, 1), (8, 7, 2, 1))
TEXT = ((keys.FOCUS, None), (keys.FOCUS, (4, 7, 2, 1)))  # those that text is scored with too


def task(rng, hops):
    """(statements in the order of their making, question, where its answer and every jump's next words start)."""
    words = rng.permutation(60)[: 2 * (rng.randint(4) + 1)].reshape(2, -1)
    between, link, after, link_after = words[0, :-1], words[1, :-1], words[0, -1:], words[1, -1:]
    names = rng.choice(np.arange(300, 4096), (hops + 1, keys.KEY), False)
    value = rng.choice(np.arange(100, 4096), keys.VALUE, False)
    said = [np.concatenate([names[0], between, value, after])]
    said += [np.concatenate([names[i + 1], link, names[i], link_after]) for i in range(hops)]
    way = [part for i in range(hops, 0, -1) for part in (names[i], link)]
    starts = [keys.KEY + len(link) + i * (keys.KEY + len(link)) for i in range(hops)]
    starts += [hops * (keys.KEY + len(link)) + keys.KEY + len(between)]
    return said, np.concatenate([*way, names[0], between, value, after]), starts


def batch(rng, text, passages, statements, hops=HOPS):
    tokens = np.empty((toy.B, toy.T + 1), np.int64)
    for row in tokens:
        start = rng.randint(len(text) - toy.T - 1)
        row[:] = text[start : start + toy.T + 1]
        free = np.arange(toy.T + 1) > 0
        for _ in range(rng.poisson(statements * toy.T / 32)):
            said, question, _ = task(rng, rng.choice(len(hops), p=hops))
            rng.shuffle(said)
            for _ in range(40):
                starts = np.sort(rng.randint(1, toy.T + 2 - len(question), len(said) + 1))
                slots = [np.arange(at, at + len(one)) for at, one in zip(starts, [*said, question], strict=True)]
                spots = np.concatenate(slots)
                if len(set(spots)) == len(spots) and free[spots].all():
                    row[spots], free[spots] = np.concatenate([*said, question]), False
                    break
    return torch.from_numpy(tokens), None


def questions(rng, text, hops):
    for _ in range(ASKED):
        start = rng.randint(len(text) - toy.T - 1)
        row = text[start : start + toy.T + 1].astype(np.int64)
        said, question, starts = task(rng, hops)
        rng.shuffle(said)
        for at, one in zip(np.sort(rng.choice(6, len(said), False)), said, strict=True):
            row[1 + 24 * at : 1 + 24 * at + len(one)] = one
        row[-len(question) :] = question
        yield torch.from_numpy(row)[None], toy.T + 1 - len(question) + np.array(starts)


def score(model, text, line):
    """Lines of JSON for a model, which `line` names."""
    start = time.time()
    near, far = sharpness.sequences(text)
    asked = {f"{hops} hops": list(questions(np.random.RandomState(99), text, hops)) for hops in ASKED_HOPS}
    eight = [[] for _ in range(4)]
    for tokens, at, between in keys.questions(np.random.RandomState(99), text):
        eight[between].append((tokens, np.array([at])))
    asked |= {f"8 keys, {between} words": samples for between, samples in enumerate(eight)}
    two_heads.readable, two_heads.fair, two_heads.runs, two_heads.shrink = keys.lasting, True, True, 1
    for two_heads.focus, two_heads.follow in [(focus, follow) for focus in (None, keys.FOCUS) for follow in FOLLOWS]:
        line = dict(line, focus=two_heads.focus, follow=two_heads.follow, near=None, far=None)
        for name, samples in asked.items():
            firsts, whole = [], []
            with torch.no_grad():
                for tokens, at in samples:
                    right = (model(tokens[:, :-1])[0].argmax(-1) == tokens[0, 1:]).numpy()
                    firsts.append(right[at - 1])
                    whole.append(right[at[0] - 1 : -1].all())
            line[name] = [round(x, 3) for x in (*np.mean(firsts, 0).tolist(), float(np.mean(whole)))]
        if (two_heads.focus, two_heads.follow) in TEXT:
            line |= dict(near=sharpness.scores(model, *near), far=sharpness.scores(model, *far))
        print(json.dumps(line | dict(seconds=round(time.time() - start))), flush=True)


def main(shard, seed, *longer):
    toy.Attention.forward, toy.STEPS = sharpness.forward, STEPS
    toy.batch = functools.partial(batch, hops=LONGER if longer else HOPS)
    text = common_text(shard)
    torch.manual_seed(int(seed))
    model = two_heads.Model(0, 10)
    sharpness.train(model, two_heads.optimizers_of(model), text[:-400_000], seed, statements=0.2)
    score(model, text[-400_000:], dict(seed=int(seed), longer=bool(longer)))


if __name__ == "__main__":
    main(*sys.argv[1:])
