# Sourced by inference.sh, finetune.sh and tests/run.sh: sets PYTHON to an interpreter that can run the project.
#
# An interpreter that already has everything is used as it is and nothing is installed: $PYTHON, then an active
# environment's python. Otherwise this repository's .venv is used; it is made, and requirements.txt installed into it,
# where that has not been done yet, was interrupted, or was done for other requirements. $PYTHON then says with which
# Python. WITH_TESTS=1: also what the tests need.

_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_repo/.venv"
_requirements=("$_repo/requirements.txt")
_imports="torch, sat, deepspeed, transformers, sentencepiece, safetensors, omegaconf, einops, imageio, imageio_ffmpeg, decord, PIL, tqdm, tensorboardX, requests, wandb"
if [[ "${WITH_TESTS:-}" == 1 ]]; then
    _requirements+=("$_repo/tests/requirements.txt")
    _imports+=", pytest, ruff, uv, hatchling, hatch_requirements_txt, diffusers, peft, accelerate"
fi
_versions="3.11 to 3.14" # as in pyproject.toml
_name_version='import platform, sys; print("Python " + platform.python_version(), f"({sys.executable})")'

_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# What an interpreter lacks, empty if nothing. find_spec in place of import: importing all takes half a minute.
_lacking() {
    "$1" - "$_imports" 2>/dev/null <<'PY' || echo "Python $_versions"
import importlib.util, sys
assert (3, 11) <= sys.version_info < (3, 15)
names = sys.argv[1].split(", ") + ["triton"] * (sys.platform == "linux")
print(", ".join(n for n in names if importlib.util.find_spec(n) is None))
PY
}

# What .venv was made for, to be compared with the file .venv/.complete.
_wanted() {
    local file
    for file in "${_requirements[@]}"; do
        echo "$(cksum <"$file") ${file#"$_repo/"}"
    done
}

# More than is asked for will do: inference.sh takes what tests/run.sh made.
_venv_is_complete() {
    [[ -x "$_venv/bin/python" && -f "$_venv/.complete" ]] && ! grep -qvxFf "$_venv/.complete" <(_wanted)
}

# An explicit $PYTHON that cannot serve is an error, also where .venv would do.
_check_named_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        echo "error: PYTHON=$PYTHON is not there" >&2
        return 2
    elif ! _fits "$PYTHON"; then
        echo "error: PYTHON=$PYTHON is Python $("$PYTHON" -c "import platform; print(platform.python_version())"); $_versions is needed" >&2
        return 2
    fi
}

_newest_python() {
    local name found=""
    for name in python3.12 python3.11 python3.13 python3.14 python3 python; do
        command -v "$name" >/dev/null || continue
        if _fits "$name" && "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$name"
            return
        fi
        found="${found:-$("$name" -c "$_name_version" 2>/dev/null || true)}"
    done
    echo "error: Python $_versions with its venv module is needed, and ${found:-none at all} is what is here." \
        "Install one (Debian, Ubuntu: apt install python3-venv), or name one: PYTHON=/path/to/python bash ${0##*/}" >&2
    return 2
}

_choose_python() {
    local candidate lacking base="" notes=()
    if [[ "${PYTHON:-}" == "$_venv"/* ]]; then
        PYTHON="" # whether .venv has everything is asked below
    elif [[ -n "${PYTHON:-}" ]]; then
        _check_named_python || exit 2
        lacking="$(_lacking "$PYTHON")"
        [[ -n "$lacking" ]] || return 0
        base="$(command -v "$PYTHON")"
        echo "note: PYTHON=$PYTHON lacks $lacking, so $_venv is used" >&2
    fi
    for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"; do
        if [[ -n "$base" || -z "$candidate" || "$candidate" == "$_venv"/* ]] || ! command -v "$candidate" >/dev/null; then
            continue
        fi
        lacking="$(_lacking "$candidate")"
        if [[ -z "$lacking" ]]; then
            PYTHON="$candidate"
            return
        fi
        notes+=("note: the active environment ($candidate) lacks $lacking, so $_venv is used")
    done
    PYTHON="$_venv/bin/python"
    if ! _venv_is_complete; then
        [[ -n "$base" ]] || base="$(_newest_python)" || exit 2
        ((${#notes[@]} == 0)) || printf '%s\n' "${notes[@]}" >&2
        _set_up "$base"
    fi
}

_set_up() {
    local base="$1" python="$PYTHON" file
    echo "setting up $_venv with $("$base" -c "$_name_version"), once; PyTorch for Linux brings CUDA, 3 GB to download" >&2
    if command -v flock >/dev/null; then # commands started together: one installs, the others wait
        exec 9>"$_repo/.venv.lock"
        if ! flock -n 9; then
            echo "another command is doing so just now; waiting for it" >&2
            flock 9
            if _venv_is_complete; then
                exec 9>&-
                return
            fi
        fi
    fi
    if [[ -x "$python" ]] && ! _fits "$python"; then
        echo "error: $_venv has $("$python" -c "$_name_version"); $_versions is needed. Remove it: rm -r $_venv" >&2
        exit 2
    fi
    # An interrupted start left an environment without pip.
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || "$base" -m venv "$_venv" || exit 2
    rm -f "$_venv/.complete" # until all is installed, it is complete for no requirements
    _forget_half_installed
    _renew_pip
    for file in "${_requirements[@]}"; do
        echo "installing ${file#"$_repo/"}: $(grep -c '^[^#]' "$file") packages and what they need" >&2
        if ! "$python" -m pip install --disable-pip-version-check -r "$file" 1>&2 2> >(grep -v '^WARNING: Location' >&2); then
            echo "error: $file is not installed; the lines above say why. The same command goes on from here;" \
                "or set PYTHON to an interpreter that has everything" >&2
            exit 2
        fi
    done
    _wanted >"$_venv/.complete.new"
    mv "$_venv/.complete.new" "$_venv/.complete"
    exec 9>&- # not to be inherited by what runs next
}

# pip writes a package's RECORD last, and takes one that was interrupted before for installed. It is to be seen as absent.
_forget_half_installed() {
    "$python" - <<'PY'
import pathlib, shutil, sysconfig
for folder in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    record = folder / "RECORD"
    if not record.is_file() or f"{folder.name}/INSTALLER" not in record.read_text(encoding="utf-8"):
        shutil.rmtree(folder)
PY
}

# pip 25.2 and later go on with a download that broke off, and show how far the installation is.
_renew_pip() {
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 "pip>=25.2,<27" 2>/dev/null ||
        echo "note: $("$python" -m pip --version | cut -d' ' -f1,2) could not be renewed and is used as it is" >&2
}

_choose_python
export PYTHON

# glibc gives a large block back to the system as soon as it is free, and the next layer's tensor faults its pages in
# again: a third of the VAE's time on a CPU. Up to 2 GiB are kept instead. For inference.sh and finetune.sh.
keep_freed_memory() {
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # 32 MiB, glibc's upper limit
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483648}"
}
