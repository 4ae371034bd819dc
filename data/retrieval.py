"""Synthetic retrieval: statements `key -> value` and questions, in token ids alone, and the mixer that writes them over
training text.

    statement   before KEY between VALUE after        link   before KEY linking OTHER_KEY after
    question    before KEY between (or linking)       and the answer follows: VALUE after

Training and evaluation speak this one grammar, and no key, value or template of the one is ever one of the other. A fixed
hash of the token id, whatever the text, puts every token into one of four classes. Keys of evaluation are made of one of
them, its values of another, the words of its templates of the commonest tokens of the two. What training writes is of any
class and of any frequency: which tokens are for keys, which for values and which for templates is drawn anew for every
sequence. Or a model learns to tell from a token which of the three it belongs to, and looks for no others. But each key, value
and template of training has a token that no key, value or template of evaluation has.

Of a key stated more than once, the value is that of its latest statement. The answer to a question about the key of a link
spells the way out: OTHER_KEY between its VALUE after, wherever that key is stated, or over more links OTHER_KEY linking
ANOTHER_KEY and so on. As links have words of their own, what answers a question for a value is never taken for a key; and as
statements end with a word of their own, where an answer ends need not be guessed.

The mixer writes passages too: tokens of a document's own text, any of the vocabulary, that stand in it a second time further
on. Statements alone would teach to copy lists of words; passages teach to copy whatever there is.
"""

import contextlib
import hashlib
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MIN_IDS = 8  # keys and values each need this many tokens to choose from
KEY_CLASS, VALUE_CLASS = 2, 3  # of evaluation, and so are the words of its templates
# (before, between, after) tokens of a template: training draws new words again and again, evaluation has one template of each.
TRAINED_SHAPES = ((1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (2, 1, 1), (1, 2, 1), (3, 1, 2), (2, 3, 2), (1, 3, 1), (0, 4, 1),
                  (1, 4, 2))
EVALUATED_SHAPES = ((1, 1, 1), (2, 0, 1), (2, 2, 1), (0, 3, 2))
COUNT_CHUNK = 1 << 22  # tokens; bincount widens its input to int64, so this bounds memory to 32 MiB
KEY_LENGTHS, VALUE_LENGTHS, PASSAGE_LENGTHS = (2, 5), (2, 12), (8, 64)  # tokens, both ends included
MIN_DISTANCE = 32  # tokens between the starts of any two pieces of a task (more than any but the last has), and between copies
KNOWN_TEMPLATES = 0.5  # share of the tasks that take the template of another of their document: only keys tell those apart
LOOKALIKES = 0.2  # share of the keys that differ in their last token alone from another key of the document
SHORTEST = 2 + KEY_LENGTHS[0] + VALUE_LENGTHS[0]  # tokens of a piece
PLACE_TRIES = 16  # places that are tried for one piece
KEY_TRIES = 16  # draws of a key that is in the sequence nowhere yet
MAX_FAILURES = 1024  # tasks in a row that found no place: the sequence takes no more
# Shares of the common, the middle and the rare ids among the words of keys, values and templates. If no value has a common one,
# those in values are taken for a template's. Keys have none, as a piece touches no key token of the text.
KEY_WORDS, VALUE_WORDS, TEMPLATE_WORDS = (0.0, 0.8, 0.2), (0.1, 0.3, 0.6), (0.6, 0.3, 0.1)
VALUES_OF_TEXT = 0.5  # share of the tasks with keys whose values are words of the text
VALUE_TRIES = 16  # draws of such a value
ECHOES = 0.5  # share of the values with a run of tokens of another of the document: only what stands before tells what follows
ECHO_LENGTHS = (1, 4)  # tokens, at most all but one of the value


class Kind(NamedTuple):
    """What a task with keys writes before its last question: so many values of one key, a chain of so many links to it, and
    so many questions in all."""

    share: float  # of the tasks with keys
    values: int = 1
    links: int = 0
    questions: int = 1


KINDS = {
    "single": Kind(0.50),
    "asked twice": Kind(0.07, questions=2),
    "asked three times": Kind(0.03, questions=3),
    "two values": Kind(0.10, values=2),
    "one link": Kind(0.20, links=1),
    "two links": Kind(0.10, links=2),
}
KIND_EDGES = list(itertools.accumulate(kind.share for kind in KINDS.values()))


def token_classes(ids):
    """Class 0 to 3 of every token id (int array), for good. Any four neighbouring ids 4n to 4n + 3 are of four classes, so that
    the few ids of a byte-level vocabulary are shared out evenly."""
    ids = np.asarray(ids, dtype=np.int64)
    return (ids ^ ((ids >> 2) * 0x9E3779B1 >> 15)) & 3


def count_tokens(tokens):
    """int64 [65536], occurrences of every token id in uint16 tokens, which may be memory-mapped."""
    counts_V = np.zeros(1 << 16, dtype=np.int64)
    for start in range(0, len(tokens), COUNT_CHUNK):
        counts_V += np.bincount(tokens[start : start + COUNT_CHUNK], minlength=1 << 16)
    return counts_V


def _by_frequency(counts_V, delimiter, token_class):
    """The observed ids of a class, the delimiter left out, by falling count (ties by id): (common, middle, rare), int64.

    Of n ids, `middle` are ranks sqrt(n) to n**0.85, at least 8: without the commonest, which every text is full of, and without
    the rare tail, of which a text says little.
    """
    counts_V = np.array(counts_V, dtype=np.int64)
    ids = np.arange(len(counts_V))
    counts_V[(token_classes(ids) != token_class) | (ids == delimiter)] = 0
    ranked = np.argsort(-counts_V, kind="stable")[: np.count_nonzero(counts_V)]
    first = math.isqrt(len(ranked))
    last = max(int(len(ranked) ** 0.85), first + MIN_IDS)
    if last > len(ranked):
        raise ValueError(
            f"the text has {len(ranked)} different tokens of one of the four classes (keys and values, of training and of "
            f"evaluation), too few for {MIN_IDS} of middle frequency; give more text"
        )
    return ranked[:first], ranked[first:last], ranked[last:]


def word_pools(counts_V, delimiter):
    """(key_ids, value_ids) of evaluation, int64, from the token counts [vocabulary] of the text at hand: the tokens of middle
    frequency in its two classes. ValueError when either has fewer than 8 ids."""
    return tuple(_by_frequency(counts_V, delimiter, c)[1] for c in (KEY_CLASS, VALUE_CLASS))


def trained_words(counts_V, delimiter):
    """(common, middle, rare), int64, of all classes. ValueError as for word_pools."""
    return tuple(map(np.concatenate, zip(*(_by_frequency(counts_V, delimiter, c) for c in range(4)), strict=True)))


@dataclass(frozen=True, eq=False)
class Template:
    """The words around a key and behind its value, int64 arrays of 0 to 4 token ids; only one of the first two may be empty.
    `linking` stands for `between` in links; without it, the template has none."""

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    linking: np.ndarray

    @property
    def links(self):
        return len(self.linking) > 0

    def statement(self, key, value, link=False):
        """The tokens that say that `key` has this value; the value of a link is another key."""
        return np.concatenate([self.question(key, link), value, self.after])

    def question(self, key, link=False):
        """The tokens that ask for the value of `key`, or for the key that it is linked to; the answer follows."""
        return np.concatenate([self.before, key, self.linking if link else self.between])

    def way(self, keys):
        """What stands between the question and the value: the keys that the links name, in the order in which they are met."""
        parts = [part for key in keys for part in (key, self.linking)]
        return np.concatenate([*parts[:-1], self.between]) if keys else self.before[:0]


def template_ids(counts_V, delimiter):
    """int64, the tokens of which the templates of evaluation are made: in its classes, too common to be keys or values.

    ValueError as for word_pools.
    """
    return np.concatenate([_by_frequency(counts_V, delimiter, c)[0] for c in (KEY_CLASS, VALUE_CLASS)])


def cut_template(words, shape, linking):
    """The template of these tokens; `shape`: how many before, between and after."""
    before, between, _ = shape
    return Template(words[:before], words[before : before + between], words[before + between :], linking)


def can_link(shape):
    """One key must not run into the other, nor may the key that a link names look like the start of a statement."""
    return min(shape) > 0


LINK_SHAPES = tuple(filter(can_link, TRAINED_SHAPES))


def _draw_linking(draw, words, shape):
    """int64, as many words for links as there are between key and value, from draw(number): none of the template's `words`."""
    drawn = draw(shape[1])
    while set(drawn.tolist()) & set(words.tolist()):
        drawn = draw(shape[1])
    return drawn


def templates(counts_V, delimiter):
    """The templates of evaluation, a function of the ranks of its common tokens alone. ValueError as for word_pools."""
    ids = template_ids(counts_V, delimiter)
    digest = hashlib.sha256(b"templates eval").digest()
    generator = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))  # its stream is the same in every NumPy release

    def draw(length):
        return _draw(generator, ids, length)

    drawn = [draw(sum(shape)) for shape in EVALUATED_SHAPES]
    return [cut_template(words, shape, _draw_linking(draw, words, shape) if can_link(shape) else words[:0])
            for words, shape in zip(drawn, EVALUATED_SHAPES, strict=True)]


def _distinct(token, length):
    """int64 [length], what token() gives, none twice."""
    drawn = []
    while len(drawn) < length:
        if (new := token()) not in drawn:
            drawn.append(new)
    return np.array(drawn, dtype=np.int64)


def _draw(generator, ids, length):
    uniform, n = generator.random, len(ids)
    return _distinct(lambda: ids[int(uniform() * n)], length)


def draw_key(generator, key_ids, length):
    """int64 [length] tokens of key_ids, none twice. `generator` is anything whose random() is uniform in [0, 1)."""
    assert length <= len(key_ids)
    return _draw(generator, key_ids, length)


def draw_value(generator, value_ids, length):
    """int64 [length] tokens of value_ids, none twice; see draw_key."""
    assert length <= len(value_ids)
    return _draw(generator, value_ids, length)


class Task(NamedTuple):
    """Pieces (int64 token ids) and the places in the sequence where they start. The last piece is the last question with its
    answer, and lies behind all others; it asks for the last of the keys. A passage has no key, and its copy for its only piece.
    """

    kind: str
    document: int  # of those that are long enough
    keys: list
    answer: np.ndarray
    starts: list
    pieces: list
    values: list
    template: Template | None = None
    source: int | None = None  # where the text starts that a passage copies, which stays as it is


class Mixer:
    """Writes tasks over a share of the tokens of every training sequence, and among them, over a share of theirs, `passages`.

    What is written is a function of (seed, step, index of the sequence in the global batch, its text): the same for every
    number of processes, and no state is kept between sequences. ValueError when the counted text is too poor.
    """

    def __init__(self, share, passages, seed, counts_V, delimiter):
        self.share, self.passages, self.seed, self.delimiter = share, passages, seed, delimiter
        self.kinds = trained_words(counts_V, delimiter)
        self.class_V = token_classes(np.arange(1 << 16)).astype(np.uint8).tobytes()

    def policy(self) -> str:
        return (
            f"retrieval mix: {self.share:.1%} of the training tokens, {self.passages:.0%} of them in copied passages; "
            f"keys, values and templates of {sum(map(len, self.kinds))} tokens; validation text is left as it is"
        )

    def achieved(self, tokens, length) -> float:
        """The share of the tokens of these sequences of `length`, and one token more, that step 0 writes over; less than asked
        for where documents are too short."""
        sequences = (tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length))
        plans = itertools.chain.from_iterable(self.plan(0, sequence, i) for i, sequence in enumerate(sequences))
        return sum(len(piece) for task in plans for piece in task.pieces) / (len(tokens) - 1)

    def mix(self, step, tokens, sequence):
        """uint16 [T + 1], a copy of `tokens` (the inputs and, one on, the targets of a sequence) with the tasks in it.

        Delimiters stay, and so do the first and the last token, which the neighbouring sequences share.
        """
        mixed = np.array(tokens)
        for task in self.plan(step, tokens, sequence):
            for start, piece in zip(task.starts, task.pieces, strict=True):
                mixed[start : start + len(piece)] = piece
        return mixed

    def plan(self, step, tokens, sequence) -> list[Task]:
        """The tasks that `mix` writes."""
        return self.draft(step, tokens, sequence).tasks

    def draft(self, step, tokens, sequence):
        """The same, with the words that they are made of."""
        draft = _Draft(self, tokens, f"retrieval mix {self.seed} {step} {sequence}")
        size = self.share * (len(tokens) - 1)
        left = draft.fill(self.passages * size, draft.passage)  # first: they need the most room, half of it natural text
        draft.fill((1 - self.passages) * size + left, draft.task)
        return draft


class MixerProcess:
    """A mixer in a process of its own, as a thread would hold up the one that launches kernels. The process ends when its
    standard input closes, however the other one ends. Only one thread may use it at a time."""

    def __init__(self, mixer: Mixer):
        paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        safe = dict(PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")  # not the `data` of a working directory
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as r; r.serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | safe, start_new_session=True)  # signals are for the other one
        self.send(mixer)

    def send(self, message) -> None:
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def mix(self, step, tokens, sequence):
        """As Mixer.mix; RuntimeError if the process has ended."""
        try:
            self.send((step, np.array(tokens), sequence))
            return pickle.load(self.process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):  # the last where it was killed while it wrote
            raise RuntimeError(f"the process that writes the retrieval mix has ended ({self.process.wait()})") from None

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    """The other end of a MixerProcess."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        mixer = pickle.load(sys.stdin.buffer)
        while True:
            pickle.dump(mixer.mix(*pickle.load(sys.stdin.buffer)), sys.stdout.buffer)
            sys.stdout.buffer.flush()


class _Pool:
    """Ids for one role in a sequence: of each kind that there are, in these shares."""

    def __init__(self, kinds, shares):
        kept = [(ids, share) for ids, share in zip(kinds, shares, strict=True) if len(ids) and share]
        self.kinds, shares = zip(*kept, strict=True)
        self.edges = list(itertools.accumulate(shares))

    def ids(self):
        return np.concatenate(self.kinds)

    def __len__(self):
        return sum(map(len, self.kinds))


class _Draft:
    """The tasks of one sequence while they are drawn.

    A key occurs in the sequence in the pieces of its task and nowhere else: no key is part of another, the text and so its
    copies hold none, and as no piece touches a key token of the text or another piece, none comes about at its ends.
    """

    def __init__(self, mixer, tokens, name):
        self.mixer, self.tokens, self.tasks = mixer, tokens, []
        seed = hashlib.sha256(name.encode()).digest()
        self.random = random.Random(int.from_bytes(seed, "little")).random  # this stream is the same in every release
        last = len(tokens) - 1
        bounds = [0, *(np.flatnonzero(tokens[1:last] == mixer.delimiter) + 1).tolist(), last]
        self.documents = [(a + 1, b) for a, b in itertools.pairwise(bounds) if b - a - 1 > MIN_DISTANCE]
        self.rooms = list(itertools.accumulate(end - begin - MIN_DISTANCE for begin, end in self.documents))
        self.taken = bytearray(len(tokens))  # by pieces, and by the text that passages copy
        while True:  # of few ids, a role may be dealt none but those of evaluation's classes
            keys, values, words = zip(*map(self.deal, mixer.kinds), strict=True)
            self.key_ids, self.value_ids = _Pool(keys, KEY_WORDS), _Pool(values, VALUE_WORDS)
            self.template_ids = _Pool(words, TEMPLATE_WORDS)
            if (self.apart(self.key_ids.ids(), (KEY_CLASS,)) and self.apart(self.value_ids.ids(), (VALUE_CLASS,))
                    and self.apart(self.template_ids.ids(), (KEY_CLASS, VALUE_CLASS))):
                break
        is_key_V = np.zeros(1 << 16, dtype=bool)
        is_key_V[self.key_ids.ids()] = True
        self.key_T = is_key_V[tokens].tobytes()
        self.barred_T = (is_key_V[tokens] | (tokens == mixer.delimiter)).tobytes()  # from values of the text
        pairs = np.flatnonzero(is_key_V[tokens[:-1]] & is_key_V[tokens[1:]])
        self.text_pairs = set(zip(tokens[pairs].tolist(), tokens[pairs + 1].tolist(), strict=True))
        self.keys, self.key_parts = set(), set()
        self.neighbours = [[] for _ in self.documents]  # keys in each
        self.templates = [[] for _ in self.documents]
        self.values = [[] for _ in self.documents]

    def deal(self, ids):
        """An eighth, three eighths and half of the ids, dealt out anew: by an affine permutation, faster than a shuffle."""
        n = max(len(ids), 1)
        factor = self.below(n)
        while math.gcd(factor, n) != 1:
            factor = self.below(n)
        place = (np.arange(len(ids)) * factor + self.below(n)) % n * 8
        return ids[place < n], ids[(place >= n) & (place < 4 * n)], ids[place >= 4 * n]

    def below(self, n):
        """A whole number, uniform in [0, n)."""
        return int(self.random() * n)

    def draw(self, pool, length):
        """int64 [length] tokens of a pool, none twice."""
        def token():
            ids = pool.kinds[bisect_right(pool.edges, self.random() * pool.edges[-1])]
            return int(ids[self.below(len(ids))])

        return _distinct(token, length)

    def between(self, ends):
        return ends[0] + self.below(ends[1] - ends[0] + 1)

    def log_uniform(self, first, last):
        """A whole number in [first, last], every octave as likely."""
        return min(int(first * ((last + 1) / first) ** self.random()), last)  # rounding

    def fill(self, left, draw):
        """Accepts tasks from `draw` for `left` tokens: on average, as the last may exceed them or be left out. Returns how many
        tokens found no place."""
        failures = 0
        while left > 0:
            task = draw()
            if task is None:
                failures += 1
                if failures == MAX_FAILURES:
                    return left
                continue
            size, failures = sum(map(len, task.pieces)), 0
            if size > left and self.random() * size >= left:
                break
            self.accept(task)
            left -= size
        return 0

    def place(self):
        """(document, begin, end, place) of a last piece in the text of its document, or None."""
        if not self.rooms:
            return None
        place = self.below(self.rooms[-1])
        document = bisect_right(self.rooms, place)
        begin, end = self.documents[document]
        place = end - (self.rooms[document] - place)
        if self.key_T[place - 1] or self.taken.find(1, place - 1, place + SHORTEST + 1) >= 0:  # most attempts end here
            return None
        return document, begin, end, place

    def passage(self) -> Task | None:
        """A passage whose copy fits beside the tasks accepted, or None."""
        if (found := self.place()) is None:
            return None
        document, begin, end, start = found
        length = self.log_uniform(*PASSAGE_LENGTHS)
        nearest, longest = length + MIN_DISTANCE, start - begin
        if nearest > longest or start + length > end or not self.free(start, length):
            return None
        for _ in range(PLACE_TRIES):
            source = start - self.log_uniform(nearest, longest)
            if self.taken.find(1, source, source + length) < 0:
                copy = self.tokens[source : source + length].astype(np.int64)
                return Task("passage", document, [], copy, [start], [copy], [], source=source)
        return None

    def task(self) -> Task | None:
        """A task with keys that fits beside those accepted, or None."""
        if (found := self.place()) is None:
            return None
        document, begin, end, question = found
        name = list(KINDS)[bisect_right(KIND_EDGES, self.random() * KIND_EDGES[-1])]
        template = self.template(KINDS[name], self.templates[document])
        keys, values, answer, pieces = self.pieces(KINDS[name], template, document)
        if not keys or question + len(pieces[-1]) > end or not self.free(question, len(pieces[-1])):
            return None
        starts = self.places(pieces[:-1], question, question - begin)
        if not starts:
            return None
        stated = len(values)  # statements of one key, all of one length: the latest in the text is to be the last
        starts = sorted(starts[:stated]) + starts[stated:] + [question]
        return Task(name, document, keys, answer, starts, pieces, values, template)

    def template(self, kind, known):
        """One of those known or a new one."""
        known = [t for t in known if t.links] if kind.links else known
        if known and self.random() < KNOWN_TEMPLATES:
            return known[self.below(len(known))]
        shapes = LINK_SHAPES if kind.links else TRAINED_SHAPES
        shape = shapes[self.below(len(shapes))]
        words = self.words(self.template_ids, sum(shape), (KEY_CLASS, VALUE_CLASS))
        if not kind.links:
            return cut_template(words, shape, words[:0])
        while True:  # the words of a link as well are not all of evaluation's classes
            template = cut_template(words, shape, _draw_linking(lambda n: self.draw(self.template_ids, n), words, shape))
            if self.apart(template.statement(words[:0], words[:0], link=True), (KEY_CLASS, VALUE_CLASS)):
                return template

    def pieces(self, kind, template, document):
        """(keys, values, answer, pieces) of a task that has no place yet; no keys when they cannot be told from others."""
        keys = [self.key(self.neighbours[document]) for _ in range(1 + kind.links)]
        if any(key is None for key in keys):
            return [], [], None, []
        length = min(self.between(VALUE_LENGTHS), len(self.value_ids))
        values, of_text = {}, self.random() < VALUES_OF_TEXT
        while len(values) < kind.values:
            value = self.value_of_text(length, template) if of_text else self.words(self.value_ids, length, (VALUE_CLASS,))
            value = self.echo(value, template, self.values[document])
            values[value.tobytes()] = value
        values = list(values.values())
        statements = [template.statement(keys[0], value) for value in values]
        links = [template.statement(key, known, link=True) for known, key in itertools.pairwise(keys)]
        answer = np.concatenate([template.way(keys[-2::-1]), values[-1]])
        asked = np.concatenate([template.question(keys[-1], link=kind.links > 0), answer, template.after])
        return keys, values, answer, statements + links + [asked] * kind.questions

    def words(self, pool, length, evaluated):
        """int64 [length] tokens of a pool, none twice and not all of them of the classes `evaluated`."""
        while True:  # some of the pool's ids are of other classes
            words = self.draw(pool, length)
            if self.apart(words, evaluated):
                return words

    def apart(self, words, evaluated):
        """Whether one of the tokens is of none of the classes `evaluated`."""
        return any(self.mixer.class_V[word] not in evaluated for word in words)

    def key(self, neighbours):
        """A key that is nowhere in the sequence, now and then one that differs from a neighbour in its last token alone."""
        for _ in range(KEY_TRIES):
            if neighbours and self.random() < LOOKALIKES:
                key = neighbours[self.below(len(neighbours))].copy()
                key[-1] = self.draw(self.key_ids, 1)[0]
                if key[-1] in key[:-1] or not self.apart(key, (KEY_CLASS,)):
                    continue
            else:
                key = self.words(self.key_ids, min(self.between(KEY_LENGTHS), len(self.key_ids)), (KEY_CLASS,))
            tokens = tuple(key.tolist())
            parts = {tokens[i:j] for i, j in itertools.combinations(range(len(tokens) + 1), 2) if j - i > 1}
            in_text = self.text_pairs.issuperset(itertools.pairwise(tokens))  # perhaps: all its pairs are
            if tokens not in self.key_parts and self.keys.isdisjoint(parts) and not in_text:
                self.keys.add(tokens)
                self.key_parts |= parts
                return key
        return None

    def value_of_text(self, length, template):
        """int64 [length] tokens of the text, none twice and none a key's or the end of the statement, not all of them of
        evaluation's class; where the text is too poor for that, others."""
        for _ in range(VALUE_TRIES):
            places = [self.below(len(self.tokens)) for _ in range(length)]
            if any(self.barred_T[place] for place in places):
                continue
            value = self.tokens[places].tolist()
            if len(set(value)) == length and template.after[0] not in value and self.apart(value, (VALUE_CLASS,)):
                return np.array(value, dtype=np.int64)
        return self.words(self.value_ids, length, (VALUE_CLASS,))

    def echo(self, value, template, known):
        """The value, now and then with a run of one of those known in the place of as many of its tokens."""
        if not known or self.random() >= ECHOES:
            return value
        other = known[self.below(len(known))]
        length = min(self.between(ECHO_LENGTHS), len(other), len(value) - 1)
        start, source = self.below(len(value) - length + 1), self.below(len(other) - length + 1)
        echo = np.concatenate([value[:start], other[source : source + length], value[start + length :]])
        fits = len(set(echo.tolist())) == len(echo) and template.after[0] not in echo and self.apart(echo, (VALUE_CLASS,))
        return echo if fits else value

    def places(self, pieces, question, longest):
        """Starts of the pieces, each at a log-uniform distance of up to `longest` before the question; [] if one has none."""
        starts = []
        for piece in pieces:
            for _ in range(PLACE_TRIES):
                start = question - self.log_uniform(MIN_DISTANCE, longest)
                apart = all(abs(start - other) >= MIN_DISTANCE for other in starts)
                if apart and self.free(start, len(piece)):
                    break
            else:
                return []
            starts.append(start)
        return starts

    def free(self, start, length):
        """Whether a piece may lie there: on no other piece and next to none, nor to a key token of the text."""
        end = start + length
        return not self.key_T[start - 1] and not self.key_T[end] and self.taken.find(1, start - 1, end + 1) < 0

    def accept(self, task):
        self.tasks.append(task)
        for start, piece in zip(task.starts, task.pieces, strict=True):
            self.take(start, len(piece))
        if task.template is None:
            self.take(task.source, len(task.answer))
        else:
            self.templates[task.document].append(task.template)
            self.values[task.document].extend(task.values)
        self.neighbours[task.document].extend(task.keys)

    def take(self, start, length):
        self.taken[start : start + length] = b"\1" * length
