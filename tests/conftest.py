"""Programs are compiled quickly, once, and kept in .cache/jax; hypothesis draws the same examples every time."""

import gc
import itertools
import os
import pathlib

# Most of the tests' time is the compiler's. Without LLVM's optimisations, XLA's newer emitters of fusions and a thread
# for each core (the other test process has it), programs run slower, but compile in a fifth of the time.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # tests compile for TPUs, and must not look for one

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

TESTS = itertools.count()

jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=12, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def forget_programs_before_the_process_is_full():
    """Compiled programs take memory, and mappings of it: Linux gives a process 65530, and beyond them LLVM crashes."""
    yield
    held = pathlib.Path("/proc/self")
    if next(TESTS) % 10 == 0 and held.exists():
        pages = int((held / "statm").read_text().split()[1])
        mappings = (held / "maps").read_bytes().count(b"\n")
        if pages * os.sysconf("SC_PAGE_SIZE") > 4 * 2**30 or mappings > 20_000:
            jax.clear_caches()
            gc.collect()
