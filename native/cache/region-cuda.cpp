// Memory of a CUDA device that grows and shrinks in place, by the driver's virtual memory management.

#include "cache/region.h"

#ifdef REFREEKV_CUDA_VMM

#include <cuda.h>

#include <cstdlib>
#include <cstring>

#endif

namespace refreekv {

#ifdef REFREEKV_CUDA_VMM

// A page is never less than 2 MiB: pages that are to be small beside a region, 1/16 of it, waste no more than that
// part of what the full cache would take.
static const size_t REFREEKV_MIN_PAGES = 16;

class region_vmm : public refreekv::region {
public:
    region_vmm(ggml_backend_buffer_type_t buft, CUdevice device, size_t n) {
        prop.type          = CU_MEM_ALLOCATION_TYPE_PINNED;
        prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        prop.location.id   = device;

        if (cuMemGetAllocationGranularity(&page, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM) != CUDA_SUCCESS || n < REFREEKV_MIN_PAGES*page) {
            return;
        }

        CUdeviceptr ptr = 0;

        max = (n + page - 1)/page*page;
        if (cuMemAddressReserve(&ptr, max, 0, 0, 0) != CUDA_SUCCESS) {
            return;
        }
        addr = (char *) ptr;

        // to its backend a tensor is a pointer, and the kind of buffer it says it is in
        buf.reset(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alignment(buft)));
    }

    ~region_vmm() override {
        if (addr) {
            if (bytes() > 0) {
                unmap(0, bytes());
            }
            cuMemAddressFree((CUdeviceptr) addr, max);
        }
    }

private:
    CUmemAllocationProp prop = {};

    bool map(size_t begin, size_t end) override {
        size_t i = begin;
        for (; i < end; i += page) {
            CUmemGenericAllocationHandle handle;
            if (cuMemCreate(&handle, page, &prop, 0) != CUDA_SUCCESS) {
                break;
            }
            const bool mapped = cuMemMap((CUdeviceptr) addr + i, page, 0, handle, 0) == CUDA_SUCCESS;
            cuMemRelease(handle); // it lives as long as it is mapped
            if (!mapped) {
                break;
            }
        }

        CUmemAccessDesc access = {};
        access.location = prop.location;
        access.flags    = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;

        if (i < end || cuMemSetAccess((CUdeviceptr) addr + begin, end - begin, &access, 1) != CUDA_SUCCESS) {
            if (i > begin) {
                unmap(begin, i);
            }
            return false;
        }
        clear(begin, end);

        return true;
    }

    void clear(size_t begin, size_t end) const {
        ggml_init_params params = { ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr ctx(ggml_init(params));

        ggml_tensor * t = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, end - begin);
        t->buffer = buf.get();
        t->data   = addr + begin;

        ggml_backend_tensor_memset(t, 0, 0, end - begin);
    }

    void unmap(size_t begin, size_t end) override {
        cuMemUnmap((CUdeviceptr) addr + begin, end - begin);
    }
};

std::unique_ptr<refreekv::region> region_cuda(ggml_backend_buffer_type_t buft, size_t max) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    if (!dev || strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "CUDA") != 0 || ggml_backend_dev_buffer_type(dev) != buft ||
            getenv("GGML_CUDA_ENABLE_UNIFIED_MEMORY")) { // which may be more than the device has
        return nullptr;
    }

    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(dev, &props);

    CUdevice device;
    int      can = 0;
    if (!props.device_id || cuDeviceGetByPCIBusId(&device, props.device_id) != CUDA_SUCCESS ||
            cuDeviceGetAttribute(&can, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device) != CUDA_SUCCESS || !can) {
        return nullptr;
    }
    auto res = std::make_unique<region_vmm>(buft, device, max);

    return res->buffer() ? std::move(res) : nullptr;
}

#else

std::unique_ptr<refreekv::region> region_cuda(ggml_backend_buffer_type_t, size_t) {
    return nullptr;
}

#endif

} // namespace refreekv
