"""The chain that nobody watches, as users type it: train, release, gate, promote; and nothing where nothing is new."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from test_quickstart import RECIPE, longreach, make_project

pytestmark = pytest.mark.slow

NAME = "tiny-model"
GATED = {
    "name": "tiny",
    **{key: RECIPE[key] for key in ("base", "corpus", "resources")},
    "baselines": {"base": {}},
    "finetune": {
        **RECIPE["finetune"],
        "steps": 2,
        "arms": {"lora": {"tune": "lora"}},
    },
    "evaluate": {"perplexity": RECIPE["evaluate"]["perplexity"]},
    "promote": {
        "model": "lora", "name": NAME, "start_from": "champion", "perplexity_ratio": 1.05, "base_ratio": 1.5,
        "certainty": "estimate",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("retrain"), GATED)


@pytest.fixture(scope="module")
def hook():
    """A webhook that keeps what it is told."""

    class Hook(ThreadingHTTPServer):
        heard: list = []  # noqa: RUF012 (one server)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            Hook.heard.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = Hook(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def aliases(project) -> dict[str, str]:
    from mlflow import MlflowClient

    found = MlflowClient(f"sqlite:///{project}/.longreach/mlflow.db").get_registered_model(NAME).aliases
    return {alias: str(version) for alias, version in found.items()}


def texts_of(project) -> str:
    """All that was written of the runs, but weights."""
    kinds = {".json", ".jsonl", ".md", ".html", ".log", ".yaml", ".db", ""}
    files = (path for path in (project / ".longreach").rglob("*") if path.is_file() and path.suffix in kinds)
    return "\n".join(path.read_bytes().decode(errors="replace") for path in files)


def test_the_first_model_becomes_champion_and_a_second_run_is_none(project, hook):
    url = f"http://127.0.0.1:{hook.server_port}/planted-canary"
    env = {"LONGREACH_NOTIFY_URL": url, "LONGREACH_NOTIFY_TOKEN": "planted-token"}
    done = longreach(project, "run", "tiny.yaml", env=env)
    assert done.returncode == 0, done.stderr
    assert aliases(project) == {"champion": "1"}
    ((path, token, told),) = hook.heard
    assert (path, token, told["status"]) == ("/planted-canary", "Bearer planted-token", "success")
    assert told["report"] == done.stdout.strip()

    again = longreach(project, "run", "tiny.yaml", env=env)
    assert again.returncode == 0, again.stderr
    assert "nothing new" in again.stderr
    assert "0 stages run" in again.stderr
    assert len(hook.heard) == 1, "nobody is told that nothing happened"

    said = done.stdout + done.stderr + again.stderr + texts_of(project)
    assert "planted" not in said, "a secret was written down"


def test_new_documents_start_from_the_champion_and_a_worse_model_is_refused(project, hook):
    (project / "texts" / "train99.txt").write_text(" ".join(f"w{2 + n % 7}" for n in range(130)))
    spoil = ("--set", "finetune.learning_rate=3", "--set", "finetune.arms.lora.tune=lora+embed+norm")
    env = {"LONGREACH_NOTIFY_URL": f"http://127.0.0.1:{hook.server_port}/"}
    worse = longreach(project, "run", "tiny.yaml", *spoil, env=env)
    assert worse.returncode == 3, worse.stderr
    assert "refused by the gate: perplexity_ratio, tokens 0 to" in worse.stderr
    assert aliases(project) == {"champion": "1"}
    assert hook.heard[-1][2]["status"] == "refused"
    assert "convert[start]: done" in worse.stderr

    again = longreach(project, "run", "tiny.yaml", *spoil)
    assert again.returncode == 3
    assert "0 stages run" in again.stderr

    better = longreach(project, "run", "tiny.yaml")
    assert better.returncode == 0, better.stderr
    assert aliases(project) == {"champion": "2", "previous": "1"}
    known = longreach(project, "run", "tiny.yaml")
    assert known.returncode == 0, known.stderr
    assert "0 stages run" in known.stderr, "a champion is not trained again on what it was trained on"

    back = longreach(project, "rollback", NAME)
    assert back.returncode == 0, back.stderr
    assert aliases(project) == {"champion": "1", "previous": "2"}
    assert longreach(project, "run", "tiny.yaml").returncode == 0
    assert aliases(project) == {"champion": "1", "previous": "2"}, "what was rolled back is not promoted by itself"


def test_a_registered_champion_is_a_base(project):
    recipe = yaml.safe_load((project / "tiny.yaml").read_text())
    recipe |= {"name": "other", "base": {"source": f"models:/{NAME}@champion"}, "evaluate": {}}
    recipe["finetune"]["arms"] = {}
    del recipe["promote"], recipe["finetune"]
    recipe["evaluate"] = {"perplexity": {"lengths": [32], "last_tokens": 16}}
    (project / "other.yaml").write_text(yaml.safe_dump(recipe))
    done = longreach(project, "run", "other.yaml")
    assert done.returncode == 0, done.stderr


def test_without_an_answer_from_the_registry_no_training_from_its_champion_starts(project):
    env = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = longreach(project, "run", "tiny.yaml", env=os.environ | env)
    assert done.returncode == 75, done.stderr
    assert "cannot look up the alias champion of 'tiny-model'" in done.stderr
    assert "--set promote=" in done.stderr
