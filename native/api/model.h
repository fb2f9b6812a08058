#pragma once

#include <string>

struct llama_model;

namespace refreekv {

// why this model's memory cannot have a policy, by name; empty when it can
std::string why_not(const llama_model & model);

} // namespace refreekv
