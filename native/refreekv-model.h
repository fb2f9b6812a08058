#pragma once

#include <string>

struct llama_cparams;
struct llama_memory_params;
struct llama_model;

// why this model's memory cannot have a policy, by name; empty when it can
std::string refreekv_why_not(const llama_model & model);

// hook of llama_model::create_memory: throws std::runtime_error when the context about to be created was asked to have a
// policy (refreekv_next_context) and cannot have it
void refreekv_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);
