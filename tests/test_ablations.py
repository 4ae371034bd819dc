"""run_ablations.sh and eval/ablation.py, driven with a small stand-in for the training script."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.ablation import as_markdown, as_text, read_ablation

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "run_ablations.sh"
ARM_VARIABLES = ("SPECTRAL_BIAS", "SPECTRAL_USE_POINTER_MASK", "SPECTRAL_POINTER_SCHEDULE")

# Does in each arm what MODE_X says, and leaves behind what it was started with.
STAND_IN = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(os.environ["LOG_DIR"], os.environ["RUN_NAME"])
arm = os.environ["RUN_NAME"][-1]
mode = os.environ.get("MODE_" + arm, "ok")
if mode == "refuse":
    sys.exit("error: refused before there is a run directory")
run.mkdir(parents=True, exist_ok=True)
with open(run / "starts.jsonl", "a") as file:
    file.write(json.dumps(dict(os.environ)) + "\\n")
with open(run / "log.txt", "a") as file:
    file.write(f"step 1/2 loss 5.0\\nmode {mode} of arm {arm}\\n\\n")
if mode == "fail":
    sys.exit(3)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if mode in ("hang", "deaf"):
    (run / "pid").write_text(str(os.getpid()))
    time.sleep(60)
if mode != "silent":
    summary = dict(status="complete", arm=arm, val_loss=3.0 + ord(arm) / 1000, seed=1, steps=2, needle=None)
    (run / "summary.json").write_text(json.dumps(summary))
"""

# Records how it was called, then leaves out the launcher's arguments: torchrun without torch.
STAND_IN_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
if [[ $1 == -m ]]; then shift 4; fi
exec "$REAL_PYTHON" "$@"
"""


class Ablation:
    """A working directory with the stand-in, and the environment to run the ablation in."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "train.py").write_text(STAND_IN)
        (folder / "bin").mkdir()
        own = (*ARM_VARIABLES, "LOG_DIR", "ARMS", "RUN_NAME", "RESUME", "NEEDLE_EVAL", "SEED", "CUDA_VISIBLE_DEVICES")
        self.environment = {key: value for key, value in os.environ.items() if key not in own} | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SCRIPT": str(folder / "train.py"),
            "LOG_DIR": "my logs",
            "ABLATION_NAME": "abl",
            "NPROC": "1",
        }
        self.runs = folder / "my logs" / "abl"

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def start(self, *arguments, **environment):
        everything = {k: v for k, v in (self.environment | environment).items() if v is not None}
        # Signals as in a terminal, even when the tests run in the background, where bash could not trap an ignored one.
        return subprocess.Popen(
            ["env", "--default-signal", RUNNER, *arguments],
            cwd=self.folder,
            env=everything,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, **environment):
        process = self.start(*arguments, **environment)
        process.out, process.err = process.communicate(timeout=30)
        return process

    def starts(self, arm):
        """The environments of the times that the arm was started."""
        path = self.runs / f"arm_{arm}" / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def table(self):
        rows = json.loads((self.runs / "ablation.json").read_text())["arms"]
        return {row["arm"]: row for row in rows}


@pytest.fixture
def ablation(tmp_path):
    return Ablation(tmp_path)


def wait_for_pid(path, seconds=20):
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
    return int(path.read_text())


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arms_are_what_they_are_called_whatever_the_environment_says(ablation):
    leak = dict.fromkeys(ARM_VARIABLES, "1") | {"RUN_NAME": "mine", "RESUME": "0", "SAVE_CHECKPOINT": "0"}
    passed = {
        "NUM_ITERATIONS": "12",
        "VAL_TOKENS": "1024",
        "VAL_LOSS_EVERY": "6",
        "SEED": "5",
        "SPECTRAL_IMPL": "score_mod",
    }
    assert ablation.run(**leak, **passed).returncode == 0
    definitions = {"A": "000", "B": "100", "C": "111"}
    for arm, definition in definitions.items():
        (environment,) = ablation.starts(arm)
        assert "".join(environment[name] for name in ARM_VARIABLES) == definition
        expected = {"RUN_NAME": f"arm_{arm}", "RESUME": "auto", "SAVE_CHECKPOINT": "1", "NEEDLE_EVAL": "1", **passed}
        expected["SCOPE_LOG_EVERY"] = "200"
        assert {name: environment[name] for name in expected} == expected


def test_defaults_give_way(ablation):
    assert ablation.run(ARMS="A", NEEDLE_EVAL="0", SCOPE_LOG_EVERY="7").returncode == 0
    (environment,) = ablation.starts("A")
    assert (environment["NEEDLE_EVAL"], environment["SCOPE_LOG_EVERY"]) == ("0", "7")


def test_complete_arms_are_skipped_and_said_so(ablation):
    assert ablation.run(ARMS="A C").returncode == 0
    assert [len(ablation.starts(arm)) for arm in "ABC"] == [1, 0, 1]
    assert ablation.table()["B"]["status"] == "missing"
    again = ablation.run()
    assert again.returncode == 0
    assert [len(ablation.starts(arm)) for arm in "ABC"] == [1, 1, 1]
    assert [arm for arm in "ABC" if f"arm {arm}: already complete, skipped" in again.out] == ["A", "C"]


@pytest.mark.parametrize(("mode", "status"), [("fail", 3), ("killed", 137), ("silent", 0)])
def test_a_failed_arm_does_not_stop_the_others(ablation, mode, status):
    process = ablation.run(MODE_B=mode)
    assert process.returncode == 1
    assert f"arm B: failed (exit status {status})" in process.out and process.out.rstrip().endswith("failed: B")
    table = ablation.table()
    assert [table[arm]["status"] for arm in "ABC"] == ["complete", "failed", "complete"]
    assert table["B"]["reason"] == f"its log ends with: mode {mode} of arm B"
    assert f"B failed: its log ends with: mode {mode} of arm B" in process.out
    retried = ablation.run()
    assert retried.returncode == 0 and [len(ablation.starts(arm)) for arm in "ABC"] == [1, 2, 1]


def test_an_arm_refused_before_it_has_a_directory(ablation):
    process = ablation.run(MODE_A="refuse", MODE_C="refuse")
    assert process.returncode == 1 and process.out.rstrip().endswith("failed: A C")
    assert [ablation.table()[arm]["status"] for arm in "ABC"] == ["missing", "complete", "missing"]
    assert "error: refused" in process.err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_everything_and_the_next_run_goes_on(ablation, number, status):
    process = ablation.start(MODE_B="hang")
    child = wait_for_pid(ablation.runs / "arm_B" / "pid")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status, err
    assert "interrupted in arm B; run the same command again to resume" in out
    assert not is_running(child)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in err  # the script was interrupted, not killed: it may tidy up
    assert [len(ablation.starts(arm)) for arm in "ABC"] == [1, 1, 0]
    assert ablation.run().returncode == 0
    assert [len(ablation.starts(arm)) for arm in "ABC"] == [1, 2, 1]
    assert ablation.starts("B")[1]["RESUME"] == "auto"


def test_ctrl_c_reaches_a_whole_process_group_once_and_a_second_one_is_harder(ablation):
    process = ablation.start(MODE_A="deaf")
    child = wait_for_pid(ablation.runs / "arm_A" / "pid")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert is_running(child) and process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and not is_running(child)


@pytest.mark.parametrize(
    ("gpus", "environment", "processes"),
    [
        (None, {}, 1),
        (1, {}, 1),
        (4, {}, 4),
        (4, {"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (4, {"NPROC": "3"}, 3),
        (4, {"NPROC": "1"}, 1),
    ],
)
def test_launcher_follows_the_number_of_gpus(ablation, gpus, environment, processes):
    listing = "".join(
        f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n  MIG 1g: (UUID: MIG-GPU-{i})\n" for i in range(gpus or 0)
    )
    ablation.program("nvidia-smi", f"#!/bin/sh\nprintf '%s' '{listing}'\n" if gpus else "#!/bin/sh\nexit 9\n")
    python = ablation.program("my-python", STAND_IN_PYTHON)
    calls = ablation.folder / "calls.txt"
    own = {"NPROC": None, "PYTHON": python, "REAL_PYTHON": sys.executable, "CALLS": str(calls), "ARMS": "A"}
    process = ablation.run(**own | environment)
    assert process.returncode == 0, process.out + process.err
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes} " if processes > 1 else ""
    assert calls.read_text().splitlines()[0] == launch + str(ablation.folder / "train.py")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ARMS": "A D"}, "unknown arm 'D'"),
        ({"ARMS": " "}, "ARMS names no arm"),
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "08"}, "NPROC=08"),
        ({"SCRIPT": "absent.py"}, "absent.py: no such training script"),
        ({"ABLATION_NAME": "../x"}, "ABLATION_NAME=../x"),
    ],
)
def test_bad_usage_is_one_line_and_starts_nothing(ablation, environment, said):
    process = ablation.run(**environment)
    assert process.returncode == 2
    assert process.err.startswith("error: ") and process.err.count("\n") == 1 and said in process.err
    assert not (ablation.folder / "my logs").exists()


def test_arguments_start_nothing(ablation):
    process = ablation.run("C")
    assert process.returncode == 2 and process.err.startswith("error: C: ") and process.err.count("\n") == 1
    usage = ablation.run("--help")
    assert usage.returncode == 0 and usage.out.startswith("Runs the ablation arms") and "ABLATION_NAME" in usage.out
    assert not (ablation.folder / "my logs").exists()


def cell(distance, hits, n, low, high):
    return {"distance": distance, "n": n, "exact_match": hits / n, "exact_match_low": low, "exact_match_high": high}


def write_summary(folder, arm, **change):
    needle = {"seq_len": 65536, "anchor_len": 4, "value_len": 8, "seed": 1}
    needle["distances"] = [cell(4096, 7, 8, 0.529, 0.978), cell(32768, 0, 8, 0.0, 0.324)]
    summary = {
        "status": "complete",
        "arm": arm,
        "seed": 1,
        "steps": 200,
        "world_size": 1,
        "device": "cpu",
        "torch": "2.13.0",
        "val_loss": 4.5,
        "tokens_per_s": 123456.7,
        "step_ms": 4246.75,
        "kv_blocks_per_query": 13.25,
        "peak_memory_gib": 41.5,
        "needle": needle,
        **change,
    }
    run = folder / f"arm_{arm}"
    run.mkdir(parents=True, exist_ok=True)
    (run / "summary.json").write_text(json.dumps(summary))


def print_table(directory):
    command = [sys.executable, ROOT / "eval" / "ablation.py", directory]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def text_cells(text):
    """The text table as rows of cells; two spaces or more part them."""
    rows = text.split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", row.strip()) for row in rows if not set(row) <= {"-"}]


def markdown_cells(text):
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[part.strip() for part in row.strip("|").split("|")] for row in rows]


def test_table_of_three_arms(tmp_path):
    write_summary(tmp_path, "A")
    write_summary(tmp_path, "B", val_loss=4.4871, kv_blocks_per_query=None, needle=None)
    write_summary(tmp_path, "C", val_loss=4.51)
    ablation = read_ablation(tmp_path)
    expected = [
        ["arm", "A", "B", "C"],
        ["status", "complete", "complete", "complete"],
        ["val loss", "4.5000", "4.4871", "4.5100"],
        ["difference to A", "+0.0000", "-0.0129", "+0.0100"],
        ["needle EM at 4,096", "7/8 [0.53, 0.98]", "-", "7/8 [0.53, 0.98]"],
        ["needle EM at 32,768", "0/8 [0.00, 0.32]", "-", "0/8 [0.00, 0.32]"],
        ["tokens/s", "123,457", "123,457", "123,457"],
        ["step ms", "4,246.8", "4,246.8", "4,246.8"],
        ["KV blocks per query", "13.25", "-", "13.25"],
        ["peak memory GiB", "41.50", "41.50", "41.50"],
    ]
    text, markdown = as_text(ablation), as_markdown(ablation)
    assert text_cells(text) == expected and markdown_cells(markdown) == expected
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()}) == 1  # aligned: every line equally long
    assert ablation["differences"] == []


def test_command_writes_what_it_prints(tmp_path):
    write_summary(tmp_path, "A")
    write_summary(tmp_path, "C", val_loss=math.nan)
    process = print_table(tmp_path)
    assert process.returncode == 0 and process.stderr == ""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    rows = json.loads((tmp_path / "ablation.json").read_text(), parse_constant=refuse)["arms"]
    assert [(row["arm"], row["status"], row["val_loss"]) for row in rows] == [
        ("A", "complete", 4.5),
        ("B", "missing", None),
        ("C", "complete", None),
    ]
    assert rows[0]["needle"]["distances"][0]["n"] == 8
    assert markdown_cells((tmp_path / "ablation.md").read_text()) == text_cells(process.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablation.json", "ablation.md", "arm_A", "arm_C"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b'{"status": "running"}', "its log ends with: step 7/9 loss 2.0"),
        (b'{"status": "complete", "arm": "A"}', "is of arm A"),
        (None, "its log ends with: step 7/9 loss 2.0"),
    ],
)
def test_an_arm_without_a_whole_summary_has_failed(tmp_path, content, reason):
    write_summary(tmp_path, "A")
    (tmp_path / "arm_B").mkdir()
    (tmp_path / "arm_B" / "log.txt").write_text("step 6/9 loss 2.5\nstep 7/9 loss 2.0\n\n")
    if content is not None:
        (tmp_path / "arm_B" / "summary.json").write_bytes(content)
    ablation = read_ablation(tmp_path)
    assert [row["status"] for row in ablation["arms"]] == ["complete", "failed", "missing"]
    assert reason in ablation["arms"][1]["reason"] and reason in as_text(ablation)
    assert text_cells(as_text(ablation))[2] == ["val loss", "4.5000", "-", "-"]


def test_without_arm_a_there_is_no_difference(tmp_path):
    write_summary(tmp_path, "B")
    assert [row["val_loss_minus_a"] for row in read_ablation(tmp_path)["arms"]] == [None, None, None]


def test_arms_that_do_not_compare_are_named(tmp_path):
    write_summary(tmp_path, "A")
    write_summary(tmp_path, "C", seed=2)
    assert read_ablation(tmp_path)["differences"] == ["the arms differ in seed: A 1, C 2"]
    write_summary(tmp_path, "C", needle={"seq_len": 1024, "anchor_len": 4, "value_len": 8, "seed": 1, "distances": []})
    ablation = read_ablation(tmp_path)
    assert ablation["differences"] == ["the arms differ in needle seq_len: A 65536, C 1024"]
    assert ablation["differences"][0] in as_text(ablation)


@pytest.mark.parametrize("blocked", ["ablation.json", "ablation.md"])
def test_faults_are_one_line(tmp_path, blocked):
    write_summary(tmp_path, "A")
    (tmp_path / blocked).mkdir()
    for directory in (tmp_path / "absent", tmp_path):
        process = print_table(directory)
        assert process.returncode == 1 and process.stdout == ""
        assert process.stderr.startswith(f"error: {directory}: ") and process.stderr.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
