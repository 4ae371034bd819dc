"""Content pointers: the landmarks and their losses against loops, what they teach, and the whole search in a model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_model import BASE, CONTENT, DELIMITER, T, config_for, context_of, documents_of, logits_of, model_for, noise

import scoped_medium as S
from model.attention import BLOCK, BlockLists, Documents
from model.attn_bias import FOLLOWED, BiasCoefficients, PositionTables, follow, place_codes, place_frequencies
from model.content import LEAST_PAST, LOSSES, TAPS, ContentPointers, ContentShape, Heads, Pointing, content_stats, token_codes
from model.head import FP8_W_SCALE, quantise_w
from model.selection import Claims, odds_floor

pytestmark = pytest.mark.usefixtures("one_thread_on_cpu")
COPIES = dict(CONTENT, SPECTRAL_POINTER_COPY=1, SPECTRAL_POINTER_QUIET=0, SPECTRAL_POINTER_TRUST=0, SPECTRAL_POINTER_FOCUS=0,
              SPECTRAL_POINTER_SHRINK=0)
SHAPE = ContentShape(heads=2, head_dim=32, stream_dim=24, dim=16, rows=16)


def pointers(seed=0, shape=SHAPE):
    module = ContentPointers(shape, torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += 0.3 * noise(p.shape, (name, seed))
    return module


def heads(seed, length=T, count=3):
    return [noise((1, length, count, 32), (seed, i)).double() for i in range(2)]


@pytest.mark.parametrize(("readers", "count"), [(0, 2), (1, 2), (3, 3), (4, 4)])
def test_blend_against_loops(readers, count):
    """Of the heads that read what is found: the pointer heads, two of four, and whoever else does."""
    documents = Documents.of(documents_of(T, 1, mean_length=60), DELIMITER)
    module = pointers(shape=replace(SHAPE, readers=readers))
    q, k = heads(1, count=4)
    for x, taps, found in zip((q, k), module.taps, module.blend(q, k, documents), strict=True):
        assert torch.equal(found[:, :, count:], x[:, :, count:])
        for t in [*range(6), *range(T - 300, T)]:
            total = sum(taps[lag] * x[0, t - lag, :count] for lag in range(TAPS)
                        if t >= lag and documents.id_T[t] == documents.id_T[t - lag])
            torch.testing.assert_close(found[0, t, :count], total)


def test_maps_start_as_an_estimate_of_the_content():
    module = ContentPointers(ContentShape(heads=1, head_dim=128, dim=64), torch.Generator().manual_seed(0))
    q, k = (torch.nn.functional.rms_norm(noise((1, 500, 1, 128), i), (128,)) for i in range(2))
    marks = module(q, q + k)
    found, exact = (marks.p_BTPr * marks.l_BTPr).sum(-1).detach(), (q * (q + k)).sum(-1) / 128**0.5
    assert found.mean() == pytest.approx(exact.mean().item(), rel=0.1) and exact.mean() > 10


def test_folding_adds_the_marks_and_spares_the_rest():
    """scale q' . k' = scale q . k over the dimensions left + p . l; those that rotate, and the bias's, are left."""
    module, scale, reserved = pointers(), 0.12, 6
    shape = SHAPE.__class__(heads=2, head_dim=64, dim=16)
    module.shape = shape
    q, k = (noise((1, T, 3, 64), i).double() for i in range(2))
    p, mark = (noise((1, T, 2, 16), 10 + i).double() for i in range(2))
    folded_q, folded_k = module.fold(q, p / scale, reserved), module.fold(k, mark, reserved)
    bare = module.fold(q, None, reserved)  # of all that is the content's, and nothing else
    taken = [d for d in range(64) if not torch.equal(folded_q[:, :, 0, d], q[:, :, 0, d])]
    assert taken == [*range(21, 29), *range(53, 61)]  # below them 16 of each half rotate, above are the 3 reserved ones
    assert torch.equal(folded_q[:, :, 2], q[:, :, 2])
    left = torch.ones(64, dtype=torch.bool)
    left[taken] = False
    exact = scale * (q * k)[..., left].sum(-1)[:, :, :2]
    content = left.clone()
    content[[29, 30, 31, 61, 62, 63]] = False
    assert torch.equal(bare[:, :, :2], q[:, :, :2] * content) and torch.equal(bare[:, :, 2], q[:, :, 2])
    torch.testing.assert_close(scale * (folded_q * folded_k).sum(-1)[:, :, :2], exact + (p * mark).sum(-1))


def test_pooled_keys_are_their_blocks_mean():
    """And the scores of the search those of q . mean(k) over the dimensions that do not rotate."""
    module, (q, k) = ContentPointers(SHAPE.__class__(heads=2, head_dim=32, dim=16, pooled=True), torch.Generator()), heads(6)
    marks = module(q, k)
    assert [name for name, _ in module.named_parameters()] == ["taps"] and marks.ask_BPT is None
    still = [*range(8, 16), *range(24, 32)]
    for i, j in ((T - 1, 5), (700, 400), (300, 127)):
        block = j // BLOCK * BLOCK
        for h in range(2):
            expected = q[0, i, h, still] @ k[0, block : block + BLOCK, h].mean(0)[still] / 32**0.5
            torch.testing.assert_close(marks.p_BTPr[0, i, h] @ marks.l_BTPr[0, j, h], expected)


def test_pooled_keys_know_no_floor():
    """They have no landmark whose odds could rise above it."""
    pooled = dict(SPECTRAL_POINTER_SOURCE="pooled", SPECTRAL_POINTER_FLOOR=2)
    assert config_for(**CONTENT | pooled).content_shape().floor == -math.inf
    assert config_for(**CONTENT | dict(SPECTRAL_POINTER_FLOOR=2)).content_shape().floor == 2


def test_the_floor_falls_with_the_past():
    """With the logarithm of the blocks of its document before."""
    documents = Documents.of(documents_of(16 * BLOCK, 3, mean_length=5 * BLOCK), DELIMITER)
    floors = odds_floor(documents, 1.5).tolist()
    for n, start in enumerate(documents.start_block_N.tolist()):
        assert floors[n] == pytest.approx(1.5 - math.log(max(1, n - start)), abs=1e-5)
    assert 5 < len(set(floors))


def test_losses_against_loops():
    module, tokens = pointers(), documents_of(T, 4, mean_length=10**9)
    tokens[700] = DELIMITER  # rows behind it have a short past, and count from row 700 + LEAST_PAST on
    documents, phase = Documents.of(tokens, DELIMITER), torch.tensor(17, dtype=torch.int32)
    q, k = heads(3)
    logits = lambda rows: torch.einsum("bspd,btpd->pst", q[:, rows, :2], k[:, :, :2])  # noqa: E731
    stream = noise((1, T, 24), 8).double()
    marks = module(q, k, stream)
    asked = torch.rand(1, 2, T, generator=torch.Generator().manual_seed(0)).double()
    found = module.losses(marks, Pointing(None, None, None, None, asked), q, k, module.sample(logits, documents, phase))
    rows = [64 * s + 17 for s in range(16)]
    kl, count = 0.0, 0
    for row in rows:
        past = [j for j in range(row + 1) if documents.id_T[j] == documents.id_T[row]]
        for h in range(2):
            teacher = torch.stack([q[0, row, h] @ k[0, j, h] for j in past]).softmax(0)
            if len(past) >= LEAST_PAST:
                p = q[0, row, h] @ module.w_query[h] / 32**0.5
                student = torch.stack([p @ (k[0, j, h] @ module.w_key[h]) for j in past]).log_softmax(0)
                kl += (teacher * (teacher.log() - student)).sum().item() / 2
        count += len(past) >= LEAST_PAST
    assert 2 < count < 16
    z = torch.stack([torch.cat([q[0, :, h], stream[0], torch.ones(T, 1)], -1) @ module.w_ask[h] for h in range(2)])
    bce = -(asked[0] * z.sigmoid().log() + (1 - asked[0]) * (-z).sigmoid().log()).mean().item()
    torch.testing.assert_close(found, torch.tensor([kl / count, bce]).double(), rtol=1e-4, atol=1e-6)


def test_far_mass_against_loops():
    shape = ContentShape(heads=2, head_dim=32, dim=16, rows=32, far_blocks=2)
    module, documents = pointers(shape=shape), Documents.of(documents_of(T, 4, mean_length=10**9), DELIMITER)
    q, k = heads(5)
    logits = lambda rows: torch.einsum("bspd,btpd->pst", q[:, rows, :2], k[:, :, :2]) / 32  # noqa: E731
    state = S.PointerState(*(torch.tensor(x, dtype=torch.int32) for x in (2, 1, 1)))  # local, radius, anchors
    marks, N = module(q, k), T // BLOCK
    generator = torch.Generator().manual_seed(1)
    num = torch.randint(0, 3, (1, 2, N), generator=generator).int()
    block = torch.stack([torch.randperm(N, generator=generator)[:2] for _ in range(2 * N)]).view(1, 2, N, 2).int()
    time = torch.randint(0, BLOCK, (1, 2, N, 2), generator=generator).int()
    rows = module.sample(logits, documents, torch.tensor(5))
    found = module.far_mass(marks, Claims(num, block, time), rows, documents, state)
    shares = [[], []]
    for row in range(5, T, T // 32):
        if (documents.id_T[: row + 1] == documents.id_T[row]).sum() < LEAST_PAST:
            continue
        tile = row // BLOCK
        for h in range(2):
            claims = {int(b) for b, t, i in zip(block[0, h, tile], time[0, h, tile], range(2), strict=True)
                      if i < num[0, h, tile] and t <= row % BLOCK}
            near = {b for b in range(tile + 1) if b > tile - 2 or b < documents.start_block_N[tile] + 1}
            mass = {True: 0.0, False: 0.0}
            for j in range(row + 1):
                if documents.id_T[j] == documents.id_T[row] and j // BLOCK in near | claims:
                    weight = (q[0, row, h] @ k[0, j, h] / 32 + marks.p_BTPr[0, row, h] @ marks.l_BTPr[0, j, h]).exp().item()
                    mass[j // BLOCK not in near] += weight
            shares[h].append(mass[True] / sum(mass.values()))
    assert len(shares[0]) > 8 and max(shares[0]) > 0.1
    torch.testing.assert_close(found.double(), torch.tensor([sum(x) / len(x) for x in shares]).double(), rtol=1e-5, atol=1e-8)


def test_the_losses_reach_the_maps_alone():
    module, documents = pointers(), Documents.of(documents_of(T, 4, mean_length=10**9), DELIMITER)
    q, k = (x.requires_grad_() for x in heads(3))
    labels = Pointing(None, None, None, None, torch.full((1, 2, T), 0.3).double())
    marks = module(q, k, stream := noise((1, T, 24), 8).double().requires_grad_())
    rows = module.sample(lambda rows: torch.einsum("bspd,btpd->pst", q[:, rows, :2], k[:, :, :2]), documents, torch.tensor(0))
    losses = module.losses(marks, labels, q, k, rows)
    losses.sum().backward()
    assert q.grad is None and k.grad is None and stream.grad is None and module.taps.grad is None
    for name in ("w_query", "w_key", "w_ask"):
        assert (getattr(module, name).grad != 0).all(), name


def test_the_language_model_teaches_landmarks_too():
    model, tokens = model_for(**CONTENT).train(), documents_of(T + 1, 8, mean_length=10**9)
    out = model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True))
    out.loss.backward()
    for block in model.blocks:
        content = block.attn.content
        for p in (content.taps, content.w_query, content.w_key):
            assert (p.grad != 0).all()
        assert content.w_ask.grad is None  # its teacher is the loss above
    assert len(out.telemetry) == 4 and all(layer.pointing.losses.requires_grad for layer in out.telemetry)
    assert out.objective.item() == pytest.approx(
        out.loss.item() + sum(layer.pointing.losses.sum().item() for layer in out.telemetry), rel=1e-5)


@pytest.mark.parametrize("readers", [0, 2, 3])
def test_far_blocks_are_read_by_the_readers_alone_and_within_the_budget(readers):
    settings = dict(CONTENT, SPECTRAL_POINTER_NEAR_BLOCKS=2, SPECTRAL_POINTER_READERS=readers, SPECTRAL_WINDOW_HOLD=0.9,
                    NUM_HEADS=3)
    model, tokens = model_for(**settings), documents_of(T, 9, mean_length=10**9)
    context = context_of(model, tokens)
    with torch.no_grad():
        telemetry = model.hidden(tokens, context)[1]
    for layer in telemetry:
        far = layer.num_BHN[0, 0] - torch.arange(1, 9).clamp(max=3)  # the band of two and the anchor
        claimed = layer.pointing.claims.num_BHN[0, 0]
        for h in (1, 2):  # a window of two
            assert torch.equal(layer.num_BHN[0, h], torch.arange(1, 9).clamp(max=2) + (h < readers) * claimed)
        assert far.max() <= 4 and far[3:].sum() > 0 and torch.equal(far, claimed)
    stats = S.scope_stats(telemetry, context.documents, 2)
    assert max(stats["claimed_blocks_max"]) <= 4 and len(stats["landmark_kl"]) == 4
    json.dumps(stats, allow_nan=False)
    assert set(LOSSES) < set(content_stats([layer.pointing for layer in telemetry]))


def test_a_planted_match_is_found():
    """A key equal to a far query's direction: its block is claimed by that query's block, from that query on."""
    shape = ContentShape(heads=1, head_dim=32, dim=16, far_blocks=4, floor=2.0)  # in training all tokens are searched
    module = ContentPointers(shape, torch.Generator().manual_seed(0))
    q, k = (0.03 * noise((1, 12 * BLOCK, 1, 32), i) for i in range(2))
    mark = torch.nn.functional.normalize(noise((32,), 7), dim=0) * 32**0.5
    k[0, 3 * BLOCK + 77, 0], q[0, 10 * BLOCK + 30, 0] = 3 * mark, 3 * mark
    documents = Documents.of(torch.ones(12 * BLOCK, dtype=torch.int32), 0)
    state = S.PointerState(*(torch.tensor(x, dtype=torch.int32) for x in (2, 1, 1)))
    marks = module(q, k)
    found = module.point(marks, documents, state, S.ListShape(2, 0, 1), 1, torch.tensor(1), 1)
    lists, claims = found.lists, found.claims.num_BHN
    row = lists.idx_BHNW[0, 0, 10, : lists.num_BHN[0, 0, 10]].tolist()
    assert 3 in row and claims[0, 0, 10] >= 1
    slot = row.index(3)
    seen = (lists.seen_BHTw[0, 0, 10 * BLOCK : 11 * BLOCK, slot // 32] >> (slot % 32)) & 1
    assert seen[30:].all() and not seen[:30].any()
    asked = found.asked_BPT[0, 0]
    assert asked[10 * BLOCK + 30] == asked.max() > 0.9 and (asked[: 3 * BLOCK] == 0).all()  # what teaches the gate


def test_what_points_by_itself():
    """With the bias, arm C, offsets do; without it nothing predicts them."""
    for bias, source in ((0, "content"), (1, "offset")):
        config = config_for(SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_BIAS=bias, SPECTRAL_POINTER_HEADS=1, SPECTRAL_LANDMARK_DIM=16)
        assert config.pointer_source == source and config.content_pointers == (source == "content") != config.offset_pointers


@pytest.mark.parametrize("change,message", [
    (dict(SPECTRAL_POINTER_ASKING=48), "SPECTRAL_POINTER_ASKING=48 is not a power of two"),
    (dict(SPECTRAL_POINTER_HEADS=3), "SPECTRAL_POINTER_HEADS=3 exceeds NUM_HEADS=2"),
    (dict(SPECTRAL_POINTER_READERS=3), "SPECTRAL_POINTER_READERS=3 exceeds NUM_HEADS=2"),
    (dict(SPECTRAL_POINTER_FOCUS=0.7), "SPECTRAL_POINTER_FOCUS=0.7 goes with copies: it needs SPECTRAL_POINTER_COPY=1"),
    (dict(SPECTRAL_POINTER_FOLLOW=0.7), "SPECTRAL_POINTER_FOLLOW=0.7 goes with copies: it needs SPECTRAL_POINTER_COPY=1"),
    (dict(SPECTRAL_POINTER_SHRINK=2), "SPECTRAL_POINTER_SHRINK=2 goes with copies: it needs SPECTRAL_POINTER_COPY=1"),
    (dict(SPECTRAL_POINTER_SOURCE="dense", SPECTRAL_POINTER_FOLLOW=4), "SPECTRAL_POINTER_FOLLOW=4 goes with copies.*is dense"),
    (dict(SPECTRAL_BIAS=1, SPECTRAL_POINTER_SOURCE="auto", SPECTRAL_POINTER_FOLLOW=4), "FOLLOW=4 goes with copies.*is offset"),
    (dict(SPECTRAL_POINTER_SOURCE="pooled", SPECTRAL_POINTER_COPY=1), "SPECTRAL_POINTER_COPY=1 goes with copies.*is pooled"),
    (dict(SPECTRAL_POINTER_TRUST=1), "SPECTRAL_POINTER_TRUST=1 goes with copies"),
    (dict(SPECTRAL_POINTER_HEADS=2, SPECTRAL_POINTER_READERS=1), "READERS=1: the SPECTRAL_POINTER_HEADS=2 heads"),
    (dict(SPECTRAL_POINTER_SOURCE="pooled", SPECTRAL_BIAS=1, SPECTRAL_L_MAX=T + 1), "folded bias takes: take SPECTRAL_QK_L"),
    (dict(SPECTRAL_LANDMARK_DIM=32), "exceed the HEAD_DIM / 2 = 16 dimensions"),
    (dict(SPECTRAL_BIAS=1, SPECTRAL_L_MAX=T + 1), "SPECTRAL_LANDMARK_DIM=16 and the bias's 16 features"),
    (dict(SPECTRAL_POINTER_SOURCE="offset"), "SPECTRAL_POINTER_SOURCE=offset needs SPECTRAL_BIAS=1")])
def test_refusals(change, message):
    with pytest.raises(S.Stop, match=message):
        config_for(**CONTENT | change)
    assert config_for(**CONTENT).arm == "C" and config_for(**BASE).arm == "A"


def test_the_worth_of_a_search():
    """Square of the share; a quarter of it for a token that claims nothing."""
    odds = torch.full((1, 1, 2, BLOCK), -math.inf)
    odds[0, 0, 1, 3], odds[0, 0, 1, 9], odds[0, 0, 1, 127] = 0.0, math.log(3), 30.0
    time = torch.full((1, 1, 2, 4), BLOCK, dtype=torch.int32)
    time[0, 0, 1, :3] = torch.tensor([3, 3, 127])
    worth = ContentPointers.worth(odds, time)[0, 0]
    assert worth.shape == (2 * BLOCK,) and worth.count_nonzero() == 3
    assert worth[[BLOCK + 3, BLOCK + 9, 2 * BLOCK - 1]].tolist() == pytest.approx([1 / 4, 9 / 64, 1.0])


@pytest.mark.parametrize(("settings", "step"), [
    (dict(SPECTRAL_WINDOW_HOLD=0.25), 1200),
    ({}, 600),
    (dict(SPECTRAL_POINTER_SCHEDULE=1, SPECTRAL_POINTER_MID_FRAC=0.2), 1400),
])
def test_pointers_that_claim_nothing_are_warned_of_once(settings, step):
    """After the windows were held, or a tenth of the steps after the pointers' start."""
    config = config_for(**CONTENT, **settings, SCOPE_LOG_EVERY=200)
    total, idle, busy = 4000, dict(claimed_blocks=[0.1, 0.4]), dict(claimed_blocks=[0.1, 0.9])
    warned = {at: S.idle_pointers(config, S.Schedule(config, at - 1, total), idle) for at in range(200, total + 1, 200)}
    assert [at for at, line in warned.items() if line] == [step]
    assert f"0.40 blocks a query block after {step - 200} steps" in warned[step]
    after = S.Schedule(config, step - 1, total)
    assert S.idle_pointers(config, after, busy) is None and S.idle_pointers(config, after, {}) is None


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def test_codes_are_read_with_the_weights_of_the_pointer_heads():
    """Two pointer heads of three, against each by itself; the heads' own output stays as it is."""
    documents = Documents.of(documents_of(T, 3), DELIMITER)
    q, k, v = (noise((1, T, 3, 32), i).double() for i in range(3))
    codes = token_codes(41, 128, 32)[documents_of(T, 3).long()].double()
    own = torch.arange(T // BLOCK, dtype=torch.int32)
    num = torch.stack([own.clamp(max=h) + 1 for h in range(3)])[None]  # windows of one, two and three blocks
    seen = torch.full((1, 3, T, 1), 2**31 - 1, dtype=torch.int32)
    seen[:, 1, 5 * BLOCK : 5 * BLOCK + 70] = 1  # block 4 is seen from token 70 of block 5 on
    lists = BlockLists(num, (own[:, None] - torch.arange(3, dtype=torch.int32)).clamp(min=0).expand(1, 3, -1, -1), seen)

    def read(heads):
        return heads.read(documents, 0.12, "reference")

    layer = Heads(q, k, v, lists)
    again = layer.first(2).seeing(codes)
    assert again.bias is None
    y = read(layer.beside(again))
    torch.testing.assert_close(y[:, :, :3], read(layer), rtol=0, atol=0)
    for h in range(2):
        alone = BlockLists(*(x[:, h : h + 1] for x in lists[:3]))
        expected = read(Heads(q[:, :, h : h + 1], k[:, :, h : h + 1], codes[None, :, None], alone))
        torch.testing.assert_close(y[:, :, 3 + h : 4 + h], expected, rtol=0, atol=1e-12)
        assert (expected[0, 5 * BLOCK + 69] - expected[0, 5 * BLOCK + 70]).abs().max() > 0.1


@pytest.mark.parametrize("trusting", [False, True])
def test_what_is_said_against_loops(trusting):
    """A gate of the stream's, and of how much of its attention each of the document's last tokens had got before it came."""
    module, tokens = pointers(shape=replace(SHAPE, copying=True, trusting=trusting)), documents_of(T, 3, mean_length=30)
    documents, codes = Documents.of(tokens, DELIMITER), token_codes(128, 128, 32).double()
    x, found, start = noise((T, 24), 1).double(), noise((T, 2, 32), 2).double(), 0
    said = module.say(x, found, codes[tokens], documents)
    for t in range(100):
        start = t if tokens[t] == DELIMITER else start
        gate = [x[t] @ module.w_copy[h] for h in range(2)]
        for lag in range(min(8, t - start) if trusting else 0):
            right = [found[t - lag - 1, h] @ codes[tokens[t - lag]] / 32 for h in range(2)]
            gate = [gate[h] + 10 * module.w_trust[h, lag] * right[h] for h in range(2)]
        for v in (0, 17, 40):
            torch.testing.assert_close(said[t] @ codes[v], sum(gate[h] * (found[t, h] @ codes[v]) / 32 for h in range(2)))
    assert (tokens[:100] == DELIMITER).sum() > 1


def test_a_head_looks_more_sharply_where_it_has_just_been_right():
    """Token by token: a first reading's shares of the last three tokens set the factor of the queries of a second one."""
    module, tokens = pointers(shape=replace(SHAPE, copying=True)), documents_of(T, 3, mean_length=30)
    documents, codes = Documents.of(tokens, DELIMITER), token_codes(128, 128, 32).double()
    heads = Heads(*(noise((1, T, 2, 32), i).double() for i in range(3)), None)
    first, start = 2 * noise((1, T, 2, 32), 4).double(), 0
    again = heads.focused(module.trust(first[0], codes[tokens], documents), 0.7)
    assert all(x is y for x, y in zip(again[1:], heads[1:], strict=True))
    for t in range(100):
        start = t if tokens[t] == DELIMITER else start
        for h in range(2):
            run, runs = 1, 0
            for lag in range(min(3, t - start)):
                run = run * (first[0, t - lag - 1, h] @ codes[tokens[t - lag]] / 32)
                runs = runs + run
            torch.testing.assert_close(again.q_BTHD[0, t, h], heads.q_BTHD[0, t, h] * (1 + 0.7 * runs / 3))


def test_a_bias_draws_to_what_stands_behind_the_place_found_last():
    """Place by place, against its definition; and nearly the share of that place itself."""
    length, nats_T2 = BLOCK, 2 + 2 * noise((BLOCK, 2), 2).double().abs()
    tokens = documents_of(length, 3, mean_length=40)
    documents = Documents.of(tokens, DELIMITER)
    tables = PositionTables(place_frequencies(32), length, torch.float64)()
    values, omega = place_codes(tables, length, 32), place_frequencies(32)
    sharp = 4 * noise((2, length, length), 1).double() * noise((2, length, 1), 3).double().abs()
    a_PTT = sharp.masked_fill(torch.ones(length, length).triu(1) > 0, float("-inf")).softmax(-1)
    right_T28 = 0.3 + noise((length, 2, 8), 4).double()
    bias = follow((a_PTT @ values).transpose(0, 1)[None], right_T28, nats_T2[None], tables, documents)
    rows, found = torch.arange(length), bias.query_features().double() @ tables.key_TF.T
    apart = rows[:, None] - rows
    near = torch.cos(omega * apart[..., None]).mean(-1)
    sure = torch.einsum("hij,hik,jk->hi", a_PTT, a_PTT, near)
    shares = torch.zeros(2, length, length, dtype=torch.float64)
    for h, i in [(h, i) for h in range(2) for i in range(length)]:
        expected, left = torch.zeros(length, dtype=torch.float64), nats_T2[i, h]
        for lag in range(1, FOLLOWED + 1):
            if i < lag or documents.id_T[i - lag] != documents.id_T[i]:
                continue
            weight = left * (sure[h, i - lag] * right_T28[i, h, lag - 1]).clamp(0, 1)
            expected += weight * (torch.cos(omega * (apart - lag)[..., None]).mean(-1) * a_PTT[h, i - lag]).sum(-1)
            shares[h, i, lag:] += weight * a_PTT[h, i - lag, : length - lag]
            left = left - weight
        torch.testing.assert_close(found[0, h, i], expected, rtol=1e-5, atol=1e-5)
    assert (shares > 0.5).sum() > 100 and sure.std() > 0.1
    close = (found[0] - shares)[shares > 0.5]
    assert close.mean().abs() < 0.3 and close.std() < nats_T2.mean() / math.sqrt(2 * len(omega))


def test_two_biases_are_added():
    """That of the model and that of the places found, which have other frequencies."""
    slow = PositionTables(torch.tensor([0.01, 0.02], dtype=torch.float64), T, torch.float64)()
    fast = PositionTables(place_frequencies(32), T, torch.float64)()

    def bias(tables, seed):
        K = tables.cos_TK.size(-1)
        shapes = ((1, 2, T, K), (1, 2, T, K), (1, 2, T), (1, 2, T))
        return BiasCoefficients(*(noise(shape, (seed, i)).double() for i, shape in enumerate(shapes)), tables)

    a, b = bias(slow, 1), bias(fast, 2)
    rows = torch.arange(T).view(-1, BLOCK)
    at = (rows[2:4, :, None], rows[1][None, None])
    torch.testing.assert_close(a.plus(b).at(*at), a.at(*at) + b.at(*at))
    torch.testing.assert_close(a.plus(b).query_features() @ a.plus(b).tables.key_TF.T,
                               a.query_features() @ slow.key_TF.T + b.query_features() @ fast.key_TF.T)


@pytest.mark.parametrize(("focus", "nats"), [(0, 5), (0.7, 0), (0.7, 5)])
def test_codes_are_read_twice_in_evaluation(focus, nats):
    """A model's second reading is the first one's, focused and drawn by what that found; in training there is one."""
    settings = COPIES | dict(SPECTRAL_POINTER_FOLLOW=nats, SPECTRAL_POINTER_FOCUS=focus)
    model, plain, tokens, read = model_for(**settings), model_for(**COPIES), documents_of(T, 3), []
    attend = Heads.read

    def noted(heads, *rest):
        read.append((heads, y := attend(heads, *rest)))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heads, "read", noted)
        found = logits_of(model, tokens)
        (first, y), (second, _) = next(pair for pair in zip(read, read[1:], strict=False) if pair[1][0].q_BTHD.size(2) == 1)
    documents, codes = Documents.of(tokens, DELIMITER), model.codes_VD[tokens].float()
    attention = next(block.attn for block in model.blocks if block.attn is not None and block.attn.content is not None)
    again = first.first(1).seeing(codes)
    assert torch.equal(first.v_BTHD[0, :, 2], codes)
    right = attention.content.trust(y[0, :, 2:3], codes, documents)
    if focus:
        again = again.focused(right, focus)
    if nats:
        tables = model.place_tables()
        assert torch.equal(first.v_BTHD[0, :, 3], place_codes(tables, T, 32))
        unsure = (1 - y[:, :, 2:3].square().sum(-1) / 32).clamp(min=0)
        assert 0.05 < unsure.mean() < 0.95
        bias = follow(y[:, :, 3:], right, nats * unsure**2, tables, documents)
        q, k = S.augment(*again[:2], bias, S.ATTENTION_SCALE, "append")
        again = again._replace(q_BTHD=q, k_BTHD=k)
    assert all(torch.equal(x, y) for x, y in zip(second[:3], again[:3], strict=True))
    assert (found - logits_of(plain, tokens)).abs().max() > 1e-3
    x, y = (m.train().hidden(tokens, context_of(m, tokens))[0] for m in (model, plain))
    assert torch.equal(x, y)


def test_codes_tell_all_tokens_apart():
    """Of any 500 of GPT-2's, where 0.6 of the attention is on the right one and the rest on eight others."""
    codes = token_codes(50257, 50304, 128)
    assert codes.dtype == torch.int8 and (codes[:50257].abs() == 1).all() and not codes[50257:].any()
    assert torch.equal(codes, token_codes(50257, 50304, 128)) and torch.equal(codes[:41], token_codes(41, 128, 128)[:41])
    generator = torch.Generator().manual_seed(0)
    right, others = (torch.randint(50257, shape, generator=generator) for shape in ((500,), (500, 8)))
    found = 0.6 * codes[right].float() + 0.05 * codes[others].float().sum(1)
    assert torch.equal((found @ codes.float().T).argmax(-1), right)


def test_the_head_says_what_is_read_whatever_the_weights():
    """A model's logits are those of its stream plus, before the cap, what is read of each token's code."""
    settings = dict(COPIES, SPECTRAL_LAYERS="0,3", NUM_HEADS=2, SPECTRAL_POINTER_HEADS=2)
    model, tokens = model_for(**settings), documents_of(T, 3)
    bare = model_for(**settings | dict(SPECTRAL_POINTER_COPY=0))
    contexts = [context_of(m, tokens) for m in (model, bare)]
    with torch.no_grad():
        (x, _), (plain, _) = (m.hidden(tokens, c) for m, c in zip((model, bare), contexts, strict=True))
        assert x.shape == (T, 64 + 32) and torch.equal(x[:, :64], plain)  # the copies leave the stream alone
        z, z_plain, codes = x @ model.head().T, plain @ bare.head().T, model.codes_VD.float()
        torch.testing.assert_close(z - z_plain, 0.5 * x[:, 64:] @ codes.T, rtol=0, atol=1e-4)
        assert (z - z_plain).abs().max() > 0.1 and not (z - z_plain)[:, 41:].any()
        torch.testing.assert_close(model.logits(x), 30 * torch.sigmoid(z / 7.5), rtol=0, atol=1e-4)
    assert bare.head() is bare.head_w and "codes_VD" not in model.state_dict()
    assert torch.equal(quantise_w(model.head().detach())[:, 64:].float() * FP8_W_SCALE, 0.5 * codes)  # FP8 holds them exactly


def test_what_codes_say_by_chance_is_not_said():
    """Token by token: as many standard deviations, of a sum of signs times what was read, as asked for; where all of what was
    read is one token, it is said as before."""
    model, tokens = model_for(**COPIES | dict(SPECTRAL_POINTER_SHRINK=2)), documents_of(T, 3)
    plain = model_for(**COPIES)
    with torch.no_grad():
        x, y = (m.hidden(tokens, context_of(m, tokens))[0] for m in (model, plain))
        assert torch.equal(x, y)  # it is the head that shrinks
        z, found = model.logits(x), 0.5 * x[:, 64:]
        assert torch.equal(model.train().logits(x), plain.train().logits(x))  # and in evaluation alone
    codes, silent = model.codes_VD.float(), 0
    for t in range(100, T, 61):
        chance = 2 * math.sqrt(sum(f * f for f in found[t].tolist()))
        for v in range(41):
            said = (codes[v] @ found[t]).item()
            kept = math.copysign(max(0.0, abs(said) - chance), said) / (1 - 2 / math.sqrt(32))
            silent += kept == 0
            expected = 30 / (1 + math.exp(-((model.head_w[v] @ x[t, :64]).item() + kept) / 7.5))
            assert z[t, v].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert 0.5 < silent / (41 * len(range(100, T, 61))) < 1
    alone = torch.cat([torch.zeros(64), codes[7] * 5 / 32 / 0.5])[None]  # a gate of 5, all of the attention on token 7
    assert model.eval().logits(alone)[0, 7].item() == pytest.approx(30 / (1 + math.exp(-5 / 7.5)))


def test_the_language_model_teaches_copies_and_begins_without():
    tokens = documents_of(T + 1, 8, mean_length=10**9)
    fresh = [model_for(**settings) for settings in (CONTENT, COPIES)]
    started = dict(model_for(alive=False, **COPIES).named_parameters())
    assert not any(p.any() for name, p in started.items() if name.endswith("w_copy"))
    for block in fresh[1].blocks:
        torch.nn.init.zeros_(block.attn.content.w_copy)
    assert torch.equal(*(logits_of(model, tokens[:-1]) for model in fresh))
    model = model_for(**COPIES).train()
    model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True)).loss.backward()
    for block in model.blocks:
        assert (block.attn.content.w_copy.grad != 0).all()
    assert model.codes_VD.requires_grad is False
    assert {name for name, _ in model.named_parameters()} - {name for name, _ in fresh[0].named_parameters()} == {
        f"blocks.{i}.attn.content.w_copy" for i in range(4)}


def test_a_quiet_head_says_less_by_itself_and_copies_as_before():
    """By a factor of every token's from its final stream, which the language model teaches; 0.95 at the start."""
    tokens = documents_of(T + 1, 8, mean_length=10**9)
    loud, quiet = (model_for(**COPIES | dict(SPECTRAL_POINTER_QUIET=q)) for q in (0, 1))
    with torch.no_grad():
        x, y = (m.hidden(tokens[:-1], context_of(m, tokens[:-1]))[0] for m in (loud, quiet))
    assert torch.equal(x[:, 64:], y[:, 64:]) and x[:, 64:].any()
    for t in (0, 17, T - 1):
        factor = 1 / (1 + math.exp(sum(a * b for a, b in zip(x[t, :64].tolist(), quiet.w_quiet[0].tolist(), strict=True)) - 3))
        torch.testing.assert_close(y[t, :64], factor * x[t, :64])
    quiet.train()(tokens[:-1], tokens[1:].long(), context_of(quiet, tokens[:-1], training=True)).loss.backward()
    assert (quiet.w_quiet.grad != 0).all() and loud.w_quiet is None
    assert not model_for(alive=False, **COPIES | dict(SPECTRAL_POINTER_QUIET=1)).w_quiet.any()
    (group,) = [g for o in S.make_optimizers(quiet) for g in o.param_groups if any(p is quiet.w_quiet for p in g["params"])]
    assert group["lr"] == quiet.config.spectral_lr


def test_trust_is_taught_and_begins_without():
    tokens = documents_of(T + 1, 8, mean_length=10**9)
    plain, trusting = (model_for(**COPIES | dict(SPECTRAL_POINTER_TRUST=t)) for t in (0, 1))
    assert not torch.equal(*(logits_of(m, tokens[:-1]) for m in (plain, trusting)))
    trusting.train()(tokens[:-1], tokens[1:].long(), context_of(trusting, tokens[:-1], training=True)).loss.backward()
    for block in trusting.blocks:
        assert (block.attn.content.w_trust.grad != 0).all()
        torch.nn.init.zeros_(block.attn.content.w_trust)
    assert torch.equal(*(logits_of(m, tokens[:-1]) for m in (plain, trusting.eval())))
    started = dict(model_for(alive=False, **COPIES | dict(SPECTRAL_POINTER_TRUST=1)).named_parameters())
    assert not any(p.any() for name, p in started.items() if name.endswith("w_trust"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the whole model runs in bf16: bench/step.py")
def test_the_fused_head_says_them_too(monkeypatch):
    monkeypatch.setattr(S, "fp8_available", lambda device: True)
    tokens, results = documents_of(T + 1, 8, mean_length=10**9), []
    for kind in ("plain", "fused"):
        model = model_for(**COPIES, HEAD_LOSS=kind).train()
        out = model(tokens[:-1], tokens[1:].long(), context_of(model, tokens[:-1], training=True))
        out.loss.backward()
        results.append((out.loss.item(), model.head_w.grad, model.blocks[3].attn.content.w_copy.grad))
    (loss, *grads), (fused_loss, *fused_grads) = results
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    for found, expected in zip(fused_grads, grads, strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_the_work_of_copies_is_counted():
    counted = {}
    for copies in (0, 1):
        model = model_for(alive=False, **COPIES | dict(SPECTRAL_POINTER_COPY=copies, SPECTRAL_LAYERS=3))
        counted[copies] = S.flops_per_token(model, S.Schedule(model.config, 20, 100))
    blocks = (2 + 4 + (2 + 4) + 3) // 2 - (2 + 4 + 3) // 2  # a band and an anchor, claims, the other head's window
    weights = 128 * 32 + 64  # codes, the gate
    assert counted[1] - counted[0] == 6 * weights + 12 * 2 * 32 * BLOCK * blocks  # and the keys read
