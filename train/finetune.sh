#!/usr/bin/env bash
# Fine-tune a pretrained model on one's own images, on all GPUs of one machine.
#
#   train/finetune.sh full dinat_tiny /path/to/images --epochs 50
#
# The words: a preset of configs/finetune (full, linear_probe, higher_resolution), a model, a folder with train/ and val/
# of class folders, then any options of the trainer. Weights of one's own: --no-pretrained --weights FILE.
# PROCESSES=2 takes two GPUs, or runs two processes on the CPU where there are none.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "expected a preset, a model and a folder, got $# words; try full dinat_tiny DIR" >&2
    exit 2
fi
preset=$1 model=$2 data=$3
shift 3

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    -m visattn.train.finetune "$preset" --model "$model" --data "$data" "$@"
