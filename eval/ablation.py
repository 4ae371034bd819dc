"""Compare the arms of one ablation.

    python eval/ablation.py logs/ablation

Reads DIR/arm_A, arm_B and arm_C (run directories), prints one table and writes it to DIR/ablation.json and
DIR/ablation.md. An arm that did not complete is shown as such, with the last line of its log; the table still stands.
"""

import argparse
import json
import math
import os
import sys
import textwrap
from pathlib import Path

ARMS = {"A": "spectral bias off", "B": "spectral bias on, pointer mask off", "C": "spectral bias and pointer mask on"}
METRICS = ("val_loss", "tokens_per_s", "step_ms", "kv_blocks_per_query", "peak_memory_gib")
MUST_AGREE = ("seed", "steps", "world_size", "device", "torch")  # or the arms do not compare, and a note says so
NEEDLE_MUST_AGREE = ("seq_len", "anchor_len", "value_len", "seed")
NEEDLE_NUMBERS = ("distance", "n", "exact_match", "exact_match_low", "exact_match_high")
ABSENT = "-"


def end_of_log(run_dir):
    """What the run's log says last, or None where there is no log."""
    try:
        lines = (run_dir / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return None
    last = next((line.strip() for line in reversed(lines) if line.strip()), None)
    return last and "its log ends with: " + textwrap.shorten(last, 200, placeholder=" ...")


def read_summary(run_dir, arm):
    """(summary dict or None, reason or None). NaN and infinities, which JSON does not know, become None."""
    try:
        text = (run_dir / "summary.json").read_bytes()
    except FileNotFoundError:
        return None, end_of_log(run_dir)
    except OSError as error:
        return None, f"summary.json: {error.strerror}"
    try:
        summary = json.loads(text, parse_constant=lambda name: None)
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        return None, "summary.json is not a JSON object"
    if summary.get("status") != "complete":
        return None, end_of_log(run_dir) or f"status {summary.get('status')}"
    if summary.get("arm") != arm:
        return None, f"summary.json is of arm {summary.get('arm')}"
    if wrong := [key for key in METRICS if not (summary.get(key) is None or is_number(summary[key]))]:
        return None, f"summary.json: {wrong[0]} is not a number"
    if not (summary.get("needle") is None or is_needle(summary["needle"])):
        return None, "summary.json: needle is not what the needle test gives"
    return summary, None


def is_number(value):
    return isinstance(value, int | float) and math.isfinite(value)


def is_needle(blob):
    """Whether it has all that the table takes from it."""
    try:
        return all(is_number(cell[key]) for cell in blob.get("distances", []) for key in NEEDLE_NUMBERS)
    except (AttributeError, KeyError, TypeError):
        return False


def read_arm(directory, arm):
    """Row of one arm: status (complete, failed or missing), reason, the metrics and the NEEDLE_EVAL blob or None."""
    run_dir = directory / f"arm_{arm}"
    row = {"arm": arm, "status": "missing", "reason": None, "needle": None}
    row |= dict.fromkeys(METRICS + MUST_AGREE)
    if run_dir.is_dir():
        summary, reason = read_summary(run_dir, arm)
        row |= {"status": "failed" if summary is None else "complete", "reason": reason}
        row |= {key: summary.get(key) for key in (*METRICS, *MUST_AGREE, "needle")} if summary else {}
    return row


def read_ablation(directory):
    """{"arms": rows in order A, B, C, each with its difference to A in validation loss, "differences": [str]}."""
    rows = [read_arm(directory, arm) for arm in ARMS]
    base = rows[0]["val_loss"]
    for row in rows:
        known = base is not None and row["val_loss"] is not None
        row["val_loss_minus_a"] = row["val_loss"] - base if known else None
    return {"arms": rows, "differences": differences(rows)}


def differences(rows):
    """One sentence for each setting that should be the same in all completed arms and is not."""
    complete = [row for row in rows if row["status"] == "complete"]
    tested = [row for row in complete if row["needle"]]
    found = [(key, {row["arm"]: row[key] for row in complete}) for key in MUST_AGREE]
    found += [(f"needle {key}", {row["arm"]: row["needle"].get(key) for row in tested}) for key in NEEDLE_MUST_AGREE]
    return [
        f"the arms differ in {key}: " + ", ".join(f"{arm} {value}" for arm, value in values.items())
        for key, values in found
        if len(set(map(str, values.values()))) > 1
    ]


def needle_cell(row, distance):
    """Exact matches of n, with the rate's 95% Wilson interval."""
    for cell in (row["needle"] or {}).get("distances", []):
        if cell["distance"] == distance:
            hits = round(cell["exact_match"] * cell["n"])
            return f"{hits}/{cell['n']} [{cell['exact_match_low']:.2f}, {cell['exact_match_high']:.2f}]"
    return ABSENT


def table_lines(rows):
    """The table as lists of cells, first the header. Arms are columns, so that any number of distances stays narrow."""

    def line(label, key, form):
        return [label, *(ABSENT if row[key] is None else format(row[key], form) for row in rows)]

    distances = sorted({cell["distance"] for row in rows if row["needle"] for cell in row["needle"]["distances"]})
    return [
        line("arm", "arm", ""),
        line("status", "status", ""),
        line("val loss", "val_loss", ".4f"),
        line("difference to A", "val_loss_minus_a", "+.4f"),
        *([f"needle EM at {d:,}", *(needle_cell(row, d) for row in rows)] for d in distances),
        line("tokens/s", "tokens_per_s", ",.0f"),
        line("step ms", "step_ms", ",.1f"),
        line("KV blocks per query", "kv_blocks_per_query", ".2f"),
        line("peak memory GiB", "peak_memory_gib", ".2f"),
    ]


def notes(ablation):
    """Sentences that belong under the table."""
    rows = ablation["arms"]
    return [
        *(f"{row['arm']} {row['status']}: {row['reason']}" for row in rows if row["reason"]),
        *ablation["differences"],
        "; ".join(f"{arm} = {meaning}" for arm, meaning in ARMS.items()) + ".",
        "Needle EM: exact matches of n, 95% Wilson interval. One seed an arm: small differences in loss are noise.",
    ]


def as_text(ablation):
    lines = table_lines(ablation["arms"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:], "", *notes(ablation)]) + "\n"


def as_markdown(ablation):
    header, *lines = ["| " + " | ".join(line) + " |" for line in table_lines(ablation["arms"])]
    rule = "| --- |" + " ---: |" * len(ablation["arms"])
    bullets = ["- " + note.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_") for note in notes(ablation)]
    return "\n".join([header, rule, *lines, "", *bullets]) + "\n"


def write_atomically(path, text):
    """Whole new file or the old one, whatever happens in between."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Table of the arms of one ablation, from their summary.json.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds the run directories arm_A, arm_B, arm_C")
    directory = parser.parse_args().directory
    if not directory.is_dir():
        sys.exit(f"error: {directory}: no such directory; give the one that holds arm_A, arm_B, arm_C")
    ablation = read_ablation(directory)
    try:
        write_atomically(directory / "ablation.json", json.dumps(ablation, indent=2, allow_nan=False) + "\n")
        write_atomically(directory / "ablation.md", as_markdown(ablation))
    except OSError as error:
        sys.exit(f"error: {directory}: cannot write the table: {error.strerror}")
    print(as_text(ablation), end="")


if __name__ == "__main__":
    main()
