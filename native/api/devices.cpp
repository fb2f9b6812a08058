// What a model and its context take of the memory of each device, for `refreekv plan`: as upstream's
// common_get_device_memory_data has it (common/fit.cpp), which is not part of libllama.

#include "refreekv.h"

#include "api/error.h"
#include "cache/store.h"

#include "ggml-cpu.h"
#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <vector>

static refreekv_device_info describe(ggml_backend_dev_t dev) {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(dev, &free, &total);

    refreekv_device_info res = {};

    res.name        = ggml_backend_dev_name(dev);
    res.description = ggml_backend_dev_description(dev);
    res.bytes_free  = free;
    res.bytes_total = total;

    return res;
}

// The scratch memory that the CPU backend takes for a graph, beside the compute buffers.
static size_t work_size(ggml_backend_sched_t sched, ggml_cgraph * gf, int32_t n_threads) {
    auto * backend = ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1); // ggml has the CPU there
    auto * reg     = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));

    if (auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set(backend, n_threads);
    }

    const int n_nodes = ggml_graph_n_nodes(gf);

    ggml_init_params params = { ggml_graph_overhead_custom(n_nodes, false), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_cgraph * part = ggml_new_graph_custom(ctx.get(), n_nodes, false);
    for (int i = 0; i < n_nodes; ++i) {
        auto * node = ggml_graph_node(gf, i);
        if (ggml_backend_sched_get_tensor_backend(sched, node) == backend) {
            ggml_graph_add_node(part, node);
        }
    }
    if (ggml_graph_n_nodes(part) == 0) {
        return 0;
    }

    auto * plan = ggml_backend_graph_plan_create(backend, part);
    if (!plan) {
        return 0;
    }
    const size_t res = ((const ggml_cplan *) plan)->work_size; // a ggml_backend_plan_cpu begins with it
    ggml_backend_graph_plan_free(backend, plan);

    return res;
}

static int32_t get_devices(llama_context * ctx, refreekv_device_info * info, int32_t n_max) {
    const auto & model = ctx->get_model();

    auto * sched = ctx->get_sched();
    auto * host  = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);

    std::vector<ggml_backend_dev_t>   devs;
    std::vector<refreekv_device_info> infos;
    for (const auto & dev : model.devices) {
        devs.push_back(dev.dev);
        infos.push_back(describe(dev.dev));
    }
    infos.push_back(describe(host));
    infos.back().is_host = true;

    // what is on none of them is in host memory
    auto info_of = [&](ggml_backend_buffer_type_t buft) -> refreekv_device_info & {
        const bool is_host = ggml_backend_buft_is_host(buft);
        return infos[is_host ? devs.size() : std::find(devs.begin(), devs.end(), ggml_backend_buft_get_device(buft)) - devs.begin()];
    };

    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        auto & res = info_of(buft);

        res.bytes_model   += data.model;
        res.bytes_context += data.context;
        res.bytes_compute += data.compute;

        if (res.is_host && !ggml_backend_buft_is_host(buft)) {
            res.bytes_repacked += data.model;
        }
    }

    auto * mem = ctx->get_memory();

    if (model.hparams.no_alloc) {
        if (const auto * store = mem ? refreekv::store::of(mem) : nullptr) {
            for (const auto & [buft, size] : store->ring_breakdown()) {
                info_of(buft).bytes_context += size;
            }
        }

        const auto & cparams = ctx->get_cparams();

        llama_memory_context_ptr mctx = mem ? mem->init_full() : nullptr;

        std::vector<size_t> sizes(ggml_backend_sched_get_n_backends(sched));

        const uint32_t n_tokens = std::min(cparams.n_ctx, cparams.n_ubatch);

        auto reserve = [&](size_t * sizes) { return ctx->graph_reserve(n_tokens, cparams.n_seq_max, cparams.n_seq_max, mctx.get(), true, sizes); };

        reserve(sizes.data());
        for (size_t i = 0; i < sizes.size(); ++i) {
            info_of(ggml_backend_sched_get_buffer_type(sched, ggml_backend_sched_get_backend(sched, i))).bytes_compute_used += sizes[i];
        }

        infos.back().bytes_work = work_size(sched, reserve(nullptr), ctx->n_threads_batch());
    }

    std::copy_n(infos.begin(), std::min<size_t>(n_max, infos.size()), info);

    return infos.size();
}

int32_t refreekv_get_devices(struct llama_context * ctx, struct refreekv_device_info * info, int32_t n_max) {
    refreekv::clear_error();

    if (!ctx || !info || n_max < 1) {
        refreekv::set_error("get_devices: there must be a context and room for its devices");
        return REFREEKV_ERR_ARGUMENT;
    }
    return refreekv::guard([&]() { return get_devices(ctx, info, n_max); });
}
