"""Download 100 billion tokens of FineWeb, tokenised with GPT-2's BPE, into data/fineweb100B.

    python data/cached_fineweb100B.py [n]

`n` is the number of train shards of 100M tokens (default: all 1030); the validation shard always comes too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, also when run from elsewhere

from data.cached_shards import Dataset, main

DATASET = Dataset(name="fineweb100B", repo="kjj0/fineweb100B-gpt2", prefix="fineweb", train_shards=1030)

if __name__ == "__main__":
    main(DATASET)
