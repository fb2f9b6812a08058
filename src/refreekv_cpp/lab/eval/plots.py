"""Pictures of a run, with matplotlib (the extra `lab`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from refreekv_cpp.lab.eval.records import Record, read_records
from refreekv_cpp.lab.eval.report import Row, bytes_part, layer_budgets, reference_once, retrieval_map, rows_of, title
from refreekv_cpp.lab.figure import new_figure


def write_plots(folder: Path) -> list[Path]:
    """Writes quality.png (KL and scores against budget and bytes), layers.png and, for planted facts, retrieval.png."""
    rows = reference_once(rows_of(read_records(folder)))
    figures = {"quality": _quality(rows), "layers": _layers(rows), "retrieval": _retrieval(rows)}
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
