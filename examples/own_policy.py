"""A policy of your own, in NumPy: keep the cells that the last queries look at most.

python examples/own_policy.py MODEL.gguf report.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refreekv_cpp import Llama, PythonPolicy


@dataclass(frozen=True, kw_only=True)
class Heaviest(PythonPolicy):
    """
    Args:
        share: of the cells that stay, 0 to 1.
    """

    share: float = 0.5

    def select(self, attention, positions, layer):
        score = attention.mean(axis=(0, 1))  # [n_head, n_rows, n_cells] -> [n_cells]
        mask = score >= np.quantile(score, 1 - self.share)
        mask[:4] = True  # sinks
        mask[-self.n_window :] = True
        return mask


model, file = sys.argv[1:]
llm = Llama(model, n_ctx=32768, kv_policy=Heaviest(share=0.3, n_window=64), verbose=False)
answer = llm(Path(file).read_text(encoding="utf-8") + "\n\nIn short:", max_tokens=64)
print(answer["choices"][0]["text"])
print("cells that each layer kept:", *llm.kv_stats.cells_kept)
