"""Text, tables and pictures, said once and written twice: one HTML page that opens offline, and Markdown.

Every text and name is escaped here and nowhere else. The page needs no script and fetches nothing: its style is inline
(report.html.tmpl), its pictures are base64 PNGs; for the Markdown they are files beside it.

    html_page("Title", "What it is about", "What was found", [Section("Results", ["A paragraph."])])
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from longreach.evaluation.blocks import Best, Block, Code, Figure, Section, Table

TEMPLATE = Path(__file__).with_name("report.html.tmpl")


def write_page(out: Path, name: str, title: str, about: str, headline: str, sections: list[Section]) -> None:
    """NAME.html, NAME.md and the figures that it refers to."""
    (out / f"{name}.html").write_text(html_page(title, about, headline, sections), encoding="utf-8")
    (out / f"{name}.md").write_text(markdown(title, about, headline, sections), encoding="utf-8")
    for section in sections:
        for block in section.blocks:
            if isinstance(block, list):
                for figure in block:
                    (out / figure.file).write_bytes(figure.png)


def html_page(title: str, about: str, headline: str, sections: Sequence[Section]) -> str:
    """The page. `about` stands under the title; `headline` is what a reader in a hurry takes away."""
    links = "".join(f'<a href="#s{n}">{html.escape(s.title)}</a>\n' for n, s in enumerate(sections))
    body = "".join(
        f'<section id="s{n}">\n<h2>{html.escape(s.title)}</h2>\n{"".join(map(_html, s.blocks))}</section>\n'
        for n, s in enumerate(sections)
    )
    texts = {"title": title, "about": about, "headline": headline}
    escaped = {name: html.escape(text) for name, text in texts.items()}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(escaped, links=links, body=body)


def _html(block: Block) -> str:
    if isinstance(block, str):
        tag = "pre" if isinstance(block, Code) else "p"
        return f"<{tag}>{html.escape(block)}</{tag}>\n"
    if isinstance(block, list):
        return f'<div class="figures">\n{"".join(map(_html_picture, block))}</div>\n'
    groups = "".join(f'<th colspan="{n}" scope="colgroup">{html.escape(text)}</th>' for text, n in block.groups)
    lines = [f'<tr class="groups">{groups}</tr>\n'] if groups else []
    lines += [f"<tr>{''.join(_html_cell(text, 'th', 'col') for text in block.columns)}</tr>\n</thead>\n<tbody>\n"]
    for first, *rest in block.rows:
        lines += [f"<tr>{_html_cell(first, 'th', 'row')}{''.join(_html_cell(text, 'td') for text in rest)}</tr>\n"]
    return (
        f'<div class="table">\n<p class="caption">{html.escape(block.caption)}</p>\n<div class="scroll" tabindex="0">\n'
        f"<table{' class=prose' if block.prose else ''}>\n<thead>\n{''.join(lines)}</tbody>\n</table>\n</div>\n"
        f'<p class="legend">{html.escape(block.legend)}</p>\n</div>\n'
    )


def _html_cell(text: str, tag: str, scope: str = "") -> str:
    large, _, small = map(html.escape, text.partition("\n"))
    large = f"<strong>{large}</strong>" if isinstance(text, Best) else large
    return f"<{tag}{scope and f' scope={scope}'}>{large}{small and f'<small>{small}</small>'}</{tag}>"


def _html_picture(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    return (
        f'<figure>\n<img alt="{html.escape(figure.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(figure.caption)}</figcaption>\n</figure>\n"
    )


def markdown(title: str, about: str, headline: str, sections: Sequence[Section]) -> str:
    """The same; pictures are referred to by file name."""
    parts = [f"# {_plain(title)}", _plain(about), f"**{_plain(headline)}**"]
    for section in sections:
        parts += [f"## {_plain(section.title)}", *map(_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return f"```\n{block}\n```" if isinstance(block, Code) else _plain(block)
    if isinstance(block, list):
        return "\n\n".join(f"![{_plain(p.title)}]({p.file})\n\n{_plain(p.caption)}" for p in block)
    return f"{_plain(block.caption)}\n\n{markdown_table(block)}\n\n{_plain(block.legend)}".strip()


def markdown_table(block: Table) -> str:
    """Its columns and rows alone."""
    over = [text for text, n in block.groups for _ in range(n)] or [""] * len(block.columns)
    columns = [f"{group}\n{name}" if group else name for group, name in zip(over, block.columns, strict=True)]
    rows = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in (columns, *block.rows)]
    rows.insert(1, "|---" + "|---:" * (len(columns) - 1) + "|")
    return "\n".join(rows)


def _markdown_cell(text: str) -> str:
    plain = _plain(text).replace("\n", "<br>")
    return f"**{plain}**" if isinstance(text, Best) else plain


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
