"""The `.bin` shard: the only place that knows its format.

A shard is a header of 256 little-endian int32 (magic, version, token count, zeros), then that many little-endian uint16
tokens. Every document starts with the delimiter token; a document cut at the end of a shard goes on in the next one.

Every fault of a file is a ValueError of one line that names the file and how to mend it. A file never stands
half-written under its final name: it is written beside it, flushed to disk, and renamed.
"""

import glob
import hashlib
import os
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the count is an int32
TOKEN = np.dtype("<u2")
CHECK_CHUNK = 1 << 24  # tokens looked at in one go when a memory-mapped shard is scanned


def token_count(path) -> int:
    """Tokens in a shard, after its magic, version and count have been checked against the size of the file."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes, less than the {HEADER_BYTES}-byte header; fetch or make it again")
    magic, version, count = np.frombuffer(header, dtype="<i4", count=3).tolist()
    if magic != MAGIC:
        raise ValueError(f"{path}: no token shard (magic {magic}, not {MAGIC}); make one with data/tokenize_text.py")
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}, only {VERSION} is known; fetch or make it again")
    if count < 1:
        raise ValueError(f"{path}: the header counts {count} tokens; fetch or make it again")
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise ValueError(f"{path}: {fault}, {size} bytes where {count} tokens take {expected}; fetch or make it again")
    return count


def open_shard(path) -> np.memmap:
    """The tokens of a valid shard, uint16 [token count], memory-mapped read-only."""
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(token_count(path),))


def read_tokens(file, start, count) -> np.ndarray:
    """uint16 [count] tokens from `start` of an open shard; ValueError when the file has become shorter."""
    content = os.pread(file.fileno(), TOKEN.itemsize * count, HEADER_BYTES + TOKEN.itemsize * start)
    if len(content) < TOKEN.itemsize * count:
        raise ValueError(f"{file.name}: was cut while in use, tokens {start} to {start + count} are gone; fetch it again")
    return np.frombuffer(content, dtype=TOKEN)


def fingerprint(path) -> str:
    """Hash of a valid shard's token count and of eight slices of 4096 tokens spread over it: tells other data, cheaply."""
    tokens = open_shard(path)
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in np.linspace(0, max(0, len(tokens) - 4096), 8).astype(int):
        digest.update(tokens[start : start + 4096].tobytes())
    return digest.hexdigest()


def check_tokens(path, tokens, vocab_size) -> None:
    """ValueError naming the file, the offset (in tokens) and the token at the first one outside [0, vocab_size)."""
    for start in range(0, len(tokens), CHECK_CHUNK):
        outside = np.flatnonzero(tokens[start : start + CHECK_CHUNK] >= vocab_size)
        if len(outside):
            offset = start + int(outside[0])
            raise ValueError(
                f"{path}: token {tokens[offset]} at offset {offset} is outside the vocabulary of {vocab_size}; "
                "use shards made for this vocabulary, or train with the VOCAB_SIZE of the tokeniser"
            )


def find_shards(pattern) -> list[Path]:
    """Sorted files that match a glob pattern, relative to the current directory; ValueError when none does."""
    paths = sorted(Path(name) for name in glob.glob(os.fspath(pattern), recursive=True))
    if not paths:
        raise ValueError(
            f"no shard matches {pattern!r} from {os.getcwd()}; correct the pattern, or make shards with "
            "data/make_demo_data.py, data/tokenize_text.py or data/cached_fineweb10B.py"
        )
    return paths


def document_spans(tokens, delimiter) -> np.ndarray:
    """int64 [documents, 2] of (start, end) that together cover `tokens`.

    `start` is the delimiter itself, except that a shard which goes on with a document of the shard before it opens with
    a span that has none.
    """
    starts = [
        start + np.flatnonzero(tokens[start : start + CHECK_CHUNK] == delimiter)
        for start in range(0, len(tokens), CHECK_CHUNK)
    ]
    bounds = np.concatenate([*starts, [len(tokens)]]).astype(np.int64)
    if bounds[0] != 0:
        bounds = np.insert(bounds, 0, 0)
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def write_shard(path, tokens: np.ndarray) -> None:
    """Write integer tokens [n >= 1], each in 0..65535, as one shard; a shard already there is replaced whole."""
    path = Path(path)
    os.replace(_write_beside(path, [_as_tokens(path, tokens)]), path)


class ShardWriter:
    """Cut a stream of tokens into shards `directory/prefix_%06d.bin` of `shard_tokens` tokens, the last one shorter.

    Used in a `with` block: the shards are renamed into place together when it ends, and none appears if it fails.
    ValueError when shards of that prefix are there already, so that two sets never mix.
    """

    def __init__(self, directory, prefix, shard_tokens, first=1):
        self.directory, self.prefix, self.shard_tokens, self.first = Path(directory), prefix, shard_tokens, first
        self.tokens = 0  # added so far
        self._parts, self._filled = [], 0  # of the shard being filled
        self._pending = []  # (temporary, final) of the shards already filled
        if not 1 <= shard_tokens <= MAX_TOKENS:
            raise ValueError(f"a shard holds 1 to {MAX_TOKENS} tokens, not {shard_tokens}")
        if present := sorted(self.directory.glob(f"{glob.escape(prefix)}_*.bin")):
            raise ValueError(f"{present[0]} is there already; remove the old shards, or choose another place or name")

    @property
    def pattern(self) -> str:
        """Glob pattern of this set of shards."""
        return glob.escape(str(self.directory / self.prefix)) + "_*.bin"

    @property
    def shards(self) -> int:
        return len(self._pending)

    def add(self, tokens) -> None:
        """Append integer tokens [n], each in 0..65535."""
        tokens = _as_tokens(self.pattern, tokens).copy()  # held until the shard is full; the caller may reuse its array
        self.tokens += len(tokens)
        while len(tokens):
            room = self.shard_tokens - self._filled
            self._parts.append(tokens[:room])
            self._filled += len(self._parts[-1])
            tokens = tokens[room:]
            if self._filled == self.shard_tokens:
                self._finish_shard()

    def _finish_shard(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.prefix}_{self.first + self.shards:06d}.bin"
        self._pending.append((_write_beside(path, self._parts), path))
        self._parts, self._filled = [], 0

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        try:
            if failure is None:
                if self._filled:
                    self._finish_shard()
                for temporary, path in self._pending:
                    os.replace(temporary, path)
        finally:
            for temporary, _ in self._pending:
                temporary.unlink(missing_ok=True)


def _as_tokens(where, tokens):
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{where}: tokens must be a one-dimensional integer array, not {tokens.dtype} {tokens.shape}")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(TOKEN).max:
        raise ValueError(
            f"{where}: tokens from {tokens.min()} to {tokens.max()} do not fit uint16; use a vocabulary that does"
        )
    return np.ascontiguousarray(tokens, dtype=TOKEN)


def _write_beside(path, parts):
    """Write a complete shard to a temporary file in the directory of `path`; returns its name, ready to be renamed."""
    count = sum(map(len, parts))
    if not 1 <= count <= MAX_TOKENS:
        raise ValueError(f"{path}: a shard holds 1 to {MAX_TOKENS} tokens, not {count}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines((header, *parts))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not name the file
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({error.strerror}); check the directory and the disk") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
