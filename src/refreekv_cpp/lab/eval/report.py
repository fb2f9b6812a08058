"""A Markdown report from the records of a run."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from refreekv_cpp._units import mebibytes
from refreekv_cpp.lab.eval.fidelity import Fidelity, summarise
from refreekv_cpp.lab.eval.records import Record, read_records, read_settings
from refreekv_cpp.lab.eval.scores import bootstrap
from refreekv_cpp.lab.eval.spec import REFERENCE

REPORT = "report.md"


@dataclass(frozen=True)
class Row:
    """All records of one cache with the question seen, or hidden; `pairs` has those of them that the reference has too,
    as (reference, cache)."""

    cache: str
    mode: str
    records: list[Record]
    pairs: list[tuple[Record, Record]]

    @property
    def name(self) -> tuple[str, str]:
        return self.cache, self.mode

    def mean(self, value: Callable[[Record], float]) -> float:
        return statistics.fmean(map(value, self.records))

    def of(self, dataset: str) -> Row:
        return Row(
            self.cache,
            self.mode,
            [record for record in self.records if record["dataset"] == dataset],
            [pair for pair in self.pairs if pair[0]["dataset"] == dataset],
        )


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One for each cache and mode, in the order of the run."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        groups.setdefault((record["cache"], record["mode"]), {})[record["item"]] = record
    rows = []
    for (cache, mode), own in groups.items():
        reference = groups.get((REFERENCE, mode), {})
        pairs = [(reference[item], record) for item, record in own.items() if item in reference]
        rows.append(Row(cache, mode, list(own.values()), pairs))
    return rows


def reference_once(rows: Sequence[Row]) -> list[Row]:
    """Without the reference's second mode: it never prunes, and the question makes no difference to it."""
    reference = next(row for row in rows if row.cache == REFERENCE)
    return [reference, *(row for row in rows if row.cache != REFERENCE)]


def bytes_part(record: Record) -> float:
    """The cache's bytes over the reference's."""
    return float(record["bytes"] / record["bytes_reference"])


def layer_budgets(row: Row) -> list[float]:
    """The part of its cells that each attention layer kept, mean over the items."""
    per_item = ([kept / record["n_tokens"] for kept in record["cells_kept"]] for record in row.records)
    return [statistics.fmean(layer) for layer in zip(*per_item, strict=True)]


def write_report(folder: Path) -> str:
    """Writes report.md into the folder of a run, and returns it.

    Raises:
        ValueError: there is no run in the folder, or nothing recorded yet.
    """
    settings = read_settings(folder)
    rows = rows_of(read_records(folder))
    if not rows:
        raise ValueError(f"{folder}: nothing has been recorded yet")
    datasets = list(dict.fromkeys(record["dataset"] for row in rows for record in row.records))
    others = [row for row in rows if row.cache != REFERENCE]
    once = reference_once(rows)
    sections = [
        ("", _head(settings, rows, datasets)),
        ("Fidelity: along the full cache's greedy answer", _fidelity(rows, "greedy")),
        ("Fidelity: along the text that really follows", _fidelity(rows, "real")),
        ("Mean KL along the full cache's greedy answer, per dataset", _kl_per_dataset(others, datasets)),
        ("Mean KL from token to token of that answer", _kl_along(others)),
        ("The tokens that are furthest off", _worst(others)),
        ("Tasks", _tasks(others, datasets, settings["seed"], "score")),
        ("A second question about another fact", _tasks(others, datasets, settings["seed"], "second_score")),
        ("Where a fact was found", _maps(once, datasets)),
        ("Cells kept, per layer", _layers(others)),
        ("Speed", _speed(once)),
    ]
    text = "\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections if body)
    (folder / REPORT).write_text(text, encoding="utf-8")
    return text


def _head(settings: dict[str, Any], rows: Sequence[Row], datasets: Sequence[str]) -> str:
    items = {record["item"]: record for row in rows for record in row.records}.values()
    counts = [(name, [item["n_tokens"] for item in items if item["dataset"] == name]) for name in datasets]
    n_items = "1 item" if len(items) == 1 else f"{len(items)} items"
    return f"# {settings['model']}: {n_items}\n\n" + markdown(
        ["dataset", "items", "tokens (median)", "tokens (most)"],
        [[name, str(len(lengths)), f"{statistics.median(lengths):.0f}", str(max(lengths))] for name, lengths in counts],
    )


def _fidelity(rows: Sequence[Row], continuation: str) -> str:
    """KL in nats per token."""
    header = "cache|question|tokens|budget|KV bytes|KL mean|median|95 %|99 %|99.9 %|max|same top|Δp RMS|perplexity"
    cells = []
    for row in rows:
        summary = summarise([Fidelity(**record[continuation]) for record in row.records])
        if summary is None:
            continue
        cells.append(
            [
                *row.name,
                str(summary.n),
                *_size(row),
                *(
                    f"{value:.2g}"
                    for value in (
                        summary.kl_mean,
                        summary.kl_median,
                        summary.kl_95,
                        summary.kl_99,
                        summary.kl_999,
                        summary.kl_max,
                    )
                ),
                f"{summary.same_top:.1%}",
                f"{summary.delta_p_rms:.1%}",
                f"× {summary.perplexity_ratio:.3f}",
                *(_divergence(row) if continuation == "greedy" else ()),
            ]
        )
    divergence = ["same answer", "first difference"] if continuation == "greedy" else []
    return markdown([*header.split("|"), *divergence], cells) if cells else ""


def _kl_per_dataset(rows: Sequence[Row], datasets: Sequence[str]) -> str:
    cells = []
    for dataset in datasets:
        summaries = [summarise([Fidelity(**record["greedy"]) for record in row.of(dataset).records]) for row in rows]
        cells.append([dataset, *("-" if summary is None else f"{summary.kl_mean:.2g}" for summary in summaries)])
    return markdown(["dataset", *(title(*row.name) for row in rows)], cells) if rows else ""


def _kl_along(rows: Sequence[Row]) -> str:
    """In parts of the answer that double in length; nothing where no answer has more than one part."""
    cells = []
    start, end = 0, 128
    while any(len(record["greedy"]["kl"]) > start for row in rows for record in row.records):
        parts = [[kl for record in row.records for kl in record["greedy"]["kl"][start:end]] for row in rows]
        means = (f"{statistics.fmean(part):.2g}" if part else "-" for part in parts)
        cells.append([f"{start + 1} to {end}", *means])
        start, end = end, 2 * end
    return markdown(["tokens", *(title(*row.name) for row in rows)], cells) if len(cells) > 1 else ""


def _worst(rows: Sequence[Row]) -> str:
    """Ten tokens of the first cache, with the KL that the other caches have at each of them."""
    if not rows:
        return ""
    mode = rows[0].mode
    columns = [row for row in rows if row.mode == mode]
    by_item = [{record["item"]: record for record in row.records} for row in columns]
    tokens = (
        (kl, item, continuation, i)
        for item, record in by_item[0].items()
        for continuation in ("greedy", "real")
        for i, kl in enumerate(record[continuation]["kl"])
    )
    cells = []
    for _, item, continuation, i in heapq.nlargest(10, tokens, key=itemgetter(0)):
        own = by_item[0][item][continuation]
        others = [f"{records[item][continuation]['kl'][i]:.2g}" if item in records else "-" for records in by_item]
        chances = [f"{math.exp(-own[name][i]):.2f}" for name in ("nll_full", "nll")]
        cells.append([item, continuation, str(i + 1), *chances, *others])
    header = ["item", "along", "scored token", "probability, full", f"probability, {rows[0].cache}"]
    return markdown([*header, *(f"KL, {title(*row.name)}" for row in columns)], cells) if cells else ""


def _divergence(row: Row) -> tuple[str, str]:
    """The share of free greedy answers that are the full cache's, and where the others leave it (median token)."""
    where = [record["divergence"] for record in row.records if record["divergence"] is not None]
    same = f"{len(row.records) - len(where)} of {len(row.records)}"
    return same, f"token {statistics.median(where):.0f}" if where else "-"


def _size(row: Row) -> tuple[str, str]:
    """Mean budget; mean bytes, and what part of the full cache's they are."""
    return (
        f"{row.mean(lambda record: record['budget']):.0%}",
        f"{mebibytes(row.mean(lambda record: record['bytes']))} ({row.mean(bytes_part):.0%})",
    )


def _tasks(rows: Sequence[Row], datasets: Sequence[str], seed: int, field: str) -> str:
    """Scores of the same items with the full cache and another one."""
    header = "dataset|score|cache|question|items|full|this cache|difference|95 % interval|budget|KV bytes"
    cells = []
    scored_datasets = [name for name in datasets if any(record.get(field) is not None for record in _all(rows, name))]
    for dataset in [*scored_datasets, *([None] if len(scored_datasets) > 1 else [])]:
        for row in rows:
            part = row if dataset is None else row.of(dataset)
            pairs = [pair for pair in part.pairs if pair[1].get(field) is not None]
            if not pairs:
                continue
            scored = Row(row.cache, row.mode, [record for _, record in pairs], pairs)
            full, own = ([record[field] for record in side] for side in zip(*pairs, strict=True))
            difference = bootstrap([b - a for a, b in zip(full, own, strict=True)], seed=seed)
            cells.append(
                [
                    dataset or "all",
                    pairs[0][0]["score_name"] if dataset else "mean",
                    *row.name,
                    str(len(pairs)),
                    f"{statistics.fmean(full):.2f}",
                    f"{statistics.fmean(own):.2f}",
                    f"{difference.mean:+.2f}",
                    f"{difference.low:+.2f} to {difference.high:+.2f}",
                    *_size(scored),
                ]
            )
    return markdown(header.split("|"), cells) if cells else ""


def _all(rows: Sequence[Row], dataset: str) -> list[Record]:
    return [record for row in rows for record in row.of(dataset).records]


def retrieval_map(row: Row) -> dict[tuple[float, int], float]:
    """Mean score at each (depth, length); of the second question where there is one: the place is its fact's."""
    scores: dict[tuple[float, int], list[float]] = {}
    for record in row.records:
        score = record.get("second_score", record["score"])
        if {"depth", "length"} <= record["meta"].keys() and score is not None:
            scores.setdefault((record["meta"]["depth"], record["meta"]["length"]), []).append(score)
    return {place: statistics.fmean(values) for place, values in scores.items()}


def _maps(rows: Sequence[Row], datasets: Sequence[str]) -> str:
    """A table for each dataset and length: depth by cache."""
    tables = []
    for dataset in datasets:
        maps = {row.name: retrieval_map(row.of(dataset)) for row in rows}
        places = {place for found in maps.values() for place in found}
        if not places:
            continue
        cells = [
            [f"{depth:g}", str(length), *(_score(found.get((depth, length))) for found in maps.values())]
            for depth in sorted({depth for depth, _ in places})
            for length in sorted({length for at, length in places if at == depth})
        ]
        header = [title(*name) for name in maps]
        tables.append(f"{dataset}:\n\n" + markdown(["depth", "tokens", *header], cells))
    return "\n".join(tables)


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def _layers(rows: Sequence[Row]) -> str:
    """Mean over the items."""
    columns = [layer_budgets(row) for row in rows]
    cells = [
        [str(layer), *(f"{budget:.0%}" for budget in budgets)]
        for layer, budgets in enumerate(zip(*columns, strict=True))
    ]
    return markdown(["layer", *(title(*row.name) for row in rows)], cells) if cells else ""


def _speed(rows: Sequence[Row]) -> str:
    """Medians over the items."""
    cells = []
    for row in rows:
        seconds = [record["seconds"] for record in row.records]
        # of caches that have read the prompts themselves
        prefill = [r["n_tokens"] / r["seconds"]["prefill"] for r in row.records if r["seconds"]["prefill"] is not None]
        decode = [part["decode"] for part in seconds if part["decode"] is not None]
        cells.append(
            [
                row.cache,
                "-" if row.cache == REFERENCE else row.mode,
                f"{statistics.median(prefill):.0f}" if prefill else "-",
                f"{statistics.median(part['prune'] for part in seconds) * 1000:.0f}",
                f"{statistics.median(decode) * 1000:.1f}" if decode else "-",
                *_size(row),
            ]
        )
    return markdown(
        ["cache", "question", "prefill, tokens/s", "pruning, ms", "decode, ms per token", "budget", "KV bytes"], cells
    )


def title(cache: str, mode: str) -> str:
    """Of a row, for a person."""
    return cache if cache == REFERENCE else f"{cache}, {mode}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
