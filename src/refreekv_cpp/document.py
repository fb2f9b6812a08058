"""A long document with planted facts, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# a quoted phrase among sentences without numbers: the smallest models find it, and copy it rightly
SECRET = "silver heron"
FACT = f'The secret password of the lighthouse keeper is "{SECRET}".'
QUESTION = "What is the secret password of the lighthouse keeper? Repeat the sentence that says it."

_TOWNS = ["Ostermoor", "Velling", "Harrowby", "Kestrel Bay", "Dunmere", "Lindhaven", "Pellworth", "Sandrigg", "Torvik"]
_SHIPS = ["Grey Petrel", "Marigold", "Northern Star", "Copper Fox", "Lady Anselm", "Swift Otter", "Old Faithful"]
_NAMES = ["Ansel Brook", "Mira Tolland", "Jorun Hale", "Petra Quill", "Osric Vane", "Tilda Marsh", "Edwin Sorrel"]
_GOODS = ["salt", "barley", "wool", "lamp oil", "dried fish", "copper wire", "honey", "linen", "roof slates"]
_MONTHS = ["January", "March", "April", "June", "August", "September", "November"]
_SENTENCES = [
    "In {month} the ship {ship} left {town} with a load of {goods}.",
    "The merchant {name} of {town} sold {goods} to the crew of the {ship}.",
    "A storm kept the {ship} in the harbour of {town} for most of {month}.",
    "The people of {town} traded {goods} for {other_goods} every {month}.",
    "{name} came from {town} and mended the sails of the {ship}.",
    "That winter {name} stored {goods} in a cellar at {town}.",
    "The {ship} carried {goods} to {town}, where {name} met her.",
    "{name} wrote to {other_name} that the price of {goods} had gone up in {town}.",
]


def write_document(
    n_tokens: int,
    count: Callable[[str], int],
    *,
    facts: Sequence[tuple[float, str]] = ((0.1, FACT),),
    seed: int = 0,
) -> str:
    """About `n_tokens` tokens, as `count` counts them, of made-up chronicle with facts among its sentences.

    Args:
        facts: each a depth, 0 (it comes first) to 1 (last), and a sentence. By default FACT, after a tenth.
    """
    rng = random.Random(seed)
    sentences: list[str] = []
    waiting = sorted(facts)
    length = sum(count(fact) for _, fact in facts)
    while length < n_tokens:
        while waiting and length >= waiting[0][0] * n_tokens:
            sentences.append(waiting.pop(0)[1])
        sentence = _sentence(rng)
        sentences.append(sentence)
        length += count(f" {sentence}")
    return " ".join([*sentences, *(fact for _, fact in waiting)])


def _sentence(rng: random.Random) -> str:
    name, other_name = rng.sample(_NAMES, 2)
    goods, other_goods = rng.sample(_GOODS, 2)
    return rng.choice(_SENTENCES).format(
        town=rng.choice(_TOWNS),
        ship=rng.choice(_SHIPS),
        month=rng.choice(_MONTHS),
        name=name,
        other_name=other_name,
        goods=goods,
        other_goods=other_goods,
    )
