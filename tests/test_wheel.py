"""The wheel brings one name; nothing in a user's folder is taken for a module of ours or of a library."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from test_quickstart import RECIPE, make_project

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
OURS = ("attention", "infra", "training", "evaluation", "pipelines")
TRAPS = (*OURS, "tests", "longreach", "datasets", "ray", "torch", "aiohttp", "queue", "secrets", "platform")
SMALL = RECIPE | {
    "baselines": {},
    "pretrain": None,
    "finetune": RECIPE["finetune"] | {"steps": 1, "arms": {"lora": {"tune": "lora"}}},
    "evaluate": {"perplexity": {"lengths": [32], "last_tokens": 16}},
}
BOMB = "raise SystemExit('imported from ' + __file__)\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy of what it is built from (setuptools leaves its traces there)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py", *OURS):
        (source / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*build, str(source)], check=True, timeout=300)
    return next(out.glob("*.whl"))


def test_a_wheel_holds_one_top_level_package_with_its_recipes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"longreach"}
    assert "longreach/pipelines/recipes/quickstart.yaml" in names
    assert "longreach/pipelines/report/page.html.jinja" in names
    assert {name.split("/")[1] for name in names if name.count("/") > 1} >= set(OURS)
    assert not [name for name in names if "/tests/" in name or "/docs/" in name]


def test_the_installed_wheel_runs_in_a_folder_full_of_our_and_our_libraries_names(wheel, tmp_path):
    env = tmp_path / "env"
    venv.create(env, with_pip=False)
    site = next((env / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    # The libraries of this environment, without its editable longreach: a .pth below another one is not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    project = make_project(tmp_path / "project", SMALL)
    for number, name in enumerate(TRAPS):
        if number % 2:
            (project / f"{name}.py").write_text(BOMB)
        else:
            (project / name).mkdir()
            (project / name / "__init__.py").write_text(BOMB)
    python = [str(env / "bin/python"), "-P", "-c"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [*python, "from longreach.pipelines.cli import main; main(['run', 'tiny.yaml'])"]
    done = subprocess.run(run, cwd=project, env=clean, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dashboard" not in done.stderr  # Ray waits for it for a minute, and goes on without it
    ask = [*python, "import longreach.pipelines.cli as cli; print(cli.__file__)"]
    found = subprocess.run(ask, cwd=project, env=clean, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))
