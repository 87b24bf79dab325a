"""The documentation says what is: the site builds without a warning and needs no network, its commands and recipes are
taken by the code, its links lead somewhere, and the reference of recipes has every field."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from longreach.pipelines.cli import app, main
from longreach.pipelines.reader import RecipeError, load, names, standalone
from longreach.pipelines.recipe import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
OTHER_PROGRAMS = {"grep", "head", "jq", "less", "tail", "tee"}
"""What may stand behind a pipe in an example; anything else there is an alternative, `longreach ui | doctor`."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once; --strict makes a broken link, anchor or page an error (with --quiet it would not)."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class _Page(HTMLParser):
    """What a page loads, the anchors that it has, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        self.anchors.add(has.get("id") or "")
        if tag in ("script", "img", "iframe", "source"):
            self.loads.append(has.get("src") or "")
        if tag == "link" and has.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(has.get("href") or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        for url in filter(None, _Page(page).loads):
            assert not re.match(r"(https?:)?//", url), f"{page.name} loads {url}"
            if page.name != "404.html":  # its links are absolute
                assert (page.parent / url.split("?")[0]).is_file(), f"{page.name}: {url} is not there"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), f"{sheet.name} loads"


def test_every_field_of_a_recipe_is_in_the_reference(site: Path) -> None:
    page, schema = _Page(site / "recipes.html"), Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    assert len(sections) > 20
    for section, holds in sections.items():
        for name, field in holds["properties"].items():
            assert field.get("description"), f"{section}.{name} has no description"
            words = " ".join(field["description"].replace("`", "").split())
            assert words in page.text, f"{section}.{name} is not in recipes.html as the schema describes it"
            assert re.search(rf"(^|-){name}$", "\n".join(page.anchors), re.MULTILINE), f"no anchor of {section}.{name}"


def test_the_drawn_masks_leak_only_where_the_page_says_so() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert (hooks.rolled() == hooks.LEAK).sum() == 16, "tokens 0 to 3 see tokens 20 to 23"
    for head in (0, 1):
        drawn = hooks.cells("shifted_sparse", head=head, group_tokens=8, sink_tokens=2, starts=(0, 13))
        assert not (drawn == hooks.LEAK).any()
        assert (drawn[13:, :13] == hooks.HIDDEN).all(), "the second document does not see the first"
        assert (drawn[20:, 13:15] == hooks.SINK).all(), "a document's sinks are its own first tokens"


# --- commands -----------------------------------------------------------------------------------------------------


def code_of(path: Path) -> tuple[list[str], list[str]]:
    """(lines of fenced and indented blocks, inline code) of a Markdown file."""
    lines: list[str] = []
    prose, fence = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if mark := re.match(r"\s*(```+)", line):
            fence = "" if fence else mark[1]
        elif fence or line.startswith("    "):
            if lines and lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1] + line.strip()
            else:
                lines.append(line.strip())
        else:
            prose.append(line)
    return lines, re.findall(r"`([^`]+)`", "\n".join(prose))


def commands_in(code: str) -> list[list[str]]:
    """The words of each `longreach ...` in a line of a shell."""
    lexer = shlex.shlex(code.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split, found = True, []
    try:
        words = list(lexer)
    except ValueError:  # a lone quote: prose or another language
        return []
    part: list[str] = []
    ours = False
    for word in [*words, ";"]:
        if word not in ("|", "&&", "||", ";"):
            part.append(word)
            continue
        while part and re.fullmatch(r"[A-Z_]+=.*", part[0]):
            part.pop(0)
        if part and part[0].rpartition("/")[2] == "longreach":
            found.append(part[1:])
        elif part and ours and part[0] not in OTHER_PROGRAMS:
            found.append(part)
        ours, part = bool(part) and word == "|" and (ours or part[0].rpartition("/")[2] == "longreach"), []
    return [command[: command.index(">")] if ">" in command else command for command in found]


def in_the_docs(*, blocks: bool) -> list[tuple[str, tuple[str, ...]]]:
    """(page, words) of every command once: those in blocks are meant to be typed, those in the text may be parts."""
    found: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for code in code_of(page)[0 if blocks else 1]:
            found |= {tuple(words): page.name for words in commands_in(code)}
    return [(page, words) for words, page in found.items()]


def leaf(words: tuple[str, ...]) -> tuple[Any, str, list[str]]:
    """(the command, its name, what is left of the words); words of a group alone give the group."""
    command, rest, name = typer.main.get_command(app), [w for w in words if not re.fullmatch(r"\.\.\.|…", w)], ""
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r}: there are {', '.join(command.commands)}"
        command = command.commands[name]
    return command, name, rest


def shown(case: tuple[str, tuple[str, ...]]) -> str:
    return f"{case[0]}: {' '.join(case[1])}"


@pytest.mark.parametrize("case", [*in_the_docs(blocks=False), *in_the_docs(blocks=True)], ids=shown)
def test_commands_and_options_exist(case: tuple[str, tuple[str, ...]]) -> None:
    command, _, rest = leaf(case[1])
    known = {opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in known | {"--help", "-h"}, f"no option {word}: there are {sorted(known)}"


@pytest.mark.parametrize("case", in_the_docs(blocks=True), ids=shown)
def test_commands_are_taken_as_they_stand(case: tuple[str, tuple[str, ...]]) -> None:
    """Words, types and overrides; a recipe's file that a reader has yet to write is not looked for."""
    command, name, rest = leaf(case[1])
    if hasattr(command, "commands"):
        assert rest in ([], ["--help"], ["--version"])
        return
    given = command.make_context(name, list(rest)).params
    for key in ("source", "suite"):
        assert given.get(key) is None or given[key] in names(), f"no recipe {given[key]!r} comes along"
    recipe = given.get("recipe") or ""
    if name == "evaluate":
        evals, documents = tuple(given["evals"] or ()), given["documents"]
        standalone(
            given["model"], evals=evals, suite=given["suite"], documents=documents, overrides=given["overrides"] or []
        )
    elif recipe and not recipe.endswith(".yaml") and not recipe.isupper():
        load(recipe, list(given.get("overrides") or ()))


OPERATIONS = ("schedule.md", "cluster.md", "gate.md")
ELSEWHERE = {"run", "jobs", "logs", "stop", "rollback"}
"""Commands that need a cluster or a champion; test_infra_jobs, test_cluster and test_pipelines_gate have them."""


def for_operators() -> list[tuple[str, tuple[str, ...]]]:
    """What the pages about operations want to be typed and needs neither Ray nor another machine; recipes first."""
    found = []
    for page, words in in_the_docs(blocks=True):
        sends = words[0] == "submit" and not {"--dry-run", "--render"} & {*words}
        if page in OPERATIONS and words[0] not in ELSEWHERE and not sends:
            found.append((page, words))
    return sorted(found, key=lambda case: case[1][0] != "init")


@pytest.mark.long
def test_what_pages_for_operators_say_works_in_a_clean_folder(
    tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    for bucket in ("bucket", s3_root.removeprefix("s3://")):
        if not s3fs.S3FileSystem().exists(bucket):
            s3fs.S3FileSystem().mkdir(bucket)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "longreach.env").touch(0o600)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "ours.txt").write_text("A text of our own. " * 100)
    cases = for_operators()
    assert {words[0] for _, words in cases} >= {"init", "plan", "schedule", "submit", "doctor", "status"}
    for case in cases:
        with pytest.raises(SystemExit) as ended:
            main([os.path.expanduser(word) for word in case[1]])
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), f"{shown(case)}\n{out}\n{err}"
    assert sorted(path.name for path in (tmp_path / ".config/systemd/user").iterdir()) == [
        "longreach-retrain.service",
        "longreach-retrain.timer",
    ]


# --- recipes --------------------------------------------------------------------------------------------------------


def snippets() -> list[tuple[str, str]]:
    """(page:line, text) of every YAML block that is a recipe or sections of one."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```yaml.*\n((?:.*\n)*?)\1```", text, re.MULTILINE):
            content = yaml.safe_load(match[2])
            if isinstance(content, dict) and not {"apiVersion", "services"} & content.keys():
                found.append((f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match[2]))
    return found


@functools.cache
def whole() -> dict[str, Any]:
    """What sections stand in, with every evaluation on every model."""
    recipe = load(Path(__file__).with_name("whole.yaml")).recipe.model_dump(mode="json", exclude_unset=True)
    for choices in recipe["evaluate"].values():
        choices.pop("models", None)
    return recipe


@pytest.mark.parametrize("snippet", snippets(), ids=lambda snippet: snippet[0])
def test_recipes_in_the_docs_are_valid(snippet: tuple[str, str], tmp_path: Path) -> None:
    text = snippet[1]
    has = yaml.safe_load(text)
    around = {} if "name" in has else {key: value for key, value in whole().items() if key not in has}
    file = tmp_path / "recipe.yaml"
    file.write_text(text + "\n" + (yaml.safe_dump(around) if around else ""), encoding="utf-8")
    try:
        load(file)
    except RecipeError as error:
        pytest.fail(f"{snippet[0]}\n{error}")


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "CONTRIBUTING.md"])
def test_relative_links_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            assert (ROOT / link.partition("#")[0]).exists(), f"{name} links to {link}, which is not there"
