// The kernels for devices (native/kernels/device), compiled for the host, and the codes that they read; for test_device_tiles.py.

#include "codes_kernels.cpp"

#include "kernels/device/host.h"

#include <condition_variable>
#include <mutex>
#include <thread>

namespace tiles = refreekv::tiles;

// threads that wait for each other, as those of a block of a GPU do
struct barrier {
    explicit barrier(int size) : size(size) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);

        const int64_t its = n_rounds;
        if (++n_waiting == size) {
            n_waiting = 0;
            n_rounds++;
            all_there.notify_all();
        } else {
            all_there.wait(lock, [&] { return n_rounds != its; });
        }
    }

private:
    const int               size;
    int                     n_waiting = 0;
    int64_t                 n_rounds  = 0;
    std::mutex              mutex;
    std::condition_variable all_there;
};

struct threads {
    int       rank;
    int       size;
    barrier & all;

    void sync() const { all.wait(); }
};

static void run_by_threads(const tiles::call & c, int n) {
    tiles::run(c, [&](int64_t n_room, auto && f) {
        std::vector<float>       room(n_room, NAN); // as memory of a GPU may have it
        std::vector<std::thread> team;
        barrier                  all(n);

        for (int i = 0; i < n; ++i) {
            team.emplace_back([&, i] { f(threads { i, n, all }, room.data()); });
        }
        for (auto & t : team) {
            t.join();
        }
    });
}

extern "C" {

// What a call needs, in the order of test_device_tiles.py
struct tiles_call {
    int32_t n_tokens, n_head_kv, n_gqa, n_k, n_v, n_coded, n_held;
    float   pre_scale, soft_cap, post_scale, theta;
    int32_t type_cache, type_exact, mask_is_half, v_is_transposed;

    const float *    q;     // [n_tokens][n_head][n_k]
    const uint8_t *  mask;  // [n_tokens][n_coded + n_held]
    const float *    sinks; // [n_head], or nullptr
    const uint8_t *  k;     // [n_held][n_head_kv] rows
    const uint8_t *  v;     // likewise, or [n_head_kv][n_v][n_held]
    const uint8_t *  codes_k;
    const uint8_t *  codes_v;
    const uint64_t * exact; // [n_coded], or nullptr
    float *          out;
    uint64_t *       n_read;
};

static int64_t row_bytes(tiles::number type, int64_t n) {
    return type == tiles::Q8_0 ? n/32*34 : type == tiles::F32 ? 4*n : 2*n;
}

// n_threads: of a team; 0: what the library does on the host. n_at_once: tokens, as memory for the scratch asks for
void tiles_run(const tiles_call * in, int n_threads, int n_at_once) {
    tiles::call c = {};

    c.s.n_tokens   = in->n_tokens;
    c.s.n_head_kv  = in->n_head_kv;
    c.s.n_gqa      = in->n_gqa;
    c.s.n_k        = in->n_k;
    c.s.n_v        = in->n_v;
    c.s.n_coded    = in->n_coded;
    c.s.n_held     = in->n_held;
    c.s.pre_scale  = in->pre_scale;
    c.s.soft_cap   = in->soft_cap;
    c.s.post_scale = in->post_scale;
    c.s.theta      = in->theta;

    c.q              = in->q;
    c.s.next_head_q  = c.s.n_k;
    c.s.next_token_q = c.s.n_head()*c.s.n_k;

    c.mask              = in->mask;
    c.s.mask_type       = in->mask_is_half ? tiles::F16 : tiles::F32;
    c.s.next_token_mask = row_bytes(c.s.mask_type, c.s.n_places());
    c.sinks             = in->sinks;
    c.s.has_sinks       = in->sinks != nullptr;

    const auto    type   = (tiles::number) in->type_cache;
    const int64_t head_k = row_bytes(type, c.s.n_k);
    const int64_t head_v = row_bytes(type, c.s.n_v);
    const int64_t size   = row_bytes(type, 1);

    c.k   = in->k;
    c.v   = in->v;
    c.s.k = { type, c.s.n_head_kv*head_k, head_k, 0 };
    c.s.v = in->v_is_transposed ? tiles::rows { type, size, c.s.n_v*c.s.n_held*size, c.s.n_held*size } : tiles::rows { type, c.s.n_head_kv*head_v, head_v, 0 };

    c.codes_k = in->codes_k;
    c.codes_v = in->codes_v;

    c.exact          = in->exact;
    c.s.exact_type_k = c.s.exact_type_v = (tiles::number) in->type_exact;
    c.s.exact_k      = row_bytes(c.s.exact_type_k, c.s.n_k);
    c.s.exact_head   = c.s.exact_k + row_bytes(c.s.exact_type_v, c.s.n_v);

    c.out    = in->out;
    c.n_read = in->n_read;

    std::vector<tiles::four_numbers> scratch(n_at_once*c.s.scratch_size()/4 + 1, { NAN, NAN, NAN, NAN });
    c.scratch = scratch[0].x;

    for (int t = 0; t < in->n_tokens; t += n_at_once) {
        const tiles::call its = c.of_tokens(t, std::min(n_at_once, in->n_tokens - t));
        if (n_threads > 0) {
            run_by_threads(its, n_threads);
        } else {
            tiles::run(its);
        }
    }
}

// one block by its codes: sums of products with LINES lines
void tiles_dot(const uint8_t * codes, int n, int bits, const float * scaled, float * out) {
    for (int cell = 0; cell < tiles::CELLS; ++cell) {
        float * to = out + cell*tiles::LINES;
        switch (bits) {
            case 2: tiles::dot_codes<2>(codes, n, cell, scaled, to); break;
            case 3: tiles::dot_codes<3>(codes, n, cell, scaled, to); break;
            case 4: tiles::dot_codes<4>(codes, n, cell, scaled, to); break;
            case 5: tiles::dot_codes<5>(codes, n, cell, scaled, to); break;
            case 6: tiles::dot_codes<6>(codes, n, cell, scaled, to); break;
        }
    }
}

void tiles_add(const uint8_t * codes, int n, int bits, const float * weights, float * out) {
    const float * its[tiles::LINES];
    for (int i = 0; i < tiles::LINES; ++i) {
        its[i] = weights + i*tiles::CELLS;
    }
    for (int d = 0; d < n; ++d) {
        float * to = out + d*tiles::LINES;
        switch (bits) {
            case 2: tiles::add_codes<2>(codes, n, d, its, to); break;
            case 3: tiles::add_codes<3>(codes, n, d, its, to); break;
            case 4: tiles::add_codes<4>(codes, n, d, its, to); break;
            case 5: tiles::add_codes<5>(codes, n, d, its, to); break;
            case 6: tiles::add_codes<6>(codes, n, d, its, to); break;
        }
    }
}

float tiles_half(uint16_t x) { return tiles::from_half(x); }

}
