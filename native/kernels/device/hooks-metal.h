#pragma once

// What the patched Metal backend calls. In C, since a part of that backend is in Objective-C.

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// whether a node is one of ours that the kernels can compute on this device. The first time, Metal compiles them
bool refreekv_metal_supports(ggml_metal_device_t device, const struct ggml_tensor * node);

// such a node. Returns 1: how many nodes of the graph are encoded
int refreekv_metal_encode(ggml_metal_device_t device, ggml_metal_encoder_t encoder, struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif
