// A ggml backend for tests: a device whose memory the host cannot see, on any machine.
//
// It computes on the CPU, so its results are the CPU's bit for bit. But its addresses are not the host's (reading one
// faults), and every byte that crosses is written down with the name of its tensor. So what a GPU would do to the cache can
// be asserted: that it answers the same, and what of it comes to the host.
//
// Loaded with ggml_backend_load(); far_device.py has the rest.

#include "ggml-backend-impl.h"
#include "ggml-backend.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

// what crossed, in the order it did

struct crossing {
    char     name[GGML_MAX_NAME];
    uint64_t size;
    int32_t  to_host;
};

static std::vector<crossing> crossings;
static std::set<int>         refused; // ggml_op
static bool                  shares = true; // has host memory that it can read

extern "C" {

void     far_device_forget()                           { crossings.clear(); }
uint64_t far_device_n_crossings()                      { return crossings.size(); }
void     far_device_crossing(uint64_t i, crossing * c) { *c = crossings[i]; }

// supports_op says no to these from now on; nullptr: to none
void far_device_refuse(const char * op) {
    if (!op) {
        refused.clear();
    }
    for (int i = 0; op && i < GGML_OP_COUNT; ++i) {
        if (strcmp(op, ggml_op_name((ggml_op) i)) == 0) {
            refused.insert(i);
        }
    }
}

// whether there is host memory that the device can read, from now on
void far_device_share(bool shares_now) { shares = shares_now; }

}

static void note(const ggml_tensor * t, size_t size, bool to_host) {
    crossing c = {};
    memcpy(c.name, t->name, sizeof(c.name));
    c.size    = size;
    c.to_host = to_host;
    crossings.push_back(c);
}

// memory: every buffer begins at the same address, which is nowhere that can be read (as Vulkan's do)

static const uintptr_t FAR = (uintptr_t) 1 << 62;

static ggml_backend_buffer_t buffer_of(const ggml_tensor * t) { return t->view_src ? t->view_src->buffer : t->buffer; }

static uint8_t * there(const ggml_tensor * t) { return (uint8_t *) buffer_of(t)->context + ((uintptr_t) t->data - FAR); }

static const char * buft_name(ggml_backend_buffer_type_t) { return "FarDevice"; }

static void   buffer_free (ggml_backend_buffer_t buf) { free(buf->context); }
static void * buffer_base (ggml_backend_buffer_t)     { return (void *) FAR; }
static void   buffer_clear(ggml_backend_buffer_t buf, uint8_t value) { memset(buf->context, value, buf->size); }

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset(there(t) + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    note(t, size, false);
    memcpy(there(t) + offset, data, size);
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    note(t, size, true);
    memcpy(data, there(t) + offset, size);
}

static bool is_ours(ggml_backend_buffer_t buf) { return buf && buf->buft->iface.get_name == buft_name; }

static bool buffer_copy(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!is_ours(src->buffer)) {
        return false;
    }
    memcpy(there(dst), there(src), ggml_nbytes(src));
    return true;
}

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    void * data = nullptr;
    if (posix_memalign(&data, 64, size) != 0) {
        return nullptr;
    }
    memset(data, 0xff, size); // NaN, as far as anyone may rely on it
    return ggml_backend_buffer_init(buft, { buffer_free, buffer_base, nullptr, buffer_memset, buffer_set, buffer_get, nullptr, nullptr, buffer_copy, buffer_clear, nullptr }, data, size);
}

static size_t buft_alignment(ggml_backend_buffer_type_t) { return 64; }

// backend

static ggml_backend_t cpu() {
    static ggml_backend_t backend = [] {
        ggml_backend_t res   = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
        auto           set_n = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(ggml_backend_get_device(res)), "ggml_backend_set_n_threads");
        set_n(res, 1);
        return res;
    }();
    return backend;
}

static const char * backend_name(ggml_backend_t)         { return "FarDevice"; }
static void         backend_free(ggml_backend_t backend) { delete backend; }

static ggml_status backend_compute(ggml_backend_t, ggml_cgraph * gf) {
    std::set<ggml_tensor *> tensors;
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);
        tensors.insert(node);
        tensors.insert(node->src, node->src + GGML_MAX_SRC);
    }
    tensors.erase(nullptr);

    std::vector<std::pair<ggml_tensor *, void *>> moved;
    for (ggml_tensor * t : tensors) {
        if (is_ours(buffer_of(t))) {
            moved.emplace_back(t, t->data);
            t->data = there(t);
        }
    }
    const ggml_status res = ggml_backend_graph_compute(cpu(), gf);

    for (const auto & [t, data] : moved) {
        t->data = data;
    }
    return res;
}

// device

static const char * device_name(ggml_backend_dev_t) { return "FarDevice"; }
static const char * device_desc(ggml_backend_dev_t) { return "memory that the host cannot see"; }
static enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
static void device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = (size_t) 4 << 30; }

static void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(dev);
    props->description = device_desc(dev);
    props->type        = device_type(dev);
    device_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x72, 0x65, 0x66, 0x72, 0x65, 0x65, 0x6b, 0x76, 0x2d, 0x74, 0x65, 0x73, 0x74, 0x2d, 0x64, 0x31 };

    ggml_backend_i iface = {};
    iface.get_name       = backend_name;
    iface.free           = backend_free;
    iface.graph_compute  = backend_compute;

    return new ggml_backend { &guid, iface, dev, nullptr };
}

static ggml_backend_buffer_type_t device_buft(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type buft = { { buft_name, buft_alloc, buft_alignment, nullptr, nullptr, nullptr }, dev, nullptr };
    return &buft;
}

// host memory that the device can read: its buffers say so by their type
static const char * host_buft_name(ggml_backend_buffer_type_t) { return "FarDevice_Host"; }

static ggml_backend_buffer_t host_buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buf = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buf && shares) {
        buf->buft = buft;
    }
    return buf; // as CUDA does, it may be of another type
}

static bool host_buft_is_host(ggml_backend_buffer_type_t) { return true; }

static ggml_backend_buffer_type_t device_host_buft(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type buft = { { host_buft_name, host_buft_alloc, buft_alignment, nullptr, nullptr, host_buft_is_host }, dev, nullptr };
    return &buft;
}

// as on Vulkan, there is no matrix product with a part of quantised rows
static bool is_part_of_rows(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];

    return op->op == GGML_OP_MUL_MAT && ggml_is_quantized(a->type) && a->nb[1] != ggml_row_size(a->type, a->ne[0]);
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    return refused.count(op->op) == 0 && !is_part_of_rows(op) && ggml_backend_supports_op(cpu(), op);
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return buft->iface.get_name == buft_name; }

// registry

static const char *       reg_name        (ggml_backend_reg_t) { return "FarDevice"; }
static size_t             reg_device_count(ggml_backend_reg_t) { return 1; }
static ggml_backend_dev_t reg_device      (ggml_backend_reg_t reg, size_t) {
    static ggml_backend_device device = {
        { device_name, device_desc, device_memory, device_type, device_props, device_init, device_buft, device_host_buft, nullptr,
          device_supports_op, device_supports_buft, nullptr, nullptr, nullptr, nullptr }, reg, nullptr };
    return &device;
}

// It has our kernels for devices: their nodes come with a function for the CPU
static void * reg_proc_address(ggml_backend_reg_t, const char * name) { return strcmp(name, "refreekv_device_kernels") == 0 ? (void *) reg_proc_address : nullptr; }

extern "C" ggml_backend_reg_t ggml_backend_init() {
    static ggml_backend_reg reg = { GGML_BACKEND_API_VERSION, { reg_name, reg_device_count, reg_device, reg_proc_address }, nullptr };
    return &reg;
}
