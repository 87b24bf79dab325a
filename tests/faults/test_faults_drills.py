"""The list of drills names tests that exist, and docs/reliability.md has a row for each fault with its tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from drills import DRILLS

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs/reliability.md").read_text()


@pytest.mark.parametrize("number", DRILLS)
def test_every_fault_has_a_row_and_its_tests_exist(number: int):
    (row,) = re.findall(rf"^\| {number} \|.*$", PAGE, flags=re.MULTILINE)
    for test in DRILLS[number]:
        file, _, name = test.partition("::")
        made = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in made, f"{file} has no {name}"
        assert f"`{name}`" in row, f"fault {number}: the page does not name {name}"
