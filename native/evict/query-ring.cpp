#include "evict/query-ring.h"

#include "llama-batch.h"

#include <algorithm>

namespace refreekv {

query_ring::query_ring(uint32_t n_queries, uint32_t n_seq) : n_queries(n_queries), n_seq(n_seq), pos_of_row((size_t) n_queries*n_seq, -1) {}

int64_t query_ring::row(llama_seq_id seq_id, llama_pos pos) const {
    return (int64_t) seq_id*n_queries + pos % n_queries;
}

uint32_t query_ring::n_copy(const llama_ubatch & ubatch) const {
    return std::min(ubatch.n_tokens, n_queries*std::max(1u, std::min(ubatch.n_seqs_unq, n_seq)));
}

std::vector<std::pair<uint32_t, int64_t>> query_ring::wanted(const llama_ubatch & ubatch) const {
    std::vector<std::pair<uint32_t, int64_t>> res;
    std::vector<uint32_t> n_taken(n_seq, 0);

    for (uint32_t i = ubatch.n_tokens; i-- > 0 && res.size() < n_copy(ubatch);) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];

        // the cells of an image share a position: the last one takes its row
        const bool again = !res.empty() && ubatch.seq_id[res.back().first][0] == seq_id && ubatch.pos[res.back().first] == ubatch.pos[i];

        if ((uint32_t) seq_id < n_seq && n_taken[seq_id] < n_queries && !again) {
            n_taken[seq_id]++;
            res.emplace_back(i, row(seq_id, ubatch.pos[i]));
        }
    }

    return res;
}

void query_ring::set_input(ggml_tensor * src, ggml_tensor * dst, const llama_ubatch & ubatch) const {
    const auto list = wanted(ubatch);

    std::vector<int32_t> src_data(dst->ne[0], 0);
    std::vector<int64_t> dst_data(dst->ne[0], n_rows() - 1);

    for (size_t i = 0; i < list.size(); ++i) {
        src_data[i] = list[i].first;
        dst_data[i] = list[i].second;
    }

    ggml_backend_tensor_set(src, src_data.data(), 0, ggml_nbytes(src));
    ggml_backend_tensor_set(dst, dst_data.data(), 0, ggml_nbytes(dst));
}

void query_ring::note(const llama_ubatch & ubatch) {
    for (const auto & [i, row] : wanted(ubatch)) {
        pos_of_row[row] = ubatch.pos[i];
    }
}

void query_ring::rows(llama_seq_id seq_id, llama_pos pos_max, uint32_t n, llama_pos step, std::vector<int32_t> & rows, std::vector<llama_pos> & pos) const {
    rows.clear();
    pos.clear();

    if ((uint32_t) seq_id >= n_seq || pos_max < 0) {
        return;
    }

    const llama_pos n_rows = std::min<llama_pos>(std::min(n, n_queries), pos_max + 1);

    for (llama_pos back = (n_rows - 1)/step*step; back >= 0; back -= step) {
        const llama_pos p = pos_max - back;

        if (pos_of_row[row(seq_id, p)] == p) {
            rows.push_back(row(seq_id, p));
            pos.push_back(p);
        }
    }
}

void query_ring::forget(llama_seq_id seq_id) {
    if (seq_id < 0) {
        std::fill(pos_of_row.begin(), pos_of_row.end(), -1);
    } else if ((uint32_t) seq_id < n_seq) {
        std::fill_n(pos_of_row.begin() + (size_t) seq_id*n_queries, n_queries, -1);
    }
}

} // namespace refreekv
