#include "library/text.h"

#include "tiers/file.h"

#include "hash.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace refreekv {

static std::string bytes_of(const std::vector<llama_token> & tokens) {
    return std::string((const char *) tokens.data(), tokens.size()*sizeof(tokens[0]));
}

std::string hash_of(const std::string & bytes) {
    return hash_sha256_hex(bytes.data(), bytes.size()).substr(0, REFREEKV_KEY_DIGITS);
}

std::string text_of(const std::vector<double> & numbers) {
    std::string res;
    for (const double number : numbers) {
        char text[32];
        snprintf(text, sizeof(text), "%.17g ", number);
        res += text;
    }
    return res;
}

std::string text_block::label() const {
    return key + parent + bytes_of(tokens);
}

text_block make_block(const std::string & parent, const std::string & salt, uint32_t first, std::vector<llama_token> tokens) {
    return { hash_of(parent + '\0' + salt + '\0' + bytes_of(tokens)), parent, first, std::move(tokens), salt.empty() };
}

text_block read_label(const std::string & label, uint32_t first) {
    const size_t n_keys = 2*REFREEKV_KEY_DIGITS;

    if (label.size() <= n_keys || (label.size() - n_keys)%sizeof(llama_token) != 0) {
        throw std::runtime_error("its label is of no text");
    }
    text_block res = { label.substr(0, REFREEKV_KEY_DIGITS), label.substr(REFREEKV_KEY_DIGITS, REFREEKV_KEY_DIGITS), first, {}, false };

    res.tokens.resize((label.size() - n_keys)/sizeof(llama_token));
    memcpy(res.tokens.data(), label.data() + n_keys, label.size() - n_keys);

    return res;
}

std::string file_identity(const std::string & path) {
    static const uint64_t N_SAMPLES = 256, SAMPLE = 16 << 10, HEAD = 8 << 20; // bytes

    const auto in   = file::open(path, false);
    const auto size = in ? in->size() : -1;
    if (size < 0) {
        throw std::runtime_error(path + ": " + strerror(errno));
    }
    std::string bytes = std::to_string(size);

    const auto add = [&](uint64_t at, uint64_t n) {
        const size_t there = bytes.size();
        bytes.resize(there + n);
        if (!in->read(at, &bytes[there], n)) {
            throw std::runtime_error(path + ": cannot be read");
        }
    };
    add(0, std::min<uint64_t>(size, HEAD));
    for (uint64_t i = 0; i < N_SAMPLES; ++i) {
        const uint64_t at = size/N_SAMPLES*i;
        add(at, std::min<uint64_t>(size - at, SAMPLE));
    }
    return hash_of(bytes);
}

} // namespace refreekv
