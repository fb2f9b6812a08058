"""A long document with one planted fact, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable

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


def write_document(n_tokens: int, count: Callable[[str], int]) -> str:
    """About `n_tokens` tokens, as `count` counts them, of made-up chronicle; the fact follows a tenth of it."""
    rng = random.Random(0)
    sentences: list[str] = []
    length = count(FACT)
    planted = False
    while length < n_tokens:
        if not planted and length >= n_tokens / 10:
            sentences.append(FACT)
            planted = True
        sentence = _sentence(rng)
        sentences.append(sentence)
        length += count(f" {sentence}")
    return " ".join(sentences)


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
