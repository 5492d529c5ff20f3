#!/usr/bin/env bash
# All tests: bash tests/run.sh [pytest arguments]. Sets up the environment when needed.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WITH_TESTS=1
# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
cd "$repo"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
