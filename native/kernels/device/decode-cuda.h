#pragma once

#include "kernels/device/call.h"

#include <cuda_runtime.h>

namespace refreekv { namespace tiles {

void launch(const call & c, cudaStream_t stream);

}} // namespace refreekv::tiles
