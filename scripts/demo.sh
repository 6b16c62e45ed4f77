#!/usr/bin/env bash
# Run the demo; what it writes goes to demo-out in the root of the repository.
#
#   scripts/demo.sh [--here] [ARGUMENTS OF accel-hidiff demo...]
#
#   --here     use the current environment instead of .venv, and install nothing

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

here=no rest=()
for argument in "$@"; do
    if [ "$argument" = --here ]; then here=yes; else rest+=("$argument"); fi
done

set_up "$here"
cd "$REPO"
exec "$PY" -m accel_hidiff.cli demo --out demo-out ${rest[@]+"${rest[@]}"}
