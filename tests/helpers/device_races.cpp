// Runs the tiles of native/kernels/device by teams of threads, for ThreadSanitizer: a barrier that is missing is a race, as it would be on a
// GPU. Prints how many exact rows were read, and whether one thread by itself has the same results; for test_device_tiles.py.

#include "device_tiles.cpp"

#include <cstdio>
#include <random>

int main() {
    static const int N_CODED = 6*64, N_HELD = 128, N_GQA = 6, N_K = 32, N_V = 48, N_TOKENS = 2;

    std::mt19937                    rng(1);
    std::normal_distribution<float> normal;

    const auto numbers = [&](int n, float size) {
        std::vector<float> res(n);
        for (auto & x : res) {
            x = size*normal(rng);
        }
        return res;
    };
    const auto q    = numbers(N_TOKENS*N_GQA*N_K, 3.0f);
    const auto k    = numbers((N_CODED + N_HELD)*N_K, 1.0f);
    const auto v    = numbers((N_CODED + N_HELD)*N_V, 1.0f);
    const auto mask = std::vector<float>(N_TOKENS*(N_CODED + N_HELD), 0.0f);

    const size_t size_k = codes_bytes(N_K, tiles::BITS_K);
    const size_t size_v = codes_bytes(N_V, tiles::BITS_V);

    std::vector<uint8_t> codes_k(N_CODED/64*size_k);
    std::vector<uint8_t> codes_v(N_CODED/64*size_v);
    for (int b = 0; b < N_CODED/64; ++b) {
        codes_encode(k.data() + b*64*N_K, 64, N_K, tiles::BITS_K, false, codes_k.data() + b*size_k);
        codes_encode(v.data() + b*64*N_V, 64, N_V, tiles::BITS_V, true,  codes_v.data() + b*size_v);
    }

    std::vector<float>    rows;
    std::vector<uint64_t> exact;
    rows.reserve(N_CODED*(N_K + N_V));
    for (int i = 0; i < N_CODED; ++i) {
        exact.push_back((uint64_t) (uintptr_t) (rows.data() + rows.size()));
        rows.insert(rows.end(), k.data() + i*N_K, k.data() + (i + 1)*N_K);
        rows.insert(rows.end(), v.data() + i*N_V, v.data() + (i + 1)*N_V);
    }

    const auto run = [&](int n_threads, uint64_t & n_read) {
        std::vector<float> out(N_TOKENS*N_GQA*N_V);

        const auto bytes = [](const float * p) { return (const uint8_t *) p; };

        const tiles_call call = {
            N_TOKENS, 1, N_GQA, N_K, N_V, N_CODED, N_HELD, 0.18f, 0.0f, 1.0f, 0.003f, tiles::F32, tiles::F32, false, false,
            q.data(), bytes(mask.data()), nullptr, bytes(k.data() + N_CODED*N_K), bytes(v.data() + N_CODED*N_V), codes_k.data(), codes_v.data(),
            exact.data(), out.data(), &n_read,
        };
        tiles_run(&call, n_threads, N_TOKENS);
        return out;
    };
    uint64_t n_read[2] = {};

    const bool same = run(0, n_read[0]) == run(5, n_read[1]);

    printf("%d rows, %s\n", (int) n_read[0], same && n_read[0] == n_read[1] ? "the same" : "others");
    return 0;
}
