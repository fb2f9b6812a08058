#pragma once

#include "ggml.h"

// What is evicted, in the attention of a few tokens (kernels/decode.h): operations (ggml_custom_op_t) between those for the cells
// that are held. userdata: a refreekv_decode_evicted.

// What the sketches say. Sources: q, k. dst: [n_blocks, rounded up to whole vectors; n_head*n_tokens], the logarithm of the sum of
// the weights that a block's cells have
void refreekv_judge_blocks(ggml_tensor * dst, int ith, int nth, void * userdata);

// What has to be read. Sources: the parts of the cells that are held, what was judged, the sinks. dst: [1, n_head*n_tokens], the
// least that a block's logarithm is to be; of the lesser ones all together have no more than the tolerance of the line's attention
void refreekv_choose_blocks(ggml_tensor * dst, int ith, int nth, void * userdata);

// Those that count, by their own rows. Sources: q, k, v, what was judged, what was chosen. dst: [n_embd_head_v + N_LANES,
// n_head*n_tokens, n_blocks], the parts that they are
void refreekv_read_blocks(ggml_tensor * dst, int ith, int nth, void * userdata);
