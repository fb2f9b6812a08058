#pragma once

#include "ggml-backend.h"

#include <functional>
#include <vector>

// What the patched sources of llama.cpp call, but for the constructors of memories (cache/create.h, cache/composite.h) and the
// kernels of ggml's CPU backend (kernels/kernels-cpu.h).

struct llama_context;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llm_graph_context;

class llama_kv_cache_context;

namespace refreekv {

// llama_context: model.create_memory(), with the policy that was asked for (refreekv_next_context). Throws std::runtime_error
// where that cannot be had
llama_memory_i * create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// one call of llm_graph_context::build_attn
struct attention_call {
    ggml_tensor * q_cur; // [n_embd_head, n_head,    n_tokens], after RoPE and rotation
    ggml_tensor * k_cur; // [n_embd_head, n_head_kv, n_tokens]; nullptr, as v_cur: the layer reads what another one has stored
    ggml_tensor * v_cur; // [n_embd_head, n_head_kv, n_tokens]
    ggml_tensor * kq_b;
    ggml_tensor * sinks;
    ggml_tensor * v_mla; // [n_embd_head_v, n_embd_out, n_head] what the attention of each head is multiplied with; nullptr: nothing
    float         kq_scale;
    int           il;
};

// llm_graph_context::build_attn: store K and V, and the attention to the cache, as build_attn_mha returns it; nullptr: the
// cache has no policy
ggml_tensor * build_attn(const llm_graph_context & graph, const llama_kv_cache_context * mctx, const attention_call & call);

// llama_context::graph_max_nodes: nodes that a graph may have beyond upstream's
uint32_t graph_extra_nodes(llama_memory_i * mem);

// llama_context::memory_update: a reservation for other layouts may have changed the sizes that upstream expects to stay
void after_reserve(llama_memory_i * mem, ggml_backend_sched_t sched, const std::vector<ggml_backend_t> & backends, std::vector<size_t> & sizes);

// llama_decode() and llama_process(): what decode() returns. Where it throws and the context has a policy, -2: what the batch has left behind is
// removed, and refreekv_last_error() says what it was
int32_t decode(llama_context * lctx, const std::function<int32_t()> & decode);

// At the end of llama_context::decode: publishes the figures for refreekv_get_stats() and its like. With REFREEKV_NATIVE_PRUNE=tests it
// first prunes the sequences that a batch of several tokens added to, and logs what cannot be pruned
void after_decode(llama_context * lctx);

// at the end of llama_context::sched_reserve; also called after a decode and after a memory update of ours
void publish_buffers(llama_context * lctx);

// llama_grammar_parser::parse: why a grammar was refused, for refreekv_last_error()
void take_error(const char * error);

} // namespace refreekv
