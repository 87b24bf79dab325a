"""Generate the parts of the documentation that come from the code. mkdocs calls this file in a build.

  recipes.md     gets the reference of all sections and fields, and the list of recipes
  attention.md   gets its figures: the mask_mod of each pattern, drawn for a short row
  results.md     is RESULTS.md, with links that work on the site

So these parts always agree with the code. A link to a field that no longer exists fails the build.

    mkdocs build --strict
"""

from __future__ import annotations

import functools
import io
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longreach.pipelines.reader import RECIPES
from longreach.pipelines.recipe import Recipe
from longreach.training.attention_recipe import AttentionRecipe

if TYPE_CHECKING:
    import numpy as np
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
SCHEMA, SHIPPED = "<!-- schema -->", "<!-- shipped recipes -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add results.md and the figures, which are not in docs/. Called by mkdocs."""
    from mkdocs.structure.files import File

    text = results_page((ROOT / "RESULTS.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "results.md", content=text))
    for name, svg in figures().items():
        files.append(File.generated(config, f"masks/{name}.svg", content=svg))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page by text from the schema. Called by mkdocs."""
    for mark, fill in ((SCHEMA, reference), (SHIPPED, shipped)):
        if mark in markdown:
            markdown = markdown.replace(mark, fill())
    return markdown


def results_page(text: str) -> str:
    """Turn RESULTS.md into a wide page; links to files of the repository become text."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|images/|[a-z_]+\.md)[^)]*\)", r"\1", text)
    taken: set[str] = set()

    def named(match: re.Match[str]) -> str:
        """Give a heading an anchor without commits and dates, so that a new run does not break links."""
        title = re.split(r"[(:,]", match[2].lower().replace("²", "2"))[0]
        short = re.sub(r"[^a-z0-9]+", "-", title).strip("-")
        if short in taken:
            return match[0]
        taken.add(short)
        return f"{match[1]} {match[2]} {{ #{short} }}"

    return "---\nhide: [toc]\n---\n\n" + re.sub(r"^(##+) (.+)$", named, text, flags=re.MULTILINE)


# --- recipes.md ----------------------------------------------------------------------------------


def shipped() -> str:
    """List the recipes of longreach: the name and the first paragraph of the opening comment."""
    lines = ["| recipe | what it does |", "|---|---|"]
    paths = sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != "quickstart", path.stem))
    for path in paths:
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            comment.append(line[2:].strip())
        about = " ".join(comment).removeprefix(f"{path.stem}: ").rstrip(":")
        about = about.replace("See quickstart.yaml for an explanation of the fields.", "")
        lines.append(f"| `{path.stem}` | {escaped(about)} |")
    return "\n".join(lines)


def reference() -> str:
    """Return a heading and a table of fields for each section of a recipe, in schema order."""
    parts = []
    for section, places in sections():
        depth = min(places[0].count(".") + 3, 4)
        heading = places[0] or "The recipe itself"
        parts.append(f"{'#' * depth} {heading} {{ #{anchor(places[0])} }}")
        if section.__doc__:
            parts.append(escaped(" ".join(section.__doc__.split())))
        if places[1:]:
            others = ", ".join(f"`{place}`" for place in places[1:])
            parts.append(f"These sections have the same fields: {others}.")
        rows = ["| field | type | default | description |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            link = anchor(f"{places[0]}.{name}")
            shown = [f"`{name}`{{ #{link} }}" if link not in _section_anchors() else f"`{name}`"]
            description = " ".join((field.description or "").split())
            shown += [kind(field), default(field), escaped(description)]
            rows.append(f"| {' | '.join(shown)} |")
        parts.append('<div class="fields" markdown>\n\n' + "\n".join(rows) + "\n\n</div>")
    return "\n\n".join(parts)


@functools.cache
def sections() -> list[tuple[type[BaseModel], list[str]]]:
    """Return each model of the schema with all its places in a recipe; the recipe itself is at ""."""
    places: dict[type[BaseModel], list[str]] = {Recipe: [""]}

    def walk(section: type[BaseModel], place: str) -> None:
        for name, field in section.model_fields.items():
            for inner, suffix in models_in(field.annotation):
                here = f"{place}.{name}{suffix}".lstrip(".")
                places.setdefault(inner, []).append(here)
                walk(inner, here)

    walk(Recipe, "")
    return list(places.items())


@functools.cache
def _section_anchors() -> frozenset[str]:
    return frozenset(anchor(places[0]) for _, places in sections())


def models_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models inside a field's type, each with its part of the path: `.NAME` or `.0`."""
    if annotation is AttentionRecipe:  # one section for each pattern
        for section in AttentionRecipe.sections():
            yield section, f"{suffix} ({section.model_fields['pattern'].default})"
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
        return
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        yield from models_in(inner[1], f"{suffix}.NAME")
    elif origin is not None:
        step = ".0" if origin in (tuple, list) else ""
        for one in inner:
            yield from models_in(one, suffix + step)


def kind(field: FieldInfo) -> str:
    """Describe a field's type and limits in words, with links to sections."""
    return _with_limits(_kind(field.annotation), field.metadata)


def _with_limits(words: str, rules: Iterable[Any]) -> str:
    return ", ".join([words, *filter(None, map(_limit, rules))])


def _kind(annotation: Any) -> str:
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        rules = []
        for rule in inner[1:]:
            rules += getattr(rule, "metadata", [rule])  # a pydantic Field holds several
        return _with_limits(_kind(inner[0]), rules)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (types.UnionType, typing.Union):
        in_order = sorted(inner, key=lambda one: one is types.NoneType)  # null comes last
        return " or ".join(map(_kind, in_order))
    if origin in (tuple, list):
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return f"mapping of names to {_kind(inner[1])}"
    if annotation is AttentionRecipe:
        return " or ".join(map(_kind, AttentionRecipe.sections()))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        place = next(places[0] for section, places in sections() if section is annotation)
        return f"[{place}](#{anchor(place)})"
    return f"`{annotation}`"


def _limit(rule: Any) -> str:
    """Describe one rule of annotated-types in words; empty for a rule that sets no limit."""
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if (value := getattr(rule, name, None)) is not None:
            return f"{sign} {value:g}"
    if least := getattr(rule, "min_length", None):
        return f"at least {least}"
    if pattern := getattr(rule, "pattern", None):
        return f"`{pattern}`"
    return ""


def default(field: FieldInfo) -> str:
    """Return the field's default as a recipe would write it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
        if not value:
            return "its defaults"
    if value is None:
        return "null"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Write a value in one line of YAML."""
    if isinstance(value, dict):
        fields = [f"{key}: {_yaml(one)}" for key, one in value.items()]
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float) and value:
        return f"{value:g}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z.][\w./:+-]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def anchor(place: str) -> str:
    """Return the anchor of a place: finetune.arms.NAME -> finetune-arms-name."""
    return re.sub(r"[^a-z0-9_]+", "-", place.lower()).strip("-") or "recipe"


def escaped(text: str) -> str:
    """Escape text for a cell of a Markdown table; text in backticks stays as it is."""
    pieces = re.split(r"(`[^`]*`)", text)
    for n in range(0, len(pieces), 2):  # every second piece is in backticks
        pieces[n] = re.sub(r"([*_<>\[\]])", r"\\\1", pieces[n])
    return "".join(pieces).replace("|", "\\|")


# --- attention.md's figures ----------------------------------------------------------------------

FUTURE, HIDDEN, SEEN, SINK, LEAK = range(5)
"""Kinds of cells: a later key, a key not seen, a key seen, a sink seen, a later key seen."""
COLOURS = ("#ffffff", "#e3e5e8", "#0072B2", "#E69F00", "#D55E00")
"""Colours of Okabe and Ito, as in all figures of the project."""
TOKENS, GROUP = 24, 8
TWO_DOCUMENTS = (0, 13)
"""Positions at which the documents of a packed row begin."""


def cells(
    pattern: str,
    *,
    head: int = 0,
    kv_heads: int = 2,
    layer: int = 0,
    starts: tuple[int, ...] = (0,),
    **choices: Any,
) -> np.ndarray:
    """Return which keys (columns) the queries (rows) of one head see, as kinds of cells."""
    import numpy as np
    import torch

    from longreach.attention import PATTERNS
    from longreach.attention.pattern import Heads
    from longreach.attention.reference import dense_mask

    start_BT = torch.zeros(1, TOKENS, dtype=torch.long)
    for begin in starts:
        start_BT[0, begin:] = begin
    heads = Heads(kv_heads, kv_heads, layer)

    def mask(**chosen: Any) -> np.ndarray:
        return dense_mask(PATTERNS[pattern](**chosen), heads, start_BT)[0, head].numpy()

    seen = mask(**choices)
    result = np.where(np.tril(np.ones_like(seen)), HIDDEN, FUTURE)
    result[seen] = SEEN
    if choices.get("sink_tokens"):
        result[seen & ~mask(**choices | {"sink_tokens": 0})] = SINK
    result[np.triu(seen, 1)] = LEAK
    return result


def rolled() -> np.ndarray:
    """Return what a head sees if the row is rolled by half a group and then cut into groups, which
    is the usual mistake."""
    import numpy as np

    place_T = (np.arange(TOKENS) - GROUP // 2) % TOKENS
    q, kv = place_T[:, None], place_T[None, :]
    seen = (q // GROUP == kv // GROUP) & (kv <= q)
    result = np.where(np.tril(np.ones_like(seen)), HIDDEN, FUTURE)
    result[seen] = SEEN
    result[np.triu(seen, 1)] = LEAK
    return result


def figures() -> dict[str, bytes]:
    """Return every drawing as SVG, by file name."""
    s2 = functools.partial(cells, "shifted_sparse", group_tokens=GROUP)
    window = functools.partial(cells, "sink_window", window_tokens=6)
    staying, shifted = "a head that stays", "a head that is shifted"
    return {
        "causal": draw({"one document": cells("causal"), "two documents": cells("causal", starts=TWO_DOCUMENTS)}),
        "grouped": draw({"groups of 8": cells("grouped", group_tokens=GROUP)}),
        "shifted_sparse": draw({staying: s2(head=0), shifted: s2(head=1)}),
        "shifted_sparse_sinks": draw({staying: s2(sink_tokens=2), shifted: s2(head=1, sink_tokens=2)}),
        "shifted_sparse_documents": draw(
            {
                staying: s2(sink_tokens=2, starts=TWO_DOCUMENTS),
                shifted: s2(head=1, sink_tokens=2, starts=TWO_DOCUMENTS),
            }
        ),
        "odd_heads": draw(
            {f"layer {n}, head {h}": s2(head=h, kv_heads=3, layer=n) for n in (0, 1) for h in (0, 1, 2)},
            columns=3,
        ),
        "rolled": draw({"rolled: leaks": rolled(), "not rolled": s2(head=1)}),
        "sink_window": draw({"window of 6, no sinks": window(sink_tokens=0), "and 2 sinks": window(sink_tokens=2)}),
    }


def draw(panels: dict[str, np.ndarray], columns: int = 2) -> bytes:
    """Draw an SVG with a square for each pair of query and key. Text is drawn as paths."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = 2.9 if columns < 3 else 2.3
    figure = Figure(figsize=(size * columns, (size + 0.15) * rows + 0.4), layout="constrained")
    FigureCanvasSVG(figure)
    for place, (title, cell) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.pcolormesh(cell, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=4.5, edgecolors="#ffffff", linewidth=0.6)
        axes.set(title=title, xlabel="key", ylabel="query", xticks=[0.5, 8.5, 16.5], yticks=[0.5, 8.5, 16.5])
        axes.set_xticklabels(["0", "8", "16"])
        axes.set_yticklabels(["0", "8", "16"])
        axes.title.set_fontsize(10)
        axes.tick_params(length=0, labelsize=8)
        axes.xaxis.label.set_fontsize(8)
        axes.yaxis.label.set_fontsize(8)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.spines[:].set_color("#9aa0a6")
    words = {SEEN: "seen", SINK: "seen as a sink", HIDDEN: "not seen", LEAK: "leak: a later key is seen"}
    used = [key for key in words if any((cell == key).any() for cell in panels.values())]
    figure.legend(
        handles=[Patch(color=COLOURS[key], label=words[key]) for key in used],
        loc="outside lower center", ncols=len(used), frameon=False, fontsize=8, handlelength=1, handleheight=1,
    )  # fmt: skip
    out = io.BytesIO()
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "longreach"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    return out.getvalue()
