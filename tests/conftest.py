"""Programs are compiled once and kept in .cache/jax; hypothesis draws the same examples every time."""

import pathlib

import hypothesis
import jax

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=12, database=None)
hypothesis.settings.load_profile("fixed")
