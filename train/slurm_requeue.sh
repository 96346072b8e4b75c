#!/usr/bin/env bash
# Train under Slurm, one task per GPU, for as many time limits as it takes.
#
#   sbatch train/slurm_requeue.sh d1 --recipe dinat_tiny --data /path/to/imagenet
#
# Two minutes before the time limit Slurm sends USR1 to this script, which hands it to the tasks: they write a checkpoint
# and end with 143, and the job goes back to the queue. --requeue does the same when it is preempted or a node fails.
# `output/` must be a folder that all nodes share. Copy this file and change the lines below.
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
name=${1:?expected the name of the run and options, got none; try d1 --recipe dinat_tiny --data DIR}
shift

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500

srun --kill-on-bad-exit=1 python -m visattn.train --name "$name" --resume auto --checkpoint-every 500 "$@" &
step=$! limit=no code=0
trap 'limit=yes; kill -USR1 "$step"' USR1
wait "$step" || code=$?
if [ "$limit" = yes ]; then # the signal ended `wait`, not the tasks
    code=0
    wait "$step" || code=$?
    if [ "$code" -eq 143 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
