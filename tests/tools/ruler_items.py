"""Items of the RULER tasks (https://github.com/NVIDIA/RULER, Apache-2.0) for `refreekv eval --data`.

    pip install wonderwords scipy tqdm pyyaml
    python tests/tools/ruler_items.py RULER MODEL --lengths 4096,8192 --items 10 --out DATA

RULER is a folder with its generators (`niah.py` and so on), `constants.py`, `synthetic.yaml` and `json/` with its
texts, which this project does not have. They run as they are; what they import from their own package is given to them
here. Each task and length is a file of DATA, and a dataset of its own. Texts are as long as MODEL's tokenizer says.

The generators split sentences with NLTK's model; here a regular expression does. An item has the text as its context
and RULER's question as its question, without the beginning of the answer that RULER gives to models that do not chat.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import runpy
import sys
import types
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from refreekv_cpp import Llama

_QUESTION = "@@question@@"  # stands before the question in the text that a generator makes
_ANSWER = "@@answer@@"  # stands after it


def main(
    ruler: Path,
    model: Path,
    out: Annotated[Path, typer.Option(help="Folder of the items.")],
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "4096",
    items: Annotated[int, typer.Option(help="Of each task and length.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the generators.")] = 1,
) -> None:
    llm = Llama(str(model), vocab_only=True, verbose=False)
    constants = _constants(ruler)
    out.mkdir(parents=True, exist_ok=True)
    for name, task in yaml.safe_load((ruler / "synthetic.yaml").read_text()).items():
        for length in map(int, lengths.split(",")):
            rows = _generate(ruler, constants, llm, task, length, items, seed)
            dataset = f"{name}-{length}"
            lines = [json.dumps(_item(dataset, seed, task["task"], row)) for row in rows]
            (out / f"{dataset}.jsonl").write_text("\n".join(lines) + "\n")
            print(f"{dataset}: {len(lines)} items of at most {max(row['length'] for row in rows)} tokens")


def _constants(ruler: Path) -> Any:
    """RULER's, with marks around the question of each template."""
    constants = types.ModuleType("constants")
    exec((ruler / "constants.py").read_text(), constants.__dict__)
    for task in constants.TASKS.values():
        task["template"] = re.sub(r"\{context\}\s*", "{context}" + _QUESTION, task["template"]) + _ANSWER
    return constants


def _generate(
    ruler: Path, constants: Any, llm: Llama, task: dict[str, Any], length: int, items: int, seed: int
) -> list[dict[str, Any]]:
    """What a generator writes: rows with input, outputs and length."""
    rows: list[dict[str, Any]] = []
    tokenizer = types.SimpleNamespace(text_to_tokens=lambda text: llm.tokenize(text.encode(), add_bos=False))
    modules = {
        "constants": constants,
        "long_context_eval": types.ModuleType("long_context_eval"),
        "long_context_eval.pred": types.ModuleType("pred"),
        "long_context_eval.pred.nemo_utils": _module(write_manifest=lambda _path, made: rows.extend(made)),
        "long_context_eval.data": types.ModuleType("data"),
        "long_context_eval.data.tokenizer": _module(select_tokenizer=lambda *_: tokenizer),
        "tokenizer": _module(select_tokenizer=lambda *_: tokenizer),
        "nltk": types.ModuleType("nltk"),
        "nltk.tokenize": _module(sent_tokenize=lambda text: re.split(r"(?<=[.!?])\s+", text)),
    }
    base = constants.TASKS[task["task"]]
    options = {
        "save_dir": os.devnull,
        "save_name": ".",
        "tokenizer_path": ".",
        "max_seq_length": length,
        "tokens_to_generate": base["tokens_to_generate"],
        "num_samples": items,
        "random_seed": seed,
        "template": base["template"] + base["answer_prefix"],
        **task["args"],
    }
    script = ruler / f"{task['task']}.py"
    before = {name: sys.modules.get(name) for name in modules}
    argv, mkdir, state = sys.argv, Path.mkdir, random.getstate()
    try:
        sys.modules.update(modules)
        sys.argv = [str(script), *(f"--{name}={value}" for name, value in options.items())]
        Path.mkdir = lambda *_, **__: None  # type: ignore[method-assign,assignment]
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        Path.mkdir, sys.argv = mkdir, argv  # type: ignore[method-assign]
        random.setstate(state)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return rows


def _module(**functions: Any) -> types.ModuleType:
    module = types.ModuleType("module")
    module.__dict__.update(functions)
    return module


def _item(dataset: str, seed: int, task: str, row: dict[str, Any]) -> dict[str, Any]:
    # examples that precede the text have a question and an answer of their own
    context, _, rest = row["input"].rpartition(_QUESTION)
    question = rest.partition(_ANSWER)[0]
    return {
        "id": f"{dataset}/{seed}/{row['index']}",
        "dataset": dataset,
        "context": context.replace(_QUESTION, "\n").replace(_ANSWER, ""),
        "question": question.strip(),
        "answers": row["outputs"],
        "score": "found" if task == "qa" else "all_found",
    }


if __name__ == "__main__":
    typer.run(main)
