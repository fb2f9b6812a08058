// A library with one damaged block: it is found, opened, and decoded with. Checksums are mended after a change, so that what lies behind them
// is reached.

#include "target.h"

#define XXH_INLINE_ALL
#include "library/block.h"
#include "xxhash/xxhash.h"

#include <filesystem>
#include <map>

static llama_context *                    ctx;
static std::vector<llama_token>           text;
static std::map<std::string, std::string> path_of; // by the label
static std::map<std::string, bytes>       whole;

static bytes contents(const std::string & path) {
    FILE * const file = fopen(path.c_str(), "rb");
    bytes        res(std::filesystem::file_size(path));
    res.resize(fread(res.data(), 1, res.size(), file));
    fclose(file);
    return res;
}

static std::string label_of(const uint8_t * data, size_t size) {
    const size_t at = sizeof(refreekv::block_header);
    return size < at + 40 ? "" : std::string((const char *) data + at, 40);
}

std::vector<bytes> setup() {
    const std::string library = folder() + "/library";
    const std::string file    = required("REFREEKV_FUZZ_MODEL");
    const char *      files[] = { file.c_str() };

    ctx = make_context(512, 1);
    refreekv_library_use(ctx, library.c_str(), 1ull << 40, files, 1, "", "");
    text = text_of(0, 500);
    for (size_t i = 0; i < text.size(); i += 250) {
        decode(ctx, 0, std::vector<llama_token>(text.begin() + i, text.begin() + i + 250));
    }
    refreekv_prune(ctx, 0);
    if (refreekv_library_keep(ctx, 0, text.data(), text.size(), nullptr, nullptr, nullptr, 0, false) <= 0) {
        fprintf(stderr, "nothing was kept: %s\n", refreekv_last_error());
        exit(2);
    }
    std::vector<bytes> res;
    for (const auto & entry : std::filesystem::recursive_directory_iterator(library)) {
        if (entry.path().extension() == ".block") {
            res.push_back(contents(entry.path()));
            path_of[label_of(res.back().data(), res.back().size())] = entry.path();
            whole[entry.path()] = res.back();
        }
    }
    return res;
}

void run(const uint8_t * data, size_t size) {
    const auto        it   = path_of.find(label_of(data, size));
    const std::string path = it == path_of.end() ? path_of.begin()->second : it->second;

    write(path, data, size);
    refreekv_library_check(path.c_str(), false);
    if (refreekv_library_find(ctx, 0, text.data(), text.size(), 0, false) > 0 && refreekv_library_open(ctx, 0) == REFREEKV_OK) {
        if (decode(ctx, 0, { 5 }) == 0) {
            refreekv_restore(ctx, 0);
        }
    }
    llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1);
    write(path, whole[path].data(), whole[path].size());
}

size_t mend(uint8_t * data, size_t size) {
    using refreekv::block_header;
    using refreekv::block_layer;

    block_header header;
    if (size < sizeof(header)) {
        return size;
    }
    memcpy(&header, data, sizeof(header));
    header.n_bytes = size;

    const uint64_t end = sizeof(header) + (uint64_t) header.n_label + header.n_layers*(uint64_t) sizeof(block_layer);
    if (end + sizeof(uint64_t) > size) {
        return size;
    }
    memcpy(data, &header, sizeof(header));
    for (uint64_t at = sizeof(header) + header.n_label; at < end; at += sizeof(block_layer)) {
        block_layer layer;
        memcpy(&layer, data + at, sizeof(layer));
        const auto fits = [&](uint64_t begin, uint64_t n) { return begin <= size && n <= size - begin; };

        const uint64_t n_codes   = header.n_groups*layer.group_bytes();
        const uint64_t n_records = header.n_cells*layer.record_bytes();
        if (fits(layer.codes_at, n_codes)) {
            layer.codes_sum = XXH3_64bits(data + layer.codes_at, n_codes);
        }
        if (fits(layer.records_at, n_records)) {
            layer.records_sum = XXH3_64bits(data + layer.records_at, n_records);
        }
        memcpy(data + at, &layer, sizeof(layer));
    }
    const uint64_t sum = XXH3_64bits(data, end);
    memcpy(data + end, &sum, sizeof(sum));
    return size;
}
