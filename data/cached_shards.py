"""Download a pre-tokenised dataset of shards from the Hugging Face Hub (the three `cached_*.py` commands share this).

A shard already in place is kept when its header agrees with its size and fetched again when not. Downloads gather in
`.incoming/` inside the dataset's directory, where the Hub's client resumes what was cut off, and a shard is moved to
its place only once it is valid; so the same command, run again, goes on where the last one stopped.
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data.shards import token_count

INCOMING = ".incoming"


@dataclass(frozen=True)
class Dataset:
    """One Hub repository of shards `{prefix}_val_000000.bin` and `{prefix}_train_%06d.bin`, 1 to `train_shards`."""

    name: str  # of the directory, beside this file
    repo: str
    prefix: str
    train_shards: int

    def files(self, n) -> list[str]:
        """Names of the validation shard and the first `n` train shards."""
        return [f"{self.prefix}_val_000000.bin"] + [f"{self.prefix}_train_{i:06d}.bin" for i in range(1, n + 1)]


def main(dataset, arguments=None) -> None:
    """Command line of one dataset."""
    parser = argparse.ArgumentParser(description=f"Download {dataset.repo} from the Hugging Face Hub (resumable).")
    parser.add_argument(
        "n",
        nargs="?",
        type=int,
        default=dataset.train_shards,
        help="train shards, of 100M tokens (200 MB) each; the validation shard always comes too (default: %(default)s)",
    )
    n = parser.parse_args(arguments).n
    if not 1 <= n <= dataset.train_shards:
        parser.error(f"n is {n}; {dataset.repo} has 1 to {dataset.train_shards} train shards")
    directory = Path(__file__).resolve().with_name(dataset.name)
    try:
        download(dataset, n, directory)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on")
    shown = Path(os.path.relpath(directory)) / dataset.prefix
    print(f"TRAIN_FILES='{shown}_train_*.bin' VAL_FILES='{shown}_val_*.bin'")


def download(dataset, n, directory) -> None:
    """Bring the validation shard and the first `n` train shards of `dataset` into `directory`, all valid.

    ConnectionError, with what to do, when one cannot be had; the shards before it stay.
    """
    files = dataset.files(n)
    for i, file in enumerate(files, start=1):
        progress = f"[{i}/{len(files)}] {file}"
        if not (directory / file).exists():
            print(f"{progress}: downloading", flush=True)
        elif fault := _fault(directory / file):
            print(f"{progress}: downloading again, since {fault}", flush=True)
        else:
            print(f"{progress}: present", flush=True)
            continue
        _fetch(dataset.repo, file, directory)
    shutil.rmtree(directory / INCOMING, ignore_errors=True)


def _fetch(repo, file, directory):
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError("downloading needs the package huggingface_hub: pip install huggingface_hub") from error
    incoming = directory / INCOMING
    # The client takes a complete file at its word, so one that an earlier run left damaged must go first.
    if _fault(incoming / file):
        (incoming / file).unlink(missing_ok=True)
    try:
        hf_hub_download(repo, file, repo_type="dataset", local_dir=incoming)
    except Exception as error:  # the client's errors share no base class, nor do those of its versions
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(
            f"cannot download {file} from {repo} ({type(error).__name__}: {reason}); "
            "check the network and the disk, then run the same command again: finished shards are kept"
        ) from error
    if fault := _fault(incoming / file):
        (incoming / file).unlink(missing_ok=True)
        raise ConnectionError(f"{repo} sent a damaged file: {fault}")
    os.replace(incoming / file, directory / file)


def _fault(path):
    """What is wrong with a shard, or None."""
    try:
        token_count(path)
    except ValueError as error:
        return str(error)
