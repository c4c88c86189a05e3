#!/bin/bash
# Training on several machines under Slurm, from the repository's folder:
#
#   sbatch --nodes 4 training/launch/slurm.sh training.run_clm training/recipes/clm_mini.yaml --output_dir SHARED/clm
#
# First the module of a script, then its arguments. The output folder lies where all nodes see it. Two minutes before
# the time is up, or when the job is pre-empted, every process saves and exits with 75; the job is then put back into
# the queue, and --resume, which is always given, goes on from the newest verified checkpoint. Any other exit code ends
# the job. Slurm's own options go before the script's name and override those below.
#
# The variables that may be set: GPUS_PER_NODE (processes a node; else Slurm's number of GPUs), PORT (of the
# rendezvous, 29500), MAX_REQUEUES (100), PYTHON (python).
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch training/launch/slurm.sh MODULE [ARGUMENTS]" >&2
    exit 2
fi
module=$1
shift

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [ -z "$head_node" ]; then
    echo "scontrol names no node of $SLURM_JOB_NODELIST. Start this script by sbatch." >&2
    exit 2
fi
restarts=${SLURM_RESTART_COUNT:-0}

# This shell must outlive a signal to ask for the next turn. A handler, unlike an ignored signal, is not inherited.
trap : TERM USR1

# A task that exits early leaves the others the time to save, but not for ever.
srun --kill-on-bad-exit=0 --wait=300 \
    "${PYTHON:-python}" -m training.launch.torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$head_node:${PORT:-29500}" \
    --rdzv_id "$SLURM_JOB_ID-$restarts" \
    -m "$module" "$@" --resume
code=$?

if [ "$code" -eq 75 ]; then
    if [ "$restarts" -lt "${MAX_REQUEUES:-100}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "pre-empted and saved, but this was start $restarts and MAX_REQUEUES allows no more" >&2
    fi
fi
exit "$code"
