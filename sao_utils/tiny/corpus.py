"""What the tiny model reads during pre-training: chats made from the tiny world's grammar.

Four kinds of items: answering a question (with the villagers' flaws), guessing a persona's
question, guessing a question without a persona, and ranking two answers with the paper's prompt. All
of them use only training combinations and training personas.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from sao_utils import templates
from sao_utils.oracles import tiny_world as world
from sao_utils.oracles.tiny_oracle import Inspection, answer_pair, inspect_answer

# Without a persona, most questions are about a few favourite hobbies: it is personas that vary prompts.
FAVOURITES = world.HOBBIES[::8]


@dataclass(frozen=True)
class Item:
    """One chat turn and its reply.

    `answers` lists the answers inside it, for the auxiliary losses of pre-training: where each starts
    in the text user + reply, the answer itself, and what the oracle found in it.
    """

    user: str
    reply: str
    answers: tuple[tuple[int, str, Inspection], ...] = field(default=())
    is_ranking: bool = False


def answer_item(rng: random.Random) -> Item:
    """A question and an answer as the villagers would give it."""
    question = world.draw_question(rng)
    job = rng.choice(world.JOBS) if rng.random() < 0.3 else None
    user = world.word_question(rng, question, job)
    reply = str(world.draw_answer(rng, question))
    return Item(user, reply, ((len(user), reply, inspect_answer(question, reply)),))


def prompt_item(rng: random.Random) -> Item:
    """The paper's persona template (or, one time in five, ours without a persona) and a question."""
    if rng.random() < 0.2:
        hobby = rng.choice(FAVOURITES) if rng.random() < 0.8 else None
        question = world.draw_question(rng, hobby=hobby)
        return Item(
            templates.render("no_persona"), "User prompt: " + world.word_question(rng, question)
        )
    persona, job, own_hobby = world.draw_persona(rng)
    hobby = own_hobby if rng.random() < 0.6 else rng.choice(world.JOB_HOBBIES[job])
    question = world.draw_question(rng, hobby=hobby)
    text = world.word_question(rng, question, job if rng.random() < 0.4 else None)
    return Item(templates.render("persona", persona=persona), "User prompt: " + text)


def ranking_item(rng: random.Random) -> Item:
    """The paper's ranking prompt for two answers, and the oracle's verdict."""
    question = world.draw_question(rng)
    job = rng.choice(world.JOBS) if rng.random() < 0.3 else None
    pair = answer_pair(rng, question)
    user = templates.ranking_prompt(world.word_question(rng, question, job), *pair)
    inspections = [inspect_answer(question, text) for text in pair]
    verdict = templates.VERDICTS[0 if inspections[0].quality > inspections[1].quality else 1]
    starts = [user.index(f"<Response {k}> ") + len("<Response 1> ") for k in (1, 2)]
    answers = tuple(zip(starts, pair, inspections))
    return Item(user, templates.VERDICT_PREFIX + verdict, answers, is_ranking=True)
