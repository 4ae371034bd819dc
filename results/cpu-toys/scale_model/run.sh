#!/usr/bin/env bash
# The training script itself at the size of two CPU cores: 2.9M parameters, T = 2,048, text of the 4,096 commonest tokens.
#
#     DATA=/data WORK=/tmp/scale bash results/cpu-toys/scale_model/run.sh        # two hours
#
# From a clone, in a copy whose windows have two blocks in memory too, not only in the lists, so that a step takes 0.8 s.
# DATA: shards as in ../../h200-content/text.csv.
set -eu
rm -rf "$WORK" && mkdir -p "$WORK/shards" && git clone -q . "$WORK/code" && cd "$WORK/code"
sed -i 's/^LONG_WINDOW_BLOCKS = 13.5/LONG_WINDOW_BLOCKS = 2.0/' scoped_medium.py
python - << 'PYTHON'
import os
from pathlib import Path
import numpy as np
from data.shards import open_shard, write_shard
data, out = Path(os.environ["DATA"]), Path(os.environ["WORK"], "shards")
train = sorted(data.glob("*_train_*.bin"))
counts = sum(np.bincount(open_shard(path), minlength=65536) for path in train)
counts[50256] = 0
ids = np.full(65536, 65535)
ids[np.argsort(-counts, kind="stable")[:4096]] = np.arange(4096)
ids[50256] = 4096
for path in [*train, data / "books_val_000000.bin"]:
    tokens = ids[open_shard(path)]
    write_shard(out / path.name, tokens[tokens != 65535])
PYTHON
train() { # NAME SEED STEPS SETTINGS...
  local name=$1 seed=$2 steps=$3
  shift 3
  env VOCAB_SIZE=4097 DOC_DELIMITER=4096 NUM_LAYERS=4 NUM_HEADS=2 HEAD_DIM=64 MODEL_DIM=128 TRAIN_SEQ_LEN=2048 \
    BATCH_TOKENS=2048 VAL_SEQ_LEN=2048 VAL_TOKENS=262144 VAL_LOSS_EVERY=0 EPOCHS=0 SCOPE_LOG_EVERY=100 LOG_EVERY=20 \
    NUM_ITERATIONS="$steps" RETRIEVAL_MIX=0.2 RETRIEVAL_PASSAGES=0.25 SPECTRAL_USE_POINTER_MASK=1 SPECTRAL_LAYERS=2 \
    SPECTRAL_POINTER_SCHEDULE=1 SPECTRAL_POINTER_MID_FRAC=0.02 SPECTRAL_WINDOW_HOLD=0.99 \
    SPECTRAL_POINTER_NEAR_BLOCKS=2 SPECTRAL_POINTER_FAR_BLOCKS=4 \
    "TRAIN_FILES=$WORK/shards/*_train_*.bin" VAL_FILES="$WORK/shards/books_val_000000.bin" SEED="$seed" LOG_DIR="$WORK/runs" \
    RUN_NAME="$name" "$@" python scoped_medium.py
}
score() { # NAME OUT LENGTHS SAMPLES
  python eval/retrieval.py "$WORK/runs/$1"/state_step*.pt --out "$WORK/runs/$1/$2" --swaps 0 \
    --text "$WORK/shards/books_val_000000.bin" --tasks single --lengths "$3" --samples "$4"
}
train dense 0 2000 SPECTRAL_POINTER_SOURCE=dense SPECTRAL_LENGTH_SCALE=1 SPECTRAL_POINTER_SCHEDULE=0
train content 0 2000 SPECTRAL_POINTER_SOURCE=content SPECTRAL_POINTER_FLOOR=0.5
train longer 1 4500 SPECTRAL_POINTER_SOURCE=content SPECTRAL_POINTER_FLOOR=0.5 SPECTRAL_POINTER_FAR_BLOCKS=16 \
  SPECTRAL_POINTER_SCHEDULE=0 LOAD_CHECKPOINT="$WORK/runs/content/state_step002000.pt"
score dense r 2048 30
score content r 2048,16384 40
score longer r 2048,16384 40
SPECTRAL_POINTER_ASKING=128 score longer r_all 2048,16384 40
