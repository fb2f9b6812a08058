"""What is left where a batch could not be decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import load, logits
from tiny import random_tokens

from refreekv_cpp import ReFreeKV

PROMPT = random_tokens(300)


@pytest.mark.parametrize("policy", ["refreekv", "full", ReFreeKV(n_min=0)], ids=["refreekv", "full", "pruned"])
def test_the_same_prompt_is_not_answered_with_logits_that_are_gone(
    tiny_model: Path, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # once the prompt was taken for one whose logits are still there, and the answer was made of what lay in their place
    llm = load(tiny_model, policy, kv_evicted="restore") if policy != "full" else load(tiny_model, policy)
    expected = next(llm.generate(PROMPT, temp=0.0)), logits(llm)

    def fail(batch: Any) -> None:
        logits_of = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))
        logits_of[:] = 0.0
        logits_of[7] = 1.0
        raise RuntimeError("llama_decode returned -2")

    with monkeypatch.context() as patch:
        patch.setattr(llm._ctx, "decode", fail)
        with pytest.raises(RuntimeError):
            llm.eval([5])
    assert next(llm.generate(PROMPT, temp=0.0)) == expected[0]
    np.testing.assert_allclose(logits(llm), expected[1], atol=1e-3 * float(np.abs(expected[1]).max()))
