#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

// Some of the heads of a tensor [n_embd_head, n_head, n_tokens], and back. Heads are numbered by KV head: with grouped
// queries the n_gqa query heads of a KV head lie side by side and go together.

// [n_embd_head, heads.size()*n_gqa, n_tokens]; t itself when that is all of it
ggml_tensor * refreekv_select_heads(ggml_context * ctx, ggml_tensor * t, const std::vector<uint32_t> & heads, int64_t n_gqa);

// parts[i] has the heads heads[i], as [n_embd_head*n_heads, n_tokens]; together they are all heads, each once.
// [n_embd_head*n_head, n_tokens], in the order of heads
ggml_tensor * refreekv_join_heads(ggml_context * ctx, const std::vector<ggml_tensor *> & parts, const std::vector<std::vector<uint32_t>> & heads, int64_t n_gqa);
