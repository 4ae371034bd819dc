"""The whole model: strict causality, pointer lists, arms, regularisers, telemetry, and what the compiler sees of it."""

import contextlib
import json
import math
import os
import re
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import scoped_medium as S
from data.shards import write_shard
from model import attention, attn_bias, content, selection
from model.attention import BLOCK, BlockLists, Documents
from model.attn_bias import CENTRE_EDGES, DELTA_EDGES, LayerTelemetry, PositionTables, Prediction, SpectralBias, SpectralShape
from model.selection import Claims

T = 1024  # 8 blocks
DELIMITER = 40
CPU = torch.device("cpu")
COMPILE = torch.compile
BASE = dict(VOCAB_SIZE=41, DOC_DELIMITER=DELIMITER, NUM_LAYERS=4, NUM_HEADS=2, HEAD_DIM=32, MODEL_DIM=64, TRAIN_SEQ_LEN=T,
            BATCH_TOKENS=T, VAL_SEQ_LEN=T, VAL_TOKENS=T)
BIAS = dict(SPECTRAL_BIAS=1, SPECTRAL_L_MAX=T + 1)
POINTERS = dict(BIAS, SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_LOCAL_BLOCKS=1, SPECTRAL_POINTER_HALF_BLOCKS=1,
                SPECTRAL_POINTER_GLOBAL_BLOCKS=1, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=2,
                SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP_STEPS=10)
SCHEDULED = dict(POINTERS, SPECTRAL_POINTER_SCHEDULE=1, SPECTRAL_POINTER_MID_FRAC=0.25, SPECTRAL_POINTER_FULL_FRAC=0.5,
                 SPECTRAL_POINTER_HALF_BLOCKS=2)
CONTENT = dict(SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SOURCE="content", SPECTRAL_POINTER_NEAR_BLOCKS=1,
               SPECTRAL_POINTER_GLOBAL_BLOCKS=0, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=1, SPECTRAL_POINTER_HEADS=1,
               SPECTRAL_LANDMARK_DIM=16, SPECTRAL_POINTER_FAR_BLOCKS=4, SPECTRAL_POINTER_FLOOR=-30, SPECTRAL_POINTER_COPY=0)
VARIANTS = {
    "A": {},
    "B": BIAS,
    "B append": dict(BIAS, SPECTRAL_QK_LAYOUT="append"),
    "C": POINTERS,
    "C all layers": dict(POINTERS, SPECTRAL_LAYERS="all", NUM_LAYERS=5),  # layer 2 of 5 has the short window
    "C append": dict(POINTERS, SPECTRAL_QK_LAYOUT="append", SPECTRAL_SHARE_HEADS=0),
    "C score_mod": dict(POINTERS, SPECTRAL_IMPL="score_mod"),
    "content": CONTENT,
    "content, every head and token": dict(CONTENT, SPECTRAL_POINTER_HEADS=2, SPECTRAL_POINTER_ASKING=128,
                                          SPECTRAL_POINTER_GLOBAL_BLOCKS=1),
    "content, copies": dict(CONTENT, SPECTRAL_POINTER_COPY=1),
    "content, bare copies": dict(CONTENT, SPECTRAL_POINTER_COPY=1, SPECTRAL_POINTER_QUIET=0, SPECTRAL_POINTER_TRUST=0,
                                 SPECTRAL_POINTER_FOCUS=0, SPECTRAL_POINTER_SHRINK=0),
    "content, followed": dict(CONTENT, SPECTRAL_POINTER_COPY=1, SPECTRAL_POINTER_FOLLOW=8),
    "content, shared": dict(CONTENT, SPECTRAL_POINTER_READERS=2, SPECTRAL_WINDOW_HOLD=0.9),
    "content and bias": dict(CONTENT, SPECTRAL_BIAS=1, SPECTRAL_L_MAX=T + 1, SPECTRAL_QK_LAYOUT="append"),
    "pooled": CONTENT | dict(SPECTRAL_POINTER_SOURCE="pooled", SPECTRAL_POINTER_HEADS=2, SPECTRAL_POINTER_GLOBAL_BLOCKS=1),
    "dense": dict(SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SOURCE="dense"),
    "dense, scaled": dict(SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SOURCE="dense", SPECTRAL_LENGTH_SCALE=1),
    "mixed": CONTENT | POINTERS | dict(SPECTRAL_POINTER_SOURCE="mixed", SPECTRAL_QK_LAYOUT="append"),
    "mixed, shared, copies": CONTENT | POINTERS | dict(SPECTRAL_POINTER_SOURCE="mixed", SPECTRAL_QK_LAYOUT="append",
                                                       SPECTRAL_POINTER_READERS=2, SPECTRAL_POINTER_COPY=1,
                                                       SPECTRAL_POINTER_FOLLOW=8),
    "C wide": dict(POINTERS, SPECTRAL_POINTER_HALF_BLOCKS=2, SPECTRAL_POINTERS=3, SPECTRAL_POINTER_GLOBAL_BLOCKS=0),
}


pytestmark = pytest.mark.usefixtures("one_thread_on_cpu")


def config_for(**variables):
    return S.Config.from_environment({name: str(value) for name, value in (BASE | variables).items()})


def noise(shape, key):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(str(key).encode())))


def model_for(alive=True, seed=0, spectral_noise=0.5, **variables):
    """A model on the CPU; alive: noise on every parameter, or projections that start at zero would hide everything. A
    parameter gets the same noise in every arm."""
    model = S.build_model(config_for(**variables), CPU)
    if alive:
        with torch.no_grad():
            for name, p in model.named_parameters():
                scale = (spectral_noise if "spectral" in name else
                     0.1 if "content" in name or p.ndim < 2 else p.size(-1) ** -0.5)
                p += scale * noise(p.shape, (name, seed))
    return model.eval()


def documents_of(length, seed, mean_length=350):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, DELIMITER, (length,), generator=generator, dtype=torch.int32)
    tokens[torch.rand(length, generator=generator) < 1 / mean_length] = DELIMITER
    return tokens


def context_of(model, tokens, step=60, total=100, training=False, backend="reference"):
    return S.Schedule(model.config, step, total).context(tokens, training, backend)


@torch.no_grad()
def logits_of(model, tokens, step=60):
    return model.logits(model.hidden(tokens, context_of(model, tokens, step))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Causality

CHANGES = (300, 512, 639, 1)  # inside a block, at the start of one, at the last token of one, right behind the start
ONE_DOCUMENT = dict(changes=(300, 639, 700, 1000), mean_length=10**9)  # nothing but this makes many claims


def leaks(model, seed, changes=CHANGES, mean_length=350):
    """Positions of change t after which the logits of some earlier position moved, bit for bit. Every t must move some
    logits at or after it."""
    tokens, other = documents_of(T, seed, mean_length), documents_of(T, seed + 100, mean_length)
    before, found = logits_of(model, tokens), []
    for t in changes:
        after = logits_of(model, torch.cat([tokens[:t], other[t:]]))
        assert not torch.equal(before[t:], after[t:])
        if not torch.equal(before[:t], after[:t]):
            found.append(t)
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_the_future(name):
    assert leaks(model_for(seed=0, **VARIANTS[name]), 0) == []
    assert leaks(model_for(seed=1, **VARIANTS[name]), 1, **ONE_DOCUMENT) == []


@pytest.mark.parametrize("name", VARIANTS)
def test_one_changed_token_is_not_seen_before_it(name):
    """A single delimiter more, or one less, moves document bounds and anchors too."""
    model, tokens = model_for(seed=2, **VARIANTS[name]), documents_of(T, 5)
    before = logits_of(model, tokens)
    for t in (384, 450, 511):
        changed = tokens.clone()
        changed[t] = 3 if tokens[t] == DELIMITER else DELIMITER
        after = logits_of(model, changed)
        assert torch.equal(before[:t], after[:t]) and not torch.equal(before[t:], after[t:])


def last_token_leads(delta_BHTM, documents, state, shape):
    leaders = delta_BHTM.detach()[:, :, BLOCK - 1 :: BLOCK]
    return BlockLists(*attn_bias.block_lists(leaders, documents.start_block_N, *state, *shape))


def middle_token_leads(delta_BHTM, documents, state, shape):
    leaders = delta_BHTM.detach()[:, :, BLOCK // 2 :: BLOCK]
    return BlockLists(*attn_bias.block_lists(leaders, documents.start_block_N, *state, *shape))


def last_tokens_document(tokens_T, delimiter):
    opens = tokens_T == delimiter
    start = torch.where(opens, torch.arange(len(tokens_T)), 0).cummax(0).values
    return Documents(opens.cumsum(0, dtype=torch.int32), (start[BLOCK - 1 :: BLOCK] // BLOCK).int())


@pytest.mark.parametrize("name", ["C", "C all layers", "C append"])
@pytest.mark.parametrize("rule", [last_token_leads, middle_token_leads])
def test_the_causality_test_finds_a_wrong_leader(name, rule, monkeypatch):
    monkeypatch.setattr(S, "pointer_lists", rule)
    found = sum((leaks(model_for(seed=seed, **VARIANTS[name]), seed) for seed in (0, 1)), [])
    assert {300, 639} & set(found)


def test_the_causality_test_finds_a_wrong_document(monkeypatch):
    monkeypatch.setattr(S.Documents, "of", last_tokens_document)
    assert sum((leaks(model_for(seed=seed), seed) for seed in range(3)), [])


def seen_too_early(make_lists):
    """Of claims that the whole block sees, tokens before the one that claimed too."""
    def lists(*arguments):
        return make_lists(*(x._replace(time_BHNW=torch.zeros_like(x.time_BHNW)) if isinstance(x, Claims) else x
                            for x in arguments))

    return lists


SEARCHING = [name for name in VARIANTS if name.startswith(("content", "pooled", "mixed"))]


@pytest.mark.parametrize("name", SEARCHING)
def test_the_causality_test_finds_claims_seen_too_early(name, monkeypatch):
    for make_lists in ("content_lists", "append_claims"):
        monkeypatch.setattr(content, make_lists, seen_too_early(getattr(content, make_lists)))
    assert leaks(model_for(seed=1, **VARIANTS[name]), 1, **ONE_DOCUMENT)


@pytest.mark.parametrize("name", [name for name in SEARCHING if name != "mixed"])  # whose offsets leave little to claim
def test_the_causality_test_finds_thresholds_of_the_block_itself(name, monkeypatch):
    mean_before = selection._mean_before
    monkeypatch.setattr(selection, "_mean_before", lambda value_BHN, memory: torch.cat(
        [mean_before(value_BHN, memory)[..., 1:], value_BHN[..., -1:]], -1))
    assert any(leaks(model_for(seed=seed, **VARIANTS[name]), seed, **ONE_DOCUMENT) for seed in (1, 2, 3))


@pytest.mark.parametrize("name", ["A", "C"])
def test_documents_do_not_see_each_other(name):
    model, tokens = model_for(**VARIANTS[name]), documents_of(T, 3)
    tokens[450] = DELIMITER
    before = logits_of(model, tokens)
    changed = torch.cat([documents_of(450, 9), tokens[450:]])
    assert torch.equal(logits_of(model, changed)[450:], before[450:])


def test_dense_layers_read_all_of_their_document():
    model, tokens = model_for(**VARIANTS["dense"], NUM_LAYERS=5), documents_of(T, 3, mean_length=10**9)
    tokens[450] = DELIMITER
    with recorded_lists() as seen:
        logits_of(model, tokens)
    first = [0, 0, 0, 0, 3, 3, 3, 3]  # block of the document's start, as the first token of each block has it
    for layer, lists in enumerate(seen):
        for n in range(8):
            row = lists.idx_BHNW[0, 0, n, : lists.num_BHN[0, 0, n]].tolist()
            assert layer == 2 or sorted(row) == list(range(first[n], n + 1))


def test_length_scale_against_a_loop():
    tokens, start = documents_of(T, 3, mean_length=200), 0
    found = attn_bias.length_scale(Documents.of(tokens, DELIMITER))
    for t in range(T):
        start = t if tokens[t] == DELIMITER else start
        assert found[t].item() == pytest.approx(math.sqrt(2 * math.log((t - start) / 10 + 1) + 1), rel=1e-5)
    plain, scaled = (model_for(**VARIANTS[name]) for name in ("dense", "dense, scaled"))
    a, b = logits_of(plain, tokens), logits_of(scaled, tokens)
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1:], b[1:])  # alone, a token cannot tell
    with pytest.raises(S.Stop, match="SPECTRAL_LENGTH_SCALE=1 is for SPECTRAL_POINTER_SOURCE=dense, not content"):
        config_for(**CONTENT, SPECTRAL_LENGTH_SCALE=1)


def test_score_end_scores_the_last_tokens():
    model, tokens = model_for(**POINTERS), documents_of(T, 4)
    with torch.no_grad():
        nats, said, _ = model.score_end(tokens, context_of(model, tokens), 5)
    log_p = logits_of(model, tokens).double().log_softmax(-1)
    for i in range(5):
        assert nats[i] == pytest.approx(-log_p[T - 6 + i, tokens[T - 5 + i]].item(), rel=1e-5)
        assert said[i] == log_p[T - 6 + i].argmax()


# ---------------------------------------------------------------------------------------------------------------------
# Lists over the schedule


@contextlib.contextmanager
def recorded_lists():
    """The (lists, long window?) of every attention layer that runs inside, in order."""
    seen, attend = [], content.pointer_attention

    def record(q, k, v, lists, documents, **options):
        seen.append(lists)
        return attend(q, k, v, lists, documents, **options)

    with mock.patch.object(content, "pointer_attention", record):
        yield seen


def test_budget_and_widths_over_the_whole_schedule():
    """local + M (2 radius + 1) + global blocks at most, none twice, none in the future; the widths never change."""
    model = model_for(**SCHEDULED, NUM_LAYERS=5)
    tokens = documents_of(T, 6, mean_length=2000)
    widths, radii, counts = set(), [], {}
    for step in range(0, 101, 5):
        schedule = S.Schedule(model.config, step, 100)
        with recorded_lists() as seen:
            logits_of(model, tokens, step)
        assert len(seen) == 5
        widths.add(tuple(lists.idx_BHNW.shape for lists in seen))
        radius = schedule.pointer_radius()
        radii.append(radius)
        budget = 1 + 2 * max(0, 2 * radius + 1) + schedule.global_blocks
        for layer, lists in enumerate(seen):
            num, idx = lists.num_BHN, lists.idx_BHNW
            limit = budget if layer in (0, 1, 3, 4) else max(1, schedule.long_window // 2)
            assert num.max() <= limit == schedule.listed_blocks(layer)
            for h in range(num.size(1)):
                for n in range(8):
                    row = idx[0, h, n, : num[0, h, n]].tolist()
                    assert len(row) == len(set(row)) and row[0] == n and max(row) <= n and min(row) >= 0
        counts[step] = sum(lists.num_BHN.float().mean().item() for lists in seen[:2])
    assert len(widths) == 1
    assert radii == [-1] * 5 + [1] * 5 + [2] * 11
    assert counts[20] < counts[25] < counts[100] and counts[10] < counts[5]  # radius -1, 1, 2; two anchors, one


def test_the_pointers_matter():
    """Keys that only the pointer windows list do change the output."""
    tokens = documents_of(T, 6, mean_length=10**9)
    tokens[0] = DELIMITER
    model = model_for(**SCHEDULED)
    off, half, full = (logits_of(model, tokens, step) for step in (24, 30, 60))
    assert torch.equal(off[:BLOCK], half[:BLOCK])  # the first block has nothing to point at
    assert not torch.equal(off, half) and not torch.equal(half, full)


def test_flops_per_token_against_a_counter():
    """The reference multiplies whole gathered blocks, so where every slot of the lists is used it does what is counted."""
    model, tokens = model_for(NUM_LAYERS=8).train(), documents_of(T + 1, 1)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], 100, training=True)).loss.backward()
    assert S.flops_per_token(model, S.Schedule(model.config, 100, 100)) * T == pytest.approx(counter.get_total_flops())


# ---------------------------------------------------------------------------------------------------------------------
# Arms at the start


def test_arms_share_every_other_weight():
    states = [model_for(alive=False, **variant).state_dict() for variant in VARIANTS.values() if "NUM_LAYERS" not in variant]
    for state in states[1:]:
        assert {k for k in state if "spectral" not in k and "content" not in k and k != "w_quiet"} == set(states[0])
        assert all(torch.equal(state[k], states[0][k]) for k in states[0])
    other = model_for(alive=False, SEED=1).state_dict()
    assert not torch.equal(other["embed.weight"], states[0]["embed.weight"])


@pytest.mark.parametrize("impl", [dict(SPECTRAL_QK_LAYOUT="append"), dict(SPECTRAL_IMPL="score_mod")])
def test_training_starts_as_a_no_op(impl):
    """With the spectral parameters at their start, and every other weight alive, B computes what A does."""
    plain, biased = model_for(), model_for(alive=False, **BIAS | impl)
    biased.load_state_dict(plain.state_dict(), strict=False)
    tokens = documents_of(T + 1, 7)
    inputs, targets = tokens[:-1], tokens[1:].long()
    with torch.no_grad():
        a, b = (m(inputs, targets, context_of(m, inputs)).loss.item() for m in (plain, biased))
    assert b == pytest.approx(a, rel=1e-6) and abs(a - math.log(128)) > 0.01
    alive = model_for(**BIAS | impl)
    alive.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert abs(alive(inputs, targets, context_of(alive, inputs)).loss.item() - a) > 1e-4  # the test can fail


def dense_bias(module, q, length):
    coefficients, prediction = module(q, PositionTables(module.shape.frequencies(), length, q.dtype)())
    return coefficients.query_features() @ coefficients.tables.key_TF.T, prediction


def test_peaks_differ_over_heads_and_pointers():
    """Each pointer on its own, its amplitude raised, makes a bias whose maximum lies at its own distance."""
    H, M, length = 4, 3, 4096
    shape = SpectralShape(H, 16, pointers=M, l_train=2048, l_max=65536)
    module = SpectralBias(shape, torch.Generator().manual_seed(0)).double()
    q = torch.zeros(1, length, H, 16, dtype=torch.float64)  # the output bias alone speaks
    peaks = []
    for m in range(M):
        with torch.no_grad():
            module.bias[:, 4 * M : 5 * M] = 0
            module.bias[:, 4 * M + m] = 1
        bias, prediction = dense_bias(module, q, length)
        delta = length - 1 - bias[0, :, -1].argmax(-1)
        assert torch.allclose(delta.double(), prediction.delta_BHTM[0, :, -1, m], atol=0.51)
        peaks += delta.tolist()
    assert len(set(peaks)) == H * M
    gaps = np.diff(np.log(sorted(peaks)))
    assert np.allclose(gaps, gaps.mean(), rtol=0.05)  # log-spaced
    assert min(peaks) < 128 * 1.3 and 2048 / 1.3 < max(peaks) <= 2048


@pytest.mark.parametrize("name", ["B", "C", "B append"])
def test_gradients_reach_every_spectral_parameter(name):
    """Once the amplitudes have moved, through the loss alone. The gate adds the same to every key of a row: no softmax
    sees it, so its columns have no gradient but rounding."""
    model = model_for(spectral_noise=0.1, **VARIANTS[name]).train()  # tame: nothing saturates
    tokens = documents_of(T + 1, 8)
    model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True)).loss.backward()
    for block in model.blocks:
        module = block.attn.spectral
        names = ["offset", "pi", "centre", "width", "amplitude", "slope", "gate"]
        sizes = {"offset": 2, "pi": 2, "centre": 2, "width": 2, "amplitude": 2, "slope": 1, "gate": 1}
        assert [sizes[n] for n in names] == module.sizes
        for grad in (module.w2.grad[0], module.bias.grad):
            columns = dict(zip(names, grad.split(module.sizes, -1), strict=True))
            for column, g in columns.items():
                if column == "gate":
                    assert g.abs().max() < 1e-5 * grad.abs().max()
                else:
                    assert (g != 0).all(), column
        assert (module.w1.grad != 0).all()
        assert columns["offset"].abs().max() > 1e-7


def test_the_start_trains_the_amplitudes_first():
    model = model_for(alive=False, **BIAS).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "spectral" not in name:
                p += 0.1 * noise(p.shape, name)
    tokens = documents_of(T + 1, 8)
    model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True)).loss.backward()
    grad = model.blocks[0].attn.spectral.bias.grad
    offset, pi, centre, width, amplitude, slope, gate = grad.split([2, 2, 2, 2, 2, 1, 1], -1)
    assert (amplitude != 0).all() and (slope != 0).all()
    assert not any(x.any() for x in (offset, pi, centre, width))


# ---------------------------------------------------------------------------------------------------------------------
# Regularisers, against the definitions in numpy, one query at a time


def spectral_module(seed=0, **changes):
    shape = SpectralShape(2, 16, l_train=512, l_max=8192, **changes)
    module = SpectralBias(shape, torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.5 * noise(p.shape, (tuple(p.shape), seed)).double()
    return module


def outputs_of_mlp(module, q):
    """z [queries, outputs] as numpy, and for every query its sizes-wise split."""
    s = module.shape
    w1, w2, bias = (p.detach().numpy() for p in (module.w1, module.w2, module.bias))
    rows = []
    for h in range(s.num_heads):
        a, b = (w[h if len(w) > 1 else 0] for w in (w1, w2))
        rows.append(np.maximum(q[0, :, h].numpy() @ a, 0) ** 2 @ b + bias[h])
    return np.concatenate(rows)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def parts(module, z):
    """delta* [M], pi [M], envelopes [M, K], amplitudes [M], slope of one query."""
    s = module.shape
    M, K = s.pointers, s.bands
    delta = 128 * (s.l_max / 128) ** sigmoid(z[:M])
    pi = np.exp(z[M : 2 * M]) / np.exp(z[M : 2 * M]).sum()
    x = np.linspace(np.log(2 * np.pi / s.l_max), np.log(2 * np.pi / s.l_train), K)
    centre = (x[0] + x[-1]) / 2 + (x[-1] - x[0]) / 2 * np.tanh(z[2 * M : 3 * M])
    width = (x[1] - x[0]) * (0.5 + 2 * sigmoid(z[3 * M : 4 * M]))
    envelope = np.exp(-((x - centre[:, None]) ** 2) / (2 * width[:, None] ** 2))
    return delta, pi, envelope / envelope.sum(1, keepdims=True), z[4 * M : 5 * M], np.tanh(z[5 * M]) / s.l_train, np.exp(x)


@pytest.mark.parametrize("seed,changes", [(0, {}), (1, dict(pointers=3, bands=4)), (2, dict(share_heads=False))])
def test_regularisers_against_their_definitions(seed, changes):
    module = spectral_module(seed, entropy_floor=0.6, **changes)
    q = noise((1, 128, 2, 16), seed).double()
    _, prediction = dense_bias(module, q, 128)
    K = module.shape.bands
    distances = np.linspace(0, 512, 4001)
    expected, entropies = [], []
    for z in outputs_of_mlp(module, q):
        delta, pi, envelope, amplitude, slope, omega = parts(module, z)
        weight = (pi * amplitude)[:, None] * envelope
        high = sum(weight[m, k] ** 2 * (k / (K - 1)) ** 2 for m in range(len(pi)) for k in range(K))
        waves = sum(weight[m, k] * np.cos(omega[k] * (distances - delta[m])) for m in range(len(pi)) for k in range(K))
        mean = np.trapezoid(waves + slope * distances, distances) / 512
        entropy = -(pi * np.log(pi)).sum()
        edges = [max(0, 0.05 - u) ** 2 + max(0, u - 0.95) ** 2 for u in np.log(delta / 128) / np.log(8192 / 128)]
        expected.append([high, mean**2, max(0, 0.6 - entropy), 400 * np.mean(edges)])
        entropies.append(entropy)
    expected = np.mean(expected, axis=0)
    assert (expected > 1e-4).all(), expected  # each of them is at work
    assert np.allclose(prediction.penalties.detach().numpy(), expected, rtol=1e-5)
    assert prediction.pi_entropy.item() == pytest.approx(np.mean(entropies), rel=1e-9)
    start = 0
    for h in range(2):
        for t in (0, 77):
            want = parts(module, outputs_of_mlp(module, q)[start + t])[0]
            assert np.allclose(prediction.delta_BHTM[0, h, t].detach().numpy(), want)
        start += 128


def test_regularisers_rest_at_zero():
    shape = SpectralShape(2, 16, l_train=512, l_max=8192)
    fresh = SpectralBias(shape, torch.Generator().manual_seed(0)).double()
    q = noise((1, 128, 2, 16), 3).double()
    high, mean, entropy, edge = dense_bias(fresh, q, 128)[1].penalties.tolist()
    assert high == mean == entropy == 0  # no amplitude, no slope, nearly even weights
    with torch.no_grad():
        fresh.w2.zero_()
        fresh.bias[:, :2] = torch.logit(torch.tensor([[0.051, 0.5], [0.3, 0.949]], dtype=torch.float64))
        assert dense_bias(fresh, q, 128)[1].penalties.abs().max() == 0
        fresh.bias[0, 0] = torch.logit(torch.tensor(0.04))
        assert dense_bias(fresh, q, 128)[1].penalties[3].item() == pytest.approx(400 * 0.01**2 / 4, rel=1e-4)
        fresh.bias[0, 2] = 30.0  # one pointer takes all: the whole floor is missing, for one of two heads
        assert dense_bias(fresh, q, 128)[1].penalties[2].item() == pytest.approx(shape.entropy_floor / 2)


def test_weights_of_the_regularisers():
    weights = dict(HIGH=0.5, MEAN=0.25, ENTROPY=2, EDGE=3)
    model = model_for(**BIAS, SPECTRAL_ENTROPY_FLOOR=0.6, **{f"SPECTRAL_REG_{k}": v for k, v in weights.items()})
    tokens = documents_of(T + 1, 8)
    with torch.no_grad():
        out = model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1]))
    penalties = np.mean([layer.prediction.penalties.numpy() for layer in out.telemetry], axis=0)
    assert len(out.telemetry) == 4 and (penalties > 0).all()
    assert (out.objective - out.loss).item() == pytest.approx(penalties @ [0.5, 0.25, 2, 3], rel=1e-4)
    free = model_for(**BIAS, **{f"SPECTRAL_REG_{k}": 0 for k in weights})
    with torch.no_grad():
        out = free(tokens[:-1], tokens[1:].long(), context_of(free, tokens[:-1]))
    assert out.objective == out.loss


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry


@pytest.mark.parametrize("edges", [DELTA_EDGES, CENTRE_EDGES])
def test_histogram_against_numpy(edges):
    generator = np.random.default_rng(0)
    values = np.concatenate([np.exp(generator.uniform(-9, 15, 500)), np.array(edges, dtype=float), [0.0]]).astype("f4")
    inside = np.clip(values, edges[0], np.nextafter(np.float32(edges[-1]), np.float32(0)))  # numpy's last bin is closed
    counts = np.histogram(inside, bins=np.array(edges, dtype="f4"))[0]
    assert np.allclose(attn_bias.histogram(torch.from_numpy(values), edges), counts / len(values))


def test_scope_stats_against_loops():
    H, M, L, local = 2, 2, 3, 2
    tokens = documents_of(T, 12)
    documents = Documents.of(tokens, DELIMITER)
    layers = [LayerTelemetry((noise((1, H, 8), layer).abs() * 3).int() + 1, Prediction(
        torch.exp(noise((1, H, T, M), layer).abs() * 3 + 2), torch.tensor(0.1 * layer), torch.arange(4.0) + layer), None)
        for layer in range(L)]
    layers[1] = layers[1]._replace(num_BHN=torch.arange(1, 9, dtype=torch.int32).view(1, 1, 8))  # a list for all heads
    stats = attn_bias.scope_stats(layers, documents, local)

    nums = [int(layer.num_BHN[0, h % layer.num_BHN.size(1), n]) for layer in layers for h in range(H) for n in range(8)]
    ranked = sorted(nums)
    assert stats["kv_unique_blocks"] == pytest.approx(dict(
        mean=np.mean(nums), p50=ranked[len(nums) // 2], p90=ranked[int(0.9 * len(nums))], max=max(nums)))
    assert stats["kv_unique_blocks_by_layer"] == pytest.approx([np.mean(nums[16 * i : 16 * i + 16]) for i in range(L)])

    start, outside, zero, first, centres = 0, [], [], [], []
    for t in range(T):
        if t % BLOCK == 0:
            start = max(i for i in [0, *np.flatnonzero(tokens[: t + 1] == DELIMITER)])
        for layer in layers:
            for delta in layer.prediction.delta_BHTM[0, :, t].flatten().tolist():
                centre = max(0.0, t - delta)
                outside.append(centre // BLOCK <= t // BLOCK - local)
                zero.append(centre < BLOCK)
                first.append(centre // BLOCK <= start // BLOCK)
                centres.append(centre / (t + 1))
    deltas = np.concatenate([layer.prediction.delta_BHTM.numpy().ravel() for layer in layers])
    assert stats["outside_local"] == pytest.approx(np.mean(outside), abs=1e-3)
    assert stats["at_block_zero"] == pytest.approx(np.mean(zero), abs=1e-3)
    assert stats["at_document_start"] == pytest.approx(np.mean(first), abs=1e-3)
    assert stats["delta_mean"] == pytest.approx(deltas.mean(), rel=1e-4)
    assert np.allclose(stats["delta_histogram"], np.histogram(np.minimum(deltas, 2**20 - 1), DELTA_EDGES)[0] / len(deltas),
                       atol=1e-3)
    assert np.allclose(stats["centre_histogram"], np.histogram(centres, CENTRE_EDGES)[0] / len(centres), atol=1e-3)
    assert stats["pi_entropy"] == pytest.approx(0.1)
    assert stats["penalties"] == pytest.approx(dict(high_band=1, zero_mean=2, entropy_floor=3, edge=4))
    json.dumps(stats, allow_nan=False)


def test_telemetry_counts_the_lists_that_attention_reads():
    model, tokens = model_for(**POINTERS), documents_of(T, 13, mean_length=10**9)
    tokens[[0, 450]] = DELIMITER  # the second document is clamped at block 3
    context = context_of(model, tokens)
    with recorded_lists() as lists, torch.no_grad():
        telemetry = model.hidden(tokens, context)[1]
    assert len(lists) == len(telemetry) == 4
    unique = []
    for used, layer in zip(lists, telemetry, strict=True):
        for h in range(2):
            for n in range(8):
                first = int(context.documents.start_block_N[n])
                reach = {n, first}
                for delta in layer.prediction.delta_BHTM[0, h, BLOCK * n].tolist():
                    centre = math.floor((BLOCK * n - round(delta)) / BLOCK)
                    reach |= {min(max(block, first), n) for block in (centre - 1, centre, centre + 1)}
                assert set(used.idx_BHNW[0, h, n, : used.num_BHN[0, h, n]].tolist()) == reach
                unique.append(len(reach))
    stats = attn_bias.scope_stats(telemetry, context.documents, 1)
    assert stats["kv_unique_blocks"]["mean"] == pytest.approx(np.mean(unique))
    assert stats["kv_unique_blocks"]["max"] == max(unique) > 2


def test_telemetry_holds_no_graph():
    model, tokens = model_for(**POINTERS).train(), documents_of(T + 1, 13)
    out = model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True))
    for layer in out.telemetry:
        kept = (layer.prediction.delta_BHTM, layer.prediction.pi_entropy, layer.num_BHN)
        assert not any(x.requires_grad for x in kept)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler sees: one graph of the whole forward, whatever the step


@pytest.fixture
def fresh_dynamo(monkeypatch):
    """A plain graph capture, without code generation; FlexAttention admits the CPU where nothing differentiates it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler backend that runs what it is given, and notes how often it was called and what reads the device."""

    def __init__(self):
        self.count, self.reads = 0, []

    def __call__(self, graph, inputs):
        self.count += 1
        names = [str(node.target) for module in graph.modules() if isinstance(module, torch.fx.GraphModule)
                 for node in module.graph.nodes]
        self.reads += [name for name in names if name in ("item", "tolist", "cpu", "numpy", "nonzero")
                       or name.startswith("aten._assert_scalar")]  # what follows a shape read from data
        return graph


def graphs_over_the_schedule(variant):
    """The graphs of the forward at steps that differ in every scheduled value; fullgraph refuses some device reads, and
    captures the others."""
    model, tokens = model_for(**variant, NUM_LAYERS=2), documents_of(T + 1, 14)
    for block in model.blocks:
        block.attn.backend = "flex"
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for step in (0, 5, 30, 70, 99):
            context = context_of(model, tokens[:-1], step, backend="flex")
            assert compiled(tokens[:-1], tokens[1:].long(), context).loss.isfinite()
    return graphs


@pytest.mark.parametrize("name", ["A", "B", "C", "C append", "C score_mod", "content", "content, copies",
                                  "content and bias", "mixed", "dense"])
def test_one_graph_without_device_reads(name, fresh_dynamo):
    graphs = graphs_over_the_schedule(VARIANTS[name] | (SCHEDULED if "C" in name else {}))
    assert graphs.count == 1 and graphs.reads == []


def test_the_graph_test_finds_a_device_read(fresh_dynamo, monkeypatch):
    rule = S.pointer_lists
    monkeypatch.setattr(S, "pointer_lists", lambda delta, *rest: rule(delta * delta.max().item(), *rest))
    assert set(graphs_over_the_schedule(SCHEDULED).reads) == {"item"}


def test_the_graph_test_finds_a_recompilation(fresh_dynamo, monkeypatch):
    values_at = S.Schedule.context

    def context(self, *args):
        made = values_at(self, *args)
        return made._replace(pointers=made.pointers._replace(radius=self.pointer_radius()))

    rule = S.pointer_lists
    monkeypatch.setattr(S.Schedule, "context", context)
    monkeypatch.setattr(S, "pointer_lists", lambda delta, documents, state, shape: rule(
        delta, documents, state._replace(radius=torch.full((), state.radius, dtype=torch.int32)), shape))
    assert graphs_over_the_schedule(SCHEDULED).count == 3


class DeviceReads(TorchDispatchMode):
    """Notes the operators that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Notes the shapes of everything computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)}
        return out


def test_a_long_evaluation_holds_no_whole_mlp_and_no_whole_logits(monkeypatch):
    model, tokens = model_for(**VARIANTS["C"]).eval(), documents_of(T + 1, 15)
    whole_mlp, whole_logits = {(1, T, 4 * 64), (T, 4 * 64)}, {(T, 128)}

    def evaluate():
        with torch.no_grad(), Sizes() as sizes:
            return model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=False)).loss, sizes.seen

    loss, seen = evaluate()
    assert seen & whole_mlp and seen & whole_logits
    monkeypatch.setattr(S, "EVAL_CHUNK", 384)  # not a divisor of T
    chunked, seen = evaluate()
    assert not seen & (whole_mlp | whole_logits)
    assert torch.allclose(chunked, loss, rtol=1e-6)


@pytest.mark.parametrize("name", ["A", "B", "C", "content", "content, copies"])
def test_a_training_forward_and_backward_never_wait_for_the_device(name):
    model, tokens = model_for(**VARIANTS[name]).train(), documents_of(T + 1, 14)
    with DeviceReads() as reads:
        out = model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True))
        out.objective.backward()
    assert reads.seen == []
    with DeviceReads() as reads:
        out.loss.item()
    assert len(reads.seen) == 1


def test_the_list_operators_never_wait_for_the_device():
    """The compiler does not look into them, so nothing else would tell."""
    documents = Documents.of(documents_of(T, 3), DELIMITER)
    one = torch.ones((), dtype=torch.int32)
    with DeviceReads() as reads:
        num, idx = attn_bias.block_lists._init_fn(torch.rand(1, 2, 8, 2) * T, documents.start_block_N, one, one, one, 2, 1, 1)
        attention.flex_lists._init_fn(num, idx, documents.id_T, 8, False)
        attention.flex_lists._init_fn(num, idx, documents.id_T, 0, False)
    assert reads.seen == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for name, seed in (("train", 0), ("val", 1)):
        tokens = documents_of(8000, seed)
        words = torch.arange(8000, dtype=torch.int32) % 24 + DELIMITER  # the first of them is the delimiter: left alone
        tokens = torch.where((torch.arange(8000) % 3 == 0) & (tokens != DELIMITER) & (words != DELIMITER), words, tokens)
        write_shard(root / f"{name}.bin", tokens.numpy())
    return dict(TRAIN_FILES=root / "train.bin", VAL_FILES=root / "val.bin")


def compiled_run(shards, logs, backend, monkeypatch, **variables):
    """A run of the script with TORCH_COMPILE=1 that crosses every change of every schedule; returns its directory. Needles ask
    for more words than the other tests have."""
    monkeypatch.setattr(torch, "compile", lambda *args, **options: COMPILE(*args, **options | dict(backend=backend, mode=None)))
    values = BASE | SCHEDULED | shards | dict(
        TRAIN_SEQ_LEN=512, BATCH_TOKENS=512, VAL_SEQ_LEN=256, VAL_TOKENS=512, NUM_LAYERS=2, NUM_ITERATIONS=8, VAL_LOSS_EVERY=3,
        SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP_STEPS=3, SCOPE_LOG_EVERY=2, SAVE_CHECKPOINT=0, LOG_DIR=logs, RUN_NAME="r",
        TORCH_COMPILE=1, VOCAB_SIZE=64, NEEDLE_EVAL=1, NEEDLE_SEQ_LEN=384, NEEDLE_DISTANCES="64,100", NEEDLE_ANCHOR_LEN=2,
        NEEDLE_VALUE_LEN=2, NEEDLE_SAMPLES_PER_DISTANCE=2) | variables
    with mock.patch.dict(os.environ, {k: str(v) for k, v in values.items()}, clear=True):
        S.main([])
    return logs / values["RUN_NAME"]


def record_lines(run):
    clock = ("step_ms", "tokens_per_s", "memory_gib")
    return [{k: v for k, v in json.loads(line).items() if k not in clock}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("source", [{}, CONTENT | dict(SPECTRAL_BIAS=0)])
def test_no_schedule_recompiles(source, shards, tmp_path, fresh_dynamo, monkeypatch):
    """The compiled script over every change of every schedule."""
    anchors = dict(SPECTRAL_POINTER_GLOBAL_BLOCKS=1, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=2)
    run = compiled_run(shards, tmp_path, "eager", monkeypatch, **source | anchors)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recompiles_after_warmup"] == 0
    log = (run / "log.txt").read_text()
    stats = [json.loads(line)["schedule"] for line in log.splitlines() if line.startswith('{"tag": "SCOPE_STATS"')]
    assert [(s["radius"], s["global_blocks"]) for s in stats] == [(-1, 2), (1, 1), (2, 1), (2, 1)]
    assert int(re.search(r"warm-up: .* s, (\d+) graphs compiled", log)[1]) >= 3  # training, validation, needles


def test_warming_up_leaves_nothing_behind(shards, tmp_path, fresh_dynamo, monkeypatch):
    few = dict(NUM_ITERATIONS=4, NEEDLE_EVAL=0, NEEDLE_SEQ_LEN=65536)
    warm = compiled_run(shards, tmp_path, "eager", monkeypatch, WARMUP_STEPS=2, RUN_NAME="warm", **few)
    cold = compiled_run(shards, tmp_path, "eager", monkeypatch, WARMUP_STEPS=0, RUN_NAME="cold", **few)
    assert record_lines(warm) == record_lines(cold) and len(record_lines(warm)) == 4 + 3


def test_gradients_outlive_cuda_graphs(shards, tmp_path, fresh_dynamo, monkeypatch):
    """Graph replays reuse the memory of their outputs: under them gradients are tensors of our own, with the same sums."""
    few = dict(NUM_ITERATIONS=3, NEEDLE_EVAL=0, NEEDLE_SEQ_LEN=65536, BATCH_TOKENS=1024)
    owned = []
    step = S.Trainer.train_step

    def watched(trainer, sequences):
        before = [p.grad is not None and p.grad.data_ptr() for p in trainer.model.parameters()]
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
        result = step(trainer, sequences)
        owned.append(before == [p.grad is not None and p.grad.data_ptr() for p in trainer.model.parameters()] and all(before))
        return result

    plain = compiled_run(shards, tmp_path, "eager", monkeypatch, RUN_NAME="plain", **few)
    monkeypatch.setattr(S.Trainer, "train_step", watched)
    few |= dict(RUN_NAME="graphs", TORCH_COMPILE_MODE="reduce-overhead")
    graphs = compiled_run(shards, tmp_path, "eager", monkeypatch, **few)
    assert owned and all(owned)
    assert record_lines(plain) == record_lines(graphs)


def test_a_compiler_that_fails(shards, tmp_path, fresh_dynamo, monkeypatch):
    """TORCH_COMPILE_FALLBACK_TO_EAGER=1 goes on uncompiled, from untouched weights."""

    def broken(graph, inputs):
        raise RuntimeError("no code for this graph")

    few = dict(NUM_ITERATIONS=3, NEEDLE_EVAL=0, NEEDLE_SEQ_LEN=65536)
    fallback = compiled_run(shards, tmp_path, broken, monkeypatch, TORCH_COMPILE_FALLBACK_TO_EAGER=1, RUN_NAME="fell", **few)
    plain = compiled_run(shards, tmp_path, "eager", monkeypatch, TORCH_COMPILE=0, RUN_NAME="plain", **few)
    assert record_lines(fallback) == record_lines(plain)
    assert "going on uncompiled" in (fallback / "log.txt").read_text()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled_run(shards, tmp_path, broken, monkeypatch, RUN_NAME="failed", **few)
