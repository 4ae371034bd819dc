"""Download 10 billion tokens of FineWeb-Edu, tokenised with GPT-2's BPE, into data/finewebedu10B.

    python data/cached_finewebedu10B.py [n]

`n` is the number of train shards of 100M tokens (default: all 99); the validation shard always comes too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, also when run from elsewhere

from data.cached_shards import Dataset, main

DATASET = Dataset(name="finewebedu10B", repo="kjj0/finewebedu10B-gpt2", prefix="finewebedu", train_shards=99)

if __name__ == "__main__":
    main(DATASET)
