#!/usr/bin/env bash
# All tests, on all cores: bash tests/run.sh. Some: bash tests/run.sh [pytest arguments]. Sets up the environment when
# needed.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WITH_TESTS=1
# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
cd "$repo"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
if [[ $# -eq 0 ]]; then
    # One thread a process: as many tests as cores run side by side, each file's in one process.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    set -- -n "$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')" --dist loadfile
fi
exec "$PYTHON" -m pytest "$@"
