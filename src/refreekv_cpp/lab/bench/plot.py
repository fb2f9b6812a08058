"""A picture of a benchmark, with matplotlib (the extra `lab`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from refreekv_cpp.lab.bench.runner import Result
from refreekv_cpp.lab.figure import new_figure


def write_plot(path: Path, results: Sequence[Result], bound_ms: Callable[[Result], float]) -> None:
    """Milliseconds per decoded token (median and quartiles) against the tokens in the cache; dotted: the bound."""
    figure = new_figure(figsize=(8, 5))
    axes = figure.subplots()
    contestants = list(dict.fromkeys(result.contestant for result in results))
    for i, contestant in enumerate(contestants):
        own = [result for result in results if result.contestant == contestant]
        x = [result.n_tokens for result in own]
        y = [result.decode_ms for result in own]
        quartiles = [result.decode_quartiles_ms for result in own]
        spread = [
            [max(0.0, middle - low) for middle, (low, _) in zip(y, quartiles, strict=True)],
            [max(0.0, high - middle) for middle, (_, high) in zip(y, quartiles, strict=True)],
        ]
        label = f"{contestant.name}, flash attention {'on' if contestant.flash_attn else 'off'}"
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, color=f"C{i}", label=label)
        axes.plot(x, [bound_ms(result) for result in own], ":", color=f"C{i}")
    axes.set(xlabel="tokens in the cache", ylabel="ms per decoded token", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
