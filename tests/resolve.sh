#!/usr/bin/env bash
# Do the requirements resolve on machines unlike this one? bash tests/resolve.sh [PYTHON/PLATFORM ...]
#
# Asks the package index about each Python and platform that docs/installation.md names. Of the packages it downloads the
# metadata only, but what the tests need has to be here: uv is part of it.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WITH_TESTS=1
# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
cd "$repo"
export MACOSX_DEPLOYMENT_TARGET=14.0 # what PyTorch's wheels ask for

if (($# == 1)); then
    if ! said="$("$PYTHON" -m uv pip compile --quiet --no-header --python-version "${1%/*}" --python-platform "${1#*/}" \
        requirements.txt sgm/serve/requirements.txt tests/requirements.txt 2>&1)"; then
        printf 'error: the requirements do not resolve for Python %s on %s\n%s\n' "${1%/*}" "${1#*/}" "$said" >&2
        exit 1
    fi
    echo "requirements resolve for Python ${1%/*} on ${1#*/}"
    exit
fi
if (($# == 0)); then
    set -- 3.1{1,2,3,4}/{x86_64-unknown-linux-gnu,aarch64-unknown-linux-gnu,aarch64-apple-darwin}
fi
bash "$repo/tests/resolve.sh" "$1" # one at first: the others find its answers in uv's cache
printf '%s\n' "${@:2}" | xargs -n 1 -P 6 bash "$repo/tests/resolve.sh"
