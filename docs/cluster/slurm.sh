#!/bin/bash
# A conversion as a Slurm array: each task makes its share of the units, a last job merges.
#
#   bash slurm.sh SOURCE OUT METHOD [TASKS]         on a node that submits; all paths on storage that every node has
#
# What of it is run again after a failure goes on after what is done: run the same command once more.
# Set for your cluster:
PARTITION=${PARTITION:-}              # a partition, where the default is not the one
CPUS=${CPUS:-8}                       # processors of a task
MEMORY=${MEMORY:-4G}                  # memory of a task
HOURS=${HOURS:-4}                     # its limit of time
RETRIES=${RETRIES:-3}                 # how often a task is queued again after a fault that may pass
LLMPRESS=${LLMPRESS:-llmpress}        # the program, on every node
PLAN_ARGS=${PLAN_ARGS:-}              # more of `llmpress plan`, such as "--max-shard-size 1GB"

set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    source=$(realpath "$1") out=$(realpath -m "$2") method=$3 tasks=${4:-16}
    mkdir -p "$(dirname "$out")"
    plan=$out.plan.json
    # The same plan where source and method are the same: units that are done stay.
    # shellcheck disable=SC2086
    "$LLMPRESS" plan "$source" --to "$method" ${PLAN_ARGS:-} --json > "$plan.new"
    mv "$plan.new" "$plan"
    export LLMPRESS RETRIES
    common=(--parsable --export=ALL ${PARTITION:+"--partition=$PARTITION"} --time="$HOURS:00:00" --open-mode=append)
    array=$(sbatch "${common[@]}" --job-name=units --array="0-$((tasks - 1))" --output="$out.%x.%A_%a.log" --requeue --signal=TERM@60 \
        --cpus-per-task="$CPUS" --mem="$MEMORY" "$(realpath "$0")" worker "$plan" "$out")
    sbatch "${common[@]}" --job-name=merge --output="$out.%x.%j.log" --dependency="afterok:$array" --kill-on-invalid-dep=yes \
        --cpus-per-task="$CPUS" --mem="$MEMORY" "$(realpath "$0")" merge "$plan" "$out"
    exit
fi

verb=$1 plan=$2 out=$3
code=0
# Its rank is SLURM_ARRAY_TASK_ID, counted from the first task of the array. srun hands signals on.
srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$LLMPRESS" "$verb" --plan "$plan" "$out" --jobs "${SLURM_CPUS_PER_TASK:-1}" || code=$?
# 2 and 3 will fail again; everything else, a signal too, may pass.
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RETRIES:-3}" ]; then
    echo "exit code $code: queued again" >&2
    id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${id:-$SLURM_JOB_ID}"
fi
exit "$code"
