"""Turn text files into train and validation shards.

    python data/tokenize_text.py texts/ 'notes/**/*.md' --out data/texts --val-fraction 0.05
    python data/tokenize_text.py corpus.txt --val-files held_out.txt --out data/corpus --encoding bytes

Each file is one document and starts with the delimiter. `--encoding gpt2` (the default) is GPT-2's BPE through the
package tiktoken; `--encoding bytes` needs no package and no download: token = byte, delimiter 256. Files are read as
UTF-8, line ends as they are. Documents keep the order of the arguments, and are sorted by path within a directory or
glob.

A document that validation holds is left out of train, copies under other names included.
"""

import argparse
import glob
import hashlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, also when run from elsewhere

from data.shards import ShardWriter


@dataclass(frozen=True)
class Encoding:
    """`encode` gives the integer tokens [n] of a text, never the delimiter."""

    encode: Callable[[str], np.ndarray]
    vocab_size: int
    delimiter: int

    def document(self, text) -> np.ndarray:
        """int64 [1 + n]: the delimiter, then the tokens of `text`."""
        return np.concatenate([[self.delimiter], self.encode(text)]).astype(np.int64)


BYTES = Encoding(lambda text: np.frombuffer(text.encode(), dtype=np.uint8), vocab_size=257, delimiter=256)


def gpt2_encoding() -> Encoding:
    """GPT-2's BPE; ValueError when tiktoken is missing or cannot load its vocabulary."""
    otherwise = "or use --encoding bytes, which needs neither"
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError(f"--encoding gpt2 needs the package tiktoken: pip install tiktoken, {otherwise}") from error
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP client or its cache on disk raises
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"tiktoken cannot load the GPT-2 vocabulary ({type(error).__name__}: {reason}); connect to the network "
            f"once, set TIKTOKEN_CACHE_DIR to a filled cache, {otherwise}"
        ) from error
    return Encoding(lambda text: np.array(bpe.encode_ordinary(text), dtype=np.int64), bpe.n_vocab, bpe.eot_token)


def find_texts(arguments) -> list[Path]:
    """Files named by paths, directories (searched recursively, hidden files left out) and globs, each once.

    ValueError when an argument names nothing.
    """
    found = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            names = [name for name in path.rglob("*") if not _hidden(name.relative_to(path))]
        else:
            names = [path] if path.exists() else [Path(name) for name in glob.glob(argument, recursive=True)]
        files = sorted(name for name in names if name.is_file())
        if not files:
            raise ValueError(f"no file at {argument!r}; give text files, directories or quoted globs")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read_text(path, errors="strict") -> str:
    """The UTF-8 text of a file; undecodable bytes are replaced by U+FFFD with errors="replace". ValueError if empty."""
    try:
        text = path.read_bytes().decode(errors=errors)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        fault = f"{path}: not UTF-8 at byte {error.start}"
        raise ValueError(f"{fault}; convert it, leave it out, or use --errors replace") from error
    if not text:
        raise ValueError(f"{path}: empty; leave it out")
    return text


def split(files, val_files, val_fraction, errors="strict") -> tuple[list[Path], list[Path]]:
    """(train, val) files; every one has been read once and is valid text, and no text is in both.

    With `val_fraction` the validation set is that share of the distinct texts, those with the smallest SHA-256: the
    same ones whatever the files are called and in whichever order they come.
    """
    digests = {file: _digest(file, errors) for file in tqdm(files, desc="reading", unit="file", disable=None)}
    if val_fraction:
        distinct = sorted(set(digests.values()))
        held_out = set(distinct[: max(1, round(val_fraction * len(distinct)))])
        val = [file for file in files if digests[file] in held_out]
    else:
        val = val_files
        held_out = {_digest(file, errors) for file in val_files}
    train = [file for file in files if digests[file] not in held_out]
    if not train:
        raise ValueError("every document is held out for validation, none is left to train on; give more files")
    return train, val


def settings(train_pattern, val_pattern, encoding) -> str:
    """The environment variables with which a run reads these shards."""
    values = {"TRAIN_FILES": train_pattern, "VAL_FILES": val_pattern}
    values |= {"VOCAB_SIZE": encoding.vocab_size, "DOC_DELIMITER": encoding.delimiter}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items() if value is not None)


def tokenize(options) -> None:
    """Write the shards that the parsed command line asks for, and print what was written."""
    if not 0 <= options.val_fraction < 1:
        raise ValueError(f"--val-fraction is a share from 0 up to 1, not {options.val_fraction}")
    name = options.name or options.out.resolve().name
    encoding = BYTES if options.encoding == "bytes" else gpt2_encoding()
    with (
        ShardWriter(options.out, f"{name}_train", options.shard_tokens) as train,
        ShardWriter(options.out, f"{name}_val", options.shard_tokens, first=0) as val,
    ):
        texts, held_out = find_texts(options.texts), find_texts(options.val_files)
        parts = split(texts, held_out, options.val_fraction, options.errors)
        for writer, files in zip((train, val), parts, strict=True):
            for file in tqdm(files, desc=writer.prefix, unit="file", disable=None):
                writer.add(encoding.document(read_text(file, options.errors)))
    for writer, files in zip((train, val), parts, strict=True):
        if files:
            print(f"{writer.pattern}: {len(files)} documents, {writer.tokens:,} tokens, {writer.shards} shard(s)")
    if not parts[1]:
        print("no validation shard was asked for; --val-fraction or --val-files makes one")
    print(settings(train.pattern, val.pattern if parts[1] else None, encoding))


def main(arguments=None) -> None:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", help="text files, directories, globs")
    parser.add_argument("--out", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--name", help="start of the shards' names (default: the directory's name)")
    parser.add_argument("--encoding", choices=("gpt2", "bytes"), default="gpt2", help="default: %(default)s")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--val-fraction", type=float, default=0.0, help="share of the documents to hold out")
    held_out.add_argument("--val-files", nargs="+", default=[], help="text files, directories, globs to hold out")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default: %(default)s)")
    parser.add_argument("--errors", choices=("strict", "replace"), default="strict", help="bytes that are not UTF-8")
    try:
        tokenize(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")


def _digest(path, errors):
    return hashlib.sha256(read_text(path, errors).encode()).digest()


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


if __name__ == "__main__":
    main()
