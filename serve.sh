#!/usr/bin/env bash
# Page and server: bash serve.sh [CONFIG.yaml ...] [--lora PATH] [--port N] [--help]
#
# The environment is made on first use, and what page and server need besides is installed into it.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
WITH_SERVE=1
# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
keep_freed_memory

export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m sgm.serve "$@"
