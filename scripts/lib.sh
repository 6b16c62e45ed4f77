# shellcheck shell=bash
# Common set-up of the scripts in this folder: source it, then call `set_up yes|no [EXTRAS] [no-compiler]`.
#
# Afterwards REPO is the root of the repository and PY the Python to run.
#   set_up no    make .venv in the repository (once) and install the project with its demo and test extras
#   set_up yes   --here: use the Python of the current environment and install nothing
#   EXTRAS       install these extras in place of demo,test
#   no-compiler  do not ask for a C++ compiler
# Environment variables: PYTHON, the Python to start from (python3); CXX, the C++ compiler (g++).
# `use_versions VENV CONSTRAINTS TORCH_VERSION`, before all others, asks for an environment of its own.

set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV=.venv CONSTRAINTS=constraints.txt TORCH_VERSION=2.13.0 # a folder in the repository, and the versions in it
export HF_HUB_OFFLINE=1

fail() { # MESSAGE [EXIT CODE]
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit "${2:-2}"
}

use_versions() { # VENV CONSTRAINTS TORCH_VERSION
    VENV="$1" CONSTRAINTS="$2" TORCH_VERSION="$3"
}

check_python() {
    local python="${PYTHON:-python3}" version
    command -v "$python" >/dev/null ||
        fail "Python 3.11 or newer is needed: expected $python on PATH, found none; install it, or set PYTHON to one"
    version="$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')" ||
        fail "Python 3.11 or newer is needed: $python does not run; set PYTHON to one that does"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed: $python is $version; install a newer one, or set PYTHON to one"
    PY="$(command -v "$python")"
}

check_compiler() {
    local words
    read -ra words <<<"${CXX:-g++}" # CXX may carry arguments or a launcher, as in "ccache g++"
    command -v "${words[0]}" >/dev/null ||
        fail "a C++ compiler is needed: expected ${words[0]} on PATH, found none; install it, on Debian: apt-get install g++"
}

use_current_environment() {
    local found
    found="$("$PY" - <<'PYTHON'
import re
from importlib import metadata

try:
    version = metadata.version("torch")
except metadata.PackageNotFoundError:
    print("found none")
else:
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    print("ok" if (2, 11) <= release <= (2, 15) else f"found {version}")
PYTHON
    )" || fail "--here: $PY does not run; set PYTHON to one that does"
    [ "$found" = ok ] ||
        fail "--here needs torch 2.11 to 2.15 in the environment of $PY, $found; install it there, or run without --here"
    # Prefer this checkout to no installation, and to an installation from elsewhere.
    if ! (cd / && REPO="$REPO" "$PY" - <<'PYTHON'
import importlib.util
import os
import sys
from pathlib import Path

spec = importlib.util.find_spec("accel_hidiff")
sys.exit(not (spec and spec.origin and Path(spec.origin).resolve().is_relative_to(Path(os.environ["REPO"]).resolve())))
PYTHON
    ); then
        export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    fi
}

# What an installation depends on: the two files, the Python, and where the checkout lies (the install is editable).
installation_hash() {
    "$PY" - "$REPO" "$CONSTRAINTS" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

repo = Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version}\0{repo}\0".encode())
for name in ("pyproject.toml", sys.argv[2]):
    digest.update((repo / name).read_bytes() + b"\0")
print(digest.hexdigest())
PYTHON
}

use_own_environment() { # EXTRAS
    local venv="$REPO/$VENV" extras="$1" stamp="$REPO/$VENV/installed.sha256" expected
    if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "making $venv"
        "$PY" -m venv --clear "$venv" ||
            fail "$PY cannot make a virtual environment; install its venv module, on Debian: apt-get install python3-venv" 1
    fi
    PY="$venv/bin/python"
    expected="$(installation_hash)"
    # The stamp has a line for each set of extras that was installed from this state of the two files.
    if grep -qxF "$expected $extras" "$stamp" 2>/dev/null; then return; fi
    echo "installing torch $TORCH_VERSION, then this project and its dependencies (once; several minutes)"
    # torch comes first and alone, so that a build for this machine which pip has been pointed at is preferred.
    "$PY" -m pip install -q "torch==$TORCH_VERSION" || fail "torch $TORCH_VERSION could not be installed (see above)" 1
    (cd "$REPO" && "$PY" -m pip install -q -c "$CONSTRAINTS" -e ".[$extras]") ||
        fail "the project could not be installed (see above)" 1
    if ! grep -q "^$expected " "$stamp" 2>/dev/null; then : >"$stamp"; fi
    printf '%s\n' "$expected $extras" >>"$stamp"
}

set_up() { # yes: --here; EXTRAS; no-compiler
    check_python
    if [ "${3:-}" != no-compiler ]; then check_compiler; fi
    if [ "$1" = yes ]; then use_current_environment; else use_own_environment "${2:-demo,test}"; fi
}
