"""Needle samples against a brute-force reading of the same bytes, and the evaluation against scorers of known ability."""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import random
import typing

import numpy as np
import pytest

from data import retrieval
from eval.needle import (
    Haystack,
    build_sample,
    chance_level,
    check_needle_shape,
    evaluate_needles,
    wilson_interval,
)

DELIMITER = 256
SHAPE = {"seq_len": 2048, "anchor_len": 4, "value_len": 8, "seed": 7}
DISTANCES = [12, 100, 1024, 2035]
LONG_TEXTS = [inspect.getsource(module).encode() for module in (argparse, typing, inspect)]
SHORT_TEXTS = [text[:300] for text in LONG_TEXTS]
EVERY_BYTE = bytes(range(256))  # enough for anchors and values, too short for a sample


def write_bytes_shard(path, documents, delimiter=DELIMITER):
    """The shard format written out by hand: header, then every document behind a delimiter."""
    tokens = np.concatenate([np.array([delimiter, *document], dtype="<u2") for document in documents])
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    first = write_bytes_shard(folder / "a.bin", [SHORT_TEXTS[0], LONG_TEXTS[0], SHORT_TEXTS[1], LONG_TEXTS[1]])
    return [first, write_bytes_shard(folder / "b.bin", [LONG_TEXTS[2], SHORT_TEXTS[2]])]


@pytest.fixture(scope="module")
def haystack(paths):
    return Haystack(paths, DELIMITER, 257)


def positions_of(pattern, tokens):
    return [i for i in range(len(tokens) - len(pattern) + 1) if tokens[i : i + len(pattern)] == pattern]


def document_and_offset(tokens, hidden):
    """Where in LONG_TEXTS the tokens lie, but for the positions in `hidden`: brute force through bytes.find."""
    shown = [i for i in range(1, len(tokens)) if i not in hidden]
    runs = [[i for _, i in group] for _, group in itertools.groupby(enumerate(shown), lambda pair: pair[1] - pair[0])]
    probe = max(runs, key=len)
    places = []
    for number, text in enumerate(LONG_TEXTS):
        found = text.find(bytes(tokens[probe[0] : probe[-1] + 1]))
        while found >= 0:
            start = found - probe[0]
            if 0 <= start + 1 and all(text[start + i] == tokens[i] for i in shown):
                places.append((number, start + 1))
            found = text.find(bytes(tokens[probe[0] : probe[-1] + 1]), found + 1)
    return places


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("index", range(3))
def test_sample_is_what_it_says(haystack, distance, index):
    sample = build_sample(haystack, distance=distance, index=index, **SHAPE)
    tokens = sample.tokens_T.tolist()
    assert sample.tokens_T.dtype == np.int64 and len(tokens) == 2048
    assert (sample.distance, sample.index, sample.answer_start) == (distance, index, 2048 - 8)
    assert positions_of([DELIMITER], tokens) == [0]
    anchor, value = tokens[-12:-8], tokens[-8:]
    first_value = sample.answer_start - distance
    assert tokens[first_value : first_value + 8] == value
    assert positions_of(anchor, tokens) == [first_value - 4, sample.answer_start - 4]
    assert len(set(anchor)) == 4 and len(set(value)) == 8
    assert set(anchor) <= set(haystack.anchor_ids.tolist()) and set(value) <= set(haystack.value_ids.tolist())
    hidden = {*range(first_value - 4, first_value + 8), *range(2048 - 12, 2048)}
    assert len(document_and_offset(tokens, hidden)) >= 1


def test_distances_share_text_and_needle(haystack):
    near, far = (build_sample(haystack, distance=d, index=1, **SHAPE).tokens_T for d in (100, 2000))
    assert near[-12:].tolist() == far[-12:].tolist()
    moved = np.flatnonzero(near != far)
    assert set(moved) <= {*range(1936, 1948), *range(36, 48)}


def test_samples_differ_by_index_seed_and_text(haystack):
    def drawn(**change):
        return build_sample(haystack, **{"distance": 500, "index": 0, **SHAPE, **change}).tokens_T

    base = drawn()
    for other in (drawn(index=1), drawn(seed=8), drawn(seq_len=4096)):
        assert other[-12:].tolist() != base[-12:].tolist()
        assert other[1:1000].tolist() != base[1:1000].tolist()
    starts = {tuple(drawn(index=index)[1:400]) for index in range(20)}
    assert len(starts) == 20


def test_every_long_document_is_used_and_no_short_one(haystack):
    used = set()
    for index in range(40):
        tokens = build_sample(haystack, distance=12, index=index, **SHAPE).tokens_T.tolist()
        used |= {number for number, _ in document_and_offset(tokens, set(range(2048 - 24, 2048)))}
    assert used == {0, 1, 2}


def test_samples_do_not_depend_on_call_order_or_global_state(haystack, paths):
    cells = list(itertools.product(DISTANCES, range(3)))
    forward = {cell: build_sample(haystack, distance=cell[0], index=cell[1], **SHAPE).tokens_T for cell in cells}
    fresh = Haystack(paths, DELIMITER, 257)
    random.Random(3).shuffle(cells)
    for number, cell in enumerate(cells):
        np.random.seed(number)
        again = build_sample(fresh, distance=np.int64(cell[0]), index=np.int64(cell[1]), **SHAPE).tokens_T
        assert np.array_equal(again, forward[cell])


def test_a_seed_names_the_same_sample_on_every_machine(tmp_path):
    text = bytes((i * i + 7 * (i // 13)) % 251 for i in range(6000))
    haystack = Haystack([write_bytes_shard(tmp_path / "t.bin", [text])], DELIMITER, 257)
    sample = build_sample(haystack, seq_len=512, distance=200, index=3, anchor_len=4, value_len=8, seed=11)
    digest = hashlib.sha256(sample.tokens_T.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "5c54c3bb7992d1c1"


def test_tokens_outside_the_vocabulary_are_refused(paths):
    with pytest.raises(ValueError, match=r"token 256 at offset 0 is outside the vocabulary of 256; use shards made for this"):
        Haystack(paths, DELIMITER, 256)


def test_vocabulary_is_that_of_evaluation(haystack, tmp_path):
    expected = retrieval.word_pools(haystack.counts_V, DELIMITER)
    assert [haystack.anchor_ids.tolist(), haystack.value_ids.tolist()] == [ids.tolist() for ids in expected]
    with pytest.raises(ValueError, match="different tokens.*NEEDLE_FILES"):
        Haystack([write_bytes_shard(tmp_path / "ab.bin", [b"ab" * 5000])], DELIMITER, 257)


def test_counts_do_not_depend_on_chunks(paths, monkeypatch):
    monkeypatch.setattr(retrieval, "COUNT_CHUNK", 1000)
    counts = Haystack(paths, DELIMITER, 257).counts_V
    every = b"".join(LONG_TEXTS + SHORT_TEXTS)
    assert counts[:256].tolist() == [every.count(bytes([i])) for i in range(256)]
    assert counts[256] == 6 and counts.sum() == len(every) + 6


def fits(seq_len, distance, anchor_len, value_len):
    """Lays the sample out position by position: every part inside the sequence and none on top of another."""
    answer = range(seq_len - value_len, seq_len)
    question = range(answer.start - anchor_len, answer.start)
    value = range(answer.start - distance, answer.start - distance + value_len)
    anchor = range(value.start - anchor_len, value.start)
    spots = [0, *anchor, *value, *question, *answer]
    return min(spots) == 0 and len(set(spots)) == len(spots)


def test_shape_check_against_a_layout_by_hand():
    seen = set()
    for seq_len, distance, anchor_len, value_len in itertools.product(range(1, 22), range(1, 22), (1, 2, 3), (1, 2, 4)):
        good = fits(seq_len, distance, anchor_len, value_len)
        problems = check_needle_shape(seq_len, [distance], anchor_len, value_len)
        assert (problems == []) == good, (seq_len, distance, anchor_len, value_len, problems)
        seen.add(good)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, [100], 4, 8), "NEEDLE_SEQ_LEN"),
        ((2048, [100], 0, 8), "NEEDLE_ANCHOR_LEN"),
        ((2048, [100], 4, -1), "NEEDLE_VALUE_LEN"),
        ((2048, [-5], 4, 8), "-5"),
        ((2048, [], 4, 8), "NEEDLE_DISTANCES is empty"),
        ((2048, [100, 200, 100], 4, 8), "repeats 100"),
        ((2048, [100, 2036], 4, 8), "2036 does not fit NEEDLE_SEQ_LEN=2048, at most 2035 does"),
        ((2048, [11], 4, 8), "11 is less than anchor"),
    ],
)
def test_shape_problems_name_the_setting(haystack, arguments, said):
    assert any(said in problem for problem in check_needle_shape(*arguments))
    seq_len, distances, anchor_len, value_len = arguments
    shape = {"seq_len": seq_len, "anchor_len": anchor_len, "value_len": value_len, "seed": 0}
    with pytest.raises(ValueError, match=said):
        evaluate_needles(None, haystack, distances=distances, samples_per_distance=2, step=0, **shape)


def test_a_document_that_just_fills_the_sequence(tmp_path):
    text = LONG_TEXTS[0][:1023]
    path = write_bytes_shard(tmp_path / "exact.bin", [EVERY_BYTE, text])
    haystack = Haystack([path], DELIMITER, 257)
    sample = build_sample(haystack, **{**SHAPE, "seq_len": 1024}, distance=12, index=0)
    assert bytes(sample.tokens_T[1 : 1024 - 24].tolist()) == text[: 1024 - 25]
    with pytest.raises(ValueError, match=r"NEEDLE_SEQ_LEN=1025.*exact\.bin, gives 1024 tokens.*NEEDLE_FILES"):
        build_sample(haystack, **{**SHAPE, "seq_len": 1025}, distance=12, index=0)


def test_a_shard_that_opens_in_mid_document(tmp_path):
    path = write_bytes_shard(tmp_path / "cut.bin", [LONG_TEXTS[0][1:1200], EVERY_BYTE])
    raw = np.fromfile(path, dtype="<u2")
    raw[512] = LONG_TEXTS[0][0]  # in place of the first delimiter
    raw.tofile(path)
    haystack = Haystack([path], DELIMITER, 257)
    assert haystack.documents_N3.tolist() == [[0, 0, 1200], [0, 1201, 1201 + len(EVERY_BYTE)]]
    sample = build_sample(haystack, **{**SHAPE, "seq_len": 1201}, distance=12, index=0)
    assert sample.tokens_T[0] == DELIMITER and bytes(sample.tokens_T[1:1001].tolist()) == LONG_TEXTS[0][:1000]


def test_the_longest_document_is_named_with_its_file(paths, haystack):
    longest = max(range(3), key=lambda i: len(LONG_TEXTS[i]))
    file = paths[0 if longest < 2 else 1].name
    with pytest.raises(ValueError, match=f"{file}, gives {len(LONG_TEXTS[longest]) + 1} tokens"):
        haystack.require(10**6, 4, 8)


def test_lengths_that_the_text_cannot_serve(haystack):
    with pytest.raises(ValueError, match="NEEDLE_VALUE_LEN"):
        build_sample(haystack, **{**SHAPE, "value_len": 80}, distance=200, index=0)
    with pytest.raises(ValueError, match="larger NEEDLE_ANCHOR_LEN"):  # every single byte occurs in so long a text
        build_sample(haystack, **{**SHAPE, "seq_len": 60000, "anchor_len": 1}, distance=200, index=0)
    with pytest.raises(ValueError, match="NEEDLE_FILES"):
        Haystack([], DELIMITER, 257)


def test_anchor_that_occurs_is_drawn_again(tmp_path):
    """Half of the one-token anchors occur in the only document that is long enough."""
    present = bytes(i for i in range(128) if i % 8 < 4)
    elsewhere = bytes(i for i in range(128) if i % 8 >= 4)
    haystack = Haystack(
        [write_bytes_shard(tmp_path / "t.bin", [present * 13, elsewhere * 7, elsewhere * 7])], DELIMITER, 257
    )
    assert 0 < len(set(haystack.anchor_ids.tolist()) & set(present)) < len(haystack.anchor_ids)
    for index in range(20):
        sample = build_sample(haystack, seq_len=800, distance=50, index=index, anchor_len=1, value_len=4, seed=0)
        tokens = sample.tokens_T.tolist()
        assert len(positions_of(tokens[-5:-4], tokens)) == 2


def oracle(tokens_T, answer_start, reach=None):
    """Copies what followed the question's anchor at its other occurrence within `reach` tokens."""
    tokens = tokens_T.tolist()
    value_len = len(tokens) - answer_start
    anchor = tokens[answer_start - 4 : answer_start]
    first = 0 if reach is None else max(answer_start - reach, 0)
    found = [i + first for i in positions_of(anchor, tokens[first : answer_start - 1])]
    guess = tokens[found[0] + 4 : found[0] + 4 + value_len] if found else [-1] * value_len
    correct = np.array(guess) == tokens_T[answer_start:]
    return np.where(correct, 0.25, 5.0).astype(np.float32), correct


def evaluate(haystack, score=oracle, samples=3, **change):
    return evaluate_needles(
        score, haystack, **{"distances": DISTANCES, "samples_per_distance": samples, "step": 40, **SHAPE, **change}
    )


def test_oracle_finds_every_needle(haystack):
    blob = evaluate(haystack)
    assert {key: blob[key] for key in ("tag", "step", "seq_len", "anchor_len", "value_len", "seed")} == {
        "tag": "NEEDLE_EVAL",
        "step": 40,
        "seq_len": 2048,
        "anchor_len": 4,
        "value_len": 8,
        "seed": 7,
    }
    assert [row["distance"] for row in blob["distances"]] == DISTANCES
    low, high = wilson_interval(3, 3)
    for row in blob["distances"]:
        expected = {"n": 3, "loss": 0.25, "perplexity": math.exp(0.25), "token_accuracy": 1.0, "exact_match": 1.0}
        assert {key: row[key] for key in expected} == expected
        assert (row["exact_match_low"], row["exact_match_high"]) == (low, high)


def test_a_window_ends_where_the_distance_says(haystack):
    blob = evaluate(haystack, lambda tokens, start: oracle(tokens, start, reach=1024 + 4))
    assert [row["exact_match"] for row in blob["distances"]] == [1, 1, 1, 0]
    blob = evaluate(haystack, lambda tokens, start: oracle(tokens, start, reach=1024 + 3))
    assert [row["exact_match"] for row in blob["distances"]] == [1, 1, 0, 0]


def test_one_wrong_token_spoils_the_match_but_not_the_tokens(haystack):
    def slip(tokens_T, answer_start):
        nats, correct = oracle(tokens_T, answer_start)
        correct[3] = False
        return nats, correct

    for row in evaluate(haystack, slip)["distances"]:
        assert (row["token_accuracy"], row["exact_match"]) == (7 / 8, 0.0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 17])
def test_blob_is_the_same_for_every_world_size(haystack, world_size):
    def noisy(tokens_T, answer_start):
        draw = np.random.default_rng(tokens_T)
        return draw.exponential(3.0, 8), draw.random(8) < 0.9

    calls = []

    def counted(rank):
        def score(tokens_T, answer_start):
            calls.append((rank, tokens_T.tobytes()))
            return noisy(tokens_T, answer_start)

        return score

    partial = []
    for rank in range(world_size):
        evaluate(haystack, counted(rank), rank=rank, world_size=world_size, reduce=lambda a: partial.append(a) or a)
    per_rank = [sum(1 for rank, _ in calls if rank == r) for r in range(world_size)]
    assert len(calls) == len({tokens for _, tokens in calls}) == 12
    assert max(per_rank) - min(per_rank) <= 1
    assert all(array.dtype == np.float64 for array in partial)
    alone = evaluate(haystack, noisy)
    for rank in range(world_size):
        together = evaluate(haystack, noisy, rank=rank, world_size=world_size, reduce=lambda _: sum(partial))
        assert json.dumps(together) == json.dumps(alone)


@pytest.mark.parametrize("nats", [math.inf, math.nan, 1e6])
def test_blob_is_json_whatever_the_loss(haystack, nats):
    blob = evaluate(haystack, lambda tokens, start: (np.full(8, nats), np.zeros(8, bool)))
    rows = json.loads(json.dumps(blob, allow_nan=False))["distances"]
    assert [row["perplexity"] for row in rows] == [None] * 4
    assert [row["loss"] for row in rows] == [1e6 if nats == 1e6 else None] * 4
    assert [row["exact_match"] for row in rows] == [0.0] * 4


def test_impossible_evaluations_are_refused(haystack):
    with pytest.raises(ValueError, match="NEEDLE_SAMPLES_PER_DISTANCE"):
        evaluate(haystack, samples=0)
    with pytest.raises(ValueError, match="smaller NEEDLE_SEQ_LEN"):
        evaluate(haystack, seq_len=10**6)


def test_chance_level_by_enumeration():
    ids, length = range(6), 3
    values = list(itertools.permutations(ids, length))
    guesses = [[min(set(ids) - set(value[:i])) for i in range(length)] for value in values]
    right = np.array([[g == v for g, v in zip(*pair, strict=True)] for pair in zip(guesses, values, strict=True)])
    chance = chance_level(6, length)
    assert chance["token_accuracy"] == pytest.approx(right.mean())
    assert chance["exact_match"] == pytest.approx(right.all(axis=1).mean())


def test_chance_in_the_blob_is_that_of_the_value_set(haystack):
    assert evaluate(haystack)["chance"] == chance_level(len(haystack.value_ids), 8)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (20, 20, 0.8389, 1),
        (180, 200, 0.8506, 0.9344),
        (0, 10, 0, 0.2775),
        (7, 8, 0.5291, 0.9776),
        (500, 500, 0.9924, 1),
    ],
)
def test_wilson_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_inverts_the_score_test():
    grid = np.linspace(0, 1, 20001)
    for n in (1, 2, 5, 8, 33):
        for successes in range(n + 1):
            low, high = wilson_interval(successes, n)
            accepted = grid[np.abs(successes / n - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / n) + 1e-12]
            assert (low, high) == pytest.approx((accepted[0], accepted[-1]), abs=1e-4)


def test_wilson_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    for bad in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(*bad)
