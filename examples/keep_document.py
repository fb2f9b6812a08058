"""Read a document once. Run this twice: the second run opens what the first one has read.

python examples/keep_document.py MODEL.gguf report.txt "Who signed it?"
"""

import sys
import time
from pathlib import Path

from refreekv_cpp import Llama

model, file, question = sys.argv[1:]
document = Path(file).read_text(encoding="utf-8")

llm = Llama(model, n_ctx=32768, kv_policy="refreekv", kv_library=True, verbose=False)
start = time.perf_counter()
messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
answer = llm.create_chat_completion(messages, max_tokens=64)
seconds = time.perf_counter() - start
llm.keep_kv(Path(file).name)  # the name that `refreekv library` shows

print(answer["choices"][0]["message"]["content"])
n_prompt = answer["usage"]["prompt_tokens"]
print(f"{llm.kv_stats.n_opened} of {n_prompt} tokens came from the library; the answer took {seconds:.1f} s")
