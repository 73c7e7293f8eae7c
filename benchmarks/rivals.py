"""transformers and kvpress, in a process of their own: torch's threads and jax's slow each other down in one.

`Rivals` starts the process and asks it, by the name of a function of `_Torch`, for what it measures. Each answer comes
with the seconds that the work took there.
"""

import logging
import multiprocessing
import os
import time

import numpy as np


class Rivals:
    """The other end. Use it as a context: the process ends with it."""

    def __init__(self, tokens: np.ndarray, rows: int, budget: int, new: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, tokens, rows, budget, new), daemon=True)
        self._process.start()

    def __enter__(self) -> "Rivals":
        return self

    def __exit__(self, *_):
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def ask(self, what: str, *args):
        """Result of `_Torch.what(*args)`, and its seconds."""
        self._pipe.send((what, args))
        return self._pipe.recv()

    def seconds(self, what: str, *args) -> float:
        """Only the seconds."""
        return self.ask(what, *args)[1]


class _Torch:
    def __init__(self, tokens, rows, budget, new):
        import kvpress
        import torch
        import transformers

        from kvjax.models import weights

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        torch.set_num_threads(os.cpu_count())
        path = weights._find_smollm2()
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self.model, self.torch, self.empty = model.eval(), torch, transformers.DynamicCache
        self.ids, self.budget, self.new = torch.tensor(tokens.astype(np.int64)), budget, new
        ratio = 1 - budget / tokens.shape[1]
        self.presses = {
            "snapkv": kvpress.SnapKVPress(ratio),
            "streaming_llm": kvpress.StreamingLLMPress(ratio),
            "keydiff": kvpress.KeyDiffPress(ratio),
            "tova": kvpress.TOVAPress(ratio),
        }
        self.rows, self.past = rows, None

    def prefill(self):
        self.model(self.ids, use_cache=True, logits_to_keep=1)

    def fill(self):
        """Makes the cache that `step` goes on from."""
        self.past = self.model(self.ids, use_cache=True, logits_to_keep=1).past_key_values
        self.past.batch_repeat_interleave(self.rows)
        self.token = self.torch.zeros((self.rows, 1), dtype=self.torch.long)

    def step(self):
        self.model(self.token, past_key_values=self.past, use_cache=True)

    def generate(self, prompts: np.ndarray, rows: int):
        """`generate`, greedy, `new` tokens for each of prompts i64[n, T], so many rows at a time."""
        for at in range(0, len(prompts), rows):
            ids = self.torch.tensor(prompts[at : at + rows])
            mask = self.torch.ones_like(ids)  # all are of one length: the best padding is none
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False
            )

    def press(self, name):
        """Prefill under the press, then greedy tokens at their true positions."""
        cache = self.empty()
        with self.presses[name](self.model):
            out = self.model(self.ids, past_key_values=cache, logits_to_keep=1)
        for i in range(self.new):
            token = out.logits[:, -1:].argmax(-1)
            at = self.torch.full((1, 1), self.ids.shape[1] + i)
            out = self.model(token, past_key_values=cache, position_ids=at, logits_to_keep=1)

    def kept(self, name) -> list[np.ndarray]:
        """Positions i64[H, budget] that the press keeps, a layer each."""
        kept, press = [], self.presses[name]
        score = press.score

        def watched(*args, **kwargs):
            scores = score(*args, **kwargs)
            kept.append(scores.topk(self.budget, dim=-1).indices[0].numpy())
            return scores

        press.score = watched
        try:
            with press(self.model):
                self.model(self.ids, past_key_values=self.empty(), logits_to_keep=1)
        finally:
            del press.score
        return kept


def _serve(pipe, *args) -> None:
    side = _Torch(*args)
    with side.torch.inference_mode():
        while True:
            try:
                what, arguments = pipe.recv()
            except EOFError:
                return
            start = time.perf_counter()
            result = getattr(side, what)(*arguments)
            pipe.send((result, time.perf_counter() - start))
