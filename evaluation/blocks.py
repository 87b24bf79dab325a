"""Building blocks of a page: sections of paragraphs, tables, figures and lines of code. This module
does not draw or write anything.

An evaluation describes its numbers once, in these blocks. `longreach evaluate` and the report turn
them into HTML and Markdown (pipelines/report/page.py). All text is escaped there, so blocks have
plain text.

    Section("Results", ["A paragraph.", Table("Costs", ["model", "seconds"], [["full", Best("8.0")]])])
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class Best(str):
    """The text of a table cell with the best value of its column, to be highlighted."""


class Code(str):
    """Lines of code, shown verbatim."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names the row. Text after a line break in a cell is in small
    type."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    """Headings over the columns, each with the number of columns that it spans."""
    legend: str = ""
    prose: bool = False
    """Whether cells are prose, which is left-aligned and may wrap."""


@dataclass(frozen=True)
class Figure:
    """A chart with a caption on what to see in it (made by evaluation/figures.py)."""

    file: str
    """Name of the PNG file, such as `perplexity.png`."""
    title: str
    caption: str
    chart: Any
    """An altair chart, not rendered yet."""

    @cached_property
    def png(self) -> bytes:
        """The chart as a PNG with two pixels per point, which is sharp on high-resolution screens."""
        picture = io.BytesIO()
        self.chart.save(picture, format="png", scale_factor=2)
        return _compressed(picture.getvalue())

    @property
    def vega_lite(self) -> dict[str, Any]:
        """The chart as a Vega-Lite specification, which a browser draws interactively."""
        return self.chart.to_dict()


class Piece(NamedTuple):
    """A part of a text in one colour."""

    text: str
    level: int
    """From -4, the strongest red, to 4, the strongest blue; 0: no colour."""
    says: str
    """Tooltip text."""


@dataclass(frozen=True)
class Coloured:
    """A text whose parts are coloured by a number. Markdown pages have only its caption."""

    caption: str
    pieces: Sequence[Piece]
    legend: Sequence[Piece]
    """A sample of each colour with its meaning."""


@dataclass(frozen=True)
class Details:
    """A collapsed group of blocks, which a click or the Enter key opens."""

    summary: str
    blocks: Sequence[Block]


Block = str | Table | list[Figure] | Coloured | Details
"""A paragraph or code, a table, figures side by side, a coloured text, or a collapsed group."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def figures_in(blocks: Sequence[Block]) -> list[Figure]:
    """Return all figures in the order of the page, including those in collapsed groups."""
    figures: list[Figure] = []
    for block in blocks:
        if isinstance(block, Details):
            figures += figures_in(block.blocks)
        elif isinstance(block, list):
            figures += block
    return figures


def _compressed(png: bytes) -> bytes:
    """Return the same PNG in about a third of the bytes, because vl-convert compresses fast rather
    than well."""
    start, position, pixels, others = png[:8], 8, b"", []
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        if kind == b"IDAT":
            pixels += png[position + 8 : position + 8 + length]
        else:
            others.append(png[position : position + 12 + length])
        position += 12 + length
    data = b"IDAT" + zlib.compress(zlib.decompress(pixels))
    pixel_chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"".join([start, *others[:-1], pixel_chunk, others[-1]])  # the last chunk marks the end of the file
