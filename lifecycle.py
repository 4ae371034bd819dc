"""What surrounds a training loop: processes, signals, the run directory, checkpoint files.

Every guard of a run is here, once, so that the loop in scoped_medium.py need not know of them. SPEC.md, section 8, is the
format of every file that a run leaves behind.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from datetime import timedelta
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
WEIGHT_KEYS = {"config", "model", "step", "total_steps"}  # what an evaluation needs of a checkpoint
CHECKPOINT_KEYS = WEIGHT_KEYS | {"optimizers", "loader", "data", "best_val_loss", "rng"}  # what a resumption needs
LONGEST_NAME = 255  # bytes of a file's or directory's
POLL_SECONDS = 1.0  # between two looks of the watch at the other processes
HEARTBEAT_SECONDS = 10.0  # between two heartbeats in status.json
SILENT_SECONDS = 20.0  # a process whose watch has not been heard of for so long is dead or stopped


class Stop(Exception):
    """Ends the run with one line on stderr, told by rank `teller`."""

    teller = 0


class CollectiveFailed(Stop):
    """A collective operation broke, for which some other process is the reason: nothing collective may follow it."""


class Preempted(Exception):
    """A signal, named by the text, ends the run in order."""

    @property
    def exit_status(self) -> int:
        return 128 + signal.Signals[str(self)]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun gives them; (0, 1, 0) for plain python."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def set_up_device(rank_timeout: int) -> torch.device:
    local_rank = world()[2]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise Stop(f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; start no more "
                       f"processes than that (--nproc_per_node)")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # the watch ends a hung run, and names the process: torch's own limit is the second line
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(seconds=2 * rank_timeout))
    return device


def exit_at_once(status: int) -> None:
    """End a process of a group without Python's own shutdown: a thread of gloo that lets go of a tensor during it would end the
    process by SIGABRT (pytorch/pytorch#179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclasses.dataclass
class Progress:
    """How far this process is, for the watch and for status.json."""

    step: int = 0  # finished optimizer steps
    collectives: int = 0  # entered; of processes that wait for each other the one behind is the culprit
    sequences: int = 0  # taken up, so that a long validation is seen to move


PROGRESS = Progress()


@contextlib.contextmanager
def collective():
    """Around every collective operation and every wait for one."""
    PROGRESS.collectives += 1
    try:
        yield
    except RuntimeError as error:
        raise CollectiveFailed(" ".join(str(error).split())[:200]) from None


def all_reduce(tensors: list[Tensor]) -> None:
    if dist.is_initialized():
        with collective():
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()


def all_ranks(value: Tensor) -> list:
    """A scalar of every process, on every process."""
    value = value.reshape(1)
    gathered = [torch.zeros_like(value) for _ in range(world()[1])]
    if dist.is_initialized():
        with collective():
            dist.all_gather(gathered, value)
    return torch.cat(gathered).tolist()


class Signals:
    """SIGTERM, SIGINT and SIGHUP raise Preempted; while `deferred` they are only noted, and the loop stops when all
    processes have agreed on the step. The first signal counts, further ones change nothing. Ignored signals stay ignored."""

    received: str | None = None
    waiting = False

    def __enter__(self):
        self.received, self.waiting = None, False
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, _frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self.waiting:
                raise Preempted(self.received)

    def agree(self, ranks: float) -> bool:
        """Whether any rank has a signal, of which so many had when they last told each other; then it counts for this one."""
        if ranks and self.received is None:
            self.received = "SIGTERM"
        return ranks > 0

    @contextlib.contextmanager
    def deferred(self):
        self.waiting = True
        yield
        self.waiting = False
        if self.received:
            raise Preempted(self.received)


SIGNALS = Signals()


class Watch(threading.Thread):
    """Beside the training, in every process: keeps the heartbeat, tells the others how far this process is, and ends it
    when another is silent, or when no process has moved for `timeout` seconds. The main thread may hang: this one does not."""

    def __init__(self, run: "RunDirectory", timeout: float):
        super().__init__(name="watch", daemon=True)
        self.run_directory, self.timeout, self.silence = run, timeout, min(SILENT_SECONDS, timeout)
        self.rank, self.world_size, _ = world()
        self.closing, self.lock, self.ticks = threading.Event(), threading.Lock(), itertools.count()
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.store = None
        self.moved = self.heartbeat = time.monotonic()
        self.seen = [({}, self.moved)] * self.world_size  # of every rank: its last record and when it changed

    def meet(self) -> None:
        if self.world_size > 1:
            with collective():
                self.store = next(dist.rendezvous("env://"))[0]  # a client of its own: the main thread may block the other
                self.store.set_timeout(timedelta(seconds=5))
                self.publish()
                dist.barrier()

    def publish(self, ended: str | None = None) -> None:
        """`ended`: None while it runs, "" when it left in order or because of another, else why it failed."""
        self.store.set(f"watch/{self.rank}", json.dumps(dict(vars(PROGRESS), tick=next(self.ticks), ended=ended)))

    def run(self) -> None:
        while not self.closing.wait(min(POLL_SECONDS, self.silence / 4)):
            if self.launcher and os.getppid() != self.launcher:  # torchrun was killed: do not train on as an orphan
                self.launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if self.rank == 0 and time.monotonic() - self.heartbeat > HEARTBEAT_SECONDS:
                self.heartbeat = time.monotonic()
                self.run_directory.write_status("running")
            if self.world_size > 1:
                self.look()
                if culprits := self.silent_or_failed(self.silence) or self.hung():
                    self.run_directory.report(self.blame(culprits))
                    self.leave("")
                    os._exit(1)

    def look(self) -> None:
        with self.lock:
            if self.store is None:
                return
            try:
                self.publish()
                records = [json.loads(r) for r in self.store.multi_get([f"watch/{r}" for r in range(self.world_size)])]
            except RuntimeError:  # who hosted the store is gone
                self.store = None
                return
            now = time.monotonic()
            for rank, record in enumerate(records):
                last, _ = self.seen[rank]
                if record != last:
                    self.seen[rank] = record, now
                    if any(record[key] != last.get(key) for key in vars(PROGRESS)):
                        self.moved = now

    def silent_or_failed(self, seconds: float) -> dict[int, str]:
        """Ranks that are gone, each with what is known of it. A failed one is given time to end the others by itself."""
        now, gone = time.monotonic(), {}
        for rank, (record, changed) in enumerate(self.seen):
            if self.store is None:  # no record is new: all that is known is that its host has gone, if that was a rank
                silent = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            else:
                silent = now - changed > seconds
            if silent and record.get("ended") != "":
                gone[rank] = f"failed: {record['ended']}" if record.get("ended") else "was killed or stopped"
        return gone

    def hung(self) -> dict[int, str]:
        if time.monotonic() - self.moved < self.timeout:
            return {}
        entered = [record["collectives"] for record, _ in self.seen]
        return {rank: f"hangs, nothing moved for {self.timeout:.0f} s" for rank, n in enumerate(entered) if n == min(entered)}

    def blame(self, culprits: dict[int, str]) -> Stop:
        stop = Stop("; ".join(f"rank {rank} {what}" for rank, what in sorted(culprits.items()))
                    + f"; this was step {PROGRESS.step}, the last checkpoint is intact")
        silent = {rank for rank in culprits if not self.seen[rank][0].get("ended")}  # the others tell it themselves
        stop.teller = min(set(range(self.world_size)) - silent, default=0)
        return stop

    def explain(self, error: CollectiveFailed) -> Stop:
        """A failed collective says that somebody is gone; the records tell who."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            self.look()
            if culprits := self.silent_or_failed(min(3.0, self.silence)):
                return self.blame(culprits)
            time.sleep(0.2)
        return Stop(f"step {PROGRESS.step}: {error}")

    def close(self, why: str) -> None:
        self.closing.set()
        if self.is_alive():
            self.join()
        if why:
            self.leave(why)
        elif self.store is not None:
            with contextlib.suppress(RuntimeError), self.lock:
                self.publish(ended="")

    def leave(self, ended: str) -> None:
        """Say so and wait until the others have read it, or they would blame this process: the store goes with its host."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError), self.lock:
                self.publish(ended)
            time.sleep(2 * POLL_SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def write_atomically(path: Path, write) -> None:
    """`write(file)` to a temporary file beside `path`, then rename: readers see the old file or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError of its own
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise Stop(f"{path}: cannot be written ({' '.join(str(reason).split())})") from None
    finally:
        temporary.unlink(missing_ok=True)


def parse_lines(content: bytes) -> list[tuple[int, object]]:
    """(line, record) of a .jsonl file; a line cut in half, the last one of a killed run, is left out."""
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        with contextlib.suppress(ValueError):
            records.append((number, json.loads(line.decode(errors="replace"))))
    return records


class LineFile:
    """A file that grows by whole lines. What a full disk refuses waits, and is written before the next line."""

    def __init__(self, path: Path):
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.unwritten, self.lock = b"", threading.Lock()

    def write(self, line: str) -> None:
        with self.lock:
            self.unwritten += line.encode() + b"\n"
            while self.unwritten:
                self.unwritten = self.unwritten[os.write(self.fd, self.unwritten):]

    def sync(self) -> None:
        with self.lock:
            if self.unwritten:
                raise OSError(errno.ENOSPC, "lines of it still wait for space")
            os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class RunDirectory:
    """LOG_DIR/RUN_NAME: lock, status, source, configuration, log, metrics, checkpoints, summary. Rank 0 writes; the others
    write a log of their own if LOG_ALL_RANKS asks for it. Inside `with` the watch runs, and the end, whatever it is, is
    written to status.json."""

    def __init__(self, config):
        PROGRESS.step = PROGRESS.collectives = PROGRESS.sequences = 0
        self.config, self.rank, self.started = config, world()[0], time.time()
        self.complained, self.watch = set(), None
        self.log_file = self.metrics_file = None
        opened = [None, None]  # rank 0 decides, the others hear of it
        if self.rank == 0:
            try:
                opened[0] = self.path = self.claim()
                self.open_files()
            except Stop as stop:
                opened[1] = str(stop)
            except OSError as error:
                opened[1] = f"{error.filename}: cannot be created ({error.strerror}); set LOG_DIR to a directory you may write"
        if dist.is_initialized():
            with collective():
                dist.broadcast_object_list(opened)
        self.path, refused = opened
        if refused:
            raise Stop(refused)
        if self.rank and config.log_all_ranks:
            self.log_file = LineFile(self.path / f"log_rank{self.rank}.txt")

    def claim(self) -> Path:
        """Make the directory, lock it, and return it."""
        root, name = Path(self.config.log_dir), self.config.run_name
        if name:
            path = root / name
            path.mkdir(parents=True, exist_ok=True)
        else:
            root.mkdir(parents=True, exist_ok=True)
            name = f"arm_{self.config.arm}_seed{self.config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
            path = next(p for p in (root / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
                        if make_directory(p))  # two unnamed runs may start in the same second
        lock = lock_directory(path, "set another RUN_NAME")
        try:
            check_new(path, self.config.resume)
        except Stop:
            os.close(lock)
            raise
        self.lock = lock
        return path

    def open_files(self) -> None:
        for left_over in self.path.glob(".*.tmp"):  # of a process killed while it wrote
            left_over.unlink()
        self.log_file, self.metrics_file = LineFile(self.path / "log.txt"), LineFile(self.path / "metrics.jsonl")
        write_atomically(self.path / "status.json", self.status("running"))
        self.write_json("config.json", dataclasses.asdict(self.config))

    def __enter__(self):
        self.watch = Watch(self, self.config.rank_timeout)
        try:
            self.watch.meet()
        except Stop as stop:
            self.report(stop, echo=False)
            raise
        self.watch.start()
        return self

    def __exit__(self, kind, error, _trace):
        SIGNALS.waiting = True  # what is to be written now is not cut short
        if kind is CollectiveFailed:
            error = self.watch.explain(error)
        in_order = error is None or isinstance(error, Preempted)
        self.watch.close("" if in_order or kind is CollectiveFailed else describe(error))
        if not in_order:
            self.report(error, echo=False)
        elif self.rank == 0:
            self.write_status("complete" if error is None else "preempted")
        for file in filter(None, (self.log_file, self.metrics_file)):
            file.close()
        if self.rank == 0:
            os.close(self.lock)
        if kind is CollectiveFailed:
            raise error from None

    def status(self, status: str):
        record = dict(status=status, step=PROGRESS.step, total_steps=self.config.num_iterations, heartbeat=time.time(),
                      started=self.started, pid=os.getpid(), host=socket.gethostname(), world_size=world()[1])
        return methodcaller("write", (json.dumps(record) + "\n").encode())

    def write_status(self, status: str) -> None:
        """status.json tells what torchrun's exit status does not. `running` with a heartbeat older than a minute: killed."""
        self.attempt("status.json", write_atomically, self.path / "status.json", self.status(status))

    def report(self, error: BaseException, echo: bool = True) -> None:
        """The end of a failed run, by the rank that is to tell it."""
        if self.rank == getattr(error, "teller", 0):
            self.write_status(f"failed: {describe(error)}")
            if echo:
                print(f"error: {error}", file=sys.stderr, flush=True)
        self.log(f"error: {describe(error)}", echo=False)

    def attempt(self, what: str, write, *arguments) -> None:
        """A write that training can do without: the first failure is a warning, the others pass in silence."""
        try:
            write(*arguments)
        except (OSError, Stop) as error:
            if what not in self.complained:
                self.complained.add(what)
                reason = error if isinstance(error, Stop) else f"{what}: cannot be written ({error.strerror})"
                self.warn(f"{reason}; the run goes on, and writes it when there is space again")

    def warn(self, line: str) -> None:
        if self.rank == 0:
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: {line}", file=sys.stderr)
        self.log(f"warning: {line}", echo=False)

    def log(self, line: str, echo: bool = True) -> None:
        if self.log_file:
            self.attempt("log.txt", self.log_file.write, line)
        if echo and self.rank == 0:
            self.attempt("stdout", self.echo, line)

    def echo(self, line: str) -> None:
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # nothing may stay in its buffer, or the interpreter fails when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise

    def metrics(self, **record) -> None:
        if self.rank == 0:
            self.attempt("metrics.jsonl", self.metrics_file.write, json.dumps(record))

    def drop_metrics_after(self, step: int) -> None:
        """A resumed run repeats what came after its checkpoint, the validation at that step included: those records go, so
        that none is there twice. A torn last line goes too."""
        if self.rank == 0:
            kept = [r for r in self.read_metrics() if r["step"] < step or (r["step"] == step and "train_loss" in r)]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            write_atomically(self.path / "metrics.jsonl", methodcaller("write", text.encode()))
            self.metrics_file.close()
            self.metrics_file = LineFile(self.path / "metrics.jsonl")

    def read_metrics(self) -> list[dict]:
        return [record for _, record in parse_lines((self.path / "metrics.jsonl").read_bytes())] if self.rank == 0 else []

    def write_json(self, name: str, value: dict) -> None:
        if self.rank == 0:
            write_atomically(self.path / name, methodcaller("write", (json.dumps(value, indent=1) + "\n").encode()))

    def copy_source(self, script: Path) -> bool:
        """Copy the code to source/; returns whether it was not there like that already."""
        changed = False
        for source in (script, ROOT / "lifecycle.py", *sorted((ROOT / "model").glob("*.py"))):
            target = self.path / "source" / source.relative_to(ROOT)
            content = source.read_bytes()
            if self.rank == 0 and not (target.exists() and target.read_bytes() == content):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, methodcaller("write", content))
                changed = True
        return changed

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Write state_step%06d.pt behind the metrics that lead to it, then remove what KEEP_CHECKPOINTS and KEEP_EVERY do not
        keep. Stop if it cannot be written; the checkpoints before it are then all there."""
        path = self.path / f"state_step{step:06d}.pt"
        try:
            self.metrics_file.sync()
        except OSError as error:
            raise Stop(f"{path}: not written, as metrics.jsonl is not on the disk ({error.strerror})") from None
        write_atomically(path, partial(torch.save, state))
        self.log(f"saved {path}")
        keep, every = self.config.keep_checkpoints, self.config.keep_every
        for old, path in checkpoints(self.path)[:-keep] if keep else []:
            if not (every and old % every == 0):
                path.unlink(missing_ok=True)

    def set_aside_after(self, step: int) -> None:
        """Checkpoints beyond the step that the run resumes at, damaged or of a continuation given up, get another name, so
        that no later resumption takes them for this one's."""
        for later, path in checkpoints(self.path) if self.rank == 0 else []:
            if later > step:
                path.rename(path.with_name(f"{path.name}.stale"))
                self.log(f"{path} is later than the step resumed at: renamed to {path.name}.stale")


def check_run_directory(config) -> None:
    """Stop where RunDirectory would, unless another process has the directory. Makes nothing."""
    path = Path(config.log_dir) / config.run_name
    check_place(path, "LOG_DIR or RUN_NAME")
    if config.run_name and not is_locked(path):
        check_new(path, config.resume)


def is_locked(path: Path) -> bool:
    try:
        lock = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others that look are not in the way
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def check_new(path: Path, resume: str) -> None:
    if resume == "0" and (path / "config.json").exists():
        raise Stop(f"{path} already holds a run: set RESUME=auto to continue it, or another RUN_NAME")


def check_place(directory: Path, name: str) -> None:
    """Stop, with the name of what to change, unless the directory can be written, or made. Makes nothing."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in directory.parts):
        raise Stop(f"{name}: {directory} has a part of more than {LONGEST_NAME} bytes: choose another")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise Stop(f"{name}: {directory} cannot be written, as {existing} is no directory that can: choose another")


def lock_directory(path: Path, remedy: str) -> int:
    """Lock a directory for as long as the file descriptor is open. The lock is the kernel's and goes with its owner, however
    that ends; the file's content is for people. Stop, with the remedy, where another process has it."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 1000).decode().strip()
        os.close(lock)
        raise Stop(f"{path} is in use by {owner}: wait for it or stop it, or {remedy}") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock


def make_directory(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, Stop) else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint files


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints in a run directory, oldest first."""
    found = [(re.fullmatch(r"state_step(\d{6,})\.pt", path.name), path) for path in directory.glob("state_step*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def read_checkpoint(path: str | Path, keys: set[str] = CHECKPOINT_KEYS) -> dict:
    """A checkpoint's content on the CPU; Stop names the file if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not see a damaged tensor, the archive's checksums do
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise Stop(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises four kinds for damaged files: all mean that this file cannot be used
        reason = str(error).strip().partition("\n")[0]
        raise Stop(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from None
    if damaged:
        raise Stop(f"{path}: damaged, {damaged} inside does not match its checksum")
    if not isinstance(state, dict) or not keys <= state.keys():
        raise Stop(f"{path}: not a checkpoint of this script, which holds {', '.join(sorted(keys))}")
    return state


def newest_readable(directory: Path) -> tuple[Path | None, dict | None, list[str]]:
    """(path, content, warnings about newer damaged ones) of the newest checkpoint that can be read; (None, None, []) if there
    is none at all. Stop if all are damaged: starting over would overwrite what may yet be rescued."""
    warnings = []
    for _, path in reversed(checkpoints(directory)):
        try:
            return path, read_checkpoint(path), warnings
        except Stop as stop:
            warnings.append(f"{stop}; the checkpoint before it is tried")
    if warnings:
        raise Stop(f"{directory}: none of {len(warnings)} checkpoints can be read, the newest: "
                   f"{warnings[0].rpartition(';')[0]}; set another RUN_NAME to start over")
    return None, None, []


def free_space(directory: Path) -> int:
    """Bytes that may be written below a directory that need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
