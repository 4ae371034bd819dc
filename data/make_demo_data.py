"""Make byte-level shards from the text that comes with Python, so that a first run needs no download.

    python data/make_demo_data.py

The documents are the files of the standard library: modules, the texts of `help()`, licences; tests, codec tables and
generated build settings are left out. One file is one document and no text comes twice. Eight of the documents with at
least 70,000 tokens and one in sixteen of the others are held out for validation, chosen, like the order, by a hash of
their names: the same Python gives the same shards, byte for byte.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, also when run from elsewhere

from data.shards import write_shard
from data.tokenize_text import BYTES, settings

SUFFIXES = {".py", ".txt", ".rst", ".html"}
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "sitecustomize.py"}
LONG_DOCUMENT = 70_000  # tokens, delimiter included
VAL_LONG_DOCUMENTS = 8
VAL_SHARE = 16  # one in so many of the other documents


def library_documents(library) -> list[np.ndarray]:
    """Distinct documents (tokens, delimiter first) of the texts under `library`, in the order of their names' hash."""
    names = [path.relative_to(library) for path in library.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    texts = {}  # keyed by text: of two copies the first counts
    for name in sorted(filter(_wanted, names), key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        try:
            text = (library / name).read_bytes().decode()
        except UnicodeDecodeError:  # a few modules are in older encodings
            continue
        if text.strip():
            texts.setdefault(text)
    return [BYTES.document(text) for text in texts]


def split(documents) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(train, val) documents, in their order; ValueError when fewer than twice VAL_LONG_DOCUMENTS are long."""
    long = [i for i, document in enumerate(documents) if len(document) >= LONG_DOCUMENT]
    short = [i for i, document in enumerate(documents) if len(document) < LONG_DOCUMENT]
    if len(long) < 2 * VAL_LONG_DOCUMENTS:
        raise ValueError(
            f"this Python's standard library has only {len(long)} files of {LONG_DOCUMENT} bytes, too few for a "
            "demo; use a full Python, or make shards of your own text with data/tokenize_text.py --encoding bytes"
        )
    held_out = {*long[:VAL_LONG_DOCUMENTS], *short[: len(short) // VAL_SHARE]}
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().with_name("demo")
    parser.add_argument("--out", type=Path, default=default, help="directory of the shards (default: data/demo)")
    out = Path(os.path.relpath(parser.parse_args(arguments).out))
    try:
        train, val = split(library_documents(Path(sysconfig.get_path("stdlib"))))
        out.mkdir(parents=True, exist_ok=True)
        for name, documents in (("demo_train_000001.bin", train), ("demo_val_000000.bin", val)):
            tokens = np.concatenate(documents)
            write_shard(out / name, tokens)
            print(f"{out / name}: {len(documents)} documents, {len(tokens):,} tokens")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("next:")
    print("  make demo")
    # The default run is longer than these shards: repeat them, and validate on what there is.
    variables = settings(out / "demo_train_*.bin", out / "demo_val_*.bin", BYTES) + " EPOCHS=0 VAL_TOKENS=1048576"
    print(f"  {variables} python scoped_medium.py --check")


def _wanted(name):
    return LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata")


if __name__ == "__main__":
    main()
