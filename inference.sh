#!/usr/bin/env bash
# Text to video: bash inference.sh [CONFIG.yaml ...] [--prompt "..."] [--set KEY=VALUE ...] [--dry-run]
#
# Several GPUs: NPROC=4 bash inference.sh, or --nproc 4 (prompts are shared out).
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
if ! [[ "$nproc" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC (--nproc) must be a whole number >= 1, got '$nproc'" >&2
    exit 2
fi

# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
keep_freed_memory

if ((nproc == 1)); then
    exec "$PYTHON" "$repo/sample_video.py" ${arguments[@]+"${arguments[@]}"}
fi
exec "$PYTHON" "$repo/sgm/launch.py" --standalone --nproc_per_node="$nproc" "$repo/sample_video.py" ${arguments[@]+"${arguments[@]}"}
