"""Needle retrieval in held-out text: can the model copy a value that it saw `distance` tokens ago?

A sample of `seq_len` tokens is a slice of one held-out document, over which two copies of the same needle are written:

    delimiter  text ...  ANCHOR VALUE  ... text ...  ANCHOR VALUE
                                ^------- distance -------^ answer_start

The last VALUE is scored. Anchor and value tokens come from disjoint sets of mid-frequency tokens, and training never writes
a key or value of such tokens alone (data/retrieval.py). The anchor occurs nowhere else, so nothing but the first copy tells
the answer. One forward pass scores it: every answer token being the argmax under teacher forcing is the same event as greedy
decoding giving the whole value.

The model stays outside: `evaluate_needles` is given a function that scores one sequence.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.retrieval import count_tokens, word_pools
from data.shards import check_tokens, document_spans, open_shard

MAX_DRAWS = 1000  # attempts at an anchor that the haystack does not hold already


def wilson_interval(successes, n, z=1.959964):
    """Wilson score interval (low, high) of a proportion; (0, 1) when n = 0. ValueError unless 0 <= successes <= n."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: need 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the exact bounds are 0 and 1; rounding would leave them a little off.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def chance_level(value_count, value_len):
    """Best accuracy without the needle, by a guesser who knows the value set and that no token repeats in a value."""
    per_token = [1 / (value_count - seen) for seen in range(value_len)]
    return {"token_accuracy": sum(per_token) / value_len, "exact_match": math.prod(per_token)}


def check_needle_shape(seq_len, distances, anchor_len, value_len):
    """List of problems (str) with the lengths of a needle evaluation, all in tokens; empty when they fit together."""
    sizes = {"NEEDLE_SEQ_LEN": seq_len, "NEEDLE_ANCHOR_LEN": anchor_len, "NEEDLE_VALUE_LEN": value_len}
    problems = [f"{name} must be positive, got {size}" for name, size in sizes.items() if size < 1]
    if not distances:
        problems.append("NEEDLE_DISTANCES is empty; give at least one distance")
    if repeated := sorted({d for d in distances if list(distances).count(d) > 1}):
        problems.append(f"NEEDLE_DISTANCES repeats {', '.join(map(str, repeated))}")
    shortest = anchor_len + value_len  # the needle ends where the question begins
    longest = seq_len - 1 - anchor_len - value_len  # delimiter, anchor of the needle; value of the answer
    for distance in dict.fromkeys(distances):
        if distance < 1:
            problems.append(f"NEEDLE_DISTANCES must be positive, got {distance}")
        elif distance < shortest:
            problems.append(f"NEEDLE_DISTANCES: {distance} is less than anchor + value = {shortest} tokens")
        elif distance > longest:
            problems.append(
                f"NEEDLE_DISTANCES: {distance} does not fit NEEDLE_SEQ_LEN={seq_len}, at most {longest} does"
            )
    return problems


class Haystack:
    """Held-out shards seen as documents. Tokens stay memory-mapped; only counts and document bounds are held.

    counts_V: int64, occurrences of every token id. documents_N3: int64 rows (shard, start, end) of document text, the
    delimiter left out. ValueError from a malformed shard, from a token outside the vocabulary, or from text too poor for
    anchors and values; `option` is where more can be given.
    """

    def __init__(self, paths, delimiter, vocab_size, option="NEEDLE_FILES"):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise ValueError(f"needle: no held-out shards; set {option}")
        self.delimiter = delimiter
        self.shards = [open_shard(path) for path in self.paths]
        self.counts_V = sum(map(count_tokens, self.shards))
        if self.counts_V[vocab_size:].any():  # read again for the place of the first one
            for path, tokens in zip(self.paths, self.shards, strict=True):
                check_tokens(path, tokens, vocab_size)
        self.documents_N3 = np.concatenate([_document_texts(i, t, delimiter) for i, t in enumerate(self.shards)])
        try:
            self.anchor_ids, self.value_ids = word_pools(self.counts_V, delimiter)
        except ValueError as error:
            raise ValueError(f"needle: {error}, by {option}") from None

    def documents(self, length):
        """Rows of documents_N3 whose text has at least `length` tokens."""
        return self.documents_N3[self.documents_N3[:, 2] - self.documents_N3[:, 1] >= length]

    def require(self, seq_len, anchor_len, value_len):
        """ValueError, with its mend, unless some document and the token sets are large enough for such samples."""
        if len(self.documents(seq_len - 1)) == 0:
            lengths = self.documents_N3[:, 2] - self.documents_N3[:, 1]
            longest = int(np.argmax(lengths))
            path, most = self.paths[self.documents_N3[longest, 0]], lengths[longest] + 1
            raise ValueError(
                f"needle: no held-out document fills NEEDLE_SEQ_LEN={seq_len}; the longest, in {path}, gives {most} tokens: "
                "set a smaller NEEDLE_SEQ_LEN, or NEEDLE_FILES with longer documents"
            )
        for name, length, ids in (("ANCHOR", anchor_len, self.anchor_ids), ("VALUE", value_len, self.value_ids)):
            if length > len(ids):
                raise ValueError(
                    f"needle: NEEDLE_{name}_LEN={length} needs as many different tokens, the held-out text offers {len(ids)}: "
                    f"set a smaller NEEDLE_{name}_LEN, or NEEDLE_FILES with more text"
                )


def _document_texts(shard, tokens, delimiter):
    """int64 [documents, 3] rows (shard, start, end), without the delimiter that opens a document."""
    spans = document_spans(tokens, delimiter)
    starts = spans[:, 0] + (tokens[spans[:, 0]] == delimiter)  # a shard cut in mid-document opens with plain text
    return np.stack([np.full(len(spans), shard), starts, spans[:, 1]], axis=1)


@dataclass(frozen=True, eq=False)
class Needle:
    """What a sample holds whatever its distance: text [seq_len - 1] of one document, anchor and value token ids."""

    text: np.ndarray
    anchor: np.ndarray
    value: np.ndarray
    index: int


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """tokens_T: int64 [seq_len]; the tokens from answer_start to the end are scored."""

    tokens_T: np.ndarray
    answer_start: int
    distance: int
    index: int


def generator(*key):
    """Generator that depends on nothing but its key. RandomState: NumPy keeps that stream the same in every release."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def occurrences(tokens, pattern):
    """Every start at which `pattern` lies in `tokens`."""
    starts = np.flatnonzero(tokens[: len(tokens) - len(pattern) + 1] == pattern[0])
    for offset in range(1, len(pattern)):
        starts = starts[tokens[starts + offset] == pattern[offset]]
    return starts


def draw_needle(haystack, *, seq_len, index, anchor_len, value_len, seed):
    """Needle `index`: the same for every distance, so that distances are compared on the same text and needles.

    Every long enough document is equally likely, so that one huge document does not crowd out the others. ValueError
    when no drawn anchor is absent from the text.
    """
    place = generator("needle text", seq_len, index, seed)
    documents = haystack.documents(seq_len - 1)
    shard, start, end = map(int, documents[place.randint(len(documents), dtype=np.int64)])
    start += int(place.randint(end - start - (seq_len - 1) + 1, dtype=np.int64))
    text = haystack.shards[shard][start : start + seq_len - 1]
    draw = generator("needle tokens", seq_len, index, seed)
    value = draw.choice(haystack.value_ids, value_len, replace=False)
    # Anchor tokens differ among themselves and from value tokens, so an anchor absent from the text is absent from the
    # finished sample too, but for its two copies.
    for _ in range(MAX_DRAWS):
        anchor = draw.choice(haystack.anchor_ids, anchor_len, replace=False)
        if len(occurrences(text, anchor)) == 0:
            return Needle(text, anchor, value, index)
    raise ValueError(
        f"needle: {MAX_DRAWS} anchors of {anchor_len} tokens all occur in the held-out text of {seq_len} tokens; "
        "set a larger NEEDLE_ANCHOR_LEN"
    )


def draw_needles(haystack, *, samples, **shape):
    """Needles 0 to samples - 1; `shape` as for draw_needle. ValueError when the held-out text cannot serve them, so that
    a check before training can find it out."""
    haystack.require(shape["seq_len"], shape["anchor_len"], shape["value_len"])
    return [draw_needle(haystack, index=index, **shape) for index in range(samples)]


def place_needle(needle, delimiter, distance):
    """NeedleSample with the needle's first value token `distance` tokens before the first scored token."""
    tokens_T = np.concatenate([[delimiter], needle.text]).astype(np.int64)
    copy = np.concatenate([needle.anchor, needle.value])
    answer_start = len(tokens_T) - len(needle.value)
    question_start = answer_start - len(needle.anchor)
    tokens_T[question_start:] = copy
    tokens_T[question_start - distance : question_start - distance + len(copy)] = copy
    return NeedleSample(tokens_T, answer_start, distance, needle.index)


def build_sample(haystack, *, seq_len, distance, index, anchor_len, value_len, seed):
    """NeedleSample `index` at `distance`; a function of its arguments and the held-out text alone.

    ValueError when the lengths do not fit together or the held-out text cannot serve them.
    """
    if problems := check_needle_shape(seq_len, [distance], anchor_len, value_len):
        raise ValueError("needle: " + "; ".join(problems))
    haystack.require(seq_len, anchor_len, value_len)
    needle = draw_needle(haystack, seq_len=seq_len, index=index, anchor_len=anchor_len, value_len=value_len, seed=seed)
    return place_needle(needle, haystack.delimiter, distance)


def _summarise(distance, results_S3):
    """One row of the blob from (mean nats, token accuracy, exact match) of each sample at this distance."""
    n = len(results_S3)
    loss, accuracy, exact = results_S3.mean(axis=0).tolist()
    low, high = wilson_interval(int(results_S3[:, 2].sum()), n)
    return {
        "distance": distance,
        "n": n,
        "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity and no NaN
        "perplexity": math.exp(loss) if loss < math.log(np.finfo(np.float64).max) else None,
        "token_accuracy": accuracy,
        "exact_match": exact,
        "exact_match_low": low,
        "exact_match_high": high,
    }


def evaluate_needles(
    score_answer,
    haystack,
    *,
    seq_len,
    distances,
    samples_per_distance,
    anchor_len,
    value_len,
    seed,
    step,
    rank=0,
    world_size=1,
    reduce=None,
):
    """The NEEDLE_EVAL blob (dict, JSON-ready, the same on every rank and for every world size).

    score_answer(tokens_T, answer_start) -> (nats [value_len], correct bool [value_len]) scores tokens_T[answer_start:]
    under teacher forcing. reduce(array) -> the float64 array summed over ranks; None for one process. Losses are nats
    a token; the interval is Wilson's 95%. loss and perplexity are None where they are not finite numbers. ValueError,
    on every rank alike and before anything is scored, when the lengths or the held-out text do not serve.
    """
    problems = check_needle_shape(seq_len, distances, anchor_len, value_len)
    if samples_per_distance < 1:
        problems.append(f"NEEDLE_SAMPLES_PER_DISTANCE must be positive, got {samples_per_distance}")
    if problems:
        raise ValueError("needle: " + "; ".join(problems))
    # Every rank draws every needle: cheap (text is a view), and a bad draw stops all ranks rather than leaving some
    # waiting for the others in reduce.
    shape = {"seq_len": seq_len, "anchor_len": anchor_len, "value_len": value_len, "seed": seed}
    needles = draw_needles(haystack, samples=samples_per_distance, **shape)
    # A cell is written by one rank and zero on the others: the sum is exact whatever the world size.
    results_DS3 = np.zeros((len(distances), samples_per_distance, 3))
    for item in range(rank, len(distances) * samples_per_distance, world_size):
        row, index = divmod(item, samples_per_distance)
        sample = place_needle(needles[index], haystack.delimiter, distances[row])
        nats, correct = score_answer(sample.tokens_T, sample.answer_start)
        assert np.shape(nats) == np.shape(correct) == (value_len,)
        results_DS3[row, index] = np.mean(nats, dtype=np.float64), np.mean(correct), np.all(correct)
    if reduce is not None:
        results_DS3 = reduce(results_DS3)
    return {
        "tag": "NEEDLE_EVAL",
        "step": step,
        **shape,
        "chance": chance_level(len(haystack.value_ids), value_len),
        "distances": [_summarise(*cell) for cell in zip(distances, results_DS3, strict=True)],
    }
