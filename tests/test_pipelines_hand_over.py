"""What leaves: forms and places are checked before anything runs; a push reaches a hub, here a small server."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from test_training_to_gguf import tiny
from toy_models import tiny_folder
from transformers import AutoTokenizer

from longreach.infra.registry import FINGERPRINT, MODEL
from longreach.pipelines import console
from longreach.pipelines.cli import main
from longreach.pipelines.display import Display
from longreach.pipelines.graph import build
from longreach.pipelines.hand_over import Withheld, check_token, published_release, pushed_files
from longreach.pipelines.plan import open_store, plan
from longreach.pipelines.reader import RecipeError, load
from longreach.pipelines.run import RunOutcome, run
from longreach.training.corpus_recipe import CorpusRecipe, SourceRecipe
from longreach.training.train_tokenizer import train_tokenizer

RECIPE = """
name: mine
base: {{source: {base}}}
corpus: {{sources: [{{files: {texts}}}]}}
finetune:
  rope: {{type: linear, factor: 2.0}}
  pack: {{seq_len: 64}}
  steps: 2
  global_batch_tokens: 128
  warmup_steps: 1
  arms: {{lora: {{tune: lora}}, full: {{}}}}
store: {{root: {root}, workdir: {root}}}
release: {release}
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a Llama with byte-level BPE, and of one whose tokenizer llama.cpp does not know."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "a.txt").write_text("To be or not to be, that is the question. " * 20)
    train_tokenizer(CorpusRecipe(sources=(SourceRecipe(files=str(folder / "a.txt")),)), 280, folder / "t")
    tiny(folder / "bpe", AutoTokenizer.from_pretrained(folder / "t"))
    tiny_folder(folder / "words")
    return folder


def written(tmp_path, bases, release="{}", base="bpe", texts=None):
    text = RECIPE.format(base=bases / base, texts=(texts or bases) / "a.txt", root=tmp_path / "store", release=release)
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("release", "message"),
    [
        ("{formats: [gguf]}", "always has safetensors"),
        ("{push: owner/name, push_arm: lora}", "write hub:owner/name"),
        ("{push: 'hub:owner/name'}", r"but 2 are trained \(lora, full\): set release.push_arm"),
        ("{push: 'hub:owner/name', push_arm: lor}", "did you mean lora"),
        ("{push_arm: lora}", "has no repository to be pushed to"),
    ],
)
def test_forms_and_places_that_cannot_be_are_refused_with_the_recipe(release, message, tmp_path, bases):
    with pytest.raises(RecipeError, match=message):
        load(written(tmp_path, bases, release))


def test_a_base_that_gguf_cannot_hold_is_refused_by_the_plan(tmp_path, bases):
    release = "{formats: [safetensors, gguf]}"
    build(load(written(tmp_path, bases, release)).recipe)
    with pytest.raises(ValueError, match=r"release\.formats: .*WordLevel"):
        build(load(written(tmp_path, bases, release, base="words")).recipe)
    bos = tmp_path / "bos"  # the tokenizer puts its own token first, and the rows begin with a sink token
    bos.mkdir()
    for file in (bases / "bpe").iterdir():
        (bos / file.name).write_bytes(file.read_bytes())
    spec = json.loads((bos / "tokenizer.json").read_text())
    first = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    spec["post_processor"] = {"type": "TemplateProcessing", "single": first}
    (bos / "tokenizer.json").write_text(json.dumps(spec))
    recipe = load(written(tmp_path, bases, release, base=bos)).recipe
    build(recipe)
    pack = recipe.finetune.pack.model_copy(update={"first_token": "sink"})
    sunk = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"pack": pack})})
    with pytest.raises(ValueError, match="2 tokens before each text"):
        build(sunk)
    pieces = tmp_path / "pieces"  # as Llama 2's first folders were: SentencePiece's own file and no tokenizer.json
    pieces.mkdir()
    for file in (bases / "bpe").iterdir():
        if file.name != "tokenizer.json":
            (pieces / file.name).write_bytes(file.read_bytes())
    (pieces / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"release\.formats: .*pieces: a SentencePiece tokenizer"):
        build(load(written(tmp_path, tmp_path, release, base="pieces", texts=bases)).recipe)
    config = json.loads((bases / "bpe" / "config.json").read_text())
    other = tmp_path / "qwen"
    other.mkdir()
    for file in (bases / "bpe").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    changed = config | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot be written as GGUF"):
        build(load(written(tmp_path, bases, release, base=other)).recipe)


def test_a_recipe_that_says_nothing_of_its_release_has_the_fingerprints_of_before(tmp_path, bases):
    plain = build(load(written(tmp_path, bases)).recipe)
    pushed = build(load(written(tmp_path, bases, "{push: 'hub:a/b', push_arm: lora}")).recipe)
    assert [stage.fingerprint for stage in plain] == [stage.fingerprint for stage in pushed]
    (release,) = [stage for stage in plain if stage.label == "release[lora]"]
    assert release.identity["recipe"] == {"name": "mine", "arm": "lora", "register_as": "mine-lora"}
    gguf = build(load(written(tmp_path, bases, "{formats: [safetensors, gguf]}")).recipe)
    changed = [one.label for one, other in zip(plain, gguf, strict=True) if one.fingerprint != other.fingerprint]
    assert changed == ["release[lora]", "release[full]"]


def test_a_missing_token_ends_in_one_sentence_before_anything_runs(tmp_path, bases, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["run", written(tmp_path, bases, "{push: 'hub:owner/name', push_arm: lora}")])
    assert ended.value.code == 2
    assert "there is no Hugging Face Hub token: set HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    check_token(load(written(tmp_path, bases)).recipe)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a push of small files needs; `server.seen` is what it was told."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        seen = self.server.seen
        assert self.headers["Authorization"] == "Bearer hf_made_up"
        if self.path == "/api/repos/create":
            seen["repository"] = json.loads(body)
            return self.answer({"url": f"{self.server.url}/owner/name", "name": "owner/name", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.startswith("/api/models/owner/name/preupload/main"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": [{k: v for k, v in file.items() if k != "sample"} for file in files]})
        if self.path.startswith("/api/models/owner/name/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "deletedFile":
                    seen.setdefault("deleted", []).append(line["value"]["path"])
                if line["key"] == "file":
                    seen["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitOid": "c" * 40, "commitUrl": f"{self.server.url}/owner/name/commit/c"})
        raise AssertionError(self.path)

    def do_GET(self):
        content = {"id": "owner/name", "sha": "a" * 40, "siblings": [], "private": True}
        if self.path.startswith("/api/models/owner/name/tree/main"):  # what an earlier push left
            names = ["README.md", "mine-lora-q8_0.gguf", "model.safetensors", "mine-lora-Q4_K_M.gguf"]
            content = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
        self.answer(content)

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.seen = {"files": {}}
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_made_up")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token_to_send", lambda token: "hf_made_up")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def released(tmp_path, bases, monkeypatch):
    folder = tmp_path / "release"
    (folder / "components" / "tokenizer").mkdir(parents=True)
    for name in ("README.md", "config.json", "model.safetensors", "MLmodel", "components/tokenizer/tokenizer.json"):
        (folder / name).write_text(f"{name}\n")
    monkeypatch.setattr("longreach.pipelines.hand_over.published_release", lambda loaded: folder)
    return folder


def test_a_push_brings_the_folder_without_mlflows_files_to_a_private_repository(tmp_path, bases, hub, released, capsys):
    recipe = written(tmp_path, bases, "{push: 'hub:owner/name', push_arm: lora}")
    console.push_release(load(recipe))
    assert hub.seen["repository"]["name"] == "name"
    assert hub.seen["repository"]["organization"] == "owner"
    assert "private" in (hub.seen["repository"].get("visibility"), *hub.seen["repository"])
    assert sorted(hub.seen["files"]) == pushed_files(released) == ["README.md", "config.json", "model.safetensors"]
    assert hub.seen["files"]["config.json"] == b"config.json\n"
    assert hub.seen["deleted"] == ["mine-lora-q8_0.gguf"], "a stale file of an earlier push, and none of a user's"
    assert capsys.readouterr().out == f"{hub.url}/owner/name\n"


def test_a_dry_run_prints_the_files_and_asks_nobody(tmp_path, bases, hub, released, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["push", written(tmp_path, bases, "{push: 'hub:owner/name', push_arm: lora}"), "--dry-run"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "to hub:owner/name" in shown
    assert "model.safetensors" in shown
    assert "MLmodel" not in shown
    assert hub.seen == {"files": {}}


def test_what_is_not_made_yet_cannot_be_pushed(tmp_path, bases, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["push", written(tmp_path, bases, "{push: 'hub:owner/name', push_arm: lora}"), "--dry-run"])
    assert ended.value.code == 2
    assert "release[lora] does not exist yet" in capsys.readouterr().err


def test_a_hub_that_is_away_ends_in_exit_code_1_and_says_how_to_push_later(tmp_path, bases, hub, released, capsys):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(SystemExit) as ended:
        main(["push", written(tmp_path, bases, "{push: 'hub:owner/name', push_arm: lora}")])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "hub:owner/name was not pushed: " in said
    assert said.endswith(f"; to retry: longreach push {tmp_path / 'mine.yaml'}\n")


def test_the_hint_after_a_failed_push_has_the_choices_of_the_run(tmp_path, bases, hub, released):
    hub.shutdown()
    hub.server_close()
    loaded = load(written(tmp_path, bases), ["release.push=hub:owner/name", "release.push_arm=lora"])
    problem = console.push_release(loaded)
    later = problem.partition("; to retry: longreach push ")[2].split()
    assert load(later[0], [word for word in later[1:] if word != "--set"]).recipe == loaded.recipe


def test_a_failed_push_is_a_failure_for_the_webhook(monkeypatch):
    posted = []
    monkeypatch.setattr(console, "_post", lambda *arguments: posted.append(arguments))
    outcome = RunOutcome(ran=["release[lora]"])
    console._post_outcome("http://hook", outcome, "mine", None, "hub:owner/name was not pushed: 403")
    ((url, ending, recipe, facts),) = posted
    assert (url, ending, recipe) == ("http://hook", "failure", "mine")
    assert facts["failed"] == {"push": "hub:owner/name was not pushed: 403"}
    assert outcome.failed == {}


GATED = """
baselines: {base: {}}
evaluate: {perplexity: {lengths: [32], last_tokens: 16}}
promote: {model: lora, name: best, perplexity_ratio: null, base_ratio: 2.0}
release: {push: 'hub:owner/name', push_arm: lora}
"""


@pytest.fixture
def gated(tmp_path, bases, monkeypatch):
    """A recipe with a gate and its published release; `champion(version, fingerprint, model)` makes one in the
    registry."""
    path = Path(written(tmp_path, bases))
    text = path.read_text().replace("corpus: {", "corpus: {test: [a], ")
    path.write_text(text.partition("release:")[0] + GATED)
    current = []
    monkeypatch.setattr("longreach.infra.registry.champion", lambda name: current[-1])

    def champion(version, fingerprint, model):
        tags = {FINGERPRINT: fingerprint, MODEL: model}
        current.append(SimpleNamespace(name="best", version=version, tags=tags))

    champion("1", "an earlier week's", "an earlier week's")
    loaded = load(path)
    (stage,) = [stage for stage in build(loaded.recipe) if stage.label == "release[lora]"]
    attempt = open_store(loaded).new_attempt("release", stage.fingerprint)
    (attempt.out / "config.json").write_text("{}")
    open_store(loaded).publish(
        attempt, {"label": stage.label, "summary": {"tags": {MODEL: "this attempt's"}}, "seconds": 0.0}
    )
    return SimpleNamespace(path=str(path), loaded=loaded, fingerprint=stage.fingerprint, champion=champion)


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_model_that_its_gate_refused_stays_here(options, gated, hub, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["push", gated.path, *options])
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith("hub:owner/name was not pushed: champion of best is version 1, not release[lora]")
    assert f"to ask the gate again: longreach run {gated.path} --force promote" in said
    assert hub.seen == {"files": {}}
    gated.champion("2", gated.fingerprint, "this attempt's")
    with pytest.raises(SystemExit) as ended:
        main(["push", gated.path, *options])
    assert (ended.value.code or 0, list(hub.seen["files"])) == (0, [] if options else ["config.json"])


def test_a_release_made_again_from_the_champions_choices_is_judged_and_not_pushed_before(gated):
    """--force gives it other bytes, for which the champion cannot answer."""
    gated.champion("2", gated.fingerprint, "this attempt's")
    assert "promote" not in [row.stage for row in plan(gated.loaded)]
    assert published_release(gated.loaded).is_dir()
    gated.champion("2", gated.fingerprint, "an attempt's before --force")
    assert "promote" in [row.stage for row in plan(gated.loaded)]
    with pytest.raises(Withheld, match="champion of best is version 2"):
        published_release(gated.loaded)


def test_a_forced_run_plans_the_gate_though_the_champion_is_the_published_release(gated, monkeypatch):
    gated.champion("2", gated.fingerprint, "this attempt's")
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    stages = []
    monkeypatch.setattr("longreach.pipelines.run._run_missing", lambda run: stages.append(run.stages))
    run(gated.loaded, display=Display(quiet=True))
    run(gated.loaded, display=Display(quiet=True), force=("finetune",))
    assert ["promote" in [stage.label for stage in of_run] for of_run in stages] == [False, True]


def test_a_model_that_passed_and_is_not_champion_any_more_is_named_though_quiet_and_nothing_moves(
    gated, monkeypatch, capsys
):
    store = open_store(gated.loaded)
    (stage,) = [stage for stage in build(gated.loaded.recipe) if stage.label == "promote"]
    attempt = store.new_attempt("promote", stage.fingerprint)
    (attempt.out / "gate.json").write_text("{}")
    decision = {"passed": True, "refusals": [], "name": "best", "version": "2"}
    store.publish(attempt, {"label": "promote", "summary": decision, "seconds": 0.0})
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    again = []
    monkeypatch.setattr("longreach.pipelines.run._run_missing", lambda run: again.extend(run.again))
    run(gated.loaded, display=Display(quiet=True))
    assert not again
    assert "version 2 of best passed the gate in an earlier run but is not champion" in capsys.readouterr().err


def test_a_run_after_a_rollback_does_not_push_what_people_took_back(gated, hub, capsys, monkeypatch):
    """The gate's earlier decision stands, and it had passed: nothing is refused."""
    outcome = RunOutcome(reused=["promote"], gate={"passed": True, "name": "best", "version": "2"})
    monkeypatch.setattr("longreach.pipelines.run.run", lambda loaded, **options: outcome)
    console.run_recipe(gated.loaded)
    assert "champion of best is version 1, not release[lora]" in capsys.readouterr().err
    assert hub.seen == {"files": {}}
