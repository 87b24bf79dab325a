"""Write a page of sections as one HTML file that opens offline, and as Markdown.

This is the only module that writes pages. Names of models and documents are untrusted, so Jinja
escapes every text and chart in page.html.jinja, and a content security policy forbids the page to
fetch anything and to run other scripts than ours. A report has no scripts: its figures are PNGs,
embedded in the HTML page and as files for the Markdown page. The page of one evaluation can have
interactive charts, which vega-embed draws from their data.

    page = Page("Title", "What it is about", "What was found", [Section("Results", ["A paragraph."])])
    page.write(Path("out"), "report")
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from longreach.evaluation.blocks import Best, Block, Code, Coloured, Details, Figure, Section, Table, figures_in
from longreach.infra.files import digest_of, kept_text

if TYPE_CHECKING:  # `longreach plan` imports this module but writes no page
    from jinja2 import Environment

POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy: a page fetches nothing; styles and pictures are embedded."""
DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const options = {ast: true, actions: {export: true, source: false, compiled: false, editor: false}};
charts.forEach((chart, n) => vegaEmbed("#chart" + n, chart, options));
"""
"""Draws chart n in the element `chartN`. With `ast`, Vega interprets expressions, so that no text
is executed as code."""


@dataclass(frozen=True)
class Page:
    """A page's texts and sections."""

    title: str
    about: str
    headline: str  # the main result in a few sentences; may be empty
    sections: Sequence[Section]

    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in figures_in(section.blocks)]

    def write(self, folder: Path, name: str, *, interactive: bool = False) -> None:
        """Write NAME.html, NAME.md and the PNG files of the figures into `folder`."""
        (folder / f"{name}.html").write_text(self.html(interactive=interactive), encoding="utf-8")
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        for figure in self.figures():
            (folder / figure.file).write_bytes(figure.png)

    def html(self, *, interactive: bool = False) -> str:
        """Return the page as HTML, with pictures or, if `interactive`, with charts that show
        values."""
        from markupsafe import Markup

        policy, script = POLICY, ""
        if interactive:
            script = _script()
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            policy += f"; script-src 'sha256-{digest}'"
        template = _templates().get_template("page.html.jinja")
        charts = [figure.vega_lite for figure in self.figures()] if interactive else []
        return template.render(page=self, policy=policy, charts=charts, script=Markup(script))

    def markdown(self) -> str:
        """Return the page as Markdown, with links to the figures' files."""
        parts = [f"# {_plain(self.title)}", _plain(self.about), f"**{_plain(self.headline)}**"]
        for section in self.sections:
            parts.append(f"## {_plain(section.title)}")
            parts += map(_markdown, section.blocks)
        return "\n\n".join(parts) + "\n"


@cache
def _templates() -> Environment:
    """Return the Jinja environment, which escapes everything that a template does not mark as
    safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {
        "code": lambda block: isinstance(block, Code),
        "best": lambda cell: isinstance(cell, Best),
        "table": lambda block: isinstance(block, Table),
        "coloured": lambda block: isinstance(block, Coloured),
        "details": lambda block: isinstance(block, Details),
    }
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment


@cache
def _script() -> str:
    """Return the script of interactive pages: DRAW with its libraries.

    Bundling takes 1.3 CPU seconds in every evaluation process, so the result is cached.
    """
    import vl_convert

    name = f"draw-{version('vl-convert-python')}-{digest_of(DRAW)}.js"
    return kept_text(name, lambda: vl_convert.javascript_bundle(DRAW))


def _markdown(block: Block) -> str:
    if isinstance(block, Code):
        return f"```\n{block}\n```"
    if isinstance(block, str):
        return _plain(block)
    if isinstance(block, list):
        return "\n\n".join(f"![{_plain(figure.title)}]({figure.file})\n\n{_plain(figure.caption)}" for figure in block)
    if isinstance(block, Details):
        return "\n\n".join([f"**{_plain(block.summary)}**", *map(_markdown, block.blocks)])
    if isinstance(block, Coloured):
        return f"{_plain(block.caption)} The coloured text is in the HTML page."
    return f"{_plain(block.caption)}\n\n{markdown_table(block)}\n\n{_plain(block.legend)}".strip()


def markdown_table(table: Table) -> str:
    """Return a table's columns and rows, without caption and legend."""
    groups: list[str] = []
    for text, n_columns in table.groups:
        groups += [text] * n_columns
    heads = list(table.columns)
    if groups:
        heads = [f"{group}\n{head}".strip() for group, head in zip(groups, heads, strict=True)]
    lines = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in (heads, *table.rows)]
    lines.insert(1, "|---" + "|---:" * (len(heads) - 1) + "|")
    return "\n".join(lines)


def _markdown_cell(text: str) -> str:
    """Return a cell as Markdown on one line, bold if it is the best of its column."""
    plain = _plain(text).replace("\n", "<br>")
    return f"**{plain}**" if isinstance(text, Best) else plain


def _plain(text: str) -> str:
    """Return a text with a backslash before each Markdown control character."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
