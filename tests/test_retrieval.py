"""The retrieval evaluation: samples against a brute-force reading of their tokens, scorers of known ability, the command."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import scoped_medium as S
from data.retrieval import token_classes
from data.shards import find_shards, write_shard
from eval import retrieval as R
from eval.needle import wilson_interval
from lifecycle import lock_directory

ROOT = Path(S.__file__).resolve().parent
DELIMITER = 256
KEY, VALUE = 3, 4
SETTINGS = R.Settings(lengths=(512, 2048), samples=3, key_length=KEY, value_length=VALUE, depth_bins=2,
                      contexts=(256, 512, 1024, 2048), base_context=512, targets=256)
OPTIONS = ["--key-length", "3", "--value-length", "4", "--depth-bins", "2", "--contexts", "256,512,1024", "--base-context",
           "512", "--targets", "256"]
SMALL = ["--lengths", "640,1024", "--tasks", "multikey,mqar,gain", "--samples", "2"]
MODEL = dict(VOCAB_SIZE=257, DOC_DELIMITER=DELIMITER, NUM_LAYERS=3, NUM_HEADS=2, HEAD_DIM=32, MODEL_DIM=64, TRAIN_SEQ_LEN=512,
             BATCH_TOKENS=1024, VAL_TOKENS=0, NUM_ITERATIONS=3, SPECTRAL_BIAS=1, SPECTRAL_L_MAX=4096,
             SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_LOCAL_BLOCKS=1, SPECTRAL_POINTER_HALF_BLOCKS=1)

pytestmark = pytest.mark.usefixtures("one_thread_on_cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Harness


def text(lengths, seed):
    """Documents of these many tokens, each token leaning on the one before."""
    rng = np.random.default_rng(seed)
    steps = [rng.choice([1, 3, 7, 60], n, p=[0.4, 0.3, 0.2, 0.1]) for n in lengths]
    return [np.cumsum(part) % 251 for part in steps]


def write_documents(path, documents):
    write_shard(path, np.concatenate([[DELIMITER, *document] for document in documents]))


@pytest.fixture(scope="module")
def documents():
    return [document.tolist() for document in text([3000, 700, 2600, 900], 0)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, documents):
    """Folder of two held-out shards and a training one."""
    folder = tmp_path_factory.mktemp("shards")
    write_documents(folder / "held_0.bin", documents[:2])
    write_documents(folder / "held_1.bin", documents[2:])
    write_documents(folder / "train.bin", text([3000, 4000], 1))
    return folder


@pytest.fixture(scope="module")
def library(shards):
    return R.Library(find_shards(shards / "held_*.bin"), DELIMITER, 257, SETTINGS)


def cells(library, *tasks):
    return [cell for cell in library.cells() if cell.task in tasks and not (cell.task in R.PAIRS and cell.length < 2048)]


class Reading:
    """Every statement and question in a sequence, found by trying every template at every place."""

    def __init__(self, tokens_T, library):
        self.tokens, self.library = tokens_T.tolist(), library
        tokens = self.tokens
        keys, self.found = set(library.key_ids.tolist()), []  # (template, key, start of what follows the key)
        self.links = set()  # such starts
        forms = [(number, t, words) for number, t in enumerate(library.templates) for words in (t.between, t.linking)
                 if words is t.between or t.links]
        for number, template, words in forms:
            before, between = template.before.tolist(), words.tolist()
            size = len(before) + KEY + len(between)
            for start in range(1, len(tokens) - size + 1):
                key = tokens[start + len(before) : start + len(before) + KEY]
                if (tokens[start : start + len(before)] == before and len(set(key)) == KEY and keys.issuperset(key)
                        and tokens[start + size - len(between) : start + size] == between):
                    self.found.append((number, tuple(key), start + size))
                    self.links |= {start + size} if words is template.linking else set()
        self.values = set(library.value_ids.tolist())

    def after(self, place):
        return self.tokens[place : place + VALUE]

    def key_at(self, place):
        """What a link names."""
        return tuple(self.tokens[place : place + KEY])

    def statements(self, answers):
        """(template, key, place of its value or link) of what is stated: no question, and a value or a stated key follows."""
        stated = {key for _, key, _ in self.found}
        return sorted((found for found in self.found if found[2] < min(answers)
                       and (self.values.issuperset(self.after(found[2])) or self.key_at(found[2]) in stated)),
                      key=lambda found: found[2])

    def answer(self, place):
        """What is asked for at `place` by the tokens before it, links spelt out; None if nothing before states it."""
        asked = [(template, key) for template, key, end in self.found if end == place]
        for template, key in asked:
            way = []
            for _ in range(9):
                stated = [end for t, k, end in self.found if (t, k) == (template, key) and end < place]
                if not stated:
                    break
                link, words = max(stated) in self.links, self.library.templates[template]
                if way:
                    way += (words.linking if link else words.between).tolist()
                if not link:
                    return way + self.after(max(stated))
                key = self.key_at(max(stated))
                way += key
        return None


def oracle(library):
    """Scores .5 nats for tokens that a brute-force reader of the context would give, and 5 for others."""

    def score(tokens_T, last):
        reading = Reading(tokens_T, library)
        right = np.zeros(len(tokens_T), dtype=bool)
        for place in {end for _, _, end in reading.found if end >= len(tokens_T) - last}:
            told = reading.answer(place)
            if told is not None:
                told = told[: len(tokens_T) - place]
                right[place : place + len(told)] = np.equal(told, reading.tokens[place : place + len(told)])
        return np.where(right, 0.5, 5.0)[-last:], said(tokens_T, right)[-last:], None

    return score


def said(tokens_T, right):
    """What a scorer says who is right in these places."""
    return np.where(right, tokens_T, -1)


def blind(tokens_T, last):
    return np.full(last, 3.0), np.full(last, -1), None


def guesser(library):
    """Gives the value of any statement not asked for yet, without looking at keys; of a link, the key it names. If one of many
    keys is asked for, it is that of neither the first statement nor the last."""
    draw = random.Random(0)

    def score(tokens_T, last):
        reading, right = Reading(tokens_T, library), np.zeros(len(tokens_T), dtype=bool)
        answers = answer_places(tokens_T, library, reading)
        stated = sorted(reading.statements(answers), key=lambda statement: statement[2])
        if len(answers) == 1 and len({key for _, key, _ in stated}) == len(stated) > 2:
            stated = stated[1:-1]
        left = [reading.after(end) for _, _, end in stated]
        for place in answers:
            right[place : place + VALUE] = np.equal(draw.choice(left), reading.after(place))
            left = [value for value in left if value != reading.after(place) or len(left) == 1]
        return np.ones(last), said(tokens_T, right)[-last:], None

    return score


def answer_places(tokens_T, library, reading=None, size=VALUE):
    """Starts of the answers, of so many tokens, that close a sequence, found from its end."""
    reading = reading or Reading(tokens_T, library)
    ends, places = {end: (t, k) for t, k, end in reading.found}, []
    place = len(tokens_T) - size
    while place in ends:
        places.insert(0, place)
        template = library.templates[ends[place][0]]
        start = place - len(template.before) - KEY - len(template.between)
        place = next((end for end, (t, _) in ends.items() if end + size + len(library.templates[t].after) == start), None)
    return places


def positions(pattern, tokens):
    return [i for i in range(len(tokens) - len(pattern) + 1) if tuple(tokens[i : i + len(pattern)]) == tuple(pattern)]


def rows_of(score, library, chosen, samples, tokens_seen=1000):
    records = [R.evaluate_sample(score, library, cell, index) for cell in chosen for index in range(samples)]
    return R.summarise(json.loads(json.dumps(records)), 1e-4, library.settings.base_context, 512, tokens_seen)


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_depend_on_task_length_cell_index_and_seed_alone(shards, library):
    again = R.Library(find_shards(shards / "held_*.bin"), DELIMITER, 257,
                      R.replace(SETTINGS, samples=9, lengths=(2048, 512), tasks=R.TASKS[::-1]))
    other = R.Library(find_shards(shards / "held_*.bin"), DELIMITER, 257, R.replace(SETTINGS, seed=1))
    seen = set()
    for cell in cells(library, *R.TASKS):
        for index in range(2):
            tokens = library.sample(cell, index).tokens_T
            np.testing.assert_array_equal(tokens, again.sample(cell, index).tokens_T)
            assert not np.array_equal(tokens[1:], other.sample(cell, index).tokens_T[1:])
            seen.add(tokens.tobytes())
    assert len(seen) == 2 * len(cells(library, *R.TASKS))


@pytest.mark.parametrize("index", range(3))
def test_samples_are_what_they_say(library, documents, index):
    for cell in cells(library, *R.TASKS[:-1]):
        sample = library.sample(cell, index)
        tokens = sample.tokens_T.tolist()
        assert sample.tokens_T.dtype == np.int64 and len(tokens) == cell.length and positions([DELIMITER], tokens) == [0]
        reading = Reading(sample.tokens_T, library)
        answers = answer_places(sample.tokens_T, library, reading, sample.size)
        assert sample.answers == answers and answers[-1] + sample.size == cell.length
        assert sample.size == VALUE or cell.task == "tracking"
        number = 1 if cell.task in ("single", "depth") else int(cell.low)
        assert len(answers) == (number if cell.task in R.PAIRS else 1)
        stated = reading.statements(answers)
        assert len(stated) == {"multikey": number + 1, "tracking": number + 1}.get(cell.task, number)
        asked = [next(key for _, key, end in reading.found if end == answer) for answer in answers]
        assert len(set(asked)) == len(asked)
        for key, answer, distance in zip(asked, answers, sample.distances, strict=True):
            assert reading.answer(answer) == tokens[answer : answer + sample.size]
            value = answer + sample.size - VALUE
            source = value - distance
            assert reading.after(source) == reading.after(value) and source in [end for _, _, end in stated]
            # The key is in its statements, in its question, and nowhere else.
            assert len(positions(key, tokens)) == 1 + (number if cell.task == "multivalue" else 1)
        pieces = {p for t, _, end in reading.found if end in answers or (t, _, end) in stated
                  for template in [library.templates[t]]
                  for p in range(end - len(template.between) - KEY - len(template.before), end + VALUE + len(template.after))}
        if cell.task != "tracking":  # links end in a key, one token shorter than a value
            rest = [token for place, token in enumerate(tokens[1:], 1) if place not in pieces]
            assert sum(bytes(rest) in bytes(document) for document in documents) == 1 and not sample.stitched
        check_task(cell, sample, reading, stated, asked)


def library_template(reading, stated):
    return reading.library.templates[stated[0][0]]


def check_task(cell, sample, reading, stated, asked):
    """What sets one task apart from the others."""
    ends, distance = [end for _, _, end in stated], sample.distances[0]
    source = sample.answers[0] + sample.size - VALUE - distance
    if cell.task == "single":
        assert cell.low <= distance <= cell.high
    if cell.task == "depth":
        assert cell.low - 0.05 <= source / cell.length <= cell.high + 0.05
    if cell.task == "multikey":
        assert len({template for template, _, _ in stated}) == 1 and len({key for _, key, _ in stated}) == len(stated)
        assert min(ends) < source < max(ends)
    if cell.task == "multivalue":
        assert {key for _, key, _ in stated} == set(asked) and source == max(ends)
        assert len({tuple(reading.after(end)) for end in ends}) == len(stated)
    if cell.task == "tracking":
        keys = [key for _, key, _ in stated]
        assert source == ends[0] and asked == [keys[-1]] and len(set(keys)) == len(keys)
        assert [reading.key_at(end) for end in ends[1:]] == keys[:-1]
        assert sample.size == VALUE + int(cell.low) * (KEY + len(library_template(reading, stated).between))
        assert reading.links == {*ends[1:], sample.answers[0]}
    if cell.task in R.PAIRS:
        assert sorted(asked) == sorted(key for _, key, _ in stated)


def test_swapped_samples_differ_in_the_values_asked_for_alone(library):
    for cell in cells(library, *R.TASKS[:-1]):
        sample = library.sample(cell, 0)
        changed = set(np.flatnonzero(sample.tokens_T != sample.swapped_T).tolist())
        sources = [answer + sample.size - VALUE - distance
                   for answer, distance in zip(sample.answers, sample.distances, strict=True)]
        assert set(sources) <= changed <= {source + i for source in sources for i in range(VALUE)}


def test_no_template_key_or_value_of_training(library):
    words = {word for t in library.templates for part in (t.before, t.between, t.after, t.linking) for word in part.tolist()}
    assert words and set(token_classes(list(words))) <= {2, 3}
    assert set(token_classes(library.key_ids)) == {2} and set(token_classes(library.value_ids)) == {3}


def test_no_key_is_in_the_text(shards):
    """Keys of two tokens, of which the text holds many, and of one, of which it holds all."""
    paths = find_shards(shards / "held_*.bin")
    two, one = (R.Library(paths, DELIMITER, 257, R.replace(SETTINGS, key_length=n)) for n in (2, 1))
    cell = next(cell for cell in two.cells() if cell.task == "multikey" and cell.length == 2048)
    for index in range(20):
        sample = two.sample(cell, index)
        before = sample.tokens_T[: sample.answers[0]].tolist()
        between = next(len(t.between) for t in two.templates if before[len(before) - len(t.question([0, 0])) :][: len(t.before)]
                       == t.before.tolist() and before[len(before) - len(t.between) :] == t.between.tolist())
        key = before[len(before) - between - 2 : len(before) - between]
        assert set(key) <= set(two.key_ids.tolist()) and len(positions(key, before)) == 2
    with pytest.raises(ValueError, match="a key in the text: take a larger --key-length"):
        one.sample(cell, 0)


def test_distances_and_depths_fill_their_bins(library):
    for cell in cells(library, "single"):
        distances = [library.sample(cell, index).distances[0] for index in range(60)]
        middle = math.sqrt(cell.low * cell.high)
        assert 15 <= sum(distance < middle for distance in distances) <= 50  # uniform in the logarithm
    edges = [(cell.low, cell.high) for cell in library.cells() if cell.task == "single" and cell.length == 2048]
    assert edges == [(128, 512), (512, 2048)]
    places = [library.sample(cell, i).answers[0] - library.sample(cell, i).distances[0]
              for cell in cells(library, "depth") if cell.length == 512 for i in range(40)]
    assert min(places) < 40 and max(places) > 440


def test_text_is_stitched_where_no_document_is_long_enough(shards, documents):
    library = R.Library(find_shards(shards / "held_*.bin"), DELIMITER, 257, R.replace(SETTINGS, lengths=(4096,)))
    cell = next(cell for cell in library.cells() if cell.task == "single")
    for index in range(4):
        sample = library.sample(cell, index)
        assert sample.stitched and (sample.tokens_T == DELIMITER).sum() == 1
        text, name, stitched = library.draw_text(R.generator(index), 4096)
        assert stitched and any(bytes(text.tolist()) in bytes(itertools.chain(*order))
                                for order in itertools.permutations(documents))


def test_a_document_without_text_is_not_stitched(tmp_path, documents):
    (tmp_path / "with").mkdir()
    write_documents(tmp_path / "with" / "held.bin", [[], *documents, []])
    settings = R.replace(SETTINGS, lengths=(4096,))
    library = R.Library(find_shards(tmp_path / "with" / "held.bin"), DELIMITER, 257, settings)
    for index in range(16):  # in some of them such a document would come first
        text, _, stitched = library.draw_text(R.generator(index), 4096)
        assert stitched and len(text) == 4096 and DELIMITER not in text


def test_targets_of_the_gain_are_the_same_behind_every_context(library, documents):
    chosen = cells(library, "gain")
    assert [cell.variant for cell in chosen] == ["own 256", "own 512", "own 1024", "own 2048", "other 1024", "other 2048"]
    for index in range(3):
        samples = {cell.variant: library.sample(cell, index) for cell in chosen}
        (home,) = [d for d in documents if positions(samples["own 2048"].tokens_T[1:].tolist(), d)]
        for variant, sample in samples.items():
            tokens, context = sample.tokens_T.tolist(), int(variant.split()[1])
            assert len(tokens) == context + 256 and sample.answers == [context] and sample.size == 256
            assert tokens[context:] == samples["own 2048"].tokens_T[-256:].tolist() and positions([DELIMITER], tokens) == [0]
            near = 512 - 1 + 256 if variant.startswith("other") else len(tokens) - 1
            assert tokens[-near:] == samples["own 2048"].tokens_T[-near:].tolist()
            far = tokens[1 : len(tokens) - near]
            assert not far or (not positions(far, home) and any(positions(far, d) for d in documents))
        nested = samples["other 1024"].tokens_T[1:]
        assert samples["other 2048"].tokens_T[-len(nested) :].tolist() == nested.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Scorers of known ability, and statistics


def test_an_oracle_is_always_right_and_loses_by_a_swap(library):
    rows = rows_of(oracle(library), library, cells(library, *R.TASKS[:-1]), 2)
    assert {row["task"] for row in rows} == set(R.TASKS[:-1])
    for row in rows:
        assert row["exact_match"] == row["first_token_accuracy"] == row["token_accuracy"] == row["exact_match_high"] == 1, row
        assert row["nats"] == 0.5 and row["retrieval_gain"] > 0.5 and row["retrieval_gain_n"] == row["n"], row
    dense = [row for row in rows if row["task"] == "dense"]
    assert [(row["variant"], row["n"], row["contexts"]) for row in dense] == [
        ("64 needles", 128, 2), ("first of 64 needles", 2, 2)]


def test_the_blind_are_at_chance_and_lose_nothing_by_a_swap(library):
    for row in rows_of(blind, library, cells(library, *R.TASKS[:-1]), 2):
        assert row["exact_match"] == row["exact_match_low"] == row["token_accuracy"] == row["retrieval_gain"] == 0, row
        assert row["nats"] == 3 and 0 < row["chance"] <= (1 if row["task"] == "tracking" else 0.5)


def test_a_guesser_among_the_statements_is_at_chance(library):
    chosen = [cell for cell in cells(library, "multikey", "multivalue", "mqar")
              if cell.length == 512 or cell.task == "mqar"]
    small = R.Library(library.haystack.paths, DELIMITER, 257, R.replace(SETTINGS, swaps=0))
    for row in rows_of(guesser(small), small, chosen, 40):
        spread = math.sqrt(row["chance"] * (1 - row["chance"]) / row["n"])
        assert abs(row["exact_match"] - row["chance"]) < 4 * spread, row
        assert row["retrieval_gain"] is None and row["retrieval_gain_n"] == 0


def test_wilson_interval_of_clusters():
    assert R.clustered_wilson([[1]] * 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert R.clustered_wilson([[1]] * 180 + [[0]] * 20) == pytest.approx((0.8506, 0.9344), abs=1e-4)
    assert R.clustered_wilson([[1]] * 3 + [[0]]) == pytest.approx(wilson_interval(3, 4))
    # Copies within a cluster add nothing; independent outcomes count as if there were no clusters.
    assert R.clustered_wilson([[1] * 64] * 15 + [[0] * 64] * 5) == pytest.approx(wilson_interval(15, 20))
    assert R.clustered_wilson([[1] * 64] * 5) == pytest.approx(wilson_interval(5, 5))
    assert R.clustered_wilson([[1, 0]] * 50) == pytest.approx(wilson_interval(50, 100))
    outcomes = np.random.default_rng(0).random((400, 8)) < 0.3
    low, high = R.clustered_wilson(outcomes)
    assert high - low == pytest.approx(np.subtract(*wilson_interval(int(outcomes.sum()), 3200)[::-1]), rel=0.15)


def test_context_gain_and_its_error(library):
    """Against sums written out by hand, for losses that fall with the context and differ by text."""
    chosen, draw = cells(library, "gain"), random.Random(0)
    offsets = {}

    def score(tokens_T, last):
        target = tokens_T[-256:].tobytes()
        level = offsets.setdefault(target, draw.random())
        context = len(tokens_T) - 256
        return np.full(last, 3 + level - 0.1 * (1 + level) * math.log2(context / 512)), tokens_T[-last:], None

    records = [R.evaluate_sample(score, library, cell, index) for cell in chosen for index in range(12)]
    rows = {row["variant"]: row for row in R.summarise(records, 1e-4, 512, 512, 1000)}
    for variant, row in rows.items():
        log = math.log2(int(variant.split()[1]) / 512)
        mine = [r for r in records if r["variant"] == variant]
        base = {r["index"]: r["nats"][0] for r in records if r["variant"] == "own 512"}
        gains = [base[r["index"]] - r["nats"][0] for r in mine]
        assert row["n"] == 12 and row["context_gain"] == pytest.approx(sum(gains) / 12)
        assert row["context_gain"] == pytest.approx(0.1 * log * (1 + sum(offsets.values()) / 12), abs=1e-5)
        by_text = {}
        for record, gain in zip(mine, gains, strict=True):
            by_text[record["text"]] = by_text.get(record["text"], 0) + gain - row["context_gain"]
        assert row["texts"] == len(by_text) == 2
        assert row["context_gain_se"] == pytest.approx(math.sqrt(2 * sum(x * x for x in by_text.values())) / 12, abs=1e-9)
    assert rows["own 512"]["context_gain"] == rows["own 512"]["context_gain_se"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The command, on a tiny checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("run")
    variables = MODEL | dict(TRAIN_FILES=shards / "train.bin", LOG_DIR=folder, RUN_NAME="tiny", VAL_FILES=shards / "held_0.bin")
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}, clear=True), \
            mock.patch.object(torch.cuda, "is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
        S.main([])
    return folder / "tiny" / "state_step000003.pt"


def command(checkpoint, shards, out, *arguments, **variables):
    """eval/retrieval.py in this process; the environment holds these variables and nothing else. Returns the lengths scored."""
    scored, score = [], R.Scorer.__call__

    def counting(scorer, tokens_T, last):
        scored.append(len(tokens_T))
        return score(scorer, tokens_T, last)

    with mock.patch.dict(os.environ, variables, clear=True), mock.patch.object(R.Scorer, "__call__", counting):
        R.main([str(checkpoint), "--text", str(shards / "held_*.bin"), "--out", str(out), *OPTIONS, *arguments])
    return scored


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, checkpoint, shards):
    out = tmp_path_factory.mktemp("evaluated") / "out"
    with mock.patch.object(torch.cuda, "is_available", lambda: False), contextlib.redirect_stdout(io.StringIO()):
        command(checkpoint, shards, out, *SMALL)
    return out


def records_of(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_command_writes_samples_summary_and_run(evaluated, checkpoint):
    rows = list(csv.DictReader((evaluated / "summary.csv").open()))
    assert list(rows[0]) == list(R.COLUMNS) and len(rows) == len({(r["task"], r["variant"], r["length"]) for r in rows})
    assert {r["task"] for r in rows} == {"multikey", "mqar", "gain"}
    assert {r["train_length"] for r in rows} == {"512"} and all(float(r["nats"]) > 1 for r in rows)
    ids = [record["id"] for record in records_of(evaluated)]
    assert len(set(ids)) == len(ids) and all(int(r["contexts"]) == 2 for r in rows)
    run = json.loads((evaluated / "run.json").read_text())
    assert run["status"] == "complete" and run["step"] == 3 and run["train_length"] == 512 and run["tokens_seen"] == 3072
    assert {r["tokens_seen"] for r in rows} == {"3072"}
    assert run["retrieval_mix"] == 0 and run["dtype"] == "float32" and run["device"] == "cpu" and run["wall_seconds"] > 0
    assert run["checkpoint_sha256"] == R.file_hash(checkpoint) and run["arguments"]["lengths"] == [640, 1024]
    assert run["stitched"] == [] and re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["commit"] or "0" * 40)


def test_a_line_holds_the_answers_and_what_was_said(library):
    cell = next(c for c in cells(library, "mqar"))
    sample = library.sample(cell, 0)
    wrong = sample.answers[1] + 2

    def score(tokens_T, last):
        told = tokens_T.copy()
        told[wrong] += 1
        return np.ones(last), told[-last:], None

    line = R.evaluate_sample(score, library, cell, 0)
    assert line["answer"] == [sample.tokens_T[at : at + VALUE].tolist() for at in sample.answers]
    told = np.array(line["said"]) - line["answer"]
    assert told[1, 2] == 1 and np.count_nonzero(told) == 1
    assert line["correct"] == ["1" * VALUE, "110".ljust(VALUE, "1")] + ["1" * VALUE] * (len(sample.answers) - 2)


def test_scores_are_those_of_the_whole_forward(checkpoint, library):
    state = R.read_checkpoint(checkpoint, R.WEIGHT_KEYS)
    with mock.patch.dict(os.environ, {}, clear=True):
        config = R.model_config(state, 1024)
    assert config.max_seq_len == 1024 and config.spectral_l_train == 512 and config.arm == "C"
    scorer = R.Scorer(state, checkpoint, config, torch.device("cpu"))
    tokens_T = library.sample(next(c for c in cells(library, "multikey") if c.length == 512), 0).tokens_T
    nats, told, reads = scorer(tokens_T, 100)
    assert reads is None  # offsets point
    tokens = torch.from_numpy(tokens_T)
    with torch.no_grad():
        hidden, _ = scorer.model.hidden(tokens.int(), S.Schedule(config, 3, 3).context(tokens.int(), False, "reference"))
        log_p = scorer.model.logits(hidden)[:-1].log_softmax(-1)
    np.testing.assert_allclose(nats, [-log_p[i - 1, tokens[i]].item() for i in range(412, 512)], atol=1e-5)
    assert told.tolist() == log_p[411:511].argmax(-1).tolist()


def test_what_is_read_is_what_stands_in_the_lists(library, monkeypatch):
    """Against the lists that the attention of any layer got, of the heads that search."""
    variables = MODEL | dict(VAL_SEQ_LEN=2048, SPECTRAL_POINTER_SOURCE="content", SPECTRAL_POINTER_HEADS=1,
                             SPECTRAL_POINTER_NEAR_BLOCKS=2, SPECTRAL_POINTER_FAR_BLOCKS=2, SPECTRAL_LANDMARK_DIM=16,
                             SPECTRAL_BANDS=2, HEAD_DIM=64)
    config = S.Config.from_environment({name: str(value) for name, value in variables.items()})
    state = dict(model=S.build_model(config, torch.device("cpu")).state_dict(), config=S.dataclasses.asdict(config), step=3,
                 total_steps=3)
    scorer, lists, point = R.Scorer(state, "made", config, torch.device("cpu")), [], S.ContentPointers.point
    monkeypatch.setattr(S.ContentPointers, "point", lambda *a: lists.append(point(*a)) or lists[-1])
    _, _, reads = scorer(np.random.default_rng(3).integers(0, 256, 2048), 300)
    found, far = [pointing.lists for pointing in lists], 0
    for position in range(2048 - 301, 2047):
        tile = position // S.BLOCK
        for block in range(tile + 1):
            slots = [(one.idx_BHNW[0, 0, tile] == block).nonzero().flatten().tolist() for one in found]
            seen = any(slot < one.num_BHN[0, 0, tile] and one.seen_BHTw[0, 0, position, slot // 32] >> slot % 32 & 1
                       for one, places in zip(found, slots, strict=True) for slot in places)
            assert reads(position, block * S.BLOCK + 5) == seen
            far += seen and 0 < block < tile - 1
    assert far > 100


def test_interrupted_evaluation_goes_on_where_it_was(tmp_path, evaluated, checkpoint, shards):
    shutil.copytree(evaluated, tmp_path / "out")
    lines = (evaluated / "samples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out/samples.jsonl").write_text("".join(lines[:-5]) + lines[-5][:40])
    (tmp_path / "out/summary.csv").unlink()
    assert len(command(checkpoint, shards, tmp_path / "out", *SMALL)) == 5  # of gain, which has no swapped sequences
    assert (tmp_path / "out/summary.csv").read_text() == (evaluated / "summary.csv").read_text()
    assert command(checkpoint, shards, tmp_path / "out", *SMALL) == []


def test_more_samples_join_those_that_are_there(tmp_path, evaluated, checkpoint, shards):
    shutil.copytree(evaluated, tmp_path / "out")
    scored = command(checkpoint, shards, tmp_path / "out", "--lengths", "512", "--tasks", "tracking", "--samples", "2",
                     "--swaps", "1")
    assert scored == [512] * 3 * 3
    old, new = (list(csv.DictReader((out / "summary.csv").open())) for out in (evaluated, tmp_path / "out"))
    assert [row for row in new if row["task"] != "tracking"] == old
    assert [row["retrieval_gain_n"] for row in new if row["task"] == "tracking"] == ["1"] * 3


def test_more_swaps_join_those_that_are_there(tmp_path, evaluated, checkpoint, shards):
    shutil.copytree(evaluated, tmp_path / "out")
    own = ["--lengths", "512", "--tasks", "tracking", "--samples"]
    assert command(checkpoint, shards, tmp_path / "out", *own, "2", "--swaps", "0") == [512] * 3 * 2
    assert command(checkpoint, shards, tmp_path / "out", *own, "2", "--swaps", "2") == [512] * 3 * 2 * 2  # the same again
    assert command(checkpoint, shards, tmp_path / "out", *own, "2", "--swaps", "1") == []
    rows = [row for row in csv.DictReader((tmp_path / "out/summary.csv").open()) if row["task"] == "tracking"]
    assert [(row["n"], row["retrieval_gain_n"]) for row in rows] == [("2", "2")] * 3


def test_one_evaluation_at_a_time(tmp_path, evaluated, checkpoint, shards):
    """In one directory; and one that is interrupted says how to go on."""
    shutil.copytree(evaluated, tmp_path / "out")
    held = [checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out", *OPTIONS, *SMALL]
    lock = lock_directory(tmp_path / "out", "")
    line = refusal(*held)
    assert f"{tmp_path / 'out'} is in use by process {os.getpid()}" in line and "another --out" in line
    os.close(lock)
    with mock.patch.object(R, "read_samples", side_effect=KeyboardInterrupt), pytest.raises(SystemExit) as stopped:
        R.main(list(map(str, held)))
    assert stopped.value.code == "interrupted: the same command goes on where it was"


def test_two_processes_give_the_same_summary(tmp_path, evaluated, checkpoint, shards):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "eval/retrieval.py", checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out",
                           *OPTIONS, *SMALL], capture_output=True, text=True, timeout=200,
                          env=kept | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/summary.csv").read_text() == (evaluated / "summary.csv").read_text()
    one, two = (sorted(records_of(out), key=lambda r: r["id"]) for out in (evaluated, tmp_path / "out"))
    assert one == two
    assert json.loads((tmp_path / "out/run.json").read_text())["world_size"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def refusal(*arguments, name="retrieval.py", main=R.main, **environment):
    with mock.patch.dict(os.environ, environment, clear=True), pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    line = str(stopped.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.mark.parametrize("options, parts", [
    (["--lengths", "1000"], ["--lengths", "1000", "multiple of 128"]),
    (["--lengths", "128"], ["128 is not"]),
    (["--tasks", "single,sing"], ["sing is none of", "multikey"]),
    (["--tasks", "sing", "--samples", "0"], ["sing", "; --samples must be at least 1"]),
    (["--lengths", "16384"], ["7200 tokens", "16383"]),
    (["--lengths", "8192", "--text", "nowhere*.bin"], ["no shard matches 'nowhere*.bin'"]),
    (["--lengths", "1024", "--tasks", "dense"], ["dense at length 1024", "larger --lengths"]),
    (["--lengths", "1024", "--tasks", "gain", "--targets", "2560"], ["gain", "at most 441"]),
    (["--lengths", "1024", "--key-length", "400"], ["--key-length: 400"]),
    (["--lengths", "eight"], ["--lengths"]),
    (["--base-context", "768"], ["768 is not one of --contexts"]),
])
def test_refusals_are_one_line_and_leave_nothing(tmp_path, checkpoint, shards, options, parts):
    line = refusal(checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out", *OPTIONS, "--tasks", "single",
                   *options)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


def test_a_directory_is_of_one_code_and_one_precision(tmp_path, evaluated, checkpoint, shards, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "out")
    again = [checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out", *OPTIONS, *SMALL]
    run = json.loads((tmp_path / "out/run.json").read_text())
    (tmp_path / "out/run.json").write_text(json.dumps(run | dict(dtype="bfloat16", backend="triton")))
    assert "holds another evaluation (dtype, backend differ)" in refusal(*again)
    (tmp_path / "out/run.json").write_text(json.dumps(run))
    scoring = {name for name in sys.modules if name.startswith("model.")} | {"scoped_medium", "eval.needle", "eval.retrieval"}
    assert {path.relative_to(R.ROOT).with_suffix("").as_posix().replace("/", ".") for path in R.CODE} >= scoring
    monkeypatch.setattr(R, "CODE", R.CODE[:2])
    assert "(code_sha256 differ)" in refusal(*again)


@pytest.mark.parametrize("line", ["123", '{"id": "x"}', "null", "record nats", "record index", "record correct"])
def test_a_line_that_is_no_sample_is_named(tmp_path, evaluated, checkpoint, shards, line):
    shutil.copytree(evaluated, tmp_path / "out")
    record = records_of(evaluated)[0]
    assert record["task"] == "multikey"
    damage = dict(nats=dict(nats=[None]), index=dict(index=record["index"] + 1), correct=dict(correct=["1x"]))
    text = json.dumps(record | damage[line.split()[1]]) if line.startswith("record") else line
    with (tmp_path / "out/samples.jsonl").open("ab") as file:
        file.write(b"\xff\n" + text.encode() + b"\n")
    number = len(records_of(evaluated)) + 2
    said = refusal(checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out", *OPTIONS, *SMALL)
    assert f"samples.jsonl, line {number} is no sample: take the line out" in said


def test_places_that_cannot_be_written_are_refused(tmp_path, checkpoint, shards):
    held = [checkpoint, "--text", shards / "held_*.bin", *OPTIONS, *SMALL, "--out"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert f"--out: {out} cannot be written, as {tmp_path / 'file'} is no directory" in refusal(*held, out)
    assert "--out: /proc/none cannot be written (No such file or directory): choose another" in refusal(*held, "/proc/none")
    assert "is the directory of a training run: choose another" in refusal(*held, checkpoint.parent)


@pytest.mark.parametrize("error, part", [
    (torch.OutOfMemoryError("CUDA out of memory"), "multikey/640/3 distractors/0: out of memory: take smaller --lengths"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"), (MemoryError(), "out of memory")])
def test_too_little_memory_is_said(tmp_path, checkpoint, shards, error, part):
    held = [checkpoint, "--text", shards / "held_*.bin", *OPTIONS, *SMALL, "--out"]
    with mock.patch.object(R.Scorer, "__call__", side_effect=error):
        assert part in refusal(*held, tmp_path / "out")
    with mock.patch.object(R.Scorer, "__call__", side_effect=RuntimeError("a bug")), pytest.raises(RuntimeError, match="a bug"):
        R.main(list(map(str, [*held, tmp_path / "another"])))


def test_losses_that_are_no_numbers_are_refused(library):
    with pytest.raises(R.Stop, match="multikey/512/3 distractors/0: the loss is not a finite number"):
        R.evaluate_sample(lambda tokens_T, last: (np.full(last, np.nan), np.zeros(last), None), library,
                          cells(library, "multikey")[0], 0)


def test_poor_text_is_told_of_the_option(tmp_path):
    write_documents(tmp_path / "poor.bin", [[1, 2, 3] * 1000])
    with pytest.raises(ValueError, match="give more text, by --text"):
        R.Library([tmp_path / "poor.bin"], DELIMITER, 257, SETTINGS)


def test_a_book_cut_by_a_shards_end_is_one_book(tmp_path, documents):
    """No half of it is another book than the other half."""
    whole = [DELIMITER, *documents[0]]
    write_shard(tmp_path / "a.bin", np.array([DELIMITER, *documents[2], *whole[:1500]]))
    write_shard(tmp_path / "b.bin", np.array([*whole[1500:], DELIMITER, *documents[1], DELIMITER, *documents[3]]))
    library = R.Library([tmp_path / "a.bin", tmp_path / "b.bin"], DELIMITER, 257, SETTINGS)
    rows = library.haystack.documents_N3.tolist()
    assert [library.book(row) for row in rows] == [0, 1, 1, 2, 3]
    assert library.name(rows[1]) == library.name(rows[2]) == f"a.bin:{rows[1][1]}" != library.name(rows[3])
    drawn = {library.draw_text(R.generator("cut", seed), 600, other_than=rows[half])[1]
             for seed in range(40) for half in (1, 2)}
    assert drawn == {library.name(row) for row in (rows[0], rows[3], rows[4])}


def test_wrong_files_are_refused(tmp_path, evaluated, checkpoint, shards):
    held = ["--text", shards / "held_*.bin", "--out"]
    assert "no such checkpoint" in refusal(tmp_path / "none.pt", *held, tmp_path / "out")
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    assert "not a readable checkpoint" in refusal(tmp_path / "bad.pt", *held, tmp_path / "out")
    assert "train.bin is a training shard" in refusal(checkpoint, "--text", shards / "train.bin", "--out", tmp_path / "out",
                                                      *OPTIONS, *SMALL)
    state = torch.load(checkpoint, weights_only=True)
    del state["model"]["head_w"]
    torch.save(state, tmp_path / "less.pt")
    assert "does not fit this model" in refusal(tmp_path / "less.pt", *held, tmp_path / "out", *OPTIONS, *SMALL)
    assert not (tmp_path / "out").exists()
    line = refusal(checkpoint, *held, evaluated, *OPTIONS, *SMALL, "--seed", "1")
    assert "holds another evaluation (seed differ)" in line and "--out" in line
    assert "(depth_bins differ)" in refusal(checkpoint, *held, evaluated, *OPTIONS, *SMALL, "--depth-bins", "3")
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread/run.json").write_text("[]")
    assert "run.json cannot be read" in refusal(checkpoint, *held, tmp_path / "unread", *OPTIONS, *SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/samples.jsonl").write_text("")
    assert "no run.json" in refusal(checkpoint, *held, tmp_path / "other", *OPTIONS, *SMALL)


def test_whatever_changes_the_forward_makes_another_evaluation(library, checkpoint, monkeypatch):
    """Settings that the checkpoint is too old to know, and the radius of a validation, too."""
    state = R.read_checkpoint(checkpoint, R.WEIGHT_KEYS)
    del state["config"]["spectral_pointer_floor"]

    def overrides():
        return R.identity(state, checkpoint, R.model_config(state, 1024), library)["overrides"]

    assert overrides() == {}
    changed = dict(spectral_pointer_floor=3.0, spectral_pointer_val_force=True, spectral_beta=0.5)
    for name, value in changed.items():
        monkeypatch.setenv(name.upper(), f"{value:g}")
    assert overrides() == changed


def test_the_environment_cannot_change_the_model(tmp_path, checkpoint, shards):
    """Told before what such a model could not do, here with a layer that it lacks."""
    line = refusal(checkpoint, "--text", shards / "held_*.bin", "--out", tmp_path / "out", *OPTIONS, *SMALL, NUM_LAYERS="2",
                   SPECTRAL_LAYERS="2", SPECTRAL_BIAS="1")
    assert "another model than the checkpoint's: NUM_LAYERS was 3, is 2: leave them out" in line


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_from_the_summary_alone(tmp_path, library):
    pytest.importorskip("matplotlib")
    for name, score in (("seeing", oracle(library)), ("blind", blind)):
        (tmp_path / name).mkdir()
        rows = rows_of(score, library, [cell for cell in cells(library, *R.TASKS) if cell.task not in R.PAIRS], 1)
        (tmp_path / name / "summary.csv").write_text(R.csv_text(rows))
    done = subprocess.run([sys.executable, ROOT / "eval/plot_retrieval.py", tmp_path / "seeing", tmp_path / "blind", "--output",
                           tmp_path / "pictures"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(
        f"retrieval_{kind}.{suffix}" for kind in ("depth", "distance", "tasks", "gain") for suffix in ("png", "svg"))
    for path in (tmp_path / "pictures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and "seeing" in path.with_suffix(".svg").read_text()


def test_the_trend_has_a_line_for_directories_beside_each_other(tmp_path, library):
    """Exact match against tokens trained on: the mean over a task's cells of one length, and the worst and the best of them."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from eval import plot_retrieval

    scores = {"run/first": (blind, 1000), "run/second": (oracle(library), 3000), "other/late": (blind, 9000)}
    chosen = [cell for cell in cells(library, "single", "multikey") if cell.length == 2048]
    for name, (score, tokens_seen) in scores.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.csv").write_text(R.csv_text(rows_of(score, library, chosen, 1, tokens_seen)))
    models = {name: plot_retrieval.read_summary(tmp_path / name) for name in scores}
    assert plot_retrieval.draw_trend(plt, {name: models[name] for name in ("run/first", "other/late")}) is None

    models["run/second"][0]["exact_match"] = 0.5
    figure = plot_retrieval.draw_trend(plt, models)
    single, multikey = figure.axes
    assert [len(panel.lines) for panel in figure.axes] == [1, 1] and single.lines[0].get_label() == "run"
    assert single.get_title() == "single, 2k tokens" and multikey.get_title() == "multikey, 2k tokens"
    bins = len(plot_retrieval.of_task(models["run/second"], "single"))
    assert list(single.lines[0].get_xdata()) == [1000, 3000]
    assert list(single.lines[0].get_ydata()) == pytest.approx([0, 1 - 0.5 / bins])
    assert {y for _, y in single.collections[0].get_paths()[0].vertices} == {0, 0.5, 1}
    assert list(multikey.lines[0].get_ydata()) == [0, 1]

    both = {}  # parents of one name are told apart by what stands before it
    for seed in ("seed_0", "seed_1"):
        series = dict(series=tmp_path / seed / "run")
        both |= {f"{seed}/{name}": [row | series for row in rows] for name, rows in models.items()}
    lines = plot_retrieval.draw_trend(plt, both).axes[0].lines
    assert [line.get_label() for line in lines] == ["seed_0", "seed_1"]
    plt.close("all")


def test_depth_is_drawn_where_the_training_length_is_not(tmp_path, library):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from eval import plot_retrieval

    chosen = [cell for cell in cells(library, "depth") if cell.length == 2048]
    (tmp_path / "summary.csv").write_text(R.csv_text(rows_of(oracle(library), library, chosen, 1)))
    rows = [row | dict(train_length=128) for row in plot_retrieval.read_summary(tmp_path)]
    figure = plot_retrieval.draw_depth(plt, dict(far=rows))
    assert not figure.legends and not figure.axes[0].lines
    plt.close("all")


def test_no_two_models_look_alike():
    from eval.plot_retrieval import style

    assert len({(look["color"], look["marker"]) for look in map(style, range(49))}) == 49


def test_names_of_directories_one_of_which_holds_the_other(tmp_path):
    from eval.plot_retrieval import names

    assert names([tmp_path / "run", tmp_path / "run" / "more"]) == ["run", "run/more"]
    assert names([tmp_path / "a" / "retrieval", tmp_path / "b" / "retrieval"]) == ["a", "b"]


@pytest.mark.parametrize("content, part", [(None, "No such file"), (",".join(R.COLUMNS) + "\n", "no rows")])
def test_pictures_need_a_summary(tmp_path, content, part):
    if content:
        (tmp_path / "summary.csv").write_text(content)
    done = subprocess.run([sys.executable, ROOT / "eval/plot_retrieval.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1
    assert part in done.stderr
