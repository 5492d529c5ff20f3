# Sourced by inference.sh, finetune.sh and tests/run.sh: sets PYTHON to an interpreter that can run the project.
#
# An interpreter that already imports everything is used as it is and nothing is installed: $PYTHON, then an active
# environment's python, then .venv of this repository. Otherwise .venv is made and requirements.txt installed into it.
# Further requirement files may be named in EXTRA_REQUIREMENTS, with their imports in EXTRA_IMPORTS.

_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_imports="torch, triton, sat, deepspeed, transformers, sentencepiece, safetensors, omegaconf, einops, imageio, imageio_ffmpeg, decord, PIL, tqdm${EXTRA_IMPORTS:+, $EXTRA_IMPORTS}"

# find_spec in place of import: importing all of them takes half a minute.
_complete() {
    "$1" - "$_imports" >/dev/null 2>&1 <<'PY'
import importlib.util, sys
assert sys.version_info >= (3, 10)
missing = [n for n in sys.argv[1].split(", ") if importlib.util.find_spec(n) is None]
sys.exit(1 if missing else 0)
PY
}

_newest_python() {
    local name
    for name in python3.12 python3.11 python3.10 python3.13 python3 python; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

_choose_python() {
    local candidate
    for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$_repo/.venv/bin/python"; do
        if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null && _complete "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    local base
    if ! base="$(_newest_python)"; then
        echo "error: Python 3.10 or newer (with its venv module) is needed and was not found; install it or set PYTHON" >&2
        exit 2
    fi
    echo "setting up $_repo/.venv with $("$base" --version) (once; downloads about 1 GB on a CPU machine, more for CUDA)" >&2
    PYTHON="$_repo/.venv/bin/python"
    if command -v flock >/dev/null; then # commands started together: one installs, the others wait
        exec 9>"$_repo/.venv.lock"
        if ! flock -n 9; then
            echo "another command is doing so just now; waiting for it" >&2
            flock 9
            if _complete "$PYTHON"; then
                exec 9>&-
                return
            fi
        fi
    fi
    # An interrupted start left an environment without pip.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 || "$base" -m venv "$_repo/.venv"
    local file
    for file in "$_repo/requirements.txt" ${EXTRA_REQUIREMENTS:-}; do
        if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file" 2> >(grep -v '^WARNING: Location' >&2); then
            echo "error: installing $file failed; see the lines above, or set PYTHON to an interpreter that has everything" >&2
            exit 2
        fi
    done
    exec 9>&- # not to be inherited by what runs next
}

_choose_python
export PYTHON

# glibc gives a large block back to the system as soon as it is free, and the next layer's tensor faults its pages in
# again: a third of the VAE's time on a CPU. Up to 2 GiB are kept instead. For inference.sh and finetune.sh.
keep_freed_memory() {
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # 32 MiB, glibc's upper limit
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483648}"
}
