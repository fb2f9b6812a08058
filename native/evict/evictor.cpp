#include "evict/evictor.h"

#include "api/error.h"
#include "cache/row-bytes.h"
#include "evict/attention-host.h"
#include "evict/attention-joined.h"
#include "kernels/codes.h"
#include "kernels/kernels.h"
#include "policies/policy.h"

#include "llama-hparams.h"

#include <algorithm>
#include <cstring>

namespace refreekv {

void evictor::count(const refreekv::attention & attn) {
    n_bytes_read    += attn.bytes_read;
    n_bytes_bounced += attn.bytes_bounced;
}

std::vector<held> evictor::cells_of(llama_seq_id seq_id) const {
    const auto & list = spans[seq_id];

    std::vector<held> res;
    for (const auto & [pos, cell] : logical.of_seq(seq_id)) {
        const bool is_protected = std::any_of(list.begin(), list.end(), [pos = pos](const auto & span) { return pos >= span.first && pos < span.second; });

        res.push_back({ pos, cell, 0, logical.shared(cell) || is_protected });
    }
    return res;
}

// those that it holds and queries can see
std::vector<held> evictor::held_by(const layer & layer, std::vector<held> all) const {
    size_t n = 0;
    for (const auto & c : all) {
        const int32_t slot = layer.res.slot(c.cell);
        if (slot >= 0 && !layer.res.hidden(slot)) {
            all[n++] = { c.pos, c.cell, (uint32_t) slot, c.stays };
        }
    }
    all.resize(n);

    return all;
}

static void keep_selected(const refreekv::selection & sel, std::vector<uint8_t> & keep) {
    std::fill(keep.begin(), keep.end(), 0);
    for (uint32_t r = 0; r < sel.n_keep; ++r) {
        keep[sel.order[r]] = 1;
    }
}

int32_t evictor::select(const layer & layer, llama_seq_id seq_id, const std::vector<held> & list, attention_scratch & memory, std::vector<uint8_t> & keep) {
    refreekv::selection sel;

    std::vector<uint8_t> pinned;
    for (const auto & c : list) {
        pinned.push_back(c.stays);
    }

    if (params.n_hot > 0) {
        select_hot(params, list.size(), pinned, sel);
        keep_selected(sel, keep);

        return REFREEKV_OK;
    }

    const auto * policy = policy_find(params.policy);

    if (!policy->needs_attention) {
        attention_host nothing(nullptr, 0, 0, list.size());

        policy->select(params, nothing, pinned, sel);
        keep_selected(sel, keep);

        return REFREEKV_OK;
    }

    std::unique_ptr<refreekv::attention> attn;
    if (const int32_t status = look(layer, seq_id, list, params, memory, attn)) {
        return status;
    }

    const bool ok = policy->select(params, *attn, pinned, sel);

    count(*attn);

    if (!ok) {
        set_error("layer %d: backend %s could not compute the attention rows", layer.il, ggml_backend_name(mover.backend_of(layer)));
        return REFREEKV_ERR_COMPUTE;
    }

    keep_selected(sel, keep);

    return REFREEKV_OK;
}

int32_t evictor::look(const layer & layer, llama_seq_id seq_id, const std::vector<held> & list, const refreekv_params & by, attention_scratch & memory, std::unique_ptr<refreekv::attention> & attn) const {
    attention_inputs in = {};

    in.backend = mover.backend_of(layer);
    in.host    = mover.host_backend();
    if (!in.backend) {
        set_error("layer %d: no backend of this context holds its cache", layer.il);
        return REFREEKV_ERR_COMPUTE;
    }
    if (std::any_of(layer.readers.begin(), layer.readers.end(), [](const reader & r) { return !r.known; })) {
        set_error("layer %d: attention with a bias or queries of its own kind cannot be judged; kv_policy must be \"full\", or one that does not look at attention such as \"streaming\"", layer.il);
        return REFREEKV_ERR_STATE;
    }

    const bool one_row = by.policy == REFREEKV_POLICY_REFREEKV && by.rows == REFREEKV_ROWS_LAST && by.ranking == REFREEKV_RANKING_POSITION;

    ring.rows(seq_id, list.back().pos, one_row ? 1 : by.n_window, by.window_step, in.rows, in.row_pos);

    if (in.row_pos.empty() || in.row_pos.back() != list.back().pos) {
        set_error("the last query of sequence %d is not there any more: decode a token before pruning", seq_id);
        return REFREEKV_ERR_STATE;
    }

    in.k           = layer.rows.k();
    in.n_embd_head = hparams.n_embd_head_k(layer.il);
    in.n_head_kv   = hparams.n_head_kv(layer.il);
    in.n_kv        = layer.res.n_slots();
    in.use_alibi   = hparams.use_alibi;
    in.max_bias    = layer.softmax.max_bias;
    in.soft_cap    = layer.softmax.soft_cap;
    in.pre_scale   = layer.softmax.pre_scale;
    in.post_scale  = layer.softmax.post_scale;

    for (const auto & c : list) {
        in.slots.push_back(c.slot);
        in.pos  .push_back(c.pos);
    }

    const auto of = [this, &memory, in](const reader & r) -> std::unique_ptr<refreekv::attention> {
        attention_inputs its = in;

        its.ring  = r.ring;
        its.n_gqa = hparams.n_gqa(r.il);

        if (r.sinks) {
            its.sinks.resize(its.n_head_kv*its.n_gqa);
            ggml_backend_tensor_get(r.sinks, its.sinks.data(), 0, its.sinks.size()*sizeof(float));
        }
        if (const auto * kernels = find_kernels(); kernels && !params.by_graph) {
            if (auto res = kernels->make_attention(its, memory)) {
                return res;
            }
        }
        return std::make_unique<attention_graph>(std::move(its), memory);
    };

    if (layer.readers.size() == 1) {
        attn = of(layer.readers[0]);
    } else {
        std::vector<attention_joined::part> parts;
        for (const auto & r : layer.readers) {
            parts.push_back([of, &r]() { return of(r); });
        }
        attn = std::make_unique<attention_joined>(std::move(parts));
    }

    attn->i_layer = &layer - layers.data();
    attn->n_layer = layers.size();

    return REFREEKV_OK;
}

// Cells that are about to leave. all: their rows, where they came to the host
void evictor::code(layer & layer, const std::vector<uint32_t> & cells, const rows::host_rows * all) {
    std::vector<uint32_t> slots;
    for (uint32_t cell : cells) {
        slots.push_back(layer.res.slot(cell));
    }

    if (!mover.in_place(layer)) {
        rows::host_rows own;
        if (!all) {
            mover.read(layer, slots, own);
            all = &own;
        }
        warm.add(layer, cells, [&](const uint32_t * indices, size_t n, uint8_t * rows_k, uint8_t * rows_v) {
            for (size_t i = 0; i < n; ++i) {
                memcpy(rows_k + i*layer.row_size(false), all->k.data() + indices[i]*layer.row_size(false), layer.row_size(false));
                if (layer.has_v()) {
                    memcpy(rows_v + i*layer.row_size(true), all->v.data() + indices[i]*layer.row_size(true), layer.row_size(true));
                }
            }
        });
        return;
    }

    const refreekv::row_bytes k(layer.rows.k(), false);
    const refreekv::row_bytes v(layer.rows.v(), layer.rows.get_shape().v_trans);

    warm.add(layer, cells, [&](const uint32_t * indices, size_t n, uint8_t * rows_k, uint8_t * rows_v) {
        uint32_t from[REFREEKV_CODED_CELLS];
        for (size_t i = 0; i < n; ++i) {
            from[i] = slots[indices[i]];
        }
        k.get(from, n, rows_k);
        v.get(from, n, rows_v);
    });
}

bool evictor::take_out(layer & layer, const std::vector<held> & list, const std::vector<uint8_t> & keep, scratch & memory) {
    std::vector<uint8_t> out(layer.res.n_slots(), 0);
    for (size_t c = 0; c < list.size(); ++c) {
        out[list[c].slot] = !keep[c];
    }

    if (params.mask_only) {
        for (uint32_t s = 0; s < out.size(); ++s) {
            if (out[s]) {
                layer.res.hide(s);
            }
        }
        return true;
    }

    std::vector<uint32_t> slots;
    std::vector<uint32_t> cells_out;
    for (uint32_t s = 0; s < out.size(); ++s) {
        if (out[s]) {
            cells_out.push_back(layer.res.cell(s));
        } else if (layer.res.cell(s) >= 0) {
            slots.push_back(s);
        }
    }

    std::sort(cells_out.begin(), cells_out.end());

    const auto * on_host = transfer.put(layer, cells_out, memory.lane);

    if (layer.warm) {
        code(layer, cells_out, on_host);
    }

    if (!mover.move(layer, slots, lay.padded(slots.size()))) {
        return false;
    }
    layer.res.compact(slots);

    return true;
}

int32_t evictor::evict(layer & layer, llama_seq_id seq_id, const std::vector<held> & all, const std::vector<llama_pos> * pos, scratch & memory, std::atomic<int64_t> & n_evicted) {
    const auto list = held_by(layer, all);

    std::vector<uint8_t> keep(list.size(), 1);

    if (list.empty()) {
        return REFREEKV_OK;
    } else if (pos) {
        for (size_t c = 0; c < list.size(); ++c) {
            keep[c] = std::binary_search(pos->begin(), pos->end(), list[c].pos) || list[c].stays;
        }
    } else if ((int32_t) all.size() < params.n_min) {
        return REFREEKV_OK;
    } else if (const int32_t status = select(layer, seq_id, list, memory.attention, keep)) {
        return status;
    }

    const int64_t n_out = std::count(keep.begin(), keep.end(), 0);

    if (n_out > 0 && !take_out(layer, list, keep, memory)) {
        set_error("layer %d: no memory to move the kept cells", layer.il);
        return REFREEKV_ERR_MEMORY;
    }
    n_evicted += n_out;

    return REFREEKV_OK;
}

} // namespace refreekv
