"""On a Mac with Apple silicon: the policies on Metal beside the CPU, then the same with our kernels for Metal.

    python tests/tools/gpu/metal.py

Prints Markdown (docs/lab/metal-check.md says what it should look like). The exit code is 1 where something is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[3]
BACKENDS = [sys.executable, str(ROOT / "tests/tools/backends.py")]
KERNELS = "REFREEKV_DEVICE_KERNELS=1"

CODES = """
import sys
sys.path.insert(0, "tests/helpers")
from pathlib import Path
from support import load
from tiny import random_tokens
from tiny_architectures import tiny_models
from refreekv_cpp import ReFreeKV

llm = load(tiny_models(Path(sys.argv[1]))("gqa64"), ReFreeKV(), codes=True, n_gpu_layers=-1, verbose=True)
llm.eval(random_tokens(1060))
llm.prune_kv()
share = llm.kv_stats.codes_share
whose = "ours" if share < 0.3 else "those of ggml, so the device has none of our kernels (see the log)"
print(f"Codes take {100 * share:.1f} % of the bytes in f16: {whose}.")
sys.exit(share >= 0.3)
"""


def main() -> None:
    codes = [0]
    if sys.platform != "darwin":
        print("This is no Mac: everything runs on the CPU, and shows no more than that this script works.\n")

    def section(title: str, command: list[str], **environment: str) -> None:
        print(f"\n## {title}\n", flush=True)
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment})
        codes.append(run.returncode)
        if run.returncode:
            print(f"\n**exit code {run.returncode}**", flush=True)

    section("Policies, by ggml's operations", BACKENDS)
    with TemporaryDirectory() as folder:
        section("Whether there are our kernels", [sys.executable, "-c", CODES, folder], REFREEKV_DEVICE_KERNELS="1")
    policies = ["--policy=full", "--policy=refreekv, kernels without rows"]
    section("Our kernels", [*BACKENDS, "--env", KERNELS, *policies])
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
