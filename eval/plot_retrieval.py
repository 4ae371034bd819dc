"""Draw retrieval evaluations from the summary.csv that eval/retrieval.py leaves behind.

    python eval/plot_retrieval.py logs/run/retrieval                        # writes its pictures into that directory
    python eval/plot_retrieval.py logs/*/retrieval --output logs/compare    # one line a model, named by its directory
    python eval/plot_retrieval.py logs/*/retrieval --seeds                  # logs/m_0, logs/m_1: one line, m
    python eval/plot_retrieval.py logs/run/by_step/*                        # one run's checkpoints: the trend too

Each as PNG and SVG: depth (exact match by length and depth, colours from 0 to 1, a panel a model), distance (exact match and
nats against distance, a column a length), tasks (exact match by length), gain (what more context is worth), trend (exact match
against the tokens trained on, where directories beside each other were trained on different numbers of them: a line for those
of one parent, a band from their worst cell to their best). Else bands and bars are 95 % intervals (gain: Student's t over the
texts, and no bar where there is but one), and a dashed vertical line is the training length. What no directory holds is left
out. With --seeds a line is the mean of a model's seeds, bands and bars reach from the least of them to the most, and n is of
all their samples.
"""

import argparse
import csv
import json
import math
import os
import re
import sys
from pathlib import Path

GREY = "0.45"
PANEL = 3.4  # inches
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito, for all eyes
MARKERS = "osD^vPX"
SUFFIXES = (".png", ".svg")
OTHER_TASKS = ("multikey", "multivalue", "tracking", "mqar", "dense")
ALWAYS_FILLED = ("task", "variant", "length", "low", "high", "n", "train_length")
EXACT_MATCH = ("exact_match", "exact_match_low", "exact_match_high", "nats", "chance")
FILLED = dict.fromkeys(("single", "depth", *OTHER_TASKS), EXACT_MATCH) | {"gain": ("texts", "context_gain")}  # by task
COLUMNS = (*ALWAYS_FILLED, *EXACT_MATCH, *FILLED["gain"], "context_gain_se")  # that a file must have
COMMON = ("text", "seed", "key_length", "value_length", "base_context", "arm", "retrieval_mix", "overrides")  # to all seeds
LEAST = dict(length=1, n=1, texts=1, train_length=1, context_gain=-math.inf, retrieval_gain=-math.inf)  # of other numbers: 0


def read_summary(directory: Path) -> list[dict]:
    """Rows of a summary.csv: text stays text, empty cells are None, all else numbers; and each row's `series`, its parent.

    ValueError, with the line, where it is not what eval/retrieval.py writes.
    """
    path, mend = directory / "summary.csv", "the command of eval/retrieval.py, repeated, writes it anew"
    content = path.read_bytes()
    header, rows, series = None, [], dict(series=directory.resolve().parent)
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            fields = read_fields(line)
            if header is None:
                header = fields
                if absent := [name for name in COLUMNS if name not in header]:
                    raise ValueError(f"the header lacks {', '.join(absent)}")
            elif fields:
                rows.append(read_row(header, fields) | series)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}: {error}; {mend}") from None
    if not rows:
        raise ValueError(f"{path} has no rows: let eval/retrieval.py finish first")
    if not any(row["task"] in FILLED for row in rows):
        raise ValueError(f"{path} has nothing to draw, as no row's task is one of {', '.join(FILLED)}; {mend}")
    return rows


def read_fields(line: bytes) -> list[str]:
    """Of one line of a CSV; none for an empty line."""
    if b"\0" in line:
        raise ValueError("it holds a NUL byte")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None
    fields = next(csv.reader([text], strict=True), [])
    if not text.endswith(("\n", "\r")):
        raise ValueError("it is cut, as nothing ends the line")
    return fields


def read_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        raise ValueError(f"it has {len(fields)} fields, the header {len(header)}")
    row = {name: read_value(name, text) for name, text in zip(header, fields, strict=True)}
    filled = ALWAYS_FILLED + FILLED.get(row["task"], ())
    if row["task"] == "gain" and row["texts"] != 1:
        filled += ("context_gain_se",)
    if empty := [name for name in filled if row[name] is None]:
        raise ValueError(f"{', '.join(empty)} must not be empty")
    return row


def read_value(name: str, text: str) -> str | float | None:
    if not text or name in ("task", "variant"):
        return text or None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {text!r}, which is not a finite number")
    if number < LEAST.get(name, 0):
        raise ValueError(f"{name} is {text}, which is below {LEAST.get(name, 0)}")
    return number


def t_quantile(freedom: int) -> float:
    """Student's t that 97.5 % lie below, for so many degrees of freedom: 12.706 for 1, falling to 1.96.

    By bisection of the angle atan(t / sqrt(freedom)): the share within -t and t is a finite sum of its sines and cosines
    (Abramowitz and Stegun, 26.7.3 and 26.7.4), which two degrees of freedom more make one term longer.
    """
    freedom = min(freedom, 1000)  # any more would lower it by less than 0.003
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        sine, cosine = math.sin(angle), math.cos(angle)
        if freedom % 2:
            reached, share, term = 1, 2 / math.pi * angle, 2 / math.pi * sine * cosine
        else:
            reached, share, term = 2, sine, sine * cosine**2 / 2
        for k in range(reached + 2, freedom + 1, 2):
            share += term
            term *= cosine**2 * (k - 1) / k
        low, high = (angle, high) if share < 0.95 else (low, angle)
    return math.tan(angle) * math.sqrt(freedom)


def tokens(number: float) -> str:
    """8k, 64k, 1M: as people say lengths that are powers of two."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def of_task(rows: list[dict], task: str) -> list[dict]:
    return [row for row in rows if row["task"] == task]


def lengths_of(models: dict, tasks) -> list[float]:
    return sorted({row["length"] for rows in models.values() for row in rows if row["task"] in tasks})


def train_lengths(models: dict) -> set[float]:
    return {row["train_length"] for rows in models.values() for row in rows}


def stretch(values: list) -> str:
    """'100' or '20 to 100', for a title."""
    low, high = int(min(values)), int(max(values))
    return f"{low}" if low == high else f"{low} to {high}"


def log_axis(axes, ticks: list) -> None:
    """Base 2, with these tokens as ticks; every second one where they would touch."""
    ticks = sorted(set(ticks))
    axes.set_xscale("log", base=2)
    ticks = ticks[:: 1 + (len(ticks) - 1) // 6]
    axes.set_xticks(ticks, [tokens(t) for t in ticks], fontsize=8)
    axes.minorticks_off()


def style(number: int) -> dict:
    """A colour and a marker; where the colours begin again, each with another marker."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return dict(color=COLOURS[number % len(COLOURS)], marker=marker, markersize=4, linewidth=1.5)


def finish(axes, **labels) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure, axes, columns: int = 5) -> None:
    """One for all panels, below them, in as many columns as the labels leave room for."""
    entries = {}
    for panel in axes:
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if not entries:
        return
    inches = 0.6 + 0.085 * max(map(len, entries))  # a column's handle and its longest label
    columns = max(1, min(columns, len(entries), int(figure.get_figwidth() / inches)))
    figure.set_figheight(figure.get_figheight() + 0.22 * (math.ceil(len(entries) / columns) - 1))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def draw_depth(plt, models: dict):
    """Length across, depth down; the numbers are what the colours say."""
    lengths = lengths_of(models, ["depth"])
    models = {name: of_task(rows, "depth") for name, rows in models.items() if of_task(rows, "depth")}
    if not models:
        return None
    edges = column_edges(lengths)
    width = max(PANEL, 1.2 + 0.8 * len(lengths))
    figure, axes = plt.subplots(1, len(models), figsize=(width * len(models) + 0.9, 4.4), layout="constrained", squeeze=False)
    for panel, (name, rows) in zip(axes[0], models.items(), strict=True):
        for row in rows:
            column, share = lengths.index(row["length"]), row["exact_match"]
            mesh = panel.pcolormesh(edges[column : column + 2], [row["low"], row["high"]], [[share]], vmin=0, vmax=1,
                                    cmap="viridis")
            panel.text(row["length"], (row["low"] + row["high"]) / 2, f"{share:.2f}", ha="center",
                       va="center", fontsize=7, color="black" if share > 0.55 else "white",
                       bbox=dict(facecolor=mesh.cmap(share), edgecolor="none", pad=1))  # above the training length's line
        log_axis(panel, lengths)
        mean, n = sum(row["exact_match"] for row in rows) / len(rows), stretch([row["n"] for row in rows])
        panel.set(title=f"{name}\nEM {mean:.3f}, n = {n} a cell", xlabel="context length, tokens", ylim=(1, 0),
                  xlim=(edges[0], edges[-1]), ylabel="depth of the needle, share of the context")
        trained = rows[0]["train_length"]
        if edges[0] <= trained <= edges[-1]:
            panel.axvline(trained, color="red", linestyle="--", linewidth=1.5, label="training length")
    legend(figure, axes[0])
    figure.colorbar(mesh, ax=axes, label="exact match")
    return figure


def column_edges(lengths: list) -> list[float]:
    """Edges of the columns of rising lengths on a logarithmic axis: half way to the neighbours."""
    middles = [(low * high) ** 0.5 for low, high in zip(lengths, lengths[1:], strict=False)] or [lengths[0] * 2**0.5]
    first, last = lengths[0] ** 2 / middles[0], lengths[-1] ** 2 / middles[-1]
    return [first, *middles, last] if len(lengths) > 1 else [first, middles[0]]


def draw_distance(plt, models: dict):
    lengths = lengths_of(models, ["single"])
    if not lengths:
        return None
    figure, axes = plt.subplots(2, len(lengths), figsize=(max(PANEL * len(lengths), 5.5), 6.4), layout="constrained",
                                sharex="col", sharey="row", squeeze=False)
    for column, length in enumerate(lengths):
        top, bottom = axes[:, column]
        shown = {name: [r for r in of_task(rows, "single") if r["length"] == length] for name, rows in models.items()}
        edges, counts = set(), []
        for number, (name, rows) in enumerate(shown.items()):
            if not rows:
                continue
            rows = sorted(rows, key=lambda r: r["low"])
            x = [(r["low"] * r["high"]) ** 0.5 for r in rows]
            top.plot(x, [r["exact_match"] for r in rows], label=name, **style(number))
            top.fill_between(x, [r["exact_match_low"] for r in rows], [r["exact_match_high"] for r in rows], alpha=0.2,
                             color=style(number)["color"], linewidth=0)
            bottom.plot(x, [r["nats"] for r in rows], **style(number))
            edges |= {edge for r in rows for edge in (r["low"], r["high"])}
            counts += [r["n"] for r in rows]
            blind = rows[0]["chance"]
        top.axhline(blind, linestyle=":", color=GREY, label="chance")
        for panel in (top, bottom):
            mark_training(panel, models, max(edges))
            log_axis(panel, sorted(edges)[1:-1] or list(edges))
        finish(top, title=f"{tokens(length)} tokens, n = {stretch(counts)} a point", ylim=(-0.03, 1.03),
               ylabel="exact match" if not column else "")
        finish(bottom, xlabel="distance of the needle, tokens", ylabel="nats per answer token" if not column else "")
    axes[1, 0].set_ylim(bottom=0)  # of all columns; only now, as it ends the scaling
    legend(figure, axes[0])
    return figure


def grid(plt, number: int, height: float):
    """A figure of so many panels, four a row: (figure, axes [rows, columns], the panels); the axes beyond them do not show."""
    across = min(4, number)
    down = -(-number // across)
    figure, axes = plt.subplots(down, across, figsize=(max(PANEL * across, 5.5), height * down + 0.5), layout="constrained",
                                sharey=True, squeeze=False)
    for panel in axes.flat[number:]:
        panel.set_visible(False)
    return figure, axes, axes.flat[:number]


def mark_training(axes, models: dict, longest: float) -> list[float]:
    """A line at each training length up to the longest context; returns these."""
    marked = [trained for trained in train_lengths(models) if trained <= longest]
    for trained in marked:
        axes.axvline(trained, color=GREY, linestyle="--", linewidth=1, label="training length")
    return marked


def draw_tasks(plt, models: dict):
    """A panel a task and variant, exact match by context length: ticks are its own lengths and the training length."""
    panels = list(dict.fromkeys((r["task"], r["variant"]) for task in OTHER_TASKS for rows in models.values()
                                for r in of_task(rows, task)))
    if not panels:
        return None
    figure, axes, drawn = grid(plt, len(panels), 2.7)
    for panel, (task, variant) in zip(drawn, panels, strict=True):
        chances = {}
        for number, (name, rows) in enumerate(models.items()):
            rows = sorted((r for r in rows if (r["task"], r["variant"]) == (task, variant)), key=lambda r: r["length"])
            if not rows:
                continue
            x, y = [r["length"] for r in rows], [r["exact_match"] for r in rows]
            bars = [[max(0, r["exact_match"] - r["exact_match_low"]) for r in rows],
                    [max(0, r["exact_match_high"] - r["exact_match"]) for r in rows]]
            panel.errorbar(x, y, yerr=bars, capsize=2, label=name, **style(number))
            chances |= {r["length"]: r["chance"] for r in rows}
        panel.plot(chances.keys(), chances.values(), linestyle=":", color=GREY, marker="_", label="chance")
        marked = mark_training(panel, models, max(chances))
        log_axis(panel, [*chances, *marked])
        finish(panel, title=f"{task}: {variant}", xlabel="context length, tokens", ylim=(-0.03, 1.03))
    for panel in axes[:, 0]:
        panel.set_ylabel("exact match")
    legend(figure, drawn)
    return figure


def draw_gain(plt, models: dict):
    """A set of targets a panel. Targets of one text are not independent, so that the texts are what the bars count."""
    sets = lengths_of(models, ["gain"])
    if not sets:
        return None
    figure, axes = plt.subplots(1, len(sets), figsize=(max(4.6 * len(sets), 6), 4.4), layout="constrained", squeeze=False)
    for panel, longest in zip(axes[0], sets, strict=True):
        contexts, notes, bare = set(), set(), False
        for number, (name, rows) in enumerate(models.items()):
            rows = sorted((r for r in of_task(rows, "gain") if r["length"] == longest), key=lambda r: r["low"])
            own, other = ([r for r in rows if r["variant"].startswith(which)] for which in ("own", "other"))
            base = [r for r in own if r["context_gain"] == 0][:1]
            control = base + other if other else []
            dashed = dict(linestyle="--", markerfacecolor="white")
            for part, kind, looks in ((own, "", {}), (control, ", far context of another book", dashed)):
                if part:
                    panel.errorbar([r["low"] for r in part], [r["context_gain"] for r in part], label=name + kind, capsize=2,
                                   yerr=list(zip(*map(gain_bar, part), strict=True)), **style(number) | looks)
            contexts |= {r["low"] for r in rows}
            notes |= {(int(r["n"]), int(r["texts"])) for r in rows}
            bare |= any(r["texts"] == 1 and "seeds" not in r for r in rows)
        mark_training(panel, models, max(contexts))
        panel.axhline(0, color=GREY, linewidth=0.8)
        log_axis(panel, list(contexts))
        n, texts = (stretch([note[i] for note in notes]) for i in (0, 1))
        title = f"n = {n} targets of {texts} text{'' if texts == '1' else 's'}"
        if bare:
            title += "\nno bar where all are of one text: it has no interval"
        finish(panel, title=title, xlabel="context before the targets, tokens",
               ylabel="loss with base context - loss, nats per token")
    legend(figure, axes[0], columns=2)
    return figure


def gain_bar(row: dict) -> tuple[float, float]:
    """What a row's bar reaches below and above its context gain; NaN, which draws no bar, where there is one text."""
    if "seeds" in row:
        return row["context_gain"] - row["context_gain_low"], row["context_gain_high"] - row["context_gain"]
    half = t_quantile(int(row["texts"]) - 1) * row["context_gain_se"] if row["texts"] >= 2 else math.nan
    return half, half


def draw_trend(plt, models: dict):
    """A panel a task and length."""
    cells = {}  # (task, length) -> series -> tokens trained on -> exact matches
    for row in (row for rows in models.values() for row in rows if row["task"] in ("single", *OTHER_TASKS)):
        series = cells.setdefault((row["task"], row["length"]), {}).setdefault(row["series"], {})
        ends = ("exact_match_low", "exact_match_high") if "seeds" in row else ("exact_match", "exact_match")
        point = (row["exact_match"], *(row[end] for end in ends))
        series.setdefault(row.get("tokens_seen"), []).append(point)  # None: a file from before it was kept
    trends = {}
    for panel, by_series in cells.items():
        lines = {parent: points for parent, points in by_series.items() if len(points) > 1 and None not in points}
        trends |= {panel: lines} if lines else {}
    if not trends:
        return None
    parents = list(dict.fromkeys(parent for lines in trends.values() for parent in lines))
    labels = names(parents)
    figure, axes, drawn = grid(plt, len(trends), 2.9)
    for panel, ((task, length), lines) in zip(drawn, trends.items(), strict=True):
        for parent, points in lines.items():
            number = parents.index(parent)
            x, looks = sorted(points), style(number)
            mean, low, high = zip(*(zip(*points[t], strict=True) for t in x), strict=True)
            panel.plot(x, [sum(cells) / len(cells) for cells in mean], label=labels[number], **looks)
            panel.fill_between(x, list(map(min, low)), list(map(max, high)), alpha=0.2, linewidth=0, color=looks["color"])
        panel.set_xscale("log")
        x = sorted({t for points in lines.values() for t in points})
        panel.set_xticks(x, [f"{t / 1e9:.3g}B" if t >= 1e9 else f"{t / 1e6:.3g}M" for t in x], fontsize=8, rotation=45)
        panel.minorticks_off()
        finish(panel, title=f"{task}, {tokens(length)} tokens", xlabel="tokens trained on", ylim=(-0.03, 1.03))
    for panel in axes[:, 0]:
        panel.set_ylabel("exact match, worst to best cell")
    legend(figure, drawn)
    return figure


PICTURES = {"depth": draw_depth, "distance": draw_distance, "tasks": draw_tasks, "gain": draw_gain, "trend": draw_trend}


def names(directories: list[Path]) -> list[str]:
    """Each directory without what all begin and end with: logs/a/retrieval, logs/b/retrieval are a and b."""
    parts = [directory.resolve().parts for directory in directories]
    if len(parts) == 1:
        return [parts[0][-2] if parts[0][-1] == "retrieval" and len(parts[0]) > 2 else parts[0][-1]]
    while min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def split_seed(path: str) -> tuple[str, str | None]:
    """m_0/by_step/1000 is m/by_step/1000 and 0: a number behind an underscore, at the end of the first part that has one."""
    match = re.search(r"_(\d+)(?=/|$)", path)
    return (path[: match.start()] + path[match.end() :], match[1]) if match else (path, None)


def pool_seeds(models: dict, runs: dict) -> dict:
    """One model for all whose names differ in the seed alone: a row a cell, the mean, least and most of its seeds.

    ValueError where they differ in more than the seed, or one has cells or checkpoints that another has not: a mean over
    others at every point would rise and fall with who is there.
    """
    seeds, series = {}, {}  # model -> seed -> name; the parent of a run's checkpoints -> the seeds of each
    for name in models:
        model, seed = split_seed(name)
        seeds.setdefault(model, {})[seed] = name
        if split_seed(str(Path(name).parent))[1]:
            series.setdefault(Path(model).parent, {}).setdefault(model, set()).add(seed)
    for parent, checkpoints in series.items():
        if len(set(map(frozenset, checkpoints.values()))) > 1:
            raise ValueError(f"not all seeds of {parent} have the same checkpoints: draw them without --seeds")
    pooled = {}
    for model, by_seed in seeds.items():
        if None in by_seed and len(by_seed) > 1:
            raise ValueError(f"{model} has no seed in its name, others of that name have: name it otherwise")
        check_alike(model, {name: models[name] for name in by_seed.values()}, runs)
        cells = {}  # cell -> its rows
        for name in by_seed.values():
            for row in models[name]:
                cells.setdefault(cell_of(row), []).append(row)
        parent = dict(series=Path(model).parent) if Path(model).parent in series else {}
        pooled[f"{model}, {len(by_seed)} seed{'s' * (len(by_seed) > 1)}"] = [pool(rows) | parent for rows in cells.values()]
    return pooled


def cell_of(row: dict) -> tuple:
    return tuple(row[key] for key in ("task", "variant", "length", "low", "high"))


def check_alike(model: str, seeds: dict, runs: dict) -> None:
    """ValueError unless the seeds of a model differ in their seed alone: rows by name, and what their run.json say of them."""
    name, *others = seeds
    for other in others:
        differing = [key for key in ("train_length", "tokens_seen") if seeds[name][0].get(key) != seeds[other][0].get(key)]
        if runs[name] and runs[other]:
            differing += [key for key in COMMON if runs[name].get(key) != runs[other].get(key)]
        if set(map(cell_of, seeds[name])) != set(map(cell_of, seeds[other])):
            differing += ["cells"]
        if differing:
            raise ValueError(f"{name} and {other} are no seeds of one {model}, as they differ in {', '.join(differing)}: draw "
                             "them without --seeds")


def read_run(directory: Path) -> dict:
    """Of the run.json beside a summary.csv; nothing where there is none, or none that can be read."""
    try:
        run = json.loads((directory / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def pool(rows: list[dict]) -> dict:
    """Of one cell."""
    row = rows[0] | dict(n=sum(row["n"] for row in rows), seeds=len(rows))
    for key in ("exact_match", "nats", "context_gain"):
        if all(row[key] is not None for row in rows):
            values = [row[key] for row in rows]
            row |= {key: sum(values) / len(values), f"{key}_low": min(values), f"{key}_high": max(values)}
    return row


def draw(directories: list[Path], output: Path, seeds: bool = False) -> list[Path]:
    """Write all pictures into the directory `output`, `seeds` of a model as one; returns the PNGs."""
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ValueError("a directory is named twice")
    named = dict(zip(names(directories), directories, strict=True))
    models = {name: read_summary(directory) for name, directory in named.items()}
    if seeds:
        models = pool_seeds(models, {name: read_run(directory) for name, directory in named.items()})
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {output / f"retrieval_{picture}": make(plt, models) for picture, make in PICTURES.items()}
    figures = {path: figure for path, figure in figures.items() if figure is not None}
    output.mkdir(parents=True, exist_ok=True)
    save(figures, dpi=130)
    for figure in figures.values():
        plt.close(figure)
    return [Path(f"{path}.png") for path in figures]


def save(figures: dict, dpi: int) -> None:
    """Write figures, by path without suffix, as PNG and SVG. Where one of them cannot be written all old pictures stay."""
    partial = {}  # temporary file -> the picture that it becomes
    try:
        for path, figure in figures.items():
            for suffix in SUFFIXES:
                picture = Path(f"{path}{suffix}")
                temporary = picture.with_name(f".{picture.name}.{os.getpid()}.tmp")
                partial[temporary] = picture
                figure.savefig(temporary, format=suffix[1:], dpi=dpi)
        for temporary, picture in partial.items():
            os.replace(temporary, picture)
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="with a summary.csv")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the first directory)")
    parser.add_argument("--seeds", action="store_true", help="directories that differ in a number behind an underscore (m_0, "
                        "m_1) are seeds of one model, and are drawn as their mean, least and most")
    args = parser.parse_args()
    try:
        written = draw(args.directories, args.output or args.directories[0], args.seeds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{path} and .svg" for path in written))


if __name__ == "__main__":
    main()
