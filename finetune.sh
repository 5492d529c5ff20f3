#!/usr/bin/env bash
# Fine-tune from YAML: bash finetune.sh [CONFIG.yaml ...] [--set KEY=VALUE ...] [--resume] [--dry-run]
#
# Processes: NPROC=8 bash finetune.sh, or --nproc 8 (one a GPU; default 1).
# Several machines: on each, NNODES=2 NODE_RANK=0|1 MASTER_ADDR=HOST [MASTER_PORT=29500] NPROC=8 bash finetune.sh ...
# The environment is made on first use; $PYTHON or an active environment that has everything is used as it is.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

nproc="${NPROC:-1}"
arguments=()
while (($#)); do
    case "$1" in
        --nproc) nproc="${2:?--nproc needs a number}"; shift 2 ;;
        --nproc=*) nproc="${1#*=}"; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
nnodes="${NNODES:-1}"
for number in "$nproc" "$nnodes"; do
    if ! [[ "$number" =~ ^[1-9][0-9]*$ ]]; then
        echo "error: NPROC (--nproc) and NNODES must be whole numbers >= 1, got '$number'" >&2
        exit 2
    fi
done
if ((nnodes > 1)) && [[ -z "${NODE_RANK:-}" || -z "${MASTER_ADDR:-}" ]]; then
    echo "error: NNODES=$nnodes also needs NODE_RANK (0 to $((nnodes - 1))) and MASTER_ADDR (host of node 0)" >&2
    exit 2
fi

# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
keep_freed_memory

"$PYTHON" "$repo/tools/demo/clips.py" --needed-by ${arguments[@]+"${arguments[@]}"} # the demo's, at their first use

if ((nproc * nnodes == 1)); then
    exec "$PYTHON" "$repo/train_video.py" ${arguments[@]+"${arguments[@]}"}
fi
launch=(--nproc_per_node="$nproc" --nnodes="$nnodes")
if ((nnodes > 1)) || [[ -n "${MASTER_PORT:-}" ]]; then
    launch+=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}")
else
    launch+=(--standalone) # one machine: a free port
fi
# After SIGTERM or Ctrl-C the launcher gives its processes so many seconds to finish their step and save (its own: 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}"
exec "$PYTHON" "$repo/sgm/launch.py" "${launch[@]}" "$repo/train_video.py" ${arguments[@]+"${arguments[@]}"}
