#pragma once

#include "cache/pages.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace refreekv {

// A graph that gathers rows on a backend. Rows are 32-bit words to it: get_rows and concat copy those verbatim on every
// backend, whatever the type of the cache.
class gather {
public:
    gather();

    // the rows of the slots from the i-th on, one after the other
    ggml_tensor * rows(ggml_tensor * src, bool trans, const std::vector<uint32_t> & slots, size_t i, const refreekv::bytes & in);

    // rows() to where they belong: to the slots from the i-th on. in_place: when all of them have been read
    ggml_tensor * store(ggml_tensor * rows, ggml_tensor * dst, bool trans, size_t i, bool in_place);

    // false: the backend lacks an operation, or memory
    bool compute(ggml_backend_t backend, ggml_tensor * out);

private:
    ggml_context_ptr ctx;
    ggml_gallocr_ptr galloc;

    std::vector<int32_t> idxs;
    std::vector<std::pair<ggml_tensor *, const void *>> uploads;

    ggml_tensor * upload(ggml_tensor * t, const void * data);

    // the first n rows of a contiguous tensor, read as another type
    ggml_tensor * as_type(ggml_tensor * t, ggml_type type, int64_t n);
};

} // namespace refreekv
