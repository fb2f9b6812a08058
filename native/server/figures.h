#pragma once

#include "refreekv.h"

namespace refreekv::server {

// a sequence begins a prompt: what is known of it is of the one before
void forget_figures(llama_context * ctx, llama_seq_id seq_id);

} // namespace refreekv::server
