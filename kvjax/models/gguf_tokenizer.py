"""The tokenizer in a GGUF file's metadata, put together again from its vocabulary, merges or scores."""

from tokenizers import Tokenizer

from kvjax.models.checkpoint import Text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
STOPS = ("eos", "eot", "eom")  # end of text, of a turn, of a message

# The published expressions that cut text into words, for the values of tokenizer.ggml.pre that the family uses.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def read_text(metadata: dict, origin: str) -> Text:
    """Everything a GGUF file says about text; a `Text` without a tokenizer where it holds none.

    Raises:
      ValueError: If the tokenizer is of a kind that is not known here, or its parts do not fit together.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    template = metadata.get("tokenizer.chat_template")
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", *STOPS)}
    stops = tuple(sorted({ids[key] for key in STOPS} - {None}))
    if tokens is None:
        return Text(None, template, stops)
    for key, token in ids.items():
        if token is not None and token >= len(tokens):
            raise ValueError(f"{origin}: the {key} token has id {token}, and the vocabulary {len(tokens)} entries.")
    bos, eos = (None if ids[key] is None else tokens[ids[key]] for key in ("bos", "eos"))
    return Text(_read_tokenizer(metadata, tokens, bos, eos, origin), template, stops, bos, eos)


def _read_tokenizer(metadata: dict, tokens: list[str], bos: str | None, eos: str | None, origin: str) -> Tokenizer:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    try:
        if model == "gpt2":
            tokenizer = _byte_level(tokens, metadata["tokenizer.ggml.merges"], pre)
        elif model == "llama":
            tokenizer = _sentencepiece(
                tokens, metadata["tokenizer.ggml.scores"], kinds, metadata.get("tokenizer.ggml.add_space_prefix", True)
            )
        else:
            raise ValueError(f"tokenizer.ggml.model={model!r} is not supported; wanted 'gpt2' or 'llama'")
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"{origin}: no tokenizer can be made from its metadata ({error}). Load the Hugging Face directory of this "
            f"model, which has a tokenizer.json."
        ) from error
    tokenizer.add_special_tokens(_added(tokens, kinds, CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, kinds, USER_DEFINED, special=False))
    _frame(tokenizer, metadata, bos if model == "llama" or pre == "llama-bpe" else None, bos, eos)
    return tokenizer
