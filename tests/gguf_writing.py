"""Small GGUF files for the tests, written with the package `gguf` from loaded `Params`."""

import gguf
import numpy as np

from kvjax.models.gguf_file import NAMES
from kvjax.models.llama import Params
from kvjax.models.rope import LinearScaling


def write_gguf(path, params: Params, kind="F32", *, metadata=(), tensors=(), without=()):
    """Writes `params` as llama.cpp's converter does, matrices in `kind`; returns the path.

    `metadata` and `tensors` are added or put in place of what belongs there, `without` is left out.
    """
    config = params.config
    architecture = "qwen2" if config.architecture == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    stated = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.width,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.q_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "rope.freq_base": config.rope.base,
    }
    if isinstance(config.rope.scaling, LinearScaling):
        stated |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope.scaling.factor}
    stated = {f"{architecture}.{key}": value for key, value in stated.items()} | dict(metadata)
    for key, value in stated.items():
        if key not in without:
            add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
            add.get(type(value), writer.add_uint32)(key, value)
    for name, value in (stored_tensors(params) | dict(tensors)).items():
        if name not in without:
            quantisation = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(value, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(params: Params) -> dict[str, np.ndarray]:
    """The tensors under their names in a GGUF file, in f32, with the rows of q and k as ggml rotates them."""
    config = params.config
    found = {"embed": params.embed, "norm": params.norm, "unembed": params.unembed}
    tensors = {NAMES[field]: value for field, value in found.items()}
    for layer, block in enumerate(params.blocks):
        for field, value in vars(block).items():
            if value is not None and config.architecture != "qwen2" and field in ("wq", "wk", "bq", "bk"):
                value = interleave(np.asarray(value), config.head_dim)
            tensors[NAMES[field].format(layer)] = value
    return {name: np.array(value, np.float32) for name, value in tensors.items() if value is not None}


def interleave(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows 0, 1, 2, 3 of each head as 0, 2, 1, 3."""
    order = np.arange(head_dim).reshape(2, -1).T.ravel()
    heads = np.arange(0, len(matrix), head_dim)
    return matrix[(heads[:, None] + order).ravel()]
