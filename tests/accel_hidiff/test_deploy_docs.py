"""docs/deploy.md and docs/deploy.toml say what the deploy file's dataclasses say."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import accel_hidiff as ah
from accel_hidiff.deploy import AspectRatios, CacheTable, ModelTable, ServiceTable, load_deployment

DOCS = Path(ah.__file__).parents[1] / "docs"
TABLES = {
    "`[cache]`": CacheTable,
    "`[[models]]`": ModelTable,
    "`aspect_ratios`": AspectRatios,
    "`[service]`": ServiceTable,
}


def documented(heading: str) -> dict[str, tuple[str, str]]:
    """field -> (default, meaning) of the table under a heading."""
    text = (DOCS / "deploy.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name.strip("`"): (default, meaning) for name, default, meaning in rows}


def shown(entry: dataclasses.Field[Any]) -> str:
    if entry.default is dataclasses.MISSING:
        return "required"
    if entry.default is None:
        return "none"
    value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    return f"`{json.dumps(value)}`"


@pytest.mark.parametrize("heading", TABLES)
def test_each_field_is_documented_with_its_default(heading: str) -> None:
    fields = dataclasses.fields(TABLES[heading])
    written = documented(heading)
    assert list(written) == [entry.name for entry in fields]
    assert {name: default for name, (default, _) in written.items()} == {entry.name: shown(entry) for entry in fields}
    assert all(len(meaning) > 10 for _, meaning in written.values())


def test_the_docstrings_name_each_field() -> None:
    for table in TABLES.values():
        assert table.__doc__ is not None
        lines = re.findall(r"^ {8}([\w, ]+):", table.__doc__, re.MULTILINE)
        names = {name for line in lines for name in line.split(", ")}
        assert names == {entry.name for entry in dataclasses.fields(table)}, table


def test_the_example_is_a_deploy_file() -> None:
    deployment = load_deployment(DOCS / "deploy.toml")
    assert [model.name for model in deployment.models] == ["base", "turbo", "sketch"]
    assert deployment.cache.trust == (str(DOCS / "keys/signing.key.pub"),)
    assert deployment.cache.sign_with == str(DOCS / "keys/signing.key")
    assert len(deployment.model("turbo").pixel_sizes()) == 40


def test_what_the_example_leaves_out_is_a_comment_that_works() -> None:
    text = (DOCS / "deploy.toml").read_text(encoding="utf-8")
    whole = tomllib.loads(re.sub(r"^# (remote|push) ", r"\1 ", text, flags=re.MULTILINE))
    assert whole["cache"]["push"] is True and CacheTable(**whole["cache"]).remote == "s3://bucket/compile-cache"
