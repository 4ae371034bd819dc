"""The pictures: what they show, that bad input is refused in one line, and that all of them are written or none.

Also the refusals of the ablation's table, which reads what a run leaves behind in the same way.
"""

import contextlib
import json
import subprocess
import sys

import pytest

from eval import plot_retrieval
from eval.ablation import read_ablation
from eval.plot_losses import SMOOTHING, draw, smooth
from eval.retrieval import COLUMNS, csv_text


def test_smoothing_is_a_trailing_mean():
    values = [float(i * i) for i in range(2 * SMOOTHING)]
    assert smooth(values)[0] == 0 and smooth(values)[3] == (0 + 1 + 4 + 9) / 4
    assert smooth(values)[-1] == sum(values[-SMOOTHING:]) / SMOOTHING


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    for arm in "AC":
        (tmp_path / f"arm_{arm}").mkdir()
        records = [dict(step=i, train_loss=10 - i / 9, step_ms=100 + i) for i in range(1, 9)] + [dict(step=8, val_loss=9.0)]
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (tmp_path / f"arm_{arm}" / "metrics.jsonl").write_text(lines + '{"step": 9, "train_lo')  # of a killed run
    done = subprocess.run([sys.executable, "eval/plot_losses.py", tmp_path, "--output", tmp_path / "v1.5"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "v1.5.png").read_bytes().startswith(b"\x89PNG")
    assert "arm_C" in (tmp_path / "v1.5.svg").read_text()


def test_empty_directory_is_refused(tmp_path):
    done = subprocess.run([sys.executable, "eval/plot_losses.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1


def refusal(*arguments) -> str:
    """The one line with which a script refuses."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "", done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture
def full_disk(plt, monkeypatch):
    """In `with full_disk(at=n)` the n-th picture cannot be written."""

    @contextlib.contextmanager
    def context(at):
        written, savefig = [], plt.Figure.savefig

        def save(figure, path, **options):
            savefig(figure, path, **options)
            written.append(path)
            if len(written) == at:
                raise OSError("disk full")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(plt.Figure, "savefig", save)
            yield

    return context


def test_both_pictures_of_the_losses_are_replaced_or_none(tmp_path, full_disk):
    (tmp_path / "loss.png").write_text("old")
    with full_disk(at=2):
        draw({"run": [STEP]}, tmp_path / "loss")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"] and (tmp_path / "loss.png").read_text() == "old"


STEP = dict(step=1, train_loss=10.0, step_ms=100.0)


@pytest.mark.parametrize("record, part", [
    (5, "line 2 is no record"),
    (STEP | dict(train_loss="abc"), "line 2: train_loss is not a number"),
    (dict(step=1, train_loss=10.0), "line 2: step_ms is not a number"),
    (dict(val_loss=10.0), "line 2: step is not a number"),
])
def test_a_damaged_record_of_a_run_is_refused(tmp_path, record, part):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(STEP) + "\n" + json.dumps(record) + "\n")
    line = refusal("eval/plot_losses.py", tmp_path)
    assert f"{tmp_path / 'run/metrics.jsonl'}, {part}" in line and "out" in line


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\xff\n", b'{"step": 1, "train_lo', b'{"step": 1}\n'])
def test_runs_without_a_loss_are_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_bytes(content)
    assert "no metrics.jsonl below it holds a loss" in refusal("eval/plot_losses.py", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


CELL = dict(distance=4096, n=8, exact_match=0.5, exact_match_low=0.2, exact_match_high=0.8)


@pytest.mark.parametrize("damage, reason", [
    (dict(val_loss="abc"), "summary.json: val_loss is not a number"),
    (dict(step_ms=[]), "summary.json: step_ms is not a number"),
    (dict(needle=5), "summary.json: needle is not what the needle test gives"),
    (dict(needle=dict(distances=[CELL | dict(n="8")])), "summary.json: needle is not what the needle test gives"),
    (dict(needle=dict(distances=[dict(distance=4096)])), "summary.json: needle is not what the needle test gives"),
    (dict(val_loss=None, needle=dict(distances=[CELL])), None),
])
def test_a_damaged_summary_of_an_arm_is_its_reason(tmp_path, damage, reason):
    (tmp_path / "arm_A").mkdir()
    (tmp_path / "arm_A/summary.json").write_text(json.dumps(dict(status="complete", arm="A", val_loss=3.0) | damage))
    row = read_ablation(tmp_path)["arms"][0]
    assert (row["status"], row["reason"]) == ("failed" if reason else "complete", reason)
    done = subprocess.run([sys.executable, "eval/ablation.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and (reason or "complete") in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of a retrieval evaluation


def needle_row(task="multikey", variant="3 distractors", length=2048, **others) -> dict:
    return dict(task=task, variant=variant, length=length, low=3, high=3, n=8, contexts=8, texts=2, stitched=0, exact_match=0.5,
                exact_match_low=0.2, exact_match_high=0.8, first_token_accuracy=0.5, token_accuracy=0.5, nats=1.5,
                retrieval_gain_n=0, chance=0.25, train_length=512, tokens_seen=3072) | others


def gain_row(context, gain, error, texts, whose="own") -> dict:
    return dict(task="gain", variant=f"{whose} {context}", length=4096, low=context, high=context, n=8, contexts=8, texts=texts,
                stitched=0, token_accuracy=0.5, nats=1.5, context_gain=gain, context_gain_se=error, train_length=512)


def write_summary(directory, rows, content=None):
    directory.mkdir(exist_ok=True)
    (directory / "summary.csv").write_bytes(csv_text(rows).encode() if content is None else content)
    return directory


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042),
                                        (120, 1.980), (10**9, 1.962)])
def test_quantiles_of_students_t(freedom, t):
    assert plot_retrieval.t_quantile(freedom) == pytest.approx(t, abs=5e-4)


def bars(panel) -> list[list[float]]:
    """Half the heights of the bars of every line, in which a point without one is left out."""
    return [[(bar[1][1] - bar[0][1]) / 2 for bar in container.lines[2][0].get_segments() if len(bar)]
            for container in panel.containers]


@pytest.mark.parametrize("texts, t", [(2, 12.706), (6, 2.571)])
def test_bars_of_the_context_gain_count_the_texts(tmp_path, plt, texts, t):
    rows = [gain_row(1024, 0.0, 0.0, texts), gain_row(4096, 0.03, 0.01, texts), gain_row(4096, 0.01, 0.002, texts, "other")]
    models = {"run": plot_retrieval.read_summary(write_summary(tmp_path / "run", rows))}
    (panel,) = plot_retrieval.draw_gain(plt, models).axes
    assert bars(panel) == [pytest.approx([0, 0.01 * t], rel=1e-3), pytest.approx([0, 0.002 * t], rel=1e-3)]
    assert panel.get_title() == f"n = 8 targets of {texts} texts"


def test_one_text_has_no_bar_and_the_picture_says_so(tmp_path, plt):
    one = write_summary(tmp_path / "one", [gain_row(1024, 0.0, None, 1), gain_row(4096, 0.03, None, 1)])
    two = write_summary(tmp_path / "two", [gain_row(1024, 0.0, 0.0, 2), gain_row(4096, 0.03, 0.01, 2)])
    models = {path.name: plot_retrieval.read_summary(path) for path in (one, two)}
    (panel,) = plot_retrieval.draw_gain(plt, models).axes
    assert bars(panel) == [[], pytest.approx([0, 0.12706], rel=1e-3)]
    assert panel.get_title() == "n = 8 targets of 1 to 2 texts\nno bar where all are of one text: it has no interval"
    (alone,) = plot_retrieval.draw_gain(plt, {"one": models["one"][:1]}).axes  # the base context only: a point
    assert alone.get_title().startswith("n = 8 targets of 1 text\n") and len(alone.containers) == 1


def test_every_panel_of_the_tasks_tells_its_lengths(tmp_path, plt):
    """And the training length, without which a task of one length would have a bare axis."""
    rows = [needle_row(variant=f"{n} distractors") for n in range(1, 5)]
    rows += [needle_row("tracking", "1 hop", length) for length in (1024, 4096)]
    models = {"run": plot_retrieval.read_summary(write_summary(tmp_path / "run", rows))}
    figure = plot_retrieval.draw_tasks(plt, models)
    figure.canvas.draw()
    shown = [[label.get_text() for label in panel.get_xticklabels() if label.get_visible()] for panel in figure.axes[:5]]
    assert shown == [["512", "2k"]] * 4 + [["512", "1k", "4k"]]


def write_all(directory, summaries) -> list:
    """The directories of {name: rows}, with a run.json where the rows are (rows, run)."""
    for name, rows in summaries.items():
        (directory / name).mkdir(parents=True)
        if isinstance(rows, tuple):
            rows, run = rows
            (directory / name / "run.json").write_text(json.dumps(run))
        write_summary(directory / name, rows)
    return [directory / name for name in summaries]


def test_seeds_of_a_model_are_one_line_from_their_least_to_their_most(tmp_path, plt):
    rows = {f"m_{seed}/retrieval": [needle_row(exact_match=share, nats=share), gain_row(1024, 0.0, 0.0, 1),
                                    gain_row(4096, share / 10, 0.01, 1)] for seed, share in enumerate((0.2, 0.9, 0.4))}
    directories = write_all(tmp_path, rows | {"other/retrieval": [needle_row(exact_match=0.6)]})
    read = dict(zip(plot_retrieval.names(directories), map(plot_retrieval.read_summary, directories), strict=True))
    models = plot_retrieval.pool_seeds(read, {name: {} for name in read})
    assert list(models) == ["m, 3 seeds", "other, 1 seed"]
    pooled, gain_base, gain = models["m, 3 seeds"]
    assert (pooled["exact_match"], pooled["exact_match_low"], pooled["exact_match_high"]) == (pytest.approx(0.5), 0.2, 0.9)
    assert (pooled["nats"], pooled["n"]) == (pytest.approx(0.5), 24)
    assert plot_retrieval.gain_bar(gain) == (pytest.approx(0.03), pytest.approx(0.04))
    assert plot_retrieval.gain_bar(gain_base) == (0, 0)
    assert read["m_0"][0]["exact_match"] == 0.2, "what was read stays as it was"
    (panel,) = plot_retrieval.draw_gain(plt, models).axes
    assert bars(panel) == [pytest.approx([0, 0.035])] and "no bar" not in panel.get_title()
    written = plot_retrieval.draw(directories, tmp_path / "out", seeds=True)
    assert [path.name for path in written] == ["retrieval_tasks.png", "retrieval_gain.png"]


def test_the_trend_of_seeds_reaches_from_the_worst_cell_of_all_to_the_best(tmp_path, plt):
    steps = {f"m_{seed}/by_step/{step}": [needle_row(exact_match=share + step / 10_000, tokens_seen=step),
                                          needle_row(variant="15 distractors", exact_match=share, tokens_seen=step)]
             for seed, share in enumerate((0.1, 0.9)) for step in (1000, 2000)}
    directories = write_all(tmp_path / "not_a_seed_7", steps)
    read = dict(zip(plot_retrieval.names(directories), map(plot_retrieval.read_summary, directories), strict=True))
    (panel,) = plot_retrieval.draw_trend(plt, plot_retrieval.pool_seeds(read, {name: {} for name in read})).axes
    (line,), (band,) = panel.lines, panel.collections
    assert line.get_ydata() == pytest.approx([0.55, 0.6]) and panel.get_legend_handles_labels()[1] == ["by_step"]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(0.1), pytest.approx(1.1))


@pytest.mark.parametrize("name, parts", [("m_0", ("m", "0")), ("m_12/by_step/1000", ("m/by_step/1000", "12")),
                                         ("m", ("m", None)),
                                         ("m_s_1/retrieval_2", ("m_s/retrieval_2", "1")), ("m_2_a", ("m_2_a", None)),
                                         ("a/step_10k", ("a/step_10k", None))])
def test_the_first_number_at_the_end_of_a_part_is_the_seed(name, parts):
    assert plot_retrieval.split_seed(name) == parts


@pytest.mark.parametrize("summaries, reason", [
    ({"m_0": [needle_row(tokens_seen=1000)], "m_1": [needle_row(tokens_seen=2000)]},
     "m_0 and m_1 are no seeds of one m, as they differ in tokens_seen"),
    ({"m_0": [needle_row(), needle_row(length=4096)], "m_1": [needle_row()]}, "differ in cells"),
    ({"m_0": ([needle_row()], dict(seed=0, arm="A")), "m_1": ([needle_row()], dict(seed=1, arm="C"))}, "differ in seed, arm"),
    ({"m": [needle_row()], "m_0": [needle_row()]}, "m has no seed in its name"),
    ({"m_0/1k": [needle_row()], "m_1/1k": [needle_row()], "m_0/2k": [needle_row(tokens_seen=9999)]},
     "not all seeds of m have the same checkpoints"),
])
def test_what_are_no_seeds_of_one_model_is_refused(tmp_path, summaries, reason):
    refused = refusal("eval/plot_retrieval.py", *write_all(tmp_path, summaries), "--seeds", "--output", tmp_path / "out")
    assert reason in refused and not (tmp_path / "out").exists()


GOOD = csv_text([needle_row(), gain_row(1024, 0.0, 0.0, 2)]).encode()


def changed(line, column, text) -> bytes:
    """The good file with another text in one cell."""
    lines = [row.split(b",") for row in GOOD.splitlines()]
    lines[line - 1][COLUMNS.index(column)] = text
    return b"".join(b",".join(row) + b"\n" for row in lines)


@pytest.mark.parametrize("content, parts", [
    (GOOD[:-40], ["line 3", "cut"]),
    (GOOD[:-1], ["line 3", "cut"]),
    (GOOD.replace(b",nats,", b",").replace(b",chance,", b","), ["line 1", "lacks nats, chance"]),
    (GOOD.replace(b"3 distractors", b"3 dis\0tractors"), ["line 2", "NUL"]),
    (GOOD.replace(b"3 distractors", b'"3 distractors'), ["line 2"]),
    (GOOD[:-1] + b",7\n", ["line 3", "24 fields", "23"]),
    (GOOD + GOOD, ["line 4", "length is 'length'"]),
    (changed(2, "exact_match", b""), ["line 2", "exact_match must not be empty"]),
    (changed(2, "task", b""), ["line 2", "task must not be empty"]),
    (changed(2, "train_length", b""), ["line 2", "train_length must not be empty"]),
    (changed(3, "context_gain", b""), ["line 3", "context_gain must not be empty"]),
    (changed(3, "context_gain_se", b""), ["line 3", "context_gain_se must not be empty"]),
    (changed(2, "nats", b"abc"), ["line 2", "nats is 'abc', which is not a finite number"]),
    (changed(2, "exact_match_low", b"nan"), ["line 2", "exact_match_low is 'nan', which is not a finite number"]),
    (changed(2, "length", b"0"), ["line 2", "length is 0, which is below 1"]),
    (changed(3, "context_gain_se", b"-1"), ["line 3", "context_gain_se is -1, which is below 0"]),
    (b"\x89PNG\r\n\x1a\n", ["line 1", "not text"]),
    (b'[{"task": "single"}]\n', ["line 1", "lacks task, variant"]),
    (csv_text([needle_row("flying")]).encode(), ["nothing to draw", "single", "gain"]),
    (b"", ["no rows"]),
    (csv_text([]).encode(), ["no rows"]),
])
def test_a_damaged_summary_is_refused(tmp_path, content, parts):
    with pytest.raises(ValueError) as refused:
        plot_retrieval.read_summary(write_summary(tmp_path / "run", [], content))
    line = str(refused.value)
    assert str(tmp_path / "run/summary.csv") in line and "\n" not in line and "eval/retrieval.py" in line
    assert all(part in line for part in parts), line


def test_what_may_be_empty_and_the_tasks_to_come_are_read(tmp_path):
    rows = [needle_row(), needle_row("flying", exact_match=None), gain_row(1024, -0.5, None, 1)]
    read = plot_retrieval.read_summary(write_summary(tmp_path / "run", [], csv_text(rows).replace("\n", "\r\n").encode()))
    assert [row["task"] for row in read] == ["multikey", "flying", "gain"]
    assert read[0]["retrieval_gain"] is None and read[2]["context_gain"] == -0.5 and read[2]["context_gain_se"] is None


def test_a_refused_summary_leaves_nothing_behind(tmp_path):
    run = write_summary(tmp_path / "run", [], GOOD[:-40])
    assert f"{run / 'summary.csv'}, line 3: it is cut" in refusal("eval/plot_retrieval.py", run, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() and [path.name for path in run.iterdir()] == ["summary.csv"]


def test_pictures_are_replaced_all_or_none(tmp_path, full_disk):
    """The last of them cannot be written: the old ones stay, and no temporary file."""
    run = write_summary(tmp_path / "run", [needle_row(), gain_row(1024, 0.0, 0.0, 2)])
    pictures = [f"retrieval_{kind}{suffix}" for kind in ("tasks", "gain") for suffix in plot_retrieval.SUFFIXES]
    for name in pictures:
        (run / name).write_text("old")
    with full_disk(at=4):
        plot_retrieval.draw([run], run)
    assert sorted(path.name for path in run.iterdir()) == sorted(["summary.csv", *pictures])
    assert all((run / name).read_text() == "old" for name in pictures)

    assert plot_retrieval.draw([run], run) == [run / "retrieval_tasks.png", run / "retrieval_gain.png"]
    assert sorted(path.name for path in run.iterdir()) == sorted(["summary.csv", *pictures])
    assert (run / "retrieval_tasks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (run / "retrieval_gain.svg").read_text()
