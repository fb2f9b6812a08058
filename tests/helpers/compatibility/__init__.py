"""What a program that uses llama-cpp-python may rely on: one small check a feature, run with both policies.

The test suite runs them (test_compatibility.py), and write_compatibility.py makes docs/reference/compatibility.md.
"""

from __future__ import annotations

from compatibility import architectures, completions, images, objects, options, sampling, sequences, states
from compatibility.check import POLICIES, Check, Outcome, registered_in

__all__ = ["CHECKS", "POLICIES", "Check", "Outcome"]

CHECKS: list[Check] = [
    check
    for module in (completions, images, sampling, states, objects, sequences, options, architectures)
    for check in registered_in(module)
]
