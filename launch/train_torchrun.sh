#!/usr/bin/env bash
# Train on this host's GPUs with PyTorch's launcher, the environment being active (source .venv/bin/activate):
#
#   launch/train_torchrun.sh experiment=tiny run.name=mine
#   RANKS=2 launch/train_torchrun.sh experiment=tiny          # so many ranks; needed where there is no GPU
#
# Several hosts: on each, in place of --standalone, the same
#   --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 --rdzv-id any-name
#
# SIGTERM reaches every rank at once: the run saves and stops, and the same command goes on with it.
set -euo pipefail

# exec: this shell is gone, so a signal to it is one to torchrun. "$@": arguments arrive as typed, spaces included.
exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" -m gptscale.train "$@"
