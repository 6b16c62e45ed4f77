#!/usr/bin/env bash
# Compile what a deploy file needs: the line for a Dockerfile or a CI job. Stopped, it goes on where it was.
#
#   scripts/precompile.sh [--here] deploy.toml [ARGUMENTS OF accel-hidiff precompile...]
#
#   --here     use the current environment instead of .venv, and install nothing
#   --check    only say what is missing (exit code 1 if something is); needs no C++ compiler
#   --dry-run  only estimate minutes and bytes; needs no C++ compiler
#   --jobs N   compiling processes
#
# Paths are relative to the current directory. Models may be hub ids: of these only the configs are fetched. In .venv the
# project is installed with what signatures and S3 need; nothing of the tests. Exit codes: 0 done, 1 something is missing
# or could not be compiled, 2 bad usage or bad input.

set -euo pipefail
offline="${HF_HUB_OFFLINE-}"
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export HF_HUB_OFFLINE="$offline" # lib.sh turns the hub off for tests and demo; a deploy file may name models there

here=no compiler=compiler file=no rest=()
for argument in "$@"; do
    case "$argument" in
    --here) here=yes ;;
    --check | --dry-run) compiler=no-compiler rest+=("$argument") ;;
    --help | -h) compiler=no-compiler file=yes rest+=("$argument") ;;
    *.toml) file=yes rest+=("$argument") ;;
    *) rest+=("$argument") ;;
    esac
done
[ "$file" = yes ] || fail "expected a deploy file (.toml), got none; docs/deploy.md has an example"

set_up "$here" sign,s3 "$compiler"
exec "$PY" -m accel_hidiff.cli precompile "${rest[@]}"
