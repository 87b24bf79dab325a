"""What a run records about its packages."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from longreach.infra.versions import __file__ as versions_file


def test_versions_are_recorded_without_importing_the_packages():
    code = """if True:
        import json, sys
        from longreach.infra.versions import versions
        slow = {"torch", "ray", "mlflow", "transformers", "numpy"}
        print(json.dumps([versions(), sorted(slow & sys.modules.keys())]))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, imported = json.loads(out)
    assert imported == []
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "missing" not in found.values()
    assert found["cpus"] >= 1


def test_the_commit_of_a_repository_that_holds_an_installed_copy_is_not_the_codes(tmp_path):
    def git(*command):
        identity = ("-c", "user.name=ann", "-c", "user.email=ann@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True)

    copy = tmp_path / ".venv" / "versions.py"
    copy.parent.mkdir()
    copy.write_text(Path(versions_file).read_text())
    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    command = [sys.executable, "-c", "from versions import git_commit; print(git_commit())"]
    asked = [subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, check=True).stdout]
    git("add", str(copy))
    git("commit", "-m", "a checkout")
    asked.append(subprocess.run(command, cwd=copy.parent, capture_output=True, text=True, check=True).stdout)
    assert asked[0] == "unknown\n"
    assert len(asked[1]) == 13
