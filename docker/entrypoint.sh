#!/bin/sh
# What `docker run IMAGE …` runs: the arguments of gptscale, or one of the commands below, or a program given by its path.
#
#   docker run IMAGE train experiment=tiny
#   docker run IMAGE torchrun --nproc-per-node 2 -m gptscale.train experiment=tiny
#   docker run IMAGE /usr/bin/env
set -eu

# exec: the container's first process is the program itself, so `docker stop` asks it, and no shell, to save and end.
case "${1:-}" in
    gptscale | deepspeed | torchrun | python | python3 | sh | bash | */*) exec "$@" ;;
    *) exec gptscale "$@" ;;
esac
