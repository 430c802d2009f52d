#!/usr/bin/env bash
# Train on this host's GPUs with DeepSpeed's launcher, the environment being active (source .venv/bin/activate):
#
#   launch/train_deepspeed.sh experiment=tiny run.name=mine
#   RANKS=2 launch/train_deepspeed.sh experiment=tiny         # so many ranks
#   HOSTFILE=hosts launch/train_deepspeed.sh experiment=tiny  # several hosts, over ssh: a line "name slots=8" for each
#
# To stop a run and have it save first, press Ctrl-C in the terminal or send SIGUSR1 to a rank. SIGTERM to `deepspeed`
# ends its first process only; the ranks notice and end within two seconds, without a save.
# With a HOSTFILE arguments pass through a remote shell that DeepSpeed does not quote for: no ; $ ( ) or > in them.
set -euo pipefail

options=(--no_local_rank --module)
if [[ -n "${RANKS:-}" ]]; then options=(--num_gpus "$RANKS" "${options[@]}"); fi
if [[ -n "${HOSTFILE:-}" ]]; then options=(--hostfile "$HOSTFILE" "${options[@]}"); fi

# exec: this shell is gone, so a signal to it is one to deepspeed. "$@": arguments arrive as typed, spaces included.
exec deepspeed "${options[@]}" gptscale.train "$@"
