#pragma once

// The C API of refreekv: what llama.h has no room for. llama.h passes its structs by value through ctypes, so they
// must keep their layout; everything a KV policy needs goes through here instead.
//
// This header is also the source of the Python binding (cmake/build_binding.py reads it): plain C, no macros
// but REFREEKV_API.
//
// Errors: functions that can fail return a negative refreekv_status or NULL; refreekv_last_error() then names what was
// wrong and what is valid. Thread safety: as llama.h, one thread at a time per context;
// refreekv_get_stats() and refreekv_get_buffers() may be called by any thread as long as the context exists.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "llama.h"

#if defined(_WIN32)
#    ifdef LLAMA_BUILD
#        define REFREEKV_API __declspec(dllexport)
#    else
#        define REFREEKV_API __declspec(dllimport)
#    endif
#else
#    define REFREEKV_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum refreekv_status {
    REFREEKV_OK            =  0,
    REFREEKV_ERR_ARGUMENT  = -1, // a parameter is out of range
    REFREEKV_ERR_NO_POLICY = -2, // the context was created without a policy
    REFREEKV_ERR_STATE     = -3, // the sequence is not in a state that allows this
    REFREEKV_ERR_MEMORY    = -4, // an allocation failed
    REFREEKV_ERR_COMPUTE   = -5, // the backend could not compute the eviction graph
};

enum refreekv_policy_kind {
    REFREEKV_POLICY_ELASTIC   = 0, // nothing is evicted; the cache only grows and shrinks with its contents
    REFREEKV_POLICY_STREAMING = 1, // sinks and recent cells, fixed budget
    REFREEKV_POLICY_REFREEKV  = 2, // arXiv 2502.16886, section 3, and its variants
    REFREEKV_POLICY_SNAPKV    = 3, // pooled attention of the window, fixed budget
    REFREEKV_POLICY_H2O       = 4, // accumulated attention and recent cells, fixed budget
    REFREEKV_POLICY_PYRAMIDKV = 5, // as SnapKV, with budgets that fall over the layers
    REFREEKV_POLICY_TOP_P     = 6, // as many cells as hold a part of the attention
    REFREEKV_POLICY_CALLER    = 7, // queries are kept; the caller looks (refreekv_read_attention) and evicts (refreekv_keep)
};

// the order in which cells are kept
enum refreekv_ranking {
    REFREEKV_RANKING_POSITION = 0, // sinks, then from the last position backwards
    REFREEKV_RANKING_SCORE    = 1, // sinks, recent, then by pooled attention
};

// which attention rows the stop rule looks at, and how it joins them
enum refreekv_rows_rule {
    REFREEKV_ROWS_LAST  = 0, // the last row only, averaged over heads
    REFREEKV_ROWS_MEAN  = 1, // averaged over the rows of the window and over heads
    REFREEKV_ROWS_WORST = 2, // every row in every head has to satisfy it
};

enum refreekv_measure {
    REFREEKV_MEASURE_NORM = 0, // L2 norm of the row
    REFREEKV_MEASURE_MASS = 1, // sum of the row
};

// how SnapKV and PyramidKV smooth their scores over positions
enum refreekv_pooling {
    REFREEKV_POOLING_MEAN = 0,
    REFREEKV_POOLING_MAX  = 1,
};

// where evicted rows go
enum refreekv_cold_kind {
    REFREEKV_COLD_NONE   = 0, // nowhere: they are gone
    REFREEKV_COLD_AUTO   = 1, // a file when all of the cache is in host memory, else host memory
    REFREEKV_COLD_MEMORY = 2, // host memory
    REFREEKV_COLD_FILE   = 3, // a file without a name in cold_dir
};

// what a context does by itself as a conversation goes on, for each sequence; cache/turn.h has the rules
enum refreekv_turns {
    REFREEKV_TURNS_NONE    = 0, // nothing: the program calls refreekv_prune() and refreekv_restore()
    REFREEKV_TURNS_DROP    = 1, // it prunes after a prompt, before the answer's second token is decoded; the next prompt goes on from what is left
    REFREEKV_TURNS_RESTORE = 2, // as DROP, and before the next prompt is read, what was evicted comes back from the cold store
};

struct refreekv_params {
    int32_t policy;           // enum refreekv_policy_kind
    int32_t ranking;          // enum refreekv_ranking
    int32_t rows;             // enum refreekv_rows_rule
    int32_t measure;          // enum refreekv_measure
    int32_t pooling;          // enum refreekv_pooling
    bool    sinks_in_measure; // whether the sinks count in the measure

    int32_t n_window;         // queries kept per sequence and layer, 1..256
    int32_t window_step;      // every how many-th of them is looked at, counted back from the last
    int32_t n_sink;           // first positions that are always kept
    int32_t n_recent;         // last positions that are always kept
    int32_t n_hot;            // only for refreekv with theta > 0: the sinks and this many last positions stay, and attention is not looked
                              // at; 0: the rule decides there, too
    int32_t n_full_layers;    // leading attention layers that are kept whole
    int32_t n_pool;           // width of the pool over scores, odd
    int32_t n_block;          // cells are evicted in multiples of this; the graph's padding
    int32_t n_min;            // sequences shorter than this are left whole
    int32_t beta;             // pyramidkv: the mean budget of a layer over that of the last one

    float   threshold;        // what the measure may lose, 0..1
    float   mass_floor;       // floor of the denominator of the mass measure
    float   top_p;            // top_p: the part of the attention that has to stay, in (0, 1]
    double  budget;           // of policies with a fixed one: fraction of the cells to keep, or a count when > 1

    uint64_t memory_limit;    // bytes of K and V, and of codes, that a decode may not grow beyond; 0: none

    int32_t      cold;        // enum refreekv_cold_kind
    uint64_t     cold_limit;  // bytes that the cold store may hold; 0: no limit
    const char * cold_dir;    // of the file; has to stay valid until the context is there
    int32_t      cold_type;   // enum ggml_type of evicted rows, Q8_0, where the cache's is not quantised; -1: the cache's
    bool         cold_state;  // states (llama_state_get_data and its like) carry the evicted rows, too

    int32_t turns;            // enum refreekv_turns

    float   theta;            // decoding goes on attending to what is evicted, by codes, and reads rows that get this part of a head's
                              // attention or more from the cold store, if there is one; 0: what is evicted takes no part. Rows are read where
                              // the cache is in host memory and the heads are such that the decode kernel takes them. Not with ALiBi

    float   max_error;        // with theta: so many rows are read that codes misplace no more than this part of a head's attention; 0: theta
                              // alone says which are read

    bool    mask_only;        // debug: hide evicted cells instead of moving the kept ones
    bool    by_graph;         // debug: move rows, look at attention and attend to codes with graphs, as on a device, where the host could do it
};

struct refreekv_stats {
    int32_t  n_tokens;    // logical cells in use
    int32_t  n_layer;     // layers that have a cache
    int32_t  n_layout;    // distinct layouts: masks a graph needs
    int32_t  n_prunes;
    int64_t  prune_us;    // of all prunings
    uint64_t bytes;       // K and V storage, as allocated now
    uint64_t bytes_ring;  // query rings
    uint64_t bytes_other; // the rest of the context's memory: layers with a sliding window, recurrent states
    uint64_t bytes_full;  // what the full cache of n_tokens needs
    uint64_t bytes_freed; // given back by evictions so far
    uint64_t bytes_read;  // what prunings read back from the layers' backends: scores and sums, no K or V
    uint64_t bytes_bounced; // K, V and queries that came to the host because their backend lacks a kernel; 0 on those that have all
    uint64_t bytes_cold;  // evicted rows that are kept in the cold store
    int32_t  cold;        // enum refreekv_cold_kind, what it is
    bool     cold_full;   // rows were lost that should have gone there: no room, or no room left on the disk
    int32_t  n_restores;
    int64_t  restore_us;  // of all restores
    int32_t  n_turns_failed; // prunings and restores that were to be done between batches (refreekv_turns), and failed: the sequence went on without
    float    codes_share; // bytes of the codes of an evicted row over those that it has in f16; 0: what is evicted takes no part
    float    theta;       // the part of a head's attention at which decoding reads an evicted row; 0: it reads none
    int64_t  n_rows_read; // evicted rows, of one KV head each, that it has read from the cold store
    int64_t  n_rows_left; // that it would have read, and for which their codes stood: the rows were not in memory, or were too many
    uint64_t bytes_codes; // of evicted rows
    float    by_codes;    // the part of a head's attention that codes stood for, the mean over all that was decoded
    float    error_bound; // with max_error: the part of a head's attention that they misplaced at most, the worst of all that was decoded
};

// one kind of memory (a ggml backend buffer type) of a model and its context, as the allocator has it
struct refreekv_buffer_info {
    const char * name;          // of the buffer type, static
    uint64_t     bytes_model;
    uint64_t     bytes_context; // the cache and what belongs to it
    uint64_t     bytes_compute;
};

// what a model and its context take of the memory of one device
struct refreekv_device_info {
    const char * name;               // ggml's: "CUDA0", "CPU"; static
    const char * description;        // what the machine calls it; static
    bool         is_host;            // host memory: the last one, with all that lies on no device
    uint64_t     bytes_free;         // as the device has it now; 0 of 0 where it does not say
    uint64_t     bytes_total;
    uint64_t     bytes_model;
    uint64_t     bytes_repacked;     // of bytes_model: weights that the CPU's kernels want in another order than the file has
    uint64_t     bytes_context;      // the cache of n_ctx and what belongs to it, whether it is there yet or not
    uint64_t     bytes_compute;      // compute buffers, as reserved
    uint64_t     bytes_compute_used; // of them: what graphs need that put out one row of logits per sequence
    uint64_t     bytes_work;         // scratch memory of the CPU's threads beside them
};

struct refreekv_layer_info {
    int32_t  il;          // layer in the model
    int32_t  n_head;      // query heads
    int32_t  n_head_kv;
    int32_t  n_embd_head;
    int32_t  n_readers;   // layers of the model that attend to its cells, itself among them
    int32_t  n_kept;      // cells held
    int32_t  n_capacity;  // cells there is room for
    int32_t  layout;      // layers with equal layout share mask and indices
    uint64_t row_bytes;   // K and V of one cell
    uint32_t row_numbers; // in them. Where V is a part of K (MLA) it does not count
    float    kq_scale;    // of the attention logits; 0 before the first decode
};

// which version of this header the library was built from
REFREEKV_API int32_t refreekv_abi_version(void);

// the last error of this thread, "" when there was none
REFREEKV_API const char * refreekv_last_error(void);

// before a call of llama.h that may leave an error here
REFREEKV_API void refreekv_forget_last_error(void);

// a mask of the hooks that have run in this process, see native/api/process.h
REFREEKV_API uint32_t refreekv_hooks_ran(void);

REFREEKV_API struct refreekv_params refreekv_params_default(void);

// the policy of the contexts that this thread creates from now on; NULL: upstream's own cache. It stays in force until it
// is set again or forgotten, which leaves it to the environment (REFREEKV_NATIVE_POLICY, see api/environment.h)
REFREEKV_API int32_t refreekv_next_context(const struct refreekv_params * params);
REFREEKV_API void    refreekv_forget_next_context(void);

// NULL when the model can have a policy, else the reason why not
REFREEKV_API const char * refreekv_model_refusal(const struct llama_model * model);

// apply the context's policy to a sequence, now. Returns the number of cells evicted, over all layers.
// Logits of the last decode stay readable.
REFREEKV_API int64_t refreekv_prune(struct llama_context * ctx, llama_seq_id seq_id);

// keep just these positions of a sequence in one layer (il of the model). For policies of the caller's
REFREEKV_API int64_t refreekv_keep(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, const llama_pos * pos, int32_t n_pos);

// positions p0 to p1 - 1 of a sequence are kept whatever the policy, in all layers, until the whole sequence is removed.
// They need not be there yet.
REFREEKV_API int32_t refreekv_protect(struct llama_context * ctx, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

// about n_tokens tokens are going to be decoded, in several batches: the first makes room for all of them, so that the cache need
// not grow with each. Without a memory_limit, and where there is the memory; 0: no more of them come
REFREEKV_API int32_t refreekv_expect(struct llama_context * ctx, int32_t n_tokens);

// The next n_tokens tokens of a sequence are a prompt, or the rest of one, however they come in batches, and are expected as by
// refreekv_expect(). 0: all of it is in the cache already. -1: one that was announced is given up, and no pruning is due
REFREEKV_API int32_t refreekv_prompt(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens);

// 1 when a prompt of the sequence was read and nothing of it has been pruned since, 0 otherwise. With REFREEKV_TURNS_NONE only what
// refreekv_prompt() has announced is a prompt, and it is the program's to prune it before it decodes the answer's second token
REFREEKV_API int32_t refreekv_is_due(struct llama_context * ctx, llama_seq_id seq_id);

// A new prompt of n_prompt tokens begins with the first n_prefix tokens of the sequence. Returns how many of them need not be read again. The
// policy judges by the last n_window queries of a prompt: where some of these are not there any more, all of them have to be read. It is
// n_prefix for a policy that does not look at attention
REFREEKV_API int32_t refreekv_usable_prefix(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_prefix, int32_t n_prompt);

// bring back what was evicted of a sequence from the cold store, bit for bit unless cold_type is smaller than the cache's.
// Returns the cells brought back, over all layers; the sequence is whole then, and can be rewound, copied in part and pruned again. Removing a part of a pruned
// sequence (llama_memory_seq_rm), or copying one, does this by itself.
// REFREEKV_ERR_STATE: rows are not there any more (no cold store, or it was full); REFREEKV_ERR_MEMORY: no memory, or not
// within memory_limit. The sequence stays pruned then, though some layers may have been brought back.
REFREEKV_API int64_t refreekv_restore(struct llama_context * ctx, llama_seq_id seq_id);

// The library: a folder with texts that were read before (native/library/library.h), from which a sequence is opened in place of reading them again.
// Recurrent layers and layers with a window are not in it: their states (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) are the caller's to take and to set,
// and are kept beside the text.

// NULL when sequences of this context can be written to a library and opened from it, else the reason why not
REFREEKV_API const char * refreekv_library_refusal(struct llama_context * ctx);

// The context uses a folder from now on, which is made where it is not there. limit: bytes of all its files. files: those of the model and of its
// adapters. reads_with: what else the numbers in the cache depend on, besides the options of the context; evicts_with: what those of answers
// depend on, besides the parameters of the policy
REFREEKV_API int32_t refreekv_library_use(struct llama_context * ctx, const char * folder, uint64_t limit, const char * const * files, int32_t n_files, const char * reads_with, const char * evicts_with);

// How many of these tokens, from the first on, refreekv_library_open() would have a sequence hold. 0: no more than reading is worth, where n_have
// of them are there already. with_state: only as far as there is a state behind them. What was damaged is removed, and the last error says so
REFREEKV_API int32_t refreekv_library_find(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens, int32_t n_have, bool with_state);

// The sequence becomes what was found for it, as if it had been read and pruned. Rows that a pruning would have evicted stay in the files. After
// an error, the sequence is empty
REFREEKV_API int32_t refreekv_library_open(struct llama_context * ctx, llama_seq_id seq_id);

// The state behind what was found last, before it is opened. Returns its size in bytes, and writes it where that is n_max at most
REFREEKV_API int64_t refreekv_library_state(struct llama_context * ctx, void * data, int64_t n_max);

// Write a sequence, whose tokens these are, and the states behind the first state_tokens[i] of them. Returns how many tokens the library has of it
// now, 0 for a short text; after an error the library is what it was. The states take the place of those that were written of the sequence when
// it was shorter, unless they stay
REFREEKV_API int32_t refreekv_library_keep(struct llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens,
        const int32_t * state_tokens, const void * const * states, const size_t * state_sizes, int32_t n_states, bool states_stay);

// the key of the last block that was kept of a sequence, in hexadecimal digits; replaced: of the block that was removed then, because this one
// has its tokens and more. "": there is none. It is there until the sequence is kept again
REFREEKV_API const char * refreekv_library_key(struct llama_context * ctx, llama_seq_id seq_id, bool replaced);

// REFREEKV_ERR_STATE: the file is none of a library's, or what is in it is not what was written. may_remove: it is removed then, unless it is
// not this user's, or cannot be opened. Any thread
REFREEKV_API int32_t refreekv_library_check(const char * path, bool may_remove);

// Make the folder of a library where it is not there, and remove what was left behind, what was not used for longest beyond the limit, and states
// of texts that are gone. Any thread
REFREEKV_API int32_t refreekv_library_tidy(const char * folder, uint64_t limit);

// test hook: let the n-th write to a cold store or a library from now on fail, and all after it, in this process; 0: none
REFREEKV_API void refreekv_fail_cold(int32_t n);

// test hook: let the n-th allocation of rows from now on fail, and all after it, in this process; 0: none
REFREEKV_API void refreekv_fail_allocation(int32_t n);

// the last position that a pruning of this sequence looked at: rewinding to or before it needs what was evicted back
// -1 when the sequence is whole, < -1 on error
REFREEKV_API llama_pos refreekv_pruned_pos(struct llama_context * ctx, llama_seq_id seq_id);

// The figures of the cache and of the layers that have one, all of one moment: the end of the last operation on it, or of the last
// batch. Returns the number of layers, writes at most n_max of them. Any thread. Works without a policy, too: the only figure that
// changes is n_tokens then: the current number, and while another thread decodes a batch, the number before that batch
REFREEKV_API int32_t refreekv_get_stats(struct llama_context * ctx, struct refreekv_stats * stats, struct refreekv_layer_info * layers, int32_t n_max);

// upstream's llama_get_memory_breakdown, of the same moment; returns the number of buffer types, writes at most n_max of
// them. Any thread; works without a policy, too
REFREEKV_API int32_t refreekv_get_buffers(struct llama_context * ctx, struct refreekv_buffer_info * info, int32_t n_max);

// the devices of the context's model, then the host; returns their number, writes at most n_max of them. bytes_compute_used and
// bytes_work are those of models that were loaded with no_alloc, 0 otherwise; bytes_context of others is what is allocated now
REFREEKV_API int32_t refreekv_get_devices(struct llama_context * ctx, struct refreekv_device_info * info, int32_t n_max);

// Below, i_layer counts the layers that have a cache, in the order of refreekv_get_stats().

// the positions of a sequence that a layer holds, ascending; returns their number, writes at most n_max of them
REFREEKV_API int32_t refreekv_get_kept(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, llama_pos * pos, int32_t n_max);

// what the metric would read, for oracles: the queries in the ring (oldest first), [n_head * n_embd_head] each, and the
// keys of a layer (position order), [n_head_kv * n_embd_head] each, dequantised; both return the number of rows
REFREEKV_API int32_t refreekv_read_queries(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, llama_pos * pos, int32_t n_max);
REFREEKV_API int32_t refreekv_read_keys   (struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, llama_pos * pos, int32_t n_max);

// what a policy would look at: the attention of the queries in the ring to the cells that a layer holds,
// out[(h*n_rows + r)*n_cells + j], rows oldest first, cells in position order (refreekv_get_kept has their positions). The heads of
// layers that share the cells come behind the layer's own; refreekv_read_queries has the layer's own only.
// Sets shape to n_head, n_rows, n_cells; writes nothing when n_max, the room in floats, is less than their product.
REFREEKV_API int32_t refreekv_read_attention(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, float * out, uint64_t n_max, int32_t * shape);

// the policy alone, on attention that the caller has: attn[(h*n_rows + r)*n_cells + j], rows oldest first, cells in
// position order, of layer i_layer of n_layer. kept[j] is set to 1 or 0. Returns the number kept.
REFREEKV_API int32_t refreekv_select(const struct refreekv_params * params, const float * attn, int32_t n_head, int32_t n_rows, int32_t n_cells, int32_t i_layer, int32_t n_layer, uint8_t * kept);

#ifdef __cplusplus
}
#endif
