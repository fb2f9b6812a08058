"""Run as a program by test_stock.py, in a process of its own: two libllama do not go into one.

    stock_logits.py OUT.npy MODEL FLASH_ATTN(0|1) ours|stock

Saves the logits of every position of a prompt and of 64 tokens decoded greedily after it: [n, n_vocab] f32.
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    out, model, flash_attn, who = sys.argv[1:5]

    if who == "ours":
        from refreekv_cpp import Llama
    else:
        from llama_cpp import Llama  # on the stock library (native_build.stock_environment)

    llm = Llama(
        model, n_ctx=1024, n_batch=256, flash_attn=flash_attn == "1", n_threads=2, logits_all=True, verbose=False
    )
    text = " ".join(f"In the year {1000 + 7 * i} the harbour counted {i * i} ships." for i in range(24))
    llm.eval(llm.tokenize(text.encode()))
    for _ in range(64):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
    np.save(out, llm.scores[: llm.n_tokens])


if __name__ == "__main__":
    main()
