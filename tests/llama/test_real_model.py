"""What a user would see, on SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path

import pytest

from refreekv_cpp import Llama
from refreekv_cpp.document import QUESTION, SECRET, write_document

pytestmark = pytest.mark.model


@pytest.mark.parametrize("kv_policy", ["full", "refreekv"])
def test_a_fact_planted_early_is_answered(default_model: Path, kv_policy: str) -> None:
    llm = Llama(str(default_model), n_ctx=4608, kv_policy=kv_policy, n_threads=2, verbose=False)
    document = write_document(4000, lambda text: len(llm.tokenize(text.encode(), add_bos=False)))
    answer = llm.create_chat_completion(
        [{"role": "user", "content": f"{document}\n\n{QUESTION}"}], temperature=0, max_tokens=32
    )
    assert SECRET in answer["choices"][0]["message"]["content"]

    stats = llm.kv_stats
    if kv_policy == "full":
        assert stats.budget == 1
    else:
        assert stats.budget <= 256 / stats.n_tokens
        assert stats.bytes + stats.bytes_codes < 0.28 * stats.bytes_full
        assert stats.bytes_freed > 0.9 * stats.bytes_full
        assert stats.n_rows_read > 0
