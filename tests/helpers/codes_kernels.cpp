// The kernels of codes by themselves, for test_codes.py, which builds this once per instruction set.

#include "kernels/codes.cpp"
#include "kernels/encode.cpp"

extern "C" {

bool   codes_fit   (int64_t n, int bits) { return refreekv::codes_fit(n, bits); }
size_t codes_bytes (int64_t n, int bits) { return refreekv::codes_bytes(n, bits); }
void   codes_encode(const float * rows, int64_t n_cells, int64_t n, int bits, bool v, uint8_t * dst) { refreekv::encode(rows, n, n_cells, n, bits, v, dst); }
void   codes_decode(const uint8_t * src, int64_t cell, int64_t n, int bits, bool v, float * out) { refreekv::decode_cell(src, cell, n, bits, v, out); }

void   codes_turn  (const uint8_t * codes, int64_t n, int64_t n_v, uint8_t * dst) { refreekv::turn_codes(codes, n, n_v, dst); }

void codes_dot(const uint8_t * codes, int64_t n, int bits, const float * q, const float * unit, int64_t n_q, float * out) {
    std::vector<const float *> rows;
    for (int64_t i = 0; i < n_q; ++i) {
        rows.push_back(q + i*n);
    }
    refreekv::dot_codes(codes, n, bits, rows.data(), unit, n_q, out);
}

void codes_add(const uint8_t * codes, int64_t n, int bits, const float * w, int64_t n_w, float * out) {
    std::vector<const float *> rows;
    std::vector<float *>       to;
    for (int64_t i = 0; i < n_w; ++i) {
        rows.push_back(w + i*refreekv::CELLS);
        to  .push_back(out + i*n);
    }
    refreekv::add_codes(codes, n, bits, rows.data(), n_w, to.data());
}

// ggml's, without its library: which of its builds would have them depends on the machine
void ggml_cpu_fp16_to_fp32(const ggml_fp16_t * src, float * dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        _Float16 x;
        memcpy(&x, src + i, sizeof(x));
        dst[i] = x;
    }
}

void ggml_cpu_fp32_to_fp16(const float * src, ggml_fp16_t * dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const _Float16 x = src[i];
        memcpy(dst + i, &x, sizeof(x));
    }
}

}
