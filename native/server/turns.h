#pragma once

#include "refreekv.h"

namespace refreekv::server {

// the positions of the option `protect` stay, in a sequence that is empty or has just been opened
void protect(llama_context * ctx, llama_seq_id seq_id);

} // namespace refreekv::server
