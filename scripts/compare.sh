#!/usr/bin/env bash
# Compare this project with its peers: JSON, Markdown tables and plots in one run (minutes; benchmarks/README.md).
#
#   scripts/compare.sh [--here] [--out FILE.json] [ARGUMENTS...]
#
#   --here  use the current environment, and install nothing; the authors' own package then counts as absent
#   --out   JSON file; .md and .png files are written beside it (bench-out/compare.json)
#
# Other arguments go to `python -m benchmarks.compare`: --set NAME, --only SCENARIO, --threads N, --jobs N, --python NAME=PATH.
# The authors' package needs an older diffusers than this project: it runs in .venv-hidiffusion, made here once. onediff
# takes part if scripts/test-onediff.sh has made .venv-onediff.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

here=no out="$REPO/bench-out/compare.json" rest=()
while [ $# -gt 0 ]; do
    case "$1" in
    --here) here=yes ;;
    --out)
        [ $# -ge 2 ] || fail "--out: expected a file, got nothing"
        mkdir -p "$(dirname "$2")" && out="$(cd "$(dirname "$2")" && pwd)/$(basename "$2")"
        shift
        ;;
    *) rest+=("$1") ;;
    esac
    shift
done

set_up "$here"
pythons=()
if [ "$here" = no ]; then
    if (use_versions .venv-hidiffusion constraints-hidiffusion.txt 2.13.0 && check_python && use_own_environment hidiffusion); then
        for name in hidiffusion hidiffusion-compile; do
            pythons+=(--python "$name=$REPO/.venv-hidiffusion/bin/python")
        done
    else
        echo "the authors' package could not be installed (see above): it counts as absent" >&2
    fi
    if [ -x "$REPO/.venv-onediff/bin/python" ]; then pythons+=(--python "onediff=$REPO/.venv-onediff/bin/python"); fi
fi
cd "$REPO"
exec "$PY" -m benchmarks.compare --out "$out" ${pythons[@]+"${pythons[@]}"} ${rest[@]+"${rest[@]}"}
