"""What the host pays for one UNet step beside the compiled code: packages called, operators, Python, microseconds.

    git worktree add ../before COMMIT
    python -m benchmarks.host ../before --out benchmarks/results/host.json

Method. A UNet of SDXL's depth with few channels is served by packages that compute nothing: for each region one is
compiled whose outputs have the shapes of the region's and hold zeros. All else is real: HiDiffusion's patch, the
dispatcher's table, the calls of the packages, what runs eager between them. Each turn is a new process over the code
of one checkout, then of the other; figures are the medians.

- `packages`: calls of compiled packages in one call of the UNet.
- `operators`: PyTorch's operators that run beside them, each one a launch or more on a GPU.
- `functions`: calls of Python functions.
- `cpu_us`: processor time of one call of the UNet, on one thread.

On a GPU a package also launches its kernels, which is most of what the host does there; CUDA graphs alone save that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import harness as h
from benchmarks.against import commit_of, compare_checkouts, worker


def main() -> None:
    parser = h.arguments(__doc__, repeats=5)
    parser.add_argument("before", type=Path, help="the earlier checkout")
    options = h.parsed(parser)
    report = h.Report(options.out, options.tiny)
    checkouts = {"before": options.before.resolve(), "now": h.ROOT}
    report.add(before_commit=commit_of(checkouts["before"]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:

        def run(name: str, root: Path) -> dict[str, float]:
            return worker("host_worker.py", root, Path(scratch, name), str(Path(scratch, name, "cache")))

        turns = 1 if options.tiny else options.repeats
        compare_checkouts(report, "step", turns, checkouts, run)


if __name__ == "__main__":
    main()
