#!/usr/bin/env bash
# Runs the ablation arms one after the other, with the same seed and data, and compares them.
#
#   ./run_ablations.sh
#   NUM_ITERATIONS=500 SEED=2 ABLATION_NAME=seed2 ./run_ablations.sh
#   ARMS="A C" ./run_ablations.sh
#
#   arm A   spectral bias off
#   arm B   spectral bias on, pointer mask off
#   arm C   spectral bias on, pointer mask on, with its schedule
#
# Each arm runs in LOG_DIR/ABLATION_NAME/arm_X; the table goes to the terminal, ablation.json and ablation.md beside
# them. Run the same command again to go on: a complete arm is skipped, an interrupted one resumes from its newest
# checkpoint, a failed one is tried again. A failed arm does not stop the others.
#
# Variables of its own (every other variable is handed to the training script; see `python scoped_medium.py --help`):
#   ABLATION_NAME  name of the ablation's directory        (ablation)
#   ARMS           arms to run                             (A B C)
#   NPROC          processes; torchrun if more than one    (number of GPUs)
#   PYTHON         interpreter                             (python, else python3)
#   SCRIPT         training script                         (scoped_medium.py beside this file)
# Set unless given: LOG_DIR=logs NEEDLE_EVAL=1 SCOPE_LOG_EVERY=200. Always set: RUN_NAME, RESUME=auto,
# SAVE_CHECKPOINT=1 and the three variables that make an arm.
#
# Exit status: 0 all arms complete, 1 an arm failed, 2 bad usage, 130 interrupted (129, 143: by HUP, TERM).
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${ABLATION_NAME:-ablation}
arms=${ARMS:-A B C}
python=${PYTHON:-$(command -v python || command -v python3)}
script=${SCRIPT:-$here/scoped_medium.py}
root=${LOG_DIR:-logs}/$name

say() { printf '== %s\n' "$*"; }

refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

count_gpus() {
    local visible
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#visible[@]}"
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU '
    fi
}

is_complete() { grep -Eqs '"status": *"complete"' "$1/summary.json"; }

# A signal goes on to the running arm, each further one harder, so that nothing outlives this script.
stopped=0
child=
signals_sent=0
stop() { # $1: signal, $2: exit status
    local harder=("$1" TERM KILL)
    stopped=$2
    if [[ -n $child ]]; then
        kill -s "${harder[signals_sent < 2 ? signals_sent : 2]}" -- "-$child" 2>/dev/null
        signals_sent=$((signals_sent + 1))
    fi
}
trap 'stop HUP 129' HUP
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM

# Runs a command in a process group of its own: a signal reaches this shell first, and the group once, through `stop`.
run() {
    local status
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    ((stopped)) && stop TERM "$stopped" # the signal came before there was a child to pass it to
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal cut the wait short
        wait "$child"
        status=$?
    done
    child=
    return "$status"
}

run_arm() { # $1: A, B or C
    local bias pointer schedule
    case $1 in
        A) bias=0 pointer=0 schedule=0 ;;
        B) bias=1 pointer=0 schedule=0 ;;
        C) bias=1 pointer=1 schedule=1 ;;
    esac
    run env LOG_DIR="$root" RUN_NAME="arm_$1" RESUME=auto SAVE_CHECKPOINT=1 \
        NEEDLE_EVAL="${NEEDLE_EVAL:-1}" SCOPE_LOG_EVERY="${SCOPE_LOG_EVERY:-200}" \
        SPECTRAL_BIAS=$bias SPECTRAL_USE_POINTER_MASK=$pointer SPECTRAL_POINTER_SCHEDULE=$schedule \
        "${launch[@]}" "$script"
}

if (($#)); then
    [[ $1 == --help || $1 == -h ]] || refuse "$1: everything is set by environment variables; see ./run_ablations.sh --help"
    sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ -n $python ]] || refuse "no python on PATH; set PYTHON"
[[ -f $script ]] || refuse "$script: no such training script; set SCRIPT"
[[ $name != */* && $name != .* ]] || refuse "ABLATION_NAME=$name: give a plain directory name"
read -ra arms <<<"$arms"
((${#arms[@]})) || refuse "ARMS names no arm; choose from A B C, separated by spaces"
for arm in "${arms[@]}"; do
    [[ $arm == [ABC] ]] || refuse "ARMS: unknown arm '$arm'; choose from A B C, separated by spaces"
done
nproc=${NPROC:-$(count_gpus)}
[[ $nproc =~ ^(0|[1-9][0-9]*)$ ]] || refuse "NPROC=$nproc: give a whole number"
launch=("$python")
if ((nproc > 1)); then # torchrun of the same interpreter
    launch+=(-m torch.distributed.run --standalone --nproc_per_node="$nproc")
fi
mkdir -p "$root" || exit 1

failed=()
for arm in "${arms[@]}"; do
    if is_complete "$root/arm_$arm"; then
        say "arm $arm: already complete, skipped (to run it again, remove $root/arm_$arm or set ABLATION_NAME)"
        continue
    fi
    say "arm $arm: $root/arm_$arm"
    run_arm "$arm"
    status=$?
    if ((stopped)); then
        say "interrupted in arm $arm; run the same command again to resume"
        exit "$stopped"
    fi
    if ((status)) || ! is_complete "$root/arm_$arm"; then
        say "arm $arm: failed (exit status $status)"
        failed+=("$arm")
    fi
done

echo
"$python" "$here/eval/ablation.py" "$root" || exit 1
if ((${#failed[@]})); then
    say "failed: ${failed[*]}"
    exit 1
fi
