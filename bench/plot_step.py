"""Draw where an optimizer step goes, component by component, from the JSON files of bench/step.py.

    python bench/plot_step.py step_A.json step_C.json [--output step.png]

Above: the whole step of each file as one stacked bar. Below: milliseconds of every component, one bar a file; the tick on a
bar is the floor of arithmetic and memory.
"""

import argparse
import json
import sys
from pathlib import Path

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe & Ito, of the files
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#999999")  # of neighbouring segments
LABELLED = 0.03  # share of the longest step from which a segment is wide enough for its name


def read_steps(paths: list[Path]) -> list[dict]:
    """The results, arms named; ValueError for another file."""
    steps = []
    for path in paths:
        try:
            step = json.loads(path.read_text())
            step["label"] = f"{step['arm']} ({path.stem}): {step['step_ms']:,.0f} ms"
            assert step["components"]
        except (json.JSONDecodeError, KeyError, TypeError, AssertionError):
            raise ValueError(f"{path}: not the JSON of bench/step.py") from None
        steps.append(step)
    return steps


def draw_stacks(axes, steps: list[dict]) -> None:
    longest = max(step["step_ms"] for step in steps)
    for row, step in enumerate(steps):
        left = 0.0
        for i, c in enumerate(step["components"]):
            axes.barh(row, c["ms"], left=left, color=SHADES[i % len(SHADES)], edgecolor="white", linewidth=0.8)
            if c["ms"] >= LABELLED * longest:
                axes.text(left + c["ms"] / 2, row, f"{c['component'].replace(' ', chr(10))}\n{c['ms']:.0f}", ha="center",
                          va="center", fontsize=6.5)
            left += c["ms"]
    axes.set_yticks(range(len(steps)), [step["label"] for step in steps])
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")


def draw_components(axes, steps: list[dict]) -> None:
    names = list(dict.fromkeys(c["component"] for step in steps for c in step["components"]))  # an older step lacks some
    height = 0.8 / len(steps)
    for i, step in enumerate(steps):
        of = dict.fromkeys(names, dict(ms=0.0, floor_ms=None)) | {c["component"]: c for c in step["components"]}
        y = [row + (i - (len(steps) - 1) / 2) * height for row in range(len(names))]
        axes.barh(y, [of[name]["ms"] for name in names], height, color=COLOURS[i % len(COLOURS)], label=step["label"])
        for name, at in zip(names, y, strict=True):
            if of[name]["floor_ms"]:
                axes.vlines(of[name]["floor_ms"], at - height / 2, at + height / 2, color="black", linewidth=2)
            axes.text(of[name]["ms"], at, f" {of[name]['ms']:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step; black tick: floor")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(axis="x", alpha=0.25)


def draw(steps: list[dict], output: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 3 + len(steps) + 4), layout="constrained",
                                          height_ratios=[0.6 + len(steps), 3 + 1.5 * len(steps)])
    draw_stacks(above, steps)
    draw_components(below, steps)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="picture (default: the first file with the suffix .png)")
    args = parser.parse_args()
    output = args.output or args.json[0].with_suffix(".png")
    try:
        draw(read_steps(args.json), output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(output)


if __name__ == "__main__":
    main()
