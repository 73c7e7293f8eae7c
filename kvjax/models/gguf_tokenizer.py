"""The tokenizer in a GGUF file's metadata, put together again from its vocabulary, merges or scores."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
    try:
        tokenizer = _build_tokenizer(metadata, tokens, bos, eos)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{origin}: no tokenizer can be made from its metadata ({error}). Load the Hugging Face directory of this "
            f"model, which has a tokenizer.json."
        ) from error
    return Text(tokenizer, template, stops, bos, eos)


def _build_tokenizer(metadata: dict, tokens: list[str], bos: str | None, eos: str | None) -> Tokenizer:
    stated = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model, pre = stated.get("model"), stated.get("pre")
    kinds = stated.get("token_type", [NORMAL] * len(tokens))
    if model == "gpt2":
        tokenizer = _byte_level(tokens, stated["merges"], pre)
    elif model == "llama":
        tokenizer = _sentencepiece(tokens, stated["scores"], kinds, stated.get("add_space_prefix", True))
    else:
        raise ValueError(f"tokenizer.ggml.model={model!r} is not supported; wanted 'gpt2' or 'llama'")
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, kinds, strict=True) if its == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    # llama.cpp's defaults, where the file does not say
    before = [bos] if bos and stated.get("add_bos_token", model == "llama" or pre == "llama-bpe") else []
    after = [eos] if eos and stated.get("add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)],
        )
    return tokenizer


def _byte_level(tokens: list[str], merges: list[str], pre: str | None) -> Tokenizer:
    """Byte-level BPE, as of GPT-2; `pre` names the way a text is cut into words before."""
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cuts = {
        "gpt-2": [gpt2_words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), gpt2_words],
        "llama-bpe": _cut(LLAMA3_WORDS),
        "qwen2": _cut(QWEN2_WORDS),
    }
    if pre not in cuts:
        raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported; wanted one of {tuple(cuts)}")
    tokenizer = _bpe(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        ignore_merges=pre == "llama-bpe",  # a word that is in the vocabulary is taken whole
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _cut(words: str) -> list:
    return [
        pre_tokenizers.Split(Regex(words), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _bpe(**parts) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(**parts))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"its merges do not fit its vocabulary: {error}") from error


def _sentencepiece(tokens: list[str], scores: list[float], kinds: list[int], add_prefix: bool) -> Tokenizer:
    """BPE as of sentencepiece: what it merges is not stored, only each token's score, higher joined first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    joined = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = [
        (-scores[vocab[token]], -i, token[:i], token[i:])  # of one token's, the longer left part first
        for token in joined
        for i in range(1, len(token))
        if token[:i] in joined and token[i:] in joined
    ]
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    tokenizer = _bpe(
        vocab=vocab,
        merges=[merge[2:] for merge in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = [normalizers.Prepend("▁")] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
