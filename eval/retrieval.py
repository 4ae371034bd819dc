"""Retrieval evaluation of a checkpoint on held-out text, forward only.

    python eval/retrieval.py logs/run/state_step002000.pt --text 'data/held_out_*.bin' --out logs/run/retrieval
    torchrun --standalone --nproc_per_node=4 eval/retrieval.py ...                # the same samples, dealt out
    python eval/retrieval.py ... --tasks single,gain --lengths 8192,1048576 --samples 100

DIR/samples.jsonl gets a line a sample as it goes; a command repeated, or given more tasks, lengths or samples, skips those that
are there. DIR/summary.csv has a row for every cell of all of them, DIR/run.json says what was evaluated and how;
eval/plot_retrieval.py draws the CSV. SPEC.md defines every task and column.

Tasks: single (one needle, by distance), depth (one needle, by depth), multikey, multivalue, tracking, mqar, dense, and gain
(what more context of the same book is worth). The statements are those of data/retrieval.py, of the part that training never
sees.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import scoped_medium as scope
from data import shards
from data.retrieval import draw_key, draw_value, templates
from eval.needle import Haystack, chance_level, generator, occurrences, wilson_interval
from lifecycle import (
    WEIGHT_KEYS,
    LineFile,
    Stop,
    all_ranks,
    check_place,
    exit_at_once,
    lock_directory,
    parse_lines,
    read_checkpoint,
    set_up_device,
    world,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "scoped_medium.py", *sorted((ROOT / "model").glob("*.py")), ROOT / "data" / "shards.py",  # what makes and scores
        ROOT / "data" / "retrieval.py", ROOT / "eval" / "needle.py", ROOT / "eval" / "retrieval.py"]  # samples
TASKS = ("single", "depth", "multikey", "multivalue", "tracking", "mqar", "dense", "gain")
SHORTEST_DISTANCE, DISTANCE_FACTOR = 128, 4  # lowest edge of the distance bins and ratio of one edge to the next, tokens
DISTRACTORS = (3, 15)
STATED_VALUES = (2, 4)  # statements of the one key of multivalue
HOPS = (1, 2, 4)
PAIRS = {"mqar": 16, "dense": 64}
TAILS = (128, 4096)  # scored tokens at the end of a sequence: few numbers, as each is a compiled graph
GAP = 8  # least tokens of text behind a statement: in training statements do not touch either
MAX_DRAWS = 1000  # attempts at keys that the text does not hold already
RANK_TIMEOUT = 7200  # seconds that a process waits for the others, which may have a million-token sample more to do
COLUMNS = ("task", "variant", "length", "low", "high", "n", "contexts", "texts", "stitched", "exact_match", "exact_match_low",
           "exact_match_high", "first_token_accuracy", "token_accuracy", "nats", "retrieval_gain", "retrieval_gain_n", "chance",
           "needle_read", "context_gain", "context_gain_se", "train_length", "tokens_seen")

# ---------------------------------------------------------------------------------------------------------------------
# What is asked


@dataclass(frozen=True)
class Settings:
    """What a command asks for. Lengths, distances and contexts are tokens."""

    tasks: tuple = TASKS
    lengths: tuple = (8192, 65536, 131072)
    samples: int = 100
    swaps: int = 100  # samples of a cell that are also scored with their needle's value exchanged
    seed: int = 0
    key_length: int = 4
    value_length: int = 8
    depth_bins: int = 10
    contexts: tuple = (1024, 4096, 16384, 65536, 262144, 1048576)
    base_context: int = 4096
    targets: int = 4096

    def problems(self) -> list[str]:
        """What cannot be evaluated, each as one line."""
        found = [f"--tasks: {task} is none of {', '.join(TASKS)}" for task in self.tasks if task not in TASKS]
        for name, low in (("samples", 1), ("swaps", 0), ("seed", 0), ("key_length", 1), ("value_length", 1), ("depth_bins", 1),
                          ("targets", 1)):
            if getattr(self, name) < low:
                found.append(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        for name, length in [("lengths", n) for n in self.lengths] + [("contexts", n) for n in self.contexts]:
            if length % scope.BLOCK or length <= SHORTEST_DISTANCE:
                found.append(f"--{name}: {length} is not a multiple of {scope.BLOCK} above {SHORTEST_DISTANCE}")
        if self.depth_bins > 1000:
            found.append(f"--depth-bins must be at most 1000, got {self.depth_bins}")
        if self.targets % scope.BLOCK:
            found.append(f"--targets: {self.targets} is not a multiple of {scope.BLOCK}")
        for name in ("tasks", "lengths", "contexts"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                found.append(f"--{name} repeats itself")
        if self.base_context not in self.contexts:
            found.append(f"--base-context: {self.base_context} is not one of --contexts")
        return found


@dataclass(frozen=True)
class Cell:
    """Samples that share a row of the summary. low and high: bounds of the distance or of the depth, or a number of the task's.

    `length` is that of the sequence; for gain it is the longest context with which the targets are scored.
    """

    task: str
    variant: str
    length: int
    low: float
    high: float


def distance_edges(length: int) -> list[int]:
    """Edges of the distance bins: the same ones for every length, the last cut at it."""
    edges = [SHORTEST_DISTANCE]
    while edges[-1] * DISTANCE_FACTOR < length:
        edges.append(edges[-1] * DISTANCE_FACTOR)
    return edges + [length]


def task_cells(task: str, length: int, settings: Settings) -> list[Cell]:
    """The cells of a task other than gain at one length."""

    def counted(numbers, noun):
        return [Cell(task, f"{n} {noun}{'s' if n > 1 else ''}", length, n, n) for n in numbers]

    match task:
        case "single":
            edges = distance_edges(length)
            return [Cell(task, f"{low}-{high}", length, low, high) for low, high in zip(edges, edges[1:], strict=False)]
        case "depth":
            edges = [i / settings.depth_bins for i in range(settings.depth_bins + 1)]
            return [Cell(task, f"{low:.3g}-{high:.3g}", length, low, high) for low, high in zip(edges, edges[1:], strict=False)]
        case "multikey":
            return counted(DISTRACTORS, "distractor")
        case "multivalue":
            return counted(STATED_VALUES, "value")
        case "tracking":
            return counted(HOPS, "hop")
        case _:
            return counted([PAIRS[task]], "needle")


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@dataclass(frozen=True, eq=False)
class Sample:
    """A sequence and what of it is scored: `size` tokens from every position of `answers`.

    tokens_T: int64 [T]. swapped_T: the same with other values for the needles asked for; None where there are none.
    distances: from a needle's first value token to that of its value in the answer, which the answer ends with. text: the
    document, by name and first token.
    """

    tokens_T: np.ndarray
    answers: list[int]
    size: int
    text: str
    stitched: bool
    swapped_T: np.ndarray | None = None
    distances: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Statement:
    template: object
    key: np.ndarray
    value: np.ndarray
    link: bool = False

    @property
    def tokens(self) -> np.ndarray:
        return self.template.statement(self.key, self.value, self.link)

    @property
    def question(self) -> np.ndarray:
        """Also the part of the statement before its value."""
        return self.template.question(self.key, self.link)


def draw_row(draw, rows) -> list[int]:
    """One of the rows, each being equally likely."""
    return rows[draw.randint(len(rows))].tolist()


def same_number(pattern, tokens, parts) -> bool:
    """Whether `tokens` hold the pattern as often as their parts do, and so nowhere else."""
    return len(occurrences(tokens, pattern)) == sum(len(occurrences(part, pattern)) for part in parts)


def splice(delimiter, pieces, text, length) -> np.ndarray:
    """int64 [length]: the delimiter, then `text` with the `pieces` (start, tokens) inserted; text left over is dropped."""
    tokens_T = np.full(length, -1, dtype=np.int64)
    tokens_T[0] = delimiter
    for start, ids in pieces:
        assert (tokens_T[start : start + len(ids)] == -1).all() and start + len(ids) <= length
        tokens_T[start : start + len(ids)] = ids
    free = np.flatnonzero(tokens_T == -1)
    tokens_T[free] = text[: len(free)]
    return tokens_T


class Library:
    """Held-out text and the evaluation's part of the grammar: makes the samples. ValueError where the text does not serve."""

    def __init__(self, paths, delimiter: int, vocab_size: int, settings: Settings):
        self.settings = settings
        self.haystack = Haystack(paths, delimiter, vocab_size, option="--text")
        shard_N, start_N, _ = self.haystack.documents_N3.T  # one that opens with plain text goes on from the shard before
        self.book_N = np.cumsum((start_N > 0) | (shard_N == 0)) - 1
        self.delimiter = delimiter
        self.key_ids, self.value_ids = self.haystack.anchor_ids, self.haystack.value_ids
        self.templates = templates(self.haystack.counts_V, delimiter)
        for name, ids in (("key_length", self.key_ids), ("value_length", self.value_ids)):
            if getattr(settings, name) > len(ids):
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(settings, name)} tokens, but the text offers only "
                                 f"{len(ids)} to choose from: take fewer, or more text")

    # -- text

    def book(self, document) -> int:
        """Number of the document that a row is of: one cut by a shard's end has two rows."""
        return self.book_N[(self.haystack.documents_N3 == document).all(axis=1)][0]

    def name(self, document) -> str:
        shard, start, _ = self.haystack.documents_N3[np.searchsorted(self.book_N, self.book(document))]
        return f"{self.haystack.paths[shard].name}:{start}"

    def take(self, document, start: int, length: int) -> np.ndarray:
        return self.haystack.shards[document[0]][start : start + length]

    def draw_text(self, draw, length: int, other_than=None):
        """(uint16 [length], name, stitched): a slice of one document, every long enough one being equally likely.

        Where none is long enough documents in random order are stitched together, without delimiters.
        """
        documents = self.haystack.documents_N3
        documents = documents if other_than is None else documents[self.book_N != self.book(other_than)]
        lengths = documents[:, 2] - documents[:, 1]
        if (lengths >= length).any():
            document = draw_row(draw, documents[lengths >= length])
            start = document[1] + int(draw.randint(document[2] - document[1] - length + 1, dtype=np.int64))
            return self.take(document, start, length), self.name(document), False
        spare = int(lengths.sum()) - length
        if spare < 0:
            where = "" if other_than is None else " in other documents"
            raise ValueError(f"the held-out text has {spare + length} tokens{where}, {length} are needed: give --text with "
                             f"more, or smaller --lengths")
        order = documents[draw.permutation(len(documents))]
        order = order[order[:, 2] > order[:, 1]].tolist()  # without those that are a delimiter alone
        skipped = int(draw.randint(min(spare + 1, order[0][2] - order[0][1]), dtype=np.int64))
        parts, missing = [], skipped + length
        for document in order:
            parts.append(self.take(document, document[1], min(missing, document[2] - document[1])))
            missing -= len(parts[-1])
            if not missing:
                break
        return np.concatenate(parts)[skipped:], self.name(order[0]), True

    # -- needles

    def statements(self, cell: Cell, draw) -> tuple[list[Statement], list[tuple[np.ndarray, np.ndarray, int]]]:
        """(statements in their order, questions as (tokens, answer, number of the statement whose value ends the answer))."""
        number = int(cell.low) if cell.task not in ("single", "depth") else 1

        def key():
            return draw_key(draw, self.key_ids, self.settings.key_length)

        def value():
            return draw_value(draw, self.value_ids, self.settings.value_length)

        def template(link=False):
            fit = [t for t in self.templates if t.links] if link else self.templates
            return fit[draw.randint(len(fit))]

        one = template(link=cell.task == "tracking")
        match cell.task:
            case "single" | "depth":
                made, asked = [Statement(one, key(), value())], [0]
            case "multikey":  # at least one distractor on either side
                made, asked = [Statement(one, key(), value()) for _ in range(number + 1)], [1 + draw.randint(number - 1)]
            case "multivalue":
                stated = key()
                made, asked = [Statement(one, stated, value()) for _ in range(number)], [number - 1]
            case "tracking":
                chain = [key() for _ in range(number + 1)]
                made = [Statement(one, chain[0], value())]
                made += [Statement(one, new, old, link=True) for old, new in zip(chain, chain[1:], strict=False)]
                return made, [(made[-1].question, np.concatenate([one.way(chain[-2::-1]), made[0].value]), 0)]
            case _:
                made, asked = [Statement(template(), key(), value()) for _ in range(number)], draw.permutation(number).tolist()
        return made, [(made[i].question, made[i].value, i) for i in asked]

    def check_size(self, cell: Cell) -> None:
        """ValueError unless the longest statements and questions that a cell may have leave some text at its length."""
        if cell.task == "gain":
            return
        longest = self.settings.key_length + max(self.settings.key_length, self.settings.value_length)
        longest += max(len(t.before) + len(t.between) + len(t.after) for t in self.templates)
        statements = 1 + int(cell.high) if cell.task in ("multikey", "tracking") else math.ceil(cell.high)
        statements, questions = (1 if cell.task in ("single", "depth") else statements), PAIRS.get(cell.task, 1)
        questions += int(cell.high) if cell.task == "tracking" else 0  # its answer holds a key and more for each link
        needed = 1 + statements * (longest + GAP) + questions * longest
        if needed >= cell.length:
            raise ValueError(f"{cell.task} at length {cell.length}: statements and questions take up to {needed} tokens: take "
                             f"larger --lengths, or leave the task out")

    def places(self, cell: Cell, draw, made: list[Statement], end: int, answer: int) -> list[int]:
        """Starts of the statements, in order and apart from each other, before `end`; `answer` is the first scored position."""
        sizes = [len(s.tokens) + GAP for s in made]
        room = end - 1 - sum(sizes)
        if cell.task == "single":
            before = len(made[0].question)  # tokens of the statement before its value
            low, high = max(cell.low, answer - (end - sizes[0] + before)), min(cell.high, answer - (1 + before))
            if low > high:
                raise ValueError(f"single at length {cell.length}: no distance of {cell.variant} tokens fits")
            distance = math.floor(low * (high / low) ** draw.random())
            return [answer - distance - before]
        if cell.task == "depth":
            return [1 + int((cell.low + (cell.high - cell.low) * draw.random()) * (room + 1))]
        gaps = np.sort(draw.randint(room + 1, size=len(made), dtype=np.int64))
        return (1 + gaps + np.cumsum([0] + sizes[:-1])).tolist()

    def retrieval_sample(self, cell: Cell, index: int) -> Sample:
        """Sample `index` of a cell: a function of its arguments, the seed and the text alone."""
        draw = generator("retrieval", cell.task, cell.length, cell.variant, index, self.settings.seed)
        text, name, stitched = self.draw_text(draw, cell.length - 1)
        for _ in range(MAX_DRAWS):
            made, questions = self.statements(cell, draw)
            keys, values = {s.key.tobytes(): s.key for s in made}, {s.value.tobytes() for s in made}
            size, asked = len(questions[0][1]), [(tokens, answer, made[i].template.after) for tokens, answer, i in questions]
            asked[-1] = (*asked[-1][:2], asked[-1][2][:0])  # the last token is one of the answer
            closing = np.concatenate([part for question in asked for part in question])
            end = cell.length - len(closing)
            stops = np.cumsum([sum(map(len, question)) for question in asked]).tolist()
            answers = [end + stop - len(after) - size for stop, (*_, after) in zip(stops, asked, strict=True)]
            starts = self.places(cell, draw, made, end, answers[0])
            pieces = [s.tokens for s in made] + [closing]
            tokens_T = splice(self.delimiter, zip(starts + [end], pieces, strict=True), text, cell.length)
            distinct = len(keys) == (1 if cell.task == "multivalue" else len(made)) and len(values) == len(made)
            if distinct and all(same_number(key, tokens_T, pieces) for key in keys.values()):
                break
        else:
            raise ValueError(f"{cell.task} at length {cell.length}: in {MAX_DRAWS} draws a key or value was there twice, or a "
                             f"key in the text: take a larger --key-length or --value-length, or more text")
        swapped_T, distances = tokens_T.copy(), []
        for answer, (*_, i) in zip(answers, questions, strict=True):
            start = starts[i] + len(made[i].question)
            swapped_T[start : start + self.settings.value_length] = self.other_value(draw, made[i].value)
            distances.append(answer + size - self.settings.value_length - start)
        return Sample(tokens_T, answers, size, name, stitched, swapped_T, distances)

    def other_value(self, draw, value):
        while True:  # the pool holds at least 8 tokens
            other = draw_value(draw, self.value_ids, len(value))
            if other[0] != value[0]:
                return other

    # -- context gain

    def gain_cells(self) -> list[Cell]:
        """Contexts no longer than the longest length that some document fills; ValueError if they tell nothing."""
        settings = self.settings
        documents = self.haystack.documents_N3
        longest = int((documents[:, 2] - documents[:, 1]).max()) - settings.targets + 1
        contexts = sorted(c for c in settings.contexts if c <= min(longest, max(settings.lengths)))
        if not any(c > settings.base_context for c in contexts) or settings.base_context not in contexts:
            raise ValueError(f"gain: the contexts up to the longest length, {max(settings.lengths)}, that fit before "
                             f"{settings.targets} targets in the longest document, at most {longest}, must include "
                             f"{settings.base_context} and a longer one: change --lengths, --contexts or the text")
        own = [Cell("gain", f"own {c}", contexts[-1], c, c) for c in contexts]
        return own + [Cell("gain", f"other {c}", contexts[-1], c, c) for c in contexts if c > settings.base_context]

    def gain_sample(self, cell: Cell, index: int) -> Sample:
        """Targets `index` behind `cell.low` tokens of context: of their own book, or of another one but for the nearest."""
        settings, context = self.settings, int(cell.low)
        draw = generator("retrieval", "gain", cell.length, index, settings.seed)  # the same targets for every context
        document = draw_row(draw, self.haystack.documents(cell.length - 1 + settings.targets))
        first = document[1] + cell.length - 1
        first += int(draw.randint(document[2] - settings.targets - first + 1, dtype=np.int64))
        far = context - settings.base_context if cell.variant.startswith("other") else 0
        own = self.take(document, first - (context - far - 1), context - far - 1 + settings.targets)
        other, stitched = own[:0], False
        if far:
            other, _, stitched = self.draw_text(draw, cell.length - settings.base_context, other_than=document)
        tokens_T = np.concatenate([[self.delimiter], other[len(other) - far :], own]).astype(np.int64)
        return Sample(tokens_T, [context], settings.targets, self.name(document), stitched)

    # -- all of them

    def cells(self) -> list[Cell]:
        order = [task for task in TASKS if task in self.settings.tasks]
        return [cell for length in sorted(self.settings.lengths) for task in order if task != "gain"
                for cell in task_cells(task, length, self.settings)] + (self.gain_cells() if "gain" in order else [])

    def sample(self, cell: Cell, index: int) -> Sample:
        return (self.gain_sample if cell.task == "gain" else self.retrieval_sample)(cell, index)


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def sample_id(cell: Cell, index: int) -> str:
    return f"{cell.task}/{cell.length}/{cell.variant}/{index}"


def tail(sample: Sample) -> int:
    """Tokens at the end to be scored, so that all answers are among them."""
    length = len(sample.tokens_T)
    needed = length - sample.answers[0]
    return min(next((t for t in TAILS if t >= needed), needed), length - 1)


def evaluate_sample(score, library: Library, cell: Cell, index: int) -> dict:
    """The line of samples.jsonl: nats per answer token, and per answer its tokens, those said, and whether they are the same.

    score(tokens_T, last) -> (nats [last], argmax [last], reads) of the last tokens, teacher-forced. reads(position, source):
    whether a content pointer lets the token at `position` see the one at `source`; None where none points.
    """
    sample = library.sample(cell, index)
    last = tail(sample)
    places = np.array(sample.answers)[:, None] - (len(sample.tokens_T) - last) + np.arange(sample.size)

    def nats_and_said(tokens_T):
        nats, said, reads = score(tokens_T, last)
        return np.asarray(nats, dtype=np.float64)[places].mean(axis=1), np.asarray(said)[places], reads

    nats, said, reads = nats_and_said(sample.tokens_T)
    if not np.isfinite(nats).all():
        raise Stop(f"{sample_id(cell, index)}: the loss is not a finite number: the checkpoint's weights are of no use")
    answer = sample.tokens_T[-last:][places]
    correct = said == answer
    record = dict(id=sample_id(cell, index), **asdict(cell), index=index, text=sample.text, stitched=sample.stitched,
                  nats=[round(x, 6) for x in nats.tolist()])
    if cell.task == "gain":
        return record | dict(token_accuracy=float(correct.mean()))
    swapped = nats_and_said(sample.swapped_T)[0] if index < library.settings.swaps else []
    values = [start + sample.size - library.settings.value_length for start in sample.answers]
    read = [int(reads(at - 1, at - back)) for at, back in zip(values, sample.distances, strict=True)] if reads else []
    return record | dict(distances=sample.distances, answer=answer.tolist(), said=said.tolist(),
                         correct=["".join("01"[int(x)] for x in row) for row in correct],
                         swapped_nats=[round(float(x), 6) for x in swapped], read=read)


class Scorer:
    """A checkpoint's model, its schedules where training left them, as a function of a sequence."""

    def __init__(self, state: dict, path, config: scope.Config, device: torch.device):
        self.config, self.device = config, device
        self.backend, compiled, self.reason = scope.choose_backend(config, device)
        self.model = scope.build_model(config, device).eval()
        scope.load_weights(self.model, state, path)
        self.model.use_backend(self.backend)
        self.schedule = scope.Schedule(config, state["step"], state["total_steps"])
        self.score_end = self.model.score_end
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one graph per length and number of scored tokens
            self.score_end = torch.compile(self.model.score_end, **scope.compile_options(config, self.backend))

    @torch.no_grad()
    def __call__(self, tokens_T: np.ndarray, last: int):
        """As evaluate_sample wants it."""
        tokens = torch.from_numpy(tokens_T.astype(np.int32)).to(self.device)
        nats, said, layers = self.score_end(tokens, self.schedule.context(tokens, False, self.backend), last)
        layers = [[t[0].cpu().numpy() for t in claims] for claims in layers]
        tiles = len(tokens_T) // scope.BLOCK

        def reads(position: int, source: int) -> bool:
            tile, x, block = position // scope.BLOCK, position % scope.BLOCK, source // scope.BLOCK
            if tile - block < self.config.pointer_band or block < self.schedule.global_blocks:
                return True
            here = ([t[:, tile - tiles] for t in claims] for claims in layers)
            return any(((blocks == block) & (times <= x) & (np.arange(blocks.shape[-1]) < num[:, None])).any()
                       for num, blocks, times in here)

        return nats.float().cpu().numpy(), said.cpu().numpy(), reads if layers else None


def model_config(state: dict, longest: int) -> scope.Config:
    """The checkpoint's model and spectral settings, unless the environment has others, for sequences of `longest` tokens."""
    config, problems, unread = scope.Config.read(os.environ, state["config"])
    if differences := scope.differing_settings(state["config"], config, ("model",)):  # before what they make impossible
        raise Stop(f"the environment sets another model than the checkpoint's: {'; '.join(differences)}: leave them out")
    config = replace(config, num_iterations=0, needle_eval=False, needle_files="", train_seq_len=longest, batch_tokens=longest,
                     val_seq_len=longest, val_tokens=longest)
    problems += config.impossible_combinations(unread)
    if problems:
        raise Stop("; ".join(problems))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def clustered_wilson(clusters: list) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion from 0/1 outcomes by cluster, for the sample size that they are worth.

    That is p (1 - p) over the variance of p between clusters, no more than the outcomes and no less than the clusters. With one
    outcome a cluster it is Wilson's interval.
    """
    clusters = [np.asarray(c, dtype=np.float64) for c in clusters]
    n, share = sum(map(len, clusters)), float(np.concatenate(clusters).mean())
    variance, worth = clustered_variance([c - share for c in clusters], n), len(clusters)
    if worth > 1 and 0 < share < 1:
        worth = min(max(share * (1 - share) / variance, worth), n) if variance else n
    return wilson_interval(share * worth, worth)


def clustered_variance(residuals: list, n: int) -> float:
    """Variance of a mean of n values from their residuals by cluster; 0 with fewer than two clusters."""
    groups = len(residuals)
    return sum(float(np.sum(r)) ** 2 for r in residuals) / n**2 * groups / (groups - 1) if groups > 1 else 0.0


def chance(cell: Cell, first: bool, blind: float) -> float:
    """Exact match of a guesser who gives the value of a statement without reading keys; `blind`: of one who reads nothing.

    Asked for every needle once, he knows which values are gone; among many keys he knows that neither the first statement nor
    the last is asked for. Over links he knows that all statements are of one chain: over one link there is nothing to guess.
    """
    number = int(cell.low)
    match cell.task:
        case "multikey":
            return 1 / (number - 1)
        case "multivalue":
            return 1 / number
        case "tracking":
            return 1 / math.factorial(number)  # the links in any order, then the value
        case "mqar" | "dense":
            return 1 / number if first else sum(1 / left for left in range(1, number + 1)) / number
        case _:
            return blind


def retrieval_row(cell: Cell, records: list[dict], blind: float, first: bool = False) -> dict:
    """A row from the samples of a cell, all questions or the first of every context."""
    end = 1 if first else None
    correct = [[list(map(int, answer)) for answer in r["correct"][:end]] for r in records]
    exact = [[all(answer) for answer in answers] for answers in correct]
    answers = [answer for context in correct for answer in context]
    low, high = clustered_wilson(exact)
    swapped = [[s - n for s, n in zip(r["swapped_nats"], r["nats"], strict=True)][:end] for r in records if r["swapped_nats"]]
    gains = [gain for context in swapped for gain in context]
    read = [answer for r in records for answer in r.get("read", [])[:end]]
    return asdict(cell) | dict(
        variant=f"first of {cell.variant}" if first else cell.variant, n=len(answers), contexts=len(records),
        texts=len({r["text"] for r in records}), stitched=int(any(r["stitched"] for r in records)),
        exact_match=float(np.mean([e for context in exact for e in context])), exact_match_low=low, exact_match_high=high,
        first_token_accuracy=statistics.fmean(answer[0] for answer in answers),
        token_accuracy=statistics.fmean(token for answer in answers for token in answer),
        nats=statistics.fmean(x for r in records for x in r["nats"][:end]),
        retrieval_gain=statistics.fmean(gains) if gains else None, retrieval_gain_n=len(gains),
        chance=chance(cell, first, blind), needle_read=statistics.fmean(read) if read else None)


def gain_row(cell: Cell, records: list[dict], base: dict) -> dict:
    """A row of the context gain: targets paired with the same ones behind the base context (by index)."""
    records = [r for r in records if r["index"] in base]
    if not records:
        return {}
    gains = [base[r["index"]]["nats"][0] - r["nats"][0] for r in records]
    mean, by_text = statistics.fmean(gains), defaultdict(list)
    for record, gain in zip(records, gains, strict=True):
        by_text[record["text"]].append(gain - mean)
    error = math.sqrt(clustered_variance(list(by_text.values()), len(gains))) if len(by_text) > 1 else None
    return asdict(cell) | dict(n=len(records), contexts=len(records), texts=len(by_text),
                               stitched=int(any(r["stitched"] for r in records)),
                               token_accuracy=statistics.fmean(r["token_accuracy"] for r in records),
                               nats=statistics.fmean(r["nats"][0] for r in records), context_gain=mean, context_gain_se=error)


def summarise(records: list[dict], blind: float, base_context: int, train_length: int, tokens_seen: int) -> list[dict]:
    """Rows of summary.csv, in a fixed order: one a cell, and one more where several questions end a context."""
    by_cell = defaultdict(dict)
    for r in records:
        by_cell[Cell(**{name: r[name] for name in Cell.__dataclass_fields__})][r["index"]] = r
    rows = []
    for cell in sorted(by_cell, key=lambda c: (TASKS.index(c.task), c.length, c.variant.startswith("other"), c.low, c.high)):
        mine = [by_cell[cell][index] for index in sorted(by_cell[cell])]
        if cell.task == "gain":
            base = Cell("gain", f"own {base_context}", cell.length, base_context, base_context)
            rows.append(gain_row(cell, mine, by_cell.get(base, {})))
        else:
            rows.append(retrieval_row(cell, mine, blind))
            if cell.task in PAIRS:
                rows.append(retrieval_row(cell, mine, blind, first=True))
    return [row | dict(train_length=train_length, tokens_seen=tokens_seen) for row in rows if row]


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The command


def file_hash(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str | None:
    """Of the code, with -dirty where files differ from it; None outside a git repository."""
    try:
        done = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                              capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def identity(state: dict, path, config: scope.Config, library: Library) -> dict:
    """What all samples of a directory have in common."""
    old, fields = state["config"], scope.Config.__dataclass_fields__  # an older checkpoint lacks the newer settings
    overrides = {name: value for name, value in asdict(config).items()
                 if (fields[name].metadata["group"] == "model" or name.startswith("spectral_"))
                 and old.get(name, fields[name].default) != value}
    settings = library.settings
    text = [[p.name, shards.token_count(p), shards.fingerprint(p)] for p in library.haystack.paths]
    return dict(checkpoint_sha256=file_hash(path), overrides=overrides, text=text, seed=settings.seed,
                key_length=settings.key_length, value_length=settings.value_length, targets=settings.targets,
                base_context=settings.base_context, depth_bins=settings.depth_bins,
                code_sha256=hashlib.sha256("".join(map(file_hash, CODE)).encode()).hexdigest())


def check_directory(directory: Path, own: dict) -> float:
    """Stop if the directory cannot be written or holds something else; the seconds already spent on this evaluation."""
    if (directory / "config.json").exists():
        raise Stop(f"--out: {directory} is the directory of a training run: choose another, {directory / 'retrieval'} say")
    check_place(directory, "--out")
    try:
        old = json.loads((directory / "run.json").read_text())
    except FileNotFoundError:
        if (directory / "samples.jsonl").exists():
            raise Stop(f"{directory} holds samples.jsonl and no run.json to say of what: choose another --out") from None
        return 0.0
    except ValueError:
        old = None
    if not isinstance(old, dict):
        raise Stop(f"{directory / 'run.json'} cannot be read: choose another --out")
    differing = [name for name in own if old.get(name) != own[name]]
    if differing:
        raise Stop(f"{directory} holds another evaluation ({', '.join(differing)} differ): choose another --out")
    return old.get("wall_seconds", 0.0)


def check_samples(library: Library) -> list[Cell]:
    """The cells, after all of them were found to fit and the first sample of each was made."""
    cells = library.cells()
    for cell in cells:
        library.check_size(cell)
        library.sample(cell, 0)
    return cells


def end_last_line(path: Path) -> None:
    """A line cut by a kill stays, as a line of its own that nothing reads."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_samples(path: Path) -> list[dict]:
    lines = parse_lines(path.read_bytes()) if path.exists() else []
    for number, record in lines:
        if not is_sample(record):
            raise Stop(f"{path}, line {number} is no sample: take the line out, and what is missing is scored again")
    return [record for _, record in lines]


def is_sample(record) -> bool:
    try:
        cell = Cell(**{name: record[name] for name in Cell.__dataclass_fields__})
        more = [record["token_accuracy"]] if cell.task == "gain" else [*record["swapped_nats"], *map(int, record["correct"])]
        return (record["id"] == sample_id(cell, record["index"]) and isinstance(record["text"], str)
                and isinstance(record["stitched"], bool) and len(record["nats"]) > 0
                and all(math.isfinite(x) for x in (*record["nats"], *more)))
    except (KeyError, TypeError, ValueError):
        return False


def complete(record: dict, settings: Settings) -> bool:
    """Whether a sample needs no more scoring: an earlier command may have exchanged the values of fewer. Of two lines of one
    sample, the later counts."""
    return record["task"] == "gain" or record["index"] >= settings.swaps or bool(record["swapped_nats"])


def evaluate(checkpoint: str, text: str, out: Path, settings: Settings) -> None:
    """The command: everything is checked before anything is made."""
    if problems := settings.problems():
        raise Stop("; ".join(problems))
    state = read_checkpoint(checkpoint, WEIGHT_KEYS)
    longest = max(settings.lengths) + (settings.targets if "gain" in settings.tasks else 0)
    config = model_config(state, longest)
    library = Library(shards.find_shards(text), config.doc_delimiter, config.vocab_size, settings)
    own = identity(state, checkpoint, config, library)
    scope.check_separate(scope.trained_shards(None, state), library.haystack.paths, "--text")
    cells = check_samples(library)
    seconds_before = check_directory(out, own)

    device = set_up_device(RANK_TIMEOUT)
    rank, world_size, _ = world()
    started, lock = time.perf_counter(), None
    scorer = Scorer(state, checkpoint, config, device)
    dtype = str(scorer.model.embed.weight.dtype).removeprefix("torch.")
    own |= dict(dtype=dtype, backend=scorer.backend)
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = lock_directory(out, "choose another --out")
        except OSError as error:
            raise Stop(f"--out: {out} cannot be written ({error.strerror}): choose another") from None
        seconds_before = check_directory(out, own)  # another command may have ended since
    trained = state["config"]
    run = own | dict(
        status="running", checkpoint=str(checkpoint), step=state["step"], total_steps=state["total_steps"], arm=config.arm,
        train_length=trained["train_seq_len"], tokens_seen=state["step"] * trained["batch_tokens"],
        started_from=trained.get("load_checkpoint") or None, retrieval_mix=trained.get("retrieval_mix", 0), commit=commit(),
        world_size=world_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=str(torch.__version__),
        keys=len(library.key_ids), values=len(library.value_ids), arguments=dict(text=text, **asdict(settings)),
        wall_seconds=seconds_before)
    samples, write_run = out / "samples.jsonl", partial_writer(out / "run.json")
    if rank == 0:
        write_run(run)
        end_last_line(samples)
    wait(device)
    done = {record["id"] for record in read_samples(samples) if complete(record, settings)}
    wait(device)  # none writes before all have read
    todo = [(cell, i) for cell in cells for i in range(settings.samples) if sample_id(cell, i) not in done]
    lines = LineFile(samples)
    bar = tqdm(todo[rank::world_size], disable=None if rank == 0 else True, unit="sample", dynamic_ncols=True)
    for cell, index in bar:
        bar.set_description(f"{cell.task} {cell.length} {cell.variant}")
        try:
            lines.write(json.dumps(evaluate_sample(scorer, library, cell, index)))
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)):
                raise
            raise Stop(f"{sample_id(cell, index)}: out of memory: take smaller --lengths, or a larger machine, where the same "
                       f"command goes on") from None
    lines.sync()
    lines.close()
    wait(device)
    if rank == 0:
        records = read_samples(samples)
        blind = chance_level(len(library.value_ids), settings.value_length)["exact_match"]
        rows = summarise(records, blind, settings.base_context, run["train_length"], run["tokens_seen"])
        write_atomically(out / "summary.csv", lambda file: file.write(csv_text(rows).encode()))
        stitched = sorted({r["length"] for r in records if r["stitched"]})
        write_run(run | dict(status="complete", stitched=stitched, wall_seconds=seconds_before + time.perf_counter() - started))
        samples_in_all = len({record["id"] for record in records})
        print(f"{len(todo)} samples scored, {samples_in_all} in all; {out / 'summary.csv'} has {len(rows)} rows")
        os.close(lock)
    wait(device)


def partial_writer(path: Path):
    """Writes a dictionary to `path`, whole or not at all."""
    return lambda value: write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def wait(device: torch.device) -> None:
    """Until all processes are here."""
    all_ranks(torch.zeros((), device=device))


def numbers(text: str) -> tuple:
    return tuple(int(part) for part in text.split(","))


def directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def main(arguments=None) -> None:
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, metavar="GLOB", help="held-out shards")
    parser.add_argument("--out", required=True, type=directory, metavar="DIR")
    parser.add_argument("--tasks", type=lambda s: tuple(s.split(",")), default=default.tasks, help="default: %(default)s")
    parser.add_argument("--lengths", type=numbers, default=default.lengths, help="tokens (%(default)s)")
    parser.add_argument("--samples", type=int, default=default.samples, help="of every cell (%(default)s)")
    parser.add_argument("--swaps", type=int, help="samples of a cell that are also scored with another value (default: all)")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--key-length", type=int, default=default.key_length, help="tokens (%(default)s)")
    parser.add_argument("--value-length", type=int, default=default.value_length, help="tokens (%(default)s)")
    parser.add_argument("--depth-bins", type=int, default=default.depth_bins, help="(%(default)s)")
    parser.add_argument("--contexts", type=numbers, default=default.contexts, help="of gain, tokens (%(default)s)")
    parser.add_argument("--base-context", type=int, default=default.base_context, help="that gains count from (%(default)s)")
    parser.add_argument("--targets", type=int, default=default.targets, help="of gain, tokens (%(default)s)")
    values = vars(parser.parse_args(arguments))
    values["swaps"] = values["samples"] if values["swaps"] is None else values["swaps"]
    checkpoint, text, out = (values.pop(name) for name in ("checkpoint", "text", "out"))
    try:
        evaluate(checkpoint, text, out, Settings(**values))
    except (Stop, ValueError, OSError) as error:
        if not dist.is_initialized():  # all ranks refuse alike
            sys.exit(f"error: {error}" if world()[0] == 0 else 1)
        print(f"error: {error}", file=sys.stderr)
        exit_at_once(1)  # the others wait for this one: torchrun ends them
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where it was" if world()[0] == 0 else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if "RANK" in os.environ:
        exit_at_once(0)
