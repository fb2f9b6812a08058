"""What a library saves: docs/results/documents.md.

    python tests/tools/library_times.py document MODEL [--tokens 6000]
    python tests/tools/library_times.py server MODEL [--rounds 10] [--no-library]

`document`: one process reads a document, keeps it, and answers ten questions; another one opens what was kept, and
answers them. `server`: two
chats and the request for a title alternate; of each request, the tokens of its prompt, how many of them were read, and
the seconds until the first token of the answer.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import _helpers  # noqa: F401  (first: it makes the other imports possible)
import typer
from serving import serving, user

from refreekv_cpp import Llama
from refreekv_cpp._cache_dir import VARIABLE
from refreekv_cpp.document import QUESTION, write_document

QUESTIONS = [
    QUESTION,
    "Which ship is named first?",
    "Who is Mira Tolland?",
    "What did the Grey Petrel carry?",
    "Which towns trade wool?",
    "What happened in August?",
    "Who mended the sails?",
    "Where is honey stored?",
    "What does the text say of storms?",
    "Which month is named most?",
]

app = typer.Typer()


def documents(llm: Llama, n_tokens: int) -> str:
    return write_document(n_tokens, lambda text: len(llm.tokenize(text.encode(), add_bos=False)))


@app.command()
def answer(model: Path, folder: Path, tokens: int, threads: int, copy: Path | None = None) -> None:
    """One of the two processes of `document`. copy: where the library goes before there are answers in it."""
    options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    llm = Llama(str(model), n_ctx=tokens + 2048, kv_policy="refreekv", kv_library=folder, **options)
    prompt = llm.tokenize(documents(llm, tokens).encode())
    answers, seconds = [], []
    start = time.perf_counter()
    if copy:
        llm.eval(prompt)
        llm.prune_kv()
        read = time.perf_counter() - start
        llm.keep_kv("document")
        shutil.copytree(folder, copy)
        seconds.append(read)
    for question in QUESTIONS:
        start = time.perf_counter()
        ending = llm.tokenize(f"\n\nQuestion: {question}\nAnswer:".encode(), add_bos=False)
        generation = llm.generate([*prompt, *ending], temp=0.0)
        first = next(generation)
        seconds.append(time.perf_counter() - start)
        answers.append([first, *itertools.islice(generation, 23)])
        generation.close()
    stats = llm.kv_stats
    print(json.dumps({"answers": answers, "seconds": seconds, "opened": stats.n_opened, "rss": stats.memory.rss}))


@app.command()
def document(model: Path, tokens: int = 6000, threads: int = os.cpu_count() or 1) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def run(library: str, *options: str) -> Any:
            command = [sys.executable, __file__, "answer", str(model), library, str(tokens), str(threads), *options]
            return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

        kept = f"{folder}/kept"
        reads = run(f"{folder}/library", "--copy", kept)
        n_bytes = sum(path.stat().st_size for path in Path(kept).glob("*.block"))
        opens = run(kept)
    same = sum(a == b for a, b in zip(reads["answers"], opens["answers"], strict=True))
    first = sum(reads["seconds"][:2]), opens["seconds"][0]  # the document and the first question
    print(
        f"{model.name}: first token after {first[0]:.1f} s of reading, {first[1]:.2f} s of opening "
        f"({first[1] / first[0]:.1%}), {opens['opened']} tokens opened; {same} of {len(QUESTIONS)} answers are equal; "
        f"{n_bytes / 2**20:.0f} MiB on disk; resident at the end {reads['rss'] / 2**20:.0f} and "
        f"{opens['rss'] / 2**20:.0f} MiB"
    )


@app.command()
def server(
    model: Path, rounds: int = 10, library: Annotated[bool, typer.Option("--library/--no-library")] = True
) -> None:
    texts = [write_document(600, lambda text: len(text) // 4, seed=seed) for seed in (1, 2)]
    talks = [user(f"{text}\n\nWhat happens?") for text in texts]
    title = user("Write a title of three words for this: " + texts[0][:300])
    # one slot, which each of them takes from the one before; nothing is kept in memory
    options = ["--n-ctx", "8192", "--parallel", "1", "--log-verbosity", "1", "--cache-ram", "0"]
    options += [] if library else ["--no-library"]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(model, *options, env={**os.environ, VARIABLE: folder}) as client,
    ):
        for i in range(rounds):
            row = []
            for talk in (*talks, title):
                start, first, text, timings = time.perf_counter(), None, "", {}
                for chunk in client.chat.completions.create(
                    model="any",
                    messages=talk,
                    max_tokens=16,
                    temperature=0,
                    stream=True,
                ):
                    if chunk.choices and (piece := chunk.choices[0].delta.content):
                        first = first or time.perf_counter() - start
                        text += piece
                    timings = getattr(chunk, "timings", None) or timings
                n_tokens = timings["cache_n"] + timings["prompt_n"]
                row.append(f"{n_tokens} {timings['prompt_n']} {first or 0:.2f} s")
                if talk is not title:
                    talk += [{"role": "assistant", "content": text}, *user("And then?")]
            print(f"round {i + 1}: {'; '.join(row)}", flush=True)


if __name__ == "__main__":
    app()
