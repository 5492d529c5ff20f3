#!/usr/bin/env bash
# Do the requirements resolve on machines unlike this one? bash tests/resolve.sh
#
# Asks the package index about each Python and platform that docs/installation.md names; downloads metadata only.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$repo"
WITH_TESTS=1
# shellcheck source=tools/setup_env.sh
source "$repo/tools/setup_env.sh"
export MACOSX_DEPLOYMENT_TARGET=14.0 # what PyTorch's wheels ask for

resolve() {
    local version="${1%/*}" platform="${1#*/}" said
    if ! said="$("$PYTHON" -m uv pip compile --quiet --no-header --python-version "$version" --python-platform "$platform" \
        requirements.txt tests/requirements.txt 2>&1)"; then
        printf 'error: the requirements do not resolve for Python %s on %s\n%s\n' "$version" "$platform" "$said" >&2
        return 1
    fi
    echo "requirements resolve for Python $version on $platform"
}
export -f resolve

# One at first: the others find its answers in uv's cache.
pairs=(3.1{1,2,3,4}/{x86_64-unknown-linux-gnu,aarch64-unknown-linux-gnu,aarch64-apple-darwin})
resolve "${pairs[0]}"
printf '%s\n' "${pairs[@]:1}" | xargs -n 1 -P 6 bash -c 'resolve "$0"'
