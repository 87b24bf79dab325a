"""What the documentation does not write by hand: mkdocs calls this file while it builds the site.

  recipes.md     gets the reference of all sections and fields, from the pydantic models, and the list of recipes
  attention.md   gets its figures: the mask_mod of each pattern, drawn for a short row
  results.md     is RESULTS.md, with links that work here

So none of them can fall behind the code: what is gone from it is gone from the page, and a link to it fails the build.

    mkdocs build --strict
"""

from __future__ import annotations

import functools
import io
import json
import re
import types
import typing
from collections.abc import Iterator
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
    """mkdocs' event: the pages and figures that no file holds."""
    from mkdocs.structure.files import File

    text = results_page((ROOT / "RESULTS.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "results.md", content=text))
    for name, svg in figures().items():
        files.append(File.generated(config, f"masks/{name}.svg", content=svg))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event: the places that the schema fills."""
    for mark, fill in ((SCHEMA, reference), (SHIPPED, shipped)):
        if mark in markdown:
            markdown = markdown.replace(mark, fill())
    return markdown


def results_page(text: str) -> str:
    """RESULTS.md as a page, wide for its tables: pictures and pages are here, files of the repository are not."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|images/|[a-z_]+\.md)[^)]*\)", r"\1", text)
    taken: set[str] = set()

    def named(match: re.Match[str]) -> str:
        """A heading without its commits and dates as its anchor: a new run must not break links."""
        short = re.sub(r"[^a-z0-9]+", "-", re.split(r"[(:,]", match[2].lower().replace("²", "2"))[0]).strip("-")
        if short in taken:
            return match[0]
        taken.add(short)
        return f"{match[1]} {match[2]} {{ #{short} }}"

    return "---\nhide: [toc]\n---\n\n" + re.sub(r"^(##+) (.+)$", named, text, flags=re.MULTILINE)


# --- recipes.md ---------------------------------------------------------------------------------------------------


def shipped() -> str:
    """The recipes that come along: each one's name and the first paragraph of its opening comment."""
    lines = ["| recipe | what it does |", "|---|---|"]
    for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: (path.stem != "quickstart", path.stem)):
        comment = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            comment.append(line[2:].strip())
        about = " ".join(comment).removeprefix(f"{path.stem}: ").rstrip(":")
        about = about.replace("What is not said here is as in quickstart.yaml.", "")
        lines.append(f"| `{path.stem}` | {escaped(about)} |")
    return "\n".join(lines)


def reference() -> str:
    """A heading for each section of a recipe, in the order of the schema, and a table of its fields."""
    parts = []
    for section, places in sections():
        depth = min(places[0].count(".") + 3, 4)
        heading = places[0] or "The recipe itself"
        parts.append(f"{'#' * depth} {heading} {{ #{anchor(places[0])} }}")
        if section.__doc__:
            parts.append(escaped(" ".join(section.__doc__.split())))
        if places[1:]:
            parts.append(f"The same fields stand under {', '.join(f'`{place}`' for place in places[1:])}.")
        rows = ["| field | type | default | what it is |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            link = anchor(f"{places[0]}.{name}")
            shown = [f"`{name}`{{ #{link} }}" if link not in _section_anchors() else f"`{name}`"]
            shown += [kind(field), default(field), escaped(" ".join((field.description or "").split()))]
            rows.append(f"| {' | '.join(shown)} |")
        parts.append('<div class="fields" markdown>\n\n' + "\n".join(rows) + "\n\n</div>")
    return "\n\n".join(parts)


@functools.cache
def sections() -> list[tuple[type[BaseModel], list[str]]]:
    """Each model of the schema once, with all the places where it stands, "" for the recipe."""
    found: dict[type[BaseModel], list[str]] = {Recipe: [""]}

    def walk(section: type[BaseModel], place: str) -> None:
        for name, field in section.model_fields.items():
            for inner, suffix in models_in(field.annotation):
                here = f"{place}.{name}{suffix}".lstrip(".")
                found.setdefault(inner, []).append(here)
                walk(inner, here)

    walk(Recipe, "")
    return list(found.items())


@functools.cache
def _section_anchors() -> frozenset[str]:
    return frozenset(anchor(places[0]) for _, places in sections())


def models_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The models inside a field's type, and what stands between the field and them: `.NAME` or `.0`."""
    if annotation is AttentionRecipe:  # one section a pattern
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
    """A field's type and limits in words, with links to sections."""
    found = _kind(field.annotation)
    limits = [text for rule in field.metadata if (text := _limit(rule, field.annotation))]
    return ", ".join([found, *limits])


def _kind(annotation: Any) -> str:
    words = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([_kind(inner[0]), *(t for rule in inner[1:] for t in _limits(rule))])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (types.UnionType, typing.Union):
        known = [_kind(one) for one in inner if one is not types.NoneType]
        return " or ".join([*known, *["null"] * (len(known) < len(inner))])
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


def _limits(rule: Any) -> Iterator[str]:
    yield from (text for one in getattr(rule, "metadata", [rule]) if (text := _limit(one, None)))


def _limit(rule: Any, annotation: Any) -> str:
    """One rule of annotated-types in words."""
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        if (value := getattr(rule, name, None)) is not None:
            return f"{sign} {value:g}"
    if least := getattr(rule, "min_length", None):
        return f"at least {least}"
    if pattern := getattr(rule, "pattern", None):
        return f"`{pattern}`"
    return ""


def default(field: FieldInfo) -> str:
    """What stands where nothing is said."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_yaml(changed)}`" if changed else "its defaults"
    return "null" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value in one line, as a recipe would have it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float) and value:
        return f"{value:g}"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z.][\w./:+-]*", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def anchor(place: str) -> str:
    """finetune.arms.NAME.attention -> finetune-arms-name-attention; the recipe itself is `recipe`."""
    return re.sub(r"[^a-z0-9_]+", "-", place.lower()).strip("-") or "recipe"


def escaped(text: str) -> str:
    """Plain words as Markdown for a table's cell; what stands in backticks stays."""
    pieces = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*_<>\[\]])", r"\\\1", piece) if n % 2 == 0 else piece for n, piece in enumerate(pieces)]
    return "".join(plain).replace("|", "\\|")


# --- attention.md's figures -----------------------------------------------------------------------------------------

FUTURE, HIDDEN, SEEN, SINK, LEAK = range(5)
"""What a cell of a drawing says: a later key, one that is not seen, one that is, one seen as a sink, a leak."""
COLOURS = ("#ffffff", "#e3e5e8", "#0072B2", "#E69F00", "#D55E00")
"""Okabe and Ito's, as in all figures of the project."""
TOKENS, GROUP = 24, 8
TWO_DOCUMENTS = (0, 13)
"""Where the documents of a packed row begin."""


def cells(
    pattern: str,
    *,
    head: int = 0,
    kv_heads: int = 2,
    layer: int = 0,
    starts: tuple[int, ...] = (0,),
    **choices: Any,
) -> np.ndarray:
    """What one head's queries (rows) see of the keys (columns) under a pattern of PATTERNS, in the numbers above."""
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
    """What a head sees if the row is rolled by half a group and then cut into causal groups: the usual mistake."""
    import numpy as np

    place_T = (np.arange(TOKENS) - GROUP // 2) % TOKENS
    q, kv = place_T[:, None], place_T[None, :]
    seen = (q // GROUP == kv // GROUP) & (kv <= q)
    result = np.where(np.tril(np.ones_like(seen)), HIDDEN, FUTURE)
    result[seen] = SEEN
    result[np.triu(seen, 1)] = LEAK
    return result


def figures() -> dict[str, bytes]:
    """Every drawing, by file name: panels side by side, each with its title."""
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
    """An SVG with a square for each pair of query and key; its text is drawn, so it needs no font."""
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
