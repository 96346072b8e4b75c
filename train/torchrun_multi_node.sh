#!/usr/bin/env bash
# Train on all GPUs of several machines. Start it on each of them, in any order, with the same words:
#
#   NODES=8 HEAD=node0 train/torchrun_multi_node.sh d1 --recipe dinat_tiny --data /path/to/imagenet
#
# HEAD is the host of one of them, whose port 29500 (PORT) the others reach. `output/` must be a folder that all share.
# When a process is lost, all are started again, at most three times, and go on from the last checkpoint, which is here
# at most 500 updates old. The same command continues the run after anything else, with other NODES too.
set -euo pipefail
name=${1:?expected the name of the run and options, got none; try d1 --recipe dinat_tiny --data DIR}
shift

exec torchrun --nnodes "${NODES:?expected the number of machines, got none; try NODES=2}" \
    --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$name" \
    --rdzv-endpoint "${HEAD:?expected the host of one machine, got none; try HEAD=node0}:${PORT:-29500}" \
    -m visattn.train --name "$name" --resume auto --checkpoint-every 500 "$@"
