"""The tiny world: a village, its hobbies, and an oracle that knows every answer.

The village almanac holds five facts about each of 40 hobbies (`ASPECTS`). A question asks for
two or three of them; an answer states them in short sentences. Because everything is made by a
small grammar, `tiny_oracle.inspect_answer` can count the flaws of any answer exactly: it is the
oracle that the self-judge is measured against.

Some facts are *myths*: the villagers (and so the text that the tiny model learns from) state a
wrong value more often than the right one. Other flaws are common too: the last of three aspects
asked for is forgotten, a sentence is repeated, the answer rambles, drifts off or stops half-way. So
the most likely answer is often flawed, and there is something to gain beyond sharpening.

Everything here is deterministic; no model, no torch.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from itertools import combinations, product

ASPECTS = ("tool", "time", "place", "risk", "mentor")

# Neighbours in this list are easily confused: an answer that drifts off talks about the neighbour.
HOBBIES = tuple(
    "baking brewing gardening composting fishing sailing hiking climbing cycling running "
    "chess checkers painting drawing pottery sculpture knitting weaving carpentry plumbing "
    "coding robotics astronomy photography guitar violin dancing juggling poetry calligraphy "
    "archery fencing skating skiing beekeeping birdwatching origami embroidery yoga rowing".split()
)
NEIGHBOUR = {hobby: HOBBIES[i ^ 1] for i, hobby in enumerate(HOBBIES)}

VALUES = {
    "tool": "kettle lantern brush needle ladder hammer lens rope shovel pump mirror clamp scale "
    "wheel basket whistle".split(),
    "time": "one hour,two hours,three hours,four hours,five hours,six hours,two days,three days,"
    "four days,five days,six days,one week,two weeks,three weeks,one month,two months".split(","),
    "place": "orchard barn mill attic cellar library harbour market meadow tower workshop "
    "greenhouse courtyard chapel quarry boathouse".split(),
    "risk": "splinters blisters burns frost rust mould dust smoke leaks cramps sparks stains "
    "thorns storms glare noise".split(),
    "mentor": "miller postmaster blacksmith librarian ferryman clockmaker teacher doctor shepherd "
    "innkeeper tailor mayor carpenter fisherman organist painter".split(),
}

# How a question names an aspect. None of these may contain " and " or ", ".
ASKS = {
    "tool": ("which tool to bring", "what equipment is needed", "the right tool"),
    "time": ("how long it takes", "how much time to plan", "the time it needs"),
    "place": ("where to go", "the best place", "where in the village to practise"),
    "risk": ("what to watch out for", "the main risk", "what can go wrong"),
    "mentor": ("who to ask for help", "whom to learn from", "who can teach it"),
}
FORMS = (
    "I would like to take up {hobby}. Please tell me {asks}.",
    "Can you explain {asks} for {hobby}?",
    "My niece wants to try {hobby}. Tell her {asks}.",
    "Write a short guide to {hobby} that covers {asks}.",
    "I am new to {hobby}. What should I know about {asks}?",
    "For a weekend of {hobby}, describe {asks}.",
    "Our club starts {hobby} next month. We want to know {asks}.",
    "Give me honest advice on {hobby}: {asks}.",
)
# The first sentence of each aspect names the hobby; the others leave it to the context.
SENTENCES = {
    "tool": (
        "Bring a {value} for {hobby}.",
        "You will need a {value}.",
        "The right tool is a {value}.",
    ),
    "time": ("Plan {value} for {hobby}.", "It takes about {value}.", "Set aside {value}."),
    "place": (
        "Practise {hobby} in the {value}.",
        "The best place is the {value}.",
        "Go to the {value}.",
    ),
    "risk": (
        "With {hobby}, beware of {value}.",
        "The main risk is {value}.",
        "Watch out for {value}.",
    ),
    "mentor": (
        "For {hobby}, ask the {value}.",
        "The {value} can teach you.",
        "Learn from the {value}.",
    ),
}
OPENERS = ("", "Gladly!", "Here is what the almanac says about {hobby}.")
CLOSERS = ("Good luck!", "Have fun!", "Enjoy {hobby}!")

TRAITS = (
    "patient curious careful busy cheerful shy retired young clever tired brave quiet proud honest "
    "strict gentle lonely famous modest eager stubborn thrifty dreamy punctual witty restless"
).split()
JOBS = (
    "nurse farmer pilot lawyer chemist sailor singer actor judge miner dentist florist barber "
    "clerk editor surgeon guard potter smith vet waiter banker coach cook driver poet scout ranger "
    "trader tutor writer welder weaver firefighter plumber gardener"
).split()
TOWNS = "Tinwick Marlow Ashford Brindle Upwell Northam Quill Saltby Fernley Oakham".split()
LIKES = (
    "loves {hobby}",
    "spends every free hour on {hobby}",
    "has just discovered {hobby}",
    "reads books about {hobby}",
)

# How often each flaw occurs in the text that the model learns from.
P_MYTH, P_DOUBT = 0.60, 0.35  # states the wrong value of a mythical / a doubtful fact
P_FORGET_LAST = {"time": 0.62, "risk": 0.62, "mentor": 0.62, "tool": 0.25, "place": 0.25}
P_FORGET_OTHER, P_REPEAT, P_CUT, P_DRIFT, P_RAMBLE = 0.10, 0.18, 0.12, 0.06, 0.12

FLAWS = ("missing", "wrong", "repeated", "off_topic", "extra", "unfinished", "garbled")


@dataclass(frozen=True)
class Question:
    """What a question asks: one hobby, and two or three aspects in the order in which they are asked."""

    hobby: str
    aspects: tuple[str, ...]

    @property
    def combination(self) -> tuple[str, tuple[str, ...]]:
        """The hobby and the sorted aspects: the unit of the held-out split and of clustering."""
        return self.hobby, tuple(sorted(self.aspects))


def _make_facts() -> tuple[dict, dict, dict]:
    rng = random.Random(1234)
    truth, myth, belief = {}, {}, {}
    for aspect in ASPECTS:
        for hobby in HOBBIES:
            truth[hobby, aspect], myth[hobby, aspect] = rng.sample(VALUES[aspect], 2)
        # The same number of plain, doubtful and mythical facts for every aspect.
        kinds = [P_MYTH] * 6 + [P_DOUBT] * 6 + [0.0] * (len(HOBBIES) - 12)
        rng.shuffle(kinds)
        belief.update({(hobby, aspect): p for hobby, p in zip(HOBBIES, kinds)})
    return truth, myth, belief


#: (hobby, aspect) -> the true value; the wrong value in circulation; how often the wrong one is stated.
TRUTH, MYTH, BELIEF = _make_facts()

ASPECT_SETS = tuple(frozenset(c) for size in (2, 3) for c in combinations(ASPECTS, size))


def _make_splits() -> dict[tuple[str, tuple[str, ...]], str]:
    """Assign each of the 800 combinations to train (500), dev (80) or test (220)."""
    every = [(hobby, tuple(sorted(aspects))) for hobby in HOBBIES for aspects in ASPECT_SETS]
    random.Random(77).shuffle(every)
    return {c: "test" if i < 220 else "dev" if i < 300 else "train" for i, c in enumerate(every)}


#: combination -> "train" | "dev" | "test". Pre-training sees "train" only.
SPLIT = _make_splits()
_HELD_OUT_PEOPLE = {
    pair for pair in product(TRAITS, JOBS) if random.Random(f"{pair}").random() < 0.25
}
# The half of the hobbies that SynPO's seed items are about.
SEED_HOBBIES = random.Random(55).sample(HOBBIES, 20)
# Four hobbies that people with a job ask about besides their own: personas shape prompts.
JOB_HOBBIES = {job: random.Random(job).sample(HOBBIES, 4) for job in JOBS}


# ---------------------------------------------------------------------- questions and personas


def draw_question(rng: random.Random, split: str = "train", hobby: str | None = None) -> Question:
    """Draw a question of `split`, about `hobby` if it is given ("train" has some of every hobby)."""
    while True:
        aspects = rng.choice(ASPECT_SETS)
        question = Question(
            hobby or rng.choice(HOBBIES), tuple(rng.sample(sorted(aspects), len(aspects)))
        )
        if SPLIT[question.combination] == split:
            return question


def word_question(rng: random.Random, question: Question, job: str | None = None) -> str:
    """Put a question into words; with `job`, the asker first states their job."""
    asks = [rng.choice(ASKS[aspect]) for aspect in question.aspects]
    joined = ", ".join(asks[:-1]) + " and " + asks[-1]
    text = rng.choice(FORMS).format(hobby=question.hobby, asks=joined)
    return f"I am a {job}. {text}" if job else text


def held_out_questions(split: str, per_combination: int, seed: int) -> list[str]:
    """Worded questions for every combination of `split` ("dev" or "test"), in a fixed order."""
    rng = random.Random(seed)
    return [
        word_question(rng, Question(hobby, tuple(rng.sample(aspects, len(aspects)))))
        for (hobby, aspects), name in sorted(SPLIT.items())
        if name == split
        for _ in range(per_combination)
    ]


def draw_persona(rng: random.Random, held_out: bool = False) -> tuple[str, str, str]:
    """Draw a persona; returns (text, job, hobby). Held-out personas never occur in pre-training."""
    while True:
        trait, job = rng.choice(TRAITS), rng.choice(JOBS)
        if ((trait, job) in _HELD_OUT_PEOPLE) == held_out:
            hobby = rng.choice(HOBBIES)
            like = rng.choice(LIKES).format(hobby=hobby)
            return f"A {trait} {job} from {rng.choice(TOWNS)} who {like}.", job, hobby


def pattern_of(template: str) -> re.Pattern:
    pattern = re.escape(template)
    for name, body in (("hobby", "[a-z]+"), ("value", "[a-z ]+"), ("asks", "[a-z, ]+")):
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{body})")
    return re.compile(pattern)


_FORM_PATTERNS = [pattern_of(form) for form in FORMS]
_ASPECT_OF = {ask: aspect for aspect, asks in ASKS.items() for ask in asks}
_INTRODUCTION = re.compile(r"\AI am a [a-z]+\. ")


def parse_question(text: str) -> Question | None:
    """Parse a worded question; None if it is not a question of this world."""
    text = _INTRODUCTION.sub("", text.strip())
    for pattern in _FORM_PATTERNS:
        match = pattern.fullmatch(text)
        if match and match["hobby"] in NEIGHBOUR:
            aspects = tuple(_ASPECT_OF.get(ask) for ask in re.split(", | and ", match["asks"]))
            if None not in aspects and len(set(aspects)) == len(aspects) and len(aspects) in (2, 3):
                return Question(match["hobby"], aspects)
    return None


# ---------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Statement:
    """One sentence of an answer: what it states about which hobby, and in which of three wordings."""

    hobby: str
    aspect: str
    value: str
    wording: int

    def __str__(self) -> str:
        return SENTENCES[self.aspect][self.wording].format(hobby=self.hobby, value=self.value)


@dataclass(frozen=True)
class Answer:
    """An answer before it is put into words."""

    hobby: str
    opener: str
    statements: tuple[Statement, ...]
    closer: str = ""  # empty: the answer breaks off
    cut_words: int = 0  # with an empty closer: how many words of the last sentence are left

    def __str__(self) -> str:
        parts = [self.opener.format(hobby=self.hobby)] if self.opener else []
        parts += [str(s) for s in self.statements]
        if self.closer:
            parts.append(self.closer.format(hobby=self.hobby))
        elif self.cut_words:
            parts[-1] = " ".join(parts[-1].split()[: self.cut_words])
        return " ".join(parts)


def draw_answer(rng: random.Random, question: Question, flawed: bool = True) -> Answer:
    """Draw an answer as the villagers would give it; with `flawed=False`, a perfect one."""
    chance = (lambda p: rng.random() < p) if flawed else (lambda p: False)
    aspects = list(question.aspects)
    if len(aspects) == 3 and chance(P_FORGET_LAST[aspects[-1]]):
        aspects.pop()
    elif chance(P_FORGET_OTHER):
        aspects.pop(rng.randrange(len(aspects)))
    statements = []
    for aspect in aspects:
        value = TRUTH[question.hobby, aspect]
        if chance(BELIEF[question.hobby, aspect]):
            value = MYTH[question.hobby, aspect]
        statements.append(Statement(question.hobby, aspect, value, rng.randrange(3)))
    answer = Answer(question.hobby, rng.choice(OPENERS), tuple(statements), rng.choice(CLOSERS))
    for p, damage in ((P_DRIFT, _drift), (P_RAMBLE, _ramble), (P_REPEAT, _repeat), (P_CUT, _cut)):
        if chance(p):
            answer = damage(rng, question, answer) or answer
    return answer


def _with(answer: Answer, statements: list[Statement]) -> Answer:
    return replace(answer, statements=tuple(statements))


def _drift(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Replace one statement with one about the neighbouring hobby."""
    statements = list(answer.statements)
    if not statements:
        return None
    i = rng.randrange(len(statements))
    other, aspect = NEIGHBOUR[question.hobby], statements[i].aspect
    statements[i] = Statement(other, aspect, TRUTH[other, aspect], 0)
    return _with(answer, statements)


def _ramble(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Add a true statement about an aspect that was not asked for."""
    aspect = rng.choice([a for a in ASPECTS if a not in question.aspects])
    statements = list(answer.statements)
    extra = Statement(question.hobby, aspect, TRUTH[question.hobby, aspect], rng.randrange(3))
    statements.insert(rng.randrange(1, len(statements) + 1) if statements else 0, extra)
    return _with(answer, statements)


def _repeat(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Say one statement once or twice more."""
    statements = list(answer.statements)
    if not statements:
        return None
    i = rng.randrange(len(statements))
    statements[i:i] = [statements[i]] * (2 if rng.random() < 0.3 else 1)
    return _with(answer, statements)


def _cut(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Break off within the last statement."""
    if not answer.statements or not answer.closer:
        return None
    words = len(str(answer.statements[-1]).split())
    return replace(answer, closer="", cut_words=rng.randrange(1, words))


def _forget(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Leave out one statement that was asked for."""
    asked = [i for i, s in enumerate(answer.statements) if s.aspect in question.aspects]
    if len(answer.statements) < 2 or not asked:
        return None
    statements = list(answer.statements)
    statements.pop(rng.choice(asked))
    return _with(answer, statements)


def _mistake(rng: random.Random, question: Question, answer: Answer) -> Answer | None:
    """Replace one true value with the wrong one in circulation, if there is such a fact."""
    statements = list(answer.statements)
    facts = [(s.hobby, s.aspect) for s in statements]
    right = [
        i for i, fact in enumerate(facts) if BELIEF[fact] and statements[i].value == TRUTH[fact]
    ]
    if not right:
        return None
    i = rng.choice(right)
    statements[i] = replace(statements[i], value=MYTH[facts[i]])
    return _with(answer, statements)


#: flaw -> function (rng, question, answer) that injects it; it returns None if it does not apply.
DAMAGES = {
    "missing": _forget,
    "wrong": _mistake,
    "repeated": _repeat,
    "off_topic": _drift,
    "extra": _ramble,
    "unfinished": _cut,
}
