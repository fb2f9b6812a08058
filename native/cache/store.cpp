#include "cache/store.h"

#include "api/process.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <new>

namespace refreekv {

store::store(cache & kv, const refreekv_params & params, bool prunes_read) : p(kv, params), prunes_read(prunes_read) {
    publish();

    LLAMA_LOG_INFO("refreekv: the cache starts empty and grows with its contents; the sizes logged by llama_kv_cache are those of n_ctx\n");
}

refreekv::store * store::of(llama_memory_t mem) {
    auto * cache = cache::of(mem);

    return cache ? &cache->get_store() : nullptr;
}

void store::apply(const slot_info & sinfo, const llama_ubatch & ubatch) {
    hook_ran(HOOK_APPLY);

    p.release_stale();

    for (auto & layer : p.layers) {
        p.logical.for_batch(sinfo, [&](uint32_t cell) { layer.res.assign(cell); });
        GGML_ASSERT(layer.res.n_slots() <= layer.rows.capacity());
    }

    // equal layers that take the same cells stay equal
    if (p.layouts.is_stale()) {
        p.update_layouts();
    }

    p.ring.note(ubatch);
    p.turn.apply(ubatch);
    p.note_exact(ubatch);

    p.n_expected -= std::min(p.n_expected, ubatch.n_tokens);

    if (prunes_read && ubatch.n_tokens > 1) {
        update.note_read(ubatch);
    }
}

bool store::note_attention(int32_t il, float kq_scale, ggml_tensor * sinks, bool known) {
    auto & layer  = p.layers[layer_of(il)];
    auto & reader = layer.readers[reader_of(il)];

    if (reader_of(il) > 0 && kq_scale != layer.kq_scale) {
        return false;
    }
    reader.sinks   = sinks;
    reader.known   = known;
    layer.kq_scale = kq_scale;

    const bool  is_grok    = p.model.arch == LLM_ARCH_GROK; // without flash attention, which upstream refuses for it
    const float cap        = is_grok || p.hparams.attn_soft_cap ? p.hparams.f_attn_logit_softcapping : 0.0f;
    const bool  flash_attn = !p.v_trans;

    // build_attn_mha scales the logits after their cap, flash attention before
    const float before = is_grok ? p.hparams.f_attn_out_scale : flash_attn ? kq_scale : 1.0f;

    layer.softmax = { cap > 0.0f ? before/cap : 1.0f, cap, cap > 0.0f && flash_attn ? 1.0f : kq_scale, p.hparams.f_max_alibi_bias, &p.no_memory };

    return true;
}

void store::check_memory() {
    if (p.no_memory.exchange(false)) {
        throw std::bad_alloc();
    }
}

const decode_softmax * store::softmax_of(int32_t il) const {
    const auto & layer = p.layers[layer_of(il)];

    return layer.readers[reader_of(il)].known ? &layer.softmax : nullptr;
}

void store::run_with_cache(ggml_tensor * node, uint32_t i_layer) const {
    p.mover.run_on(node, p.mover.backend_of(p.layers[i_layer]));
}

void store::run_on_host(ggml_tensor * node) const {
    p.mover.run_on(node, p.mover.host_backend());
}

const warm_view * store::warm_of(uint32_t i_layer) const {
    const auto & warm = p.layers[i_layer].warm;

    return warm && !warm->get_tensors() ? &warm->view : nullptr;
}

const warm_cells * store::codes_of(uint32_t i_layer) const {
    const auto & warm = p.layers[i_layer].warm;

    return warm && warm->n_places() > 0 ? warm.get() : nullptr;
}

void store::announce(llama_seq_id seq_id, int32_t n_tokens) {
    p.turn.announce(seq_id, n_tokens);
    p.n_expected = p.turn.n_announced();
}

int32_t store::usable_prefix(llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt) const {
    const int32_t n_needed = n_prefix - std::max(0, n_prompt - p.params.n_window);

    // where positions have several dimensions, tokens of an image share one: there is no counting back, and what is there is looked at
    if (!has_rings() || n_needed <= 0 || p.hparams.n_pos_per_embd() > 1) {
        return n_prefix;
    }
    std::vector<int32_t>   rows;
    std::vector<llama_pos> pos;
    p.ring.rows(seq_id, n_prefix - 1, n_needed, 1, rows, pos);

    return (int32_t) pos.size() == n_needed ? n_prefix : n_prefix - n_needed;
}

int32_t store::protect(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto & list = p.spans[seq_id];

    const auto span = std::make_pair(p0, p1);
    if (std::find(list.begin(), list.end(), span) == list.end()) {
        list.push_back(span);
    }

    return REFREEKV_OK;
}

} // namespace refreekv
