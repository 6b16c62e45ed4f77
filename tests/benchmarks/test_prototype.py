"""The prototype's tables say what was measured."""

from __future__ import annotations

import json

from benchmarks.gpu.prototype import RECORDS, read, render


def test_the_committed_tables_are_those_of_the_records() -> None:
    assert RECORDS.with_suffix(".md").read_text(encoding="utf-8") == render(read())


def test_each_figure_is_that_of_its_record() -> None:
    text = render(read())
    assert "| HiDiffusion, eager | 181.7 | 104.4 | 90.9 | 183.3 | 105.3 | 90.5 | 128.6 | 70.4 | 71.9 | |" in text
    assert "| `win` | 139.8 | 68.2 | 52.7 |" in text and "| 2048x2048 | 6.06 | 4.46 | 3.23 | 2.78 |" in text


def test_the_header_names_the_machine_and_that_it_was_a_prototype() -> None:
    header = json.loads(RECORDS.with_suffix(".json").read_text(encoding="utf-8"))
    assert "prototype" in header["what"] and "H200" in header["machine"] and header["versions"]["torch"]
    (facts,) = [record for record in read() if record["stage"] == "facts"]
    assert facts["torch"] == header["versions"]["torch"] and facts["name"] in header["machine"]
