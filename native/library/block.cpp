#include "library/block.h"

#include "cache/pages.h"

#define XXH_INLINE_ALL
#include "xxhash/xxhash.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace refreekv {

static const uint32_t REFREEKV_BLOCK_MAGIC   = 0x424b4652; // "RFKB"
static const uint32_t REFREEKV_BLOCK_VERSION = 2;

static const uint32_t MAX_LABEL  = 1 << 16; // a damaged header must not ask for more memory than this
static const uint32_t MAX_LAYERS = 1 << 12;
static const uint64_t ALIGN      = 4096;    // of records, so that a read of them begins with a page
static const size_t   PIECE      = 1 << 20;

static size_t head_bytes(const block & b) {
    return sizeof(block_header) + b.label.size() + b.layers.size()*sizeof(block_layer);
}

uint64_t checksum(const void * data, size_t size) {
    return XXH3_64bits(data, size);
}

bool block_layer::alike(const block_layer & o) const {
    return il == o.il && type_k == o.type_k && type_v == o.type_v && n_heads == o.n_heads && row_k == o.row_k && row_v == o.row_v &&
        head_k == o.head_k && head_v == o.head_v && codes_k == o.codes_k && codes_v == o.codes_v;
}

void block::lay_out() {
    header.magic    = REFREEKV_BLOCK_MAGIC;
    header.version  = REFREEKV_BLOCK_VERSION;
    header.n_label  = label.size();
    header.n_layers = layers.size();

    uint64_t at = head_bytes(*this) + sizeof(uint64_t);
    for (auto & l : layers) {
        l.codes_at = at;
        at += codes_bytes(l);
    }
    for (auto & l : layers) {
        at = (at + ALIGN - 1)/ALIGN*ALIGN;
        l.records_at = at;
        at += records_bytes(l);
    }
    header.n_bytes = at;
}

bool block::write_head() {
    std::string bytes((const char *) &header, sizeof(header));
    bytes += label;
    bytes.append((const char *) layers.data(), layers.size()*sizeof(layers[0]));

    const uint64_t sum = checksum(bytes.data(), bytes.size());
    bytes.append((const char *) &sum, sizeof(sum));

    return in->write(0, bytes.data(), bytes.size());
}

block open_block(const std::string & path) {
    block res;

    res.in = file::open(path);
    if (!res.in) {
        throw std::runtime_error(path + ": " + strerror(errno));
    }
    const auto damaged = [&](const char * what) { return std::runtime_error(path + ": " + what); };

    auto & h = res.header;

    if (!res.in->read(0, &h, sizeof(h)) || h.magic != REFREEKV_BLOCK_MAGIC) {
        throw damaged("not a block of the library");
    }
    if (h.version != REFREEKV_BLOCK_VERSION) {
        throw damaged("a block of another version");
    }
    if (h.n_label > MAX_LABEL || h.n_layers == 0 || h.n_layers > MAX_LAYERS || res.in->size() != (int64_t) h.n_bytes) {
        throw damaged("damaged, or cut off");
    }
    res.label .resize(h.n_label);
    res.layers.resize(h.n_layers);

    uint64_t sum = 0;
    std::string bytes(head_bytes(res), '\0');
    if (!res.in->read(0, &bytes[0], bytes.size()) || !res.in->read(bytes.size(), &sum, sizeof(sum)) || sum != checksum(bytes.data(), bytes.size())) {
        throw damaged("damaged: the checksum of its head is wrong");
    }
    if (memcmp(&h, bytes.data(), sizeof(h)) != 0) {
        throw damaged("somebody writes to it");
    }
    res.label.assign(bytes, sizeof(h), h.n_label);
    memcpy(res.layers.data(), bytes.data() + sizeof(h) + h.n_label, h.n_layers*sizeof(block_layer));

    return res;
}

void check_sections(const block & b, const std::string & path) {
    refreekv::bytes piece(PIECE);

    XXH3_state_t state;

    const auto check = [&](uint64_t at, uint64_t size, uint64_t sum, const char * what) {
        XXH3_64bits_reset(&state);

        for (uint64_t done = 0, n; done < size; done += n) {
            n = std::min<uint64_t>(PIECE, size - done);
            if (!b.in->read(at + done, piece.data(), n)) {
                throw std::runtime_error(path + ": its " + what + " cannot be read");
            }
            XXH3_64bits_update(&state, piece.data(), n);
        }
        if (XXH3_64bits_digest(&state) != sum) {
            throw std::runtime_error(path + ": damaged: the checksum of its " + what + " is wrong");
        }
    };
    for (const auto & l : b.layers) {
        check(l.codes_at, b.codes_bytes(l), l.codes_sum, "codes");
    }
    for (const auto & l : b.layers) {
        check(l.records_at, b.records_bytes(l), l.records_sum, "rows");
    }
}

} // namespace refreekv
