# shellcheck shell=bash
# Sourced by inference.sh, finetune.sh, serve.sh and tests/run.sh: sets PYTHON to an interpreter that can run the project.
#
# $PYTHON, or else the active environment's python, is used as it is where it lacks nothing, and nothing is installed.
# Otherwise this repository's .venv is used; it is made, and requirements.txt installed into it, where that has not been
# done yet, was interrupted, or was done for other requirements. $PYTHON then says with which Python it is made.
# WITH_TESTS=1: also what the tests need; WITH_SERVE=1: what page and server need. Works with the bash 3.2 and the tools of macOS.

_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_repo/.venv"
_requirements=("$_repo/requirements.txt")
if [[ "${WITH_TESTS:-}" == 1 ]]; then
    _requirements+=("$_repo/tests/requirements.txt")
fi
if [[ "${WITH_SERVE:-}" == 1 ]]; then
    _requirements+=("$_repo/sgm/serve/requirements.txt")
fi
_versions="3.11 to 3.14" # as in pyproject.toml
_name_python='import platform, sys; print("Python " + platform.python_version(), f"({sys.executable})")'

_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null
}

# What of the requirements an interpreter lacks, in any version; empty if nothing. -P: what lies in the current folder does
# not count. The markers in our files are Python.
_lacking() {
    "$1" -P -c '
import importlib.metadata, platform, re, sys
assert (3, 11) <= sys.version_info < (3, 15)
here = {"sys_platform": sys.platform, "platform_machine": platform.machine()}
lacking = []
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        requirement, _, marker = line.split("#")[0].partition(";")
        name = re.match(r"[\w.-]*", requirement.strip())[0]
        if name and eval(marker.strip() or "True", here) and not any(importlib.metadata.distributions(name=name)):
            lacking.append(name)
print(", ".join(lacking))' "${_requirements[@]}" 2>/dev/null || echo "Python $_versions"
}

# What .venv is to be made for: the lines of the file .venv/.complete.
_wanted() {
    local file
    for file in "${_requirements[@]}"; do
        echo "$(cksum <"$file") ${file#"$_repo/"}"
    done
}

# More than is asked for will do: inference.sh takes what tests/run.sh made.
_venv_is_complete() {
    [[ -f "$_venv/.complete" ]] || return 1
    local line newline=$'\n' made
    made="$newline$(cat "$_venv/.complete")$newline"
    while IFS= read -r line; do
        [[ "$made" == *"$newline$line$newline"* ]] || return 1
    done < <(_wanted)
    [[ -z "$(_lacking "$_venv/bin/python")" ]]
}

# An explicit $PYTHON that cannot serve is an error, also where .venv would do.
_check_named_python() {
    if ! command -v "$PYTHON" >/dev/null; then
        echo "error: PYTHON=$PYTHON is not there" >&2
        return 2
    elif ! _fits "$PYTHON"; then
        echo "error: PYTHON=$PYTHON is $("$PYTHON" -c 'import platform; print("Python", platform.python_version())')," \
            "and $_versions is needed" >&2
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
        found="${found:-$("$name" -c "$_name_python" 2>/dev/null || true)}"
    done
    echo "error: Python $_versions with its venv module is needed, and ${found:-none at all} is what is here. Install one" \
        "(Debian, Ubuntu: apt install python3-venv; macOS: brew install python@3.12), or name one:" \
        "PYTHON=/path/to/python bash $(printf %q "$0")" >&2
    return 2
}

_choose_python() {
    local candidate lacking base="" note=""
    if [[ "${PYTHON:-}" == */* && "$PYTHON" != /* ]]; then
        PYTHON="$PWD/$PYTHON"
    fi
    if [[ "${PYTHON:-}" == "$_venv"/* ]]; then # asked for as it is, if it can be; else it is set up
        ! [[ -x "$PYTHON" && -z "$(_lacking "$PYTHON")" ]] || return 0
    elif [[ -n "${PYTHON:-}" ]]; then
        _check_named_python || exit 2
        lacking="$(_lacking "$PYTHON")"
        [[ -n "$lacking" ]] || return 0
        base="$(command -v "$PYTHON")"
        echo "note: PYTHON=$PYTHON lacks $lacking, so $_venv is used" >&2
    elif [[ "${VIRTUAL_ENV:-}" != "$_venv" ]]; then
        for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"; do
            [[ -x "$candidate" ]] || continue
            lacking="$(_lacking "$candidate")"
            if [[ -z "$lacking" ]]; then
                PYTHON="$candidate"
                return
            fi
            note="${note:-note: the active environment ($candidate) lacks $lacking, so $_venv is used}"
        done
    fi
    PYTHON="$_venv/bin/python"
    if _venv_is_complete; then
        return
    elif ! [[ -w "$_repo" && (-w "$_venv" || ! -e "$_venv") ]]; then
        if [[ -z "$(_lacking "$PYTHON")" ]]; then
            echo "note: $_venv may be older than requirements.txt, and cannot be written; it is used as it is" >&2
            return
        fi
        echo "error: $_venv lacks packages, and $_repo cannot be written: set PYTHON to an interpreter that has them" >&2
        exit 2
    fi
    [[ -n "$base" ]] || base="$(_newest_python)" || exit 2
    [[ -z "$note" ]] || echo "$note" >&2
    _set_up "$base"
}

_set_up() {
    local base="$1" python="$_venv/bin/python" file
    _check_platform "$base" || exit 2
    exec 9>"$_repo/.venv.lock" # commands started together: one installs, the others wait
    if ! _lock "$base" 'fcntl.LOCK_EX | fcntl.LOCK_NB'; then
        echo "another command is setting up $_venv just now; waiting for it" >&2
        _lock "$base" fcntl.LOCK_EX
        if _venv_is_complete; then
            exec 9>&-
            return
        fi
    fi
    _make_venv "$base" || exit 2
    rm -f "$_venv/.complete" # until all is installed, it is complete for no requirements
    for file in "${_requirements[@]}"; do
        echo "installing ${file#"$_repo/"}: $(grep -c '^[^#]' "$file") packages and what they need" >&2
        if ! _install "$file"; then
            echo "error: $file is not installed; the lines above say why. The same command goes on from here." >&2
            [[ -n "$(_lacking "$python")" ]] || echo "To go without: PYTHON=$(printf %q "$python") bash $(printf %q "$0")" >&2
            exit 2
        fi
    done
    _wanted >"$_venv/.complete.new"
    mv "$_venv/.complete.new" "$_venv/.complete"
    exec 9>&- # not to be inherited by what runs next
}

# All that pip says is out before it returns: bash 3.2 cannot wait for a process substitution, but for a pipe.
_install() (
    set -o pipefail
    exec 3>&2 # what pip prints keeps its terminal, and with it the bar
    _pip install -r "$1" 2>&1 1>&3 | { grep -v '^WARNING: Location' >&2 || true; }
)

_check_platform() {
    "$1" - <<'PY'
import platform, sys
here = f"{sys.platform} {platform.machine()}"
if here not in ("linux x86_64", "linux aarch64", "darwin arm64"):
    sys.exit(f"error: PyTorch has no release for {here}; Linux on x86_64 or aarch64 or macOS on arm64 is needed")
PY
}

# A lock of file descriptor 9, which this shell keeps; macOS has no `flock`.
_lock() {
    "$1" -c "import fcntl, sys
try: fcntl.flock(9, $2)
except BlockingIOError: sys.exit(1)"
}

# .venv with a pip that works, whatever a start that was interrupted left behind.
_make_venv() {
    local base="$1"
    if [[ -L "$python" && ! -e "$python" ]]; then
        echo "the Python that $_venv was made with is gone; another one takes its place" >&2
        rm -f "$_venv"/bin/python*
    fi
    if ! [[ -x "$python" ]]; then
        echo "setting up $_venv with $("$base" -c "$_name_python"), once; PyTorch for Linux brings CUDA, 3 GB to download" >&2
        "$base" -m venv --without-pip "$_venv" || return 2
    elif ! _fits "$python"; then
        echo "error: $_venv has $("$python" -c "$_name_python"), and $_versions is needed. Remove it:" \
            "rm -r $(printf %q "$_venv")" >&2
        return 2
    else
        echo "setting up $_venv with $("$python" -c "$_name_python")" >&2
    fi
    _forget_half_installed || return 2
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return 2
    # pip 25.2 and later go on with a download that broke off, and show how far the installation is.
    if [[ "$(_pip --version)" < "pip 25.2" ]]; then
        echo "renewing pip" >&2
        _pip install --quiet --retries 1 --timeout 15 "pip>=25.2,<27" 2>/dev/null ||
            echo "note: $(_pip --version | cut -d' ' -f1,2) could not be renewed and is used as it is" >&2
    fi
}

_pip() {
    PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip "$@"
}

# pip takes a package that it had half unpacked when it was killed for installed. It is to be seen as absent: of a whole
# one, INSTALLER and then the list of files, with INSTALLER in it, are written last. Of pip itself the files go, too.
_forget_half_installed() {
    "$python" - <<'PY'
import pathlib, shutil, sys, sysconfig

def is_whole(folder):
    record, installer = folder / "RECORD", folder / "INSTALLER"
    if not (record.is_file() and installer.is_file()):
        return False
    return installer.read_text().strip() != "pip" or f"{folder.name}/INSTALLER" in record.read_text(encoding="utf-8")

site = pathlib.Path(sysconfig.get_path("purelib"))
half = {folder for folder in site.glob("*.dist-info") if not is_whole(folder)}
half |= set(site.glob("~*"))  # what an upgrade had put aside
for folder in sorted(half):
    print("was half installed:", folder.name.removesuffix(".dist-info"), file=sys.stderr)
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
if not any(site.glob("pip-*.dist-info")):
    shutil.rmtree(site / "pip", ignore_errors=True)
PY
}

_choose_python
export PYTHON

# glibc gives a large block back to the system as soon as it is free, and the next layer's tensor faults its pages in
# again: a third of the VAE's time on a CPU. Up to 2 GiB are kept instead. For inference.sh and finetune.sh.
keep_freed_memory() {
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" # 32 MiB, glibc's upper limit
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2147483648}"
}
