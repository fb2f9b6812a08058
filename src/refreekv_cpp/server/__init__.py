"""llama-cpp-python's OpenAI-compatible server, with a KV policy for each model and the KV receipt in each usage.

`refreekv serve --python` runs it. Needs the packages of the extra `server`.
"""
