#!/usr/bin/env bash
# Train on this machine: one process per visible GPU, or one process where there is none.
#
#     launch/local.sh CONFIG.yaml [section.field=value ...]
#     NPROC=2 launch/local.sh CONFIG.yaml [section.field=value ...]
#
# NPROC sets the number of processes. OMP_NUM_THREADS and CUDA_DEVICE_MAX_CONNECTIONS are kept where they are set.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0"
}

fail() {
    echo "launch/local.sh: $1" >&2
    exit 2
}

# GPUs that CUDA shows to this shell: CUDA_VISIBLE_DEVICES where it is set (a list that ends at the first -1), else
# what the driver lists.
count_gpus() {
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        echo 0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | awk '/^ *-1/ { exit } NF { n++ } END { print n + 0 }'
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | awk '/^GPU / { n++ } END { print n + 0 }'
    fi
}

case "${1:-}" in
    "" ) usage >&2; exit 2 ;;
    -h | --help ) usage; exit 0 ;;
esac

program=$(command -v meditron-train) || program="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/meditron-train"
[ -x "$program" ] || fail "there is no meditron-train; write: make install && source .venv/bin/activate"

num_gpus=$(count_gpus)
default_nproc=$((num_gpus > 0 ? num_gpus : 1))
nproc_per_node=${NPROC:-$default_nproc}
[[ "$nproc_per_node" =~ ^[1-9][0-9]*$ ]] || fail "NPROC is '$nproc_per_node'; expected a number of processes, 1 or more"
if ((num_gpus > 0 && nproc_per_node > num_gpus)); then
    fail "NPROC is $nproc_per_node, but $num_gpus GPU(s) are visible: at most one process per GPU"
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    # The processes share the cores. Beside a GPU, a process computes little on the CPU and 8 threads are enough.
    unset OMP_NUM_THREADS # nproc would believe it
    threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / nproc_per_node))
    ((num_gpus > 0 && threads > 8)) && threads=8
    ((threads >= 1)) || threads=1
    export OMP_NUM_THREADS=$threads
fi
if ((num_gpus > 0)); then
    # One hardware queue: communication that was issued first also starts first (megatron-core's overlap wants it).
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi

exec "$program" train --processes "$nproc_per_node" "$@"
