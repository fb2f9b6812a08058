#include "kernels/kernels.h"

#include "ggml-backend.h"

const refreekv_kernels * refreekv_find_kernels() {
    static const refreekv_kernels * const kernels = []() -> const refreekv_kernels * {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!cpu) {
            return nullptr;
        }

        void * get = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "refreekv_kernels");

        return get ? ((const refreekv_kernels * (*)()) get)() : nullptr;
    }();

    return kernels;
}
