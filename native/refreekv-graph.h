#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_memory_i;
struct llama_ubatch;

class llama_kv_cache_context;
class llama_memory_hybrid_context;
class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;
class llm_graph_input_mem_hybrid;
class llm_graph_input_rs;
class llm_graph_result;

// hook of llm_graph_context::build_attn_inp_kv: the attention inputs of a cache with a policy; nullptr: it has none
std::unique_ptr<llm_graph_input_attn_kv> refreekv_build_attn_inp_kv(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams, const llama_kv_cache_context * mctx);

// hook of llm_graph_context::build_attn_inp_kv_iswa: upstream's inputs for the layers with a window, ours for the others
std::unique_ptr<llm_graph_input_attn_kv_iswa> refreekv_build_attn_inp_kv_iswa(
        ggml_context * ctx, const llama_ubatch & ubatch, const llm_graph_input_attn_kv_iswa & upstream);

// hook of llm_graph_context::build_attn for iSWA: the inputs of the layers without a window; nullptr: they are upstream's
llm_graph_input_attn_kv * refreekv_attn_inp_base(llm_graph_input_attn_kv_iswa * inp);

// hook of llm_graph_context::build_inp_mem_hybrid: ours for the attention layers; takes inp_rs unless it returns nullptr
std::unique_ptr<llm_graph_input_mem_hybrid> refreekv_build_inp_mem_hybrid(
        ggml_context * ctx, const llama_ubatch & ubatch, const llama_hparams & hparams, const llama_cparams & cparams,
        const llama_memory_hybrid_context * mctx, std::unique_ptr<llm_graph_input_rs> & inp_rs);

// hook of llama_context::graph_max_nodes: nodes that a graph may have beyond upstream's, when every layer is divided in the
// most scattered way
uint32_t refreekv_graph_extra_nodes(llama_memory_i * mem);

// hook of llama_context::memory_update: a reservation for other layouts may have changed the sizes that upstream expects to
// stay as they are
void refreekv_after_reserve(llama_memory_i * mem, ggml_backend_sched_t sched, const std::vector<ggml_backend_t> & backends, std::vector<size_t> & sizes);

struct refreekv_attn_call {
    ggml_context * ctx;
    ggml_cgraph  * gf;
    ggml_tensor  * q_cur;    // [n_embd_head, n_head,    n_tokens], after RoPE and rotation
    ggml_tensor  * k_cur;    // [n_embd_head, n_head_kv, n_tokens]
    ggml_tensor  * v_cur;    // [n_embd_head, n_head_kv, n_tokens]
    ggml_tensor  * kq_b;
    ggml_tensor  * sinks;
    float          kq_scale;
    int            il;
};

// hook of llm_graph_context::build_attn: the mask and indices of the layer's first group, and a copy of its last queries
// into the ring; the K and V of its other groups are stored. Returns inp itself when the cache has no policy.
llm_graph_input_attn_kv * refreekv_attn_layer(llm_graph_input_attn_kv * inp, const refreekv_attn_call & call);

// build_attn_mha on some of the heads: q, k, v, kq_mask, sinks
using refreekv_attn_mha = std::function<ggml_tensor * (ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *)>;

// hook of llm_graph_context::build_attn_mha: the attention of a layer that is divided into groups, group by group;
// nullptr: it is not. q, kq_b, kq_mask and sinks are those that mha would get for the whole layer.
ggml_tensor * refreekv_attn_groups(const llm_graph_result & res, ggml_context * ctx, ggml_tensor * q, ggml_tensor * kq_b,
        ggml_tensor * kq_mask, ggml_tensor * sinks, int il, const refreekv_attn_mha & mha);
