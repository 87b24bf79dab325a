"""Read chats and instructions, and tokenise them with the model's own chat template.

Four forms are recognized by their columns (FORMS), or named by a source's `format`:

    messages            messages: [{"role": "user", "content": "..."}, ...], and optionally tools (OpenAI)
    sharegpt            conversations: [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]
    prompt_completion   prompt and completion, each a text or a list of messages
    alpaca              instruction and output; an optional input follows the instruction

A chat is one document, and only what the assistant says is predicted in training. The template's
{% generation %} marks show where that is. A template without marks is rendered twice for each
answer: up to the generation prompt before it, and up to its end. The answer is the difference. Both
texts must be prefixes of the whole rendered chat, which is verified for each answer of each chat.

    chats = Chats(tokenizer)
    chats.encode(Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})))

Reading chats does not import torch, since `longreach plan` imports this module.

    pytest tests/test_training_chats.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longreach.training.corpus_recipe import SourceRecipe
from longreach.training.readers import Malformed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
APART = "\ufdd0"
"""A Unicode noncharacter, reserved for use inside programs, so that it occurs in no text."""
NOT_SHOWN = (
    "the model's chat template does not show where answers stand ({}): mark them in the base's chat_template.jinja by "
    "{{% generation %}} and {{% endgeneration %}}"
)
TEXT = "text"
"""The form of a record that is a document, not a chat."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by the value of ShareGPT's `from`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with roles, as chat templates take them."""

    messages: tuple[Message, ...]
    tools: Any = None  # functions that the assistant may call, as JSON schemas
    given: int = 0
    """Number of leading messages that are given: answers in them are not predicted."""

    def texts(self) -> Iterator[str]:
        """Yield the messages' contents without system messages, which many chats share."""
        for message in self.messages:
            if message["role"] != "system":
                yield f"{message['content']}\n"


def form_of(columns: Collection[str], source: SourceRecipe, where: str) -> str:
    """Return the form of records with these columns: one of FORMS, or TEXT.

    Raises:
        ValueError: the columns fit several forms, and the source's `format` does not name one.
    """
    if source.format != "auto":
        return source.format
    available = set(columns)
    fits = [name for name, form in FORMS.items() if available.issuperset(form.needed)]
    if not fits:
        return TEXT
    if source.text_field in columns:
        fits.insert(0, TEXT)
    if len(fits) > 1:
        raise ValueError(
            f"{where}: the columns {', '.join(map(str, columns))} fit the formats {' and '.join(fits)}: set the "
            f"source's `format` to the one you mean"
        )
    return fits[0]


def conversation_of(record: Mapping[str, Any], form: str) -> Conversation | Malformed:
    """Return the chat in a record that has a form's columns, or a Malformed with the reason."""
    try:
        conversation = FORMS[form].read(record)
        said = [conversation.messages, conversation.tools]
        json.dumps(said, ensure_ascii=False, default=str).encode("utf-8")  # JSON can contain half a surrogate pair
    except RecursionError:
        return Malformed("JSON that is nested too deeply")
    except ValueError as error:
        return Malformed(str(error))
    roles = map(itemgetter("role"), conversation.messages[conversation.given :])
    if "assistant" not in roles:
        return Malformed("a chat without an answer of the assistant: nothing to learn from")
    return conversation


def _messages(record: Mapping[str, Any]) -> Conversation:
    tools = record.get("tools") or None
    if isinstance(tools, str):
        tools = json.loads(tools)
    return Conversation(_listed(record["messages"], "messages"), tools)


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    turns = record["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"conversations is {type(turns).__name__}, not a list")
    for number, turn in enumerate(turns, start=1):
        role = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} has no `from` of {', '.join(ROLES)} and no `value` that is a text")
        messages.append({"role": ROLES[role], "content": turn["value"]})
    return Conversation(tuple(messages))


def _prompt_completion(record: Mapping[str, Any]) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    given = _listed(prompt, "prompt")
    return Conversation((*given, *_listed(completion, "completion")), given=len(given))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    parts = [record["instruction"], record.get("input") or "", record["output"]]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction, input or output is not a text")
    asked = "\n\n".join(filter(None, parts[:2]))
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": parts[2]}))


def _listed(messages: Any, column: str) -> tuple[Message, ...]:
    """Return messages for templates: contents are joined, null fields removed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"{column} is {type(messages).__name__}, not a list")
    listed = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} of {column} has no role")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            texts = []
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    raise ValueError(f"message {number} of {column} has contents that are no text")
                texts.append(part["text"])
            content = "".join(texts)
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} of {column} has a content of {type(content).__name__}, not a text")
        kept = {key: value for key, value in message.items() if value is not None}
        listed.append(kept | {"content": content or ""})
    return tuple(listed)


class Form(NamedTuple):
    """How records represent chats."""

    needed: tuple[str, ...]  # required columns
    also: tuple[str, ...]  # optional columns
    read: Callable[[Mapping[str, Any]], Conversation]
    """Returns the chat in a record. Raises ValueError with the reason if there is none."""


FORMS = {
    "messages": Form(("messages",), ("tools",), _messages),
    "sharegpt": Form(("conversations",), ("system",), _sharegpt),
    "prompt_completion": Form(("prompt", "completion"), (), _prompt_completion),
    "alpaca": Form(("instruction", "output"), ("input",), _alpaca),
}
"""The forms of chats by their name in a source's `format`."""


class Encoded(NamedTuple):
    """The tokens of a chat."""

    ids: np.ndarray  # [tokens] int32
    given: np.ndarray  # [tokens] bool, true for tokens that are not predicted
    cut: int  # number of tokens at the end that were left out because they do not fit


def check_chats(has_template: bool, method: str | None = None) -> None:
    """Raise ValueError if the base has no chat template, or the packing method cannot pack chats."""
    if method not in ("best_fit", None):
        raise ValueError(
            f"corpus.sources contain chats, which pack.method {method!r} would join with the text before them: use "
            f"pack.method 'best_fit'"
        )
    if not has_template:
        raise ValueError(
            "corpus.sources contain chats, but the base has no chat template: start from an instruct model, or put a "
            "chat_template.jinja into the base's folder"
        )


class Chats:
    """Convert chats to tokens, with a tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first: int | None = None) -> None:
        """Take a tokenizer that has a chat template.

        first: the token that packing puts before every document. If the template writes it too, it
            is removed here.
        """
        self.tokenizer, self.first = tokenizer, first
        self.marked = bool(MARKS.search(str(tokenizer.get_chat_template())))
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted((token.content for token in special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.swallows = any(token.lstrip or token.rstrip for token in special)

    def encode(self, conversation: Conversation, most: int | None = None, parse: bool = False) -> Encoded:
        """Return a chat's tokens.

        most: the most tokens to return. A longer chat is cut after the last answer that fits.
        parse: special tokens in a message's text are encoded as these tokens, which can end turns
            and begin others; otherwise they are encoded as ordinary text.

        Raises:
            ValueError: the template fails on the chat, or does not show where answers are.
        """
        if not parse:
            messages = tuple(self._apart(conversation.messages))
            conversation = Conversation(messages, self._apart(conversation.tools), conversation.given)
        if self.marked:
            text, answers = self._by_marks(conversation)
        else:
            text, answers = self._by_prefixes(conversation)
        ids, start_N, end_N = self._tokens(text)
        predicted = np.zeros(len(ids), bool)
        for begin, end in answers:
            if not self.marked and ((start_N < begin) & (begin < end_N)).any():
                raise ValueError(NOT_SHOWN.format("an answer shares a token with the prompt for it"))
            predicted |= (begin < end_N) & (start_N < end)
        if self.first in ids[:1]:
            ids, predicted = ids[1:], predicted[1:]
        if most is None or len(ids) <= most:
            return Encoded(ids, ~predicted, 0)
        ends = 1 + np.flatnonzero(predicted & ~np.append(predicted[1:], False))
        kept = int(ends[ends <= most].max(initial=0))
        return Encoded(ids[:kept], ~predicted[:kept], len(ids) - kept)

    def _apart(self, value: Any) -> Any:
        """Return a message with APART inside each special token that its text contains."""
        if isinstance(value, str):
            return self.special.sub(lambda found: found[0][0] + APART + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._apart(one) for key, one in value.items()}
        if isinstance(value, Sequence):
            return [self._apart(one) for one in value]
        return value

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of a rendered text, and the start and end of each, [N] each."""
        if APART not in text:
            return self._encode(text, as_text=False)
        if self.swallows:
            raise ValueError(
                "a message spells a special token, and this tokenizer's swallow blanks beside them: leave it out, or "
                "take it for the token by `special_tokens: parse`"
            )
        parts, at = [], 0
        for piece in re.split(f"({self.special.pattern})", text):  # only the template's special tokens match
            ids, start_N, end_N = self._encode(piece.replace(APART, ""), as_text=not self.special.fullmatch(piece))
            kept = np.array([at + place for place, char in enumerate(piece) if char != APART], np.int64)
            at += len(piece)
            kept = np.append(kept, at)  # for a token at the end whose offsets are empty: its blanks were trimmed
            ends_N = np.where(start_N < end_N, 1 + kept[end_N - 1], kept[start_N])
            parts.append((ids, kept[start_N], ends_N))
        ids, start_N, end_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, start_N, end_N

    def _encode(self, text: str, as_text: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of a text, and the start and end of each.

        as_text: special tokens in the text are encoded as ordinary text.
        """
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_text)
        start_N, end_N = np.array(out["offset_mapping"], np.int64).reshape(-1, 2).T
        return np.array(out["input_ids"], np.int32), start_N, end_N

    def _render(self, conversation: Conversation, *, asks: bool = False, marks: bool = False) -> tuple[str, list[Span]]:
        """Return the text that the template renders, and the spans between its generation marks.

        asks: add the generation prompt at the end.
        marks: return the spans; otherwise the list is empty.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(conversation.messages)],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=asks,
                **special,
            )
        except Exception as error:  # a template can raise anything: jinja2's errors, TypeErrors
            raise ValueError(
                f"the model's chat template refuses the chat ({type(error).__name__}: {error}): mend the chat, leave "
                f"it out, or change the base's chat_template.jinja"
            ) from error
        (text,), spans = rendered  # annotated as str, but it is the texts and the marked spans of each
        return text, spans[0] if marks else []

    def _by_marks(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the rendered text, and the spans of its answers, which the template marks."""
        text, spans = self._render(conversation, marks=True)
        first = 0
        if conversation.given:
            given = Conversation(conversation.messages[: conversation.given], conversation.tools)
            before, _ = self._render(given)
            if not text.startswith(before):
                raise ValueError(
                    "the model's chat template writes a prompt otherwise once its answer follows, so that the prompt's "
                    "end is not found: change the base's chat_template.jinja, or give whole chats as `messages`"
                )
            first = len(before)
        return text, [(begin, end) for begin, end in spans if begin >= first]

    def _by_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the rendered text, and the spans of its answers, found by rendering prefixes."""
        whole, _ = self._render(conversation)
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant" or number < conversation.given:
                continue
            asked = Conversation(conversation.messages[:number], conversation.tools)
            answered = Conversation(conversation.messages[: number + 1], conversation.tools)
            before, after = self._render(asked, asks=True)[0], self._render(answered)[0]
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(NOT_SHOWN.format("messages are written otherwise once others follow"))
            spans.append((len(before), len(after)))
        return whole, spans
