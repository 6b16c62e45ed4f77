"""A worker for the tests of `harness.worker`: prints what it is told, then starts something, sleeps, or fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main(config: dict[str, Any]) -> None:
    for line in config["prints"]:
        print(line, flush=True)
    if "child" in config:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(config["child"]).write_text(str(child.pid), encoding="utf-8")
    time.sleep(config.get("sleeps", 0))
    if "fails" in config:
        sys.exit(config["fails"])


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
