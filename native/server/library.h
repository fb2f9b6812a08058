#pragma once

#include "refreekv.h"

#include <vector>

namespace refreekv::server {

// as begin_prompt(). n_past where the library has no more, or there is none
int32_t open_from_library(llama_context * ctx, llama_seq_id seq_id, int32_t n_past, const std::vector<llama_token> & prompt);

// tokens: of the sequence
void keep_in_library(llama_context * ctx, llama_seq_id seq_id, const std::vector<llama_token> & tokens);

} // namespace refreekv::server
