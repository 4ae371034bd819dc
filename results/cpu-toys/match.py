"""Does a head copy values better that knows how many tokens before a place are those before its query? A toy on the CPU.

    python results/cpu-toys/match.py SHARD MODE SEED        # 1,200 steps, then lines of JSON

As claims.py. MODE: sharp (logits of codes times a factor that each token learns, as in sharp_codes.py), match (plus a learnt
gain of the token's times the weighted count of the last 8 tokens that stand before both places, by codes of 32 signs; the
fastest-turning quarter of the dimensions makes room for them), or both. What is claimed and read of values is as it was.
"""

import json
import sys
import time

import claims
import mix_shares as toy
import sharpness
import torch
import torch.nn.functional as F
from claims import readable
from tied_head import common_text

sys.path.insert(0, str(toy.Path(__file__).resolve().parents[2]))
from model.content import token_codes

LAGS, ENTRIES, STRIDE = 8, 32, 12
SETTINGS = ((2, 1, 8), (2, 1.3, 8), (2.5, 1, 8))
signs = token_codes(toy.V, toy.V, 128).float()
mode = tokens = None


def copied(layer, q, k, v, codes):
    T, stream = q.size(2), layer.stream
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    logits = 0.35 * q @ k.mT
    of_values, of_codes, layer.claims = readable(logits.masked_fill(~causal, float("-inf")))
    again = logits
    if mode != "sharp":
        slow = torch.ones(toy.D)
        slow[: toy.D // 8] = slow[toy.D // 2 : toy.D // 2 + toy.D // 8] = 0
        again = 0.35 * (q * slow) @ k.mT
    if mode != "match":
        again = again * (2 * torch.tanh(F.linear(stream, layer.w_sharp, layer.b_sharp) / 2)).exp()[:, None]
    if mode != "sharp":
        code = signs[tokens]
        before = sum(w * F.pad(code[..., STRIDE * lag : STRIDE * lag + ENTRIES], (0, 0, lag, 0))[:, :T]
                     for lag, w in enumerate(layer.w_lags)) / ENTRIES**0.5
        layer.gain = 8 * F.linear(stream, layer.w_gain, layer.b_gain)
        again = again + ((layer.gain * before) @ F.pad(before, (0, 0, 1, 0))[:, :T].mT)[:, None]
    values, again = (x.masked_fill(~seen, float("-inf")) for x, seen in ((logits, of_values), (again, of_codes)))
    return values.softmax(-1) @ v, (claims.sharp_codes * again).softmax(-1) @ codes


def forward(self, x, ve, codes):
    self.stream = x
    return sharpness.forward(self, x, ve, codes)


class Model(toy.Model):
    def forward(self, t):
        global tokens
        tokens = t
        return super().forward(t)


def main(shard, which, seed):
    global mode
    mode, sharpness.copied, toy.Attention.forward = which, copied, forward
    text = common_text(shard)
    held_out = text[-400_000:]
    torch.manual_seed(int(seed))
    model, start = Model(1), time.time()
    optimizers = toy.make_optimizers(model)
    reading = next(m for m in model.modules() if isinstance(m, toy.Attention) and m.copies)
    reading.w_lags = torch.nn.Parameter(torch.full((LAGS,), LAGS**-0.5))
    for name, size in (("w_sharp", (1, toy.C)), ("b_sharp", (1,)), ("w_gain", (1, toy.C)), ("b_gain", (1,))):
        setattr(reading, name, torch.nn.Parameter(torch.zeros(size)))
    learnt = [p for n, p in reading.named_parameters() if n.split("_")[-1] in ("lags", "sharp", "gain")]
    optimizers.append(torch.optim.Adam(learnt, lr=0.003, betas=(0.8, 0.95)))
    sharpness.train(model, optimizers, text[:-400_000], seed)
    print(json.dumps(dict(mode=mode, seed=int(seed), lags=[round(x, 2) for x in reading.w_lags.square().tolist()])), flush=True)
    for length, plain, again in sharpness.sequences(held_out):
        for claims.floor, claims.sharp_codes, claims.code_blocks in SETTINGS:
            line = dict(mode=mode, seed=int(seed), length=length, floor=claims.floor, codes=claims.sharp_codes)
            scores = sharpness.scores(model, length, plain, again)
            if mode != "sharp":
                levels = reading.gain.flatten().quantile(torch.tensor([0.05, 0.5, 0.95]))
                line["gain"] = [round(x, 2) for x in levels.tolist()]
            line |= scores | dict(claims=round(reading.claims, 2), seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
