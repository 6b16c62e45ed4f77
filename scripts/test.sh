#!/usr/bin/env bash
# Check and test the project: ruff, mypy, then pytest.
#
#   scripts/test.sh [--all] [--no-lint] [--here] [PYTEST ARGUMENTS...]
#
#   --all      run the slow tests too (real compilation: minutes)
#   --no-lint  skip ruff and mypy
#   --here     use the current environment instead of .venv, and install nothing
#
# Everything else goes to pytest; paths are relative to the root of the repository. Without such arguments, where there
# are two cores, two processes share the tests, a file at a time.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

here=no lint=yes select=(-m "not slow") rest=()
for argument in "$@"; do
    case "$argument" in
    --all) select=() ;;
    --no-lint) lint=no ;;
    --here) here=yes ;;
    *) rest+=("$argument") ;;
    esac
done

set_up "$here"
cd "$REPO"
if [ "$lint" = yes ]; then
    if [ "$here" = yes ] && ! "$PY" -c 'import ruff, mypy' 2>/dev/null; then
        echo "no ruff or no mypy in this environment: lint is skipped"
    else
        "$PY" -m ruff check .
        "$PY" -m mypy
    fi
fi
"$PY" -c 'import pytest' 2>/dev/null || fail "--here needs pytest in the environment of $PY; install it there, or run without --here"
if [ ${#rest[@]} -eq 0 ] && "$PY" -c 'import os, sys, xdist; sys.exit((os.cpu_count() or 1) < 2)' 2>/dev/null; then
    rest=(-n 2 --dist loadgroup --no-loadscope-reorder) # the long files lie in the middle
fi
exec "$PY" -m pytest -q ${select[@]+"${select[@]}"} ${rest[@]+"${rest[@]}"}
