"""What native/ and llama.cpp are held against: the method and the model, written down a second time.

NumPy in double precision, loops where they read better than arrays, and nothing taken from the C++. The method is that
of arXiv 2502.16886, section 3, with the variants that `refreekv_cpp.policies.ReFreeKV` describes; its rivals are what
docs/reference/policies.md says of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from refreekv_cpp import H2O, Policy, PyramidKV, ReFreeKV, SnapKV, Streaming, TopP

Array = npt.NDArray[np.float64]


# -- the policies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What a policy decides on the cells 0 .. n-1 of a layer, in position order."""

    order: list[int]  # the cells, the most important first
    counts: list[int]  # how many of them may stay, ascending
    n_keep: int  # how many do
    losses: Array | None = None  # losses[k]: the part of the measure that is lost when order[:k] stays
    scores: Array | None = None  # by which a ranking sorts
    threshold: float = 0.0  # what may be lost

    @property
    def kept(self) -> list[int]:
        return sorted(self.order[: self.n_keep])


def select(policy: Policy, attention: Array, n_block: int, layer: int = 0, n_layer: int = 1) -> Selection:
    """The policy on attention rows [n_head, n_rows, n_cells] of a layer, rows oldest first."""
    n_cells = attention.shape[2]
    if isinstance(policy, Streaming):
        return select_streaming(policy, n_cells, n_block)

    attention = np.asarray(attention, dtype=np.float64)
    if isinstance(policy, PyramidKV):
        return select_snapkv(policy, attention, pyramid_budget(policy, n_cells, layer, n_layer), n_block)
    if isinstance(policy, SnapKV):
        return select_snapkv(policy, attention, cells_of(policy.budget, n_cells), n_block)
    if isinstance(policy, H2O):
        return select_h2o(policy, attention, n_block)
    if isinstance(policy, TopP):
        return select_top_p(policy, attention, n_block)
    assert isinstance(policy, ReFreeKV)
    return select_refreekv(policy, attention, n_block)


def select_refreekv(policy: ReFreeKV, attention: Array, n_block: int) -> Selection:
    n_cells = attention.shape[2]

    scores = None
    if policy.ranking == "position":
        first = sinks_then_latest(n_cells, policy.n_sink, n_recent=1)
        order = sinks_then_latest(n_cells, policy.n_sink, n_recent=n_cells)
    else:
        scores = pooled_scores(attention, policy.n_pool)
        first = sinks_then_latest(n_cells, policy.n_sink, policy.n_recent)
        order = by_score(first, scores)

    losses = prefix_losses(policy, attention, order)
    counts = allowed_counts(n_cells, max(1, len(first)), n_block)

    # the shortest prefix that loses no more than the threshold, rounded up to a count that is allowed
    shortest = min(k for k in range(n_cells + 1) if losses[k] <= policy.threshold)
    n_keep = min(count for count in counts if count >= shortest)
    return Selection(order, counts, n_keep, losses, scores, policy.threshold)


def select_streaming(policy: Streaming, n_cells: int, n_block: int) -> Selection:
    n_budget = cells_of(policy.budget, n_cells)
    n_first = len(sinks_then_latest(n_cells, policy.n_sink, n_recent=1))
    order = sinks_then_latest(n_cells, policy.n_sink, n_recent=n_cells)
    counts = allowed_counts(n_cells, max(n_first, n_budget), n_block)
    return Selection(order, counts, counts[0])


def select_snapkv(policy: SnapKV, attention: Array, n_budget: int, n_block: int) -> Selection:
    n_cells = attention.shape[2]
    n_before = max(0, n_cells - policy.n_window)  # cells before the window
    mean = attention.mean(axis=(0, 1))[:n_before]
    reach = policy.n_pool // 2
    scores = np.zeros(n_cells)
    for cell in range(n_before):
        near = mean[max(0, cell - reach) : cell + reach + 1]
        scores[cell] = near.max() if policy.pooling == "max" else near.sum() / policy.n_pool
    return select_the_best(sinks_then_latest(n_cells, 0, policy.n_window), scores, n_budget, n_block)


def pyramid_budget(policy: PyramidKV, n_cells: int, layer: int, n_layer: int) -> int:
    n_window = min(policy.n_window, n_cells)
    mean = Fraction(max(0, cells_of(policy.budget, n_cells) - n_window))
    last = mean / policy.beta
    first = 2 * mean - last
    if first > n_cells - n_window:
        first = Fraction(n_cells - n_window)
        last = 2 * mean - first
    way_down = Fraction(layer, n_layer - 1) if n_layer > 1 else Fraction(1, 2)
    return n_window + math.ceil(first + (last - first) * way_down)


def select_h2o(policy: H2O, attention: Array, n_block: int) -> Selection:
    n_cells = attention.shape[2]
    n_budget = cells_of(policy.budget, n_cells)
    recent = sinks_then_latest(n_cells, 0, max(1, n_budget // 2))
    return select_the_best(recent, attention.sum(axis=1).mean(axis=0), n_budget, n_block)


def select_the_best(first: list[int], scores: Array, n_budget: int, n_block: int) -> Selection:
    counts = allowed_counts(len(scores), max(len(first), n_budget), n_block)
    return Selection(by_score(first, scores), counts, counts[0], scores=scores)


def select_top_p(policy: TopP, attention: Array, n_block: int) -> Selection:
    n_cells = attention.shape[2]
    scores = attention.mean(axis=(0, 1))
    first = sinks_then_latest(n_cells, 0, policy.n_window)
    order = by_score(first, scores)
    mass = np.concatenate([[0], np.cumsum(scores[order])])
    losses = lost_part(mass, 0)
    threshold = float(1 - Fraction(str(policy.p)))
    counts = allowed_counts(n_cells, len(first), n_block)
    n_keep = min(count for count in counts if losses[count] <= threshold)
    return Selection(order, counts, n_keep, losses, scores, threshold)


def cells_of(budget: float, n_cells: int) -> int:
    as_written = Fraction(str(budget))  # 0.07 of 100 is 7
    return min(n_cells, math.ceil(as_written * n_cells) if as_written <= 1 else int(as_written))


def by_score(first: list[int], scores: Array) -> list[int]:
    """These cells, then the rest, the highest score first; of equals the earlier."""
    rest = sorted(set(range(len(scores))) - set(first))
    return first + sorted(rest, key=lambda cell: (-scores[cell], cell))


def sinks_then_latest(n_cells: int, n_sink: int, n_recent: int) -> list[int]:
    """The first cells, then the last ones, from the last backwards."""
    sinks = list(range(min(n_sink, n_cells)))
    latest = list(range(n_cells - 1, max(n_cells - n_recent, len(sinks)) - 1, -1))
    return sinks + latest


def allowed_counts(n_cells: int, n_min: int, n_block: int) -> list[int]:
    """Cells leave in whole blocks of n_block, and n_min of them never do."""
    counts = []
    n_left = n_cells
    while n_left >= n_min:
        counts.append(n_left)
        n_left -= n_block
    return counts[::-1] or [n_cells]


def pooled_scores(attention: Array, n_pool: int) -> Array:
    """The highest mean attention of any head, then of any neighbour: [n_cells]."""
    score = attention.mean(axis=1).max(axis=0)
    reach = n_pool // 2
    return np.array([score[max(0, cell - reach) : cell + reach + 1].max() for cell in range(len(score))])


def prefix_losses(policy: ReFreeKV, attention: Array, order: Sequence[int]) -> Array:
    """losses[k]: the part of the measure that is lost when just order[:k] stays: [n_cells + 1]."""
    n_head, n_rows, _ = attention.shape
    looked_at = [n_rows - 1] if policy.rows == "last" else range(n_rows)
    by_rank = np.array(order)

    measures = []  # of each prefix, for each row in each head
    for head in range(n_head):
        for row in looked_at:
            weights = attention[head, row].copy()
            if not policy.sinks_in_measure:
                weights[: policy.n_sink] = 0
            weights = weights[by_rank]
            norm = policy.measure == "norm"
            measure = np.sqrt(np.cumsum(weights**2)) if norm else np.cumsum(weights)
            measures.append(np.concatenate([[0], measure]))

    floor = policy.mass_floor if policy.measure == "mass" else 0
    if policy.rows == "worst":
        return np.max([lost_part(measure, floor) for measure in measures], axis=0)
    return lost_part(np.mean(measures, axis=0), floor)


def lost_part(measure: Array, floor: float) -> Array:
    whole = measure[-1]
    against = max(whole, floor)
    return (whole - measure) / against if against > 0 else np.zeros_like(measure)


# -- attention ---------------------------------------------------------------------------------------------------------


def attention_rows(queries: Array, query_pos: Array, keys: Array, key_pos: Array, scale: float) -> Array:
    """Softmax rows [n_head, n_queries, n_keys] of queries [n_queries, n_head, d] and keys [n_keys, n_head_kv, d].

    A query sees the keys at its own position and before. Query heads share KV heads in consecutive groups.
    """
    n_head, n_head_kv = queries.shape[1], keys.shape[1]
    hidden = key_pos[None, :] > query_pos[:, None]

    rows = []
    for head in range(n_head):
        key = keys[:, head // (n_head // n_head_kv)].astype(np.float64)
        logits = queries[:, head].astype(np.float64) @ key.T * scale
        logits[hidden] = -np.inf
        rows.append(softmax(logits))
    return np.array(rows)


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# -- codes -------------------------------------------------------------------------------------------------------------


def encode(rows: Array, bits: int) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Of rows [n_cells, n_channels] of a block: each channel's least number, its step, and the codes of rows."""
    rows = rows.astype(np.float32)
    n_steps = np.float32(2**bits - 1)
    least = rows.min(axis=0).astype(np.float16).astype(np.float32)
    step = ((rows.max(axis=0) - rows.min(axis=0)) / n_steps).astype(np.float16).astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    codes = np.clip((rows - least) * inverse + np.float32(0.5), 0, n_steps).astype(np.int64)
    return least.astype(np.float64), step.astype(np.float64), codes


def coded(rows: Array, bits: int) -> Array:
    """What the codes of rows [n_cells, n_channels] stand for, in blocks of 64 cells."""
    res = np.empty(rows.shape)
    for first in range(0, len(rows), 64):
        least, step, codes = encode(rows[first : first + 64], bits)
        res[first : first + 64] = least + step * codes
    return res


SPAN = 512
"""Cells in codes whose reads have a common budget."""


def rows_for_theta(estimate: Array, coded_cells: npt.NDArray[np.bool_], theta: float) -> npt.NDArray[np.bool_]:
    """The cells whose rows are read: those that one of the heads of a KV head gives theta of its attention.

    Args:
        estimate: attention of the heads by the codes, [n, n_cells].
        coded_cells: which cells are in codes.
    """
    read = np.zeros(len(coded_cells), dtype=bool)
    places = np.flatnonzero(coded_cells)
    budget = max(16, max(0.1, 1 / max(1, -(-len(places) // SPAN))) / theta)  # of a span
    for first in range(0, len(places), SPAN):
        cells, least = places[first : first + SPAN], theta
        while (estimate[:, cells] >= least).any(axis=0).sum() > budget:
            least *= 2  # too many for one token
        read[cells] = (estimate[:, cells] >= least).any(axis=0)
    return read


def rows_for_max_error(estimate: Array, excess: Array, theta: float, max_error: float) -> npt.NDArray[np.bool_]:
    """As `rows_for_theta`, and as few more as leave no more than `max_error` of products with `excess`.

    Args:
        excess: e^bound - 1 of each logit, 0 for cells that are not in codes, [n, n_cells].
    """
    product = estimate * excess
    read = (estimate >= theta) & (excess > 0)
    for head in range(len(product)):
        order = np.argsort(product[head])
        least_sum = (estimate[head] / (1 + excess[head])).sum()  # once rows have been read
        read[head, order[np.cumsum(product[head, order]) > max_error * least_sum]] = True
    return (read & (excess > 0)).any(axis=0)


def logit_bounds(queries: Array, keys: Array, bits: int) -> Array:
    """How far products of queries with keys [n_cells, d] by their codes can be off: [n, n_cells]."""
    steps = np.empty(keys.shape)
    for first in range(0, len(keys), 64):
        steps[first : first + 64] = encode(keys[first : first + 64], bits)[1]
    unit = np.abs(queries * steps.max(axis=0)).max(axis=1) / 127  # products of queries and steps are rounded to it
    return (np.abs(queries) @ steps.T + unit[:, None] * keys.shape[1] * (2**bits - 1) / 2) / 2


def misplaced(queries: Array, keys: Array, seen_keys: Array, scale: float) -> float:
    """The largest part of a head's attention that is elsewhere with the keys that it sees."""
    exact, seen = (softmax(queries @ k.T * scale) for k in (keys, seen_keys))
    return float(np.abs(exact - seen).sum(axis=1).max() / 2)


# -- the model ---------------------------------------------------------------------------------------------------------


class LlamaReference:
    """A llama-architecture GGUF, read and run. Its cache keeps every key and value; what is evicted from a layer is
    only hidden there, from the queries that come after."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def number(key: str, default: float | None = None) -> float:
            field = reader.get_field(f"llama.{key}")
            if field is None and default is not None:
                return default
            assert field is not None, key
            return field.contents()

        n_embd = int(number("embedding_length"))
        self.n_layer = int(number("block_count"))
        self.n_head = int(number("attention.head_count"))
        self.n_head_kv = int(number("attention.head_count_kv"))
        self.n_embd_head = int(number("attention.key_length", n_embd / self.n_head))
        self.eps = number("attention.layer_norm_rms_epsilon")
        self.rope_base = number("rope.freq_base", 10000.0)

        self.weights: dict[str, Array] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }

        shape = (0, self.n_head_kv, self.n_embd_head)
        self.keys = [np.empty(shape) for _ in range(self.n_layer)]
        self.values = [np.empty(shape) for _ in range(self.n_layer)]
        self.hidden = [np.empty(0, dtype=bool) for _ in range(self.n_layer)]
        self.warm: dict[int, tuple[npt.NDArray[np.int64], int, int, float]] = {}  # see put_away
        self.n_read = 0
        self.worst = 0.0  # part of a head's attention that was misplaced
        self.last_queries: list[Array] = []  # of each layer, [n_tokens, n_head, n_embd_head], of the last read()

    def copy(self) -> LlamaReference:
        res = copy.copy(self)
        res.keys, res.values, res.hidden = list(self.keys), list(self.values), list(self.hidden)
        res.warm = dict(self.warm)
        return res

    def keep(self, layer: int, positions: Iterable[int]) -> None:
        """From now on no query sees anything else of what this layer has read so far."""
        hidden = np.ones(len(self.hidden[layer]), dtype=bool)
        hidden[list(positions)] = False
        self.hidden[layer] = self.hidden[layer] | hidden

    def put_away(
        self, layer: int, kept: Iterable[int], bits: tuple[int, int], theta: float, max_error: float = 0.0
    ) -> None:
        """From now on queries, which come one by one, see all but these by codes of so many bits (of K, V), and read
        rows at theta of their attention, and those that max_error asks for."""
        gone = np.setdiff1d(np.arange(len(self.keys[layer])), list(kept))
        self.warm[layer] = (gone, *bits, theta, max_error)

    def bring_back(self, layer: int, positions: Iterable[int]) -> None:
        """From now on queries see these again."""
        self.hidden[layer] = self.hidden[layer].copy()
        self.hidden[layer][list(positions)] = False

    def rewind(self, n_tokens: int) -> None:
        """To what had been read when there were n_tokens."""
        for per_layer in (self.keys, self.values, self.hidden):
            per_layer[:] = [rows[:n_tokens] for rows in per_layer]

    def read(self, tokens: Sequence[int]) -> Array:
        """Logits after each of these tokens, which follow those that were read before: [n_tokens, n_vocab]."""
        positions = len(self.keys[0]) + np.arange(len(tokens))
        self.last_queries = []

        x = self.weights["token_embd.weight"][list(tokens)]
        for layer in range(self.n_layer):
            x = x + self.attention(layer, self.norm(f"blk.{layer}.attn_norm", x), positions)
            x = x + self.feed_forward(layer, self.norm(f"blk.{layer}.ffn_norm", x))

        # models with tied embeddings have no output matrix of their own
        output = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return self.norm("output_norm", x) @ output.T

    def attention(self, layer: int, x: Array, positions: npt.NDArray[np.int64]) -> Array:
        def heads(name: str, n: int) -> Array:
            return (x @ self.weights[f"blk.{layer}.{name}.weight"].T).reshape(len(x), n, self.n_embd_head)

        queries = self.rope(heads("attn_q", self.n_head), positions)
        keys = self.rope(heads("attn_k", self.n_head_kv), positions)
        values = heads("attn_v", self.n_head_kv)
        self.last_queries.append(queries)

        self.keys[layer] = keys = np.concatenate([self.keys[layer], keys])
        self.values[layer] = values = np.concatenate([self.values[layer], values])
        self.hidden[layer] = np.concatenate([self.hidden[layer], np.zeros(len(x), dtype=bool)])

        scale = 1 / math.sqrt(self.n_embd_head)
        n_gqa = self.n_head // self.n_head_kv
        if layer in self.warm:
            out = [
                self.attention_to_warm(layer, head, queries[0, head * n_gqa : (head + 1) * n_gqa], scale)
                for head in range(self.n_head_kv)
            ]
            return np.concatenate(out).reshape(1, -1) @ self.weights[f"blk.{layer}.attn_output.weight"].T
        seen = np.flatnonzero(~self.hidden[layer])
        rows = attention_rows(queries, positions, keys[seen], seen, scale)
        out = [row @ values[seen, head // n_gqa] for head, row in enumerate(rows)]
        return np.concatenate(out, axis=1) @ self.weights[f"blk.{layer}.attn_output.weight"].T

    def attention_to_warm(self, layer: int, head: int, queries: Array, scale: float) -> Array:
        """One token's queries [n_gqa, d] of a KV head of a layer of which something was put away: [n_gqa, d]."""
        gone, bits_k, bits_v, theta, max_error = self.warm[layer]
        keys, values = (rows[layer][:, head].astype(np.float32) for rows in (self.keys, self.values))
        coded_keys, coded_values = keys.copy(), values.copy()
        coded_keys[gone] = coded(keys[gone], bits_k)
        coded_values[gone] = coded(values[gone], bits_v)
        estimate = softmax(queries @ coded_keys.T * scale)
        if max_error > 0:
            excess = np.zeros_like(estimate)
            excess[:, gone] = np.expm1(logit_bounds(queries, keys[gone], bits_k) * scale)
            read = rows_for_max_error(estimate, excess, theta, max_error)
            error = misplaced(queries, keys, np.where(read[:, None], keys, coded_keys), scale)
            self.worst = max(self.worst, error)
        else:
            read = rows_for_theta(estimate, (keys != coded_keys).any(axis=1), theta)
        self.n_read += int(read.sum())
        weights = softmax(queries @ np.where(read[:, None], keys, coded_keys).T * scale)
        return weights @ np.where(read[:, None], values, coded_values)

    def feed_forward(self, layer: int, x: Array) -> Array:
        gate = x @ self.weights[f"blk.{layer}.ffn_gate.weight"].T
        up = x @ self.weights[f"blk.{layer}.ffn_up.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"blk.{layer}.ffn_down.weight"].T

    def norm(self, name: str, x: Array) -> Array:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]

    def rope(self, x: Array, positions: npt.NDArray[np.int64]) -> Array:
        """Turns the pairs (0, 1), (2, 3), ... of each head, each at its own speed, by the position: [n, n_heads, d]."""
        speed = self.rope_base ** (-np.arange(0, self.n_embd_head, 2) / self.n_embd_head)
        angle = (positions[:, None] * speed)[:, None, :]
        even, odd = x[..., 0::2], x[..., 1::2]
        res = np.empty_like(x)
        res[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
        res[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        return res
