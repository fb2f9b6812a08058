"""Items made up on the spot, from a seed: what `refreekv eval` runs on without any data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence

from refreekv_cpp._suggest import did_you_mean
from refreekv_cpp.document import write_document
from refreekv_cpp.lab.eval.data import Item, Question

Count = Callable[[str], int]

# phrases, because the smallest models copy them rightly
_COLOURS = ["silver", "crimson", "amber", "violet", "ivory", "scarlet", "golden", "purple", "emerald", "copper"]
_ANIMALS = ["heron", "badger", "falcon", "otter", "lizard", "beaver", "raven", "walrus", "panther", "turtle"]
_KEEPERS = ["lighthouse keeper", "harbour master", "old miller", "bell ringer", "ferryman", "clockmaker"]
_HOUSES = ["town hall", "customs house", "school", "fish market", "brewery", "library"]


def needles(lengths: Sequence[int], depths: Sequence[float], count: Count, *, seed: int) -> Iterator[Item]:
    """A fact at each depth of a chronicle of each length, and a question about it."""
    for length in lengths:
        for depth in depths:
            name = f"needle/{length}/{depth:g}/{seed}"
            rng = random.Random(name)
            fact, question = _password(rng)
            document = write_document(length, count, facts=[(depth, fact)], seed=rng.randrange(2**32))
            meta = {"depth": depth, "length": length}
            yield Item(name, "needle", document, question, "found", meta=meta)


def two_questions(lengths: Sequence[int], depths: Sequence[float], count: Count, *, seed: int) -> Iterator[Item]:
    """Two facts in a chronicle; once the first has been asked for, so is the second. Depths are the second one's."""
    for length in lengths:
        for depth in depths:
            name = f"two-questions/{length}/{depth:g}/{seed}"
            rng = random.Random(name)
            fact, question = _password(rng)
            other_fact, second = _motto(rng)
            far = (depth + 0.5) % 1
            document = write_document(
                length, count, facts=[(far, fact), (depth, other_fact)], seed=rng.randrange(2**32)
            )
            meta = {"depth": depth, "length": length}
            yield Item(name, "two-questions", document, question, "found", second, meta)


def pairs(lengths: Sequence[int], depths: Sequence[float], count: Count, *, seed: int) -> Iterator[Item]:
    """A JSON object of random keys and values, and a question for the value at each depth."""
    for length in lengths:
        for depth in depths:
            name = f"pairs/{length}/{depth:g}/{seed}"
            rng = random.Random(name)
            keys_values = {_hex(rng): _hex(rng)}
            per_pair = max(count(json.dumps(keys_values)), 1)
            keys_values |= {_hex(rng): _hex(rng) for _ in range(max(length // per_pair, 2))}
            key, value = list(keys_values.items())[round(depth * (len(keys_values) - 1))]
            question = Question(f'What is the value for the key "{key}" in the JSON object?', (value,))
            meta = {"depth": depth, "length": length}
            yield Item(name, "pairs", json.dumps(keys_values, indent=0), question, "found", meta=meta)


def facts(n: int, *, seed: int) -> list[tuple[str, Question]]:
    """So many different facts as sentences, each with a question about it; 12 at most."""
    rng = random.Random(f"facts/{seed}")
    made = [_password(rng, keeper) for keeper in _KEEPERS] + [_motto(rng, house) for house in _HOUSES]
    return rng.sample(made, n)


def _password(rng: random.Random, keeper: str | None = None) -> tuple[str, Question]:
    keeper = keeper or rng.choice(_KEEPERS)
    secret = _phrase(rng)
    question = f"What is the secret password of the {keeper}? Repeat the sentence that says it."
    return f'The secret password of the {keeper} is "{secret}".', Question(question, (secret,))


def _motto(rng: random.Random, house: str | None = None) -> tuple[str, Question]:
    house = house or rng.choice(_HOUSES)
    motto = _phrase(rng)
    question = f"Which words are carved above the door of the {house}? Repeat the sentence that says it."
    return f'The words carved above the door of the {house} are "{motto}".', Question(question, (motto,))


def _phrase(rng: random.Random) -> str:
    return f"{rng.choice(_COLOURS)} {rng.choice(_ANIMALS)}"


def _hex(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"


Generator = Callable[..., Iterator[Item]]
GENERATORS: dict[str, Generator] = {"needle": needles, "pairs": pairs, "two-questions": two_questions}


def generate(
    names: Sequence[str], lengths: Sequence[int], depths: Sequence[float], count: Count, *, seed: int
) -> list[Item]:
    """Items of these generators.

    Args:
        lengths: of the context, in tokens as `count` counts them.
        depths: of what is asked for, 0 to 1.
    """
    return [item for name in names for item in GENERATORS[name](lengths, depths, count, seed=seed)]


def check_names(names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there is no such generator.
    """
    for name in names:
        if name not in GENERATORS:
            hint = did_you_mean(name, GENERATORS) or ";"
            raise ValueError(f"generator {name!r}: unknown{hint} must be one of {', '.join(GENERATORS)}")
