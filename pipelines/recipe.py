"""The recipe: one YAML file read, overridden, validated and explained.

Every value keeps where it came from (a line of the file, `--set`, a default), so that every mistake is reported with
its place, the nearest valid field and both numbers, all at once and before anything expensive starts. The file is read
as YAML 1.2 (`2e-5` is a number, `no` and `on` are words), without merge keys or dates.

    from longreach.pipelines.recipe import load
    load("quickstart", ["finetune.steps=2"]).recipe.finetune.steps
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from longreach.evaluation import EVALS
from longreach.evaluation.recipe import EvalRecipe
from longreach.infra.choices import Choices, PathOrUrl
from longreach.infra.resources import Resources
from longreach.training.recipe import BaseRecipe, CorpusRecipe, FinetuneRecipe, PretrainRecipe, RopeRecipe

RECIPES = Path(__file__).parent / "recipes"
SAFE_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")
SET = "--set"
DEFAULT = "default"

Location = tuple[str | int, ...]
ROOT: Location = ()


class _Evaluations(Choices):
    """What is measured: each evaluation that has a section runs, on every model that it names."""

    def chosen(self) -> dict[str, EvalRecipe]:
        """The evaluations that have a section, by name."""
        return {name: section for name in type(self).model_fields if (section := getattr(self, name)) is not None}


if TYPE_CHECKING:
    EvaluateRecipe = _Evaluations
else:  # an evaluation needs its line in EVALS and none here: its section is a field of its name
    EvaluateRecipe = create_model(
        "EvaluateRecipe",
        __base__=_Evaluations,
        __doc__=_Evaluations.__doc__,
        **{
            name: (one.recipe | None, Field(default=None, description=one.recipe.__doc__))
            for name, one in EVALS.items()
        },
    )


class StoreRecipe(Choices):
    """Where artifacts live. Not identity: the same recipe on another root gives the same fingerprints."""

    root: PathOrUrl = ".longreach"
    """Artifacts: a folder or any fsspec URL (s3://bucket/prefix)."""
    workdir: str = ".longreach"
    """This machine's own folder: scratch, spooled metrics, the embedded MLflow store."""


class PriceRecipe(Choices):
    """What a training rank costs; with it the report also shows money and energy, computed from wall clock."""

    price_per_hour: float | None = Field(default=None, gt=0)
    """Of one rank, in `currency`."""
    currency: str = "USD"
    """The price's currency; only shown."""
    watts: float | None = Field(default=None, gt=0)
    """Mean power draw of one rank, for an estimate of energy; it is not measured."""


class TrackingRecipe(Choices):
    """Where MLflow is. Not identity, and never in the way: metrics are spooled first and replayed after an outage."""

    uri: str | None = None
    """Tracking server; without it, an SQLite store in store.workdir (`longreach ui` shows it)."""
    enabled: bool = True
    """False: metrics are spooled but not sent; `longreach sync` sends them later."""


class PromoteRecipe(Choices):
    """The gate: which arm may become champion of a registered model, and the rules that it has to keep.

    Challenger, champion and base are asked on the same held-out tokens, and compared token by token.
    """

    model: str
    """The arm that is the challenger."""
    name: str = Field(pattern=r"^[^/:@']+$")
    """The registered model: its alias `champion` moves, the former one becomes `previous`."""
    start_from: Literal["base", "champion"] = "base"
    """What fine-tuning starts from: `base`, or the champion as soon as there is one."""
    target_length: int | None = Field(default=None, ge=2)
    """Where it is compared with the champion; without it, the greatest of evaluate.perplexity.lengths."""
    perplexity_ratio: float | None = Field(default=1.01, gt=0)
    """Perplexity up to target_length, over the champion's: at most."""
    base_ratio: float | None = Field(default=1.02, gt=0)
    """Perplexity over the base's, at every measured length that the base was trained to: at most."""
    passkey: float | None = Field(default=None, ge=0, le=1)
    """Share of pass keys found, at every measured length up to target_length: at least."""
    effective_length: int | None = Field(default=None, ge=1)
    """Greatest length up to which `passkey` (without it, 0.9) of the keys are found: at least."""
    certainty: Literal["interval", "estimate"] = "interval"
    """interval: the whole 95% interval of a ratio has to keep its rule; estimate: the ratio alone."""


class Recipe(Choices):
    """A whole pipeline: documents, rows, arms, evaluations, and where they run."""

    name: str = Field(pattern=rf"^{SAFE_NAME.pattern}$")
    """Names the pipeline run: lower-case letters, digits and . _ + -."""
    experiment: str = "longreach"
    """MLflow experiment."""
    seed: int = Field(default=0, ge=0)
    """Seeds initialisation, row order and LoRA; evaluations have their own."""
    base: BaseRecipe = BaseRecipe()
    """The model that is extended."""
    corpus: CorpusRecipe
    """Documents and their split."""
    baselines: dict[str, RopeRecipe] = Field(default_factory=dict)
    """Untrained variants of the base, by name: evaluated beside the arms."""
    finetune: FinetuneRecipe | None = None
    """Context extension; left out, nothing is fine-tuned."""
    pretrain: PretrainRecipe | None = None
    """Sink pretraining; left out, nothing is pretrained."""
    evaluate: EvaluateRecipe = EvaluateRecipe()
    """What is measured."""
    promote: PromoteRecipe | None = None
    """The gate to production; left out, nothing is promoted."""
    report: PriceRecipe = PriceRecipe()
    """Prices."""
    resources: Resources = Resources()
    """Where it runs; not identity."""
    store: StoreRecipe = StoreRecipe()
    """Where artifacts live; not identity."""
    tracking: TrackingRecipe = TrackingRecipe()
    """Where MLflow is; not identity."""

    def models(self) -> list[tuple[Location, str]]:
        """(section, name) of every model that can be evaluated."""
        return [
            *((("baselines",), name) for name in self.baselines),
            *((("finetune", "arms"), name) for name in (self.finetune.every_arm() if self.finetune else ())),
            *((("pretrain", "arms"), name) for name in (self.pretrain.arms if self.pretrain else ())),
        ]

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if problems := list(self._disagreements()):
            raise SectionsDisagree(problems)
        return self

    def _disagreements(self) -> Iterator[tuple[Location, str]]:
        first: dict[str, Location] = {}
        for section, name in self.models():
            if not SAFE_NAME.fullmatch(name):
                yield (*section, name), "names a folder: use lower-case letters, digits and . _ + - only"
            if name in first:
                yield (*section, name), f"the name is taken by {dotted(first[name])}.{name}; each model needs its own"
            first.setdefault(name, section)
        parts = self.resources.sequence_parallel
        for place, trains in (("finetune", self.finetune), ("pretrain", self.pretrain)):
            if trains and trains.pack.seq_len % parts:
                yield (
                    (place, "pack", "seq_len"),
                    f"{trains.pack.seq_len} is not divided by resources.sequence_parallel {parts}: change one of them",
                )
        if parts > 1 and self.finetune and self.finetune.rope.type == "dynamic":
            yield (
                ("finetune", "rope", "type"),
                f"'dynamic' depends on how much of a row a rank sees: not with resources.sequence_parallel {parts}",
            )
        for name, chosen in self.evaluate.chosen().items():
            if not first:
                yield ("evaluate", name), "nothing to evaluate: the recipe has no baselines and no arms"
            for model in chosen.models or ():
                if model not in first:
                    yield ("evaluate", name, "models"), f"no model {model!r}{_nearest(model, first, 'the recipe has')}"
        if self.promote:
            yield from self._gate(self.promote, first)

    def _gate(self, gate: PromoteRecipe, models: dict[str, Location]) -> Iterator[tuple[Location, str]]:
        """What the gate asks for has to be measured."""
        arms = [name for name, section in models.items() if section != ("baselines",)]
        if gate.model not in arms:
            yield ("promote", "model"), f"no arm {gate.model!r}{_nearest(gate.model, arms, 'the recipe has')}"
            return
        if "champion" in models:
            yield (*models["champion"], "champion"), "the name is the gate's: choose another one"
        if gate.start_from == "champion" and not (self.finetune and gate.model in self.finetune.every_arm()):
            yield (
                ("promote", "start_from"),
                f"'champion' is where fine-tuning starts from, and {gate.model} is no arm of it",
            )
        if gate.model not in (self.finetune.every_arm() if self.finetune else ()) and gate.base_ratio is not None:
            yield ("promote", "base_ratio"), f"{gate.model} was not made from the base: set promote.base_ratio to null"
        if self.base.source.startswith(f"models:/{gate.name}@"):
            yield (
                ("base", "source"),
                "each promotion would change it: name the first base, and promote.start_from champion",
            )
        asked = self.evaluate.chosen()
        needs = {
            "perplexity_ratio": ("perplexity", gate.model),
            "base_ratio": ("perplexity", self.plain_baseline() or ""),
            "passkey": ("passkey", gate.model),
            "effective_length": ("passkey", gate.model),
        }
        for rule, (evaluation, model) in needs.items():
            if getattr(gate, rule) is None:
                continue
            if not model:
                yield ("promote", rule), "needs the untrained base to compare with: add `base: {}` to baselines"
            elif evaluation not in asked or model not in (asked[evaluation].models or models):
                yield (
                    ("promote", rule),
                    f"needs evaluate.{evaluation} of {model}: add it, or set promote.{rule} to null",
                )
            if rule == "base_ratio" and gate.model not in (getattr(asked.get(evaluation), "models", None) or models):
                yield ("promote", rule), f"needs evaluate.perplexity of {gate.model} too"
        if all(getattr(gate, rule) is None for rule in needs):
            yield ("promote",), f"has no rule, and would let everything pass: set one of {', '.join(needs)}"
        lengths = getattr(asked.get("perplexity"), "lengths", ())
        target = gate.target_length or max(lengths, default=0)
        keys = getattr(asked.get("passkey"), "lengths", ())
        if gate.passkey is not None and keys and target and min(keys) > target:
            yield ("promote", "passkey"), f"no length of evaluate.passkey {list(keys)} is within target_length {target}"
        if gate.effective_length and keys and gate.effective_length > max(keys):
            yield (
                ("promote", "effective_length"),
                f"{gate.effective_length} is more than the greatest of evaluate.passkey.lengths {list(keys)}",
            )
        if gate.target_length and lengths and gate.target_length not in lengths:
            yield ("promote", "target_length"), f"{gate.target_length} is none of evaluate.perplexity.lengths {lengths}"

    def plain_baseline(self) -> str | None:
        """The baseline that is the base as it is."""
        return next((name for name, rope in self.baselines.items() if rope.type == "none"), None)


class SectionsDisagree(ValueError):
    """Sections that are valid alone do not fit together; carries (location, message) pairs."""

    def __init__(self, problems: list[tuple[Location, str]]) -> None:
        super().__init__("; ".join(f"{dotted(location)}: {message}" for location, message in problems))
        self.problems = problems


@dataclass(frozen=True)
class Problem:
    """One mistake: the place of the nearest node (file:line, or --set), the field, what is wrong and what to do."""

    place: str
    location: Location
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, dotted(self.location), self.message) if part)


class RecipeError(ValueError):
    """All mistakes of a recipe, one line each."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems

    def render(self) -> str:
        """The lines to print."""
        return str(self)


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, its file, and where each value came from: "file:line", "--set" or "default"."""

    recipe: Recipe
    path: Path
    origins: dict[str, str]
    command: str
    """What brings the same recipe to be run again, from the same folder."""


def load(path_or_name: str | Path, overrides: list[str] | None = None) -> Loaded:
    """Read a recipe.

    Args:
        path_or_name: a file (it has a suffix or a slash), or the name of a recipe that comes with longreach.
        overrides: `a.b.c=value` texts; the value is YAML, lists are entered by index (`corpus.sources.0.files=x.txt`).

    Raises:
        RecipeError: unreadable file, broken YAML, unknown or missing field, wrong type, sections that disagree.
    """
    path = _find(str(path_or_name))
    reader = _Reader(path.name if path.parent == RECIPES else str(path))
    data = reader.file(path)
    for override in overrides or []:
        reader.override(data, override)
    try:  # by way of JSON: strict about types, while a list is still welcome where a tuple is meant
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = [problem for details in error.errors() for problem in reader.explain(details)]
        raise RecipeError(*reader.in_order(found)) from None
    if reader.problems:
        raise RecipeError(*reader.in_order([]))
    origins = {dotted(location): reader.places.get(location, DEFAULT) for location, _ in values(recipe)}
    words = ["longreach", "run", str(path_or_name), *(word for text in overrides or [] for word in (SET, text))]
    return Loaded(recipe, path, origins, shlex.join(words))


def standalone(
    model: str, *, evals: tuple[str, ...], suite: str, documents: str | None, overrides: list[str]
) -> Loaded:
    """The recipe that evaluates one model: a suite's evaluations (all, or those in `evals`) and documents.

    An override is a choice of the evaluation, if there is one that has such a field: `lengths=[1024]`, `seed=1`.
    Raises RecipeError, as `load`.
    """
    if unknown := [name for name in evals if name not in EVALS]:
        raise RecipeError(
            Problem("--eval", (), f"no evaluation {unknown[0]!r}{_nearest(unknown[0], EVALS, 'there are')}")
        )
    has = load(suite).recipe.evaluate.chosen()
    slug = re.sub(r"[^a-z0-9._+-]+", "-", re.split("[/:]", model.rstrip("/"))[-1].lower()).strip("-._+") or "model"
    ours = [
        f"base.source={json.dumps(model)}",
        "base.revision=",
        f"name=evaluate-{slug}",
        "finetune=",
        "pretrain=",
        "promote=",
        f"baselines={{{slug}: {{}}}}",
    ]
    if documents:
        ours += [f"corpus={{sources: [{{files: {json.dumps(documents)}}}], test: ['*']}}"]
    for name in EVALS if evals else ():
        if name not in evals and name in has:
            ours.append(f"evaluate.{name}=")
        if name in evals and name not in has:
            ours.append(f"evaluate.{name}={{}}")
    ours += [f"evaluate.{name}.models=" for name in has if not evals or name in evals]
    if documents:  # a suite's document names are not the user's
        chosen = {*evals} or {*has}
        ours += [f"evaluate.{name}.documents=['*']" for name in ("perplexity", "needle") if name in chosen]
        ours += ["evaluate.streaming.document='*'"] * ("streaming" in chosen)
    for text in overrides:
        field = text.split("=")[0].split(".")[0]
        own = len(evals) == 1 and (field in EVALS[evals[0]].recipe.model_fields or field not in Recipe.model_fields)
        ours.append(f"evaluate.{evals[0]}.{text}" if own else text)
    words = ["longreach", "evaluate", model, "--suite", suite]
    words += [word for name in evals for word in ("--eval", name)] + (["--documents", documents] if documents else [])
    words += [word for text in overrides for word in (SET, text)]
    return replace(load(suite, ours), command=shlex.join(words))


def names() -> list[str]:
    """Recipes that come with longreach."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def values(recipe: Recipe) -> Iterator[tuple[Location, Any]]:
    """Every value of a recipe with its location, in the order of the fields; a list of plain values is one value."""

    def walk(value: Any, location: Location) -> Iterator[tuple[Location, Any]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*location, key))
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            for index, item in enumerate(value):
                yield from walk(item, (*location, index))
        else:
            yield location, value

    yield from walk(recipe.model_dump(mode="json"), ())


def dotted(location: Location) -> str:
    """("corpus", "sources", 0) -> "corpus.sources.0"."""
    return ".".join(str(part) for part in location)


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    is_name = path.suffix not in (".yaml", ".yml") and len(path.parts) == 1
    if is_name:
        path = RECIPES / f"{path_or_name}.yaml"
    if path.is_file():
        return path
    if not is_name:
        hint = _nearest(path.stem, names(), "recipes that come along")
        raise RecipeError(Problem(path_or_name, (), f"no such file{hint}"))
    here = Path(f"{path_or_name}.yaml")
    hint = f"; did you mean the file {here}?" if here.is_file() else _nearest(path_or_name, names(), "there are")
    raise RecipeError(Problem(path_or_name, (), f"no recipe of that name comes with longreach{hint}"))


class _Yaml12(yaml.SafeLoader):
    """YAML 1.2's core schema: PyYAML's own 1.1 reads `2e-5` as text, `no` as false and 1:30 as 90."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own name and place)


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan", [*"-+.0123456789"]),
]:
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


class _Reader:
    """Plain data from YAML nodes, the place of each of them, and the problems met on the way."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.places: dict[Location, str] = {}
        self.problems: list[Problem] = []

    def file(self, path: Path) -> dict[str, Any]:
        """The file's root mapping.

        Raises:
            RecipeError: it cannot be read, or is no mapping.
        """
        try:
            data = self._parse(path.read_text(encoding="utf-8"), (), lambda line: f"{self.label}:{line}")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(Problem(self.label, (), f"cannot be read: {error}")) from None
        if not isinstance(data, dict):
            raise RecipeError(Problem(self.label, (), f"a recipe is a mapping of fields, got {_describe(data)}"))
        return data

    def override(self, data: dict[str, Any], text: str) -> None:
        """Put one `a.b.c=value` into `data`.

        Raises:
            RecipeError: no `=`, or a path through something that has no such item.
        """
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise RecipeError(Problem(f"{SET} {text}", (), "write it as field=value, e.g. finetune.steps=4"))
        parts, location = path.strip().split("."), ROOT
        node: Any = data
        while True:
            key, parts = self._step(node, parts, location)
            location = (*location, key)
            if not parts:
                break
            if (inner := node.get(key) if isinstance(node, dict) else node[key]) is None:
                inner = node[key] = {}
                self.places[location] = SET
            node = inner
        for known in [known for known in self.places if known[: len(location)] == location]:
            del self.places[known]
        node[key] = self._parse(value, location, lambda line: SET)

    def _step(self, node: Any, parts: list[str], location: Location) -> tuple[str | int, list[str]]:
        """The next key of an override's path and what is left of it; a key may itself contain dots (arm names)."""
        if isinstance(node, dict):
            known = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node)
            taken = next(known, 1)
            return ".".join(parts[:taken]), parts[taken:]
        if not isinstance(node, list):
            raise RecipeError(Problem(SET, (*location, *parts), f"{dotted(location)} is {_describe(node)}: no fields"))
        if not parts[0].isdecimal() or int(parts[0]) >= len(node):
            has = f"{dotted(location)} has {len(node)} items, from 0 to {len(node) - 1}"
            raise RecipeError(Problem(SET, (*location, *parts), f"no item {parts[0]!r}: {has}"))
        return int(parts[0]), parts[1:]

    def _parse(self, text: str, location: Location, place: typing.Callable[[int], str]) -> Any:
        try:
            loader = _Yaml12(text)
            node = loader.get_single_node()
            self.places[location] = place(1)
            return None if node is None else self._plain(loader, node, location, place, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            message = ", ".join(part for part in (error.problem, error.context) if part)
            raise RecipeError(Problem(place(line), location, f"broken YAML: {message}")) from None
        except yaml.YAMLError as error:
            raise RecipeError(Problem(place(1), location, f"broken YAML: {error}")) from None

    def _plain(self, loader: _Yaml12, node: yaml.Node, location: Location, place: Any, outer: tuple) -> Any:
        """Plain data of a node; remembers the line of each key and item, and keys written twice."""
        if any(node is one for one in outer):
            raise RecipeError(Problem(place(node.start_mark.line + 1), location, "an alias that contains itself"))
        plain_style = getattr(node, "style", None) is None
        if node.tag != loader.resolve(type(node), node.value, (plain_style, not plain_style)):
            message = f"tags such as {node.tag} have no use here; a number in quotes is text"
            raise RecipeError(Problem(place(node.start_mark.line + 1), location, message))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.places[(*location, index)] = place(item.start_mark.line + 1)
            return [
                self._plain(loader, item, (*location, index), place, (*outer, node))
                for index, item in enumerate(node.value)
            ]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(Problem(here, location, "a field's name is one word, not a list or a mapping"))
            key = key_node.value
            if key in plain:
                first = self.places[(*location, key)]
                self.problems.append(Problem(here, (*location, key), f"written twice, first at {first}"))
                continue
            self.places[(*location, key)] = here
            plain[key] = self._plain(loader, value_node, (*location, key), place, (*outer, node))
        return plain

    def explain(self, details: ErrorDetails) -> list[Problem]:
        """pydantic's error in a recipe's words: one problem, or several where sections disagree."""
        location, error = details["loc"], details.get("ctx", {}).get("error")
        if isinstance(error, SectionsDisagree):
            return [Problem(self._place(where), where, message) for where, message in error.problems]
        if isinstance(error, ValueError):  # a section's own check; it opens with the field that it is about
            return [Problem(self._place((*location, str(error).split(" ", 1)[0])), location, str(error))]
        return [Problem(self._place(location), location, _message(details))]

    def _place(self, location: Location) -> str:
        """Of the node, or of the nearest one around it that was written."""
        wanted = f"{dotted(location)}."
        around = [known for known in self.places if not known or wanted.startswith(f"{dotted(known)}.")]
        return self.places[max(around, key=len)]

    def in_order(self, found: list[Problem]) -> list[Problem]:
        """With those met while reading, by line."""

        def line(problem: Problem) -> int:
            number = problem.place.rpartition(":")[2]
            return int(number) if number.isdecimal() else 0

        return sorted([*self.problems, *found], key=line)


def _message(details: ErrorDetails) -> str:
    location, kind, got = details["loc"], details["type"], _describe(details["input"])
    if kind == "extra_forbidden":
        return "no such field" + _nearest_field(location)
    if kind == "missing":
        field = _type_at(location[:-1]).model_fields[str(location[-1])]
        return f"missing, and it has no default ({(field.description or '').rstrip('.')})"
    message = re.sub("^(Input|String) should", "should", details["msg"]).replace("Tuple", "list")
    message = re.sub(r"a valid (array|tuple)", "a list", message).replace("an object", "a mapping of fields")
    return f"{message.replace(' after validation', '')}, got {got}" if ", not " not in message else message


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"text {value!r}" if isinstance(value, str) else json.dumps(value)


def _nearest(word: str, known: typing.Iterable[str], have: str) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; {have}: {', '.join(known) or 'none'}"


def _nearest_field(location: Location) -> str:
    """The closest name in the same section, else where the recipe has a field of exactly that name, else all names."""
    name, section = str(location[-1]), _type_at(location[:-1])
    if difflib.get_close_matches(name, section.model_fields) or name not in (fields := _all_fields(Recipe)):
        return _nearest(name, section.model_fields, "this section has")
    near = [path for path in fields[name] if path.startswith(dotted(location[:-1]))]
    return f"; did you mean {' or '.join(near or fields[name])}?"


def _all_fields(section: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Dotted paths of all fields, by their last name."""
    found: dict[str, list[str]] = {}
    for name, field in section.model_fields.items():
        found.setdefault(name, []).append(prefix + name)
        inner, step = _present(field.annotation), ""
        if typing.get_origin(inner) in (tuple, dict):
            step = "0." if typing.get_origin(inner) is tuple else "NAME."
            inner = _inside(inner, step)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for key, paths in _all_fields(inner, f"{prefix}{name}.{step}").items():
                found.setdefault(key, []).extend(paths)
    return found


def _type_at(location: Location) -> Any:
    """The type of a location that pydantic reported, so that every part of it is known."""
    return functools.reduce(_inside, location, Recipe)


def _inside(container: Any, key: str | int) -> Any:
    """The type of one field, item or value of a container type."""
    if typing.get_origin(container) in (tuple, dict):
        return _present(typing.get_args(container)[0 if typing.get_origin(container) is tuple else 1])
    return _present(container.model_fields[key].annotation)


def _present(annotation: Any) -> Any:
    """X | None -> X."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    return annotation
