"""Faults injected for real: kills, signals, hung and diverging processes, full disks, damaged files, long runs.

Runs of several processes (gloo, CPU) are forked from a process that has imported everything (nursery.py). `fault` is code
that runs in every rank before the script: it kills, stops or spoils at a chosen place, the script itself is unchanged.
"""

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_scoped import (
    ARM_A,
    ARM_C,
    MODEL,
    NEEDLE,
    ROOT,
    SIZES,
    environment,
    equal,
    load,
    main,
    records,
    refusal,
    snapshot,
    text,
)

import lifecycle
import scoped_medium as S
from data.shards import write_shard

RUN = dict(VAL_LOSS_EVERY=4, CHECKPOINT_EVERY=2, LOG_EVERY=100, SCOPE_LOG_EVERY=0, KEEP_CHECKPOINTS=0)
SMALL = dict(NUM_LAYERS=2, NUM_HEADS=1, HEAD_DIM=32, MODEL_DIM=32, TRAIN_SEQ_LEN=128, BATCH_TOKENS=256, VAL_SEQ_LEN=128,
             VAL_TOKENS=256)

# ---------------------------------------------------------------------------------------------------------------------
# Harness


pytestmark = pytest.mark.usefixtures("one_thread_on_cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shard(root / "train_0.bin", text(9000, 0, 700))
    write_shard(root / "train_1.bin", text(12000, 1, 700))
    write_shard(root / "val_0.bin", text(9000, 2, 3000))
    return dict(TRAIN_FILES=root / "train_*.bin", VAL_FILES=root / "val_*.bin")


@pytest.fixture(scope="module")
def settings(data):
    return data | MODEL | SIZES | RUN


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen([sys.executable, ROOT / "tests" / "nursery.py"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=environment(dict(PYTHONPATH=ROOT)))
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait()


class Group:
    """A run of its own processes."""

    def __init__(self, nursery, folder, variables, processes, fault, arguments):
        self.folder = folder
        folder.mkdir()
        request = dict(folder=str(folder), variables=environment(variables), processes=processes, fault=fault,
                       arguments=list(arguments))
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    @property
    def ranks(self):
        wait_for(lambda: (self.folder / "ranks").exists() and (self.folder / "ranks").read_text(), "the ranks to start")
        return list(map(int, (self.folder / "ranks").read_text().split()))

    def kill(self):
        """SIGKILL to everything; returns whether anything was still running."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_for(lambda: not self.alive(), "the killed processes to go")
        return not (self.folder / "exit").exists()

    def alive(self):
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def finish(self, seconds=60):
        """Exit statuses and stderr of the ranks, when all have ended or the group was killed."""
        try:
            wait_for(lambda: not self.alive(), "the run to end", seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        path = self.folder / "exit"
        statuses = json.loads(path.read_text()) if path.exists() else None
        err = [path.read_text() for path in sorted(self.folder.glob("err*"))]
        return SimpleNamespace(statuses=statuses, err=err, out=(self.folder / "out0").read_text(),
                               lines=[line for e in err for line in e.splitlines() if line.startswith(("error:", "preempted"))])


@pytest.fixture
def start(nursery, tmp_path):
    groups = []

    def start(variables, *arguments, processes=2, fault=""):
        folder = tmp_path / f"group_{len(groups)}"
        groups.append(Group(nursery, folder, dict(LOG_DIR=tmp_path) | variables, processes, fault, arguments))
        return groups[-1]

    yield start
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def status(run):
    with contextlib.suppress(FileNotFoundError):
        return json.loads((run / "status.json").read_text())
    return dict(status=None, step=-1)


def steps(run):
    path = run / "metrics.jsonl"
    return len(re.findall("train_loss", path.read_text())) if path.exists() else 0


def saved(run):
    return [step for step, _ in lifecycle.checkpoints(run)]


AT = """
def at(step, key, act):
    "Act when the record of that step with that key has been written, on any rank."
    write = L.RunDirectory.metrics
    def metrics(self, **record):
        write(self, **record)
        if record["step"] == step and key in record:
            act()
    L.RunDirectory.metrics = metrics
"""
KILL_ALL = "import os, signal, threading, time\ndef kill_all(): os.killpg(0, signal.SIGKILL)\n"


@pytest.fixture(scope="module")
def whole(nursery, settings, tmp_path_factory):
    """Uninterrupted runs: arm C with needles by two processes, arm A by one."""
    folder = tmp_path_factory.mktemp("whole")
    for name, processes, arm in (("two", 2, ARM_C | NEEDLE), ("one", 1, ARM_A)):
        variables = settings | arm | dict(LOG_DIR=folder, RUN_NAME=name)
        group = Group(nursery, folder / f"group_{name}", variables, processes, fault="", arguments=[])
        result = group.finish()
        assert result.statuses == [0] * processes, result.err
    return SimpleNamespace(two=folder / "two", one=folder / "one")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and resumptions


def test_twenty_kills_leave_the_uninterrupted_run(settings, whole, start, tmp_path):
    """Of both processes, at random moments of which four each are inside validation, the saving of a checkpoint and the needle
    evaluation. RESUME=auto serves for the first start too."""
    rng = random.Random(0)
    inside = {None: "", "validate": "S.Trainer", "save_checkpoint": "L.RunDirectory", "needle_eval": "S.Trainer"}
    kinds = [None] * 8 + ["validate"] * 4 + ["save_checkpoint"] * 4 + ["needle_eval"] * 4
    kills, struck = 0, {kind: 0 for kind in inside}
    run, variables = tmp_path / "killed", settings | ARM_C | NEEDLE | dict(RUN_NAME="killed", RESUME="auto")
    while kills < len(kinds):
        kind = kinds[kills]
        fault = KILL_ALL + (f"""
method, calls = {inside[kind]}.{kind}, []
def struck(*arguments, **options):
    calls.append(0)
    if rank == 0 and len(calls) == {rng.randint(1, 2) if kind == "validate" else 1}:
        threading.Timer({rng.uniform(0, 0.02)}, kill_all).start()
        method(*arguments, **options)
        time.sleep(1)
    return method(*arguments, **options)
{inside[kind]}.{kind} = struck
""" if kind else "")
        group = start(variables, fault=fault)
        if kind is None:
            wait_for(lambda: (run / "status.json").exists(), "the run directory")
            time.sleep(rng.uniform(0, 1.0))
            killed = group.kill()
        else:
            killed = group.finish().statuses is None
        if not killed:  # it came through: the next one starts afresh
            assert records(run) == records(whole.two)
            run.rename(tmp_path / f"came_through_{kills}")
            continue
        kills += 1
        struck[kind] += 1
    group = start(variables)
    assert group.finish().statuses == [0, 0]
    assert records(run) == records(whole.two)
    assert len({(r["step"], "val_loss" in r) for r in records(run)}) == len(records(run))
    last, reference = load(run / "state_step000010.pt"), load(whole.two / "state_step000010.pt")
    for key in ("model", "optimizers", "loader", "step", "rng", "best_val_loss", "data"):
        assert equal(last[key], reference[key]), key
    needles = [json.loads((path / "summary.json").read_text())["needle"] for path in (run, whole.two)]
    assert needles[0] == needles[1]
    assert status(run)["status"] == "complete" and not list(run.glob(".*"))
    assert list(struck.values()) == [8, 4, 4, 4]


def test_another_number_of_processes_goes_on_with_the_same_tokens(settings, whole, start, tmp_path):
    variables = settings | ARM_C | dict(RUN_NAME="grows", RESUME="auto")
    assert start(variables, fault=AT + KILL_ALL + "at(5, 'train_loss', kill_all)").finish().statuses is None
    assert start(variables, processes=1).finish().statuses == [0]
    ours, theirs = ([r for r in records(path) if "train_loss" in r] for path in (tmp_path / "grows", whole.two))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert [r["train_loss"] for r in ours] == pytest.approx([r["train_loss"] for r in theirs], rel=1e-4)
    assert load(tmp_path / "grows/state_step000010.pt")["loader"] == load(whole.two / "state_step000010.pt")["loader"]


def test_a_complete_run_prints_its_summary_and_changes_nothing(settings, whole, capsys):
    before = snapshot(whole.one)
    times = {path: path.stat().st_mtime_ns for path in before}
    variables = settings | ARM_A | dict(LOG_DIR=whole.one.parent, RUN_NAME="one", RESUME="auto")
    main(variables)
    out = capsys.readouterr().out
    assert "is complete" in out and re.search(r"val_loss +\d", out)
    assert "MODEL_DIM was 64, is 128" in refusal(variables | dict(MODEL_DIM=128))
    assert snapshot(whole.one) == before and {path: path.stat().st_mtime_ns for path in before} == times


def test_a_run_stopped_behind_its_last_checkpoint_only_evaluates(settings, whole, start, tmp_path):
    variables = settings | ARM_A | dict(RUN_NAME="late", RESUME="auto")
    fault = KILL_ALL + "S.summarise = lambda *_: kill_all()"
    assert start(variables, processes=1, fault=fault).finish().statuses is None
    path = tmp_path / "late" / "state_step000010.pt"
    written = path.stat().st_mtime_ns
    assert start(variables, processes=1).finish().statuses == [0]
    assert path.stat().st_mtime_ns == written and records(tmp_path / "late") == records(whole.one)


def test_a_kill_while_saving_leaves_nothing_behind_at_the_next_start(settings, whole, start, tmp_path):
    """SIGKILL in mid-file: a temporary file stays, and goes at the next start."""
    run, variables = tmp_path / "torn", settings | ARM_A | dict(RUN_NAME="torn", RESUME="auto")
    fault = KILL_ALL + """
save, saves = torch.save, []
def torn(state, file):
    saves.append(0)
    if len(saves) == 2:
        file.write(b"half of a checkpoint")
        file.flush()
        kill_all()
    save(state, file)
torch.save = torn
"""
    start(variables, processes=1, fault=fault).finish()
    assert [path.name.split(".")[1] for path in run.glob(".*.tmp")] == ["state_step000004"] and saved(run) == [2]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train_lo')  # as a kill within a write would leave it
    assert start(variables, processes=1).finish().statuses == [0]
    assert not list(run.glob(".*")) and records(run) == records(whole.one)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def damage(path, kind):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if kind == "flipped bit":
        content[middle] ^= 4
    elif kind == "hole":
        content[middle : middle + 4096] = bytes(4096)
    else:
        del content[middle:]
    path.write_bytes(content)


def unfinished(whole_run, tmp_path, keep=10):
    """A copy of a run as a kill behind its last checkpoint leaves it; its variables."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole_run, run], check=True)
    (run / "summary.json").unlink()
    for step, path in lifecycle.checkpoints(run):
        if step > keep:
            path.unlink()
    return run, dict(LOG_DIR=tmp_path, RUN_NAME="run", RESUME="auto")


@pytest.mark.parametrize("kind", ["flipped bit", "hole", "truncation"])
def test_a_damaged_newest_checkpoint_is_skipped(kind, settings, whole, tmp_path, capsys):
    run, again = unfinished(whole.one, tmp_path)
    for step in (10, 8):
        damage(run / f"state_step{step:06d}.pt", kind)
    named = run / "state_step000010.pt"
    before = snapshot(run)
    assert str(named) in refusal(settings | ARM_A | again | dict(RESUME=named))
    main(settings | ARM_A | again, "--check")
    assert snapshot(run) == before and str(named) in capsys.readouterr().err
    main(settings | ARM_A | again)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert [re.search(r"state_step0+(\d+)\.pt", line)[1] for line in warnings] == ["10", "8"]
    assert f"resumed from {run / 'state_step000006.pt'} at step 6" in (run / "log.txt").read_text()
    assert records(run) == records(whole.one)
    assert equal(load(named)["model"], load(whole.one / named.name)["model"])
    assert [path.name for path in sorted(run.glob("*.stale"))] == ["state_step000008.pt.stale", "state_step000010.pt.stale"]


def test_no_flipped_bit_changes_what_is_loaded(whole, tmp_path):
    """Anywhere in the file, its headers and directory included: refused, or without effect."""
    good, path, rng = whole.one / "state_step000010.pt", tmp_path / "flipped.pt", random.Random(0)
    content, reference, refused = good.read_bytes(), load(good), 0
    directory = content.find(b"PK\x01\x02")
    regions = (0, 2000), (0, len(content)), (directory, len(content))
    places = [rng.randrange(low, high) for low, high in regions for _ in range(70)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert equal(lifecycle.read_checkpoint(path), reference), place
        except S.Stop:
            refused += 1
    assert refused > 150


def test_with_all_checkpoints_damaged_a_run_does_not_start_over(settings, whole, tmp_path):
    run, again = unfinished(whole.one, tmp_path)
    for (_, path), kind in zip(lifecycle.checkpoints(run), ["flipped bit", "hole", "truncation"] * 2, strict=False):
        damage(path, kind)
    before = snapshot(run)
    line = refusal(settings | ARM_A | again)
    assert "none of 5 checkpoints can be read" in line and "state_step000010.pt" in line
    assert snapshot(run) == before


def test_which_checkpoints_stay(settings, tmp_path):
    variables = settings | SMALL | dict(LOG_DIR=tmp_path, CHECKPOINT_EVERY=1, VAL_LOSS_EVERY=0)
    for name, keep, every, expected in (("some", 2, 4, [4, 8, 9, 10]), ("last", 1, 0, [10]), ("all", 0, 0, list(range(1, 11)))):
        main(variables | dict(RUN_NAME=name, KEEP_CHECKPOINTS=keep, KEEP_EVERY=every))
        assert saved(tmp_path / name) == expected


def test_other_shards_than_those_trained_on_are_refused(data, settings, whole, tmp_path):
    run, again = unfinished(whole.one, tmp_path, keep=6)
    variables = settings | ARM_A | again
    moved = tmp_path / "moved"
    moved.mkdir()
    for i in range(2):  # the same content under other names, in the same order
        (moved / f"piece_{i}.bin").write_bytes((Path(data["TRAIN_FILES"]).parent / f"train_{i}.bin").read_bytes())
    before = snapshot(run)
    write_shard(tmp_path / "other_0.bin", text(9000, 0, 700))
    write_shard(tmp_path / "other_1.bin", text(12000, 7, 700))
    other = variables | dict(TRAIN_FILES=tmp_path / "other_*.bin")
    line = refusal(other)
    assert "training shard 1 was train_1.bin" in line and "other_1.bin" in line and "RESUME_OTHER_DATA=1" in line
    assert "had 2 training shards, there are 1" in refusal(variables | dict(TRAIN_FILES=tmp_path / "other_1.bin"))
    assert snapshot(run) == before
    main(variables | dict(TRAIN_FILES=moved / "piece_*.bin"), "--check")
    main(other | dict(RESUME_OTHER_DATA=1, SPECTRAL_POINTER_ASKING=32))
    assert "validated otherwise than before: SPECTRAL_POINTER_ASKING was 16, is 32\n" in (run / "log.txt").read_text()
    ours, theirs = records(run), records(whole.one)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert same.index(False) == len([r for r in theirs if r["step"] <= 8 and "train_loss" in r]) + 3  # 8 batches a shard


def test_optimizer_states_that_do_not_fit(settings, whole, tmp_path):
    run, again = unfinished(whole.one, tmp_path, keep=6)
    path = run / "state_step000006.pt"
    state = load(path)
    torch.save(state | dict(optimizers=state["optimizers"][:1]), path)
    before = snapshot(run)
    assert f"{path} holds the states of 1 optimizers, this script has 2" in refusal(settings | ARM_A | again)
    assert snapshot(run) == before
    torch.save(state | dict(optimizers=state["optimizers"][::-1]), path)
    assert f"{path}: its optimizer or random states do not fit" in refusal(settings | ARM_A | again)
    assert status(run)["status"].startswith(f"failed: {path}: its optimizer")


# ---------------------------------------------------------------------------------------------------------------------
# Signals


SLOW = "import time\nstep = S.Trainer.train_step\n" \
       "S.Trainer.train_step = lambda *a: (time.sleep(0.05), step(*a))[1]\n"


@pytest.mark.parametrize("number,first", [("SIGTERM", 0), ("SIGINT", 1)])
def test_a_signal_stops_all_ranks_at_one_step_behind_a_checkpoint(number, first, settings, whole, start, tmp_path):
    """It reaches one rank early and the other late, and then both again."""
    run = tmp_path / number
    variables = settings | ARM_C | NEEDLE | dict(RUN_NAME=number, RESUME="auto", LOG_ALL_RANKS=1, CHECKPOINT_EVERY=0)
    group = start(variables, fault=SLOW)
    wait_for(lambda: steps(run) >= 3, "three steps")
    os.kill(group.ranks[first], signal.Signals[number])
    for _ in range(3):
        time.sleep(0.02)
        for pid in group.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.Signals[number])
    result = group.finish(20)
    assert result.statuses == [128 + signal.Signals[number]] * 2
    step = steps(run)
    assert 3 <= step < 10 and saved(run) == [step] and load(run / f"state_step{step:06d}.pt")["step"] == step
    assert len(result.lines) == 1 and f"preempted by {number} at step {step}" in result.lines[0]
    assert not any("Traceback" in err for err in result.err)
    assert status(run)["status"] == "preempted" and status(run)["step"] == step
    assert start(variables).finish().statuses == [0, 0]
    assert records(run) == records(whole.two) and status(run)["status"] == "complete"


@pytest.mark.parametrize("place", ["validate", "needle_eval", "warm_up"])
def test_a_signal_outside_the_steps(place, settings, whole, start, tmp_path):
    """To rank 1 within a validation: cut short, not recorded, saved. Before the first step and behind the last one: at once."""
    run = tmp_path / place
    variables = settings | ARM_C | NEEDLE | dict(RUN_NAME=place, RESUME="auto", CHECKPOINT_EVERY=0)
    fault = f"""
import os, signal
method, calls = S.Trainer.{place}, []
def inside(*arguments):
    calls.append(0)
    if len(calls) == {2 if place == "validate" else 1} and (rank == 1 or "{place}" != "validate"):
        os.kill(os.getpid(), signal.SIGTERM)
        taken = L.PROGRESS.sequences
        result = method(*arguments)
        print("took up", L.PROGRESS.sequences - taken)
        return result
    return method(*arguments)
S.Trainer.{place} = inside
"""
    group = start(variables, fault=fault)
    assert group.finish(20).statuses == [143, 143]
    assert ("took up 0\n" in (group.folder / "out1").read_text()) == (place == "validate")
    expected = dict(validate=4, needle_eval=10, warm_up=0)[place]
    assert (steps(run), saved(run)) == (expected, [expected] if expected else [])
    assert status(run)["status"] == "preempted" and status(run)["step"] == expected
    assert ("val_loss" in records(run)[-1]) == (place == "needle_eval") if expected else not records(run)
    assert start(variables).finish().statuses == [0, 0]
    assert records(run) == records(whole.two)


def with_marker(mark):
    """Processes that carry a text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes() and b"Z" not in path.with_name("stat").read_bytes().rsplit(b")", 1)[1][:3]:
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def torchrun(tmp_path):
    """torchrun itself, of two processes."""
    started = []

    def launch(variables):
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                    ROOT / "scoped_medium.py"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env=environment(dict(LOG_DIR=tmp_path) | variables))
        started.append(process)
        return process

    yield launch
    for process in started:
        process.kill()
        process.wait()
    for pid in with_marker(str(tmp_path)):
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


def test_torchrun_terminated_killed_and_bereft(settings, torchrun, tmp_path):
    """Three runs of torchrun itself, side by side: SIGTERM to it, SIGKILL to it, and SIGKILL to one of its ranks. No process is
    left behind by any."""
    variables = settings | SMALL | dict(NUM_ITERATIONS=100000, EPOCHS=0, VAL_LOSS_EVERY=0, CHECKPOINT_EVERY=0)
    runs = {name: torchrun(variables | dict(RUN_NAME=name)) for name in ("terminated", "killed", "bereft")}
    for name in runs:
        wait_for(lambda name=name: steps(tmp_path / name) > 3, "steps", 120)
    runs["terminated"].send_signal(signal.SIGTERM)
    runs["terminated"].send_signal(signal.SIGTERM)
    runs["killed"].send_signal(signal.SIGKILL)
    first = status(tmp_path / "bereft")["pid"]
    other = [pid for pid in with_marker("RUN_NAME=bereft") if pid not in (first, runs["bereft"].pid)]
    assert len(other) == 1
    os.kill(other[0], signal.SIGKILL)
    err = {name: process.communicate(timeout=60)[1] for name, process in runs.items()}
    wait_for(lambda: not with_marker(str(tmp_path)), "every process to end", 30)
    for name in ("terminated", "killed"):
        run = tmp_path / name
        assert status(run)["status"] == "preempted", err[name]
        assert saved(run) == [status(run)["step"]] == [steps(run)]
        assert "Traceback" not in err["killed"]
    assert runs["bereft"].returncode == 1
    assert re.match(r"failed: rank 1 was killed or stopped; this was step \d+", status(tmp_path / "bereft")["status"])
    assert saved(tmp_path / "bereft") == [], "saved after a collective had failed"
    errors = [line for line in err["bereft"].splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "rank 1" in errors[0]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies(lost, settings, start, tmp_path):
    """The other ends within seconds, names it and the step, and saves nothing."""
    run, variables = tmp_path / "dies", settings | ARM_A | dict(RUN_NAME="dies", CHECKPOINT_EVERY=3)
    fault = f"""
import os, signal
step, calls = S.Trainer.train_step, []
def dying(*arguments):
    calls.append(0)
    if rank == {lost} and len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
S.Trainer.train_step = dying
"""
    started = time.monotonic()
    result = start(variables, fault=fault).finish(40)
    assert time.monotonic() - started < 25
    assert sorted(result.statuses) == [-9, 1] and result.statuses[lost] == -9
    assert len(result.lines) == 1 and f"rank {lost} " in result.lines[0] and "step 5" in result.lines[0]
    assert status(run)["status"].startswith(f"failed: rank {lost} ") and saved(run) == [3]
    assert not any("Traceback" in err for err in result.err)


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_rank_that_hangs(how, settings, start, tmp_path):
    """A whole process that stands still, and one whose main thread does: ended after RANK_TIMEOUT."""
    run = tmp_path / how
    act = dict(stopped="os.kill(os.getpid(), signal.SIGSTOP)", asleep="time.sleep(100)")[how]
    fault = f"""
import os, signal, time
step, calls = S.Trainer.train_step, []
def hanging(*arguments):
    calls.append(0)
    if rank == 1 and len(calls) == 6:
        {act}
    return step(*arguments)
S.Trainer.train_step = hanging
"""
    group = start(settings | ARM_A | dict(RUN_NAME=how, RANK_TIMEOUT=3, CHECKPOINT_EVERY=0), fault=fault)
    wait_for(lambda: (status(run)["status"] or "").startswith("failed"), "the end", 25)
    if how == "stopped":
        os.kill(group.ranks[1], signal.SIGKILL)  # which it ends by alone, and which torchrun sends
    result = group.finish(20)
    assert result.statuses == [1, -9 if how == "stopped" else 1]
    assert re.match(r"failed: rank 1 (was killed or stopped|hangs, nothing moved for 3 s); this was step 5",
                    status(run)["status"])
    assert len(result.lines) == 1 and "rank 1" in result.lines[0] and saved(run) == []


def test_an_error_on_one_rank_is_told_by_the_other(settings, start, tmp_path):
    fault = """
step, calls = S.Trainer.train_step, []
def failing(*arguments):
    calls.append(0)
    if rank == 1 and len(calls) == 3:
        raise L.Stop("its disk is gone")
    return step(*arguments)
S.Trainer.train_step = failing
"""
    result = start(settings | ARM_A | dict(RUN_NAME="told"), fault=fault).finish(30)
    assert result.statuses == [1, 1]
    assert len(result.lines) == 1 and "rank 1 failed: its disk is gone; this was step 2" in result.lines[0]
    assert "rank 1 failed: its disk is gone" in status(tmp_path / "told")["status"]


@pytest.mark.parametrize("bit", ["param", "start"])
def test_a_parameter_that_differs_between_ranks(bit, settings, start, tmp_path):
    """One bit of one parameter of rank 1, flipped in memory behind step 3 or before the first."""
    flip = "trainer.model.blocks[1].mlp.fc_w.data.view(torch.int32)[3, 5] ^= 1"
    fault = f"""
compare, calls = S.Trainer.compare_ranks, []
def flipped(trainer, *arguments):
    calls.append(0)
    if rank == 1 and trainer.step == {3 if bit == "param" else 0}:
        {flip}
    return compare(trainer) if {bit == "start"} else step(trainer, *arguments)
step = S.Trainer.train_step
S.Trainer.{"compare_ranks" if bit == "start" else "train_step"} = flipped
"""
    result = start(settings | ARM_A | dict(RUN_NAME="differs", RANK_CHECK_EVERY=2), fault=fault).finish(30)
    step = 4 if bit == "param" else 0
    assert result.statuses == [1, 1]
    assert len(result.lines) == 1 and f"step {step}: the parameters of rank 1 differ from rank 0's" in result.lines[0]
    assert steps(tmp_path / "differs") == step and status(tmp_path / "differs")["status"].startswith(f"failed: step {step}")
    assert max(saved(tmp_path / "differs"), default=0) < 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_number_on_one_rank_stops_all_before_the_update(what, settings, start, tmp_path):
    """At a step that logs nothing: LOG_EVERY is 100."""
    poison = dict(loss="loss = accumulate(trainer, sequences) * float('nan')",
                  gradient="loss = accumulate(trainer, sequences); trainer.model.head_w.grad[2, 3] = float('inf')")[what]
    fault = f"""
accumulate = S.Trainer.accumulate
def poisoned(trainer, sequences):
    if rank == 1 and trainer.step == 3:
        {poison}
        return loss
    return accumulate(trainer, sequences)
S.Trainer.accumulate = poisoned
adam = torch.optim.Adam.step
torch.optim.Adam.step = lambda *a: (print("updated"), adam(*a))[1]
"""
    result = start(settings | ARM_A | dict(RUN_NAME="bad"), fault=fault).finish(30)
    assert result.statuses == [1, 1] and result.out.count("updated") == 3
    assert len(result.lines) == 1 and "step 3: loss" in result.lines[0] and "not finite" in result.lines[0]
    assert steps(tmp_path / "bad") == 3 and status(tmp_path / "bad")["status"].startswith("failed: step 3: loss")


# ---------------------------------------------------------------------------------------------------------------------
# Status, lock, names


def test_status_has_a_heartbeat_and_survives_a_kill_as_it_was(settings, start, tmp_path):
    run = tmp_path / "beats"
    group = start(settings | ARM_A | dict(RUN_NAME="beats"), processes=1,
                  fault="import time\nL.HEARTBEAT_SECONDS = L.POLL_SECONDS = 0.1\nS.Trainer.warm_up = lambda _: time.sleep(60)")
    wait_for(lambda: status(run)["status"], "status.json")
    first = status(run)
    wait_for(lambda: status(run)["heartbeat"] > first["heartbeat"] + 0.3, "three heartbeats", 10)
    assert first["status"] == status(run)["status"] == "running" and first["pid"] == group.ranks[0]
    group.kill()
    last = status(run)
    time.sleep(0.3)
    assert status(run) == last and last["status"] == "running" and last["heartbeat"] <= time.time()


def test_a_second_run_in_the_directory_is_refused_until_the_owner_is_dead(settings, whole, start, tmp_path):
    run, variables = tmp_path / "owned", settings | ARM_A | dict(RUN_NAME="owned", RESUME="auto")
    group = start(variables, processes=1, fault=AT + "import time\nat(6, 'train_loss', lambda: time.sleep(60))")
    wait_for(lambda: steps(run) == 6, "six steps")
    before = snapshot(run)
    for resume in ("auto", "0"):
        result = start(variables | dict(RESUME=resume)).finish(30)  # of two processes, both refused
        assert result.statuses == [1, 1] and len(result.lines) == 1
        assert f"{run} is in use by process {group.ranks[0]} on {os.uname().nodename}" in result.lines[0]
    assert snapshot(run) == before
    group.kill()
    assert start(variables, processes=1).finish().statuses == [0]
    assert records(run) == records(whole.one)


def test_unnamed_runs_of_one_second_have_names_of_their_own(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(lifecycle.time, "strftime", lambda form: "20300101-000000")
    variables = settings | SMALL | dict(LOG_DIR=tmp_path, NUM_ITERATIONS=1)
    for _ in range(3):
        main(variables)
    name = "arm_A_seed0_20300101-000000"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}-2", f"{name}-3"]
    assert all(steps(path) == 1 for path in tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Disks


def test_too_little_space_for_two_checkpoints_is_refused_with_the_sizes(settings, tmp_path):
    vast = settings | dict(MODEL_DIM=32768, NUM_LAYERS=64, LOG_DIR=tmp_path / "logs")  # larger than any disk
    for arguments in (("--check",), ()):  # in this order: without the guard a run would take all of the machine's memory
        line = refusal(vast, *arguments)
        sizes = re.search(r"([\d.,]+) GiB are free, two checkpoints take ([\d.,]+) GiB", line)
        assert float(sizes[1].replace(",", "")) < float(sizes[2].replace(",", ""))
    assert not (tmp_path / "logs").exists()
    main(vast | dict(SAVE_CHECKPOINT=0), "--check")


def test_the_size_of_a_checkpoint_is_known_beforehand(whole):
    for run in (whole.one, whole.two):
        config = S.Config(**load(run / "state_step000010.pt")["config"])
        with torch.device("meta"):
            expected = S.checkpoint_bytes(S.GPT(config), "cpu")
        assert 0 <= (run / "state_step000010.pt").stat().st_size - expected < 150_000  # names and headers


DISK = """
import os, resource, signal
filler = os.path.join(os.environ["LOG_DIR"], "filler")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
def fill():
    if os.path.ismount(os.environ["LOG_DIR"]):
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError: pass
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
def free():
    if os.path.exists(filler): os.unlink(filler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
"""


@pytest.fixture
def small_disk(tmp_path):
    """Run the script on a file system of 12 MB that `fill` fills; where none may be mounted, `fill` makes the kernel refuse
    every write to a file of the process. The run directory is copied out."""

    def run(variables, fault):
        (tmp_path / "disk").mkdir()
        code = f"import torch\nimport scoped_medium as S\nimport lifecycle as L\n{AT}{DISK}{fault}\nS.main([])"
        command = [sys.executable, "-c", code]
        mount = f"mount -t tmpfs -o size=12m none {tmp_path}/disk"
        space = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*space, mount], capture_output=True).returncode == 0:
            command = [*space, f'{mount} && "$@"; s=$?; cp -r {tmp_path}/disk/* {tmp_path}; exit $s', "sh", *command]
        else:
            command = ["sh", "-c", f'"$@"; s=$?; cp -r {tmp_path}/disk/* {tmp_path}; exit $s', "sh", *command]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=100,
                              env=environment(dict(LOG_DIR=tmp_path / "disk", RUN_NAME="run") | variables))

    return run


def test_a_full_disk_does_not_stop_the_run(settings, small_disk, tmp_path):
    """Full from step 58 to 195: the checkpoints 60 to 180 are lost, 30 is intact, 200 is made, and no line of a log is lost."""
    variables = settings | SMALL | dict(LOG_EVERY=1, NUM_ITERATIONS=200, EPOCHS=3, CHECKPOINT_EVERY=30, VAL_LOSS_EVERY=50)
    result = small_disk(variables, """
at(58, "train_loss", fill)
def look():
    print([name for name in os.listdir(os.environ["LOG_DIR"] + "/run") if "state_" in name], flush=True)
    free()
at(195, "train_loss", look)
""")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line and "status.json" not in line]  # a heartbeat may fall in
    lost = [f"{tmp_path}/disk/run/state_step{step:06d}.pt:" for step in (60, 90, 120, 150, 180)]
    assert sorted(line.split()[1] for line in lines) == sorted([*lost, "metrics.jsonl:", "log.txt:"]), result.stderr
    assert all(line.startswith("warning:") for line in lines) and "the next checkpoint is due at step 90" in result.stderr
    assert "\n['state_step000030.pt']\n" in result.stdout, "a part of a checkpoint was left"
    run = tmp_path / "run"
    main(variables | dict(LOG_DIR=tmp_path, RUN_NAME="spacious"))
    assert saved(run) == [30, 200] and records(run) == records(tmp_path / "spacious")
    assert all(f"step {n}/200 loss" in (run / "log.txt").read_text() for n in range(1, 201))
    assert status(run)["status"] == "complete"


def test_a_disk_full_to_the_end_fails_the_run_with_one_line(settings, small_disk, tmp_path):
    """Only the last checkpoint has no next time."""
    result = small_disk(settings | ARM_A, 'at(9, "train_loss", fill)')
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(errors) == 1
    assert re.search(r"state_step000010\.pt: (cannot be|not) written", errors[0])
    assert "Traceback" not in result.stderr
    assert saved(tmp_path / "run") == [2, 4, 6, 8] and not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").glob(".state*")), "a part of a checkpoint was left"


def test_a_full_standard_output_is_one_warning(settings, whole, start, tmp_path):
    fault = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    result = start(settings | ARM_A | dict(RUN_NAME="full"), processes=1, fault=fault).finish()
    assert result.statuses == [0] and records(tmp_path / "full") == records(whole.one)
    warnings = [line for line in result.err[0].splitlines() if line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: stdout: cannot be written (No space left on device)")


# ---------------------------------------------------------------------------------------------------------------------
# Data and settings


def test_training_data_is_no_validation_data(data, settings, tmp_path):
    root = Path(data["TRAIN_FILES"]).parent
    (tmp_path / "copy.bin").write_bytes((root / "train_1.bin").read_bytes())
    for files in (root / "train_1.bin", tmp_path / "copy.bin", root / "*.bin"):
        for arguments in ((), ("--check",)):
            line = refusal(settings | dict(VAL_FILES=files, LOG_DIR=tmp_path / "logs"), *arguments)
            assert "must not overlap" in line and str(root / "train_") in line
    needle = dict(NEEDLE_EVAL=1, NEEDLE_SEQ_LEN=512, NEEDLE_DISTANCES=64, NEEDLE_FILES=root / "train_1.bin")
    line = refusal(settings | needle | dict(LOG_DIR=tmp_path / "logs"), "--check")
    assert "train_1.bin: NEEDLE_FILES must not overlap" in line
    assert not (tmp_path / "logs").exists()


def test_text_of_the_trainings_before_is_not_held_out_either(data, settings, tmp_path):
    """Of weights that were loaded and of a run resumed on other data, and it is still known two trainings later."""
    root = Path(data["TRAIN_FILES"]).parent
    small = settings | SMALL | dict(LOG_DIR=tmp_path, NUM_ITERATIONS=2, VAL_TOKENS=0, CHECKPOINT_EVERY=1)
    first, second = root / "train_0.bin", root / "train_1.bin"
    main(small | dict(TRAIN_FILES=first, RUN_NAME="one"))
    one = tmp_path / "one" / "state_step000002.pt"
    main(small | dict(TRAIN_FILES=second, RUN_NAME="two", LOAD_CHECKPOINT=one))
    main(small | dict(TRAIN_FILES=second, RUN_NAME="three", LOAD_CHECKPOINT=tmp_path / "two" / "state_step000002.pt"))
    main(small | dict(TRAIN_FILES=second, RUN_NAME="resumed", RESUME=tmp_path / "one" / "state_step000001.pt",
                      RESUME_OTHER_DATA=1))
    for name in ("two", "three", "resumed"):
        checkpoint = tmp_path / name / "state_step000002.pt"
        state = lifecycle.read_checkpoint(checkpoint)
        assert set(S.trained_shards(None, state).values()) == {str(first), str(second)}
        evaluation = dict(NUM_ITERATIONS=0, LOAD_CHECKPOINT=checkpoint, VAL_TOKENS=256, RUN_NAME="evaluated")
        line = refusal(small | evaluation | dict(VAL_FILES=first))
        assert f"{first} is a training shard, {first}: VAL_FILES must not overlap" in line
    older = {key: value for key, value in state.items() if key != "trained"}  # of a checkpoint without the list
    assert set(S.trained_shards(None, older).values()) == {"train_1.bin"}
    resumed = small | dict(TRAIN_FILES=second, NUM_ITERATIONS=3, RUN_NAME="on", RESUME=checkpoint, COOLDOWN_FRAC=0.6)
    assert "VAL_FILES must not overlap" in refusal(resumed | dict(VAL_TOKENS=256, VAL_FILES=first))


@pytest.mark.parametrize("fault,expected", [("unlink(missing_ok=True)", "train_1.bin: cannot be read (No such file"),
                                            ("write_bytes(b'')", "train_1.bin: 0 bytes, less than"),
                                            ("cut", "train_0.bin: was cut while in use")])
def test_shards_that_vanish_or_are_cut_in_mid_run(fault, expected, data, settings, start, tmp_path):
    """The second shard before its turn comes, the first one while it is read; both ranks stop with one line."""
    for name in ("train_0.bin", "train_1.bin", "val_0.bin"):
        (tmp_path / name).write_bytes((Path(data["TRAIN_FILES"]).parent / name).read_bytes())
    act = f"os.truncate('{tmp_path}/train_0.bin', 6000)" if fault == "cut" else f"Path('{tmp_path}/train_1.bin').{fault}"
    variables = settings | ARM_A | dict(TRAIN_FILES=tmp_path / "train_*.bin", VAL_FILES=tmp_path / "val_*.bin", RUN_NAME="r")
    # The validation shard goes too: it is held open.
    fault = AT + f"import os\nfrom pathlib import Path\n" \
        f"at(3, 'train_loss', lambda: rank == 0 and ({act}, os.unlink('{tmp_path}/val_0.bin')))"
    result = start(variables, fault=fault).finish(30)
    assert result.statuses == [1, 1] and len(result.lines) == 1 and expected in result.lines[0], result.err
    assert not any("Traceback" in err for err in result.err)
    assert status(tmp_path / "r")["status"].startswith("failed: ")
    assert 4 in {r["step"] for r in records(tmp_path / "r") if "val_loss" in r} or "cut" in expected


def test_passes_over_the_shards_are_counted_and_limited(settings, tmp_path):
    variables = settings | SMALL | dict(LOG_DIR=tmp_path, VAL_LOSS_EVERY=0, SAVE_CHECKPOINT=0, NUM_ITERATIONS=170)
    assert "81 batches" in refusal(variables | dict(EPOCHS=2)) and "170 wanted" in refusal(variables | dict(EPOCHS=2))
    main(variables | dict(EPOCHS=3, RUN_NAME="three"))
    log = (tmp_path / "three" / "log.txt").read_text()
    assert "2 shards, 81 batches a pass; 170 steps take 2.10 passes, EPOCHS=3 allows 3" in log
    passes = re.findall(r"step (\d+): pass (\d) over the training shards is complete \(EPOCHS=3\)", log)
    assert passes == [("81", "1"), ("162", "2")]
    loader = S.TokenLoader(settings["TRAIN_FILES"], 256, 257, epochs=1)
    for _ in range(81):
        loader.next_batch()
    with pytest.raises(S.Stop, match="EPOCHS=1"):
        loader.next_batch()


def test_every_problem_is_listed_at_once(data, settings, whole, tmp_path):
    """Settings, shapes, data and processes in one refusal, and nothing that follows from a value that was not read."""
    broken = settings | dict(RUN_NAM="x", SEED="-1", CHECKPOINT_EVERY=3, KEEP_EVERY=4, HEAD_DIM=34, VAL_TOKENS=1000,
                             TRAIN_FILES="nowhere/*.bin", NEEDLE_EVAL=1, NEEDLE_SEQ_LEN="many", NEEDLE_FILES="gone/*.bin",
                             RANK=0, WORLD_SIZE=3, LOG_DIR=tmp_path / "logs", ATTN_BACKEND="flex")
    for arguments in ((), ("--check",)):
        line = refusal(broken, *arguments)
        for part in ("RUN_NAM is not a variable of this script; did you mean RUN_NAME?", "SEED=-1: must be at least 0",
                     "KEEP_EVERY=4 is not a multiple of CHECKPOINT_EVERY=3: 4 / 3 = 1.33", "HEAD_DIM=34 is not a multiple of 4",
                     "32 and 36 are", "VAL_TOKENS=1000 is not a multiple of VAL_SEQ_LEN=512: 1000 / 512 = 1.95",
                     "no shard matches 'nowhere/*.bin'", "NEEDLE_SEQ_LEN=many: must be a whole number", "3 processes",
                     "ATTN_BACKEND=flex needs a CUDA GPU"):
            assert part in line, part
        assert line.count("; ") == 10  # one of them within the first problem
    for name in ("TRAIN_SEQ_LEN", "BATCH_TOKENS"):  # the default in its place would not fit the other
        line = refusal(settings | {name: "many", "VAL_FILES": "nowhere/*.bin", "LOG_DIR": tmp_path / "logs"})
        assert f"{name}=many" in line and "nowhere" in line and line.count("; ") == 2  # one of them within the second
    for place, reason in ((dict(LOG_DIR=whole.one.parent, RUN_NAME="one"), "one already holds a run: set RESUME=auto"),
                          (dict(LOG_DIR=Path(data["TRAIN_FILES"]).parent / "train_0.bin"), "is no directory that can: choose"),
                          (dict(RUN_NAME="n" * 300), "has a part of more than 255 bytes: choose another")):
        for arguments in ((), ("--check",)):
            line = refusal(settings | place | dict(SEED="x"), *arguments)
            assert "SEED=x" in line and reason in line
    run, again = unfinished(whole.one, tmp_path)
    for _, path in lifecycle.checkpoints(run):
        damage(path, "truncation")
    line = refusal(settings | again | dict(SEED="x", VAL_FILES="nowhere/*.bin"), "--check")
    assert all(part in line for part in ("SEED=x", "nowhere", "none of 5 checkpoints can be read"))


# ---------------------------------------------------------------------------------------------------------------------
# Ablations, long runs


def test_an_ablation_killed_in_b(settings, tmp_path):
    """SIGKILL to the runner and all it started, in B: the next call skips A and resumes B; C fails, and the table says so."""
    variables = settings | SMALL | dict(LOG_DIR=tmp_path, NPROC=1, PYTHON=sys.executable, NEEDLE_EVAL=0, NUM_ITERATIONS=80,
                                        SPECTRAL_L_TRAIN=256, SPECTRAL_L_MAX=4096, VAL_LOSS_EVERY=0, CHECKPOINT_EVERY=4)
    command = dict(args=["./run_ablations.sh"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                   env=environment(variables))
    root = tmp_path / "ablation"
    (root / "arm_C").mkdir(parents=True)
    (root / "arm_C" / "state_step000004.pt").write_bytes(b"no checkpoint")  # the only one: C refuses to start over
    process = subprocess.Popen(**command)
    try:
        wait_for(lambda: saved(root / "arm_B"), "a checkpoint of B", 100)
    finally:
        process.kill()
        for pid in with_marker(str(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert status(root / "arm_A")["status"] == "complete" and status(root / "arm_B")["status"] == "running"
    before = snapshot(root / "arm_A")
    result = subprocess.run(**{**command, "timeout": 150})
    assert result.returncode == 1 and "arm A: already complete, skipped" in result.stdout
    assert snapshot(root / "arm_A") == before and "resumed from" in (root / "arm_B" / "log.txt").read_text()
    assert [r["step"] for r in records(root / "arm_B") if "train_loss" in r] == list(range(1, 81))
    assert "arm C: failed (exit status 1)" in result.stdout and "none of 1 checkpoints can be read" in result.stdout
    table = json.loads((root / "ablation.json").read_text())["arms"]
    assert [row["status"] for row in table] == ["complete", "complete", "failed"]


def test_two_thousand_steps_stay_flat(settings, start, tmp_path):
    """Memory, handles, threads and the CPU's time for a step; a line for every step, and logs bounded by their intervals."""
    fault = """
import json, os, time
write, samples = L.RunDirectory.metrics, []
def metrics(self, **record):
    write(self, **record)
    if record["step"] % 100 == 0:
        pages = int(open("/proc/self/statm").read().split()[1])
        files, tasks = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        samples.append((pages * 4096, files, tasks, time.process_time(), record["step"]))
    if record["step"] == 2000 and "train_loss" in record:
        (self.path / "samples.json").write_text(json.dumps(samples))
L.RunDirectory.metrics = metrics
"""
    variables = settings | SMALL | dict(NUM_ITERATIONS=2000, EPOCHS=0, VAL_LOSS_EVERY=200, CHECKPOINT_EVERY=200, LOG_EVERY=100,
                                        SPECTRAL_BIAS=0, BATCH_TOKENS=128, KEEP_CHECKPOINTS=2, RUN_NAME="long")
    assert start(variables, processes=1, fault=fault).finish(150).statuses == [0]
    run = tmp_path / "long"
    samples = json.loads((run / "samples.json").read_text())
    memory, handles, threads, _, _ = zip(*samples[4:], strict=True)
    assert max(memory) - memory[0] < 8 * 2**20, memory
    assert len(set(handles)) == 1 and len(set(threads)) == 1
    ms = [r["step_ms"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "step_ms" in r]
    assert len(ms) == 2000
    seconds = {step: spent for *_, spent, step in samples}  # not by the clock, which other tests beside this one slow down
    assert seconds[2000] - seconds[1800] < 1.5 * (seconds[300] - seconds[100])
    log = (run / "log.txt").read_text().partition("=" * 100)[2]
    assert log.count("\n") < 130 and saved(run) == [1800, 2000]


def test_the_guards_cost_less_than_half_a_percent_of_a_step(settings, start, tmp_path):
    """CPU time that both threads of rank 0 spend on them, against the steps of a small model: the demo's, by two processes."""
    fault = """
import atexit, time
spent = {}
def timed(owner, name):
    method = getattr(owner, name)
    def inner(*arguments, **options):
        started = time.thread_time()
        try:
            return method(*arguments, **options)
        finally:
            spent[name] = spent.get(name, 0) + time.thread_time() - started
    setattr(owner, name, inner)
timed(L.Watch, "look")
timed(L.RunDirectory, "write_status")
timed(S.Trainer, "compare_ranks")
timed(L.Signals, "agree")
L.HEARTBEAT_SECONDS = 1
summarise = S.summarise
def tell(trainer, needle):
    started = time.thread_time()
    for _ in range(trainer.step):  # what a step does for them without a function of its own
        torch.stack([torch.zeros(()), torch.full_like(torch.zeros(()), False)])
        L.PROGRESS.sequences += 1
        L.PROGRESS.collectives += 4
    spent["flag"] = time.thread_time() - started
    print("spent", sum(spent.values()), spent)
    return summarise(trainer, needle)
S.summarise = tell
"""
    variables = settings | dict(RUN_NAME="cost", NUM_LAYERS=4, NUM_HEADS=2, HEAD_DIM=64, MODEL_DIM=128, TRAIN_SEQ_LEN=1024,
                                BATCH_TOKENS=2048, NUM_ITERATIONS=40, EPOCHS=0, VAL_LOSS_EVERY=0, CHECKPOINT_EVERY=0,
                                RANK_CHECK_EVERY=20)
    result = start(variables, fault=fault).finish(200)
    assert result.statuses == [0, 0], result.err
    spent = float(re.search(r"spent ([\d.e-]+)", result.out)[1])
    seconds = json.loads((tmp_path / "cost" / "summary.json").read_text())["train_seconds"]
    print(re.search("spent.*", result.out)[0], "of", seconds)
    assert spent < 0.005 * seconds


def test_a_failing_compiler_is_met_without_warm_up_steps_too(settings, tmp_path, monkeypatch):
    """WARMUP_STEPS=0 and VAL_TOKENS=0 leave no other forward in which TORCH_COMPILE_FALLBACK_TO_EAGER can act."""
    compile = torch.compile

    def broken(graph, inputs):
        raise RuntimeError("no code for this graph")

    def failing(function, **options):
        return compile(function, backend=broken, **{k: v for k, v in options.items() if k != "mode"})

    monkeypatch.setattr(torch, "compile", failing)
    variables = settings | SMALL | dict(LOG_DIR=tmp_path, TORCH_COMPILE=1, WARMUP_STEPS=0, VAL_TOKENS=0, NUM_ITERATIONS=2)
    main(variables | dict(TORCH_COMPILE_FALLBACK_TO_EAGER=1, RUN_NAME="fell"))
    main(variables | dict(TORCH_COMPILE=0, RUN_NAME="plain"))
    assert records(tmp_path / "fell") == records(tmp_path / "plain") and len(records(tmp_path / "fell")) == 2
    assert math.isfinite(records(tmp_path / "fell")[-1]["train_loss"])


def test_every_promise_of_the_readme_names_tests_that_exist():
    (section,) = re.findall(r"## What a run promises\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)
    promises = re.split(r"\n\d+\. ", section)[1:]
    assert len(promises) == 10
    for promise in promises:
        proofs = re.findall(r"\*(?:(test_\w+\.py): )?(\w+)\*", promise)
        assert proofs
        for file, name in proofs:
            assert re.search(rf"^def test_\w*{name}", (ROOT / "tests" / (file or "test_faults.py")).read_text(), re.M), name
