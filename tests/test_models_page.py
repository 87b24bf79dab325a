"""docs/models.md says of each family what the product does with a tiny model of it."""

import pytest
from families import FAMILIES, PAGE, escape, row_of


def row_on_the_page(family):
    """Return the family's cells, each number replaced by the reason that it stands for."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = {}
    for line in text.partition("## Why not")[2].splitlines():
        number, _, reason = line.partition(". ")
        reasons[f"[{number}](#why-not)"] = reason
    row = next(line for line in text.splitlines() if line.startswith(f"| {family} |"))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")][1:]
    return [reasons.get(cell, cell) for cell in cells]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_happens(family):
    says = row_of(family)  # which raises whatever is no refusal in a sentence
    assert row_on_the_page(family) == [escape(cell) for cell in says.values()], "run: python tests/families.py"


def test_the_page_has_many_families():
    assert len(FAMILIES) >= 20
