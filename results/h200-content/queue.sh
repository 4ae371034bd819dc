#!/usr/bin/env bash
# Steps on one GPU, one after the other: the settings of rounds 10 to 24 of RESULTS.md, section 6. From a clone:
#
#     DATA=/data LOGS=/runs SECONDS_LEFT=1680 GPU=0 MIX=0.08 PASSAGES=0.25 HOLD=0 bash results/h200-content/queue.sh \
#       'train copies_0 0 $COPIES; SPECTRAL_POINTER_FLOOR=3 evaluate copies_0'
#
# train NAME SEED SETTINGS..., score NAME OUT TEXT ARGUMENTS..., evaluate NAME [SUFFIX [PARTS]], by_step NAME STEPS... Settings
# before a scoring are the evaluation's. work: the lines of $LOGS/jobs, one after the other, shared with other GPUs' queues.
# DATA: the shards books_pep_train_*, gutenberg_train_*, books_val_000000, books_test_1m_*. What SECONDS_LEFT does not cover is
# cut off.
set -u
START=$(date +%s)
export CUDA_VISIBLE_DEVICES=$GPU
COMMON="NUM_LAYERS=8 NUM_HEADS=4 HEAD_DIM=128 MODEL_DIM=512 TRAIN_SEQ_LEN=16384 BATCH_TOKENS=32768 VAL_SEQ_LEN=16384
  VAL_TOKENS=2097152 VAL_LOSS_EVERY=0 EPOCHS=0 HEAD_LOSS=fused TORCH_COMPILE_MODE=reduce-overhead WARMUP_STEPS=2
  SCOPE_LOG_EVERY=500 LOG_EVERY=100 KEEP_CHECKPOINTS=0
  NUM_ITERATIONS=${K:-12000} RETRIEVAL_MIX=${MIX:-0.17} RETRIEVAL_PASSAGES=${PASSAGES:-0.5}"
POINTERS="SPECTRAL_USE_POINTER_MASK=1 SPECTRAL_LAYERS=5 SPECTRAL_POINTER_SCHEDULE=1 SPECTRAL_POINTER_MID_FRAC=0.02
  SPECTRAL_WINDOW_HOLD=${HOLD:-0.25}"
CONTENT="$POINTERS SPECTRAL_POINTER_SOURCE=content SPECTRAL_POINTER_COPY=0"
COPIES="$POINTERS SPECTRAL_POINTER_SOURCE=content SPECTRAL_POINTER_COPY=1"
BIAS="$COPIES SPECTRAL_BIAS=1"
POOLED="$POINTERS SPECTRAL_POINTER_SOURCE=pooled"
OFFSET="$POINTERS SPECTRAL_POINTER_SOURCE=offset SPECTRAL_BIAS=1 SPECTRAL_POINTER_HALF_BLOCKS=3 SPECTRAL_POINTER_LOCAL_BLOCKS=4"
DENSE="$POINTERS SPECTRAL_POINTER_SCHEDULE=0 SPECTRAL_POINTER_SOURCE=dense SPECTRAL_LENGTH_SCALE=1"
HELD="SPECTRAL_WINDOW_HOLD=0.6"
BOOKS=$DATA/books_val_000000.bin MILLION=$DATA/books_test_1m_gibbon.bin
GAIN="--tasks gain --lengths 262144 --samples 48 --contexts 1024,4096,16384,65536,262144"

left() { local left=$((START + SECONDS_LEFT - $(date +%s))); echo $((left > 0 ? left : 1)); }
say() { echo "$(($(date +%s) - START)) $*" >> "$LOGS/status"; }

train() { # NAME SEED SETTINGS...
  local name=$1 seed=$2
  shift 2
  say "$name starts"
  # shellcheck disable=SC2086  # the settings are words
  env $COMMON "$@" "TRAIN_FILES=$DATA/*_train_*.bin" "VAL_FILES=$BOOKS" "SEED=$seed" "LOG_DIR=$LOGS" "RUN_NAME=$name" \
    timeout "$(left)" python3 scoped_medium.py > "$LOGS/$name.log" 2>&1
  say "$name trained $? $(grep -ao 'val_loss  *[0-9.]*' "$LOGS/$name.log" | tail -n 1)"
}

score() { # NAME OUT TEXT ARGUMENTS...
  local name=$1 out=$2 text=$3 checkpoints=("$LOGS/$1"/state_step${STEP:-*}.pt)
  shift 3
  timeout "$(left)" python3 eval/retrieval.py "${checkpoints[-1]}" --out "$LOGS/$name/$out" --swaps 0 --text "$text" "$@" \
    > "$LOGS/${name}_$out.log" 2>&1
  say "$name $out $?"
}

evaluate() { # NAME [SUFFIX [PARTS]]
  local name=$1 as=${2:-} part
  for part in ${3:-m r s k t gain}; do
    # shellcheck disable=SC2086  # the arguments are words
    case $part in
      m) score "$name" "m$as" "$MILLION" --tasks single --lengths 1048576 --samples 100 & ;;
      r) score "$name" "r$as" "$BOOKS" --tasks single --lengths 16384 --samples 600 ;;
      s) score "$name" "s$as" "$BOOKS" --tasks single --lengths 131072 --samples 400 ;;
      k) score "$name" "k$as" "$BOOKS" --tasks multikey --lengths 131072 --samples 400 ;;
      t) score "$name" "t$as" "$BOOKS" --tasks tracking --lengths 131072 --samples 200 ;;
      exact) SPECTRAL_POINTER_ASKING=128 score "$name" "exact$as" "$MILLION" --tasks single --lengths 1048576 --samples 20 ;;
      both) score "$name" "both$as" "$BOOKS" --tasks single,multikey --lengths 16384,131072 --samples 60 ;;
      gain) score "$name" "gain$as" "$BOOKS" $GAIN ;;
      far) score "$name" "far$as" "$DATA/books_test_1m_*.bin" --tasks gain --lengths 1048576 --samples 24 \
        --contexts 4096,16384,262144,1044480 ;;
    esac
  done
  wait
}

by_step() { # NAME STEPS...: needles of earlier checkpoints
  local name=$1 STEP step
  shift
  for step; do
    STEP=$(printf %06d "$step")
    score "$name" "r$step" "$BOOKS" --tasks single --lengths 16384 --samples 100
    score "$name" "s$step" "$BOOKS" --tasks single --lengths 131072 --samples 60
  done
}

work() {
  local job
  while job=$(flock "$LOGS/jobs.lock" sh -c 'head -n 1 "$0"; sed -i 1d "$0"' "$LOGS/jobs") && [ -n "$job" ]; do eval "$job"; done
  wait
}

rival() { # NAME SEED SETTINGS...: its evaluation runs beside the next one's training
  train "$@" NUM_ITERATIONS=2400 RETRIEVAL_MIX=0.25 RETRIEVAL_PASSAGES=0.5
  evaluate "$1" "" both &
}

mkdir -p "$LOGS"
eval "$1"
say "GPU $GPU is done"
