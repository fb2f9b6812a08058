#pragma once

#include "kernels/device/call.h"

#include <cuda_runtime.h>

namespace refreekv { namespace device {

void launch(const call & c, cudaStream_t stream);

}} // namespace refreekv::device
