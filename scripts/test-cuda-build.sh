#!/usr/bin/env bash
# Compile for a GPU on this machine, which needs none, and check what comes of it.
#
#   scripts/test-cuda-build.sh [PYTEST ARGUMENTS...]
#
# Makes .venv-cuda once, with the CUDA build of torch that the stand-ins are tested with: some 6 GB of disk. The tests
# take about seven minutes of one core.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

use_versions .venv-cuda constraints-cuda.txt 2.11.0
set_up no cuda-build,test
cd "$REPO"
exec "$PY" -m pytest -q -m cuda_build tests/crosscompile "$@"
