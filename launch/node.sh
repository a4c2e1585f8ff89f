#!/usr/bin/env bash
# What runs on each node of a job; launch/*.sbatch start it with srun, one task per node.
#
#     node.sh preflight CONFIG.yaml [section.field=value ...]   check this node, alone and together with the others
#     node.sh train CONFIG.yaml [section.field=value ...]       torchrun: this node's ranks
#     node.sh rank ...                                          one rank, started by torchrun
#     node.sh evaluate MODEL ...                                torchrun: this node's ranks of meditron-train evaluate
#     node.sh convert ...                                       meditron-train convert
#     node.sh corpus ...                                        meditron-train corpus
#     node.sh job-end LOG_DIR RUN_DIR                           what follows from how the ranks ended
#
# From the batch script it gets LAUNCH_DIR, LOG_DIR, MASTER_ADDR, MASTER_PORT and RENDEZVOUS_ID.
set -euo pipefail

cluster_env=${CLUSTER_ENV:-$LAUNCH_DIR/cluster.env}
ranks_of_job=${NPROC_PER_NODE:-} # what a job says of itself counts more than what is usual on its cluster
# shellcheck source=/dev/null
if [ -f "$cluster_env" ]; then source "$cluster_env"; fi
NPROC_PER_NODE=${ranks_of_job:-${NPROC_PER_NODE:-}}

what=$1
shift

if [ "$what" = rank ]; then # its environment is torchrun's
    log=$LOG_DIR/${SLURMD_NODENAME:-$(hostname)}-$RANK.log
    printf '\n==== %s rank %s of %s, rendezvous %s ====\n' "$(date '+%F %T')" "$RANK" "$WORLD_SIZE" "$RENDEZVOUS_ID" >>"$log"
    if [ "$RANK" = 0 ]; then # the log of the job shows it too; tee must outlive the signals that ask the rank to save
        exec > >(trap '' TERM USR1 USR2 INT; exec tee -a "$log") 2>&1
    else
        exec >>"$log" 2>&1
    fi
    exec python -m meditron_train train "$@"
fi

node=${SLURMD_NODENAME:-$(hostname)}
if [ "$what" = preflight ]; then touch "$LOG_DIR/preflight/unfinished-$node"; fi # until it has been through

if [ -n "${MODULES:-}" ]; then
    # shellcheck disable=SC2086 # a list of modules
    module load $MODULES
fi
if [ -z "${VENV:-}" ] && [ "${CONTAINER:-none}" = none ] && [ -f "$LAUNCH_DIR/../.venv/bin/activate" ]; then
    VENV=$LAUNCH_DIR/../.venv # a container has an environment of its own
fi
# shellcheck source=/dev/null
if [ -n "${VENV:-}" ]; then source "$VENV/bin/activate"; fi

count_gpus() { # those of the job; CUDA_VISIBLE_DEVICES alone proves none
    if command -v nvidia-smi >/dev/null 2>&1; then
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

num_gpus=$(count_gpus)
if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && ((num_gpus > SLURM_GPUS_ON_NODE)); then num_gpus=$SLURM_GPUS_ON_NODE; fi
default_nproc=$((num_gpus > 0 ? num_gpus : 1))
export NPROC_PER_NODE=${NPROC_PER_NODE:-$default_nproc}

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$((${SLURM_CPUS_ON_NODE:-1} / NPROC_PER_NODE))
    if ((num_gpus > 0 && threads > 8)); then threads=8; fi
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
if ((num_gpus > 0)); then
    # One hardware queue: communication that was issued first also starts first (megatron-core's overlap wants it).
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi
# A collective that hangs ends the rank, and leaves the last 2000 collectives of each for the post-mortem.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOG_DIR/nccl_trace_rank_}

case "$what" in
    preflight)
        code=0
        python -m meditron_train preflight --report-dir "$LOG_DIR/preflight" --timeout "${PREFLIGHT_TIMEOUT_S:-60}" "$@" || code=$?
        case "$code" in
            0 | 4) rm -f "$LOG_DIR/preflight/unfinished-$node" ;; # 4: this node is well, the first does not answer
            2) mv "$LOG_DIR/preflight/unfinished-$node" "$LOG_DIR/preflight/wrong-$node" ;; # the configuration
        esac
        exit "$code"
        ;;
    job-end)
        trap '' TERM USR1 # Slurm ends the job with them, and its end is what is asked for
        exec python -m meditron_train.flows.job_end "$@"
        ;;
    convert | corpus) exec python -m meditron_train "$what" "$@" ;;
    train)
        # USR1 and TERM ask the ranks to save. USR1 kills a torchrun that does not ignore it, and on TERM it would end
        # its ranks after 30 s, saved or not. Slurm signals the ranks too, and they set handlers of their own; USR2 asks
        # them for their stacks.
        trap '' USR1 USR2 TERM
        export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
        exec torchrun --nnodes "$SLURM_STEP_NUM_NODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0 \
            --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RENDEZVOUS_ID" \
            --no-python "$LAUNCH_DIR/node.sh" rank "$@"
        ;;
    evaluate)
        exec torchrun --nnodes "$SLURM_STEP_NUM_NODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts 0 \
            --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RENDEZVOUS_ID" \
            --module meditron_train evaluate "$@"
        ;;
    *)
        echo "launch/node.sh: '$what' is not one of preflight, train, evaluate, rank, convert, corpus, job-end" >&2
        exit 2
        ;;
esac
