"""Pictures of a run, with matplotlib (the extra `lab`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refreekv_cpp.lab.eval.records import Record, read_records
from refreekv_cpp.lab.eval.report import Row, bytes_part, layer_budgets, reference_once, retrieval_map, rows_of, title
from refreekv_cpp.lab.figure import new_figure

_WINDOW = 64  # tokens


def write_plots(folder: Path) -> list[Path]:
    """Writes quality.png (KL and scores against budget and bytes), layers.png and, where there is something to show,
    tasks.png (scores of each dataset), along.png (KL along long answers) and retrieval.png (planted facts)."""
    rows = reference_once(rows_of(read_records(folder)))
    figures = {
        "quality": _quality(rows),
        "layers": _layers(rows),
        "tasks": _tasks(rows),
        "along": _along(rows),
        "retrieval": _retrieval(rows),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120)
            paths.append(path)
    return paths


def _quality(rows: list[Row]) -> Any:
    figure = new_figure(figsize=(11, 10))
    qualities: list[tuple[str, Callable[[Row], float | None]]] = [
        ("mean KL, greedy answer, nats", lambda row: _mean_kl(row, "greedy")),
        ("mean KL, real text, nats", lambda row: _mean_kl(row, "real")),
        ("score", _mean_score),
    ]
    sizes: list[tuple[str, Callable[[Record], float]]] = [
        ("cells kept", lambda record: float(record["budget"])),
        ("bytes, full cache = 1", bytes_part),
    ]
    axes = figure.subplots(len(qualities), len(sizes), squeeze=False)
    for line, (quality, value) in zip(axes, qualities, strict=True):
        for axis, (size, of_record) in zip(line, sizes, strict=True):
            for row in rows:
                y = value(row)
                if y is not None:
                    marker = "o" if row.mode == "seen" else "x"
                    axis.scatter(
                        row.mean(of_record), y, marker=marker, color=_colour(rows, row), label=title(*row.name)
                    )
            axis.set(xlabel=size, ylabel=quality, xlim=(0, 1.05), yscale="log" if "KL" in quality else "linear")
            axis.grid(alpha=0.3)
    figure.legend(*axes[-1, 0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    return figure


def _colour(rows: list[Row], row: Row) -> Any:
    import matplotlib

    i = list(dict.fromkeys(other.cache for other in rows)).index(row.cache)
    return matplotlib.colormaps["tab20"](i % 10 * 2 + i // 10 % 2)  # ten colours, then ten paler ones


def _mean_kl(row: Row, continuation: str) -> float | None:
    """None for the reference, which is not off: on a logarithmic scale it has no place."""
    values = [kl for record in row.records for kl in record[continuation]["kl"]]
    return float(np.mean(values)) if any(values) else None


def _mean_score(row: Row) -> float | None:
    values = [record["score"] for record in row.records if record["score"] is not None]
    return float(np.mean(values)) if values else None


def _layers(rows: list[Row]) -> Any:
    figure = new_figure(figsize=(9, 5))
    axis = figure.subplots()
    for row in rows:
        style = "-" if row.mode == "seen" else "--"
        axis.plot(layer_budgets(row), style, color=_colour(rows, row), label=title(*row.name))
    axis.set(xlabel="layer", ylabel="cells kept", ylim=(0, 1.05))
    axis.legend(fontsize=7)
    return figure


def _tasks(rows: list[Row]) -> Any | None:
    """A panel for each mode, a line for each dataset, a point for each cache."""
    datasets = list(dict.fromkeys(record["dataset"] for record in rows[0].records if record["score"] is not None))
    modes = [mode for mode in ("seen", "hidden") if any(row.mode == mode for row in rows[1:])]
    if len(datasets) < 2 or not modes:
        return None
    figure = new_figure(figsize=(1.5 + 4 * len(modes), 1.3 + 0.32 * len(datasets)))
    for axis, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes, strict=True):
        shown = [rows[0], *(row for row in rows[1:] if row.mode == mode)]
        for i, row in enumerate(shown):
            scores = [_mean_score(row.of(dataset)) for dataset in datasets]
            places = np.arange(len(datasets)) + 0.14 * (i - (len(shown) - 1) / 2)  # beside each other where they agree
            axis.scatter(scores, places, s=28, color=_colour(rows, row), label=row.cache)
        axis.set(xlabel=f"mean score, question {mode}", xlim=(-0.04, 1.04))
        axis.set_yticks(range(len(datasets)), datasets)
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(shown), fontsize=8)
    return figure


def _along(rows: list[Row]) -> Any | None:
    """Means over windows of the greedy answer, each from the items whose answers are that long."""
    longest = max((len(record["greedy"]["kl"]) for row in rows[1:] for record in row.records), default=0)
    if longest <= 2 * _WINDOW:
        return None
    figure = new_figure(figsize=(8, 4.5))
    axis = figure.subplots()
    for row in rows[1:]:
        parts = [
            [kl for record in row.records for kl in record["greedy"]["kl"][start : start + _WINDOW]]
            for start in range(0, longest, _WINDOW)
        ]
        means = [np.mean(part) if part else np.nan for part in parts]
        ends = np.arange(1, len(parts) + 1) * _WINDOW
        axis.plot(ends, means, "-o", markersize=3, color=_colour(rows, row), label=title(*row.name))
    axis.set(xlabel="token of the answer", ylabel=f"mean KL of {_WINDOW} tokens, nats", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _retrieval(rows: list[Row]) -> Any | None:
    maps = {title(*row.name): retrieval_map(row) for row in rows}
    maps = {name: found for name, found in maps.items() if found}
    if not maps:
        return None
    figure = new_figure(figsize=(3 * len(maps), 3.5))
    for axis, (name, found) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        depths, lengths = (sorted({place[i] for place in found}) for i in range(2))
        image = np.array([[found.get((depth, int(length)), np.nan) for length in lengths] for depth in depths])
        axis.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(name, fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{length:.0f}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set(xlabel="tokens", ylabel="depth")
    return figure
