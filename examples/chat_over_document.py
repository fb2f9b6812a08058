"""Ask questions about a document.

python examples/chat_over_document.py MODEL.gguf report.txt "Who signed it?" "What does it say about costs?"
"""

import sys
from pathlib import Path

from refreekv_cpp import Llama

model, file, *questions = sys.argv[1:]
document = Path(file).read_text(encoding="utf-8")

llm = Llama(model, n_ctx=32768, kv_policy="refreekv", verbose=False)
messages = []
for question in questions:
    content = question if messages else f"{document}\n\n{question}"  # the document is part of the first question
    messages.append({"role": "user", "content": content})
    answer = llm.create_chat_completion(messages, max_tokens=200, temperature=0)
    messages.append(answer["choices"][0]["message"])
    print(f"> {question}\n{messages[-1]['content']}\n{llm.kv_stats.receipt()}\n")
