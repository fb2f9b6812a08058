#include "kernels/kernels.h"

#include "ggml-backend.h"

namespace refreekv {

const refreekv::kernels * find_kernels() {
    static const refreekv::kernels * const kernels = []() -> const refreekv::kernels * {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!cpu) {
            return nullptr;
        }

        void * get = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "refreekv_kernels");

        return get ? ((const refreekv::kernels * (*)()) get)() : nullptr;
    }();

    return kernels;
}

} // namespace refreekv
