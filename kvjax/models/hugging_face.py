"""Hugging Face directories: config.json, safetensors, tokenizer.json, chat template. Nothing is unpickled."""

import functools
import json
from pathlib import Path

from kvjax.models.checkpoint import Checkpoint, Stored, Text
from kvjax.models.llama import Config
from kvjax.models.rope import LinearScaling, Llama3Scaling, Rope

NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "unembed": "lm_head.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "wq": "model.layers.{}.self_attn.q_proj.weight",
    "wk": "model.layers.{}.self_attn.k_proj.weight",
    "wv": "model.layers.{}.self_attn.v_proj.weight",
    "wo": "model.layers.{}.self_attn.o_proj.weight",
    "bq": "model.layers.{}.self_attn.q_proj.bias",
    "bk": "model.layers.{}.self_attn.k_proj.bias",
    "bv": "model.layers.{}.self_attn.v_proj.bias",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "w_gate": "model.layers.{}.mlp.gate_proj.weight",
    "w_up": "model.layers.{}.mlp.up_proj.weight",
    "w_down": "model.layers.{}.mlp.down_proj.weight",
}
ARCHITECTURES = ("llama", "mistral", "qwen2")
DTYPES = ("F32", "F16", "BF16")


def open_directory(path: Path) -> Checkpoint:
    """Looks at a directory as `transformers` writes it: headers only, no weights.

    Raises:
      ValueError: If a file is missing, truncated or not what its name says, or the model is of another
        architecture or of a variant that `parse_config` refuses.
    """
    raw = _read_json(path / "config.json")
    if raw is None:
        raise ValueError(f"{path} has no config.json. Pass a directory as transformers writes it, or a .gguf file.")
    config = parse_config(raw, str(path))
    tied = bool(raw.get("tie_word_embeddings", False))
    tensors = {
        name: stored
        for name, stored in _open_safetensors(path).items()
        # old checkpoints store the rotary table, and some a copy of the embedding under its other name
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == NAMES["unembed"])
    }
    return Checkpoint(
        origin=str(path),
        config=config,
        tied=tied,
        biased=config.architecture == "qwen2" or bool(raw.get("attention_bias", False)),
        names=NAMES,
        tensors=tensors,
        text=_read_text(path, raw),
    )


def parse_config(raw: dict, origin: str) -> Config:
    """A config.json as `Config`.

    Raises:
      ValueError: For another architecture, rope scaling other than default, linear and llama3, another activation
        than silu, biases in the MLP, a sliding window in some layers only, quantised weights, or a missing key.
    """
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{origin}: model_type={architecture!r} is not supported; wanted one of {ARCHITECTURES}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{origin}: hidden_act={raw['hidden_act']!r} is not supported; this family has 'silu'.")
    if raw.get("mlp_bias"):
        raise ValueError(f"{origin}: mlp_bias=true is not supported; only q, k and v may have biases.")
    if raw.get("quantization_config"):
        raise ValueError(
            f"{origin}: the weights are quantised ({raw['quantization_config']}). Pass the original in f32, f16 or "
            f"bf16, or a GGUF file."
        )
    number = functools.partial(_number, raw, origin)
    q_heads, layers, width = number("num_attention_heads"), number("num_hidden_layers"), number("hidden_size")
    return Config(
        architecture=architecture,
        layers=layers,
        width=width,
        mlp_width=number("intermediate_size"),
        q_heads=q_heads,
        kv_heads=number("num_key_value_heads", default=q_heads),
        head_dim=number("head_dim", default=width // max(q_heads, 1)),
        vocab=number("vocab_size"),
        context=number("max_position_embeddings"),
        norm_epsilon=number("rms_norm_eps", float, default=1e-6),
        rope=_parse_rope(raw, origin),
        sliding_window=_parse_window(raw, architecture, layers, origin),
    )


def _number(raw: dict, origin: str, key: str, kind: type = int, *, default=None):
    """`raw[key]`, or the default where it is missing or null; an error where that is None too."""
    value = default if raw.get(key) is None else raw[key]
    if not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{origin}: config.json has {key}={value!r}; wanted a number. Fetch the file again.")
    return kind(value)


def _parse_rope(raw: dict, origin: str) -> Rope:
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, and before
    if not isinstance(given, dict):
        raise ValueError(f"{origin}: config.json has a rope scaling of {given!r}; wanted an object.")
    number = functools.partial(_number, {**raw, **given}, origin)
    base = number("rope_theta", float, default=10000.0)
    if number("partial_rotary_factor", float, default=1.0) != 1.0:
        raise ValueError(f"{origin}: partial_rotary_factor is not supported; this family rotates every channel.")
    kind = given.get("rope_type", given.get("type", "default"))
    match kind:
        case "default":
            return Rope(base)
        case "linear":
            return Rope(base, LinearScaling(number("factor", float)))
        case "llama3":
            return Rope(
                base,
                Llama3Scaling(
                    factor=number("factor", float),
                    low_freq_factor=number("low_freq_factor", float),
                    high_freq_factor=number("high_freq_factor", float),
                    original_context=number("original_max_position_embeddings"),
                ),
            )
    raise ValueError(f"{origin}: rope scaling {kind!r} is not supported; wanted 'default', 'linear' or 'llama3'.")


def _parse_window(raw: dict, architecture: str, layers: int, origin: str) -> int | None:
    # where the key is missing, transformers takes 4096
    window = _number({"sliding_window": 4096, **raw}, origin, "sliding_window", default=0)
    slides = architecture == "mistral" or (architecture == "qwen2" and raw.get("use_sliding_window"))
    if not window or not slides:
        return None
    # Qwen2 lets only the layers from `max_window_layers` on slide; transformers 5 spells them out
    first = _number(raw, origin, "max_window_layers", default=0) if architecture == "qwen2" else 0
    kinds = raw.get("layer_types")
    sliding = kinds.count("sliding_attention") if isinstance(kinds, list) else max(layers - first, 0)
    if sliding not in (0, layers):
        raise ValueError(
            f"{origin}: {sliding} of {layers} layers have a sliding window; wanted all or none, since a Config has "
            f"one window. Set use_sliding_window to false in config.json to let every layer see all."
        )
    return window if sliding else None


def _open_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a directory. The headers are read, and each file's length is checked against its own."""
    from safetensors import SafetensorError, safe_open  # late: `import kvjax` stays quick

    tensors = {}
    for file in _weight_files(path):
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}). Fetch it again.") from error
        for name in handle.keys():
            header = handle.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{file}: the tensor {name} is {header.get_dtype()}; wanted one of {DTYPES}.")
            tensors[name] = Stored(tuple(header.get_shape()), functools.partial(handle.get_tensor, name))
    return tensors


def _weight_files(path: Path) -> list[Path]:
    single = path / "model.safetensors"
    if single.exists():
        return [single]
    index = _read_json(path / "model.safetensors.index.json")
    if index is None:
        if list(path.glob("*.bin")):
            raise ValueError(
                f"{path} has its weights in a pickle (.bin), which can run any code and is not opened. Convert it "
                f"where you trust it: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new)."
            )
        raise ValueError(f"{path} has no model.safetensors and no model.safetensors.index.json.")
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path}: model.safetensors.index.json has no weight_map of names. Fetch it again.")
    shards = [path / name for name in sorted(set(names.values()))]
    for shard in shards:
        if not shard.exists():
            raise ValueError(f"{path}: the index names {shard.name}, which is not there. Fetch it.")
    return shards


def _read_text(path: Path, config: dict) -> Text:
    said = _read_json(path / "tokenizer_config.json") or {}
    specials = {**(_read_json(path / "special_tokens_map.json") or {}), **said}
    bos, eos = (_token_text(specials.get(key)) for key in ("bos_token", "eos_token"))
    tokenizer = _read_tokenizer(path / "tokenizer.json")
    stops = [] if tokenizer is None or eos is None else [tokenizer.token_to_id(eos)]
    for said_by in (config, _read_json(path / "generation_config.json") or {}):
        ids = said_by.get("eos_token_id")
        stops += ids if isinstance(ids, list) else [ids]
    stops = [stop for stop in stops if stop is not None]
    if not all(isinstance(stop, int) for stop in stops):
        raise ValueError(f"{path}: an eos_token_id among {stops} is no number. Fetch its config files again.")
    return Text(tokenizer, _read_template(path, said), tuple(sorted(set(stops))), bos, eos)


def _read_tokenizer(file: Path):
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file} is damaged, or newer than the package tokenizers here ({error}).") from error
    tokenizer.no_padding()  # some files keep the settings of a training run
    tokenizer.no_truncation()
    return tokenizer


def _read_template(path: Path, said: dict) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8: {error}. Fetch it again.") from None
    template = said.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _token_text(token) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(file: Path):
    """The content of a JSON file that holds an object, or None where there is no such file."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, wanted an object. Fetch it again.")
    return content
