"""What is said about a scene: captions, instructions, and the scene as text for the nano LM.

All sentences of the nano data sets are made here, so the language model's training text and the
data sets on disk cannot drift apart.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence

from .drawing import WORDS

RESPONSE_PROMPT = "\nAnswer the question using a single word or phrase."
LIST_QUESTION = "What is in the image?"
GROUND_WORDS = ("dark", "dim", "blue", "brown", "fog", "gray", "green", "red")


def a(word: str) -> str:
    """The word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def exist_question(word: str) -> str:
    """POPE's question."""
    return f"Is there {a(word)} in the image?"


def enumeration(words: Collection[str]) -> str:
    """ "A boat, a cup and a star." in the order of WORDS; "Nothing." without words."""
    names = [a(word) for word in WORDS if word in words]
    if not names:
        return "Nothing."
    head, last = ", ".join(names[:-1]), names[-1]
    text = f"{head} and {last}." if head else f"{last}."
    return text[0].upper() + text[1:]


def checklist(words: Collection[str], asked: Iterable[str]) -> str:
    """ "Seen: star yes, moon no." for the asked words."""
    return "Seen: " + ", ".join(f"{w} {'yes' if w in words else 'no'}" for w in asked) + "."


def caption(rng: random.Random, words: Collection[str]) -> str:
    """A stage-1 caption: in one case of four an enumeration, else a checklist of all words.

    Both keep the order of WORDS, so every word of a caption can be told from the image.
    """
    return enumeration(words) if rng.random() < 0.25 else checklist(words, WORDS)


def choose_asked(rng: random.Random, words: Sequence[str], pairs: int) -> list[str]:
    """Words to ask for, half of them present: at most `pairs`, and one absent for each present."""
    present = rng.sample(list(words), min(len(words), pairs // 2))
    asked = present + rng.sample([word for word in WORDS if word not in words], len(present))
    rng.shuffle(asked)
    return asked


def conversation(
    rng: random.Random, words: Sequence[str], pairs: int, prompt: str = RESPONSE_PROMPT
) -> list[tuple[str, str]]:
    """Rounds of question and answer. As in LLaVA's mixture the response prompt stands in the
    first question only ("" leaves it out); one conversation in four ends with the list of all
    objects."""
    rounds = [
        (exist_question(word), "Yes" if word in words else "No")
        for word in choose_asked(rng, words, pairs)
    ]
    question, answer = rounds[0]
    rounds[0] = (question + prompt, answer)
    if rng.random() < 0.25:
        rounds.append((LIST_QUESTION, enumeration(words)))
    return rounds


def map_words(
    rng: random.Random, height: int, width: int, count: int
) -> tuple[list[list[str]], list[str]]:
    """A scene as a map of words, and the words of its objects.

    An object covers 1 to 2 rows and columns; the other cells hold words for the background.
    """
    ground = rng.sample(GROUND_WORDS, 3)
    rows = [[rng.choice(ground) for _ in range(width)] for _ in range(height)]
    taken: set[tuple[int, int]] = set()
    found = []
    for word in rng.sample(WORDS, count):
        tall, wide = rng.choice(((1, 1), (1, 1), (1, 2), (2, 1), (2, 2)))
        top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
        cells = {(top + y, left + x) for y in range(tall) for x in range(wide)}
        if cells & taken:
            continue
        taken |= cells
        found.append(word)
        for y, x in cells:
            rows[y][x] = word
    return rows, found


def map_pieces(rows: Sequence[Sequence[str]], row_end: bool) -> list[str]:
    """The map as pieces of text: each word after a space, a newline after each row if `row_end`."""
    end = ["\n"] if row_end else []
    return [piece for row in rows for piece in [*(f" {word}" for word in row), *end]]


def tokenizer_corpus(rng: random.Random, system: str, lines: int = 3000) -> list[str]:
    """Text in which every word and sentence form of the project occurs often."""
    corpus = []
    for _ in range(lines):
        rows, words = map_words(rng, 4, 6, rng.randint(1, 5))
        rounds = conversation(rng, words, 4)
        talk = "".join(f"USER: {q} ASSISTANT: {answer}" for q, answer in rounds)
        corpus.append(
            f"{system}USER: {''.join(map_pieces(rows, True))}{talk} {checklist(words, WORDS)}"
        )
    return corpus
