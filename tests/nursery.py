"""Runs of several processes that start at once: a process that has imported everything forks them.

    python tests/nursery.py        # reads one request, a line of JSON, after the other; answers with a process id

Each run is a process group of its own: its first process forks the ranks, waits for them and writes their exit statuses to the
file `exit`; killing its process group kills all of the run. `fault` is code that every rank executes before it starts.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

import lifecycle
import scoped_medium

PR_SET_CHILD_SUBREAPER = 36


def rank_process(rank: int, request: dict, port: int) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['folder']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(request["variables"])
    if request["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["processes"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    status = 1
    try:
        exec(request["fault"], dict(S=scoped_medium, L=lifecycle, rank=rank, torch=torch))
        scoped_medium.main(request["arguments"])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(request: dict) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(request["processes"]):
        ranks.append(os.fork())
        if not ranks[-1]:
            rank_process(rank, request, port)
    folder = Path(request["folder"])
    (folder / "ranks").write_text(" ".join(map(str, ranks)))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    (folder / "exit.tmp").write_text(json.dumps(statuses))
    os.replace(folder / "exit.tmp", folder / "exit")
    os._exit(0)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background job has them ignored
        signal.signal(number, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            run(json.loads(line))
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child may have been faster
            os.setpgid(pid, pid)
        print(pid, flush=True)
