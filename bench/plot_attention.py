"""Draw the time of one layer's attention against the length, log-log, from the JSON of bench/attention.py.

    python bench/plot_attention.py attention.json [more.json ...] [--output attention.png]

One panel a pass. Several files are drawn as one: a later row replaces an earlier one of the same variant, pass and length.
Dashed grey guides show the slopes of dense attention (time as the square of the length) and of ours (time as the length),
drawn below them.
"""

import argparse
import json
import math
import sys
from pathlib import Path

PASSES = ("forward", "forward+backward")
# Label, colour (Okabe & Ito: told apart by the colour-blind), line and marker of each variant; what is not here is grey.
STYLES = {
    "triton": ("ours, with bias", "#0072B2", "-", "o"),
    "triton_fold": ("ours, bias folded", "#56B4E9", "-", "s"),
    "triton_nobias": ("ours, no bias", "#0072B2", "--", "o"),
    "content": ("ours, content pointers", "#CC3311", "-", "h"),
    "content_again": ("ours, content, codes read twice", "#882255", "-", "^"),
    "content_values": ("ours, content, no copies", "#EE7733", "-", "h"),
    "content_shared": ("ours, content, all heads", "#CC3311", "-.", "h"),
    "content_exact": ("ours, all tokens searched", "#CC3311", "--", "h"),
    "flex_append": ("Flex, bias appended", "#D55E00", "-", "^"),
    "flex_fold": ("Flex, bias folded", "#E69F00", "-", "^"),
    "flex_nobias": ("Flex, no bias", "#D55E00", "--", "^"),
    "flex_window": ("Flex, window of 14 blocks", "#009E73", "-", "v"),
    "dense_cudnn": ("dense, cuDNN", "#000000", "-", "D"),
    "dense_flash": ("dense, FlashAttention-2", "#000000", "--", "D"),
    "nsa": ("NSA (fla)", "#CC79A7", "-", "P"),
    "moba": ("MoBA (fla)", "#CC79A7", "--", "X"),
    "flash_4": ("FlashAttention-4, blocks", "#009E73", "--", "*"),
}
GUIDE_OFFSET = 0.3
LEAST_GAP = 0.04  # between two labels, as a share of the panel's height


def read_curves(paths: list[Path]) -> dict[str, dict[str, dict[int, float]]]:
    """Milliseconds by pass, variant and length; ValueError if there is none."""
    curves = {which: {} for which in PASSES}
    for path in paths:
        try:
            rows = json.loads(path.read_text())["rows"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}: not the JSON of bench/attention.py") from None
        for row in rows:
            if "ms" in row:
                curves[row["pass"]].setdefault(row["variant"], {})[row["tokens"]] = row["ms"]
    if not any(curves.values()):
        raise ValueError(f"{', '.join(map(str, paths))}: no row holds a time")
    return curves


def spread_out(heights: list[float], gap: float) -> list[float]:
    """The nearest heights in the same order that are at least `gap` apart: isotonic regression of height - rank * gap."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    pools = []  # (mean, size) of neighbours that touch
    for rank, i in enumerate(order):
        mean, size = heights[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    placed = iter(mean for mean, size in pools for _ in range(size))
    result = [0.0] * len(heights)
    for rank, i in enumerate(order):
        result[i] = next(placed) + rank * gap
    return result


def milliseconds(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def draw_panel(axes, which: str, curves: dict[str, dict[int, float]]) -> None:
    lengths = sorted({T for curve in curves.values() for T in curve})
    known = [v for v in STYLES if v in curves] + [v for v in curves if v not in STYLES]
    ends = []
    for variant in known:
        label, colour, line, marker = STYLES.get(variant, (variant, "#777777", "-", "."))
        x = sorted(curves[variant])
        axes.plot(x, [curves[variant][T] for T in x], line, color=colour, marker=marker, markersize=5, linewidth=1.6)
        ends.append((x[-1], curves[variant][x[-1]], label, colour))
    axes.set(xscale="log", yscale="log", title=which, xlabel="tokens", ylabel="ms")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    low, high = (f(t for curve in curves.values() for t in curve.values()) for f in (min, max))
    axes.set_ylim(low / 3, high * 1.6)
    axes.set_xticks(lengths, [f"{T // 1024}k" if T < 2**20 else f"{T / 2**20:g}M" for T in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.25)

    for variant, power, text in (("dense_cudnn", 2, "quadratic"), ("triton", 1, "linear")):
        if variant in curves and len(lengths) > 1:
            start = min(curves[variant])
            y = [GUIDE_OFFSET * curves[variant][start] * (T / start) ** power for T in lengths]
            axes.plot(lengths, y, linestyle=(0, (6, 4)), color="#999999", linewidth=1, zorder=1)
            axes.annotate(text, (math.sqrt(lengths[-2] * lengths[-1]), math.sqrt(y[-2] * y[-1])), xytext=(4, -4),
                          textcoords="offset points", va="top", fontsize=8, color="#777777")

    bottom, top = (math.log(y) for y in axes.get_ylim())
    shares = spread_out([(math.log(ms) - bottom) / (top - bottom) for _, ms, _, _ in ends], LEAST_GAP)
    for (T, ms, label, colour), share in zip(ends, shares, strict=True):
        axes.annotate(f"{label}  {milliseconds(ms)}" + ("" if T == lengths[-1] else f" at {T // 1024:,}k"), (T, ms),
                      xytext=(1.06, share), textcoords="axes fraction", va="center", fontsize=8, color=colour,
                      annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.5, alpha=0.6, relpos=(0, 0.5)))


def draw(curves: dict[str, dict[str, dict[int, float]]], output: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [which for which in PASSES if curves[which]]
    figure, panels = plt.subplots(1, len(shown), figsize=(7.5 * len(shown), 5.5), squeeze=False, layout="constrained")
    for axes, which in zip(panels[0], shown, strict=True):
        draw_panel(axes, which, curves[which])
    figure.savefig(output, dpi=140)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="picture (default: the first file with the suffix .png)")
    args = parser.parse_args()
    output = args.output or args.json[0].with_suffix(".png")
    try:
        draw(read_curves(args.json), output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(output)


if __name__ == "__main__":
    main()
