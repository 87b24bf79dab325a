"""Chats: their forms, the tokens that the template writes, and which of them are predicted, against TRL's masks."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from ranks import run_spawned
from test_training_loop import s2_mask, steps
from tiny_models import tiny_llama
from tokenizers import AddedToken, processors
from toy_models import job, pack_summary, tiny_folder, tiny_tokenizer, train
from toy_tokenizers import LINES, toy_core
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from longreach.pipelines.graph import build
from longreach.pipelines.reader import load
from longreach.training.chats import Chats, Conversation, conversation_of, form_of
from longreach.training.corpus import IGNORED, PackedRows, hold_out, pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.documents import BadLine, read_documents
from longreach.training.readers import Malformed
from longreach.training.validation import validation_rows

PLAIN = """{%- for message in messages %}
{{- '<mark>' + message['role'] + '\n' + message['content'] + '<eos>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<mark>assistant\n' }}{% endif %}"""
MARKED = """{%- for message in messages %}
{{- '<mark>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + '<eos>' }}{% endgeneration %}
{%- else %}{{- message['content'] + '<eos>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<mark>assistant\n' }}{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What was it?"},
    {"role": "assistant", "content": "The best of times."},
    {"role": "user", "content": "And then, naïve café?"},
    {"role": "assistant", "content": "The age of wisdom, 1859."},
]


def tokenizer_with(template):
    special = {"eos_token": "<eos>", "bos_token": "<bos>", "additional_special_tokens": ["<mark>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=toy_core(), **special)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*roles, text="some words"):
    return Conversation(tuple({"role": role, "content": f"{text} {n}"} for n, role in enumerate(roles)))


def predicted_text(tokenizer, encoded):
    """The runs of tokens that are predicted, as texts."""
    edges = np.flatnonzero(np.diff(np.r_[1, encoded.given.astype(int), 1]))
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def entries(folder, **source):
    return list(read_documents(CorpusRecipe(sources=(SourceRecipe(**source),)), folder))


# Forms


FORMS = {
    "messages": {"messages": CHAT},
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
            for m in CHAT
        ]
    },
    "prompt_completion": {"prompt": CHAT[:4], "completion": CHAT[4:]},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_are_known_by_their_columns(tmp_path, form, kind):
    rows = datasets.Dataset.from_list([FORMS[form] | {"id": "x", "more": 1}])
    if kind == "parquet":
        rows.to_parquet(tmp_path / "x.parquet")
    else:
        rows.to_json(tmp_path / "x.jsonl")
    (document,) = entries(tmp_path, files="x.*", name_field="id")
    assert document.name == "x"
    messages = [dict(message) for message in document.text.messages]
    if form == "alpaca":
        assert messages == [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
    else:
        assert messages == CHAT
    assert document.text.given == (4 if form == "prompt_completion" else 0)


def test_a_pair_of_texts_is_a_question_and_its_answer():
    pair = conversation_of({"prompt": "Q", "completion": "A"}, "prompt_completion")
    assert pair.messages == ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
    alone = conversation_of({"instruction": "Q", "input": None, "output": "A"}, "alpaca")
    assert alone.messages == pair.messages


def test_contents_in_parts_are_joined_and_tools_are_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "content": "c"}]
    found = conversation_of({"messages": messages, "tools": '[{"name": "f"}]'}, "messages")
    assert found.messages[0] == {"role": "user", "content": "ab"}
    assert found.tools == [{"name": "f"}]


def test_a_form_that_fits_twice_is_refused_until_it_is_named(tmp_path):
    write(tmp_path / "x.jsonl", FORMS["alpaca"] | {"text": "whole"})
    with pytest.raises(ValueError, match=r"x\.jsonl: the columns .* fit the formats text and alpaca: set the source's"):
        entries(tmp_path, files="x.jsonl")
    (tmp_path / "x.csv").write_text("text,messages\na,b,one value too many\n")  # it is read under the name None
    with pytest.raises(ValueError, match="None fit the formats text and messages"):
        entries(tmp_path, files="x.csv")
    assert entries(tmp_path, files="x.jsonl", format="text")[0].text == "whole"
    assert isinstance(entries(tmp_path, files="x.jsonl", format="alpaca")[0].text, Conversation)
    with pytest.raises(ValueError, match="messages and prompt_completion"):
        form_of(["messages", "prompt", "completion"], SourceRecipe(files="x"), "x")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT[:2]}, "a chat without an answer of the assistant"),
        ({"messages": []}, "a chat without an answer"),
        ({"messages": "hi"}, "messages is str, not a list"),
        ({"messages": [{"content": "x"}]}, "message 1 of messages has no role"),
        ({"messages": [{"role": "assistant", "content": 5}]}, "message 1 of messages has a content of int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "contents that are no text"),
        ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "surrogates not allowed"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"x": "\ud83d"}]}]}, "surrogates not"),
        ({"messages": CHAT, "tools": "[" * 100_000}, "nested too deeply"),
        ({"other": 1}, "no field 'messages' (there are other)"),
    ],
)
def test_a_record_without_a_chat_is_malformed_and_the_others_are_read(tmp_path, record, reason):
    write(tmp_path / "x.jsonl", {"messages": CHAT}, record, {"messages": CHAT})
    found = entries(tmp_path, files="x.jsonl")
    (bad,) = [item for item in found if isinstance(item, BadLine)]
    assert (len(found), bad.line) == (3, 2)
    assert reason in bad.reason


@pytest.mark.parametrize("role", [["human"], {"a": 1}, None, "nobody"])
def test_a_turn_from_nobody_is_malformed(role):
    turns = [{"from": role, "value": "x"}, {"from": "gpt", "value": "y"}]
    found = conversation_of({"conversations": turns}, "sharegpt")
    assert isinstance(found, Malformed)
    assert "turn 1 has no `from` of human" in found


# Tokens and what is predicted


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "<eos>\n"), (MARKED, "<eos>")])
def test_only_what_the_assistant_says_is_predicted(template, end):
    tokenizer = tokenizer_with(template)
    encoded = Chats(tokenizer).encode(Conversation(tuple(CHAT)))
    assert predicted_text(tokenizer, encoded) == [f"The best of times.{end}", f"The age of wisdom, 1859.{end}"]
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]


@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
def test_a_prompt_that_ends_in_more_than_the_answers_beginning_hides_nothing_of_a_marked_answer(form):
    """Such as one that ends in <think>, which the answer in the record does not have."""
    thinks = MARKED.replace("'<mark>assistant\n' }}{% endif %}", "'<mark>assistant\n<think>\n' }}{% endif %}")
    tokenizer = tokenizer_with(thinks)
    record = {"messages": CHAT[:3], "prompt": CHAT[:2], "completion": CHAT[2:3]}
    encoded = Chats(tokenizer).encode(conversation_of(record, form))
    assert thinks != MARKED
    assert predicted_text(tokenizer, encoded) == ["The best of times.<eos>"]


def test_a_marked_answer_that_was_given_is_not_predicted():
    tokenizer = tokenizer_with(MARKED)
    record = conversation_of({"prompt": CHAT[:4], "completion": CHAT[4:]}, "prompt_completion")
    assert predicted_text(tokenizer, Chats(tokenizer).encode(record)) == ["The age of wisdom, 1859.<eos>"]


def test_a_marked_template_that_writes_the_prompt_otherwise_before_an_answer_is_refused():
    changes = MARKED.replace("'<mark>' + message['role']", "('<mark>' if loop.last else '<eos>') + message['role']")
    pair = conversation_of({"prompt": "Q", "completion": "A"}, "prompt_completion")
    with pytest.raises(ValueError, match="writes a prompt otherwise once its answer follows"):
        Chats(tokenizer_with(changes)).encode(pair)


def test_tokens_counted_by_hand():
    """<mark> u s e r \\n a b <eos> \\n <mark> assistant \\n c <eos> \\n, with one token a byte but for special ones."""
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        vocab={token: n for token, n in tokenizer.get_vocab().items() if len(token) == 1}, merges=[]
    )
    pair = Conversation(({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}))
    encoded = Chats(tokenizer).encode(pair)
    asked = 1 + len("user\n") + len("ab") + 1 + len("\n") + 1 + len("assistant\n")
    assert len(encoded.ids) == asked + len("c") + 1 + len("\n")
    assert np.flatnonzero(~encoded.given).tolist() == [asked, asked + 1, asked + 2]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_was_given_as_the_prompt_is_not_predicted_even_where_the_assistant_said_it(template):
    tokenizer = tokenizer_with(template)
    encoded = Chats(tokenizer).encode(Conversation(tuple(CHAT), given=4))
    assert [text.strip() for text in predicted_text(tokenizer, encoded)] == ["The age of wisdom, 1859.<eos>"]


def trl_masks(tokenizer, rows, **choices):
    """The rows as TRL's SFTTrainer prepares them."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(output_dir="/tmp/trl", report_to=[], use_cpu=True, max_length=None, bf16=False, **choices)
    trainer = SFTTrainer(tiny_llama(vocab_size=len(tokenizer)), config, train_dataset=datasets.Dataset.from_list(rows),
                         processing_class=tokenizer)  # fmt: skip
    return list(trainer.train_dataset)


def random_chats(count):
    rng = np.random.default_rng(0)
    words = [*LINES[0].split(), "naïve", "café", "—", "12", "ships\n\n", "they'll", "come;", "你好"]
    said = [" ".join(rng.choice(words, rng.integers(1, 40))) for _ in range(8 * count)]
    for n in range(count):
        roles = ["user", "assistant"] * int(rng.integers(1, 5))
        yield [{"role": role, "content": said[8 * n + place]} for place, role in enumerate(roles)]


@pytest.mark.long
def test_two_hundred_chats_have_the_masks_of_trl():
    tokenizer = tokenizer_with(MARKED)
    chats = list(random_chats(200))
    theirs = trl_masks(tokenizer, [{"messages": chat} for chat in chats], assistant_only_loss=True)
    ours = Chats(tokenizer)
    for chat, row in zip(chats, theirs, strict=True):
        encoded = ours.encode(Conversation(tuple(chat)))
        assert encoded.ids.tolist() == row["input_ids"]
        assert (~encoded.given).astype(int).tolist() == [int(label != IGNORED) for label in row["labels"]]


@pytest.mark.long
def test_answers_by_difference_have_the_masks_of_trls_completions():
    tokenizer = tokenizer_with(PLAIN)
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in random_chats(50)]
    theirs = trl_masks(tokenizer, rows)
    for row, their in zip(rows, theirs, strict=True):
        encoded = Chats(tokenizer).encode(conversation_of(row, "prompt_completion"))
        assert encoded.ids.tolist() == their["input_ids"]
        assert (~encoded.given).astype(int).tolist() == [int(label != IGNORED) for label in their["labels"]]


# Templates that do not serve


def test_a_template_that_writes_the_beginning_otherwise_is_refused():
    last_only = PLAIN.replace("message['content']", "(message['content'] if loop.last else 'before')", 1)
    with pytest.raises(ValueError, match=r"does not show where answers stand \(messages are .*\{% generation %\}"):
        Chats(tokenizer_with(last_only)).encode(conversation("user", "assistant", "user", "assistant"))


def test_an_answer_that_shares_a_token_with_its_prompt_is_refused():
    glued = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = tokenizer_with(glued)
    pair = Conversation(({"role": "user", "content": "the worst of tim"}, {"role": "assistant", "content": "es"}))
    with pytest.raises(ValueError, match=r"where answers stand \(an answer shares a token"):
        Chats(tokenizer).encode(pair)


def test_a_template_that_raises_says_why_and_what_to_do():
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
    with pytest.raises(ValueError, match=r"template refuses the chat \(TemplateError: a system message first\): mend"):
        Chats(tokenizer_with(template)).encode(conversation("user", "assistant"))
    with pytest.raises(ValueError, match=r"refuses the chat \(UndefinedError"):
        Chats(tokenizer_with("{{ messages[0].nothing.at_all }}")).encode(conversation("user", "assistant"))


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_message_that_spells_a_special_token_is_text_unless_it_is_to_be_one(template):
    tokenizer = tokenizer_with(template)
    chats, injected = Chats(tokenizer), conversation("user", "assistant", text="naïve <eos>\n<mark>user\n é")
    encoded = chats.encode(injected)
    assert encoded.ids.tolist().count(0) == 2, "the ends of the two turns"
    whole = tokenizer.apply_chat_template(list(injected.messages), tokenize=False)
    assert tokenizer.decode(encoded.ids) == whole
    (answer,) = predicted_text(tokenizer, encoded)
    assert answer.startswith("naïve <eos>\n<mark>user\n é 1<eos>")
    parsed = chats.encode(injected, parse=True)
    assert parsed.ids.tolist() == tokenizer.apply_chat_template(list(injected.messages))["input_ids"]
    assert parsed.ids.tolist().count(0) == 4


def test_tokens_encoded_piece_by_piece_are_those_of_the_whole():
    """A spelled special token makes all text around it be encoded in pieces; the rest must not change by that."""
    tokenizer = tokenizer_with(PLAIN)
    chats, plain = Chats(tokenizer), Conversation(tuple(CHAT))
    apart = Conversation((*CHAT, {"role": "user", "content": "<eos>"}))
    whole, pieces = chats.encode(plain), chats.encode(apart)
    assert pieces.ids[: len(whole.ids)].tolist() == whole.ids.tolist()
    assert pieces.given[: len(whole.ids)].tolist() == whole.given.tolist()


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_blanks_that_a_tokenizer_trims_off_its_offsets_are_in_the_message_that_they_end(template):
    trimming, other = tokenizer_with(template), tokenizer_with(template)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    user, assistant = ({"role": role, "content": "a <eos> b "} for role in ("user", "assistant"))
    chat = Conversation((user, assistant))
    encoded, expected = Chats(trimming).encode(chat), Chats(other).encode(chat)
    assert encoded.ids.tolist() == expected.ids.tolist()
    assert encoded.given.tolist() == expected.given.tolist()


def test_where_special_tokens_swallow_blanks_a_spelled_one_is_refused():
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<wide>", rstrip=True, special=True)]})
    with pytest.raises(ValueError, match="spells a special token, and this tokenizer's swallow blanks"):
        Chats(tokenizer).encode(conversation("user", "assistant", text="<wide>"))


# Packed


def pack(folder, *sources, tokenizer=None, out="out", split=None, **choices):
    (folder / out).mkdir()
    corpus = CorpusRecipe(sources=tuple(SourceRecipe(**one) for one in sources), max_overlap=None, **split or {})
    pack = PackRecipe(**{"seq_len": 64} | choices)
    return pack_corpus(corpus, pack, tokenizer or tokenizer_with(PLAIN), folder / out, base_dir=folder)


def runs_of(folder):
    """(tokens, those that are targets) of each run of the rows."""
    rows = PackedRows(folder)
    batch = rows.batch(range(len(rows)))
    runs = []
    for ids, positions, labels in zip(
        *(batch[name].numpy() for name in ("input_ids", "position_ids", "labels")), strict=True
    ):
        edges = [*np.flatnonzero(positions == 0), len(ids)]
        for a, b in itertools.pairwise(edges):
            assert set(labels[a:b][labels[a:b] != IGNORED]) <= set(ids[a:b])
            runs.append((ids[a:b].tolist(), (labels[a:b] != IGNORED).tolist()))
    return runs


def test_chats_and_texts_are_packed_isolated_each_with_its_own_targets(tmp_path):
    chats = [chat for chat in random_chats(40) if len(chat) == 2 and len(str(chat)) < 200]
    write(tmp_path / "chats.jsonl", *({"messages": chat} for chat in chats))
    (tmp_path / "a.txt").write_text("It was the age of wisdom")
    tokenizer = tokenizer_with(PLAIN)
    summary = pack(tmp_path, {"files": "a.txt", "weight": 3}, {"files": "chats.jsonl"}, {"files": "a.txt"}, seq_len=256)
    runs, encode = runs_of(tmp_path / "out"), Chats(tokenizer)
    text = [*tokenizer("It was the age of wisdom").input_ids, 0]
    assert runs.count((text, [False] + [True] * (len(text) - 1))) == 4
    for chat in chats:
        encoded = encode.encode(Conversation(tuple(chat)))
        assert runs.count((encoded.ids.tolist(), (~encoded.given).tolist())) == 1
    assert summary.chats.count == len(chats)
    assert summary.chats.predicted + 4 * (len(text) - 1) == sum(sum(targets) for _, targets in runs)
    assert sum(one.targets for one in summary.contexts) == sum(sum(targets) for _, targets in runs)
    counts = PackedRows(tmp_path / "out").context_counts()
    assert counts.sum() == sum(sum(targets) for _, targets in runs)
    assert (summary.chats.cut, summary.truncated_tokens) == (0, 0)


@pytest.mark.parametrize("first_token", ["none", "bos", "sink"])
def test_a_chat_longer_than_a_row_is_cut_after_an_answer_and_counted(tmp_path, first_token):
    chat = list(conversation("user", "assistant", "user", "assistant", "user", "assistant").messages)
    lone = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "late"}]
    write(tmp_path / "x.jsonl", {"messages": chat}, {"messages": chat[:2]}, {"messages": lone})
    tokenizer = tokenizer_with("{{- bos_token }}" + PLAIN)
    whole, two, one, late = (
        len(tokenizer.apply_chat_template(part)["input_ids"]) for part in (chat, chat[:4], chat[:2], lone)
    )
    lead = 0 if first_token == "none" else 1
    own = 1 if first_token == "bos" else 0  # the template's own BOS, which the lead replaces
    summary = pack(
        tmp_path, {"files": "x.jsonl"}, tokenizer=tokenizer, seq_len=two - own + lead, first_token=first_token
    )
    rows = PackedRows(tmp_path / "out").batch([0])
    assert rows["input_ids"].shape[1] == two - own + lead
    found = summary.chats
    assert (found.count, found.cut, found.left_out) == (3, 2, 1)
    assert found.cut_tokens == summary.truncated_tokens == whole - two + late - own
    assert found.tokens == two + one - 2 * own
    assert summary.sources[0].left_out == 1


def test_held_out_chats_stay_whole_and_know_what_was_given(tmp_path):
    chat = list(conversation("user", "assistant", "user", "assistant").messages)
    write(tmp_path / "x.jsonl", {"messages": chat, "id": "held"}, {"messages": chat[:2], "id": "kept"})
    tokenizer = tokenizer_with(MARKED)
    pack(tmp_path, {"files": "x.jsonl", "name_field": "id"}, tokenizer=tokenizer, split={"test": ("held",)}, seq_len=40)
    (row,) = datasets.load_from_disk(tmp_path / "out/documents")
    encoded = Chats(tokenizer).encode(Conversation(tuple(chat)))
    assert (row["input_ids"], row["given"]) == (encoded.ids.tolist(), encoded.given.astype(int).tolist())


def test_rows_without_their_sink_keep_the_targets_of_their_chats(tmp_path):
    write(tmp_path / "x.jsonl", *({"messages": chat[:2]} for chat in random_chats(9)))
    for first in ("sink", "none"):
        pack(tmp_path, {"files": "x.jsonl"}, out=first, first_token=first, seq_len=512)
    sink, none = PackedRows(tmp_path / "sink"), PackedRows(tmp_path / "none")
    dropped, plain = sink.batch(range(len(sink)), drop_first=True), none.batch(range(len(none)))
    assert (dropped["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()
    targets = dropped["labels"][dropped["labels"] != IGNORED]
    assert sorted(targets.tolist()) == sorted(plain["labels"][plain["labels"] != IGNORED].tolist())


@pytest.mark.parametrize(
    ("template", "choices", "message"),
    [
        (None, {}, r"contain chats, but the base has no chat template: .* instruct model, or put a chat_template"),
        ("{{ raise_exception('no') }}", {}, r"x\.jsonl:1: the model's chat template refuses the chat"),
        (PLAIN, {"method": "concat"}, r"chats, which pack.method 'concat' would join .* use pack.method 'best_fit'"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_the_first_text_is_tokenized(tmp_path, template, choices, message):
    write(tmp_path / "x.jsonl", {"messages": CHAT})
    (tmp_path / "a.txt").write_text("text")
    seen = []
    (tmp_path / "out").mkdir()
    corpus = CorpusRecipe(sources=(SourceRecipe(files="a.txt"), SourceRecipe(files="x.jsonl")))
    with pytest.raises(ValueError, match=message):
        pack_corpus(corpus, PackRecipe(**{"seq_len": 64} | choices), tokenizer_with(template), tmp_path / "out",
                    base_dir=tmp_path, progress=seen.append)  # fmt: skip
    assert not seen


@pytest.mark.parametrize(
    ("record", "choices", "message"),
    [
        ({"messages": CHAT}, ["finetune.pack.method=concat"], "pack.method 'concat' would join"),
        ({"messages": CHAT}, ["base.source=BASE"], "the base has no chat template"),
        ({"messages": CHAT, "text": "x"}, [], "fit the formats text and messages"),
    ],
)
def test_what_is_known_of_chats_is_refused_by_plan_and_run_before_anything_starts(tmp_path, record, choices, message):
    write(tmp_path / "x.jsonl", record)
    tiny_folder(tmp_path / "base")
    overrides = [f"corpus={{sources: [{{files: '{tmp_path}/x.jsonl'}}]}}", "evaluate={}", "pretrain=null"]
    overrides += [choice.replace("BASE", str(tmp_path / "base")) for choice in choices]
    recipe = load(Path(__file__).with_name("whole.yaml"), overrides).recipe
    with pytest.raises(ValueError, match=message):
        build(recipe)


def test_a_chat_that_the_template_refuses_is_counted_and_the_others_are_packed(tmp_path):
    template = PLAIN + "{% if 'secret' in messages[0]['content'] %}{{ raise_exception('no secrets') }}{% endif %}"
    secret = [{"role": "user", "content": "secret"}, {"role": "assistant", "content": "x"}]
    write(tmp_path / "x.jsonl", *[{"messages": CHAT}] * 9, {"messages": secret})
    source = {"files": "x.jsonl"}
    with pytest.raises(
        ValueError, match=r"1 of 10 documents are malformed.*x\.jsonl:10: the model's chat template refuses"
    ):
        pack(tmp_path, source, tokenizer=tokenizer_with(template), out="a", seq_len=256)
    summary = pack(tmp_path, source, tokenizer=tokenizer_with(template), out="b", seq_len=256,
                   split={"max_bad_fraction": 0.1})  # fmt: skip
    assert (summary.chats.count, summary.bad.count) == (9, 1)


def test_summaries_of_older_corpora_have_no_chats():
    assert pack_summary().chats is None


# Trained


WORDS = """{%- for message in messages %}
{{- ('w2 ' if message['role'] == 'user' else 'w3 ') + message['content'] + ' w4 ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'w3 ' }}{% endif %}"""


def test_held_out_chats_of_a_base_without_a_template_are_no_malformed_entries(tmp_path):
    turns = [{"role": role, "content": "w5 w6"} for role in ("user", "assistant")]
    write(tmp_path / "x.jsonl", *[{"messages": turns}] * 9)
    corpus = CorpusRecipe(sources=(SourceRecipe(files="x.jsonl"),), test=("x.jsonl:1",), max_bad_fraction=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="the base has no chat template"):
        hold_out(corpus, tiny_tokenizer(), tmp_path / "out", base_dir=tmp_path)
    hold_out(corpus, tokenizer_with(PLAIN), tmp_path / "out", base_dir=tmp_path)
    (document,) = datasets.load_from_disk(str(tmp_path / "out" / "documents"))
    assert 0 < sum(document["given"]) < len(document["given"])


def chat_corpus(folder):
    """A tiny base, and chats of words in its tokens, the last two for validation; one is longer than a row of 32."""
    tiny_folder(folder / "base")
    chats = []
    for n in range(12):
        roles = ["user", "assistant"] * (1 + n % 3)
        said = [
            " ".join(f"w{5 + (7 * n + 3 * place + i) % 59}" for i in range(2 + n % 4)) for place in range(len(roles))
        ]
        chats.append([{"role": role, "content": text} for role, text in zip(roles, said, strict=True)])
    chats.append([{"role": role, "content": "w9 w8 " * 10} for role in ["user", "assistant"] * 2])
    write(folder / "x.jsonl", *({"messages": chat, "id": f"c{n:02d}"} for n, chat in enumerate(chats)))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WORDS
    source = {"files": "x.jsonl", "name_field": "id"}
    pack(folder, source, tokenizer=tokenizer, out="corpus", seq_len=32, split={"validation": ("c10", "c12")})
    return chats


@pytest.mark.parametrize("attention", [{}, {"pattern": "shifted_sparse", "group_tokens": 8}], ids=["causal", "s2"])
def test_the_first_loss_is_that_of_answers_alone_in_plain_transformers(tmp_path, attention):
    chats = chat_corpus(tmp_path)
    todo = job(tmp_path, arm={"attention": attention}, optim={"steps": 1, "validate_every_steps": 1})
    train(todo)
    (step,) = steps(todo)
    batch = PackedRows(todo["corpus"]).batch(step["rows"])
    predicted = batch["labels"][:, 1:]
    assert step["targets"] == (predicted != IGNORED).sum() < batch["labels"].numel() / 2
    stretch = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    plain = LlamaForCausalLM.from_pretrained(todo["base"], attn_implementation="eager", rope_parameters=stretch)
    mask = s2_mask(batch["position_ids"], 8 if attention else 1000, heads=4, shifted_from=2)
    with torch.no_grad():
        logits = plain(batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), predicted.flatten()).item()
    assert step["loss"] == pytest.approx(loss, rel=1e-6)  # rounding of float32

    trained = LlamaForCausalLM.from_pretrained(todo["out"])
    whole = " ".join(f"w{2 + place % 2} {message['content']} w4" for place, message in enumerate(chats[10]))
    ids = torch.tensor([tiny_tokenizer()(whole).input_ids])
    rows = validation_rows(tmp_path / "corpus", 8, drop_first=False)
    assert [int((row["labels"] != IGNORED).sum()) for row in rows][
        1
    ] == 32 - 23  # 22 tokens are asked, and w3 opens the answer
    assert rows[0]["input_ids"][0, : ids.shape[1]].tolist() == ids[0].tolist()
    with torch.no_grad():
        losses = [trained(**row).loss.item() for row in rows]
    weights = [int((row["labels"] != IGNORED).sum()) for row in rows]
    assert step["validation_loss"] == pytest.approx(np.average(losses, weights=weights), abs=1e-5)


@pytest.mark.long
def test_ranks_that_share_rows_learn_the_same_answers(tmp_path):
    chat_corpus(tmp_path)
    some = {"arm": {"attention": {"pattern": "shifted_sparse", "group_tokens": 8}}, "optim": {"steps": 2}}
    alone = job(tmp_path, name="alone", **some)
    train(alone)
    parted = job(tmp_path, name="parted", resources={"workers": 2, "sequence_parallel": 2, "zero_stage": 2}, **some)
    run_spawned("longreach.training.loop:train", parted, world=2, folder=tmp_path / "ranks")
    for one, two in zip(steps(alone), steps(parted), strict=True):
        assert (one["rows"], one["targets"], one["tokens"]) == (two["rows"], two["targets"], two["tokens"])
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-5)
