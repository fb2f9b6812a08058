#pragma once

#include <string>

struct llama_model;

// why this model's memory cannot have a policy, by name; empty when it can
std::string refreekv_why_not(const llama_model & model);
