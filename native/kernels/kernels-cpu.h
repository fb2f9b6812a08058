#pragma once

// The table of kernels, for the patched ggml-cpu.cpp. struct refreekv_kernels: kernels/kernels.h
struct refreekv_kernels;

// nullptr: this compiler lacks what the kernels are written with
const refreekv_kernels * refreekv_cpu_kernels();
