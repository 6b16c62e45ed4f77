#!/usr/bin/env bash
# Test backend "onediff" for real, in an environment of its own: torch 2.4, diffusers 0.30, onediff and nexfort.
#
#   scripts/test-onediff.sh [--core] [--here] [PYTEST ARGUMENTS...]
#
#   --core  only the tests of the package on torch 2.4, without those of the backend
#   --here  use the current environment instead of .venv-onediff, and install nothing
#
# Needs Python 3.11 or 3.12 (PYTHON names one), a C++ compiler, and 6 GB of disk; fetches 2.9 GB once.
# First the backend: what doctor says, parity, traps, persistence, and backends side by side. Then the package's own tests on
# these versions. Other arguments go to pytest: to the backend's run, or with --core to the package's.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_versions .venv-onediff constraints-onediff.txt 2.4.0

here=no backend=yes rest=()
for argument in "$@"; do
    case "$argument" in
    --core) backend=no ;;
    --here) here=yes ;;
    *) rest+=("$argument") ;;
    esac
done

check_python
"$PY" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
    fail "nexfort has no wheel for $("$PY" --version); set PYTHON to a Python 3.11 or 3.12"
check_compiler
if [ "$here" = yes ]; then
    "$PY" -c 'import importlib.metadata as m; m.version("nexfort"), m.version("onediff"), m.version("pytest")' 2>/dev/null ||
        fail "--here needs onediff, nexfort and pytest in the environment of $PY; install them there, or run without --here"
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
else
    use_own_environment onediff,onediff-test
fi
cd "$REPO"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONWARNINGS="ignore::FutureWarning"

if [ "$backend" = yes ]; then
    "$PY" -m accel_hidiff.cli doctor
    "$PY" -m pytest -q tests/onediff ${rest[@]+"${rest[@]}"}
    rest=()
    "$PY" -m accel_hidiff.cli bench --size 128x128 --steps 7 --threads 1 --repeats 5 --backends eager,aot,onediff
fi
exec "$PY" -m pytest -q tests/accel_hidiff tests/compiled/test_backends.py ${rest[@]+"${rest[@]}"}
