"""The grammar of statements and questions, and the mixer that writes them and copies of passages over training text, against a
reader that knows nothing of how they were written."""

import collections
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
import typing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import scoped_medium as S
from data.retrieval import (
    KINDS,
    TEMPLATE_WORDS,
    VALUE_WORDS,
    Mixer,
    MixerProcess,
    draw_key,
    draw_value,
    template_ids,
    templates,
    token_classes,
    trained_words,
    word_pools,
)
from data.shards import write_shard

GPT2, BYTES = 50256, 256  # delimiters
BYTE_TEXT = "".join(inspect.getsource(module) for module in (typing, dataclasses, inspect, os)).encode()


def zipf(n, seed, vocabulary=50256):
    """n tokens whose counts fall as one over their rank; which id has which rank is the same for every seed."""
    share = 1 / np.arange(1, vocabulary + 1)
    order = np.random.default_rng(99).permutation(vocabulary)
    return order[np.random.default_rng(seed).choice(vocabulary, n, p=share / share.sum())].astype(np.uint16)


def counts_of(tokens):
    return np.bincount(tokens, minlength=1 << 16)


COUNTS = {GPT2: counts_of(zipf(1 << 21, 5)), BYTES: counts_of(np.frombuffer(BYTE_TEXT, dtype=np.uint8))}


def sequence(delimiter, length, documents, seed=0):
    """uint16 [length + 1] tokens with so many delimiters, the last part of one document in front of them."""
    rng = np.random.default_rng(seed)
    if delimiter == GPT2:
        tokens = zipf(length + 1, seed)
    else:
        start = rng.integers(len(BYTE_TEXT) - length)
        tokens = np.frombuffer(BYTE_TEXT, dtype=np.uint8)[start : start + length + 1].astype(np.uint16)
    tokens[(np.linspace(0.3, documents + 0.3, documents, endpoint=False) * length / (documents + 1)).astype(int)] = delimiter
    return tokens


@functools.cache
def mixer(delimiter, share=0.1, seed=0, passages=0.5):
    return Mixer(share, passages, seed, COUNTS[delimiter], delimiter)


# ---------------------------------------------------------------------------------------------------------------------
# Grammar


def test_classes_never_change():
    """A token that changed its class would be of training in one checkpoint and of evaluation in the next."""
    assert token_classes([0, 1, 2, 3, 97, 98, 99, 100, 256, 257, 31373, 50255]).tolist() == [0, 1, 2, 3, 3, 0, 1, 1, 0, 1, 3, 2]
    classes = token_classes(np.arange(1 << 16)).reshape(-1, 4)
    assert (np.sort(classes, axis=1) == range(4)).all()
    by_place = np.stack([np.bincount(classes[:, place], minlength=4) for place in range(4)])
    assert abs(by_place / (1 << 14) - 0.25).max() < 0.02


@pytest.mark.parametrize("delimiter", [GPT2, BYTES])
def test_pools_against_brute_force(delimiter):
    counts = COUNTS[delimiter].copy()
    counts[delimiter] = 10**9
    middle, common, rare = [], [], []
    for token_class in range(4):
        observed = [i for i in range(1 << 16) if counts[i] and i != delimiter and token_classes(i) == token_class]
        observed.sort(key=lambda i: (-counts[i], i))
        first, last = math.floor(len(observed) ** 0.5), math.floor(len(observed) ** 0.85)
        middle.append(observed[first : max(last, first + 8)])
        common.append(observed[:first])
        rare.append(observed[max(last, first + 8) :])
    assert [ids.tolist() for ids in word_pools(counts, delimiter)] == middle[2:] and min(map(len, middle)) >= 8
    assert template_ids(counts, delimiter).tolist() == sum(common[2:], [])
    assert [ids.tolist() for ids in trained_words(counts, delimiter)] == [sum(x, []) for x in (common, middle, rare)]


@pytest.mark.parametrize("text", [GPT2, BYTES])
def test_what_evaluation_writes(text):
    """Its keys, values and words of templates are three disjoint sets."""
    sets = [set(ids.tolist()) for ids in (*word_pools(COUNTS[text], text), template_ids(COUNTS[text], text))]
    assert sum(map(len, sets)) == len(set.union(*sets))
    made = templates(COUNTS[text], text)
    assert [(len(t.before), len(t.between), len(t.after)) for t in made] == [(1, 1, 1), (2, 0, 1), (2, 2, 1), (0, 3, 2)]
    for t in made:
        words = [*t.before, *t.between, *t.after]
        assert len(words) == len(set(words)) and set(words) <= sets[-1]


def test_poor_text_is_refused():
    ids = np.arange(1 << 16)
    for poor in range(4):
        few = ids[token_classes(ids) == poor][:10]
        counts = (token_classes(ids) != poor).astype(int)
        counts[few] = 1
        for pools in (trained_words, word_pools)[: 1 if poor < 2 else 2]:
            with pytest.raises(ValueError, match="10 different tokens of one of the four classes.*more text"):
                pools(counts, 1 << 16)
        counts[ids[token_classes(ids) == poor][:11]] = 1  # ranks 3 to 10
        assert poor < 2 or min(map(len, word_pools(counts, 1 << 16))) == 8


@pytest.mark.parametrize("generator", [random.Random(3), np.random.RandomState(3), np.random.default_rng(3)])
@pytest.mark.parametrize("draw", [draw_key, draw_value])
def test_draws_are_uniform_and_never_repeat(generator, draw):
    ids = np.array([5, 50000, 7, 9, 11, 13, 2, 1])
    drawn = np.array([draw(generator, ids, 3) for _ in range(4000)])
    assert drawn.dtype == np.int64 and all(len(set(row)) == 3 for row in drawn.tolist())
    for place in range(3):
        seen = collections.Counter(drawn[:, place].tolist())
        assert seen.keys() == set(ids.tolist()) and all(abs(n - 500) < 5 * 500**0.5 for n in seen.values())
    assert sorted(draw(generator, ids, 8).tolist()) == sorted(ids.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Mixer, against a reader of the finished tokens


def parse(piece, keys, length, end):
    """(before, key, between, value, after) of a piece whose last tokens are `length` of a value and `end` behind it, by the
    keys' tokens alone."""
    piece, after = piece[:-end], piece[-end:]
    kinds = "".join("k" if t in keys else "." for t in piece[:-length])
    groups = [len(list(group)) for _, group in itertools.groupby(kinds)]
    shape = "".join(kind for kind, _ in itertools.groupby(kinds))
    assert shape in ("k", ".k", "k.", ".k."), shape
    ends = [0, *itertools.accumulate(groups)]
    parts = [piece[a:b] for a, b in itertools.pairwise(ends)]
    before = parts.pop(0) if shape[0] == "." else []
    return before, parts[0], parts[1] if len(parts) == 2 else [], piece[-length:], after


def found(pattern, tokens):
    return [i for i in range(len(tokens) - len(pattern) + 1) if tokens[i : i + len(pattern)] == pattern]


def answer_by_reading(document, before, key, between, linking, keys, length, depth=0):
    """What `document` (the text before the question) says of `key`: the latest statement counts, links are spelt out."""
    assert depth < 4
    linked, asked = found(before + key + linking, document) if linking else [], before + key + between
    if linked:
        place = max(linked) + len(before + key + linking)
        named = list(itertools.takewhile(keys.__contains__, document[place:]))
        assert named and not found(asked, document)
        way = named + (linking if found(before + named + linking, document) else between)
        return way + answer_by_reading(document, before, named, between, linking, keys, length - len(way), depth + 1)
    place = max(found(asked, document)) + len(asked)
    assert document[place] not in keys
    return document[place : place + length]


def split_answer(answer, keys, length):
    """(words behind each of the keys, value) of an answer that names them in this order, `length` words each."""
    words = []
    for key in keys:
        assert answer[: len(key)] == key.tolist()
        words.append(answer[len(key) : len(key) + length])
        answer = answer[len(key) + length :]
    return words, answer


def document_of(place, original, delimiter):
    """(begin, end) of the text between delimiters, or the ends of the sequence, that holds a place."""
    last = len(original) - 1
    bounds = [0, *(i for i in range(1, last) if original[i] == delimiter), last]
    return max(b for b in bounds if b < place) + 1, min(b for b in bounds if b > place)


def changed_where_planned(original, mixed, plan, delimiter):
    """Pieces lie where the plan says, over no other, and what else there is stays."""
    written = np.zeros(len(original), dtype=int)
    for task in plan:
        for start, piece in zip(task.starts, task.pieces, strict=True):
            written[start : start + len(piece)] += 1
            assert mixed[start : start + len(piece)].tolist() == piece.tolist()
    assert written.max() <= 1 and written[0] == written[-1] == 0
    assert not written[original == delimiter].any() and (mixed == original)[written == 0].all()
    return written


TEXTS = pytest.mark.parametrize(
    ("delimiter", "length", "documents"), [(GPT2, 8192, 3), (BYTES, 8192, 2), (GPT2, 1999, 12), (BYTES, 640, 0)]
)


@pytest.mark.parametrize("share", [0.1, 0.5])
@TEXTS
def test_every_question_is_answered_earlier_in_its_document(delimiter, length, documents, share):
    mix = mixer(delimiter, share)
    sorts = [set(ids.tolist()) for ids in trained_words(COUNTS[delimiter], delimiter) if len(ids)]
    kinds, asked_with, of_text, of_class, said, framed = collections.Counter(), set(), 0, 0, [], []
    for step in range(3 if share == 0.5 else 12):
        original = sequence(delimiter, length, documents, seed=step)
        mixed, draft = mix.mix(step, original, 1), mix.draft(step, original, 1)
        keys, values, words_of = (set(pool.ids().tolist()) for pool in (draft.key_ids, draft.value_ids, draft.template_ids))
        plan = draft.tasks
        assert set.union(*sorts) > keys | values | words_of and keys.isdisjoint(sorts[0])
        assert keys.isdisjoint(values) and (keys | values).isdisjoint(words_of)
        assert all(role & sort for role in (values, words_of) for sort in sorts)  # of every frequency
        assert all(keys & sort for sort in sorts[1:])
        assert mixed.dtype == np.uint16 and (plan or length < 1000)  # a task may be too large for a small share
        changed_where_planned(original, mixed, plan, delimiter)
        tokens = mixed.tolist()
        for task in plan:
            kinds[task.kind] += 1
            if task.kind == "passage":
                continue
            begin, end = document_of(task.starts[-1], original, delimiter)
            lengths = [len(piece) for piece in task.pieces]
            assert len(task.starts) == len(lengths)
            assert all(begin <= start and start + n <= end for start, n in zip(task.starts, lengths, strict=True))
            assert all(start + 32 <= task.starts[-1] for start in task.starts[:-1])
            question = tokens[task.starts[-1] : task.starts[-1] + lengths[-1]]
            end = len(question) - len(task.answer) - max(found(task.answer.tolist(), question))
            before, key, between, answer, after = parse(question, keys, len(task.answer), end)
            assert all(piece[-end:].tolist() == after for piece in task.pieces)
            words, value = split_answer(answer, task.keys[-2::-1], len(between))
            between, linking = (words[-1], between) if words else (between, [])
            assert all(other == linking for other in words[:-1])
            assert not words or len({*before, *between, *linking, *after}) == len(before + between + linking + after)
            assert after[0] not in value
            asked_with.add((*before, -1, *between, -1, *after))
            of_class += set(value) <= values
            said += [value] if set(value) <= values else []
            framed += [before + between + linking + after]
            of_text += not set(value) <= values
            template = [*before, *between, *after]
            assert words_of.issuperset(template + linking) and (token_classes(template) < 2).any()
            assert not linking or (token_classes(before + linking + after) < 2).any()
            assert (token_classes(value) != 3).any() and (token_classes(key) != 2).any()
            assert answer == task.answer.tolist() and key == task.keys[-1].tolist()
            assert 2 <= len(key) == len(set(key)) <= 5 and 2 <= len(value) == len(set(value)) <= 12
            # The key is where the task wrote it and nowhere else in the document, nor in the sequence.
            mentions = [start + place for start, piece in zip(task.starts, task.pieces, strict=True)
                        for place in found(key, piece.tolist())]
            assert found(key, tokens) == sorted(mentions)
            heard = tokens[begin : task.starts[-1]]
            assert answer_by_reading(heard, before, key, between, linking, keys, len(answer)) == answer
            asked = found(before + key + (linking or between), heard)
            assert len(asked) == {"two values": 2, "asked twice": 2, "asked three times": 3}.get(task.kind, 1)
            links = sum(piece[-end - 1] in keys for piece in task.pieces)
            assert not links or (before and between)
            assert links == {"one link": 1, "two links": 2}.get(task.kind, 0)
    assert length < 8000 or share > 0.3 or kinds.keys() == {*KINDS, "passage"}  # fuller, few tasks of many pieces find room
    if length > 8000 and delimiter == GPT2:
        for role, shares in ((said, VALUE_WORDS), (framed, TEMPLATE_WORDS)):
            for sort, share in zip(sorts, shares, strict=True):
                assert np.mean([word in sort for words in role for word in words]) == pytest.approx(share, abs=0.12)
        assert 0.4 < len(asked_with) / (of_text + of_class) < 0.8 and 0.3 < of_text / (of_text + of_class) < 0.7


@pytest.mark.parametrize("share", [0.1, 0.5])
@TEXTS
def test_every_passage_stands_in_its_document_twice(delimiter, length, documents, share):
    lengths = set()
    for step in range(3 if share == 0.5 else 8):
        original = sequence(delimiter, length, documents, seed=step)
        mixed, plan = mixer(delimiter, share).mix(step, original, 1), mixer(delimiter, share).plan(step, original, 1)
        used = changed_where_planned(original, mixed, plan, delimiter)
        for task in plan:
            assert (task.kind == "passage") == (task.source is not None)
            if task.kind != "passage":
                continue
            [start], n = task.starts, len(task.pieces[0])
            source, copy = mixed[task.source : task.source + n], mixed[start : start + n]
            assert source.tolist() == copy.tolist() == original[task.source : task.source + n].tolist()
            used[task.source : task.source + n] += 1
            begin, end = document_of(start, original, delimiter)
            assert begin <= task.source and task.source + n + 32 <= start and start + n <= end
            assert 8 <= n <= 64 and task.keys == [] and task.answer.tolist() == copy.tolist()
            lengths.add(n)
        assert used.max() <= 1 and (plan or length < 1000)  # no source is written over, nor copied twice
    assert length < 8000 or (min(lengths) < 12 and max(lengths) > 50)


def test_passages_are_of_the_whole_vocabulary():
    text = sequence(GPT2, 65536, 0)
    copied = np.concatenate([task.answer for task in mixer(GPT2).plan(0, text, 0) if task.kind == "passage"])
    share = np.bincount(token_classes(copied), minlength=4) / len(copied)
    assert abs(share - np.bincount(token_classes(text), minlength=4) / len(text)).max() < 0.05


@pytest.mark.parametrize("delimiter", [GPT2, BYTES])
def test_a_sequence_is_a_function_of_seed_step_and_index(delimiter):
    text = sequence(delimiter, 4096, 2)
    cells = list(itertools.product((0, 5), (0, 1, 7), (0, 3)))  # seed, step, index
    made = {cell: mixer(delimiter, seed=cell[0]).mix(cell[1], text, cell[2]).tobytes() for cell in cells}
    assert len(set(made.values())) == len(cells)
    random.Random(1).shuffle(cells)
    for cell in cells:  # a mixer of its own, as in a resumed run, and a global state of its own
        random.seed(cell[1])
        np.random.seed(cell[1])
        fresh = Mixer(0.1, 0.5, cell[0], COUNTS[delimiter], delimiter)
        assert fresh.mix(np.int64(cell[1]), text, np.int64(cell[2])).tobytes() == made[cell]


def test_the_text_given_stays_as_it_is():
    text = sequence(GPT2, 4096, 2)
    text.flags.writeable = False  # as np.frombuffer gives it
    kept = text.copy()
    assert (mixer(GPT2).mix(0, text, 0) != text).any() and (text == kept).all()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_sequences_of_one(world_size, monkeypatch):
    batch, seq_len, mix = sequence(GPT2, 5 * 512, 3), 512, functools.partial(mixer(GPT2, 0.3).mix, 4)
    seen = {}
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for i, (inputs, targets) in enumerate(S.local_sequences(batch, seq_len, torch.device("cpu"), mix)):
            assert torch.equal(inputs[1:].long(), targets[:-1])
            seen[rank + i * world_size] = inputs.tolist() + [int(targets[-1])]
    assert sorted(seen) == list(range(5))
    for i, tokens in seen.items():
        plain = batch[i * seq_len : (i + 1) * seq_len + 1]
        assert tokens == mix(plain, i).tolist() and tokens != plain.tolist()
        assert tokens[0] == plain[0] and tokens[-1] == plain[-1]  # the same in the sequence next to it


def sizes(delimiter, share, text, steps, passages=0.5):
    """[steps, 2] tokens that the copies of passages and that statements and questions overwrite."""
    made = np.zeros((steps, 2), dtype=int)
    for step in range(steps):
        for task in mixer(delimiter, share, passages=passages).plan(step, text, 0):
            made[step, int(task.kind != "passage")] += sum(map(len, task.pieces))
    return made


@pytest.mark.parametrize(("delimiter", "share"), [(GPT2, 0.02), (GPT2, 0.1), (GPT2, 0.5), (BYTES, 0.1), (BYTES, 0.5)])
def test_share(delimiter, share):
    """Half of it copies of passages; at 0.5, not every statement and question finds room beside them and their sources."""
    made = sizes(delimiter, share, sequence(delimiter, 16384, 2), 2) / 16384
    assert made.mean(axis=0) == pytest.approx(share / 2, rel=0.2, abs=80 / 16384)  # the last task may exceed it
    assert share > 0.3 or abs(made.sum(axis=1) - share).max() < 150 / 16384
    made = sizes(delimiter, share, sequence(delimiter, 512, 0), 400 if share > 0.1 else 1600) / 512
    assert made.mean(axis=0) == pytest.approx(share / 2, rel=0.2)


@pytest.mark.parametrize("passages", [0, 0.2, 1])
def test_share_of_passages(passages):
    made = sizes(GPT2, 0.1, sequence(GPT2, 16384, 2), 4, passages).mean(axis=0) / 16384
    assert made == pytest.approx([0.1 * passages, 0.1 * (1 - passages)], rel=0.1, abs=20 / 16384)
    assert made.all() == (0 < passages < 1)


def test_share_where_no_passage_fits():
    """Documents of 47 tokens: a passage of 8 would have to start 40 after its source."""
    text = zipf(4033, 3)
    text[::48] = GPT2
    made = sizes(GPT2, 0.02, text, 20)
    assert not made[:, 0].any() and made[:, 1].mean() / 4032 == pytest.approx(0.02, rel=0.2)


@functools.cache
def many_tasks():
    return [task for step in range(200) for task in mixer(GPT2, 0.05).plan(step, sequence(GPT2, 16384, 0, seed=1), 0)]


def octaves(distances):
    return np.bincount(np.log2(np.array(distances) / 32).astype(int), minlength=9) / len(distances)


def expected_octaves(nearest):
    """A last piece uniform in [nearest, 16384), then a distance log-uniform in [nearest, its place)."""
    edges = np.log(32 * 2.0 ** np.arange(10))
    first, last = np.log(nearest), np.log(np.arange(nearest + 1, 16384))[:, None]
    return np.diff((np.clip(edges, first, last) - first) / (last - first), axis=1).mean(axis=0)


def test_distances_spread_over_all_scales():
    single = [task.starts[-1] - task.starts[0] for task in many_tasks() if task.kind == "single"]
    assert min(single) >= 32 and len(octaves(single)) == 9
    assert abs(octaves(single) - expected_octaves(32)).max() < 0.035 and expected_octaves(32).min() > 0.02


def test_passages_spread_over_lengths_and_distances():
    passages = [task for task in many_tasks() if task.kind == "passage"]
    lengths = np.array([len(task.answer) for task in passages])
    assert lengths.min() == 8 and lengths.max() > 60
    drawn = np.diff(np.log([8, 16, 32, 65])) / math.log(65 / 8)
    assert abs(np.histogram(lengths, [8, 16, 32, 65])[0] / len(lengths) - drawn).max() < 0.06
    distances = [task.starts[0] - task.source for task in passages]
    expected = np.mean([expected_octaves(32 + n) for n in lengths[:200]], axis=0)
    assert abs(octaves(distances) - expected).max() < 0.04 and expected.min() > 0.02


def test_kinds_and_lookalikes_come_in_their_shares():
    tasks = [task for task in many_tasks() if task.kind != "passage"]
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1)
    for name, kind in KINDS.items():
        share = sum(task.kind == name for task in tasks) / len(tasks)
        assert abs(share - kind.share) < 5 * math.sqrt(kind.share / len(tasks)), name
    keys = [tuple(key.tolist()) for task in mixer(GPT2, 0.2).plan(0, sequence(GPT2, 65536, 0), 0) for key in task.keys]
    stems = collections.Counter(key[:-1] for key in keys)
    alike = sum(n - 1 for stem, n in stems.items()) / len(keys)
    assert 0.1 < alike < 0.3
    assert {len(key) for key in keys} == {2, 3, 4, 5}


def test_half_of_the_values_share_a_run_with_another():
    tasks = [t for t in mixer(GPT2, 0.1).plan(0, sequence(GPT2, 65536, 0), 0) if t.kind in ("single", "two values")]
    values = [value.tolist() for task in tasks for value in task.values]
    assert all(len(set(value)) == len(value) for value in values)
    assert all(value == task.pieces[0][-len(value) - len(task.template.after) :][: len(value)].tolist()
               for task in tasks for value in [task.values[0].tolist()])
    pairs = collections.Counter(pair for value in values for pair in itertools.pairwise(value))
    shared = sum(any(pairs[pair] > 1 for pair in itertools.pairwise(value)) for value in values) / len(values)
    assert 0.2 < shared  # runs of two tokens and more, those that others took from it counted too
    successors = collections.defaultdict(set)
    for first, second in pairs:
        successors[first].add(second)
    forked = sum(any(len(successors[token]) > 1 for token in value[:-1]) for value in values) / len(values)
    assert forked > 0.5


@pytest.mark.parametrize("step", [173, 345, 407])  # dealt once, keys or templates were of evaluation's classes alone
def test_few_ids_leave_training_words_of_its_own(step):
    few = 48
    counts = np.where(np.arange(1 << 16) < few, 1000 - 10 * np.arange(1 << 16), 0)
    text = np.random.RandomState(0).randint(0, few, 513).astype(np.uint16)
    draft = Mixer(0, 0.25, 0, counts, few).draft(step, text, 0)
    for pool, evaluated in ((draft.key_ids, {2}), (draft.value_ids, {3}), (draft.template_ids, {2, 3})):
        assert set(token_classes(pool.ids()).tolist()) - evaluated
    assert Mixer(0.1, 0.25, 0, counts, few).plan(step, text, 0)


def test_documents_too_short_are_left_alone():
    text = zipf(4097, 3)
    text[::33] = GPT2  # 32 tokens between delimiters
    assert (mixer(GPT2, 0.5).mix(0, text, 0) == text).all()
    text[33 * 20 : 33 * 60] = zipf(33 * 40, 4)  # one long document among them
    changed = np.flatnonzero(mixer(GPT2, 0.05).mix(0, text, 0) != text)
    assert len(changed) and 33 * 19 < changed.min() and changed.max() < 33 * 60
    for length in (1, 2, 33, 34, 40):
        tiny = zipf(length + 1, length)
        mixer(GPT2, 0.5).mix(0, tiny, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The script

SMALL = dict(VOCAB_SIZE=257, DOC_DELIMITER=BYTES, NUM_LAYERS=3, NUM_HEADS=2, HEAD_DIM=32, MODEL_DIM=64, TRAIN_SEQ_LEN=512,
             BATCH_TOKENS=1024, VAL_SEQ_LEN=512, VAL_TOKENS=1024, NUM_ITERATIONS=6, CHECKPOINT_EVERY=3, VAL_LOSS_EVERY=0)


@pytest.fixture
def settings(tmp_path, one_thread_on_cpu):
    write_shard(tmp_path / "train.bin", sequence(BYTES, 12000, 9, seed=3))
    write_shard(tmp_path / "poor.bin", np.arange(12000) % 20)
    write_shard(tmp_path / "val.bin", sequence(BYTES, 4000, 3, seed=4))
    return SMALL | dict(TRAIN_FILES=tmp_path / "train.bin", VAL_FILES=tmp_path / "val.bin", LOG_DIR=tmp_path / "logs")


def main(variables, *arguments):
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}, clear=True):
        S.main(list(arguments))


def losses(settings, name, key="train_loss"):
    lines = (settings["LOG_DIR"] / name / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def test_a_mixed_run_resumes_bitwise_and_leaves_validation_alone(settings, monkeypatch):
    main(settings | dict(RUN_NAME="whole", RETRIEVAL_MIX=0.1))
    log = (settings["LOG_DIR"] / "whole" / "log.txt").read_text()
    assert "retrieval mix: 10.0% of the training tokens" in log and "templates of" in log
    validated = []
    local_sequences = S.local_sequences

    class Killed(BaseException):
        pass

    def watched(batch, seq_len, device, mix=None):
        validated.append(mix is None)
        if len(validated) == 5:  # in the fifth step
            raise Killed
        return local_sequences(batch, seq_len, device, mix)

    part = settings | dict(RUN_NAME="parts", RETRIEVAL_MIX=0.1, RESUME="auto")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(S, "local_sequences", watched)
        main(part)
    assert not any(validated)
    main(part)
    whole = losses(settings, "whole")
    assert losses(settings, "parts") == whole and len(whole) == 6
    states = [torch.load(settings["LOG_DIR"] / name / "state_step000006.pt", weights_only=True)["model"]
              for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    evaluation = settings | dict(NUM_ITERATIONS=0, LOAD_CHECKPOINT=settings["LOG_DIR"] / "whole" / "state_step000006.pt")
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err:
        main(evaluation | dict(VAL_FILES=settings["TRAIN_FILES"]), "--check")
    assert "train.bin: VAL_FILES must not overlap with what the model is trained on" in err.getvalue()
    for share in (0, 0.4):
        main(evaluation | dict(RUN_NAME=f"evaluated_{share}", RETRIEVAL_MIX=share))
        value = losses(settings, f"evaluated_{share}", "val_loss")
        assert list(value.values()) == list(losses(settings, "whole", "val_loss").values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(RETRIEVAL_MIX=0.6), "RETRIEVAL_MIX=0.6: must be at least 0 and at most 0.5"),
        (dict(RETRIEVAL_MIX=-0.1), "RETRIEVAL_MIX=-0.1: must be at least 0"),
        (dict(RETRIEVAL_MIX="few"), "RETRIEVAL_MIX=few: must be a number"),
        (dict(RETRIEVAL_MIX=0.1, TRAIN_FILES="poor.bin"), "RETRIEVAL_MIX=0.1: {}/poor.bin: the text has 5 different tokens"),
    ],
)
def test_refusals(settings, tmp_path, change, said):
    variables = settings | change
    variables["TRAIN_FILES"] = tmp_path / variables["TRAIN_FILES"]
    for arguments in ([], ["--check"]):
        with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as err:
            main(variables, *arguments)
        assert stopped.value.code == 1 and err.getvalue().count("\n") == 1
        assert err.getvalue().startswith("error: ") and said.format(tmp_path) in err.getvalue()
    assert not (tmp_path / "logs").exists()


def test_documents_too_short_for_the_mix_are_told_of(settings, tmp_path):
    """A run says how much of it found no room."""
    rng = np.random.default_rng(0)
    short = [[BYTES, *rng.integers(0, BYTES, 31)] for _ in range(600)]
    write_shard(tmp_path / "short.bin", np.concatenate(short))
    for files, warned in ((tmp_path / "short.bin", True), (settings["TRAIN_FILES"], False)):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            main(settings | dict(RUN_NAME=files.stem, TRAIN_FILES=files, RETRIEVAL_MIX=0.2, NUM_ITERATIONS=1, VAL_TOKENS=0))
        assert ("finds room for 0.0%, not RETRIEVAL_MIX=0.2" in err.getvalue()) is warned


def test_a_mixer_killed_in_the_middle_of_a_sequence_is_told_of(monkeypatch):
    with contextlib.closing(MixerProcess(mixer(BYTES))) as process:
        monkeypatch.setattr(pickle, "load", mock.Mock(side_effect=pickle.UnpicklingError("pickle data was truncated")))
        process.process.kill()
        with pytest.raises(RuntimeError, match="the process that writes the retrieval mix has ended"):
            process.mix(0, np.zeros(9, np.uint16), 0)


def test_another_share_is_another_configuration():
    old = dataclasses.asdict(S.Config(retrieval_mix=0.05))
    assert S.differing_settings(old, S.Config(retrieval_mix=0.1), S.RESUME_MUST_MATCH) == ["RETRIEVAL_MIX was 0.05, is 0.1"]
    evaluated = S.Config(retrieval_mix=0.05, spectral_pointer_follow=4.0, spectral_pointer_asking=32)  # training sees neither
    assert S.differing_settings(old, evaluated, S.RESUME_MUST_MATCH) == []


def test_sequences_mixed_ahead_are_those_mixed_in_time(settings, monkeypatch):
    """In order, after a jump, and behind the last batch; by whichever process."""
    loader = S.TokenLoader(str(settings["TRAIN_FILES"]), 1024, 257, epochs=1)
    mix, in_time, taken = mixer(BYTES), Mixer.mix, []
    monkeypatch.setattr(Mixer, "mix", lambda *a: taken.append(a[1]) or in_time(*a))  # not in the other process
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        loader.position = dict(epoch=0, shard=0, batch=0)
        ahead = S.MixedAhead(mix, loader, 256)
        for step in [0, 1, 2, 7, 8, 9]:
            batch, function = loader.next_batch(), ahead.of_step(step)
            position = dict(loader.position)
            ahead.prepare(step + 1)
            assert loader.position == position
            for index in range(rank, 4, 2):
                tokens = batch[256 * index : 256 * index + 257]
                assert (function(tokens, index) == in_time(mix, step, tokens, index)).all()
        loader.position = dict(epoch=1, shard=0, batch=0)
        ahead.prepare(10)
        assert ahead.step is None and ahead.sequences == {}
        with pytest.raises(S.Stop, match="used up"):
            loader.next_batch()
        ahead.close()
        assert ahead.process.process.returncode == 0
    assert taken == [0, 0, 7, 7] * 2  # the first step, and after the jump: two sequences a process


def test_the_process_that_mixes_may_end(settings, tmp_path):
    """Killed: one line. It itself ends with the one that it works for, even if that is killed. It imports nothing of the
    directory where it is started."""
    (tmp_path / "data.py").write_text("raise RuntimeError")
    loader = S.TokenLoader(str(settings["TRAIN_FILES"]), 1024, 257, epochs=1)
    ahead = S.MixedAhead(mixer(BYTES), loader, 256)
    ahead.prepare(0)
    [sequence.result() for sequence in ahead.sequences.values()]
    ahead.process.process.kill()
    ahead.prepare(1)
    with pytest.raises(S.Stop, match=r"step 1: the process that writes the retrieval mix has ended \(-9\)"):
        ahead.of_step(1)(loader.peek()[:257], 0)
    ahead.close()
    text = (f"import sys, os, signal, numpy as np; sys.path.insert(0, {str(Path(S.__file__).parent)!r})\n"
            "from data.retrieval import Mixer, MixerProcess\n"
            "other = MixerProcess(Mixer(0.1, 0.5, 0, np.ones(256, dtype=int), 256))\n"
            "other.mix(0, np.zeros(257, dtype=np.uint16), 0)\n"
            "print(other.process.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    pid = int(subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, cwd=tmp_path).stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
            gone = Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"  # nobody may be there to bury it
        except (ProcessLookupError, FileNotFoundError):
            gone = True
        if gone:
            break
        time.sleep(0.1)
    assert gone
