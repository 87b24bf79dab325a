"""`longreach init --documents`: recipes for texts, repositories and chats that load and plan, and what is refused."""

import json
import os
import random
from pathlib import Path

import pytest
import yaml
from tiny_models import byte_tokenizer, tiny_llama

from longreach.infra.resources import Resources
from longreach.pipelines import cli, init, init_recipe
from longreach.pipelines.foresee import Speed
from longreach.pipelines.plan import plan
from longreach.pipelines.reader import _Yaml12, load
from longreach.training.cost import Machine
from longreach.training.documents import Document, known_names, read_documents, split_of

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def ranks(rate: float) -> Speed:
    """Ranks that do so many FLOP/s, whatever the work is."""
    return Speed(Machine(matmul=rate, attention=rate, attention_backward=rate, bytes=rate, process_gib=0.5), "as told")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same tiny model twice: with a chat template and without."""
    root = tmp_path_factory.mktemp("bases")
    for name, template in (("chat", TEMPLATE), ("plain", None)):
        tiny_llama().save_pretrained(root / name)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, on a machine with two cores, 16 GiB and a known speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "_speed", lambda *_: ranks(5e10))
    monkeypatch.setattr(init, "_machine", lambda: (Resources(eval_cpus=2, matmul_precision="medium"), 16.0, "2 cores"))
    return tmp_path


def write_texts(folder: Path, count: int = 4, chars: int = 20_000) -> None:
    folder.mkdir(exist_ok=True)
    for n in range(count):
        (folder / f"t{n}.txt").write_text((f"Line {n} of a text. " * chars)[: chars + n])


def write_chats(path: Path, count: int = 60) -> None:
    lines = []
    for n in range(count):
        turns = [
            {"role": "user", "content": f"What is {n}? " * 20},
            {"role": "assistant", "content": f"It is {n}. " * 30},
        ]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `longreach init mine` says on stderr; it ends with 2 and leaves no recipe."""
    with pytest.raises(SystemExit) as ending:
        cli.main(["init", "mine", *arguments])
    assert ending.value.code == 2
    assert not Path("mine.yaml").exists()
    return capsys.readouterr().err


def test_a_folder_of_mixed_files_gives_a_recipe_that_plans_and_ends_in_time(bases: Path) -> None:
    write_texts(Path("texts"), count=12)
    Path("texts/picture.png").write_bytes(b"\x89PNG\0")
    Path("texts/more.jsonl").write_text(json.dumps({"text": "One more text. " * 500}) + "\n{broken\n")
    facts = init.written("mine", str(bases / "plain"), ["texts/*"], minutes=20)
    recipe = load("mine.yaml").recipe
    assert [source.files for source in recipe.corpus.sources] == ["texts/*.jsonl", "texts/*.txt"]
    assert recipe.corpus.test == ("t11",)
    assert recipe.corpus.validation == ("t10",)
    assert recipe.corpus.max_bad_fraction > 1 / 14, "the broken line would stop the run"
    assert recipe.finetune is not None
    assert recipe.finetune.rope.factor == 2
    assert "texts/picture.png: unknown file type" in facts[2]
    assert "malformed JSON" in facts[2]
    assert any(row.stage == "finetune[longlora]" for row in plan(load("mine.yaml")))


def test_a_repository_alone_is_split_at_a_folder_and_what_is_held_out_is_not_trained_on(bases: Path) -> None:
    for folder, files in (("repo/src", 5), ("repo/tools", 2)):
        Path(folder).mkdir(parents=True)
        for n in range(files):
            Path(folder, f"m{n}.py").write_text(f"def of_{Path(folder).name}_{n}():\n    return {n}\n" * 200)
    init.written("mine", str(bases / "plain"), ["repo"], minutes=20)
    corpus = load("mine.yaml").recipe.corpus
    splits: dict[str, str] = {"train": "", "test": ""}
    for document in read_documents(corpus):
        assert isinstance(document, Document)
        splits[split_of(document.key, corpus)] += "".join(document.blocks())
    assert "of_src_4" in splits["train"]
    assert "of_tools" not in splits["train"]
    assert "of_tools_1" in splits["test"]
    assert "of_src" not in splits["test"]
    assert plan(load("mine.yaml"))


def test_chats_keep_the_context_and_their_answers_are_validated(bases: Path) -> None:
    write_chats(Path("chats.jsonl"))
    facts = init.written("2026", str(bases / "chat"), ["chats.jsonl"], minutes=20)
    recipe = load("2026.yaml").recipe
    assert recipe.name == "2026", "and no number, as YAML would have it"
    assert recipe.finetune is not None
    assert recipe.finetune.rope.type == "none"
    assert recipe.finetune.validate_every_steps
    assert list(recipe.baselines) == ["base"]
    assert set(recipe.evaluate.chosen()) == {"passkey"}
    assert len(recipe.corpus.test) == len(recipe.corpus.validation) == 3
    assert "60 documents (60 of them chats)" in facts[1]
    assert plan(load("2026.yaml"))


def test_chats_for_a_base_without_a_template_are_refused_and_no_recipe_is_left(
    bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chats(Path("chats.jsonl"))
    said = refused(capsys, "--base", str(bases / "plain"), "--documents", "chats.jsonl")
    assert "no chat template" in said


def test_the_column_of_the_longest_text_is_read_where_none_is_called_text(bases: Path) -> None:
    rows = "\n".join(f"{n},{f'A row of text {n}. ' * 500}" for n in range(20))
    Path("table.csv").write_text(f"id,body\n{rows}\n")
    init.written("mine", str(bases / "plain"), ["table.csv"], minutes=20)
    assert load("mine.yaml").recipe.corpus.sources[0].text_field == "body"


def test_names_that_yaml_or_a_pattern_would_read_otherwise_are_held_out_all_the_same(bases: Path) -> None:
    Path("texts").mkdir()
    odd = ("no", "a: b [2024]", 'quo"te', "# five", "a\x85b", "c\x7f", "\u00e9\U0001f600", "line\nbreak", "back\\slash")
    for name in odd:
        Path("texts", f"{name}.txt").write_text(f"{name} is a text. " * 2000)
    init.written("mine", str(bases / "plain"), ["texts"], minutes=20)
    corpus = load("mine.yaml").recipe.corpus
    names = known_names(corpus) or []
    assert sorted(names) == sorted(odd)
    assert [split_of(name, corpus) for name in names].count("test") == 1
    for name in odd:
        assert _Yaml12(init_recipe._list([name])).get_single_data() == [name]


def test_the_name_of_a_file_that_is_left_out_stays_in_its_comment(bases: Path) -> None:
    write_texts(Path("texts"))
    Path("texts", "a\nseed: 7\nb.pdf").write_text("x")
    Path("texts", os.fsdecode(b"caf\xe9.pdf")).write_text("x")
    init.written("mine", str(bases / "plain"), ["texts/*"], minutes=20)
    assert load("mine.yaml").recipe.seed == 0
    assert "a\\U0000000aseed: 7" in Path("mine.yaml").read_text()


def test_a_file_name_that_is_not_utf_8_is_read_in_a_folder_and_refused_alone(
    bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(Path("texts"))
    odd = os.fsdecode(b"texts/caf\xe9.txt")
    Path(odd).write_text("A text. " * 2000)
    assert "is not UTF-8: rename the file" in refused(capsys, "--base", str(bases / "plain"), "--documents", odd)
    init.written("mine", str(bases / "plain"), ["texts"], minutes=20)
    assert "caf\\xe9" in (known_names(load("mine.yaml").recipe.corpus) or [])


def test_the_home_folder_is_meant_by_its_sign(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    Path("home").mkdir()
    write_texts(Path("home/texts"))
    for place in ("~/texts", "~/texts/*.txt"):
        assert len(init.look([place]).chars) == 4
    assert not Path("~").exists()


def test_more_minutes_are_more_steps_and_they_fit(bases: Path) -> None:
    write_texts(Path("texts"), count=5, chars=2_000_000)
    steps = []
    for minutes in (6, 30):
        name = f"m{minutes}"
        base = init._base(str(bases / "plain"))
        documents = init.look(["texts"])
        # a machine on which time, not the documents, is what ends training
        fit = init._fit(base, documents, Resources(), 16.0, ranks(5e8), minutes)
        assert fit.seconds <= minutes * 60, name
        steps.append(fit.steps * fit.batch)
    assert steps[1] > 2 * steps[0]


def test_a_stretch_is_measured_beyond_the_trained_length_where_documents_and_time_allow(bases: Path) -> None:
    base = init._base(str(bases / "plain"))
    beyond = base.trained * 3 // 2
    write_texts(Path("long"), chars=8 * beyond)
    init.written("mine", str(bases / "plain"), ["long"], minutes=20)
    recipe = load("mine.yaml").recipe
    gain = recipe.evaluate.gain
    assert gain.lengths == (base.trained // 4, beyond)
    assert gain.base_lengths == (base.trained // 4, base.trained)
    assert gain.documents == recipe.corpus.test
    assert not recipe.evaluate.perplexity
    assert recipe.resources.matmul_precision == "medium", "what this machine is fast in"
    attention = recipe.finetune.arms["longlora"].attention
    assert (attention.pattern, attention.anneal_to) in (("causal", None), ("shifted_sparse", "causal"))

    documents = init.look(["long"])
    slow = init._fit(base, documents, Resources(), 16.0, ranks(5e6), 20)
    assert not slow.evaluations.gain_documents, "one document at this length would take too long"
    assert slow.evaluations.seconds <= (20 * 60 - init.START_S) * (1 - init.TRAINING_SHARE)
    write_texts(Path("short"), chars=base.trained)
    init.written("short", str(bases / "plain"), ["short"], minutes=20)
    assert load("short.yaml").recipe.evaluate.perplexity
    assert not load("short.yaml").recipe.evaluate.gain


def test_a_recipe_says_in_comments_what_was_seen(bases: Path) -> None:
    write_texts(Path("texts"))
    facts = init.written("mine", str(bases / "plain"), ["texts"], minutes=20)
    text = Path("mine.yaml").read_text()
    for fact in facts:
        assert f"#   {fact}\n" in text
    assert yaml.safe_load(text)["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--documents", "nothing/*"], ["finds nothing"]),
        (["--documents", "picture.png"], ["cannot read '.png'"]),
        (["--documents", "alone.txt"], ["1 document can be read", "it takes 2"]),
        (["--documents", "short"], ["at least 512 tokens", "about 20"]),
        (["--documents", "texts", "--minutes", "2"], ["--minutes 2 is 120 s", "180 s"]),
        (["--documents", "texts", "--from", "quickstart"], ["--from quickstart"]),
        (["--documents", "texts", "--base", "models:/one/1"], ["give its folder"]),
        (["--minutes", "5"], ["work only with --documents"]),
    ],
)
def test_what_cannot_work_is_refused_with_both_numbers(
    arguments: list[str], says: list[str], bases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(Path("texts"))
    write_texts(Path("short"), chars=100)
    Path("alone.txt").write_text("A text alone. " * 1000)
    Path("picture.png").write_bytes(b"\x89PNG\0")
    if "--documents" in arguments and "--base" not in arguments:
        arguments = [*arguments, "--base", str(bases / "plain")]
    said = refused(capsys, *arguments)
    for part in says:
        assert part in said


def test_too_little_memory_and_too_slow_a_machine_are_refused_with_both_numbers(
    bases: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(Path("texts"))
    arguments = ["--base", str(bases / "plain"), "--documents", "texts"]
    monkeypatch.setattr(init, "_speed", lambda *_: ranks(1e4))
    assert "one step of 1,024 tokens takes about" in refused(capsys, *arguments)
    monkeypatch.setattr(init, "_machine", lambda: (Resources(), 0.5, "2 cores"))
    said = refused(capsys, *arguments)
    assert "needs about 1." in said
    assert "there are 0.5 GiB" in said


def test_mostly_malformed_documents_are_refused(bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text("\n".join([json.dumps({"text": "A text. " * 1000})] * 6 + ["{broken"] * 4))
    said = refused(capsys, "--base", str(bases / "plain"), "--documents", "bad.jsonl")
    assert "4 of 10 documents are malformed" in said


def test_an_existing_recipe_is_left_as_it_is(bases: Path) -> None:
    write_texts(Path("texts"))
    Path("mine.yaml").write_text("edited")
    with pytest.raises(ValueError, match="already exists and was not changed"):
        init.written("mine", str(bases / "plain"), ["texts"], minutes=20)
    assert Path("mine.yaml").read_text() == "edited"


def test_documents_that_others_repeat_are_not_held_out(bases):
    """Otherwise `pack` would refuse what `init` wrote."""
    words = random.Random(0)
    texts = [" ".join("".join(words.choices("abcdefgh", k=8)) for _ in range(300 - n)) for n in range(30)]
    texts[5:15] = [f"{text} again" for text in texts[:5]] + [f"{text} and again" for text in texts[:5]]
    Path("texts").mkdir()
    for n, text in enumerate(texts):
        Path("texts", f"{n:02}.txt").write_text(text)
    init.written("mine", str(bases / "plain"), ["texts"], minutes=20)
    corpus = load("mine.yaml").recipe.corpus
    assert [*corpus.test, *corpus.validation] == [f"{n}" for n in range(15, 21)]
    assert corpus.max_overlap == 0.1
    for n in range(30):
        Path("texts", f"{n:02}.txt").write_text(texts[0] + str(n))
    init.written("all-alike", str(bases / "plain"), ["texts"], minutes=20)
    assert load("all-alike.yaml").recipe.corpus.max_overlap == 1
