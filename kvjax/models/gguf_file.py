"""GGUF files of the Llama family, as llama.cpp's converter writes them, in F32, F16, BF16, Q8_0, Q4_0 or Q4_1."""

import functools
from pathlib import Path

import numpy as np

from kvjax.models.checkpoint import Checkpoint, Stored
from kvjax.models.gguf_header import Header, Location, read_header
from kvjax.models.gguf_tokenizer import read_text
from kvjax.models.llama import Config
from kvjax.models.rope import LinearScaling, Llama3Scaling, Rope

NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "unembed": "output.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "bq": "blk.{}.attn_q.bias",
    "bk": "blk.{}.attn_k.bias",
    "bv": "blk.{}.attn_v.bias",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "w_gate": "blk.{}.ffn_gate.weight",
    "w_up": "blk.{}.ffn_up.weight",
    "w_down": "blk.{}.ffn_down.weight",
}
ARCHITECTURES = ("llama", "qwen2")  # llama.cpp writes Mistral as llama
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Looks at a GGUF file: header only, no weights.

    Llama 3.1 and later store no rope scaling but its result, a divisor for each frequency. The published rule (low 1,
    high 4, context 8192) with the largest divisor as its factor is taken if it gives the same divisors, else the file
    is refused. The sliding window of Mistral 0.1 is not in its GGUF files: load the Hugging Face directory for it.

    Raises:
      ValueError: If the file is damaged, of another architecture or in another quantisation, or lacks a key.
    """
    header = read_header(path)
    origin = str(path)
    for name, location in header.tensors.items():
        _check_kind(name, location, origin)
    config = parse_config(header, origin)
    # qwen2 is stored as it is; of llama, q and k, weights and biases, in ggml's rotary order
    heads = {} if config.architecture == "qwen2" else {"attn_q": config.q_heads, "attn_k": config.kv_heads}
    tensors = {}
    for name, location in header.tensors.items():
        part = name.rsplit(".", 2)[-2:][0]  # attn_q of blk.0.attn_q.weight
        read = functools.partial(_dequantise, header.data, location, heads.get(part))
        tensors[name] = Stored(location.shape, read)
    tensors.pop(ROPE_FACTORS, None)  # went into config.rope
    return Checkpoint(
        origin=origin,
        config=config,
        tied=NAMES["unembed"] not in tensors,
        biased=NAMES["bq"].format(0) in tensors,
        names=NAMES,
        tensors=tensors,
        text=read_text(header.metadata, origin),
    )


def parse_config(header: Header, origin: str) -> Config:
    """The metadata as `Config`; see `open_gguf` for what it refuses."""
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{origin}: general.architecture={architecture!r} is not supported; wanted one of {ARCHITECTURES}."
        )
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{origin} is one part of {metadata['split.count']}. Join them: llama-gguf-split --merge.")
    number = functools.partial(_number, metadata, origin, architecture)
    q_heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", default=width // max(q_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, default=head_dim) != head_dim:
            raise ValueError(
                f"{origin}: {key} is {number(key)}, and the keys have {head_dim} channels; wanted the same."
            )
    embed = header.tensors.get(NAMES["embed"])
    if embed is None:
        raise ValueError(f"{origin}: the tensor {NAMES['embed']} is missing. Is this a whole model?")
    return Config(
        architecture=architecture,
        layers=number("block_count"),
        width=width,
        mlp_width=number("feed_forward_length"),
        q_heads=q_heads,
        kv_heads=number("attention.head_count_kv", default=q_heads),
        head_dim=head_dim,
        vocab=number("vocab_size", default=embed.shape[0]),
        context=number("context_length"),
        norm_epsilon=number("attention.layer_norm_rms_epsilon", float),
        rope=_parse_rope(header, number, head_dim, origin),
        sliding_window=number("attention.sliding_window", default=0) or None,
    )


def _number(metadata: dict, origin: str, architecture: str, key: str, kind: type = int, *, default=None):
    key = f"{architecture}.{key}"
    value = metadata.get(key, default)
    if not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{origin}: its metadata has {key}={value!r}; wanted a number.")
    return kind(value)


def _parse_rope(header: Header, number, head_dim: int, origin: str) -> Rope:
    base = number("rope.freq_base", float, default=10000.0)
    kind = header.metadata.get(f"{header.metadata['general.architecture']}.rope.scaling.type", "none")
    factors = header.tensors.get(ROPE_FACTORS)
    if factors is not None:
        return _match_llama3(base, _dequantise(header.data, factors, None), head_dim, origin)
    if kind == "linear":
        return Rope(base, LinearScaling(number("rope.scaling.factor", float)))
    if kind != "none":
        raise ValueError(f"{origin}: rope scaling {kind!r} is not supported; wanted 'none', 'linear' or Llama 3's.")
    return Rope(base)


def _match_llama3(base: float, divisors: np.ndarray, head_dim: int, origin: str) -> Rope:
    rope = Rope(base, Llama3Scaling(float(divisors.max()), 1.0, 4.0, 8192))
    wanted = Rope(base).frequencies(head_dim) / rope.frequencies(head_dim)
    if divisors.shape != wanted.shape or not np.allclose(divisors, wanted, rtol=1e-3):
        raise ValueError(
            f"{origin}: {ROPE_FACTORS} does not follow Llama 3's rule with low 1, high 4 and context 8192. "
            f"Load the Hugging Face directory of this model, whose config.json states the rule."
        )
    return rope


def _check_kind(name: str, location: Location, origin: str) -> None:
    if location.kind.name not in KINDS:
        raise ValueError(
            f"{origin}: the tensor {name} is {location.kind.name}; wanted one of {KINDS}. Fetch or make the file in "
            f"one of these: llama-quantize --pure model-f16.gguf out.gguf Q8_0."
        )


def _dequantise(data: np.ndarray, location: Location, heads: int | None) -> np.ndarray:
    """The tensor in f32. With `heads`, its rows are put from ggml's rotary order into the half-split one.

    ggml rotates neighbours, so the converter laid channel i of a head beside channel i + D / 2:

        half-split   0 1 2 3
        stored       0 2 1 3
    """
    from gguf.quants import dequantize

    raw = data[location.start : location.start + location.nbytes].reshape(*location.shape[:-1], -1)
    if location.kind.name == "F32":
        value = raw.view(np.float32)
    elif location.kind.name == "F16":
        value = raw.view(np.float16)
    else:
        value = dequantize(raw, location.kind)
    if heads is not None:
        value = value.reshape(heads, -1, 2, *location.shape[1:]).swapaxes(1, 2)
    return value.reshape(location.shape)
