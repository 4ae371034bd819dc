"""What tells a key from the others of its template, and does it help to be drawn to what stands behind the places just found?
A toy on the CPU.

    python results/cpu-toys/keys.py SHARD KNOWN SEED        # 1,200 steps, then lines of JSON

The toy of two_heads.py (QUIET 10), but a statement is a key of four words, none to three words of its template, a value of six
and a word, and KNOWN is the share of the training statements that take their template from another one of the sequence. Scored,
shrunk by 1 and divided, with a focus on runs or following or both, on natural text and statements as in focus.py, and on 256
sequences with eight statements of one template and a question for one of them: first tokens and whole values said right, by the
number of words between key and value. In scoring a claim lasts 32 tokens: eight equal matches claim nothing, and the key has
been found before the words behind it.
"""

import json
import sys
import time
from collections import defaultdict

import claims
import mix_shares as toy
import numpy as np
import sharpness
import torch
import torch.nn.functional as F
import two_heads
from tied_head import common_text

KEY, VALUE, STATEMENTS, ASKED = 4, 6, 0.15, 256
FOCUS, FOLLOW = (1, 3), (8, 7, 0, 0)
SETTINGS = ((None, None, True), (FOCUS, None, True), (None, (4, 7, 0, 0), False), (None, FOLLOW, True),
            (None, (16, 7, 0, 0), False), (None, (8, 4, 0, 0), False), (FOCUS, FOLLOW, True))  # (focus, follow, long text too)
LASTING = 32  # tokens


def template(rng):
    words = rng.choice(60, rng.randint(4) + 1, replace=False)
    return words[:-1], words[-1:]


def piece(rng, template):
    between, after = template
    key, value = rng.choice(np.arange(300, 4096), KEY, False), rng.choice(np.arange(100, 4096), VALUE, False)
    return np.concatenate([key, between, value, after])


def batch_of(known):
    def batch(rng, text, passages, statements):
        tokens = np.empty((toy.B, toy.T + 1), np.int64)
        for row in tokens:
            start = rng.randint(len(text) - toy.T - 1)
            row[:] = text[start : start + toy.T + 1]
            free, templates = np.arange(toy.T + 1) > 0, []
            for _ in range(rng.poisson(statements * toy.T / (2 * (KEY + VALUE + 2.5)))):
                if not templates or rng.rand() >= known:
                    templates.append(template(rng))
                    chosen = templates[-1]
                else:
                    chosen = templates[rng.randint(len(templates))]
                said = piece(rng, chosen)
                places = [at for at in rng.randint(1, toy.T + 2 - len(said), 40) if free[at : at + len(said)].all()]
                pair = next(((p, q) for p in places for q in places if p + len(said) < q), None)
                for at in pair or ():
                    row[at : at + len(said)] = said
                    free[at : at + len(said)] = False
        return torch.from_numpy(tokens), None

    return batch


def questions(rng, text):
    """(tokens [1, T + 1], where the value starts, words between) of sequences whose end asks for one of eight statements."""
    for number in range(ASKED):
        start, between = rng.randint(len(text) - toy.T - 1), number % 4
        row = text[start : start + toy.T + 1].astype(np.int64)
        words = rng.choice(60, between + 1, replace=False)
        said = [piece(rng, (words[:-1], words[-1:])) for _ in range(8)]
        size = len(said[0])
        for i, one in enumerate(said):
            row[1 + i * (size + 12) : 1 + i * (size + 12) + size] = one
        row[-size:] = said[1 + rng.randint(6)]
        yield torch.from_numpy(row)[None], toy.T + 1 - size + KEY + between, between


def lasting(logits_BHTT):
    """As claims.readable, but every token reads what the last ones claimed too."""
    of_values, of_codes, number = claims.readable(logits_BHTT)
    causal = torch.ones_like(of_values[0, 0]).tril()

    def last(seen):
        seen = F.pad(seen.float().flatten(0, 1).mT, (LASTING - 1, 0))
        return (F.max_pool1d(seen, LASTING, 1).mT.view_as(of_values) > 0) & causal

    return last(of_values), last(of_codes), number


def score(model, text, line):
    """Lines of JSON for a model, which `line` names."""
    start, asked = time.time(), list(questions(np.random.RandomState(99), text))
    near, far = sharpness.sequences(text)
    two_heads.readable, two_heads.fair, two_heads.runs, two_heads.shrink = lasting, True, True, 1
    for two_heads.focus, two_heads.follow, both in SETTINGS:
        first, whole = defaultdict(list), defaultdict(list)
        with torch.no_grad():
            for tokens, at, between in asked:
                right = (model(tokens[:, :-1])[0].argmax(-1) == tokens[0, 1:])[at - 1 : at - 1 + VALUE]
                first[between].append(right[0].item())
                whole[between].append(right.all().item())
        line |= dict(focus=two_heads.focus, follow=two_heads.follow)
        for name, hits in (("first", first), ("whole", whole)):
            line[name] = [round(float(np.mean(hits[between])), 4) for between in range(4)]
        line |= dict(near=sharpness.scores(model, *near), far=sharpness.scores(model, *far) if both else None)
        print(json.dumps(line | dict(seconds=round(time.time() - start))), flush=True)


def main(shard, known, seed):
    toy.Attention.forward, toy.batch = sharpness.forward, batch_of(float(known))
    text = common_text(shard)
    torch.manual_seed(int(seed))
    model = two_heads.Model(0, 10)
    sharpness.train(model, two_heads.optimizers_of(model), text[:-400_000], seed, statements=STATEMENTS)
    score(model, text[-400_000:], dict(known=float(known), seed=int(seed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
