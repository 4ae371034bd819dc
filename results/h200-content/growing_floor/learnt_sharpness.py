"""Why are values that are read not said? And would a sharpness of each token's, learnt, mend it? On the CPU, from a checkpoint.

    python learnt_sharpness.py CHECKPOINT SAMPLES TEXT TRAIN_SHARD...        # in a clone of 18fa91d; half an hour on 2 cores

CHECKPOINT: of copies_1. SAMPLES: samples.jsonl of its evaluation at 16k; TEXT: the shard that it was scored on. First, for the
first token said wrong of every value, the places to which the head that reads codes looks. Then nothing but a factor on the
logits with which codes are read is learnt, from 14 sequences with their mix: one for all tokens, or one a token, linear in the
layer's input; also taps of the codes' own. Losses of text, values and passages there, in 4 other sequences and in the samples.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path.cwd()))

import scoped_medium as scope
from data.retrieval import Mixer, count_tokens
from data.shards import HEADER_BYTES
from eval.retrieval import Library, Scorer, Settings, model_config, tail
from model.attention import BLOCK, unpack_seen
from model.content import TAPS

LENGTH, TRAINED, HELD_OUT, TEXT_ROWS = 16384, 14, 4, 400
TEXT, VALUE, PASSAGE = range(3)
NAMES = ("text", "values", "passages")


class Probe:
    """The model, and what its searching layer does with a sequence."""

    def __init__(self, path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model"] = {k: v.float() if v.is_floating_point() else v for k, v in state["model"].items()}
        self.scorer = Scorer(state, path, model_config(state, LENGTH), torch.device("cpu"))
        self.model, self.seen = self.scorer.model, {}
        (layer,) = self.model.config.spectral_layer_ids()
        self.content = self.model.blocks[layer].attn.content
        self.gate, self.codes = self.content.w_copy[0].detach(), self.model.codes_VD.float()
        self.note("blend", lambda q, k, documents, _: dict(q=q[0, :, 0], k=k[0, :, 0], id=documents.id_T))
        self.note("forward", lambda q, k, x, marks: dict(x=x[0], p=marks.p_BTPr[0, :, 0], l=marks.l_BTPr[0, :, 0]))
        self.note("read_codes", lambda q, k, v, codes, lists, bias, sharpness, _: dict(lists=lists))
        self.note("say", lambda x, found, _: dict(final=x))

    def note(self, name, kept):
        method = getattr(self.content, name)

        def noting(*arguments):
            result = method(*arguments)
            self.seen.update(kept(*arguments, result))
            return result

        setattr(self.content, name, noting)

    @torch.no_grad()
    def rows(self, tokens, targets, kinds):
        """What it takes to predict these targets with another sharpness."""
        tokens = torch.from_numpy(tokens.astype(np.int32))
        self.model.score_end(tokens, self.scorer.schedule.context(tokens, False, "reference"), BLOCK)
        s, rows, lists = self.seen, torch.tensor(targets) - 1, self.seen["lists"]
        visible = torch.zeros(len(rows), LENGTH // BLOCK, BLOCK, dtype=torch.bool)
        for row, at in zip(visible, rows.tolist(), strict=True):
            count = int(lists.num_BHN[0, 0, at // BLOCK])
            sees = unpack_seen(lists.seen_BHTw[0, 0, at], lists.idx_BHNW.size(-1))[:count]
            row[lists.idx_BHNW[0, 0, at // BLOCK, :count][sees].long()] = True
        visible = visible.flatten(1) & (torch.arange(LENGTH) <= rows[:, None]) & (s["id"] == s["id"][rows, None])
        final = s["final"][rows]
        return dict(rows=rows, visible=visible, kind=torch.tensor(kinds), tokens=tokens.long(), target=tokens.long()[rows + 1],
                    gate=final @ self.gate, z=(final @ self.model.head_w.T).half(), x=s["x"][rows].clone(),
                    **{name: s[name].half() for name in "qkpl"}, id=s["id"].clone())


class Reading(torch.nn.Module):
    """The codes' attention of the rows: with taps of its own or the head's, a factor a token or one for all."""

    def __init__(self, probe, own_taps, by_token):
        super().__init__()
        self.probe, self.own_taps, self.by_token = probe, own_taps, by_token
        taps = probe.content.taps.detach()[:, :, 0].clone()
        if own_taps:
            taps = 0.2 * torch.randn(2, TAPS, taps.size(-1))
            taps[:, 0] += 1
        self.taps = torch.nn.Parameter(taps, requires_grad=own_taps)
        self.w = torch.nn.Parameter(torch.zeros(probe.model.config.model_dim), requires_grad=by_token)
        self.log_factor, self.log_marks, self.log_gate = (torch.nn.Parameter(torch.zeros(())) for _ in range(3))
        self.log_marks.requires_grad_(own_taps)

    def blended(self, x, taps, documents):
        total = x.float() * taps[0]
        for lag in range(1, TAPS):
            before, id_before = F.pad(x.float(), (0, 0, lag, 0))[: len(x)], F.pad(documents, (lag, 0), value=-1)[: len(x)]
            total = total + before * (id_before == documents)[:, None] * taps[lag]
        rotated = self.probe.model.rotary(scope.norm(total)[None, :, None])
        return self.probe.content.fold(rotated, None, self.probe.model.config.folded_features)[0, :, 0]

    def logits(self, d):
        q, k = (self.blended(d[name], taps, d["id"]) for name, taps in zip("qk", self.taps, strict=True))
        marks = d["p"][d["rows"]].float() @ d["l"].float().T
        return scope.ATTENTION_SCALE * q[d["rows"]] @ k.T, self.log_marks.exp() * marks

    def weights(self, d, factor=None):
        if factor is None:
            z = d["x"] @ self.w + self.log_factor
            factor = (2 * torch.tanh(z / 2)).exp()[:, None] if self.by_token else self.log_factor.exp()
        content, marks = self.logits(d)
        return (factor * (content + marks)).masked_fill(~d["visible"], -1e9).softmax(-1)

    def forward(self, d, factor=None):
        """Loss of every row, and whether the target is the likeliest."""
        found = self.weights(d, factor) @ self.probe.codes[d["tokens"]]
        z = d["z"].float() + self.log_gate.exp() * d["gate"][:, None] * (found @ self.probe.codes.T) / self.probe.codes.size(1)
        logits = scope.LOGIT_CAP * torch.sigmoid(z / scope.LOGIT_TEMPERATURE)
        return F.cross_entropy(logits, d["target"], reduction="none"), z.argmax(-1) == d["target"]


@torch.no_grad()
def score(reading, sequences, factor=None):
    results = [(d["kind"], *reading(d, factor)) for d in sequences]
    kind, loss, right = (torch.cat(x) for x in zip(*results, strict=True))
    return {NAMES[k]: (round(loss[kind == k].mean().item(), 4), round(right[kind == k].float().mean().item(), 4))
            for k in kind.unique().tolist()}


def mixed_sequence(probe, mixer, tokens, step, index, draw):
    mixed, taken, targets, kinds = np.array(tokens), np.zeros(LENGTH + 2, bool), [], []
    for task in mixer.plan(step, tokens, index):
        for start, piece in zip(task.starts, task.pieces, strict=True):
            mixed[start : start + len(piece)] = piece
            taken[start : start + len(piece) + 1] = True
        start, end = task.starts[-1], task.starts[-1] + len(task.pieces[-1])
        if task.template is not None:
            end -= len(task.template.after)
            start = end - len(task.values[-1])
        else:
            start += 4
        here = [at for at in range(start, end) if at < LENGTH and (task.template is not None or draw.rand() < 0.25)]
        targets, kinds = targets + here, kinds + [VALUE if task.template is not None else PASSAGE] * len(here)
    text = [at + 1 for at in draw.permutation(np.arange(64, LENGTH - 1)) if not taken[at + 1] and not taken[at]][:TEXT_ROWS]
    return probe.rows(mixed[:LENGTH], targets + text, kinds + [TEXT] * len(text))


def fit(name, reading, trained, sets, steps=84):
    weight = torch.tensor([1 / TEXT_ROWS, 1 / LENGTH, 4 / LENGTH])  # text stands for all of the sequence's
    slow = [reading.w] if reading.by_token else []
    fast = [p for p in reading.parameters() if p.requires_grad and p is not reading.w]
    rates = [0.01, 0.003][: 1 + len(slow)]
    optimizer = torch.optim.Adam([dict(params=p) for p in (fast, slow) if p], betas=(0.8, 0.95))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (steps - step) / (0.6 * steps))
        d = trained[step % len(trained)]
        (reading(d)[0] * weight[d["kind"]]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps(dict(learnt=name, steps=steps) | {n: score(reading, s) for n, s in sets.items()}), flush=True)
    if reading.by_token:
        with torch.no_grad():
            kind = torch.cat([d["kind"] for s in list(sets.values())[1:] for d in s])
            factor = torch.cat([(2 * torch.tanh((d["x"] @ reading.w + reading.log_factor) / 2)).exp()
                                for s in list(sets.values())[1:] for d in s])
        levels = torch.tensor([0.05, 0.5, 0.95])
        print(json.dumps({f"factor of {NAMES[k]}, 5, 50, 95 %": factor[kind == k].quantile(levels).tolist() for k in range(3)}))
    if reading.own_taps:
        print(json.dumps(dict(taps_q_k=reading.taps.detach().square().mean(-1).sqrt().tolist())))


def main(checkpoint, samples, text, *shards):
    probe, started, draw = Probe(Path(checkpoint)), time.time(), np.random.RandomState(1)
    library = Library([text], 50256, 50257, Settings(tasks=("single",), lengths=(LENGTH,), samples=600, swaps=0))
    cells, wrong = {cell.variant: cell for cell in library.cells()}, []
    with open(samples) as lines:
        records = [r for r in map(json.loads, lines) if "0" in r["correct"][0]]
    as_trained = Reading(probe, False, False)
    for r in records:
        sample = library.sample(cells[r["variant"]], r["index"])
        first = sample.answers[0]
        assert tail(sample) == BLOCK
        before = draw.permutation(np.arange(64, first - 64))[:TEXT_ROWS]
        targets = [*range(first, first + sample.size), *(before + 1).tolist()]
        wrong.append(d := probe.rows(sample.tokens_T, targets, [VALUE] * sample.size + [TEXT] * TEXT_ROWS))
        row = r["correct"][0].index("0")
        with torch.no_grad():
            weight, (content, marks) = as_trained.weights(d)[row], as_trained.logits(d)
        print(json.dumps(dict(wrong=f"{r['variant']}/{r['index']}", answer=r["answer"][0][row], said=r["said"][0][row],
                              after=int(d["tokens"][first + row - 1]), looks_at=[
            dict(distance=int(d["rows"][row]) - at, weight=round(weight[at].item(), 3), token=int(d["tokens"][at]),
                 after=int(d["tokens"][at - 1]), logit=round((content + marks)[row, at].item(), 1))
            for at in weight.topk(4).indices.tolist()])), flush=True)
    tokens = [np.memmap(s, dtype=np.uint16, mode="r", offset=HEADER_BYTES) for s in shards]
    mixer, sequences = Mixer(0.08, 0.25, 0, count_tokens(tokens[0]), 50256), []
    for i in range(TRAINED + HELD_OUT):
        source = tokens[draw.randint(len(tokens))]
        at = draw.randint(len(source) - LENGTH - 1)
        sequences.append(mixed_sequence(probe, mixer, np.array(source[at : at + LENGTH + 1]), 10**6, i, draw))
    sets = dict(trained=sequences[:TRAINED], held_out=sequences[TRAINED:], wrong=wrong)
    for factor in (1, 1.5, 2, 3, 4):
        print(json.dumps(dict(factor=factor) | {n: score(as_trained, s, factor) for n, s in sets.items()}), flush=True)
    torch.manual_seed(1)
    for name, own_taps, by_token in (("a factor for all", False, False), ("a factor a token", False, True),
                                     ("taps", True, False), ("taps and a factor a token", True, True)):
        fit(name, Reading(probe, own_taps, by_token), sets["trained"], sets)
    print(json.dumps(dict(seconds=round(time.time() - started), torch=torch.__version__)))


if __name__ == "__main__":
    main(*sys.argv[1:])
