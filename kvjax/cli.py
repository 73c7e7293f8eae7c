"""The command `kvjax`."""

import contextlib
import dataclasses
import inspect
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(stderr=True)

ModelOption = Annotated[str, typer.Option(help="smollm2, a Hugging Face directory, a .gguf file or a name on the hub.")]
DtypeOption = Annotated[str, typer.Option(help="float32 or bfloat16.")]
PolicyOption = Annotated[str, typer.Option(help="A method of kvjax.policies, such as h2o; full keeps every token.")]
BudgetOption = Annotated[int | None, typer.Option(help="Slots that each head may keep.")]
WindowOption = Annotated[int | None, typer.Option(help="Newest tokens that always stay (h2o, snapkv).")]
SinksOption = Annotated[int | None, typer.Option(help="First tokens that always stay (streaming_llm).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Another setting of the method, name=value; can be given again.")
]
HeadsOption = Annotated[
    list[Path] | None,
    typer.Option("--heads", help="A file of trained heads; without it those that come with kvjax. Can be given again."),
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Draw from the likeliest tokens only.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability only.")]
DrawsOption = Annotated[int, typer.Option(help="Seed of the draws.")]
DEMO = "full,streaming_llm,h2o,snapkv,tova,keydiff,compactor,ems,kvmerger,locret"  # within six minutes on two cores
FileOption = Annotated[Path | None, typer.Option("--file", help="Read the prompt from a UTF-8 file instead.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the user says; the model's chat template goes around it.")] = "",
    file: FileOption = None,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "float32",
    policy: PolicyOption = "full",
    budget: BudgetOption = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    settings: SetOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer at most.")] = 128,
    chunk: Annotated[int | None, typer.Option(help="Read the prompt this many tokens at a time.")] = None,
    heads: HeadsOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: DrawsOption = 0,
) -> None:
    """Answers a prompt as it goes, and ends with a line of bytes and tokens/s."""
    import kvjax

    with _errors():
        chosen = _policy(policy, settings, budget=budget, window=window, sinks=sinks)
        text = _prompt(prompt, file)
        loaded = _load(model, dtype, heads, [chosen])
        tokens, lengths = _encode(loaded, text)
        said, times, shown = [], [time.perf_counter()], ""

        def show(new):
            nonlocal shown
            times.append(time.perf_counter())
            said.append(int(new[0]))
            whole = loaded.decode(said)
            if not whole.endswith("\ufffd"):  # a character may come in several tokens
                sys.stdout.write(whole[len(shown) :])
                sys.stdout.flush()
                shown = whole

        with _working(f"reading {int(lengths[0])} tokens (the first call compiles)") as bar:
            out = kvjax.decode(
                loaded.params, chosen, tokens, lengths=lengths, max_new_tokens=max_new_tokens, chunk=chunk,
                stop=loaded.stop_tokens, temperature=temperature, top_k=top_k, top_p=top_p, key=seed,
                on_token=lambda new: (bar.stop(), show(new)),
            )  # fmt: skip
        print(loaded.decode(said)[len(shown) :])
        held = kvjax.report(out.cache)
        speed = f"{(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else "too short to time"
        console.print(
            f"{chosen}: {held.total / 2**20:.2f} MiB of cache, {held.total / held.full:.1%} of a full one of "
            f"{held.tokens} tokens; {speed} after the first",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; all is every one.")] = DEMO,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "float32",
    tokens: Annotated[int, typer.Option(help="Tokens of a context.")] = 1000,
    budgets: Annotated[str, typer.Option(help="Fractions of the context, separated by commas.")] = "1/2,1/4,1/8",
    contexts: Annotated[int, typer.Option(help="Contexts with hidden facts.")] = 4,
    per_kind: Annotated[int, typer.Option(help="Facts of each kind in a context; each is asked for.")] = 2,
    prose: Annotated[int, typer.Option(help="Rows of prose for KL and top-1 agreement.")] = 4,
    forced: Annotated[int, typer.Option(help="Tokens predicted on each row of prose.")] = 32,
    group: Annotated[int, typer.Option(help="Rows read at once; more need more memory.")] = 4,
    seed: Annotated[int, typer.Option(help="Of facts, places and prose.")] = 0,
    heads: HeadsOption = None,
    out: Annotated[Path, typer.Option(help="Folder for compare.md, compare.csv and compare.png.")] = Path("out"),
) -> None:
    """Measures methods side by side on one model: facts found, agreement on prose, bytes, speed."""
    from fractions import Fraction

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from kvjax import compare as comparing
    from kvjax import tables
    from kvjax.files import write_whole

    with _errors():
        try:
            fractions = tuple(float(Fraction(part)) for part in budgets.split(","))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"compare: budgets={budgets!r} must be fractions such as 1/2,1/4,1/8.") from None
        names = list(comparing.AT_BUDGET) if methods == "all" else methods.split(",")
        size = comparing.Size(tokens, fractions, contexts, per_kind, prose, forced, group, seed)
        comparing.plan(names, size)  # refuses what cannot be done before anything is loaded
        started = time.perf_counter()
        loaded = _load(model, dtype, heads)
        names = comparing.trained(loaded, names) if methods in ("all", DEMO) else names
        comparing.check_fits(loaded, size)
        out.mkdir(parents=True, exist_ok=True)  # now, and not after minutes of work
        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("reading")
            rows = comparing.compare(
                loaded,
                names,
                size,
                lambda what, done, steps: progress.update(bar, description=what, completed=done, total=steps),
            )
        questions = contexts * per_kind
        title = (
            f"{model}, {dtype}: contexts of {tokens} tokens, compressed before the question; n = {questions} a kind, "
            f"{prose} x {forced} tokens of prose, seed {seed}"
        )
        table = Table(*tables.header(rows), title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*tables.cells(row))
        Console(width=None if sys.stdout.isatty() else 150).print(table)
        write_whole(out / "compare.md", f"{title}\n\n{tables.markdown(rows)}")
        write_whole(out / "compare.csv", tables.comma_separated(rows))
        written = ["compare.md", "compare.csv"]
        try:
            write_whole(out / "compare.png", tables.picture(rows, title))
            written.append("compare.png")
        except ModuleNotFoundError as error:
            console.print(f"no picture: {error}. pip install 'kvjax[plot]'", style="yellow", markup=False)
        seconds = time.perf_counter() - started
        print(f"{', '.join(str(out / name) for name in written)} written after {seconds:.0f} s")


@app.command()
def view(
    policy: PolicyOption,
    prompt: Annotated[str, typer.Argument(help="What the user says; the model's chat template goes around it.")] = "",
    file: FileOption = None,
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "float32",
    budget: BudgetOption = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    settings: SetOption = None,
    chunk: Annotated[int | None, typer.Option(help="Read the prompt this many tokens at a time.")] = None,
    heads: HeadsOption = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("out/view.html"),
) -> None:
    """Writes a page that shows which tokens of the prompt each layer and head keeps."""
    import kvjax
    from kvjax import view as viewing
    from kvjax.files import write_whole

    with _errors():
        chosen = _policy(policy, settings, budget=budget, window=window, sinks=sinks)
        text = _prompt(prompt, file)
        loaded = _load(model, dtype, heads, [chosen])
        tokens, lengths = _encode(loaded, text)
        with _working(f"reading {int(lengths[0])} tokens (the first call compiles)"):
            _, cache = kvjax.prefill(loaded.params, chosen, tokens, lengths=lengths, chunk=chunk)
            kept = viewing.kept(cache)
            merged = viewing.merged(loaded.params, chosen, tokens) if chunk is None else None
        words = [loaded.tokenizer.decode([int(token)], skip_special_tokens=False) for token in tokens[0]]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            out,
            viewing.page(
                words,
                kept,
                title=str(chosen),
                subtitle=f"{model}, {len(words)} tokens",
                bits=viewing.bits(cache),
                merged=merged,
            ),
        )
        print(f"{out} written: {chosen} keeps {kept.mean():.1%} of {len(words)} tokens")


@app.command()
def paging(
    trace: Annotated[
        str, typer.Option(help="rag, zipf, loop, or a file with a page a line, in the order of their requests.")
    ] = "rag",
    capacity: Annotated[int, typer.Option(help="Pages that fit into the cache.")] = 60,
    length: Annotated[int, typer.Option(help="Requests of a trace that is drawn.")] = 10_000,
    seeds: Annotated[int, typer.Option(help="Draws of wrong predictions and of random choices.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for paging.csv and paging.png.")] = Path("out"),
) -> None:
    """Simulates which pages a cache keeps: faults of each policy as its predictions get worse."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from kvjax.files import write_whole
    from kvjax.serve import simulate, traces

    with _errors():
        drawn = {"rag": traces.rag, "zipf": traces.zipf, "loop": traces.loop}
        if trace in drawn:
            requests = drawn[trace](length)
        else:
            requests = traces.numbered(filter(str.strip, _prompt("", Path(trace)).splitlines()))
        out.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("paging")
            costs = simulate.sweep(
                requests,
                capacity,
                seeds=seeds,
                advance=lambda what, done, steps: progress.update(bar, description=what, completed=done, total=steps),
            )
        title = f"{trace}: {len(requests)} requests, {capacity} pages in cache; faults, of Belady's; seeds: {seeds}"
        head, *lines = simulate.table(costs)
        shown = Table(*head, title=title, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for line in lines:
            shown.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 180).print(shown)
        write_whole(out / "paging.csv", simulate.comma_separated(costs))
        written = [out / "paging.csv"]
        try:
            write_whole(out / "paging.png", simulate.picture(costs, title))
            written.append(out / "paging.png")
        except ModuleNotFoundError as error:
            console.print(f"no picture: {error}. pip install 'kvjax[plot]'", style="yellow", markup=False)
        print(f"{', '.join(map(str, written))} written")


@app.command()
def batch(
    prompts: Annotated[Path, typer.Argument(help='JSON Lines: {"id": ..., "prompt": "..."} each.')],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of answers, in the order of the prompts.")],
    model: ModelOption = "smollm2",
    dtype: DtypeOption = "float32",
    policy: PolicyOption = "full",
    budget: BudgetOption = None,
    window: WindowOption = None,
    sinks: SinksOption = None,
    settings: SetOption = None,
    prefix_policy: Annotated[
        str, typer.Option(help="The method for shared prefixes, as NAME or NAME:BUDGET.")
    ] = "full",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most, of lines that do not say.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are, without the chat template.")] = False,
    memory: Annotated[float, typer.Option(help="MiB that caches may take.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one pass through the model.")] = 2048,
    method: Annotated[str, typer.Option(help="How prompts are grouped: exact, paper, naive or none.")] = "exact",
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: DrawsOption = 0,
) -> None:
    """Answers a file of prompts, and computes what they share once. A run that was killed goes on where it was."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvjax.serve import jobs

    with _errors():
        chosen = _policy(policy, settings, budget=budget, window=window, sinks=sinks)
        name, _, given = prefix_policy.partition(":")
        of_prefixes = _policy(name, given.split(",") if given else None)
        loaded = _load(model, dtype)
        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        latest = None
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("reading")

            def show(one):
                nonlocal latest
                latest = one
                rate = (one.read + one.generated) / max(one.seconds, 1e-9)
                said = f"{rate:.0f} tokens/s, {one.shared} shared, {one.cache_bytes / 2**20:.0f} MiB"
                progress.update(bar, description=said, completed=one.done, total=one.prompts)

            written = jobs.run(
                loaded, prompts, out, chosen, prefix_policy=of_prefixes, max_new_tokens=max_new_tokens, chat=not raw,
                memory=int(min(memory, 2**40) * 2**20), batch_tokens=batch_tokens, method=method,
                temperature=temperature, top_k=top_k, top_p=top_p, key=seed, on_progress=show,
            )  # fmt: skip
        if latest is not None:
            console.print(
                f"{latest.read} of {latest.logical} tokens of prompts read ({latest.shared} shared), "
                f"{latest.generated} generated, {latest.most_bytes / 2**20:.0f} MiB of caches, {latest.seconds:.1f} s",
                style="dim",
                highlight=False,
                soft_wrap=True,
            )
        print(f"{written} written" if written else "this part is done; the last one to finish writes the answers")


@contextlib.contextmanager
def _working(what: str):
    """A bar that moves, with the time so far, for work whose steps cannot be counted; it leaves nothing behind."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield bar


@contextlib.contextmanager
def _errors():
    """What the user got wrong is said in a line, with exit status 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"kvjax: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _policy(name: str, others: list[str] | None, **settings):
    """The policy called `name`, with the settings that were given; `others` are of the form name=value."""
    from kvjax import policies

    if name not in policies.__all__:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(policies.__all__)}.")
    make = getattr(policies, name)
    takes = inspect.signature(make).parameters

    def option(key):
        return f"--{key}" if key in settings else f"--set {key}="

    given = {key: value for key, value in settings.items() if value is not None}
    for other in others or []:
        key, _, value = other.partition("=")
        given[key] = _parsed(value)
    for key in given:
        if key not in takes:
            raise ValueError(f"{name} takes no {option(key)}; it takes {', '.join(map(option, takes)) or 'nothing'}.")
    missing = [key for key, one in takes.items() if one.default is one.empty and key not in given]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(map(option, missing))}.")
    return make(**given)


def _parsed(value: str):
    """A number, true or false, none, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _prompt(prompt: str, file: Path | None) -> str:
    if bool(prompt.strip()) == bool(file):
        raise ValueError("give a prompt or --file, one of them.")
    if file is None:
        return prompt
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}. Convert it, for example with iconv -t UTF-8.") from None
    if not text.strip():
        raise ValueError(f"{file} is empty.")
    return text


def _load(name: str, dtype: str, heads: list[Path] | None = None, policies=()):
    """The model, with heads out of files, and with those that `policies` want."""
    import jax

    import kvjax

    # Programs are kept between runs: an unrolled decode step of 30 layers takes seconds to compile.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "kvjax" / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with _working(f"loading {name}"):
        model = kvjax.load(name, dtype=dtype)
        if heads or any(policy.given for policy in policies):
            from kvjax.heads import load, with_heads_for

            found = {method: each for file in heads or () for method, each in load(file, model.params).items()}
            params = with_heads_for(kvjax.with_heads(model.params, found), policies)
            model = dataclasses.replace(model, params=params)
        return model


def _encode(model, text: str):
    """The prompt in the model's chat template, if it has one."""
    if model.chat_template is None:
        return model.encode([text])
    return model.encode([model.chat(text)], add_special_tokens=False)
