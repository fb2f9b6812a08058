"""Read a long prompt while the cache stays below a cap.

python examples/memory_cap.py MODEL.gguf report.txt 64MiB
"""

import sys
from pathlib import Path

from refreekv_cpp import Llama

model, file, cap = sys.argv[1:]
prompt = Path(file).read_text(encoding="utf-8") + "\n\nIn short:"

llm = Llama(model, n_ctx=32768, kv_policy="refreekv", kv_memory_limit=cap, verbose=False)
print(llm(prompt, max_tokens=64)["choices"][0]["text"])

stats = llm.kv_stats
print(f"the full cache of {stats.n_tokens} tokens would take {stats.bytes_full / 2**20:.1f} MiB")
print(f"this one takes {(stats.bytes + stats.bytes_codes) / 2**20:.1f} MiB; the cap is {cap}")
print(f"prunings while the prompt was read: {stats.n_limit_prunes}")
