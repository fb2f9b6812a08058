"""Ask a server with the `openai` package (pip install openai). Start it first:

refreekv serve MODEL.gguf --n-ctx 32768
python examples/openai_client.py http://127.0.0.1:8000/v1 report.txt "Who signed it?"
"""

import sys
from pathlib import Path

from openai import OpenAI

url, file, question = sys.argv[1:]
document = Path(file).read_text(encoding="utf-8")

client = OpenAI(base_url=url, api_key="any")
answer = client.chat.completions.create(
    model="any", messages=[{"role": "user", "content": f"{document}\n\n{question}"}], max_tokens=200
)
print(answer.choices[0].message.content)
kv = answer.timings  # has the receipt of the cache
print(f"{kv['kv_cells_kept']:.0f} of {kv['kv_n_tokens']} tokens are exact in the cache; the others are compressed")
