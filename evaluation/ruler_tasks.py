"""RULER's tasks (Hsieh et al., arXiv:2404.06654), generated from a seed without any data files.

A sample is drawn once and can be rendered with any number of pieces of haystack, so the caller fits
it to a length. For RULER's own tasks, prompts and the beginnings of answers are those of RULER's
scripts/data/synthetic, including typing errors. docs/evaluation.md lists the differences.

`no_shared_words` follows NoLiMa (Modarressi et al., arXiv:2502.05167): question and fact share no
word, but are linked by common knowledge ("milks forty cows", "Who is a dairy farmer?"). A search by
words finds nothing there (`found_by_words`). Naming one of the four people at random is right one
time in four.

    python -c "from longreach.evaluation.ruler_tasks import TASKS; print(*TASKS)"
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from longreach.evaluation.lost_in_the_middle import FAMILY, GIVEN, PLACES, WORKS
from longreach.evaluation.passkey import SENTENCES
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_module("numpy")

Kind = Literal[
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa", "no_shared_words"
]
NOISE = " ".join(SENTENCES)
"""RULER's repeated sentences, used as haystack."""
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NEEDLES = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)
NEEDLES_QUESTION = "\nWhat are all the special magic numbers for {keys} mentioned in the provided text?"
NEEDLES_ANSWER = "The special magic numbers for {keys} mentioned in the provided text are"
CHAIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CHAIN_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
CHAIN_ANSWER = (  # "assgined" is RULER's
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are:"
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
COMMON_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
COMMON_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
FREQUENT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
FREQUENT_ANSWER = "Answer: According to the coded text above, the three most frequently appeared words are:"
QA_RULE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
QA = f"{QA_RULE}The following are given documents.\n\n"
QA_QUESTION = f"\n\n{QA_RULE}Question: {{question}}"
QA_DOCUMENT = (
    "The {age} {work} of {place} was begun in {begun} and opened in {opened}. It was designed by {designer}, who had "
    "drawn the plans in a single winter. Visitors remember it for its stone and for the view from its roof."
)
PEOPLE = "Some people are mentioned within the following text. I will quiz you about them afterwards.\n"
PEOPLE_ANSWER = "The name of the person is"

ADJECTIVES = (
    "amber", "ancient", "bitter", "bold", "brave", "brief", "bright", "broad", "calm", "clever", "cold", "crisp",
    "curious", "damp", "dark", "deep", "eager", "early", "empty", "faint", "fancy", "fierce", "flat", "fresh", "gentle",
    "giant", "golden", "grand", "happy", "heavy", "hollow", "honest", "humble", "idle", "jolly", "kind", "late", "lazy",
    "little", "lively", "lonely", "loud", "lucky", "mellow", "modern", "narrow", "noble", "odd", "pale", "patient",
    "plain", "polite", "proud", "quick", "quiet", "rapid", "rare", "rough", "rusty", "silent", "smooth", "steep",
    "sweet", "tidy",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "arrow", "basket", "beacon", "bell", "blanket", "bottle", "branch", "bridge", "brush", "bucket",
    "button", "cabin", "candle", "canoe", "carpet", "castle", "chair", "circle", "cloud", "coin", "copper", "cradle",
    "curtain", "desert", "drum", "engine", "feather", "fence", "finger", "flute", "forest", "garden", "glove", "hammer",
    "harbor", "helmet", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "letter", "meadow", "mirror",
    "mountain", "needle", "orchard", "paper", "pencil", "pepper", "pillow", "planet", "pocket", "ribbon", "river",
    "saddle", "shadow", "spoon", "thunder", "violin", "window",
)  # fmt: skip
AGES = ("old", "new", "upper", "lower", "eastern", "western", "royal", "little")
NAMES = (
    "Anton", "Berit", "Carla", "Dagmar", "Egon", "Frieda", "Gustav", "Hilda", "Ivo", "Jonna", "Kaspar", "Ludmila",
    "Magnus", "Nadia", "Oskar", "Petra", "Quentin", "Ragna", "Stefan", "Tilda", "Ulrich", "Vera", "Wanda", "Yvonne",
)  # fmt: skip
LINKS = (
    ("can see the Eiffel Tower from the bedroom", "Who lives in France?"),
    ("walks along the Great Wall every morning", "Who is at home in China?"),
    ("sells postcards in front of the Taj Mahal", "Who works in India?"),
    ("rents a room beside the Colosseum", "Who is a resident of Italy?"),
    ("pulls teeth and fills cavities all day", "Who is a dentist?"),
    ("crosses the Atlantic in the cockpit of an Airbus twice a week", "Who is a pilot?"),
    ("gets ill from bread because of its gluten", "Who should avoid wheat?"),
    ("has never touched beef, pork or chicken", "Who is a vegetarian?"),
    ("keeps a python and two geckos in a glass tank", "Who likes reptiles?"),
    ("milks forty cows before breakfast", "Who is a dairy farmer?"),
    ("stood on the summit of Everest in May", "Who climbs mountains?"),
    ("photographs Saturn and its rings through a telescope", "Who loves astronomy?"),
    ("has a cello and two violins beside the sofa", "Who is a musician?"),
    ("argues before the judge for clients", "Who is a lawyer?"),
    ("hoses down burning houses", "Who is a firefighter?"),
    ("solves equations and proves theorems", "Who is good at mathematics?"),
)
"""Facts and questions that share no word and are linked by common knowledge. No fact answers two of
the questions."""
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a all an and are as at be by for from give has have i in is it its mentioned name of on or person question "
        "the text that to was what which who with provided",
    )
)


@dataclass(frozen=True)
class Asked:
    """One question about a sample's text."""

    question: str
    opening: str
    """Beginning of the answer, which the model continues."""
    answers: list[str]
    expected: str
    """Continuation of a right answer, for the NLL."""
    fact: int | None = None
    """Number of the fact that has the answer; None if several facts have it."""


@dataclass(frozen=True)
class Sample:
    """A text in n pieces, the facts in it, and the questions about it."""

    head: str
    pieces: Callable[[int], list[str]]
    """Returns the haystack in n pieces."""
    most: int
    """Maximum number of pieces."""
    asked: list[Asked]
    facts: list[tuple[float, str]] = field(default_factory=list)
    """Depth of each fact among the pieces, from 0 to 1, and its text."""
    joiner: str = " "
    least: int = 1
    """Minimum number of pieces for which the question has an answer."""
    numbered: str = ""
    """Format of the prefix of each piece, which takes its number."""

    def shown(self, n: int, moved: tuple[int, float] | None = None) -> list[str]:
        """Return the pieces with the facts inserted.

        moved: number of a fact to move, and its new depth.
        """
        facts = list(self.facts)
        if moved:
            number, depth = moved
            facts[number] = (depth, facts[number][1])
        pieces = self.pieces(n)
        shown: list[str] = []
        done = 0
        for depth, text in sorted(facts, key=lambda fact: fact[0]):
            at = round(depth * len(pieces))
            shown += [*pieces[done:at], text]
            done = at
        return shown + pieces[done:]

    def context(self, n: int, moved: tuple[int, float] | None = None) -> str:
        """Return the text between head and question."""
        shown = self.shown(n, moved)
        if self.numbered:
            shown = [self.numbered.format(number) + piece for number, piece in enumerate(shown, 1)]
        return self.joiner.join(shown)

    def solved(self, n: int) -> str:
        """Return the sample with its answer, as a solved example before another sample."""
        asked = self.asked[0]
        return f"{self.head}{self.context(n)}{asked.question} {asked.opening}{asked.expected}\n\n"


@dataclass(frozen=True)
class Draw:
    """The inputs from which a sample is drawn."""

    chance: np.random.Generator
    pieces: list[str]
    """The haystack, which does not contain an answer."""
    joiner: str
    """Separator between its pieces."""
    length: int
    """Tokens of prompt and answer."""
    questions: int
    """Number of questions about one text."""

    def among(self, head: str, facts: list[str], asked: list[Asked], *, in_order: bool = False) -> Sample:
        """Return a sample with the facts at random places in the haystack.

        in_order: keep the facts in their order.
        """
        depths = self.chance.random(len(facts)).tolist()
        if in_order:
            depths.sort()
        placed = list(zip(depths, facts, strict=True))
        return Sample(head, lambda n: self.pieces[:n], len(self.pieces), asked, placed, self.joiner)

    def words(self, count: int) -> list[str]:
        """Return distinct words, each made of an adjective and a noun."""
        drawn = self.chance.choice(len(ADJECTIVES) * len(NOUNS), count, replace=False).tolist()
        return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in drawn]

    def letters(self, count: int, size: int, alphabet: str) -> list[str]:
        """Return distinct words of random letters."""
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(self.chance.choice(list(alphabet), size))] = None
        return list(found)


def needles(draw: Draw, keys: int, values: int, asked_keys: int) -> Sample:
    """Return facts about some keys with their values, and questions that each ask for the values of
    `asked_keys` keys."""
    names = draw.words(keys)
    numbers = 1_000_000 + draw.chance.choice(9_000_000, (keys, values), replace=False)
    facts = []
    for name, row in zip(names, numbers.tolist(), strict=True):
        for number in row:
            facts.append(NEEDLE.format(key=name, value=number))
    asked = []
    for first in range(0, min(draw.questions * asked_keys, keys), asked_keys):
        wanted = names[first : first + asked_keys]
        answers = list(map(str, numbers[first : first + asked_keys].ravel().tolist()))
        listed = wanted[0]
        if len(wanted) > 1:
            listed = f"{', '.join(wanted[:-1])}, and {wanted[-1]}"
        question, opening = NEEDLES_QUESTION.format(keys=listed), NEEDLES_ANSWER.format(keys=listed)
        if len(answers) == 1:
            question, opening = one_number(question), one_number(opening)
        fact = first if len(answers) == 1 else None
        asked.append(Asked(question, opening, answers, f" {', '.join(answers)}", fact))
    head = NEEDLES if asked_keys * values > 1 else one_number(NEEDLES)
    return draw.among(head, facts, asked)


def one_number(text: str) -> str:
    """Return a prompt about one number instead of several."""
    for many, one in (("Some", "A"), ("are all", "is"), (" are", " is"), ("numbers", "number")):
        text = text.replace(many, one)
    return text


def variable_tracking(draw: Draw) -> Sample:
    """Return a chain of five variables, each assigned from the one before it; all are asked for."""
    example = _chain(draw, 3).solved(5)
    sample = _chain(draw, 5)
    return replace(sample, head=example + sample.head)


def _chain(draw: Draw, letters: int) -> Sample:
    """Return a chain of variables whose names have this many letters."""
    variables = draw.letters(5, letters, string.ascii_uppercase)
    value = int(draw.chance.integers(10_000, 100_000))
    facts = [f"VAR {variables[0]} = {value}"]
    for old, new in pairwise(variables):
        facts.append(f"VAR {new} = VAR {old}")
    opening = CHAIN_ANSWER.format(count=len(variables), value=value)
    asked = Asked(CHAIN_QUESTION.format(value=value), opening, variables, f" {' '.join(variables)}")
    return draw.among(CHAIN, facts, [asked], in_order=True)


def common_words(draw: Draw) -> Sample:
    """Return a list in which ten words occur more often than all others."""
    if draw.length < 4096:  # RULER's own limit and repeats
        example = _word_list(draw, 3, 1).solved(10)
        sample = _word_list(draw, 6, 1)
    else:
        example = _word_list(draw, 10, 3).solved(30)
        sample = _word_list(draw, 30, 3)
    return replace(sample, head=example + sample.head)


def _word_list(draw: Draw, often: int, seldom: int) -> Sample:
    """Return a list with ten words `often` times each, and others `seldom` times each."""
    words = draw.words(len(ADJECTIVES) * len(NOUNS))
    common, others = words[:10], words[10:]
    seed = int(draw.chance.integers(2**32))

    def pieces(n: int) -> list[str]:
        listed = common * often + others[:n] * seldom
        np.random.default_rng(seed).shuffle(listed)
        return listed

    expected = " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))
    asked = Asked(COMMON_QUESTION, COMMON_ANSWER, common, f" {expected}")
    return Sample(COMMON, pieces, len(others), [asked], numbered="{}. ")


def frequent_words(draw: Draw) -> Sample:
    """Return coded words whose frequency is proportional to 1 / rank squared; the three most
    frequent are asked for."""
    words = ["...", *draw.letters(max(8, draw.length // 50), 6, string.ascii_lowercase)]
    seed = int(draw.chance.integers(2**32))

    def pieces(n: int) -> list[str]:
        coded = []
        for rank, word in enumerate(words, 1):
            coded += [word] * int(n / rank**2 / (math.pi**2 / 6))  # the zeta distribution with exponent 2
        np.random.default_rng(seed).shuffle(coded)
        return coded

    asked = Asked(FREQUENT_QUESTION, FREQUENT_ANSWER, words[1:4], f" {' '.join(words[1:4])}")
    return Sample(FREQUENT, pieces, draw.length, [asked], least=100)  # with fewer, ranks have equal counts


def documents(draw: Draw) -> Sample:
    """Return numbered documents about invented buildings, each of which shares words with the
    questions."""
    every = len(AGES) * len(WORKS) * len(PLACES)
    buildings = draw.chance.permutation(every).tolist()
    people = [f"{given} {family}" for given in GIVEN for family in FAMILY]
    designers = draw.chance.permutation(people).tolist()
    texts = []
    asked = []
    for number, building in enumerate(buildings):
        rest, place = divmod(building, len(PLACES))
        names = {"age": AGES[rest // len(WORKS)], "work": WORKS[rest % len(WORKS)], "place": PLACES[place]}
        designer = number
        if number >= draw.questions:  # the designers that are asked for designed nothing else
            designer = draw.questions + number % (len(people) - draw.questions)
        begun, opened = np.sort(draw.chance.integers(1790, 1960, 2)).tolist()
        texts.append(QA_DOCUMENT.format(begun=begun, opened=opened, designer=designers[designer], **names))
        if number < draw.questions:
            question = "who designed the {age} {work} of {place}?".format(**names)
            asked.append(
                Asked(
                    QA_QUESTION.format(question=question),
                    "Answer:",
                    [designers[number]],
                    f" {designers[number]}",
                    number,
                )
            )
    gold, others = texts[: draw.questions], texts[draw.questions :]
    sample = replace(draw, pieces=others, joiner="\n\n").among(QA, gold, asked)
    return replace(sample, numbered="Document {}:\n")


def no_shared_words(draw: Draw) -> Sample:
    """Return facts about four people, and questions that ask for one of them in other words."""
    text = " ".join(draw.pieces).lower()  # answers are searched for like this: Wanda is found in Rwanda
    free = [name for name in NAMES if name.lower() not in text]
    if len(free) < 4:
        raise ValueError(
            f"{len(NAMES) - len(free)} of {len(NAMES)} names already occur in the haystack, but at most "
            f"{len(NAMES) - 4} may: choose other documents, or haystack 'noise'"
        )
    names = draw.chance.permutation(free)[:4].tolist()
    links = draw.chance.permutation(len(LINKS))[:4].tolist()
    facts = []
    asked = []
    for number, (name, link) in enumerate(zip(names, links, strict=True)):
        fact, question = LINKS[link]
        facts.append(f"{name} {fact}.")
        asked.append(Asked(f"\n{question}", PEOPLE_ANSWER, [name], f" {name}", number))
    return draw.among(PEOPLE, facts, asked[: draw.questions])


def string_match_all(text: str, answers: list[str]) -> float:
    """Return the share of the answers that the text contains, ignoring case. This is RULER's rule
    for all tasks but question answering (scripts/eval/synthetic/constants.py)."""
    found = [answer for answer in answers if answer.lower() in text.lower()]
    return len(found) / len(answers)


def string_match_part(text: str, answers: list[str]) -> float:
    """Return 1.0 if the text contains one of the answers, else 0.0. This is RULER's rule for
    question answering."""
    return float(string_match_all(text, answers) > 0)


@dataclass(frozen=True)
class Task:
    """One kind of task."""

    draw: Callable[[Draw], Sample]
    new_tokens: int
    """Maximum number of tokens to generate; RULER's limit for its own tasks."""
    score: Callable[[str, list[str]], float] = string_match_all
    in_haystack: bool = True
    """Whether its text is the chosen haystack; otherwise the task has its own text."""
    questions: int = 1
    """Maximum number of questions about one text."""
    one_fact: bool = False
    """Whether a question asks for a single fact, which can be moved."""


TASKS: dict[Kind, Task] = {
    "niah_single": Task(lambda draw: needles(draw, 1, 1, 1), 128, one_fact=True),
    "niah_multikey": Task(lambda draw: needles(draw, 4, 1, 1), 128, questions=4, one_fact=True),
    "niah_multivalue": Task(lambda draw: needles(draw, 1, 4, 1), 128),
    "niah_multiquery": Task(lambda draw: needles(draw, 4, 1, 4), 128),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120, in_haystack=False),
    "fwe": Task(frequent_words, 50, in_haystack=False),
    "qa": Task(documents, 32, string_match_part, in_haystack=False, questions=4, one_fact=True),
    "no_shared_words": Task(no_shared_words, 16, questions=4, one_fact=True),
}
"""Every task by RULER's name for it, and one task of our own."""


def found_by_words(pieces: list[str], asked: Asked) -> str:
    """Return the pieces that share most words with the question, as many as it has answers; none if
    no piece shares a word. This is a baseline that needs no model."""
    wanted = stems(asked.question)
    shared = []
    for piece in pieces:
        shared.append(len(wanted & stems(piece)))
    most = max(shared)
    best = [piece for piece, count in zip(pieces, shared, strict=True) if count == most > 0]
    return " ".join(best[: len(asked.answers)])


def stems(text: str) -> set[str]:
    """Return the first four letters of each word that is not a stop word."""
    return {word[:4] for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS}
