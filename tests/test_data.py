"""The data room: shard format and its faults, atomic writing, documents, tokenising, the demo text, the downloader."""

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from data import cached_shards, make_demo_data, shards, tokenize_text

ROOT = Path(__file__).resolve().parents[1]
PANGRAM = "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.\r\n\n\t\U0001f3b7 end"


def raw_shard(tokens, magic=20240520, version=1, count=None):
    """The bytes of a shard, built here without the module under test."""
    header = [magic, version, len(tokens) if count is None else count] + [0] * 253
    return b"".join(int(x).to_bytes(4, "little", signed=True) for x in header) + b"".join(
        int(x).to_bytes(2, "little") for x in tokens
    )


def run(*command, cwd=ROOT):
    """A data command as a user runs it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True)


def error_line(call):
    """The message with which a command line ends when it refuses its input."""
    with pytest.raises(SystemExit) as stopped:
        call()
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def names(directory):
    """Everything in a directory, hidden files included."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


# --- the format


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, ">u2"])
def test_shard_bytes_and_round_trip(tmp_path, dtype):
    tokens = [50256, 0, 1, 65535, 258]
    shards.write_shard(tmp_path / "a.bin", np.array(tokens, dtype=dtype))
    assert (tmp_path / "a.bin").read_bytes() == raw_shard(tokens)
    assert shards.token_count(tmp_path / "a.bin") == 5
    opened = shards.open_shard(tmp_path / "a.bin")
    assert isinstance(opened, np.memmap)
    assert opened.dtype == np.uint16
    assert opened.tolist() == tokens


def test_strided_tokens_are_written_in_order(tmp_path):
    shards.write_shard(tmp_path / "a.bin", np.arange(20, dtype=np.uint16)[::-2])
    assert shards.open_shard(tmp_path / "a.bin").tolist() == list(range(19, -1, -2))


@pytest.mark.parametrize(
    "tokens", [np.array([1, 65536]), np.array([-1, 4]), np.array([1.0]), np.ones((2, 2), int), np.array([], np.uint16)]
)
def test_write_shard_refuses_what_the_format_cannot_hold(tmp_path, tokens):
    with pytest.raises(ValueError, match=r"a\.bin"):
        shards.write_shard(tmp_path / "a.bin", tokens)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (raw_shard([1, 2, 3], magic=20240521), "magic 20240521"),
        (raw_shard([1, 2, 3], version=2), "version 2"),
        (raw_shard([1, 2, 3])[:-1], "truncated"),
        (raw_shard([1, 2, 3])[:-2], "truncated"),
        (raw_shard([1, 2, 3]) + b"\0", "too long"),
        (raw_shard([1, 2, 3], count=2), "too long"),
        (raw_shard([], count=0), "counts 0"),
        (raw_shard([1, 2, 3], count=-3), "counts -3"),
        (raw_shard([])[:1001], "header"),
        (b"", "header"),
    ],
)
def test_every_fault_of_a_shard_names_the_file_in_one_line(tmp_path, content, fault):
    path = tmp_path / "faulty.bin"
    path.write_bytes(content)
    for read in (shards.token_count, shards.open_shard):
        with pytest.raises(ValueError, match=fault) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def test_missing_file_and_directory_are_value_errors(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read")):
            shards.token_count(path)


def test_check_tokens_names_file_offset_and_token(monkeypatch):
    monkeypatch.setattr(shards, "CHECK_CHUNK", 4)  # the bad token is in the third chunk
    tokens = np.array([0, 256, 3, 4, 5, 6, 7, 8, 9, 257, 300], dtype=np.uint16)
    with pytest.raises(ValueError, match=r"x\.bin: token 257 at offset 9 .* 257;"):
        shards.check_tokens("x.bin", tokens, 257)
    shards.check_tokens("x.bin", tokens, 301)


def test_find_shards_sorts_from_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b_000002.bin", "b_000001.bin", ".b_000003.bin.7.tmp", "c.bin"):
        Path(name).touch()
    assert shards.find_shards("b_*") == [Path("b_000001.bin"), Path("b_000002.bin")]
    with pytest.raises(ValueError, match=r"no shard matches 'z_\*\.bin'"):
        shards.find_shards("z_*.bin")


def test_document_spans_against_brute_force(monkeypatch):
    monkeypatch.setattr(shards, "CHECK_CHUNK", 7)
    rng = np.random.default_rng(0)
    for n in [0, 1, 2, 7, *rng.integers(3, 60, size=60)]:
        tokens = rng.integers(0, 4, size=n).astype(np.uint16)
        expected = []
        for i, token in enumerate(tokens.tolist()):
            if i == 0 or token == 3:
                expected.append([i, i])
            expected[-1][1] = i + 1
        spans = shards.document_spans(tokens, 3)
        assert spans.dtype == np.int64
        assert spans.shape == (len(expected), 2)
        assert spans.tolist() == expected


# --- writing


def test_writer_cuts_the_stream_into_shards(tmp_path):
    stream = np.random.default_rng(1).integers(0, 65536, size=1000)
    with shards.ShardWriter(tmp_path / "new", "x_train", 300) as writer:
        buffer = np.empty(77, dtype=np.uint16)  # reused by the caller: the writer must have its own copy
        for start in range(0, 1000, 77):
            part = stream[start : start + 77]
            buffer[: len(part)] = part
            writer.add(buffer[: len(part)])
    files = shards.find_shards(writer.pattern)
    assert [path.name for path in files] == [f"x_train_{i:06d}.bin" for i in (1, 2, 3, 4)]
    assert [shards.token_count(path) for path in files] == [300, 300, 300, 100]
    assert np.concatenate([shards.open_shard(path) for path in files]).tolist() == stream.tolist()
    assert (writer.tokens, writer.shards) == (1000, 4)


def test_writer_leaves_nothing_when_its_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), shards.ShardWriter(tmp_path, "x", 10) as writer:
        writer.add(np.arange(25))
        assert len(names(tmp_path)) == 2  # two full shards wait under temporary names
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_writer_never_mixes_two_sets(tmp_path):
    (tmp_path / "x_train_000009.bin").touch()
    with pytest.raises(ValueError, match=r"x_train_000009\.bin is there already"):
        shards.ShardWriter(tmp_path, "x_train", 10)
    shards.ShardWriter(tmp_path, "x_val", 10)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"a\.bin: cannot be written \(No space left on device\)"):
        shards.write_shard(tmp_path / "a.bin", np.arange(9))
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"the old file"])
def test_killed_writer_leaves_no_half_file_under_the_final_name(tmp_path, moment, old):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)
    died = run(
        "-c",
        "import os, signal, sys, numpy\n"
        f"os.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from data.shards import write_shard\n"
        f"write_shard({str(path)!r}, numpy.arange(50000))",
    )
    assert died.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == old
    assert [name for name in names(tmp_path) if name.endswith(".bin")] == ["a.bin"] * bool(old)


# --- tokenising


def texts_of(pattern, delimiter=256):
    """The documents of byte-level shards, as bytes, decoded by hand."""
    stream = np.concatenate([shards.open_shard(path) for path in shards.find_shards(pattern)]).tolist()
    documents = []
    for token in stream:
        if token == delimiter:
            documents.append(bytearray())
        else:
            documents[-1].append(token)
    return [bytes(document) for document in documents]


@pytest.fixture
def corpus(tmp_path):
    """A directory with twenty texts, one of them nested, and a hidden file that is no text."""
    directory = tmp_path / "texts"
    (directory / "deep").mkdir(parents=True)
    for i in range(19):
        (directory / f"{i:02d}.txt").write_bytes(f"{PANGRAM} {i}".encode())
    (directory / "deep" / "z.md").write_bytes(b"deep\n")
    (directory / ".hidden").write_bytes(b"\xff")
    return directory


def test_bytes_round_trip_and_printed_settings(corpus, tmp_path):
    options = ["--out", "out", "--encoding", "bytes", "--shard-tokens", 500]
    done = run(ROOT / "data/tokenize_text.py", corpus, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in corpus.rglob("*") if path.is_file() and path.name != ".hidden")
    assert texts_of(tmp_path / "out/out_train_*.bin") == [path.read_bytes() for path in files]
    assert {shards.token_count(path) for path in (tmp_path / "out").glob("*.bin")} >= {500}
    assert "20 documents" in done.stdout
    assert done.stdout.splitlines()[-1] == "TRAIN_FILES='out/out_train_*.bin' VOCAB_SIZE=257 DOC_DELIMITER=256"


def test_val_fraction_is_disjoint_and_independent_of_names_and_order(corpus, tmp_path, capsys):
    (corpus / "copy of 03.txt").write_bytes((corpus / "03.txt").read_bytes())
    out, again = tmp_path / "first", tmp_path / "second"
    tokenize_text.main([str(corpus), "--out", str(out), "--encoding", "bytes", "--val-fraction", "0.3"])
    printed = capsys.readouterr().out.splitlines()[-1]
    for i, path in enumerate(sorted(corpus.glob("*.txt"), reverse=True)):
        path.rename(corpus / f"renamed {i:02d}.txt")
    tokenize_text.main([str(corpus), "--out", str(again), "--encoding", "bytes", "--val-fraction", "0.3"])
    train, val = (texts_of(out / f"first_{part}_*.bin") for part in ("train", "val"))
    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == 21
    assert len(set(val)) == 6
    assert set(val) == set(texts_of(again / "second_val_*.bin"))
    assert names(out) == ["first_train_000001.bin", "first_val_000000.bin"]
    assert f"VAL_FILES='{out}/first_val_*.bin' VOCAB_SIZE=257" in printed


def test_val_files_leave_train_with_their_copies(corpus, tmp_path):
    held_out = corpus / "05.txt"
    (corpus / "copy.txt").write_bytes(held_out.read_bytes())
    out = tmp_path / "out"
    tokenize_text.main([str(corpus), "--val-files", str(held_out), "--out", str(out), "--encoding", "bytes"])
    train, val = (texts_of(out / f"out_{part}_*.bin") for part in ("train", "val"))
    assert val == [held_out.read_bytes()]
    assert val[0] not in train
    assert len(train) == 19


def test_same_corpus_gives_the_same_bytes(corpus, tmp_path):
    for out in ("a", "b"):
        options = ["--name", "n", "--encoding", "bytes", "--val-fraction", "0.2"]
        tokenize_text.main([str(corpus), "--out", str(tmp_path / out), *options])
    assert names(tmp_path / "a") == names(tmp_path / "b") != []
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_arguments_keep_their_order_and_a_file_counts_once(corpus):
    found = tokenize_text.find_texts([str(corpus / "1*.txt"), str(corpus / "00.txt"), str(corpus)])
    assert [path.name for path in found[:11]] == [f"{i}.txt" for i in range(10, 19)] + ["00.txt", "01.txt"]
    assert len(found) == len(set(found)) == 20


@pytest.mark.parametrize(
    ("content", "options", "fault"),
    [
        (b"fine \xff", [], "bad.txt: not UTF-8 at byte 5"),
        (b"", [], "bad.txt: empty"),
        (b"fine", ["nowhere/*.txt"], "no file at 'nowhere/*.txt'"),
        (b"fine", ["--val-fraction", "1.5"], "--val-fraction"),
        (b"fine", ["--val-fraction", "nan"], "--val-fraction"),
        (b"fine", ["--shard-tokens", "0"], "not 0"),
        (b"fine", ["--val-files", "bad.txt"], "none is left to train on"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, content, options, fault):
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_bytes(content)
    arguments = ["bad.txt", *options, "--out", "out", "--encoding", "bytes"]
    assert fault in error_line(lambda: tokenize_text.main(arguments))
    assert names(tmp_path) == ["bad.txt"]


def test_a_fault_in_the_last_file_is_found_before_anything_is_written(corpus, tmp_path):
    (corpus / "zz.txt").write_bytes(b"\xff")
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--encoding", "bytes", "--shard-tokens", "10"]
    assert "zz.txt" in error_line(lambda: tokenize_text.main(arguments))
    assert names(tmp_path / "out") == []


def test_errors_replace(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\xffb")
    options = ["--encoding", "bytes", "--errors", "replace"]
    tokenize_text.main([str(tmp_path / "bad.txt"), "--out", str(tmp_path / "out"), *options])
    assert texts_of(tmp_path / "out/*.bin") == ["a\ufffdb".encode()]


def test_old_shards_are_not_mixed_with_new_ones(corpus, tmp_path):
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--encoding", "bytes"]
    tokenize_text.main([*arguments, "--val-fraction", "0.2"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/out_train_000001.bin").rename(tmp_path / "gone")  # only the old validation shard is left
    assert "out_val_000000.bin is there already" in error_line(lambda: tokenize_text.main(arguments))
    assert names(tmp_path / "out") == ["out_val_000000.bin"]
    assert (tmp_path / "out/out_val_000000.bin").read_bytes() == before[tmp_path / "out/out_val_000000.bin"]


def test_gpt2_through_tiktoken(corpus, tmp_path, monkeypatch, capsys):
    """A vocabulary of single bytes in the place of GPT-2's, which only the network has."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"en": 256}
    tiny = tiktoken.Encoding("tiny", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": tiny}.__getitem__)
    (tmp_path / "a.txt").write_bytes(b"the end <|endoftext|>")
    tokenize_text.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])
    tokens = shards.open_shard(tmp_path / "out/out_train_000001.bin").tolist()
    assert tokens[0] == 50256
    assert 256 in tokens
    assert 50256 not in tokens[1:]  # the text of the delimiter is text
    assert tiny.decode(tokens[1:]) == "the end <|endoftext|>"
    assert capsys.readouterr().out.splitlines()[-1].endswith("VOCAB_SIZE=50257 DOC_DELIMITER=50256")


def test_gpt2_without_package_or_network_points_to_bytes(corpus, tmp_path, monkeypatch):
    arguments = [str(corpus), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install tiktoken, or use --encoding bytes" in error_line(lambda: tokenize_text.main(arguments))

    def offline(_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=offline))
    assert "ConnectionError: no route)" in error_line(lambda: tokenize_text.main(arguments))


# --- the demo text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    done = run("data/make_demo_data.py", "--out", directory)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout


def test_demo_data_is_large_enough_with_long_held_out_documents(demo):
    directory, printed = demo
    assert names(directory) == ["demo_train_000001.bin", "demo_val_000000.bin"]
    train, val = (shards.open_shard(directory / name) for name in names(directory))
    assert 6e6 < len(train) < 16e6
    spans = shards.document_spans(val, 256)
    assert (spans[:, 1] - spans[:, 0] >= 70_000).sum() == 8
    for tokens in (train, val):
        assert tokens[0] == 256
        shards.check_tokens("demo", tokens, 257)
    assert "VOCAB_SIZE=257 DOC_DELIMITER=256" in printed


def test_demo_data_is_distinct_text(demo):
    train, val = (texts_of(demo[0] / name) for name in names(demo[0]))
    assert len(set(train + val)) == len(train) + len(val)
    for text in train + val:
        assert text.decode().strip()


def test_demo_data_is_the_same_every_time(demo, tmp_path):
    make_demo_data.main(["--out", str(tmp_path)])
    for name in names(demo[0]):
        assert (tmp_path / name).read_bytes() == (demo[0] / name).read_bytes()


def test_demo_data_refuses_a_python_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr(make_demo_data.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "only 0 files" in error_line(lambda: make_demo_data.main(["--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


# --- the downloader

DATASET = cached_shards.Dataset(name="toy", repo="someone/toy", prefix="toy", train_shards=3)


class FakeHub:
    """In place of huggingface_hub: a complete local file is taken at its word, a partial one is resumed."""

    def __init__(self):
        self.files = {name: raw_shard([i, i + 1, i + 2]) for i, name in enumerate(DATASET.files(3))}
        self.calls, self.resumed = [], []
        self.fail_on, self.failure = None, None

    def hf_hub_download(self, repo_id, filename, *, repo_type, local_dir):
        assert (repo_id, repo_type) == ("someone/toy", "dataset")
        self.calls.append(filename)
        path, partial = Path(local_dir) / filename, Path(local_dir) / f"{filename}.incomplete"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        if partial.exists():
            self.resumed.append(filename)
        if filename == self.fail_on:
            partial.write_bytes(self.files[filename][:1000])
            raise self.failure
        path.write_bytes(self.files[filename])
        partial.unlink(missing_ok=True)


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_download_brings_validation_and_n_train_shards(hub, tmp_path, capsys):
    cached_shards.download(DATASET, 2, tmp_path / "toy")
    assert names(tmp_path / "toy") == ["toy_train_000001.bin", "toy_train_000002.bin", "toy_val_000000.bin"]
    for name in names(tmp_path / "toy"):
        assert (tmp_path / "toy" / name).read_bytes() == hub.files[name]
    assert "[3/3] toy_train_000002.bin: downloading" in capsys.readouterr().out


def test_valid_shards_are_kept_and_damaged_ones_fetched_again(hub, tmp_path, capsys):
    cached_shards.download(DATASET, 3, tmp_path)
    (tmp_path / "toy_train_000002.bin").write_bytes(hub.files["toy_train_000002.bin"][:-2])
    hub.calls.clear()
    cached_shards.download(DATASET, 3, tmp_path)
    assert hub.calls == ["toy_train_000002.bin"]
    assert (tmp_path / "toy_train_000002.bin").read_bytes() == hub.files["toy_train_000002.bin"]
    assert "truncated" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no route\nto host")])
def test_interrupted_download_resumes(hub, tmp_path, failure):
    hub.fail_on, hub.failure = "toy_train_000001.bin", failure
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ConnectionError
    with pytest.raises(expected):
        cached_shards.download(DATASET, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["toy_val_000000.bin"]
    hub.fail_on = None
    hub.calls.clear()
    cached_shards.download(DATASET, 2, tmp_path)
    assert hub.calls == ["toy_train_000001.bin", "toy_train_000002.bin"]
    assert hub.resumed == ["toy_train_000001.bin"]  # what had arrived was still there
    assert names(tmp_path) == sorted(DATASET.files(2))


def test_damaged_download_is_never_placed(hub, tmp_path):
    name, good = "toy_val_000000.bin", hub.files["toy_val_000000.bin"]
    hub.files[name] = b"<html>try later</html>" * 100
    with pytest.raises(ConnectionError, match="sent a damaged file"):
        cached_shards.download(DATASET, 1, tmp_path)
    assert not (tmp_path / name).exists()
    hub.files[name] = good
    cached_shards.download(DATASET, 1, tmp_path)
    assert (tmp_path / name).read_bytes() == good


def test_damaged_file_left_in_transit_is_fetched_again(hub, tmp_path):
    transit = tmp_path / cached_shards.INCOMING / "toy_val_000000.bin"
    transit.parent.mkdir()
    transit.write_bytes(raw_shard([1, 2, 3])[:-1])
    cached_shards.download(DATASET, 1, tmp_path)
    assert (tmp_path / "toy_val_000000.bin").read_bytes() == hub.files["toy_val_000000.bin"]


def test_download_errors_are_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(cached_shards, "__file__", str(tmp_path / "cached_shards.py"))
    hub.fail_on, hub.failure = "toy_val_000000.bin", RuntimeError("no route\nto host")
    message = error_line(lambda: cached_shards.main(DATASET, ["1"]))
    assert "toy_val_000000.bin from someone/toy (RuntimeError: no route)" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in error_line(lambda: cached_shards.main(DATASET, ["1"]))


@pytest.mark.parametrize(
    ("script", "shards_there"), [("cached_fineweb10B", 103), ("cached_fineweb100B", 1030), ("cached_finewebedu10B", 99)]
)
def test_download_commands_check_n(script, shards_there):
    for n in (0, shards_there + 1, "two"):
        refused = run(f"data/{script}.py", n)
        assert refused.returncode == 2
        assert f"{script}.py: error: " in refused.stderr
        assert "Traceback" not in refused.stderr
    assert f"default: {shards_there}" in run(f"data/{script}.py", "--help").stdout
