"""Read a recipe: parse YAML, apply overrides, validate, and report mistakes with their places.

Every value keeps its origin (a line of the file, `--set`, or the default). All mistakes are
reported at once, before anything expensive starts, each with its place, the nearest valid field and
both numbers. The file is YAML 1.2's core schema without tags and merge keys: `2e-5` is a number;
`no`, `010` and `2026-01-01` are strings.

    from longreach.pipelines.reader import load
    load("quickstart", ["finetune.steps=2"]).recipe.finetune.steps
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from longreach.evaluation import EVALS
from longreach.infra.choices import Location, dotted, nearest
from longreach.infra.registry import CHAMPION
from longreach.pipelines.recipe import Recipe, SectionsDisagree, values
from longreach.training.attention_recipe import AttentionRecipe

RECIPES = Path(__file__).parent / "recipes"
SET = "--set"
EVALUATE = "longreach evaluate"
DEFAULT = "default"
MOST_DIGITS = 300  # Python refuses to convert numbers of thousands of digits


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe."""

    place: str  # where the value, or the nearest one around it, was set: "file:line" or "--set"
    location: Location
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.place, dotted(self.location), self.message)))


class RecipeError(ValueError):
    """All mistakes in a recipe, one line each."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems

    def render(self) -> str:
        """Return the lines to print. Errors with this method are treated as a user's mistake."""
        return str(self)


@dataclass(frozen=True)
class Loaded:
    """A valid recipe with its file, the origins of its values and the command that runs it."""

    recipe: Recipe
    path: Path
    origins: dict[str, str]
    """Dotted location of each value -> "file:line", "--set" or "default"."""
    command: str  # the command that runs the same recipe again from the same folder


def load(path_or_name: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Read a recipe; RecipeError has all its mistakes.

    Args:
        path_or_name: A file (with a YAML suffix or a slash), or the name of a bundled recipe.
        overrides: `a.b.c=value` strings. The value is YAML; list items are given by index
            (`corpus.sources.0.files=x.txt`).
    """
    reader = _Reader(_find(str(path_or_name)))
    words = ["longreach", "run", str(path_or_name)]
    for text in overrides or []:
        reader.override(text)
        words += [SET, text]
    return reader.loaded(shlex.join(words))


def standalone(
    model: str, *, evals: tuple[str, ...], suite: str, documents: str | None, overrides: list[str]
) -> Loaded:
    """Make the recipe that evaluates one model with a suite's evaluations and held-out documents.

    Args:
        evals: Names of evaluations, which keep the suite's choices if it has them. Empty: all
            evaluations of the suite.
        documents: Glob of text files to measure on instead of the suite's documents.
        overrides: As in `load`. With one evaluation, its fields need no prefix: `seed=1`.

    Raises:
        RecipeError: As `load`, or no such evaluation.
    """
    for name in evals:
        if name not in EVALS:
            hint = nearest(name, EVALS, "there are")
            raise RecipeError(Problem("--eval", (), f"no evaluation {name!r}{hint}"))
    reader = _Reader(_find(suite))
    reader.loaded("")  # report mistakes in the suite before changing it
    written = reader.data.get("evaluate") or {}
    last_part = re.split("[/:]", model.rstrip("/"))[-1].lower()
    slug = re.sub(r"[^a-z0-9._+-]+", "-", last_part).strip("-._+") or "model"
    reader.put(("base",), {**(reader.data.get("base") or {}), "source": model, "revision": None})
    reader.put(("name",), f"evaluate-{slug}")
    for left_out in ("finetune", "pretrain", "costs", "promote"):  # sections about the suite's own arms
        reader.put((left_out,), None)
    for emptied in ("variants", "release"):
        reader.put((emptied,), {})
    reader.put(("baselines",), {"model" if slug == CHAMPION else slug: {}})
    words = ["longreach", "evaluate", model, "--suite", suite]
    for name in evals:
        words += ["--eval", name]
    if documents is not None:
        if not documents:
            raise RecipeError(Problem("--documents", (), "is empty: name text files, e.g. 'texts/*.txt'"))
        reader.put(("corpus",), {"sources": [{"files": documents}], "test": ["*"]})
        words += ["--documents", documents]
    reader.put(("evaluate",), {})
    asked = evals or [name for name in EVALS if written.get(name) is not None]
    for name in asked:
        section = {**(written.get(name) or {}), "models": None}
        if documents is not None:  # they replace the documents that the suite names
            for field in EVALS[name].Choices.document_fields():
                section.pop(field, None)
        reader.put(("evaluate", name), section)
    for text in overrides:
        words += [SET, text]
        if len(evals) == 1:
            field = re.split("[=.]", text)[0]
            if field in EVALS[evals[0]].Choices.model_fields or field not in Recipe.model_fields:
                text = f"evaluate.{evals[0]}.{text}"
        reader.override(text)
    return reader.loaded(shlex.join(words))


def names() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    is_name = path.suffix not in (".yaml", ".yml") and len(path.parts) == 1
    if is_name:
        path = RECIPES / f"{path_or_name}.yaml"
    if path.is_file():
        return path
    if not is_name:
        hint = nearest(path.stem, names(), "bundled recipes")
        raise RecipeError(Problem(path_or_name, (), f"no such file{hint}"))
    hint = nearest(path_or_name, names(), "there are")
    beside = Path(f"{path_or_name}.yaml")
    if beside.is_file():
        hint = f"; did you mean the file {beside}?"
    message = f"no bundled recipe has that name{hint}"
    raise RecipeError(Problem(path_or_name, (), message))


class _Yaml12(yaml.SafeLoader):
    """Loader for YAML 1.2's core schema. PyYAML follows YAML 1.1, where `2e-5` is a string, `no` is
    false and 1:30 is 90.

    ruamel.yaml keeps line numbers too, but reads 010 and 1_000 as numbers and 2026-01-01 as a date,
    and stops at the first duplicate field.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (the attribute that PyYAML reads)


for _tag, _pattern, _first_characters in [
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", [*"-+.0123456789"]),
]:
    _whole = re.compile(f"(?:{_pattern})$")
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first_characters)


class _Reader:
    """A recipe's plain data before validation, each value's place, and the mistakes found so
    far."""

    def __init__(self, path: Path) -> None:
        """Read the file; RecipeError if it cannot be read or is not a mapping."""
        self.path = path
        label = path.name if path.parent == RECIPES else str(path)
        self.places: dict[Location, str] = {}
        self.problems: list[Problem] = []
        try:
            data = self._parse(path.read_text(encoding="utf-8"), (), label)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(Problem(label, (), f"cannot be read: {error}")) from None
        if not isinstance(data, dict):
            message = f"a recipe is a mapping of fields, got {_describe(data)}"
            raise RecipeError(Problem(label, (), message))
        self.data: dict[str, Any] = data

    def override(self, text: str) -> None:
        """Set one `a.b.c=value` in the data; RecipeError without `=` or if there is no such
        item."""
        path, equals, value = text.partition("=")
        if not equals or not path:
            message = "write it as field=value, e.g. finetune.steps=4"
            raise RecipeError(Problem(f"{SET} {text}", (), message))
        location: Location = ()
        node: Any = self.data
        parts = path.strip().split(".")
        while parts:
            key, parts = self._step(node, parts, location)
            location = (*location, key)
            if parts:
                inner = node.get(key) if isinstance(node, dict) else node[key]
                if inner is None:  # a section that the file leaves out
                    inner = node[key] = {}
                    self.places[location] = SET
                node = inner
        self._forget(location)
        node[location[-1]] = self._parse(value, location, SET)

    def put(self, location: Location, value: Any) -> None:
        """Set a value that no user wrote; the containers around the location must exist."""
        node: Any = self.data
        for key in location[:-1]:
            node = node[key]
        self._forget(location)
        self.places[location] = EVALUATE
        node[location[-1]] = value

    def loaded(self, command: str) -> Loaded:
        """Validate the data; RecipeError has all mistakes, including those found while parsing."""
        problems = [*self.problems]
        try:  # from JSON, because strict mode then still accepts a list for a tuple
            recipe = Recipe.model_validate_json(json.dumps(self.data), strict=True)
        except ValidationError as error:
            for details in error.errors():
                problems += self._explain(details)
        if problems:
            raise RecipeError(*sorted(problems, key=_line))
        origins = {}
        for location, _ in values(recipe):
            origins[dotted(location)] = self.places.get(location, DEFAULT)
        return Loaded(recipe, self.path, origins, command)

    def _forget(self, location: Location) -> None:
        for known in [*self.places]:
            if known[: len(location)] == location:
                del self.places[known]

    def _step(self, node: Any, parts: list[str], location: Location) -> tuple[str | int, list[str]]:
        """Return the next key of an override's path, and the remaining parts."""
        if isinstance(node, dict):
            for taken in range(len(parts), 0, -1):  # a key may contain dots, as arm names do
                if ".".join(parts[:taken]) in node:
                    return ".".join(parts[:taken]), parts[taken:]
            return parts[0], parts[1:]
        if not isinstance(node, list):
            message = f"{dotted(location)} is {_describe(node)}, which has no fields"
            raise RecipeError(Problem(SET, (*location, *parts), message))
        if not parts[0].isdecimal() or int(parts[0]) >= len(node):
            has = f"{dotted(location)} is empty"
            if node:
                has = f"{dotted(location)} has {len(node)} items, from 0 to {len(node) - 1}"
            raise RecipeError(Problem(SET, (*location, *parts), f"no item {parts[0]!r}: {has}"))
        return int(parts[0]), parts[1:]

    def _parse(self, text: str, location: Location, label: str) -> Any:
        """Return plain data and record its places; `label` is the file or `--set`."""
        try:
            loader = _Yaml12(text)
            node = loader.get_single_node()
            self.places[location] = _place(label, 0)
            if node is None:
                return None
            return self._plain(loader, node, location, label, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line if error.problem_mark else 0
            message = ", ".join(filter(None, (error.problem, error.context)))
            problem = Problem(_place(label, line), location, f"invalid YAML: {message}")
            raise RecipeError(problem) from None
        except yaml.YAMLError as error:
            problem = Problem(_place(label, 0), location, f"invalid YAML: {error}")
            raise RecipeError(problem) from None

    def _plain(
        self, loader: _Yaml12, node: yaml.Node, location: Location, label: str, around: tuple[yaml.Node, ...]
    ) -> Any:
        """Return the plain data of a YAML node; `around` are the nodes that contain it."""
        place = _place(label, node.start_mark.line)
        if node in around:
            raise RecipeError(Problem(place, location, "an alias that contains itself"))
        unquoted = getattr(node, "style", None) is None
        if node.tag != loader.resolve(type(node), node.value, (unquoted, not unquoted)):
            message = f"tags such as {node.tag} are not supported; to write a number as a string, quote it"
            raise RecipeError(Problem(place, location, message))
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
                message = f"a number of {len(node.value)} digits, but a number has at most {MOST_DIGITS}"
                raise RecipeError(Problem(place, location, message))
            return loader.construct_object(node)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.places[(*location, index)] = _place(label, item.start_mark.line)
                items.append(self._plain(loader, item, (*location, index), label, (*around, node)))
            return items
        fields: dict[str, Any] = {}
        for key_node, value in node.value:
            place = _place(label, key_node.start_mark.line)
            if not isinstance(key_node, yaml.ScalarNode):
                message = "a field name must be a single word, not a list or a mapping"
                raise RecipeError(Problem(place, location, message))
            inner = (*location, key_node.value)
            if key_node.value in fields:
                message = f"duplicate field, first set at {self.places[inner]}"
                self.problems.append(Problem(place, inner, message))
                continue
            self.places[inner] = place
            fields[key_node.value] = self._plain(loader, value, inner, label, (*around, node))
        return fields

    def _explain(self, details: ErrorDetails) -> list[Problem]:
        """Translate a pydantic error: into one problem, or several if sections contradict each
        other."""
        location = details["loc"]
        error = details.get("ctx", {}).get("error")
        if isinstance(error, SectionsDisagree):
            return [Problem(self._place_of(at), at, message) for at, message in error.problems]
        if isinstance(error, ValueError):  # from a section's validator: its message starts with a field
            field = str(error).split(" ", 1)[0]
            return [Problem(self._place_of((*location, field)), location, str(error))]
        return [Problem(self._place_of(location), location, _message(details, self.data))]

    def _place_of(self, location: Location) -> str:
        path = f"{dotted(location)}."
        around: Location = ()
        for known in self.places:
            if path.startswith(f"{dotted(known)}.") and len(known) > len(around):
                around = known
        return self.places[around]


def _place(label: str, line: int) -> str:
    """Return the place of a line (counted from 0) of a file, or of an override."""
    return SET if label == SET else f"{label}:{line + 1}"


def _line(problem: Problem) -> int:
    """Return the line of a problem as a sort key; 0 if it has none."""
    number = problem.place.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def _message(details: ErrorDetails, data: Any) -> str:
    location, kind = details["loc"], details["type"]
    if kind == "extra_forbidden":
        return "no such field" + _nearest_field(location, data)
    if kind == "missing":
        field = _type_at(location[:-1], data).model_fields[str(location[-1])]
        return f"missing, and it has no default ({(field.description or '').rstrip('.')})"
    message = re.sub("^(Input|String) should", "should", details["msg"]).replace("Tuple", "list")
    message = re.sub(r"a valid (array|tuple)", "a list", message)
    message = message.replace("an object", "a mapping of fields").replace(" after validation", "")
    if ", not " in message:  # pydantic's message already names the value
        return message
    return f"{message}, got {_describe(details['input'])}"


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"text {value!r}"
    return json.dumps(value)


def _nearest_field(location: Location, data: Any) -> str:
    """Suggest the closest field of the section, else other sections with this field, else list
    all."""
    name, section = str(location[-1]), _type_at(location[:-1], data)
    if issubclass(section, AttentionRecipe):  # each pattern has its own fields
        return nearest(name, section.model_fields, f"pattern {section.model_fields['pattern'].default!r} has")
    elsewhere = _paths_by_name(Recipe).get(name, [])
    if difflib.get_close_matches(name, section.model_fields) or not elsewhere:
        return nearest(name, section.model_fields, "this section has")
    below = [path for path in elsewhere if path.startswith(dotted(location[:-1]))]
    return f"; did you mean {' or '.join(below or elsewhere)}?"


def _paths_by_name(section: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Return the dotted paths of all fields below a section, by the last part."""
    paths: dict[str, list[str]] = {}
    for name, field in section.model_fields.items():
        paths.setdefault(name, []).append(prefix + name)
        inner, step = _without_none(field.annotation), ""
        if typing.get_origin(inner) is tuple:
            step = "0."
        elif typing.get_origin(inner) is dict:
            step = "NAME."
        if step:
            inner = _inside(inner, step)
        models = [inner]
        if inner is AttentionRecipe:
            models = AttentionRecipe.sections()
        for model in models:
            if isinstance(model, type) and issubclass(model, BaseModel):
                for key, deeper in _paths_by_name(model, f"{prefix}{name}.{step}").items():
                    known = paths.setdefault(key, [])
                    for path in deeper:
                        if path not in known:
                            known.append(path)
    return paths


def _type_at(location: Location, data: Any) -> Any:
    """Return the type at a location reported by pydantic, of which every part therefore exists."""
    section: Any = Recipe
    for key in location:
        section, data = _inside(section, key), data[key]
        if section is AttentionRecipe:  # the recipe's pattern decides which fields it has
            section = AttentionRecipe.section(data.get("pattern", "causal"))
    return section


def _inside(container: Any, key: str | int) -> Any:
    """Return the type of one field, item or value of a container type."""
    arguments = typing.get_args(container)
    if typing.get_origin(container) is tuple:
        return _without_none(arguments[0])
    if typing.get_origin(container) is dict:
        return _without_none(arguments[1])
    return _without_none(container.model_fields[key].annotation)


def _without_none(annotation: Any) -> Any:
    """Return X for `X | None`, and any other annotation unchanged."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation
