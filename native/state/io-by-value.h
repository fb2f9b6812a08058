#pragma once

#include "llama-io.h"

#include "ggml-backend.h"

#include <vector>

namespace refreekv {

// States that stay on a device (LLAMA_STATE_SEQ_FLAGS_ON_DEVICE) keep views of the tensors they were written from, from one
// state to the next. Rows of a cache with a policy move, and their tensors with them, so they go into such a state as bytes.
class write_by_value : public llama_io_write_i {
public:
    explicit write_by_value(llama_io_write_i & io) : io(io) {}

    void   write(const void * src, size_t size) override { io.write(src, size); }
    size_t n_bytes() override { return io.n_bytes(); }

    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        bytes.resize(size);
        ggml_backend_tensor_get(tensor, bytes.data(), offset, size);
        io.write(bytes.data(), size);
    }

private:
    llama_io_write_i &   io;
    std::vector<uint8_t> bytes;
};

class read_by_value : public llama_io_read_i {
public:
    explicit read_by_value(llama_io_read_i & io) : io(io) {}

    void   read(void * dst, size_t size) override { io.read(dst, size); }
    size_t n_bytes() override { return io.n_bytes(); }

    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        bytes.resize(size);
        io.read(bytes.data(), size);
        ggml_backend_tensor_set(tensor, bytes.data(), offset, size);
    }

private:
    llama_io_read_i &    io;
    std::vector<uint8_t> bytes;
};

} // namespace refreekv
