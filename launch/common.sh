# shellcheck shell=bash
# Read by launch/*.sbatch. Sets SUBMIT_DIR, LOG_DIR and CONTAINER_COMMAND, and defines say, fail and run_on.

say() { echo "[$(date '+%F %T')] job $SLURM_JOB_ID: $*"; }

fail() {
    say "error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || {
    echo "error: this is a batch script: sbatch ${BASH_SOURCE[1]} ... (on one machine: launch/local.sh)" >&2
    exit 2
}

ranks_of_job=${NPROC_PER_NODE:-} # of this job: counts more than what is usual on the cluster
if [ -f "${CLUSTER_ENV:-$LAUNCH_DIR/cluster.env}" ]; then
    # shellcheck source=/dev/null
    source "${CLUSTER_ENV:-$LAUNCH_DIR/cluster.env}"
    if [ -n "$ranks_of_job" ]; then NPROC_PER_NODE=$ranks_of_job; fi
elif [ -n "${CLUSTER_ENV:-}" ]; then
    fail "CLUSTER_ENV is $CLUSTER_ENV, but there is no such file"
fi

export LAUNCH_DIR
export LOG_DIR=$PWD/logs/$SLURM_JOB_ID
mkdir -p "$LOG_DIR" || fail "cannot make $LOG_DIR: start sbatch from a directory that all nodes see and may write"

# What stands between srun and launch/node.sh.
srun_options=()
CONTAINER_COMMAND=()
case "${CONTAINER:-none}" in
    none) ;;
    pyxis)
        srun_options+=(--container-image="${CONTAINER_IMAGE:?CONTAINER=pyxis needs CONTAINER_IMAGE}")
        srun_options+=(--container-workdir="$PWD" --container-mounts="$PWD:$PWD,$LAUNCH_DIR:$LAUNCH_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
        ;;
    apptainer)
        CONTAINER_COMMAND=(apptainer exec --nv --pwd "$PWD" --bind "$PWD,$LAUNCH_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
        CONTAINER_COMMAND+=("${CONTAINER_IMAGE:?CONTAINER=apptainer needs CONTAINER_IMAGE}")
        ;;
    *) fail "CONTAINER is '$CONTAINER'; expected none, pyxis or apptainer" ;;
esac

# ask COMMAND...: launch/node.sh COMMAND on the node of this script, in the container where there is one.
ask() {
    local step=()
    if [ "${CONTAINER:-none}" = pyxis ]; then
        step=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${SLURMD_NODENAME:-$(hostname -s)}" "${srun_options[@]}")
    fi
    "${step[@]}" "${CONTAINER_COMMAND[@]}" "$LAUNCH_DIR/node.sh" "$@"
}

# run_on "NODE NODE ..." COMMAND...: launch/node.sh COMMAND once on each of the nodes. Sets srun_pid while it runs;
# returns srun's exit code. STEP_OPTIONS are srun's: by default one node that ends badly ends the others.
STEP_OPTIONS=(--kill-on-bad-exit=1 --wait=30)
run_on() {
    local nodes count code late_code
    read -ra nodes <<<"$1"
    shift
    count=${#nodes[@]}
    # --cpu-bind=none: by default a step with one task per node binds it, and with it all ranks, to one core.
    srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --cpu-bind=none "${STEP_OPTIONS[@]}" \
        --nodelist="$(IFS=,; echo "${nodes[*]}")" "${srun_options[@]}" \
        "${CONTAINER_COMMAND[@]}" "$LAUNCH_DIR/node.sh" "$@" &
    srun_pid=$!
    while :; do # a trapped signal makes wait return early, with a code of its own
        wait "$srun_pid"
        code=$?
        kill -0 "$srun_pid" 2>/dev/null || break
    done
    if ((code > 128)); then
        wait "$srun_pid" 2>/dev/null
        late_code=$?
        ((late_code == 127)) || code=$late_code
    fi
    srun_pid=
    return "$code"
}
