"""Vector instructions are found out once, and what is chosen is what torch would have chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import needs

ROOT = Path(__file__).parents[2]

_PROGRAM = """
import json, sys
from torch._inductor import cpu_vec_isa
tried = []
plain = cpu_vec_isa.VecISA.check_build
def counted(isa, code):
    tried.append(type(isa).__name__)
    return plain(isa, code)
cpu_vec_isa.VecISA.check_build = counted
from accel_hidiff.compiling import instructions
given = json.loads(sys.argv[1])
if sys.argv[2] == "handed down":
    instructions.hand_down(given)
found = {} if sys.argv[2] == "torch alone" else instructions.find_out()
chosen = cpu_vec_isa.pick_vec_isa()
print(json.dumps({"found": found, "tried": tried, "chosen": str(chosen), "bits": chosen.bit_width() if chosen else 0}))
"""


def told(tmp_path: Path, how: str, given: dict[str, bool] | None = None) -> dict[str, Any]:
    """What a new process, with an empty folder of Inductor's, finds out and chooses."""
    folder = tmp_path / how.replace(" ", "-")
    folder.mkdir()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(given or {}), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


@needs.needs_aot
@pytest.mark.slow
def test_what_is_handed_down_is_not_tried_again_and_chooses_the_same(tmp_path: Path) -> None:
    alone = told(tmp_path, "torch alone")
    first = told(tmp_path, "found out")
    later = told(tmp_path, "handed down", first["found"])
    assert first["tried"] and not later["tried"] and later["found"] == first["found"]
    assert len(first["tried"]) == len(first["found"])  # none twice
    assert {answer["chosen"] for answer in (alone, first, later)} == {alone["chosen"]}
    assert {answer["bits"] for answer in (alone, first, later)} == {alone["bits"]}


def test_a_pool_asks_one_process_and_tells_the_others() -> None:
    from accel_hidiff.compiling.child import ChildDied
    from accel_hidiff.compiling.pool import _Instructions

    class Asked:
        def __init__(self, *answers: Any) -> None:
            self.sent: list[str] = []
            self._answers = list(answers)

        def send(self, kind: str, value: Any) -> None:
            self.sent.append(kind)

        def answer(self, seconds: float) -> Any:
            answer = self._answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    instructions = _Instructions()
    dying: Any = Asked(None, ChildDied("ended with SIGKILL"))
    with pytest.raises(ChildDied):
        instructions.found(dying)
    first: Any = Asked(None, {"instructions": {"avx2": True}})
    later: Any = Asked()
    assert instructions.found(first) == instructions.found(later) == {"avx2": True}
    assert first.sent == ["find out"] and later.sent == []
