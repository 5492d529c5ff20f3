#!/usr/bin/env bash
# pip names a missing dependency where the project's Python requirement is what does not fit, up to 25.0.1.
#
# Guess before the run: every pip refuses a project by its Requires-Python before it looks at a dependency.
# Seen on 2026-11-29 (CPython 3.11.7) for a folder whose requires-python excludes this Python and whose dependency has no
# such release:
#   pip 25.0.1: ERROR: No matching distribution found for einops==99
#   pip 25.1:   ERROR: Package 'probe' requires a different Python: 3.11.7 not in '>=3.99'
# So with the pip that comes with Python 3.10 a reader of the last line believes that a package is gone from the index.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python="${PYTHON:-python3}"

mkdir "$folder/project"
cat >"$folder/project/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools==80.9.0"]
build-backend = "setuptools.build_meta"
[project]
name = "probe"
version = "1"
requires-python = ">=3.99"
dependencies = ["einops==99"]
[tool.setuptools]
py-modules = []
TOML

last_line() {
    "$python" -m venv "$folder/$1"
    "$folder/$1/bin/python" -m pip install --quiet "pip==$1" 2>/dev/null
    { "$folder/$1/bin/python" -m pip install "$folder/project" 2>&1 || true; } | grep ^ERROR | tail -1
}

old="$(last_line 25.0.1)" new="$(last_line 25.1)"
printf 'pip 25.0.1: %s\npip 25.1:   %s\n' "$old" "$new"
[[ "$old" == *"No matching distribution found for einops==99"* && "$new" == *"requires a different Python"* ]]
