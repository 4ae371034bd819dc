"""The loss plot: reads metrics.jsonl, writes both pictures, refuses an empty directory in one line."""

import json
import subprocess
import sys

import pytest

from eval.plot_losses import SMOOTHING, smooth


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
