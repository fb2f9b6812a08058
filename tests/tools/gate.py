"""Whether a change of the core keeps the fidelity of the default policy: `refreekv eval` on the project's own texts.

    python tests/tools/gate.py MODEL [MODEL ...] [--threads 2]

Half of the prompts are pages of docs/ and half are sources of native/, some 3,000 tokens each; the cache is compared
with the full one along 64 tokens of its greedy answer and 64 tokens of the text that follows. Weights are unpacked to
f32 first, in a temporary folder, because with quantised weights llama.cpp rounds activations to 8 bits, which adds a
divergence of its own to any change, however small. That takes 4 bytes per weight on the disk and in memory.

The exit code is 1 if a figure is above its limit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from f32 import unpack
from rich.console import Console
from rich.table import Table

from refreekv_cpp.cli import app
from refreekv_cpp.lab.eval.fidelity import Fidelity, summarise
from refreekv_cpp.lab.eval.records import Record, read_records
from refreekv_cpp.lab.eval.report import bytes_part

ROOT = Path(__file__).parents[2]
TEXTS = {"docs": sorted((ROOT / "docs").rglob("*.md")), "code": sorted((ROOT / "native").rglob("*.cpp"))}
CHARACTERS = 11_000  # of a prompt
LIMITS = {  # in nats per token; of the bytes of the full f16 cache. "most" is of one token
    ("greedy", "kl_mean"): 0.0005,
    ("real", "kl_mean"): 0.0015,
    ("greedy", "kl_95"): 0.005,
    ("real", "kl_95"): 0.005,
    ("greedy", "kl_max"): 0.1,
    ("real", "kl_max"): 0.1,
}
BYTES = 0.30  # at 3,000 tokens the exact cells are a larger part than at 7,000


def main(
    models: list[Path],
    items: Annotated[int, typer.Option(help="Prompts of each kind of text.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    table = Table("model", "", *(f"{where} {name}, limit {limit}" for (where, name), limit in LIMITS.items()), "bytes")
    failed = False
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            records = _evaluate(model, Path(folder), items, threads)
        figures = figures_of(records)
        size = sum(map(bytes_part, records)) / len(records)
        above = {key for key, value in figures.items() if value > LIMITS[key]}
        failed |= bool(above) or size > BYTES
        cells = (f"{'[red]' if key in above else ''}{value:.2g}" for key, value in figures.items())
        table.add_row(model.name, "above" if above or size > BYTES else "met", *cells, f"{size:.1%}")
    Console(width=200).print(table)
    raise typer.Exit(failed)


def figures_of(records: list[Record]) -> dict[tuple[str, str], float]:
    """What has a limit."""
    summaries = {where: summarise([Fidelity(**record[where]) for record in records]) for where in ("greedy", "real")}
    return {(where, name): getattr(summaries[where], name) for where, name in LIMITS}


def _evaluate(model: Path, folder: Path, items: int, threads: int) -> list[Record]:
    weights = folder / "weights.gguf"
    unpack(model, weights)
    data = folder / "data"
    data.mkdir()
    for name, files in TEXTS.items():
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        starts = range(0, len(text) - 2 * CHARACTERS, (len(text) - 2 * CHARACTERS) // items)
        rows = [
            {
                "id": f"{name}/{start}",
                "dataset": name,
                "context": text[start : start + CHARACTERS],
                "question": "",
                "answers": [text[start + CHARACTERS :][:1000]],
            }
            for start in starts[:items]
        ]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = folder / "run"
    where = [str(weights), "--out", str(out), "--data", str(data)]
    what = ["--policies", "refreekv", "--question", "seen", "--same-kernel", "--continuation", "65"]
    app(["eval", *where, *what, "--items", str(items), "--threads", str(threads)], standalone_mode=False)
    return [record for record in read_records(out) if record["cache"] == "refreekv"]


if __name__ == "__main__":
    typer.run(main)
