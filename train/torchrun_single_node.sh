#!/usr/bin/env bash
# Train on all GPUs of one machine. The same command begins the run and, after an interruption, continues it.
#
#   train/torchrun_single_node.sh d1 --recipe dinat_tiny --data /path/to/imagenet
#
# The first word names the run (output/d1), the others are options of the trainer. PROCESSES=2 takes two GPUs, or runs
# two processes on the CPU where there are none.
set -euo pipefail
name=${1:?expected the name of the run and options, got none; try d1 --recipe dinat_tiny --data DIR}
shift

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    -m visattn.train --name "$name" --resume auto "$@"
