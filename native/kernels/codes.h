#pragma once

#include <cstddef>
#include <cstdint>

namespace refreekv {

// K or V of 64 neighbouring cells of one KV head in a few bits a number: every channel has its least number and its step (f16), and
// of each cell a code. number = least + step*code, about.
//
//   least  f16 [n]
//   step   f16 [n]
//   codes  [8*n*bits bytes], in lines of 64 codes for which the processors have a dot product of four bytes:
//
//   K: a line is 16 cells x 4 channels. Lines 2*i and 2*i + 1 of a pack are the channels 8*p.. and 8*p + 4.. of cells 16*i..
//   V: a line is 16 channels x 4 cells. Line i of pack 2*c + h is the channels 16*c.. of cells 32*h + 4*i..
//
// A pack is 8 lines in planes of 4, 2 and 1 bits, as many of these as the bits consist of, the low bits first. A plane of w bits takes
// w lines of memory, each with 8/w lines of codes beside each other in its bytes.
//
// Plain buffers; part of ggml's CPU backend (CMakeLists.txt), for each of its instruction sets.

static const int64_t REFREEKV_CODED_CELLS = 64;

static inline size_t codes_bytes(int64_t n_channels, int bits) {
    return n_channels*(2*sizeof(uint16_t) + REFREEKV_CODED_CELLS*bits/8);
}

// what the kernels can: n is a multiple of 16, bits are 2 to 6
bool codes_fit(int64_t n_channels, int bits);

// rows: n_cells of them, [n_channels] each, stride numbers apart; if n_cells is less than 64, the other cells get codes without meaning
void encode(const float * rows, int64_t stride, int64_t n_cells, int64_t n_channels, int bits, bool is_v, uint8_t * dst);

// one cell, [n_channels]: for tests, and where speed does not matter
void decode_cell(const uint8_t * codes, int64_t cell, int64_t n_channels, int bits, bool is_v, float * out);

// logits[i][cell] = q[i] . K of the cell, for n queries: [n][n_channels] -> [n][64]. The products of a query and the steps are rounded to
// whole multiples of unit[i], from -127 to 127: unit[i] is at least the largest of them, over 127. The error of rounding is
// corrected as if every code were the middle one
void dot_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * q, const float * unit, int64_t n, float * logits);

// out[i] += sum over the cells of w[i][cell] * V of the cell, for n heads: [n][64] -> [n][n_channels]. The weights are not negative, and
// are rounded in the same way, to 127ths of the largest of them
void add_codes(const uint8_t * codes, int64_t n_channels, int bits, const float * const * w, int64_t n, float * const * out);

// From codes of K with 4 bits to those that V has for its first n_v channels, which are whole packs of 16: the same numbers, in the order
// of weighted sums. dst: codes_bytes(n_v, 4)
void turn_codes(const uint8_t * codes, int64_t n_channels, int64_t n_v, uint8_t * dst);

} // namespace refreekv
