"""A tiny model of each of many architectures, with random weights.

What tensors an architecture has is asked of llama.cpp itself, which makes a model from metadata alone; so a row of the
table below is all that a new one needs.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from tiny import N_SPECIAL, N_VOCAB, TINY_MODELS, write_tokenizer

import refreekv_cpp  # noqa: F401  (it loads the library that llama_cpp then uses)

N_LAYER = 4
_N_EMBD, _N_HEAD, _N_FF = 64, 4, 96

# keys that an architecture does not know are ignored
_COMMON: dict[str, Any] = {
    "context_length": 2048,
    "embedding_length": _N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": _N_FF,
    "use_parallel_residual": True,
    "attention.head_count": _N_HEAD,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
_EXPERTS = {
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
    "expert_weights_scale": 1.0,
}
_WINDOW = {"attention.sliding_window": 128}
_MLA = {
    **_EXPERTS,
    "leading_dense_block_count": 1,
    "expert_shared_count": 1,
    "expert_gating_func": 2,
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,
    "attention.value_length": 32,
    "attention.key_length_mla": 32,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 16,
}
_SSM = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * _N_EMBD,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 1,
}
_GEMMA4 = {
    "attention.sliding_window_pattern": [True, False] * (N_LAYER // 2),
    "attention.key_length_swa": _N_EMBD // _N_HEAD,
    "attention.value_length_swa": _N_EMBD // _N_HEAD,
    "embedding_length_per_layer_input": 0,
}
# Layers 5 and 7 read what layer 3 has stored, 4 and 6 what layer 2 has. Without an input per layer, which has nothing
# to do with the cache, and whose GELU (from a table, in f16) makes thousandths of the rounding of sums.
_GEMMA4_E2B = {
    **_WINDOW,
    **_GEMMA4,
    "block_count": 8,
    "attention.sliding_window_pattern": [True, False] * 4,
    "attention.shared_kv_layers": 4,
}
# llama.cpp has it that the first 20 layers store K and V, and that every fifth layer has no window
_GEMMA3N = {
    **_WINDOW,
    "block_count": 30,
    "embedding_length": 32,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.sliding_window_pattern": ([True] * 4 + [False]) * 6,
    "embedding_length_per_layer_input": 16,
    "altup.num_inputs": 4,
    "altup.active_idx": 0,
    "activation_sparsity_scale": [0.0] * 30,
}
_HEADS = {"attention.head_count_kv": _N_HEAD}
_ENCODER = {**_HEADS, "attention.causal": False, "pooling_type": 1}
_RELATIVE = {**_HEADS, "attention.relative_buckets_count": 8, "attention.key_length": 16, "attention.value_length": 16}
_RWKV = {
    "wkv.head_size": 64,
    "embedding_length": 128,
    "attention.head_count": 0,
    "attention.head_count_kv": 0,
    "time_mix_extra_dim": 32,
    "time_decay_extra_dim": 64,
    **{f"attention.{name}_lora_rank": 32 for name in ("decay", "iclr", "value_residual_mix", "gate")},
}
# every other layer has attention, the others have none
_EVERY_OTHER = {"attention.head_count_kv": [0, 2] * (N_LAYER // 2)}


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        name: llama.cpp's.
        what: what is special about it.
        keys: metadata, without the architecture's prefix; a key that begins with a dot has none.
        rope_factors: it needs factors of RoPE's frequencies.
        without: beginnings of the names, in a block, of tensors that would make it another kind of model.
        n_vocab: more tokens than bytes and special ones.
        shapes: of its tensors, by name; llama.cpp is not asked then.
        calm: what the norm of its queries is divided by. Some models do not divide attention logits by the root of the
            head size, and with random weights such logits make much of little.
    """

    name: str
    what: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    rope_factors: bool = False
    without: tuple[str, ...] = ()
    n_vocab: int = N_VOCAB
    shapes: Mapping[str, tuple[int, ...]] | None = None
    calm: float = 1

    @property
    def title(self) -> str:
        return f"{self.name} ({self.what})" if self.what else self.name

    def write(self, path: Path, *, seed: int = 0) -> None:
        metadata = path.with_suffix(".metadata")
        self._write(metadata, {})
        rng = np.random.default_rng(seed)
        shapes = self._shapes(metadata) if self.shapes is None else self.shapes
        weights = {name: _weights(name, shape, rng) for name, shape in shapes.items()}
        for name in weights:
            if "attn_q_norm" in name:
                weights[name] /= np.float32(self.calm)
        self._write(path, weights)
        metadata.unlink()

    def _write(self, path: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        out = gguf.GGUFWriter(path, self.name)
        for key, value in {**_COMMON, **self.keys}.items():
            _add(out, key[1:] if key.startswith(".") else f"{self.name}.{key}", value)
        out.add_token_type_count(1)
        write_tokenizer(out, n_vocab=self.n_vocab, short_spaces=True)
        for name, weights in tensors.items():
            out.add_tensor(name, weights)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    def _shapes(self, metadata: Path) -> dict[str, tuple[int, ...]]:
        # factors of RoPE and scales of quantised weights are for models that have such
        left_out = (*(() if self.rope_factors else ("rope_",)), ".scale", ".input_scale")
        return {
            name: shape
            for name, shape in _tensors_of(metadata).items()
            if not any(part in name for part in left_out)
            and not re.sub(r"^blk\.\d+\.", "", name).startswith(self.without)
        }


def _add(out: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        out.add_bool(key, value)
    elif isinstance(value, int):
        out.add_uint32(key, value)
    elif isinstance(value, float):
        out.add_float32(key, value)
    else:
        out.add_array(key, value)


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Random weights under which the numbers keep their size from layer to layer."""
    noise = rng.standard_normal(shape)
    if "ssm_a" in name:  # a decay
        res = -np.abs(noise) - 0.1
    elif "rope_freqs" in name:
        res = 1 + np.abs(noise)
    elif "norm" in name and name.endswith("weight"):
        res = 1 + 0.1 * noise
    elif len([n for n in shape if n > 1]) < 2:
        res = 0.3 * noise
    elif "attn_q" in name or "attn_k" in name:  # so even that every layer can do without some cells
        res = 0.7 * noise / np.sqrt(shape[-1])
    elif name == "token_embd.weight":
        res = noise
    else:
        res = noise / np.sqrt(shape[-1])
    return res.astype(np.float32)


# -- what llama.cpp says of it -----------------------------------------------------------------------------------------


class _GGUFParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


_ggml = llama_cpp.llama_cpp._lib  # whose symbols are found through libllama
_ggml.gguf_init_from_file.restype = ctypes.c_void_p
_ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GGUFParams]
_ggml.gguf_free.argtypes = [ctypes.c_void_p]
_ggml.ggml_get_name.restype = ctypes.c_char_p
_ggml.ggml_get_name.argtypes = [ctypes.c_void_p]


def _tensors_of(metadata: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape (slowest dimension first, as NumPy's) of the tensors of a model with this metadata."""
    shapes: dict[str, tuple[int, ...]] = {}

    @llama_cpp.llama_model_set_tensor_data_t
    def note(address: int, _: None) -> None:
        ne = list(_Tensor.from_address(address).ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        shapes[_ggml.ggml_get_name(address).decode()] = tuple(reversed(ne))

    llama_cpp._logger.set_verbose(False)
    context = _ggml.gguf_init_from_file(str(metadata).encode(), _GGUFParams(no_alloc=True, ctx=None))
    try:
        params = llama_cpp.llama_model_default_params()
        params.load_mtp = True
        model = llama_cpp.llama_model_init_from_user(context, note, None, params)
        if not model:
            raise ValueError(f"{metadata.name}: llama.cpp makes no model of this metadata")
        llama_cpp.llama_model_free(model)
    finally:
        _ggml.gguf_free(context)
    return shapes


# -- the table ---------------------------------------------------------------------------------------------------------

_LIST = [
    Architecture("llama"),
    Architecture("llama", "Mixtral: experts", _EXPERTS),
    Architecture("qwen2"),
    Architecture("qwen3"),
    Architecture("qwen2moe", "experts", _EXPERTS),
    Architecture("qwen3moe", "experts", _EXPERTS),
    Architecture("olmoe", "experts", {**_EXPERTS, "attention.head_count_kv": _N_HEAD}),
    Architecture("gemma"),
    Architecture(
        "gemma2",
        "soft-cap, sliding window",
        {**_WINDOW, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Architecture("gemma3", "without a window"),
    Architecture("gemma3", "sliding window", {**_WINDOW, "block_count": 6}),
    Architecture("gemma3", "all of it sliding window", _WINDOW),
    Architecture("gemma4", "sliding window", {**_WINDOW, **_GEMMA4}, rope_factors=True, calm=4),
    Architecture("gemma4", "E2B: layers that share K and V", _GEMMA4_E2B, rope_factors=True, calm=4),
    Architecture("gemma3n", "layers that share K and V", _GEMMA3N, calm=4),
    Architecture("phi2"),
    Architecture("phi3"),
    Architecture("gpt2", "learned positions", {"attention.head_count_kv": _N_HEAD}),
    Architecture("gptneox", keys={"attention.head_count_kv": _N_HEAD}),
    Architecture("mpt", "ALiBi", {"attention.max_alibi_bias": 8.0, "attention.head_count_kv": _N_HEAD}),
    Architecture("bloom", "ALiBi", {"attention.head_count_kv": _N_HEAD}),
    Architecture("falcon"),
    Architecture("stablelm"),
    Architecture("starcoder2"),
    Architecture("internlm2"),
    Architecture("olmo2"),
    Architecture("command-r", keys={"logit_scale": 0.5}),
    Architecture("cohere2", "sliding window", {**_WINDOW, "logit_scale": 0.5}),
    Architecture("granite", "scales", {"attention.scale": 0.3, "residual_scale": 0.5, "logit_scale": 2.0}),
    Architecture("smollm3"),
    Architecture("gpt-oss", "attention sinks, sliding window, experts", {**_EXPERTS, **_WINDOW}),
    Architecture("grok", "experts, attention logits with a cap", {**_EXPERTS, "embedding_scale": 1.0}),
    Architecture("qwen2vl", "M-RoPE", {"rope.dimension_sections": [2, 3, 3, 0]}),
    Architecture(
        "deepseek2",
        "MLA, experts",
        _MLA,
    ),
    Architecture(
        "hy_v4",
        "MLA, experts, no index",
        {
            **_MLA,
            "hyper_connection.count": 2,
            "hyper_connection.epsilon": 1e-6,
            "hyper_connection.magnitude": 2.0,
            "expert_weights_norm": True,
        },
    ),
    Architecture(
        "deepseek2",
        "K and V of each head, experts",
        {
            **_EXPERTS,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_gating_func": 2,
            "attention.head_count_kv": _N_HEAD,
            "attention.q_lora_rank": 32,
            "attention.kv_lora_rank": 32,
            "attention.key_length": 32,
            "attention.value_length": 16,
            "rope.dimension_count": 16,
        },
    ),
    Architecture(
        "deepseek2-ocr",
        "experts",
        {**_EXPERTS, **_HEADS, "leading_dense_block_count": 1, "expert_shared_count": 1},
    ),
    Architecture("plm", "MLA, decompressed", {**_HEADS, "attention.kv_lora_rank": 32, "rope.dimension_count": 8}),
    Architecture(
        "apertus",
        keys={**_HEADS, ".xielu.alpha_n": 0.8, ".xielu.alpha_p": 0.8, ".xielu.beta": 0.5, ".xielu.eps": -1e-6},
    ),
    Architecture("bitnet"),
    Architecture(
        "step35",
        "sliding window, experts",
        {
            **_EXPERTS,
            **_WINDOW,
            "attention.sliding_window_pattern": [True, False] * (N_LAYER // 2),
            "attention.head_count": [_N_HEAD] * N_LAYER,
            "swiglu_clamp_exp": [0.0] * N_LAYER,
            "swiglu_clamp_shexp": [0.0] * N_LAYER,
            "expert_gating_func": 2,
            "leading_dense_block_count": 1,
            "rope.dimension_count": 16,
        },
    ),
    Architecture("mamba", "recurrent", _SSM),
    Architecture("mamba2", "recurrent", _SSM),
    Architecture("jamba", "hybrid", {**_SSM, **_EVERY_OTHER}),
    Architecture("granitehybrid", "hybrid", {**_SSM, **_EVERY_OTHER}),
    Architecture("falcon-h1", "hybrid", _SSM),
    Architecture(
        "qwen35",
        "hybrid, with a draft head",
        {
            **_SSM,
            "ssm.inner_size": 64,
            "ssm.group_count": 2,
            "block_count": N_LAYER + 1,
            "nextn_predict_layers": 1,
            "full_attention_interval": 2,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "rope.dimension_sections": [2, 3, 3, 0],
        },
    ),
    Architecture("lfm2", "hybrid", {**_EVERY_OTHER, "shortconv.l_cache": 3}),
    Architecture("lfm2", "hybrid, all of it sliding window", {**_WINDOW, **_EVERY_OTHER, "shortconv.l_cache": 3}),
]

# it has embeddings, and no text to complete
ENCODER = Architecture("bert", "encoder", {**_ENCODER, "pooling_type": 2})

# What has no KV cache that a policy could work on, or no text to complete; and Chameleon, with which llama.cpp ends the
# process where nothing of a batch is put out, as of most of a prompt in llama-cpp-python
_OTHERS = [
    Architecture("chameleon", keys=_HEADS, n_vocab=8200),  # tokens of images, 4 to 8195, are never chosen
    ENCODER,
    Architecture("nomic-bert", "encoder", _ENCODER),
    Architecture("nomic-bert-moe", "encoder, experts", {**_ENCODER, **_EXPERTS, "moe_every_n_layers": 2}),
    Architecture("modern-bert", "encoder", {**_ENCODER, **_WINDOW}),
    Architecture("neo-bert", "encoder", _ENCODER),
    Architecture("eurobert", "encoder", _ENCODER),
    Architecture("jina-bert-v2", "encoder", _ENCODER),
    Architecture("jina-bert-v3", "encoder", _ENCODER),
    Architecture("gemma-embedding", "encoder", {**_WINDOW, "block_count": 6}),
    Architecture("llama-embed", "encoder", {"pooling_type": 1}),
    Architecture("t5", "encoder and decoder", _RELATIVE),
    Architecture("t5encoder", "encoder", _RELATIVE),
    Architecture("rwkv6", "recurrent", _RWKV),
    Architecture(
        "rwkv6qwen2",
        "recurrent",
        {**_RWKV, "attention.head_count": 2, "attention.head_count_kv": 2, "token_shift_count": 1},
        without=("time_mix_first",),
    ),
    Architecture("rwkv7", "recurrent", _RWKV),
    Architecture("arwkv7", "recurrent", {**_RWKV, "token_shift_count": 1}),
    Architecture(
        "graniteswitch",
        "adapters that control tokens select",
        {
            "logit_scale": 2.0,
            "adapters.count": 2,
            "adapters.lora_rank": 4,
            "adapters.token_ids_activate": [N_VOCAB - 2, N_VOCAB - 3],
            "adapters.token_ids_substitute": [N_SPECIAL, N_SPECIAL + 1],
        },
    ),
    Architecture(
        "wavtokenizer-dec",
        "from codes to sound",
        {
            "block_count": 6,
            "features_length": _N_EMBD,
            "embedding_length_out": _N_EMBD,
            "attention.group_norm_epsilon": 1e-5,
            "attention.group_norm_groups": 4,
            "posnet.block_count": 6,
            "posnet.embedding_length": _N_EMBD,
            "convnext.block_count": 2,
            "convnext.embedding_length": _N_EMBD,
        },
    ),
]

# a draft model whose layers are views of another context's cache
SHARING_DRAFT = Architecture(
    "gemma4-assistant",
    "draft that has no K and V",
    {
        **_WINDOW,
        **_GEMMA4,
        "nextn_predict_layers": N_LAYER,
        "embedding_length": _N_EMBD // 2,
        "embedding_length_out": _N_EMBD,
        "attention.key_length": _N_EMBD // _N_HEAD,
        "attention.value_length": _N_EMBD // _N_HEAD,
    },
    shapes={
        "token_embd.weight": (N_VOCAB, _N_EMBD // 2),
        "output_norm.weight": (_N_EMBD // 2,),
        "nextn.pre_projection.weight": (_N_EMBD // 2, 2 * _N_EMBD),
        "nextn.post_projection.weight": (_N_EMBD, _N_EMBD // 2),
        "rope_freqs.weight": (_N_EMBD // _N_HEAD // 2,),
        **{
            f"blk.{layer}.{name}.weight": shape
            for layer in range(N_LAYER)
            for name, shape in {
                "attn_norm": (_N_EMBD // 2,),
                "attn_q": (_N_EMBD, _N_EMBD // 2),
                "attn_q_norm": (_N_EMBD // _N_HEAD,),
                "attn_output": (_N_EMBD // 2, _N_EMBD),
                "post_attention_norm": (_N_EMBD // 2,),
                "layer_output_scale": (1,),
                "ffn_norm": (_N_EMBD // 2,),
                "ffn_gate": (_N_FF, _N_EMBD // 2),
                "ffn_up": (_N_FF, _N_EMBD // 2),
                "ffn_down": (_N_EMBD // 2, _N_FF),
                "post_ffw_norm": (_N_EMBD // 2,),
            }.items()
        },
    },
)

# Draft models that are given hidden states of the context they draft for, and have K and V of their own. Token
# embeddings and output are those of the model they draft for, which must have 4 layers.
EAGLE3 = Architecture(
    "eagle3",
    "draft",
    {"block_count": 1, "target_layers": [1, 2, 3], "target_hidden_size": _N_EMBD},
    without=("token_embd", "output.weight"),
)
DFLASH = Architecture(
    "dflash",
    "draft",
    {"block_count": 2, "target_layers": [1, 2], "block_size": 8, ".tokenizer.ggml.mask_token_id": N_VOCAB - 2},
    without=("token_embd", "output.weight", "attn_sinks", "layer_output_scale", "post_"),
)

ARCHITECTURES = {architecture.title: architecture for architecture in _LIST}
OTHERS = {architecture.title: architecture for architecture in _OTHERS}
# named in llama.cpp, which loads no model of them
UNKNOWN = {name: Architecture(name, shapes={}) for name in ("clip", "gptj")}
DRAFTS = {architecture.title: architecture for architecture in (SHARING_DRAFT, EAGLE3, DFLASH)}


def tiny_models(folder: Path) -> Callable[[str], Path]:
    """The GGUF of a model of these tables by its name; written when asked for."""
    models = {**TINY_MODELS, **ARCHITECTURES, **OTHERS, **DRAFTS, **UNKNOWN}

    def path_of(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            models[name].write(path)
        return path

    return path_of
