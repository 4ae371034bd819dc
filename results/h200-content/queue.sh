#!/usr/bin/env bash
# One queue a GPU, every arm trained, then evaluated: the settings of rounds 10 to 12 of RESULTS.md, section 6. From a clone:
#
#     DATA=/data LOGS=/runs SECONDS_LEFT=1680 Q0="copies:0 A:1" Q1="copies:1" bash results/h200-content/queue.sh
#
# DATA: the shards books_pep_train_*, gutenberg_train_*, books_val_000000, books_test_1m_gibbon. K, MIX, PASSAGES, HOLD: of all
# arms but the short ones (names ending in 5), which take 5,500 steps. An arm that the time left does not cover is left out.
set -u
START=$(date +%s)
COMMON="NUM_LAYERS=8 NUM_HEADS=4 HEAD_DIM=128 MODEL_DIM=512 TRAIN_SEQ_LEN=16384 BATCH_TOKENS=32768 VAL_SEQ_LEN=16384
  VAL_TOKENS=2097152 VAL_LOSS_EVERY=0 EPOCHS=0 HEAD_LOSS=fused TORCH_COMPILE_MODE=reduce-overhead WARMUP_STEPS=2
  SCOPE_LOG_EVERY=500 LOG_EVERY=100 KEEP_CHECKPOINTS=0"
POINTERS="SPECTRAL_USE_POINTER_MASK=1 SPECTRAL_LAYERS=5 SPECTRAL_POINTER_SCHEDULE=1 SPECTRAL_POINTER_MID_FRAC=0.02"
VALIDATION="--text $DATA/books_val_000000.bin"

left() { echo $((START + SECONDS_LEFT - $(date +%s))); }
say() { echo "$(($(date +%s) - START)) $*" >> "$LOGS/status"; }

settings() { # ARM
  local length="NUM_ITERATIONS=${K:-12000} RETRIEVAL_MIX=${MIX:-0.17} RETRIEVAL_PASSAGES=${PASSAGES:-0.5}" hold=${HOLD:-0.25}
  case $1 in *5) length="NUM_ITERATIONS=5500 RETRIEVAL_MIX=0.2" hold=0.33 ;; esac
  echo "$length"
  case $1 in
    A | A5) return ;;
    dense5) echo "$POINTERS SPECTRAL_POINTER_SCHEDULE=0 SPECTRAL_POINTER_SOURCE=dense SPECTRAL_LENGTH_SCALE=1" ;;
    offset5) echo "$POINTERS SPECTRAL_POINTER_SOURCE=offset SPECTRAL_BIAS=1 SPECTRAL_POINTER_HALF_BLOCKS=3
      SPECTRAL_POINTER_LOCAL_BLOCKS=4" ;;
    pooled5) echo "$POINTERS SPECTRAL_POINTER_SOURCE=pooled" ;;
    bias5) echo "$POINTERS SPECTRAL_POINTER_SOURCE=content SPECTRAL_BIAS=1" ;;
    copies*) echo "$POINTERS SPECTRAL_POINTER_SOURCE=content SPECTRAL_POINTER_COPY=1" ;;
    content*) echo "$POINTERS SPECTRAL_POINTER_SOURCE=content" ;;
  esac
  echo "SPECTRAL_WINDOW_HOLD=$hold"
}

needed() { # seconds for an arm
  case $1 in A) echo 510 ;; A5) echo 255 ;; *5) echo 300 ;; *) echo "${NEED:-720}" ;; esac
}

score() { # GPU ARM_SEED NAME ARGUMENTS...
  local gpu=$1 run=$2 name=$3 checkpoints=("$LOGS/$2"/state_step*.pt)
  shift 3
  CUDA_VISIBLE_DEVICES=$gpu timeout "$(($(left) > 0 ? $(left) : 1))" python3 eval/retrieval.py \
    "${checkpoints[-1]}" --out "$LOGS/$run/$name" --swaps 0 "$@" > "$LOGS/${run}_$name.log" 2>&1
  say "$run $name $?"
}

arm() { # GPU ARM SEED
  local run=$2_$3
  if [ "$(left)" -lt "$(needed "$2")" ]; then say "$run: $(left) s are too few"; return; fi
  say "$run starts"
  # shellcheck disable=SC2046,SC2086  # the settings are words
  env CUDA_VISIBLE_DEVICES=$1 $COMMON $(settings "$2") "TRAIN_FILES=$DATA/*_train_*.bin" "VAL_FILES=$DATA/books_val_000000.bin" \
    "SEED=$3" "LOG_DIR=$LOGS" "RUN_NAME=$run" timeout "$(left)" python3 scoped_medium.py > "$LOGS/$run.log" 2>&1
  say "$run trained $?"
  ls "$LOGS/$run"/state_step*.pt > /dev/null 2>&1 || return
  local gain="--tasks gain --lengths 262144 --samples 48 --contexts 1024,4096,16384,65536,262144"
  # shellcheck disable=SC2086
  case $2 in
    A5) ;;
    A) score "$1" "$run" gain $VALIDATION $gain ;;
    *5) score "$1" "$run" t $VALIDATION --tasks multikey,tracking --lengths 131072 --samples 50 &
      score "$1" "$run" r $VALIDATION --tasks single --lengths 16384,131072 --samples 50 ;;
    *) score "$1" "$run" m --text "$DATA/books_test_1m_gibbon.bin" --tasks single --lengths 1048576 --samples 100 &
      score "$1" "$run" r $VALIDATION --tasks single --lengths 16384,131072 --samples 200
      score "$1" "$run" t $VALIDATION --tasks multikey,tracking --lengths 131072 --samples 200
      score "$1" "$run" gain $VALIDATION $gain ;;
  esac
  wait
}

mkdir -p "$LOGS"
for gpu in 0 1 2 3 4 5 6 7; do
  queue=Q$gpu
  [ -n "${!queue-}" ] || continue
  (for item in ${!queue}; do arm "$gpu" "${item%:*}" "${item#*:}"; done; say "queue $gpu is over") &
done
wait
