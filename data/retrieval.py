"""Synthetic retrieval: statements `key -> value` and questions, in token ids alone, and the mixer that writes them over
training text.

    statement   before KEY between VALUE         link   before KEY between OTHER_KEY
    question    before KEY between               and the answer VALUE follows

Training and evaluation speak this one grammar with nothing in common but its form. A fixed hash of the token id, whatever
the text, puts every token into one of four classes: keys and values of training, keys and values of evaluation. The tokens of
templates come from the same classes, so templates are disjoint too.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

MIN_IDS = 8  # keys and values each need this many tokens to choose from
CLASSES = {"train": (0, 1), "eval": (2, 3)}  # keys, values
# (before, between) tokens of every template. Where `between` is empty a link would run one key into another.
TEMPLATE_SHAPES = {
    "train": ((1, 0), (0, 1), (1, 1), (0, 2), (2, 1), (1, 2), (3, 1), (2, 3)),
    "eval": ((1, 1), (2, 0), (2, 2), (0, 3)),
}


def token_classes(ids):
    """Class 0 to 3 of every token id (int array), for good. Any four neighbouring ids 4n to 4n + 3 are of four classes, so that
    the few ids of a byte-level vocabulary are shared out evenly."""
    ids = np.asarray(ids, dtype=np.int64)
    return (ids ^ ((ids >> 2) * 0x9E3779B1 >> 15)) & 3


def _by_frequency(counts_V, delimiter, token_class):
    """The observed ids of a class, the delimiter left out, by falling count (ties by id): (common, middle), int64.

    Of n ids, `middle` are ranks sqrt(n) to n**0.85: without the commonest, which every text is full of, and without the rare
    tail, whose embeddings are hardly trained.
    """
    counts_V = np.array(counts_V, dtype=np.int64)
    ids = np.arange(len(counts_V))
    counts_V[(token_classes(ids) != token_class) | (ids == delimiter)] = 0
    ranked = np.argsort(-counts_V, kind="stable")[: np.count_nonzero(counts_V)]
    first, last = math.isqrt(len(ranked)), int(len(ranked) ** 0.85)
    if last - first < MIN_IDS:
        raise ValueError(
            f"retrieval: the text has {len(ranked)} different tokens of one of the four classes (keys and values, of training "
            f"and of evaluation), too few for {MIN_IDS} of middle frequency; give more text"
        )
    return ranked[:first], ranked[first:last]


def word_pools(counts_V, delimiter, part):
    """(key_ids, value_ids), int64, for `part` "train" or "eval", from the token counts [vocabulary] of the text at hand.

    The tokens of middle frequency in the part's two classes: keys and values of both parts are disjoint, even when they are
    given the counts of different texts. ValueError when either has fewer than 8 ids.
    """
    keys, values = (_by_frequency(counts_V, delimiter, c)[1] for c in CLASSES[part])
    return keys, values


@dataclass(frozen=True, eq=False)
class Template:
    """The words around a key, int64 arrays of 0 to 3 token ids; not both are empty."""

    before: np.ndarray
    between: np.ndarray

    def statement(self, key, value):
        """The tokens that say that `key` has this value; the value of a link is another key."""
        return np.concatenate([self.before, key, self.between, value])

    def question(self, key):
        """The tokens that ask for the value of `key`; the answer follows."""
        return np.concatenate([self.before, key, self.between])


def templates(counts_V, delimiter, part):
    """Templates of `part`, of tokens in its classes that are too common to be keys or values; none is in both parts.

    A function of the ranks of the common tokens alone. ValueError as for word_pools.
    """
    common = np.concatenate([_by_frequency(counts_V, delimiter, c)[0] for c in CLASSES[part]])
    digest = hashlib.sha256(f"templates {part}".encode()).digest()
    generator = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))  # its stream is the same in every NumPy release
    shapes = TEMPLATE_SHAPES[part]
    words = [_draw(generator, common, before + between) for before, between in shapes]
    return [Template(w[:before], w[before:]) for w, (before, between) in zip(words, shapes, strict=True)]


def _draw(generator, ids, length):
    drawn = {}  # in order
    while len(drawn) < length:
        drawn[int(ids[int(generator.random() * len(ids))])] = None
    return np.array(list(drawn), dtype=np.int64)


def draw_key(generator, key_ids, length):
    """int64 [length] tokens of key_ids, none twice. `generator` is anything whose random() is uniform in [0, 1)."""
    assert length <= len(key_ids)
    return _draw(generator, key_ids, length)


def draw_value(generator, value_ids, length):
    """int64 [length] tokens of value_ids, none twice; see draw_key."""
    assert length <= len(value_ids)
    return _draw(generator, value_ids, length)
