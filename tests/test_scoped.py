"""The script as a whole: configuration and refusals, runs, resuming, evaluation, several processes, bad numbers.

Most runs happen in this process through `main`, on a model small enough for a fraction of a second a run; what only
whole processes can show (parity with baseline.py, torchrun, SIGKILL, what lands on stderr) starts them.
"""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import baseline
import lifecycle
import model.content
import scoped_medium as S
from data.shards import write_shard

ROOT = Path(S.__file__).resolve().parent
DELIMITER = 256
MODEL = dict(VOCAB_SIZE=257, DOC_DELIMITER=DELIMITER, NUM_LAYERS=3, NUM_HEADS=2, HEAD_DIM=32, MODEL_DIM=64)
SIZES = dict(TRAIN_SEQ_LEN=512, BATCH_TOKENS=1024, VAL_SEQ_LEN=512, VAL_TOKENS=1024, NUM_ITERATIONS=10)
RUN = dict(VAL_LOSS_EVERY=4, CHECKPOINT_EVERY=4, LOG_EVERY=1, SCOPE_LOG_EVERY=2)
ARM_A = dict(SPECTRAL_BIAS=0)
ARM_B = dict(SPECTRAL_BIAS=1, SPECTRAL_L_MAX=4096)
ARM_C = dict(ARM_B, SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SCHEDULE=1, SPECTRAL_POINTER_LOCAL_BLOCKS=1,
             SPECTRAL_POINTER_HALF_BLOCKS=1, SPECTRAL_POINTER_GLOBAL_BLOCKS=0, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=1,
             SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP_STEPS=5)
ARMS = dict(A=ARM_A, B=ARM_B, C=ARM_C)
NEEDLE = dict(NEEDLE_EVAL=1, NEEDLE_SEQ_LEN=512, NEEDLE_DISTANCES="64,300", NEEDLE_SAMPLES_PER_DISTANCE=3,
              NEEDLE_ANCHOR_LEN=2, NEEDLE_VALUE_LEN=2)

# ---------------------------------------------------------------------------------------------------------------------
# Harness


pytestmark = pytest.mark.usefixtures("one_thread_on_cpu")


def text(n, seed, longest):
    """Documents of random length over a few hundred bytes, each byte leaning on the one before."""
    rng = np.random.default_rng(seed)
    tokens = np.cumsum(rng.choice([1, 3, 7, 60], n, p=[0.4, 0.3, 0.2, 0.1])) % 251
    start = 0
    while start < n:
        tokens[start] = DELIMITER
        start += int(rng.integers(longest // 8, longest))
    return tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The variables that name two training shards, one epoch of which is 19 batches of 1024, and one of validation."""
    root = tmp_path_factory.mktemp("shards")
    write_shard(root / "train_0.bin", text(9000, 0, 700))
    write_shard(root / "train_1.bin", text(12000, 1, 700))
    write_shard(root / "val_0.bin", text(9000, 2, 3000))
    return dict(TRAIN_FILES=root / "train_*.bin", VAL_FILES=root / "val_*.bin")


def as_text(variables):
    return {name: str(value) for name, value in variables.items()}


def main(variables, *arguments):
    """`python scoped_medium.py` in this process; the environment holds these variables and nothing else."""
    with mock.patch.dict(os.environ, as_text(variables), clear=True):
        S.main(list(arguments))


def refusal(variables, *arguments):
    """The one line on stderr with which main refuses."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as err:
        main(variables, *arguments)
    assert stopped.value.code == 1 and re.fullmatch(r"error: [^\n]+\n", err.getvalue()), err.getvalue()
    return err.getvalue().rstrip()


def environment(variables):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | as_text(variables)


def start(variables, *arguments, processes=1, name="scoped_medium.py"):
    """A process of its own, or torchrun's."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / name), *arguments], cwd=ROOT, text=True,
                            env=environment(variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, timeout=200):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def records(run):
    """metrics.jsonl without the figures of the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("step_ms", "tokens_per_s", "memory_gib")}
            for line in lines]


def losses(run, key):
    return {r["step"]: r[key] for r in records(run) if key in r}


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def equal(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8) if a.ndim else a,
                                                                         b.view(torch.uint8) if b.ndim else b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def settings(data, logs):
    return data | MODEL | SIZES | RUN | dict(LOG_DIR=logs)


@pytest.fixture(scope="module")
def finished(settings, logs):
    """One uninterrupted run of each of the arms A and C, with a needle evaluation behind C."""
    torch.set_num_threads(1)
    torch._dynamo.utils.counters.clear()  # of the tests before, in this same process
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        main(settings | ARM_A | dict(RUN_NAME="whole_A"))
        main(settings | ARM_C | NEEDLE | dict(RUN_NAME="whole_C"))
    return SimpleNamespace(A=logs / "whole_A", C=logs / "whole_C")


# ---------------------------------------------------------------------------------------------------------------------
# Parity, several processes


def test_arm_a_is_the_baseline_bitwise(data, tmp_path):
    """Eight layers have short and long windows and one layer without attention."""
    variables = data | MODEL | SIZES | dict(NUM_LAYERS=8, NUM_ITERATIONS=20, TRAIN_SEQ_LEN=384, BATCH_TOKENS=768,
                                            VAL_LOSS_EVERY=5, SAVE_CHECKPOINT=0, LOG_DIR=tmp_path, SEED=3)
    started = start(variables | dict(RUN_NAME="frozen"), name="baseline.py"), start(variables | ARM_A | dict(RUN_NAME="ours"))
    for result in map(finish, started):
        assert result.returncode == 0, result.stderr
    theirs = [json.loads(line) for line in (tmp_path / "frozen.txt").read_text().splitlines() if line.startswith('{"step"')]
    for key, count in (("train_loss", 20), ("val_loss", 5)):
        expected = {r["step"]: repr(r[key]) for r in theirs if key in r}
        assert len(expected) == count
        assert {step: repr(loss) for step, loss in losses(tmp_path / "ours", key).items()} == expected


@pytest.fixture(scope="module")
def two_processes(settings, logs, finished):
    result = finish(start(settings | ARM_C | dict(RUN_NAME="two", LOG_ALL_RANKS=1), processes=2))
    assert result.returncode == 0, result.stderr
    return logs / "two"


def test_two_processes_give_the_losses_of_one(two_processes, finished):
    for key in ("train_loss", "val_loss", "grad_norm"):
        one, two = losses(finished.C, key), losses(two_processes, key)
        assert one.keys() == two.keys()
        # Nothing but the order of float sums differs; twenty Newton-Schulz steps stretch it.
        assert [two[s] for s in one] == pytest.approx(list(one.values()), rel=1e-4 if key != "grad_norm" else 1e-2)
    assert losses(two_processes, "val_loss")[0] == pytest.approx(losses(finished.C, "val_loss")[0], rel=1e-6)
    assert losses(two_processes, "train_loss")[1] == pytest.approx(losses(finished.C, "train_loss")[1], rel=1e-6)


def test_two_processes_mix_and_search_as_one(settings, tmp_path):
    """Three sequences a step, so that the two have unequal shares of what is mixed."""
    variables = settings | dict(LOG_DIR=tmp_path, NUM_ITERATIONS=4, BATCH_TOKENS=3 * 512, TRAIN_SEQ_LEN=512, RETRIEVAL_MIX=0.3,
                                SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SOURCE="content", SPECTRAL_POINTER_NEAR_BLOCKS=1,
                                SPECTRAL_POINTER_HEADS=1, SPECTRAL_LANDMARK_DIM=16, SPECTRAL_POINTER_FAR_BLOCKS=2,
                                SPECTRAL_POINTER_FLOOR=-30, SPECTRAL_POINTER_FOLLOW=8)
    result = finish(start(variables | dict(RUN_NAME="two"), processes=2))
    assert result.returncode == 0, result.stderr
    main(variables | dict(RUN_NAME="one"))
    one, two = (losses(tmp_path / name, "train_loss") for name in ("one", "two"))
    assert len(one) == 4 and [two[s] for s in one] == pytest.approx(list(one.values()), rel=1e-4)
    main(variables | dict(RUN_NAME="plain", RETRIEVAL_MIX=0))
    assert losses(tmp_path / "plain", "train_loss")[4] != pytest.approx(one[4], rel=1e-3)


def test_every_rank_has_a_log_if_asked(two_processes, finished):
    assert "step 10/10 val_loss" in (two_processes / "log_rank1.txt").read_text()
    assert not (finished.C / "log_rank1.txt").exists()
    assert json.loads((two_processes / "summary.json").read_text())["world_size"] == 2
    assert len(losses(two_processes, "train_loss")) == len([r for r in records(two_processes) if "train_loss" in r]) == 10


def test_needle_eval_is_the_same_for_one_and_two_processes(data, finished, tmp_path):
    variables = dict(VAL_FILES=data["VAL_FILES"], LOAD_CHECKPOINT=finished.C / "state_step000010.pt", NUM_ITERATIONS=0,
                     VAL_TOKENS=0, LOG_DIR=tmp_path) | NEEDLE
    result = finish(start(variables | dict(RUN_NAME="two"), processes=2))
    assert result.returncode == 0, result.stderr
    main(variables | dict(RUN_NAME="one"))
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["needle"] for name in ("one", "two"))
    assert one == two == json.loads((finished.C / "summary.json").read_text())["needle"]
    assert one["tag"] == "NEEDLE_EVAL" and one["step"] == 10
    assert [(cell["distance"], cell["n"]) for cell in one["distances"]] == [(64, 3), (300, 3)]
    printed = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"tag": "NEEDLE_EVAL"')]
    assert printed == [two]  # rank 0 prints one blob


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the script catches it."""


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step, key): the next run dies as soon as it has written the record of that step with that key."""
    write = S.RunDirectory.metrics

    def arrange(step, key):
        def metrics(self, **record):
            write(self, **record)
            if record["step"] == step and key in record:
                raise Killed

        monkeypatch.setattr(S.RunDirectory, "metrics", metrics)

    return arrange


@pytest.mark.parametrize("arm", ["A", "C"])
def test_a_run_stopped_again_and_again_is_the_uninterrupted_run(arm, settings, logs, finished, killed_at):
    """Stops: without a checkpoint; before, between and behind the writing of checkpoint 4 and the validation at 4; in
    mid-interval; before the last validation and before the last checkpoint. RESUME=auto serves for the first start too."""
    variables = settings | ARMS[arm] | dict(RUN_NAME=f"stopped_{arm}", RESUME="auto")
    run, whole = logs / f"stopped_{arm}", getattr(finished, arm)
    stops = [(1, "train_loss"), (4, "train_loss"), (4, "val_loss"), (7, "train_loss"), (10, "train_loss"), (10, "val_loss")]
    resumed_at = [None, None, None, 4, 4, 8, 8]  # the first checkpoint is written behind the record of step 4
    for stop, expected in zip([*stops, (None, "")], resumed_at, strict=True):
        killed_at(*stop)
        if stop[0]:
            with pytest.raises(Killed):
                main(variables)
        else:
            main(variables)
        resumptions = re.findall(r"resumed from .* at step (\d+)", (run / "log.txt").read_text())
        assert (int(resumptions[-1]) if resumptions else None) == expected
        seen = [(r["step"], "val_loss" in r) for r in records(run)]
        assert len(seen) == len(set(seen)), "a step is recorded twice"
    assert records(run) == records(whole)
    last, reference = load(run / "state_step000010.pt"), load(whole / "state_step000010.pt")
    for key in ("model", "optimizers", "loader", "step"):
        assert equal(last[key], reference[key]), key
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (run, whole))
    for key in ("steps", "train_loss", "val_loss", "kv_blocks_per_query", "status"):
        assert summary[key] == expected[key]


def test_a_complete_run_resumed_changes_nothing(settings, logs, finished):
    variables = settings | ARM_A | dict(RUN_NAME="again")
    main(variables)
    before = records(logs / "again")
    main(variables | dict(RESUME="auto"))
    assert records(logs / "again") == before == records(finished.A)


def test_a_killed_process_resumes(settings, logs, finished):
    """SIGKILL at some moment after the first checkpoint, from outside."""
    variables = settings | ARM_C | dict(RUN_NAME="sigkill")
    process = start(variables)
    try:
        deadline = time.monotonic() + 120
        while not (logs / "sigkill" / "state_step000004.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL and not (logs / "sigkill" / "summary.json").exists()
    main(variables | dict(RESUME="auto"))
    assert "resumed from" in (logs / "sigkill" / "log.txt").read_text()
    assert records(logs / "sigkill") == records(finished.C)


def test_resume_from_a_named_checkpoint(settings, logs, finished):
    main(settings | ARM_A | dict(RUN_NAME="named", RESUME=finished.A / "state_step000004.pt"))
    kept = [r for r in records(finished.A) if r["step"] > 4 or (r["step"] == 4 and "val_loss" in r)]
    assert records(logs / "named") == kept


def test_resuming_restores_the_random_states(settings, finished, tmp_path):
    path = finished.C / "state_step000004.pt"
    trainer = trainer_for(settings, tmp_path, **ARM_C)
    random.seed(99)
    torch.manual_seed(99)
    trainer.resume(load(path), path)
    rng = load(path)["rng"]
    assert random.getstate() == rng["python"] and torch.equal(torch.get_rng_state(), rng["torch"])


def test_a_line_cut_in_half_is_dropped(tmp_path):
    config = S.Config(log_dir=str(tmp_path), run_name="cut", resume="auto")
    run = S.RunDirectory(config)
    for step in range(1, 4):
        run.metrics(step=step, train_loss=1.0)
    path = tmp_path / "cut" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "tr')
    run.drop_metrics_after(2)
    assert [r["step"] for r in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize("change", [dict(SEED=3), dict(MODEL_DIM=128), dict(SPECTRAL_BETA=0.5), dict(NUM_ITERATIONS=12),
                                    dict(COOLDOWN_FRAC=0.5)])
def test_resume_with_another_configuration_is_refused_and_touches_nothing(change, settings, finished):
    before = snapshot(finished.C)
    line = refusal(settings | ARM_C | dict(RUN_NAME="whole_C", RESUME="auto") | change)
    name, value = next(iter(change.items()))
    assert f"{name} was" in line and f"is {value}" in line
    assert snapshot(finished.C) == before


def test_resume_may_change_what_does_not_touch_the_losses(settings, logs, finished, killed_at):
    variables = settings | ARM_A | dict(RUN_NAME="relaxed")
    killed_at(6, "train_loss")
    with pytest.raises(Killed):
        main(variables)
    killed_at(None, "")
    main(variables | dict(RESUME="auto", LOG_EVERY=3, CHECKPOINT_EVERY=1, SCOPE_LOG_EVERY=0))
    assert records(logs / "relaxed") == records(finished.A)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("arm", ["A", "C"])
def test_what_a_checkpoint_holds(arm, finished):
    run = getattr(finished, arm)
    assert sorted(p.name for p in run.glob("*.pt")) == [f"state_step{step:06d}.pt" for step in (4, 8, 10)]
    for step in (4, 8, 10):
        state = load(run / f"state_step{step:06d}.pt")
        assert {"model", "optimizers", "loader", "step", "rng", "config"} <= state.keys()
        assert state["step"] == step
        assert state["config"]["num_layers"] == 3 and state["config"]["spectral_bias"] is (arm == "C")
        config = S.Config(**state["config"])
        expected = S.build_model(config, torch.device("cpu")).state_dict()
        assert {k: v.shape for k, v in state["model"].items()} == {k: v.shape for k, v in expected.items()}
        momenta = sum(len(opt["state"]) for opt in state["optimizers"])
        assert momenta == len(expected)  # every parameter has an optimizer state
        # 9000 tokens hold 8 batches: ceil((9000 - 1024 - 1) / 1024)
        assert state["loader"] == dict(epoch=0, shard=step // 8, batch=step % 8)


def test_checkpoints_may_be_forgone(settings, logs):
    main(settings | ARM_A | dict(RUN_NAME="unsaved", SAVE_CHECKPOINT=0, NUM_ITERATIONS=2, CHECKPOINT_EVERY=1))
    assert not list((logs / "unsaved").glob("*.pt")) and (logs / "unsaved" / "summary.json").exists()


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    lifecycle.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(S.Stop, match="No space"):
        lifecycle.write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"] and path.read_bytes() == b"old"


def test_a_file_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", str(a))), replace(a, b)))
    lifecycle.write_atomically(tmp_path / "x", lambda file: file.write(b"1"))
    temporary = events[0][1]
    assert Path(temporary).parent == tmp_path and temporary != str(tmp_path / "x")
    assert events == [("fsync", temporary), ("replace", temporary), ("fsync", str(tmp_path))]


def test_the_newest_checkpoint_is_by_number(tmp_path):
    assert lifecycle.checkpoints(tmp_path) == lifecycle.checkpoints(tmp_path / "nowhere") == []
    for name in ("state_step000007.pt", "state_step999999.pt", "state_step1000000.pt", ".state_step2000000.pt.17.tmp",
                 "state_step3000000.pt.tmp", "state_step_old.pt"):
        (tmp_path / name).write_bytes(b"")
    assert [step for step, _ in lifecycle.checkpoints(tmp_path)] == [7, 999999, 1000000]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation of a checkpoint


@pytest.mark.parametrize("arm,step", [("A", 10), ("C", 4), ("C", 10)])
def test_evaluation_repeats_the_training_runs_validation(arm, step, data, finished, tmp_path):
    """Model and spectral settings, and the state of every schedule, come from the checkpoint; no training data is needed."""
    path = getattr(finished, arm) / f"state_step{step:06d}.pt"
    main(dict(VAL_FILES=data["VAL_FILES"], VAL_SEQ_LEN=512, VAL_TOKENS=1024, LOAD_CHECKPOINT=path, NUM_ITERATIONS=0,
              VAL_LOSS_EVERY=0, LOG_DIR=tmp_path, RUN_NAME="eval", TRAIN_FILES="nowhere/*.bin") | NEEDLE)
    expected = losses(getattr(finished, arm), "val_loss")[step]
    assert records(tmp_path / "eval") == [dict(step=step, val_loss=expected)]
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert (summary["val_loss"], summary["arm"], summary["steps"]) == (expected, arm, step)
    assert summary["needle"]["step"] == step and summary["train_loss"] is None
    assert not list((tmp_path / "eval").glob("*.pt"))
    trained = json.loads((getattr(finished, arm) / "config.json").read_text())
    evaluated = json.loads((tmp_path / "eval" / "config.json").read_text())
    for field in dataclasses.fields(S.Config):
        if field.metadata["group"] in ("model", "spectral"):
            assert evaluated[field.name] == trained[field.name], field.name
    assert evaluated["train_seq_len"] != trained["train_seq_len"]  # so the shortest wavelength really was inherited


def test_training_may_start_from_loaded_weights(settings, logs, finished):
    main(settings | ARM_A | dict(RUN_NAME="tuned", LOAD_CHECKPOINT=finished.A / "state_step000010.pt", NUM_ITERATIONS=1))
    assert losses(logs / "tuned", "val_loss")[0] < losses(finished.A, "val_loss")[4]  # against ln 384 of fresh weights


def test_an_explicit_setting_beats_the_checkpoints(data, finished, tmp_path):
    variables = dict(VAL_FILES=data["VAL_FILES"], VAL_SEQ_LEN=512, VAL_TOKENS=1024, NUM_ITERATIONS=0, LOG_DIR=tmp_path,
                     LOAD_CHECKPOINT=finished.C / "state_step000010.pt")
    main(variables | dict(RUN_NAME="forced", SPECTRAL_POINTER_VAL_FORCE=1, SPECTRAL_POINTER_VAL_HALF_BLOCKS=0))
    narrow = json.loads((tmp_path / "forced" / "summary.json").read_text())
    whole = json.loads((finished.C / "summary.json").read_text())
    assert narrow["kv_blocks_per_query"] < whole["kv_blocks_per_query"] and narrow["val_loss"] != whole["val_loss"]


class Hostile:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def damaged_checkpoint(kind, good, tmp_path):
    path, content = tmp_path / f"{kind}.pt", bytearray(good.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_bytes(b"<!DOCTYPE html>\n<html>\n404: not found\n</html>\n")
    elif kind == "hostile":
        torch.save(dict(config={}, model={}, step=Hostile(tmp_path / "executed")), path)
    elif kind == "hostile_pickle":
        path.write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    elif kind == "flipped_bit":  # in the middle of the largest tensor
        state = load(good)
        largest = max(state["model"].values(), key=torch.numel).numpy().tobytes()
        content[bytes(content).index(largest) + len(largest) // 2] ^= 64
        path.write_bytes(content)
    elif kind == "foreign":
        torch.save(dict(state_dict={}), path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "no_optimizers":
        torch.save({k: v for k, v in load(good).items() if k in ("config", "model")}, path)
    elif kind == "directory":
        path.mkdir()
    return path


KINDS = ["missing", "truncated", "empty", "html", "hostile", "hostile_pickle", "flipped_bit", "foreign", "list",
         "no_optimizers", "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_refused(kind, settings, finished, tmp_path, capfd):
    path = damaged_checkpoint(kind, finished.A / "state_step000010.pt", tmp_path)
    variables = settings | dict(LOG_DIR=tmp_path / "logs")
    for use in (dict(LOAD_CHECKPOINT=path, NUM_ITERATIONS=0), dict(RESUME=path)):
        assert str(path) in refusal(variables | use)
        assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "executed").exists()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change,expected", [
    (dict(MODEL_DIM=128), "MODEL_DIM was 64, is 128"),
    (dict(NUM_LAYERS=4, VOCAB_SIZE=300), "VOCAB_SIZE was 257, is 300; NUM_LAYERS was 3, is 4"),
    (ARM_B, "does not fit this model"),
])
def test_a_checkpoint_of_another_model_is_refused(change, expected, settings, finished, tmp_path):
    path = finished.A / "state_step000010.pt"
    for iterations in (0, 10):
        line = refusal(settings | dict(LOAD_CHECKPOINT=path, NUM_ITERATIONS=iterations, LOG_DIR=tmp_path / "logs") | change)
        assert expected in line and str(path) in line
        assert not (tmp_path / "logs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

SPECTRAL = ARM_B
REFUSED = {  # name: (variables, texts of the line)
    "unknown spectral": (dict(SPECTRAL_POINTER_LOCAL_BLOCK=3), ["SPECTRAL_POINTER_LOCAL_BLOCK is not", "LOCAL_BLOCKS?"]),
    "unknown spectral, unlike any": (dict(SPECTRAL_QQQQQQ=1), ["SPECTRAL_QQQQQQ is not a variable"]),
    "unknown scope, unlike any": (dict(SCOPE_QQQQQQ=1), ["SCOPE_QQQQQQ is not a variable"]),
    "unknown flexattn, unlike any": (dict(FLEXATTN_QQQQQQ=1), ["FLEXATTN_QQQQQQ is not a variable"]),
    "unknown needle, unlike any": (dict(NEEDLE_QQQQQQ=1), ["NEEDLE_QQQQQQ is not a variable"]),
    "unknown retrieval": (dict(RETRIEVAL_SHARE=0.3), ["RETRIEVAL_SHARE is not a variable"]),
    "near miss without an underscore": (dict(RETRIEVALMIX=0.3), ["did you mean RETRIEVAL_MIX?"]),
    "passages without a mix": (dict(RETRIEVAL_PASSAGES=0.3), ["RETRIEVAL_PASSAGES=0.3 is a share of RETRIEVAL_MIX"]),
    "unknown needle": (dict(NEEDLE_DISTANCE="64"), ["NEEDLE_DISTANCE is not", "did you mean NEEDLE_DISTANCES?"]),
    "unknown scope": (dict(SCOPE_LOG_EVRY=5), ["SCOPE_LOG_EVRY is not", "did you mean SCOPE_LOG_EVERY?"]),
    "unknown flexattn": (dict(FLEXATTN_COMPIL=1), ["did you mean FLEXATTN_COMPILE?"]),
    "near miss": (dict(NUM_ITERATION=5), ["NUM_ITERATION is not", "did you mean NUM_ITERATIONS?"]),
    "near miss 2": (dict(VAL_TOKEN=512), ["did you mean VAL_TOKENS?"]),
    "near miss 3": (dict(TRAIN_SEQLEN=512), ["did you mean TRAIN_SEQ_LEN?"]),
    "no whole number": (dict(NUM_ITERATIONS="ten"), ["NUM_ITERATIONS=ten", "whole number"]),
    "fraction": (dict(TRAIN_SEQ_LEN="512.0"), ["TRAIN_SEQ_LEN=512.0", "whole number"]),
    "empty number": (dict(BATCH_TOKENS=""), ["BATCH_TOKENS=", "whole number"]),
    "no number": (dict(SPECTRAL_LR="0,1"), ["SPECTRAL_LR=0,1", "must be a number"]),
    "not a number": (dict(COOLDOWN_FRAC="nan"), ["COOLDOWN_FRAC=nan"]),
    "infinite": (dict(SPECTRAL_LR="inf"), ["SPECTRAL_LR=inf"]),
    "no bool": (dict(SPECTRAL_BIAS="yes"), ["SPECTRAL_BIAS=yes", "0 or 1"]),
    "no choice": (dict(SPECTRAL_IMPL="qkaug"), ["SPECTRAL_IMPL=qkaug", "qk_aug, score_mod"]),
    "compile mode": (dict(TORCH_COMPILE_MODE="fast"), ["reduce-overhead"]),
    "no list": (dict(NEEDLE_DISTANCES="64;128"), ["NEEDLE_DISTANCES=64;128", "separated by commas"]),
    "negative": (dict(NUM_ITERATIONS=-1), ["NUM_ITERATIONS=-1", "at least 0"]),
    "too large": (dict(SPECTRAL_POINTER_GLOBAL_BLOCKS=3), ["SPECTRAL_POINTER_GLOBAL_BLOCKS=3", "at most 2"]),
    "vocabulary beyond uint16": (dict(VOCAB_SIZE=65537), ["VOCAB_SIZE=65537", "65536"]),
    "cooldown above 1": (dict(COOLDOWN_FRAC=1.5), ["COOLDOWN_FRAC=1.5", "at most 1"]),
    "train length": (dict(TRAIN_SEQ_LEN=500, BATCH_TOKENS=1000), ["TRAIN_SEQ_LEN=500", "128", "384 and 512"]),
    "val length": (dict(VAL_SEQ_LEN=700, VAL_TOKENS=1400), ["VAL_SEQ_LEN=700", "640 and 768"]),
    "needle length": (NEEDLE | dict(NEEDLE_SEQ_LEN=600), ["NEEDLE_SEQ_LEN=600"]),
    "batch": (dict(BATCH_TOKENS=1100), ["BATCH_TOKENS=1100", "TRAIN_SEQ_LEN=512"]),
    "val tokens": (dict(VAL_TOKENS=1000), ["VAL_TOKENS=1000", "VAL_SEQ_LEN=512"]),
    "distance too long": (NEEDLE | dict(NEEDLE_DISTANCES="64,508"), ["508", "NEEDLE_SEQ_LEN=512"]),
    "distance too short": (NEEDLE | dict(NEEDLE_DISTANCES="3"), ["NEEDLE_DISTANCES: 3"]),
    "delimiter": (dict(DOC_DELIMITER=257), ["DOC_DELIMITER=257", "VOCAB_SIZE=257"]),
    "head dim": (dict(HEAD_DIM=34), ["HEAD_DIM=34", "multiple of 4"]),
    "run name": (dict(RUN_NAME="a/b"), ["RUN_NAME=a/b"]),
    "run name up": (dict(RUN_NAME=".."), ["RUN_NAME=.."]),
    "resume without a name": (dict(RESUME="auto"), ["RESUME=auto needs RUN_NAME"]),
    "fold": (SPECTRAL | dict(SPECTRAL_BANDS=7), ["2 x SPECTRAL_BANDS + 4 = 18", "16", "append"]),
    "layer without attention": (SPECTRAL | dict(NUM_LAYERS=8, SPECTRAL_LAYERS="0,3"), ["SPECTRAL_LAYERS=0,3", "[3]"]),
    "layer beyond": (SPECTRAL | dict(SPECTRAL_LAYERS="1,3"), ["[3]", "3 layers"]),
    "layer below": (SPECTRAL | dict(SPECTRAL_LAYERS="-1"), ["[-1]"]),
    "layers no ids": (SPECTRAL | dict(SPECTRAL_LAYERS="short"), ["SPECTRAL_LAYERS=short"]),
    "fractions": (ARM_C | dict(SPECTRAL_POINTER_MID_FRAC=0.5), ["MID_FRAC=0.5", "FULL_FRAC=0.3"]),
    "offsets without bias": (dict(SPECTRAL_USE_POINTER_MASK=1, SPECTRAL_POINTER_SOURCE="offset"),
                             ["SPECTRAL_POINTER_SOURCE=offset needs SPECTRAL_BIAS=1"]),
    "val radius": (ARM_C | dict(SPECTRAL_POINTER_VAL_HALF_BLOCKS=2), ["VAL_HALF_BLOCKS=2", "HALF_BLOCKS=1"]),
    "wavelengths": (SPECTRAL | dict(SPECTRAL_L_MAX=512), ["SPECTRAL_L_MAX=512", "l_train=512"]),
    "short wavelength": (SPECTRAL | dict(SPECTRAL_L_TRAIN=128), ["SPECTRAL_L_TRAIN=128"]),
    "positions": (SPECTRAL | dict(VAL_SEQ_LEN=2**22, VAL_TOKENS=0), ["2097152"]),
    "needle files unused": (dict(NEEDLE_FILES="x.bin"), ["NEEDLE_FILES", "NEEDLE_EVAL"]),
    "no such shards": (dict(TRAIN_FILES="nowhere/*.bin"), ["nowhere/*.bin"]),
    "no such validation": (dict(VAL_FILES="nowhere/v*.bin"), ["nowhere/v*.bin"]),
    "no such haystack": (NEEDLE | dict(NEEDLE_FILES="nowhere/n*.bin"), ["nowhere/n*.bin"]),
    "haystack too short": (NEEDLE | dict(NEEDLE_SEQ_LEN=4096), ["NEEDLE_SEQ_LEN=4096"]),
    "too few tokens": (dict(NUM_ITERATIONS=20), ["19 batches", "20 wanted", "EPOCHS"]),
    "too few epochs": (dict(NUM_ITERATIONS=39, EPOCHS=2), ["2 x", "39 wanted"]),
    "batch beyond a shard": (dict(BATCH_TOKENS=9216), ["train_0.bin", "9000 tokens"]),
    "validation beyond a shard": (dict(VAL_TOKENS=9216), ["val_0.bin", "9000 tokens"]),
    "nothing to do": (dict(NUM_ITERATIONS=0, VAL_TOKENS=0), ["nothing to do"]),
    "more processes than sequences": (dict(RANK=0, WORLD_SIZE=3, LOCAL_RANK=0), ["3 processes", "2 sequences"]),
    "flex on the CPU": (dict(ATTN_BACKEND="flex"), ["ATTN_BACKEND=flex", "CUDA"]),
    "triton on the CPU": (dict(ATTN_BACKEND="triton"), ["ATTN_BACKEND=triton", "CUDA"]),
    "triton and score_mod": (ARM_B | dict(ATTN_BACKEND="triton", SPECTRAL_IMPL="score_mod"),
                             ["ATTN_BACKEND=triton", "SPECTRAL_IMPL=score_mod"]),
    "triton and a graph break": (dict(ATTN_BACKEND="triton", FLEXATTN_DYNAMO_DISABLE=1), ["FLEXATTN_DYNAMO_DISABLE=1"]),
    "triton and its head dims": (dict(ATTN_BACKEND="triton", HEAD_DIM=48), ["HEAD_DIM", "not 48"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name, settings, tmp_path, capfd):
    variables, expected = REFUSED[name]
    for arguments in ((), ("--check",)):
        line = refusal(settings | dict(LOG_DIR=tmp_path / "logs") | variables, *arguments)
        assert all(part in line for part in expected), line
    assert not (tmp_path / "logs").exists()
    assert capfd.readouterr() == ("", "")


def test_a_run_that_started_from_loaded_weights_is_resumed_by_the_same_command(settings, logs, finished):
    variables = settings | ARM_A | dict(RUN_NAME="loaded", RESUME="auto", LOAD_CHECKPOINT=finished.A / "state_step000010.pt",
                                        NUM_ITERATIONS=2, CHECKPOINT_EVERY=1)
    main(variables)
    directory = logs / "loaded"
    whole = losses(directory, "train_loss")
    assert whole[1] < losses(finished.A, "train_loss")[1]  # against fresh weights
    (directory / "state_step000002.pt").unlink()
    (directory / "summary.json").unlink()
    main(variables)
    assert f"resumed from {directory / 'state_step000001.pt'}" in (directory / "log.txt").read_text()
    assert losses(directory, "train_loss") == whole


def test_resuming_from_a_path_and_loading_exclude_each_other(settings, finished):
    path = finished.A / "state_step000010.pt"
    assert "exclude each other" in refusal(settings | dict(RESUME=path, LOAD_CHECKPOINT=path))


def test_every_problem_is_named_at_once(settings, tmp_path):
    line = refusal(settings | dict(SPECTRAL_BIA=1, NUM_ITERATIONS="x", SEED=-1, SPECTRAL_LAYERS="z"))
    assert all(part in line for part in ("SPECTRAL_BIA ", "NUM_ITERATIONS=x", "SEED=-1"))
    line = refusal(settings | SPECTRAL | dict(TRAIN_SEQ_LEN=500, VAL_TOKENS=1000, DOC_DELIMITER=300, SPECTRAL_LAYERS="z",
                                              HEAD_DIM=30))
    assert all(part in line for part in ("TRAIN_SEQ_LEN=500", "VAL_TOKENS=1000", "DOC_DELIMITER=300", "SPECTRAL_LAYERS=z",
                                         "HEAD_DIM=30"))


def test_foreign_variables_are_left_alone(settings, tmp_path, capsys):
    main(settings | dict(LOG_DIR=tmp_path / "logs", NUM_THREADS=3, MODEL="x", OMP_NUM_THREADS=1, TORCH_LOGS="+dynamo",
                         CUDA_VISIBLE_DEVICES="", TRAINING="1"), "--check")
    assert "valid" in capsys.readouterr().out


def write_bytes(path, magic=20240520, version=1, count=3000, tokens=3000, token=5):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    path.write_bytes(header.tobytes() + np.full(tokens, token, "<u2").tobytes())


@pytest.mark.parametrize("fault,expected", [
    (dict(magic=7), "magic 7"), (dict(version=2), "version 2"), (dict(tokens=2999), "truncated"),
    (dict(tokens=3001), "too long"), (dict(count=0), "0 tokens"), (dict(token=257), "token 257 at offset 0"),
    (dict(count=500, tokens=500), "500 tokens"), (None, "0 bytes")])
@pytest.mark.parametrize("which", ["TRAIN_FILES", "VAL_FILES"])
def test_faulty_shards_are_refused(fault, expected, which, settings, tmp_path):
    if fault is None:
        (tmp_path / "shard_1.bin").write_bytes(b"")
    else:
        write_bytes(tmp_path / "shard_1.bin", **fault)
    variables = settings | {which: tmp_path / "*.bin", "LOG_DIR": tmp_path / "logs", "NUM_ITERATIONS": 1}
    for arguments in ((), ("--check",)):
        line = refusal(variables, *arguments)
        assert expected in line and str(tmp_path / "shard_1.bin") in line
    assert not (tmp_path / "logs").exists()


def test_a_bad_token_in_a_later_shard(settings, tmp_path):
    """--check reads every token; a run reads a shard when its turn comes, and then stops as cleanly."""
    write_bytes(tmp_path / "t_0.bin")
    write_bytes(tmp_path / "t_1.bin", token=300)
    variables = settings | dict(TRAIN_FILES=tmp_path / "t_*.bin", NUM_ITERATIONS=3, LOG_DIR=tmp_path / "logs", RUN_NAME="r",
                                CHECKPOINT_EVERY=1)
    expected = f"{tmp_path / 't_1.bin'}: token 300 at offset 0"
    assert expected in refusal(variables, "--check")
    assert not (tmp_path / "logs").exists()
    assert expected in refusal(variables)
    assert load(tmp_path / "logs" / "r" / "state_step000001.pt")["step"] == 1


def test_a_run_is_never_overwritten(settings, finished):
    before = snapshot(finished.A)
    assert "RESUME=auto" in refusal(settings | ARM_A | dict(RUN_NAME="whole_A"))
    assert snapshot(finished.A) == before


def test_a_log_directory_that_cannot_be(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(settings | dict(LOG_DIR=tmp_path / "file", RUN_NAME="r"))


@pytest.mark.parametrize("arguments", [["--chek"], ["--check", "x"], ["NUM_ITERATIONS=5"], ["--help", "--check"]])
def test_unknown_arguments(arguments, settings, tmp_path):
    line = refusal(settings | dict(LOG_DIR=tmp_path / "logs"), *arguments)
    assert " ".join(arguments) in line and "--help" in line
    assert not (tmp_path / "logs").exists()


def test_what_a_shell_sees_of_a_refusal(settings, tmp_path):
    variables = settings | dict(LOG_DIR=tmp_path / "logs")
    torch.save(dict(config={}, model={}, step=Hostile(tmp_path / "executed")), tmp_path / "x.pt")
    started = [start(variables | dict(SPECTRAL_BIA=1, TRAIN_SEQ_LEN="x")),
               start(variables | dict(LOAD_CHECKPOINT=tmp_path / "x.pt", NUM_ITERATIONS=0))]
    for result in map(finish, started):
        assert result.returncode == 1 and result.stdout == ""
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert not (tmp_path / "logs").exists() and not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------------------
# --check, --help, the tables


@pytest.mark.parametrize("arm", ["A", "B", "C"])
def test_check_trains_nothing(arm, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(S, "Trainer", None)
    main(settings | ARMS[arm] | NEEDLE | dict(LOG_DIR=tmp_path / "logs"), "--check")
    out = capsys.readouterr().out
    config = S.Config.from_environment(as_text(MODEL | SIZES | ARMS[arm]))
    parameters = sum(p.numel() for p in S.GPT(config).parameters())
    assert f"arm {arm}" in out and f"{parameters:,} parameters" in out and out.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_the_default_configuration_is_valid():
    config = S.Config.from_environment({})
    assert config.arm == "A" and config.spectral_l_train == config.train_seq_len == 65536
    for variables in (dict(SPECTRAL_BIAS="1"), dict(SPECTRAL_BIAS="1", SPECTRAL_USE_POINTER_MASK="1", NEEDLE_EVAL="1")):
        assert S.Config.from_environment(variables).spectral_layer_ids() == {0, 4, 11, 15}


def test_help_lists_every_variable(capsys):
    main({}, "--help")
    out = capsys.readouterr().out
    for field in dataclasses.fields(S.Config):
        assert re.search(rf"^  {field.name.upper()}=.*\n +\S", out, re.M), field.name
        assert field.metadata["help"] in out
    assert "torchrun --standalone" in out


def test_readme_holds_the_variable_table():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    table = re.search(r"<!-- variables -->\n(.*?)<!-- /variables -->", readme.read_text(), re.S)
    assert table, "README.md lacks the lines <!-- variables --> and <!-- /variables -->"
    assert table[1].strip() == S.variable_table(markdown=True)


CONTRACT = dict(  # variable: default, None where the contract leaves it open
    NUM_ITERATIONS=2000, TRAIN_SEQ_LEN=65536, VAL_SEQ_LEN=65536, VAL_LOSS_EVERY=None, VAL_TOKENS=10485760, SEED=None,
    LOAD_CHECKPOINT=None, SCOPE_LOG_EVERY=None,
    SPECTRAL_BIAS=None, SPECTRAL_IMPL=None, SPECTRAL_USE_POINTER_MASK=None, SPECTRAL_POINTER_SCHEDULE=None,
    SPECTRAL_POINTER_LOCAL_BLOCKS=16, SPECTRAL_POINTER_HALF_BLOCKS=4, SPECTRAL_POINTER_GLOBAL_BLOCKS=None,
    SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=2, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP_STEPS=300,
    SPECTRAL_POINTER_VAL_FORCE=None, SPECTRAL_POINTER_VAL_HALF_BLOCKS=None,
    TORCH_COMPILE=None, TORCH_COMPILE_MODE=None, TORCHDYNAMO_VERBOSE=None, TORCHDYNAMO_SUPPRESS_ERRORS=None,
    TORCH_COMPILE_FALLBACK_TO_EAGER=None, FLEXATTN_DYNAMO_DISABLE=None, FLEXATTN_COMPILE=None, LOG_ALL_RANKS=None,
    NEEDLE_EVAL=None, NEEDLE_SEQ_LEN=65536, NEEDLE_DISTANCES=(4096, 8192, 16384, 32768), NEEDLE_SAMPLES_PER_DISTANCE=8,
    NEEDLE_ANCHOR_LEN=4, NEEDLE_VALUE_LEN=8,
    TRAIN_FILES=None, VAL_FILES=None, RUN_NAME=None, LOG_DIR="logs", SAVE_CHECKPOINT=None, CHECKPOINT_EVERY=None,
    RESUME=None, BATCH_TOKENS=524288, NUM_LAYERS=16, NUM_HEADS=8, HEAD_DIM=128, MODEL_DIM=1024, VOCAB_SIZE=50257,
    DOC_DELIMITER=50256)
VALUES = dict(SPECTRAL_BIAS="01", SPECTRAL_IMPL=("qk_aug", "score_mod"), SPECTRAL_USE_POINTER_MASK="01",
              SPECTRAL_POINTER_SCHEDULE="01", SPECTRAL_POINTER_GLOBAL_BLOCKS="012", SPECTRAL_POINTER_VAL_FORCE="01",
              SPECTRAL_POINTER_VAL_HALF_BLOCKS=("-1", "0", "3"), TORCH_COMPILE="01",
              TORCH_COMPILE_MODE=("default", "reduce-overhead", "max-autotune"), TORCHDYNAMO_VERBOSE="01",
              TORCHDYNAMO_SUPPRESS_ERRORS="01", TORCH_COMPILE_FALLBACK_TO_EAGER="01", FLEXATTN_DYNAMO_DISABLE="01",
              FLEXATTN_COMPILE="01", LOG_ALL_RANKS="01", SAVE_CHECKPOINT="01", VAL_LOSS_EVERY="0")


def test_every_variable_of_the_contract_exists():
    fields = {field.name.upper(): field for field in dataclasses.fields(S.Config)}
    for name, default in CONTRACT.items():
        assert name in fields
        if default is not None:
            assert fields[name].default == default, name
    bias = dict(SPECTRAL_BIAS="1")
    for name, values in VALUES.items():
        configs = [S.Config.from_environment(bias | {name: value}) for value in values]
        assert len({getattr(config, name.lower()) for config in configs}) == len(values), name


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


@pytest.mark.parametrize("arm", ["A", "C"])
def test_metrics_of_every_step(arm, finished):
    run = getattr(finished, arm)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in lines if "train_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 4, 8, 10]
    for r in steps:
        assert r.keys() >= {"train_loss", "lr", "tokens_per_s", "mfu", "step_ms", "memory_gib", "grad_norm"}
        assert r["step_ms"] > 0 and r["tokens_per_s"] == pytest.approx(1024 / r["step_ms"] * 1e3)
        assert 0.1 < r["memory_gib"] < 100 and r["mfu"] is None and r["grad_norm"] > 0
        done = (r["step"] - 1) / 10  # constant, then linear to 0 over the last 60 %
        assert r["lr"] == pytest.approx(1 if done < 0.4 else (1 - done) / 0.6)
    assert lines[0] == dict(step=0, val_loss=pytest.approx(math.log(384), abs=1e-5))  # zero head: all logits are equal
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] - 0.5


@pytest.mark.parametrize("arm", ["A", "C"])
def test_run_directory(arm, finished):
    run = getattr(finished, arm)
    for source in ("scoped_medium.py", "lifecycle.py", "model/attn_bias.py", "model/attention.py"):
        assert (run / "source" / source).read_bytes() == (ROOT / source).read_bytes()
    config = json.loads((run / "config.json").read_text())
    assert set(config) == {field.name for field in dataclasses.fields(S.Config)}
    assert config["spectral_l_train"] == 512 and config["num_layers"] == 3  # resolved
    log = (run / "log.txt").read_text()
    assert log.startswith((ROOT / "scoped_medium.py").read_text())
    assert all(f"step {step}/10 loss" in log for step in range(1, 11)) and "step 10/10 val_loss" in log
    summary = json.loads((run / "summary.json").read_text())
    train, val = losses(run, "train_loss"), losses(run, "val_loss")
    assert summary.items() >= dict(
        status="complete", arm=arm, run_name=f"whole_{arm}", seed=0, steps=10, train_loss=train[10], val_loss=val[10],
        mfu=None, device="cpu", world_size=1, torch=str(torch.__version__), recompiles_after_warmup=0).items()
    assert summary.keys() >= {"tokens_per_s", "step_ms", "peak_memory_gib", "train_seconds"}
    assert 1 <= summary["kv_blocks_per_query"] <= 4
    model = S.GPT(S.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert (summary["needle"] is None) == (arm == "A")


def test_scope_lines(finished):
    tagged = [json.loads(line) for line in (finished.C / "log.txt").read_text().splitlines() if line.startswith('{"tag"')]
    assert [r["tag"] for r in tagged] == ["CONFIG", "SCOPE_BINS"] + ["SCOPE_STATS"] * 5 + ["NEEDLE_EVAL"]
    bins, stats = tagged[1], [r for r in tagged if r["tag"] == "SCOPE_STATS"]
    assert [r["step"] for r in stats] == [2, 4, 6, 8, 10]
    # Of 10 steps the first is without pointers, the next two with half the radius; five steps of warm-up.
    assert [r["schedule"]["radius"] for r in stats] == [0, 1, 1, 1, 1]
    assert [r["schedule"]["global_blocks"] for r in stats] == [1, 1, 0, 0, 0]
    for r in stats:
        assert len(r["delta_histogram"]) == len(bins["delta_edges"]) - 1
        assert len(r["centre_histogram"]) == len(bins["centre_edges"]) - 1
        assert sum(r["delta_histogram"]) == pytest.approx(1) and sum(r["centre_histogram"]) == pytest.approx(1)
        blocks = r["kv_unique_blocks"]
        assert 1 <= blocks["mean"] <= blocks["max"] <= 4 and blocks["p50"] <= blocks["p90"] <= blocks["max"]
        assert set(r["penalties"]) == {"high_band", "zero_mean", "entropy_floor", "edge"}
        assert all(0 <= r[key] <= 1 for key in ("outside_local", "at_block_zero", "at_document_start"))
    assert "SCOPE_" not in re.sub(r"(?s)^.*?={100}\n", "", (finished.A / "log.txt").read_text(), count=1).replace(
        "SCOPE_LOG_EVERY", "")


@pytest.mark.parametrize("arm", ["A", "B", "C"])
def test_blocks_per_query_are_those_that_attention_reads(arm, settings, tmp_path, monkeypatch):
    """Averaged over eight layers, of which one has no attention and some have the short window."""
    trainer = trainer_for(settings, tmp_path, **ARMS[arm], NUM_LAYERS=8, VAL_SEQ_LEN=1024, SCOPE_LOG_EVERY=0)
    trainer.step = 3
    seen, attend = [], model.content.pointer_attention

    def record(q, k, v, lists, documents, **options):
        seen.append(np.mean([len(set(row[:n].tolist())) for row, n in zip(
            lists.idx_BHNW.flatten(0, 2), lists.num_BHN.flatten().tolist(), strict=True)]))
        return attend(q, k, v, lists, documents, **options)

    monkeypatch.setattr(model.content, "pointer_attention", record)
    trainer.validate()
    assert len(seen) == 7 and len(set(seen)) > 1
    assert S.mean_listed_blocks(trainer) == pytest.approx(np.mean(seen))


def test_validation_only_at_the_end(settings, logs):
    main(settings | dict(RUN_NAME="end_only", VAL_LOSS_EVERY=0, NUM_ITERATIONS=2, SAVE_CHECKPOINT=0))
    assert list(losses(logs / "end_only", "val_loss")) == [2]


def test_several_epochs(settings, logs):
    main(settings | dict(RUN_NAME="epochs", EPOCHS=2, NUM_ITERATIONS=21, VAL_LOSS_EVERY=0, SAVE_CHECKPOINT=0, NUM_LAYERS=2))
    assert [r["epoch"] for r in records(logs / "epochs") if "epoch" in r] == [0] * 18 + [1] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def trainer_for(settings, tmp_path, **variables):
    config = S.Config.from_environment(as_text(settings | variables | dict(LOG_DIR=tmp_path)))
    return S.Trainer(config, torch.device("cpu"), S.RunDirectory(config))


def sequences(trainer):
    return S.local_sequences(trainer.train_loader.next_batch(), 512, torch.device("cpu"))


@pytest.mark.parametrize("poison", ["weight", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison, settings, tmp_path):
    trainer = trainer_for(settings, tmp_path, **ARM_C)
    loss, grad_norm = trainer.train_step(sequences(trainer))  # so that the optimizers have a state to spoil
    assert math.isfinite(loss) and math.isfinite(grad_norm)
    trainer.step = 1
    weight = trainer.model.blocks[1].mlp.fc_w
    if poison == "weight":
        with torch.no_grad():
            weight[3, 5] = float("inf")
    else:  # the loss is fine, one gradient is not
        weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), float("nan")))
    before = copy.deepcopy([trainer.model.state_dict(), *(opt.state_dict() for opt in trainer.optimizers)])
    with pytest.raises(S.Stop, match=r"^step 1: .*not finite"):
        trainer.train_step(sequences(trainer))
    assert equal(before, [trainer.model.state_dict(), *(opt.state_dict() for opt in trainer.optimizers)])


def test_one_ranks_bad_number_stops_every_rank(settings, finished, tmp_path):
    """The embedding of byte 255 is NaN, and only the second rank's sequence of the fourth step holds that byte."""
    tokens = text(9000, 5, 700)
    tokens[3 * 1024 + 512 + 100] = 255
    write_shard(tmp_path / "train.bin", tokens)
    state = load(finished.A / "state_step000010.pt")
    state["model"]["embed.weight"][255] = float("nan")
    torch.save(state, tmp_path / "poisoned.pt")
    variables = settings | dict(TRAIN_FILES=tmp_path / "train.bin", LOAD_CHECKPOINT=tmp_path / "poisoned.pt", RUN_NAME="r",
                                LOG_DIR=tmp_path, NUM_ITERATIONS=6, CHECKPOINT_EVERY=2, VAL_LOSS_EVERY=0, LOG_ALL_RANKS=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(variables | dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
             for rank in (0, 1)]
    results = list(map(finish, ranks))
    errors = [[line for line in result.stderr.splitlines() if line.startswith("error:")] for result in results]
    assert [result.returncode for result in results] == [1, 1]
    assert len(errors[0]) == 1 and "step 3" in errors[0][0] and "not finite" in errors[0][0] and errors[1] == []
    assert not any("Traceback" in result.stderr for result in results)
    for log in ("log.txt", "log_rank1.txt"):
        assert "error: step 3: loss nan" in (tmp_path / "r" / log).read_text()
    assert [r["step"] for r in records(tmp_path / "r")] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "r").glob("*state*")] == ["state_step000002.pt"]
    assert load(tmp_path / "r" / "state_step000002.pt")["step"] == 2
    assert not (tmp_path / "r" / "summary.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def config(**variables):
    return S.Config.from_environment(as_text(MODEL | SIZES | ARM_C | variables))


def test_pointer_radius_over_the_run():
    c = config(SPECTRAL_POINTER_HALF_BLOCKS=5)
    assert (c.spectral_pointer_mid_frac, c.spectral_pointer_full_frac) == (0.1, 0.3)
    radii = [S.Schedule(c, step, 100).pointer_radius() for step in range(101)]
    assert radii == [-1] * 10 + [2] * 20 + [5] * 71
    assert all(S.Schedule(c, step, 100).pointer_radius(training=False) == radii[step] for step in range(101))
    always = config(SPECTRAL_POINTER_HALF_BLOCKS=5, SPECTRAL_POINTER_SCHEDULE=0)
    assert {S.Schedule(always, step, 100).pointer_radius() for step in range(101)} == {5}
    moved = config(SPECTRAL_POINTER_HALF_BLOCKS=4, SPECTRAL_POINTER_MID_FRAC=0, SPECTRAL_POINTER_FULL_FRAC=0.5)
    assert [S.Schedule(moved, step, 10).pointer_radius() for step in range(11)] == [2] * 5 + [4] * 6


@pytest.mark.parametrize("half,expected", [(-1, 4), (0, 0), (2, 2)])
def test_validation_radius_may_be_forced(half, expected):
    c = config(SPECTRAL_POINTER_HALF_BLOCKS=4, SPECTRAL_POINTER_VAL_FORCE=1, SPECTRAL_POINTER_VAL_HALF_BLOCKS=half)
    for step in (0, 20, 99):
        schedule = S.Schedule(c, step, 100)
        assert schedule.pointer_radius(training=False) == expected
        assert schedule.pointer_radius() == {0: -1, 20: 2, 99: 4}[step]
        tokens = torch.zeros(512, dtype=torch.int32)
        assert schedule.context(tokens, False, "reference").pointers.radius == expected
        assert schedule.context(tokens, True, "reference").pointers.radius == schedule.pointer_radius()


def test_global_blocks_warm_up():
    c = config(SPECTRAL_POINTER_GLOBAL_BLOCKS=1, SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP=2,
               SPECTRAL_POINTER_GLOBAL_BLOCKS_WARMUP_STEPS=3)
    assert [S.Schedule(c, step, 1000).global_blocks for step in range(6)] == [2, 2, 2, 1, 1, 1]
    assert c.list_shape.global_blocks == 2
    tokens = torch.zeros(512, dtype=torch.int32)
    assert [int(S.Schedule(c, s, 10).context(tokens, True, "reference").pointers.global_blocks) for s in (2, 3)] == [2, 1]


def test_recipe_schedules_are_the_baselines():
    args = baseline.Hyperparameters(num_iterations=700)
    c = config(NUM_ITERATIONS=700)
    for step in range(701):
        schedule = S.Schedule(c, step, 700)
        assert schedule.lr_factor == baseline.lr_factor(step, args)
        assert schedule.muon_momentum == baseline.muon_momentum(step)
        assert schedule.long_window == baseline.window_size(step, args)


def test_held_windows_grow_in_what_is_left_of_the_steps():
    held, free = config(NUM_ITERATIONS=700, SPECTRAL_WINDOW_HOLD=0.4), config(NUM_ITERATIONS=420)
    assert {S.Schedule(held, step, 700).long_window for step in range(281)} == {2}
    for step in range(280, 701):
        assert S.Schedule(held, step, 700).long_window == max(2, S.Schedule(free, step - 280, 420).long_window)


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize("variables,capability,expected", [
    (dict(), None, ("reference", False)), (dict(TORCH_COMPILE=1), None, ("reference", True)),
    (dict(), HOPPER, ("triton", True)), (dict(TORCH_COMPILE=0), HOPPER, ("triton", False)),
    (dict(ATTN_BACKEND="triton"), HOPPER, ("triton", True)), (dict(HEAD_DIM=96), HOPPER, ("flex", True)),
    (dict(FLEXATTN_DYNAMO_DISABLE=1), HOPPER, ("flex_standalone", True)), (dict(FLEXATTN_COMPILE=0), HOPPER, ("flex", True)),
    (ARM_B | dict(SPECTRAL_IMPL="score_mod"), HOPPER, ("flex_standalone", True)),
    (dict(ATTN_BACKEND="flex"), HOPPER, ("flex", True)),
    (dict(), AMPERE, ("flex", True)), (dict(TORCH_COMPILE=0), AMPERE, ("flex_standalone", False)),
    (dict(FLEXATTN_DYNAMO_DISABLE=1), AMPERE, ("flex_standalone", True)),
    (dict(FLEXATTN_DYNAMO_DISABLE=1, FLEXATTN_COMPILE=0), AMPERE, ("reference", True)),
    (dict(FLEXATTN_COMPILE=0), AMPERE, ("flex", True)),
    (dict(TORCH_COMPILE=0, FLEXATTN_COMPILE=0), AMPERE, ("reference", False)),
    (ARM_B | dict(SPECTRAL_IMPL="score_mod"), AMPERE, ("flex_standalone", True)),
    (dict(ATTN_BACKEND="reference"), AMPERE, ("reference", True))])
def test_choice_of_attention_backend(monkeypatch, variables, capability, expected):
    """Never FlexAttention uncompiled: it would ignore the lists. Every choice says why."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend, compiled, why = S.choose_backend(config(**variables), torch.device("cuda" if capability else "cpu"))
    assert (backend, compiled) == expected and why


def test_triton_needs_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: AMPERE)
    with pytest.raises(S.Stop, match="compute capability 9.0 on; this GPU has 8.0"):
        S.choose_backend(config(ATTN_BACKEND="triton"), torch.device("cuda"))


def test_pointer_backward_of_flex_has_a_longest_sequence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    long = ARM_C | dict(TRAIN_SEQ_LEN=131072 + 128, BATCH_TOKENS=131072 + 128, SPECTRAL_L_MAX=2**20)
    assert S.choose_backend(config(**long), torch.device("cuda"))[0] == "triton"
    long |= dict(ATTN_BACKEND="flex")
    with pytest.raises(S.Stop, match="TRAIN_SEQ_LEN=131200"):
        S.choose_backend(config(**long), torch.device("cuda"))
    S.choose_backend(config(**long, NUM_ITERATIONS=0), torch.device("cuda"))
    S.choose_backend(config(**long | dict(TRAIN_SEQ_LEN=131072, BATCH_TOKENS=131072)), torch.device("cuda"))
    searching = dict(SPECTRAL_BIAS=0, SPECTRAL_LANDMARK_DIM=16, SPECTRAL_L_MAX=2**20, NUM_ITERATIONS=0,
                     VAL_SEQ_LEN=131072 + 128, VAL_TOKENS=131072 + 128)
    with pytest.raises(S.Stop, match="sequences of 131200 tokens: FlexAttention takes at most 131072"):
        S.choose_backend(config(**searching, ATTN_BACKEND="flex"), torch.device("cuda"))
    assert S.choose_backend(config(**searching), torch.device("cuda"))[0] == "triton"


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def brute_force_batches(data, batch):
    """baseline.py's rule: whole batches that leave at least one further token, shard after shard."""
    for path in sorted(Path(data["TRAIN_FILES"]).parent.glob("train_*.bin")):
        tokens = np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64)
        start = 0
        while start + batch + 1 < len(tokens):
            yield tokens[start : start + batch + 1]
            start += batch


def baseline_batches(data, batch):
    """One epoch of the frozen loader, which ends the process when it runs out."""
    batches = baseline.token_batches(str(data["TRAIN_FILES"]), batch, 257)
    with contextlib.suppress(SystemExit):
        while True:
            yield next(batches)


@pytest.mark.parametrize("batch", [512, 1024, 1999, 8998])
def test_loader_order_epochs_and_positions(batch, data):
    expected = list(brute_force_batches(data, batch)) * 3
    loader = S.TokenLoader(data["TRAIN_FILES"], batch, 257)
    positions, got = [], []
    for _ in expected:
        positions.append(dict(loader.position))
        got.append(loader.next_batch())
    assert all(map(np.array_equal, got, expected))
    assert all(map(np.array_equal, baseline_batches(data, batch), expected))
    assert loader.position == dict(epoch=3, shard=0, batch=0)
    for start in range(0, len(expected), 3):
        resumed = S.TokenLoader(data["TRAIN_FILES"], batch, 257)
        resumed.position = positions[start]
        assert all(np.array_equal(resumed.next_batch(), want) for want in expected[start : start + 4])


@pytest.mark.parametrize("tokens,batch", [(1026, 1024), (1025, 1024), (2049, 1024), (2050, 1024), (1024, 1024), (3, 1)])
def test_whole_batches_of_a_shard(tokens, batch):
    assert S.batches_in(tokens, batch) == len(range(0, tokens - batch - 1, batch))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_a_batch_without_gap_or_overlap(world_size, monkeypatch):
    batch, seq_len = np.arange(7 * 128 + 1), 128
    seen = {}
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for inputs, targets in S.local_sequences(batch, seq_len, torch.device("cpu")):
            assert inputs.dtype == torch.int32 and targets.dtype == torch.int64
            assert torch.equal(inputs.long() + 1, targets)
            assert seen.setdefault(int(inputs[0]), rank) == rank
            assert len(inputs) == seq_len
    assert sorted(seen) == list(range(0, 7 * 128, 128))
    counts = [list(seen.values()).count(rank) for rank in range(world_size)]
    assert max(counts) - min(counts) <= 1


def test_loader_budget(data):
    loader = S.TokenLoader(data["TRAIN_FILES"], 1024, 257)
    total = len(list(brute_force_batches(data, 1024)))
    for epochs in (1, 2):
        loader.check(epochs * total, epochs, every_token=True)
        with pytest.raises(ValueError, match="EPOCHS"):
            loader.check(epochs * total + 1, epochs, every_token=True)
    loader.check(10**6, 0, every_token=False)
