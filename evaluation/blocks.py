"""What a page is made of: sections of paragraphs, tables, figures and lines of code. Nothing here
draws or writes.

An evaluation describes its numbers in these blocks once; `longreach evaluate` and the report turn
them into HTML and Markdown (pipelines/report/page.py), where every text is escaped, so plain text
goes in here.

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
    """The text of a table's cell that is the best of its column, to be set off."""


class Code(str):
    """Lines to be copied as they are."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names the row; what follows a line end in a cell is set
    small."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[tuple[str, int]] = ()
    """Headings over the columns, each with the number of columns that it spans."""
    legend: str = ""
    prose: bool = False
    """Whether cells are words, which are set from the left and may be broken into lines."""


@dataclass(frozen=True)
class Figure:
    """A chart, and a sentence on what to see in it (evaluation/figures.py makes them)."""

    file: str
    """Name of the PNG file, such as `perplexity.png`."""
    title: str
    caption: str
    chart: Any
    """An altair chart, not drawn yet."""

    @cached_property
    def png(self) -> bytes:
        """The chart as a picture of two pixels for each of its points, which stays sharp on today's
        screens."""
        picture = io.BytesIO()
        self.chart.save(picture, format="png", scale_factor=2)
        return _compressed(picture.getvalue())

    @property
    def vega_lite(self) -> dict[str, Any]:
        """The chart in the Vega-Lite language, which a browser draws interactively."""
        return self.chart.to_dict()


class Piece(NamedTuple):
    """A part of a text in one colour."""

    text: str
    level: int
    """From -4, the strongest red, to 4, the strongest blue; 0: no colour."""
    says: str
    """What a mouse that rests on it is shown."""


@dataclass(frozen=True)
class Coloured:
    """A text whose parts are coloured by a number; Markdown has its caption alone."""

    caption: str
    pieces: Sequence[Piece]
    legend: Sequence[Piece]
    """A sample of each colour, and what it means."""


@dataclass(frozen=True)
class Details:
    """Blocks that a reader opens with a click or the Enter key."""

    summary: str
    blocks: Sequence[Block]


Block = str | Table | list[Figure] | Coloured | Details
"""A paragraph or code, a table, figures side by side, a coloured text, or blocks that are folded in."""


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def figures_in(blocks: Sequence[Block]) -> list[Figure]:
    """Return all figures in the order of the page, those that are folded in as well."""
    figures: list[Figure] = []
    for block in blocks:
        if isinstance(block, Details):
            figures += figures_in(block.blocks)
        elif isinstance(block, list):
            figures += block
    return figures


def _compressed(png: bytes) -> bytes:
    """Return the same picture in about a third of the bytes: vl-convert compresses quickly instead
    of well."""
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
    return b"".join([start, *others[:-1], pixel_chunk, others[-1]])  # the last one says that the file ends
