#pragma once

namespace refreekv {

// The table of kernels, for the patched ggml-cpu.cpp. struct kernels: kernels/kernels.h
struct kernels;

// nullptr: this compiler lacks what the kernels are written with
const refreekv::kernels * cpu_kernels();

} // namespace refreekv
