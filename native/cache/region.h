#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <memory>

namespace refreekv {

// A range of addresses of which only the first bytes have memory behind them. It grows and shrinks where it is: nothing is
// copied, and what goes is the system's, or the driver's, at once.
class region {
public:
    // max: bytes it may come to have. nullptr: not in buffers of this type, or not in pages that are small beside max
    static std::unique_ptr<refreekv::region> make(ggml_backend_buffer_type_t buft, size_t max);

    virtual ~region() = default;

    // false: there is no memory, and nothing has changed. New pages are zero. No graph may be running
    bool resize(size_t size);

    char * base() const { return addr; }
    size_t size() const { return n; }
    size_t bytes() const { return bytes_for(n); }
    size_t bytes_for(size_t size) const { return (size + page - 1)/page*page; } // memory comes in pages

    // of the tensors that are placed in it
    ggml_backend_buffer_t buffer() const { return buf.get(); }

protected:
    char * addr = nullptr;
    size_t max  = 0;
    size_t page = 0; // bytes

    ggml_backend_buffer_ptr buf;

    // whole pages
    virtual bool map  (size_t begin, size_t end) = 0; // of zeros. false: none of them is there
    virtual void unmap(size_t begin, size_t end) = 0;

    // what of it may be touched (AddressSanitizer)
    virtual void mark(size_t) {}

private:
    size_t n = 0;
};

// in the memory of a CUDA device; cache/region-cuda.cpp
std::unique_ptr<refreekv::region> region_cuda(ggml_backend_buffer_type_t buft, size_t max);

} // namespace refreekv
