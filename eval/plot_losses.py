"""Draw the loss curves of the runs in a directory from their metrics.jsonl.

    python eval/plot_losses.py logs/ablation                 # every sub-directory that holds a metrics.jsonl is one line
    python eval/plot_losses.py logs/ablation --output loss   # writes loss.png and loss.svg

Left: training loss, averaged over 10 steps, and validation loss as dots. Middle: the same less that of the first run, where
both have the step. Right: milliseconds a step.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.plot_retrieval import SUFFIXES, save
from lifecycle import parse_lines

SMOOTHING = 10  # steps
BESIDE = {"train_loss": ("step", "step_ms"), "val_loss": ("step",)}  # numbers that a record has beside its loss


def read_runs(directory: Path) -> dict[str, list[dict]]:
    """Records of every run below `directory` that has some, by name; ValueError if there is none."""
    paths = sorted(directory.glob("*/metrics.jsonl"))
    if not paths:
        raise ValueError(f"{directory}: no run below it holds a metrics.jsonl")
    runs = {path.parent.name: records for path in paths if (records := read_records(path))}
    if not runs:
        raise ValueError(f"{directory}: no metrics.jsonl below it holds a loss: let a run take its first steps")
    return runs


def read_records(path: Path) -> list[dict]:
    """Those with a loss. A line that is no JSON is left out, as a killed run may end with one."""
    records = []
    for number, record in parse_lines(path.read_bytes()):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is no record: take it out")
        losses = [name for name in BESIDE if name in record]
        for name in (name for loss in losses for name in (loss, *BESIDE[loss])):
            if not isinstance(record.get(name), int | float):
                raise ValueError(f"{path}, line {number}: {name} is not a number: take the line out")
        if losses:
            records.append(record)
    return records


def smooth(values: list[float]) -> list[float]:
    """Mean of each value and up to SMOOTHING - 1 before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values)))]


def draw(runs: dict[str, list[dict]], output: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    first = None
    for name, records in runs.items():
        steps = [r for r in records if "train_loss" in r]
        x = [r["step"] for r in steps]
        train = dict(zip(x, smooth([r["train_loss"] for r in steps]), strict=True))
        val = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
        first = first or (train, val)
        (line,) = left.plot(x, train.values(), linewidth=1, label=name)
        left.plot(val.keys(), val.values(), "o", color=line.get_color(), markersize=4)
        for values, base, style in ((train, first[0], "-"), (val, first[1], "o")):
            shared = [step for step in values if step in base]
            middle.plot(shared, [values[step] - base[step] for step in shared], style, color=line.get_color(), linewidth=1,
                        markersize=4)
        right.plot(x, [r["step_ms"] for r in steps], linewidth=1, color=line.get_color())
    left.set(xlabel="step", ylabel="nats per token", title=f"training loss (mean of {SMOOTHING}), validation (dots)")
    middle.set(xlabel="step", ylabel="nats per token", title=f"loss less that of {next(iter(runs))}")
    right.set(xlabel="step", ylabel="ms per step", title="step time", ylim=(0, None))
    left.legend()
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    save({output: figure}, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output", type=Path, help="path without suffix (default: DIRECTORY/loss)")
    args = parser.parse_args()
    output = args.output or args.directory / "loss"
    try:
        draw(read_runs(args.directory), output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(" and ".join(f"{output}{suffix}" for suffix in SUFFIXES))


if __name__ == "__main__":
    main()
