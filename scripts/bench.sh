#!/usr/bin/env bash
# Run speed benchmarks; what they write goes to bench-out/NAME.json in the root of the repository.
#
#   scripts/bench.sh [--here] [--tiny] [--list] [--out FOLDER] [NAME...]
#
#   --here  use the current environment instead of .venv, and install nothing
#   --tiny  smoke runs: a tiny model, small sizes; the figures mean nothing
#   --list  only say what would run
#   NAME    benchmarks to run (benchmarks/README.md tells what each does); without: all but against and host, which take an earlier checkout, fill, which needs the extra cuda-build, and soak, which is long
#
# One that fails leaves the others; the exit code is then 1.

set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Modules of benchmarks/ with a command line of their own: all that can be run, shortest first where it is known.
known=(dispatch cache step compile memory cold_start regions_choice inversion)
for path in "$REPO"/benchmarks/*.py; do
    name="$(basename "$path" .py)"
    if grep -q '^if __name__ == "__main__":' "$path" && [[ " ${known[*]} against host fill soak " != *" $name "* && "$name" != *_worker ]]; then
        known+=("$name")
    fi
done

here=no tiny=() only_list=no out="$REPO/bench-out" names=()
while [ $# -gt 0 ]; do
    case "$1" in
    --here) here=yes ;;
    --tiny) tiny=(--tiny) ;;
    --list) only_list=yes ;;
    --out)
        [ $# -ge 2 ] || fail "--out: expected a folder, got nothing"
        out="$2"
        shift
        ;;
    -*) fail "expected --here, --tiny, --list, --out FOLDER or names of benchmarks, got $1" ;;
    *)
        [ -f "$REPO/benchmarks/$1.py" ] || fail "expected one of ${known[*]} fill soak, got $1"
        names+=("$1")
        ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || names=("${known[@]}")

# What a benchmark needs beside --out and --tiny; one thread is measured where a busy machine would disturb two.
arguments_of() { # NAME
    case "$1" in
    step | memory | compile | inversion | service) echo --threads 1 ;;
    regions_choice) if [ ${#tiny[@]} -gt 0 ]; then echo --threads 1; else echo --threads 1 --size 512x512 --size 640x384; fi ;;
    esac
}

if [ "$only_list" = no ]; then
    set_up "$here"
    mkdir -p "$out"
    out="$(cd "$out" && pwd)"
    cd "$REPO"
fi
failed=()
for name in "${names[@]}"; do
    read -ra words <<<"$(arguments_of "$name")"
    command=(-m "benchmarks.$name" ${words[@]+"${words[@]}"} ${tiny[@]+"${tiny[@]}"} --out "$out/$name.json")
    echo "python ${command[*]}"
    if [ "$only_list" = no ] && ! "$PY" "${command[@]}"; then failed+=("$name"); fi
done
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}" 1
