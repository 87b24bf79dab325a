"""Make docs/atlas.md and its pictures from stored results: the figures of a lecture on long contexts, from our runs.

The words about each figure are in docs/atlas/entries.yaml. The results are in docs/atlas/*.json. They are copies of
published scores with their origin, so the page can be made on any machine. A few are read from tables of
RESULTS.md. An entry without results is marked as missing, with the command that would produce them.

    python docs/atlas.py                          use the results in docs/atlas/
    python docs/atlas.py --store .longreach       look for newer results in a store first; may be repeated
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import altair as alt
import yaml

from longreach.attention.kv_budget import KVBudget, readable
from longreach.evaluation import EVALS
from longreach.evaluation.base import Background
from longreach.evaluation.blocks import Figure
from longreach.evaluation.figures import BLUES, Style, bars, lines, stacked_png
from longreach.evaluation.scores import EvalScores, Row
from longreach.infra.artifact import Artifact, Store

DOCS = Path(__file__).parent
LLAMA_70B, SMOLLM2 = KVBudget(64, 8, 128, (None,) * 80), KVBudget(9, 3, 64, (None,) * 30)
"""Heads, KV heads, head dim and layers of Llama-2-70B and SmolLM2-135M."""
SENTENCES = {"agrees": "Agrees", "differs": "Differs", "cannot": "Not shown"}
"""The labels of the remarks on each figure, by their field in entries.yaml."""
Choices = dict[str, Any]
"""An entry or a result of entries.yaml."""
Results = dict[str, tuple[EvalScores, tuple[str, str]]]
"""Scores by the name in entries.yaml, and their origin: a command or a section, and further facts."""


# --- results -----------------------------------------------------------------------------------------


def collect(store: Store, wanted: dict[str, Choices], folder: Path) -> list[str]:
    """Copy the newest artifact of each wanted result into `folder`, if it is newer than the copy there. Return the
    names of the copied results."""
    manifests = [*store.manifests("evaluate"), *store.manifests("pretrain")]
    copied = []
    for name, want in wanted.items():
        fitting = [manifest for manifest in manifests if _is_wanted(manifest, want)]
        if "table" in want or not fitting:
            continue
        newest = max(fitting, key=lambda manifest: manifest["published_at"])
        path = folder / f"{name}.json"
        if path.exists() and json.loads(path.read_text())["from"]["published_at"] >= newest["published_at"]:
            continue
        artifact = store.fetch(newest["stage"], newest["fingerprint"])
        keys = ("label", "command", "commit", "seconds", "published_at", "fingerprint")
        origin = {key: newest[key] for key in keys} | {"cpus": newest["versions"]["cpus"]}
        content = asdict(_scores_of(artifact, want))
        content.pop("cases")
        text = json.dumps({"from": origin, "scores": _short(content)}, ensure_ascii=False)
        path.write_text(text.replace('{"kind', '\n{"kind') + "\n", encoding="utf-8")
        copied.append(name)
    return copied


def _is_wanted(manifest: Choices, want: Choices) -> bool:
    """Whether an artifact has the wanted kind, model and choices."""
    recipe = manifest["identity"]["recipe"]
    if manifest["stage"] == "pretrain":
        return manifest["label"] == want.get("pretrain")
    if (recipe["eval"], recipe["model"]) != (want.get("eval"), want.get("model")):
        return False
    return all(recipe["choices"].get(name) == value for name, value in want.get("choices", {}).items())


def _scores_of(artifact: Artifact, want: Choices) -> EvalScores:
    """Return the scores of an evaluation, or the losses of a training by step as scores, with only the rows to draw."""
    if artifact.stage == "pretrain":
        with (artifact.path / "metrics.jsonl").open(encoding="utf-8") as steps:
            rows = [{"kind": "step", "step": step["step"], "loss": step["loss"]} for step in map(json.loads, steps)]
        numbers = {key: value for key, value in artifact.summary.items() if isinstance(value, int | float)}
        return EvalScores("pretrain", "loss by step", artifact.manifest["identity"]["recipe"], rows, numbers)
    scores = EvalScores.read(artifact.path)
    rows = []
    for row in scores.rows:
        if any(_fits(row, keep) for keep in want["keep"]):
            rows.append({key: value for key, value in row.items() if key not in ("model", "eval")})
    return EvalScores(scores.eval, scores.protocol, scores.recipe, rows, scores.summary, scores.note, [], scores.model)


def _fits(row: Row, columns: Choices) -> bool:
    """Whether a row has these values. Values may be shell patterns."""
    return all(fnmatch(str(row.get(column)), str(value)) for column, value in columns.items())


def _short(value: Any) -> Any:
    """Round all numbers of JSON data to six digits, which is more than any figure shows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def read_results(wanted: dict[str, Choices], folder: Path) -> Results:
    """Return the wanted results that exist."""
    results: Results = {}
    for name, want in wanted.items():
        path = folder / f"{name}.json"
        if "table" in want:
            results[name] = results_table(want["table"])
        elif path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            scores = EvalScores(**stored["scores"])
            results[name] = scores.named(want.get("shown", scores.model)), _origin(stored["from"])
    return results


def _origin(origin: Choices) -> tuple[str, str]:
    """Return the origin of a stored result: the command, and a description of the artifact."""
    when = datetime.fromisoformat(origin["published_at"]).date()
    minutes = f"{origin['seconds'] / 60:.1f} minutes on {origin['cpus']} CPU cores"
    return f"`{origin['command']}`", f"{origin['label']} at {origin['commit'][:7]}, {minutes}, {when}"


def results_table(heading: str) -> tuple[EvalScores, tuple[str, str]]:
    """Return the first table below a heading of RESULTS.md, with a row of kind `table` for each line, and the line
    about this run in the table of runs."""
    text = (DOCS.parent / "RESULTS.md").read_text(encoding="utf-8")
    title, _, section = text.partition(f"# {heading}")[2].partition("\n")
    if not section:
        raise ValueError(f"RESULTS.md has no heading that begins with {heading!r}: correct `table` in entries.yaml")
    columns, *body = list(_cells(section))
    rows: list[Row] = []
    for name, *cells in body[1:]:
        row: Row = {"kind": "table", "name": name}
        for column, cell in zip(columns[1:], cells, strict=True):
            if number := re.match(r"\**([\d.,]+)", cell):
                row[column] = float(number[1].replace(",", ""))
        rows.append(row | {"text": cells[0]})
    about = ""
    for date, recipe, commit, _, hardware, what in _cells(text.partition("\n## Runs\n")[2]):
        if re.fullmatch(r"[0-9a-f]{7}", commit) and commit in heading and recipe in heading:
            about = f"{what.split(';')[0]} on {hardware}, {date}"
    return EvalScores("table", heading, {}, rows, {}), (f"[Results](results.md), {heading}{title.split(':')[0]}", about)


def _cells(text: str) -> Iterator[list[str]]:
    """Yield the cells of each line of the first table in a text."""
    begun = False
    for line in text.splitlines():
        if line.startswith("|"):
            begun = True
            yield [cell.strip() for cell in line.strip("|").split("|")]
        elif begun:
            return


# --- figures -----------------------------------------------------------------------------------------


def draw(entry: Choices, results: Results) -> bytes | None:
    """Return the picture of an entry. None if it has only a table."""
    figures = []
    for how in entry.get("draw", ()):
        ((kind, choices),) = how.items()
        figures += DRAWINGS[kind](choices, results)
    return stacked_png(figures) if figures else None


def _product(choices: Choices, results: Results) -> list[Figure]:
    """Return the figures that longreach itself draws of these results, if their file matches `files`."""
    models = {}
    for name in choices["of"]:
        models[results[name][0].model] = results[name][0]
    figures = EVALS[next(iter(models.values())).eval].figures(models, Style.of(models), Background(trained_length=8192))
    return [figure for figure in figures if fnmatch(figure.file, choices["files"])]


def _bars(choices: Choices, results: Results) -> list[Figure]:
    """Return bars for the named rows of one result, with a panel for each column."""
    rows = {
        str(row[choices.get("name", "name")]): row for row in results[choices["of"]][0].rows_with(kind=choices["kind"])
    }
    shown = choices["rows"]
    panels = {}
    for column, quantity in choices["columns"].items():
        panels[quantity] = {label: rows[name][column] for name, label in shown.items() if column in rows[name]}
    style = Style.of(shown.values())
    return [bars("bars.png", choices["title"], "", panels, style)]


def _lines(choices: Choices, results: Results) -> list[Figure]:
    """Return curves, each through the rows of one result that match its columns."""
    (x, x_title), (y, y_title) = choices["x"], choices["y"]
    curves = {}
    for label, fit in choices["curves"].items():
        rows = [row for row in results[fit["of"]][0].rows if _fits(row, {k: v for k, v in fit.items() if k != "of"})]
        curves[label] = sorted((row[x], row[y]) for row in rows)
    ticks = sorted({point[0] for points in curves.values() for point in points}) if choices.get("ticks") else ()
    axes = (x_title, y_title)
    style = Style.of(curves, choices.get("dashed", ()))
    return [lines("lines.png", choices["title"], "", axes, curves, style, log=not choices.get("linear"), ticks=ticks)]


def _maps(choices: Choices, results: Results) -> list[Figure]:
    """Return maps of mean attention of some layers: how much each query (row) gives to each key (column)."""
    panels = []
    for layer in choices["layers"]:
        cells = alt.Data(values=results[choices["of"]][0].rows_with(kind="map", layer=layer))
        axis = alt.Axis(values=[0, 5, 10, 15], labelAngle=0, domain=False, ticks=False)
        shade = alt.Color("mass", type="quantitative", title="share", scale=alt.Scale(domain=[0, 1], range=list(BLUES)))
        panel = (
            alt.Chart(cells)
            .mark_rect()
            .encode(x=alt.X("key", type="ordinal", axis=axis), y=alt.Y("query", type="ordinal", axis=axis), color=shade)
        )
        panels.append(panel.properties(title=f"layer {layer}", width=120, height=120))
    chart = alt.concat(*panels, columns=3).properties(title=choices["title"])
    return [Figure("maps.png", choices["title"], "", chart)]


def _kv_cache(choices: Choices, results: Results) -> list[Figure]:
    """Return the size of keys and values by context, at two bytes per value, as `longreach kv-cache` calculates it."""
    lengths = [2**n for n in range(9, 18)]
    sizes: dict[str, Callable[[int], int]] = {
        "Llama-2-70B, 64 heads counted": lambda length: LLAMA_70B.as_multi_head().bytes(1, length),
        "Llama-2-70B, its 8 KV heads": lambda length: LLAMA_70B.bytes(1, length),
        "its sink cache, 4 + 1,020": lambda length: LLAMA_70B.sink_cache_bytes(1, length),
        "SmolLM2-135M, 3 KV heads": lambda length: SMOLLM2.bytes(1, length),
    }
    curves = {name: [(length, size(length) / 2**30) for length in lengths] for name, size in sizes.items()}
    axes = ("context (tokens)", "keys and values, GiB")
    return [lines("kv.png", choices["title"], "", axes, curves, Style.of(curves), log=True, ticks=lengths)]


def kv_numbers() -> dict[str, str]:
    """Return the lecture's three sizes, with keys and values counted for each of Llama-2-70B's 64 heads."""
    every_head = LLAMA_70B.as_multi_head()
    sizes = {"token": (1, 1), "small": (1, 512), "large": (16, 4096)}
    return {name: readable(every_head.bytes(batch, length)) for name, (batch, length) in sizes.items()}


def _steps(choices: Choices, results: Results) -> list[Figure]:
    """Return seconds of a training step by context for full attention and S²-Attn, from a table with both in a cell."""
    curves: dict[str, list[tuple[float, float]]] = {"full attention": [], "S²-Attn, groups of T/4": []}
    for row in results[choices["of"]][0].rows:
        length = re.search(r"T = ([\d,]+)$", row["name"])
        if length and (seconds := re.match(r"([\d.]+) / ([\d.]+) s", row["text"])):
            for curve, value in zip(curves.values(), seconds.groups(), strict=True):
                curve.append((float(length[1].replace(",", "")), float(value)))
    ticks = [x for x, _ in curves["full attention"]]
    axes = ("context (tokens)", "seconds of CPU a step")
    return [lines("steps.png", choices["title"], "", axes, curves, Style.of(curves), log=True, ticks=ticks)]


DRAWINGS: dict[str, Callable[[Choices, Results], list[Figure]]] = {
    "product": _product, "bars": _bars, "lines": _lines, "maps": _maps, "kv-cache": _kv_cache, "steps": _steps,
}  # fmt: skip


# --- page --------------------------------------------------------------------------------------------


def page(atlas: Choices, results: Results) -> str:
    """Return docs/atlas.md."""
    drawn = sum(_has_all(entry, results) for entry in atlas["entries"])
    counts = f"Figures from stored results: {drawn}, missing: {len(atlas['entries']) - drawn}."
    parts = [
        "# Atlas",
        "<!-- made by docs/atlas.py from docs/atlas/entries.yaml -->",
        f"{atlas['about'].strip()} {counts}",
    ]
    for number, entry in enumerate(atlas["entries"], 1):
        parts += [f"## {number}. {entry['title']}", f"*{entry['asks']}* The paper: {entry['paper']}."]
        if _has_all(entry, results):
            parts += _found(entry, results)
        else:
            parts += [f"**Missing.** {entry.get('why', 'No stored result has it.')} This command would produce it:"]
            parts += [f"```console\n$ {entry['make']}\n```"]
            parts += [_table(entry, "missing")] if "beside" in entry else []
    return "\n\n".join(parts) + "\n"


def _has_all(entry: Choices, results: Results) -> bool:
    """Whether all results of an entry exist."""
    return "of" in entry and all(name in results for name in entry["of"])


def _found(entry: Choices, results: Results) -> list[str]:
    """Return the parts of the page for an entry whose results exist."""
    parts = []
    if "draw" in entry:
        parts.append(f"![{entry['shows']}](images/atlas-{entry['name']}.png)")
    numbers = {name: _numbers(scores) for name, (scores, _) in results.items()}
    numbers["kv"] = kv_numbers()
    parts.append(_table(entry, None, numbers))
    for key, word in SENTENCES.items():
        parts.append(f"- **{word}.** {entry[key].format_map(numbers)}")
    origins: dict[str, list[str]] = {}
    for name in entry["of"] or ():
        command, made = results[name][1]
        origins.setdefault(command, []).append(made)
    sources = [f"{command}: {'; '.join(made)}".rstrip(": ") for command, made in origins.items()]
    return [
        *parts[:-3],
        "\n".join(parts[-3:]),
        f"Our numbers come from {'. And from '.join(sources) or '`longreach kv-cache`'}.",
    ]


def _numbers(scores: EvalScores) -> dict[str, Any]:
    """Return the numbers that entries.yaml may refer to: those of a summary, or the rows of a table."""
    numbers: dict[str, Any] = {**scores.summary}
    for row in scores.rows_with(kind="table"):
        numbers[row["name"]] = row
    for row in scores.rows_with(kind="cell", distractors="hard"):  # by the place of the answer
        numbers[f"nll at {row['depth']:.0%}"] = row["nll"]
    ms: dict[int, dict[str, float]] = {}
    for row in scores.rows_with(kind="latency"):
        numbers[f"mib {row['way']}"] = row["cache_mib"]
        ms.setdefault(row["cache_tokens"], {})[row["way"].split(",")[0]] = row["ms"]
    if len(ms) > 1:
        ratios = [f"{size}: {ways['recompute'] / ways['4 sinks']:.1f}" for size, ways in sorted(ms.items())]
        numbers["speedup"] = ", ".join(ratios)
    return numbers


def _table(entry: Choices, ours: str | None, numbers: dict[str, Any] | None = None) -> str:
    """Return the table of an entry: our numbers (or the text `ours` instead) and the paper's."""
    rows = ["| | ours | the paper |", "|---|---|---|"]
    for what, text, paper in entry["beside"]:
        rows.append(f"| {what} | {ours or text.format_map(numbers)} | {paper} |")
    return "\n".join(rows)


def main() -> None:
    """Collect newer results from the given stores, draw the pictures and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="append", default=[], help="Take newer results from this store.")
    atlas = yaml.safe_load((DOCS / "atlas" / "entries.yaml").read_text(encoding="utf-8"))
    for root in parser.parse_args().store:
        print(f"{root}: {', '.join(collect(Store(root), atlas['results'], DOCS / 'atlas')) or 'nothing newer'}")
    results = read_results(atlas["results"], DOCS / "atlas")
    for entry in atlas["entries"]:
        if _has_all(entry, results) and (picture := draw(entry, results)):
            (DOCS / "images" / f"atlas-{entry['name']}.png").write_bytes(picture)
    (DOCS / "atlas.md").write_text(page(atlas, results), encoding="utf-8")


if __name__ == "__main__":
    main()
