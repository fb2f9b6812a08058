"""The laboratory: what measures and compares caches. The runtime does not need it, and imports none of it but this.

Some of it needs the extra `lab` (pyproject.toml).
"""

from __future__ import annotations

COMMANDS = {
    "bench": "Speed and memory, stock and policies side by side; they read and decode in turn.",
    "memory": "Memory of the whole process, and the time of a decoded token: stock and policies side by side, each in "
    "a process of its own. All of them use flash attention.",
    "turns": "A chat about a long document, each question about another fact in it, with the full cache and pruned "
    "ones.",
    "eval": "What a pruned cache costs in answer quality, compared with the full cache on the same items.",
    "eval-report": "Write the report of a run again, finished or not; with pictures where matplotlib is installed.",
}
"""The names of its commands, and their help texts. `refreekv --help` lists them without importing the commands."""
