"""Fetches free English prose to train eviction heads on, and hides generated facts in it.

    python -m scripts.fetch_text .cache/train/text.jsonl --facts 4000 --held-out 256

The prose is the documentation in a few packages of Debian, so this wants a Debian or Ubuntu with its package lists
(apt-get update). Nothing is installed and root is not needed: packages are fetched by apt-get, which checks their
signatures, and unpacked beside the output. A package that is not to be had is named and left out. The same packages and
the same seed give the same files.

Beside text.jsonl, rows {"text", "source"} of a chapter each, it writes text_facts.jsonl and text_facts_held_out.jsonl,
the latter from another seed and over chapters that the former does not use. The files hold text of the packages, under
their licences, which are printed.
"""

import argparse
import gzip
import html.parser
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

import kvjax
from kvjax.files import write_whole
from train.facts import fact_examples

PACKAGES = {  # and where its English chapters are
    "abs-guide": "usr/share/doc/abs-guide/html/*.html",
    "aptitude-doc-en": "usr/share/doc/aptitude/html/en/*.html",
    "cfi-en": "usr/share/doc/cfi-en/html/*.htm",
    "debian-faq": "usr/share/doc/debian/FAQ/*.en.html",
    "debian-history": "usr/share/doc/debian-history/docs/*.en.html",
    "debian-kernel-handbook": "usr/share/doc/debian-kernel-handbook/kernel-handbook.html/*.html",
    "debian-policy": "usr/share/doc/debian-policy/policy.html/*.html",
    "debian-reference-en": "usr/share/debian-reference/*.en.html",
    "developers-reference": "usr/share/developers-reference/*.html",
    "git-doc": "usr/share/doc/git/html/**/*.html",
    "gnome-user-docs": "usr/share/help/C/**/*.page",
    "gnu-standards": "usr/share/doc/gnu-standards/*.html",
    "harden-doc": "usr/share/doc/harden-doc/html/en-US/*.html",
    "jargon-text": "usr/share/doc/jargon-text/jargon.txt.gz",
    "maint-guide": "usr/share/doc/maint-guide/html/*.en.html",
    "mate-user-guide": "usr/share/help/C/**/*.xml",
    "mh-book": "usr/share/doc/mh-book/html/**/*.html",
}
PARAGRAPHS = {"p", "dd", "li", "para", "blockquote", "div", "td"}  # what begins a paragraph ends the one before
OPAQUE = {"pre", "script", "style", "nav", "head", "programlisting", "screen", "title", "h1", "h2", "h3", "h4"}
LICENCES = ("public domain", "GNU Free Documentation License", "General Public License", "Creative Commons", "BSD")
EVERY = 20  # of so many chapters one is for the facts that are held out, so they have some of each package


class Paragraphs(html.parser.HTMLParser):
    """Collects the paragraphs of HTML, DocBook or Mallard, without headings and blocks of code."""

    def __init__(self):
        super().__init__()
        self.found, self.words, self.opaque = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag in OPAQUE:
            self.opaque += 1
        if tag in PARAGRAPHS:
            self.end()

    def handle_startendtag(self, tag, attrs):
        pass  # <pre/> has no end to wait for

    def handle_endtag(self, tag):
        if tag in OPAQUE:
            self.opaque = max(self.opaque - 1, 0)
        if tag in PARAGRAPHS:
            self.end()

    def handle_data(self, data):
        if not self.opaque:
            self.words.append(data)

    def end(self):
        self.found.append("".join(self.words))
        self.words = []


def read_paragraphs(file: Path) -> list[str]:
    """Prose paragraphs of a file, each on one line."""
    content = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if file.suffix == ".gz":
        raw = text.split("\n\n")
    else:
        parser = Paragraphs()
        parser.feed(text)
        parser.close()
        parser.end()
        raw = parser.found
    return [flat for flat in (" ".join(paragraph.split()) for paragraph in raw) if is_prose(flat)]


def is_prose(text: str) -> bool:
    """Whether this is a paragraph of sentences: no code, no heading, no list of names."""
    plain = sum(letter.isalpha() or letter in " ,.;'" for letter in text)
    return (
        len(text) >= 80
        and re.match(r"[A-Z]", text) is not None
        and re.search(r"[.!?]['\")]?$", text) is not None
        and plain >= 0.93 * len(text)
        and not re.search(r"[{}|\\~=_<>\ufffd]|::|\.\.\.\.", text)
    )


def split_sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    return [sentence for sentence in found if 30 <= len(sentence) <= 300 and sentence[0].isupper()]


def fetch(package: str, folder: Path) -> Path | None:
    """Unpacks a package and says where, or None if it is not to be had."""
    done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
    files = sorted(folder.glob(f"{package}_*.deb"))
    if done.returncode or not files:
        print(f"  {package}: left out, {(done.stderr.strip().splitlines() or ['apt-get says nothing'])[-1]}")
        return None
    subprocess.run(["dpkg-deb", "-x", files[0], folder / package], check=True)
    return folder / package


def find_licence(root: Path, package: str) -> str:
    file = root / "usr/share/doc" / package / "copyright"
    text = " ".join(file.read_text(errors="replace").split()) if file.exists() else ""
    return ", ".join(name for name in LICENCES if name.lower() in text.lower()) or "see its copyright file"


def fetch_chapters(folder: Path) -> list[dict]:
    """Chapters of every package, in order; a paragraph that came before is left out."""
    chapters, seen = [], set()
    for package, pattern in PACKAGES.items():
        root = fetch(package, folder)
        if root is None:
            continue
        before = len(chapters)
        for file in sorted(root.glob(pattern)):
            paragraphs = [text for text in read_paragraphs(file) if text not in seen]
            paragraphs = list(dict.fromkeys(paragraphs))
            seen.update(paragraphs)
            if paragraphs:
                source = f"{package}/{file.relative_to(root)}"
                chapters.append({"text": "\n\n".join(paragraphs), "source": source})
        size = sum(len(chapter["text"]) for chapter in chapters[before:])
        print(f"  {package}: {len(chapters) - before} chapters, {size / 1e6:.2f} MB; {find_licence(root, package)}")
    return chapters


def write_rows(path: Path, rows: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="where the text goes; the facts go beside it")
    parser.add_argument("--facts", type=int, default=0, help="examples with hidden facts to train on")
    parser.add_argument("--held-out", type=int, default=0, help="such examples to evaluate with")
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 2000), help="least and most of a context")
    parser.add_argument("--model", default="smollm2", help="whose tokenizer counts")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=given.out.parent) as folder:
        chapters = fetch_chapters(Path(folder))
    if not chapters:
        raise SystemExit("fetch_text: no package was to be had. Run apt-get update, or bring JSON Lines of your own.")
    write_rows(given.out, chapters)
    print(f"{time.perf_counter() - start:.0f} s")
    tokenizer = kvjax.load(given.model).tokenizer
    held, used = chapters[::EVERY], [chapter for i, chapter in enumerate(chapters) if i % EVERY]
    for name, count, seed, of in (
        ("facts", given.facts, given.seed, used),
        ("facts_held_out", given.held_out, given.seed + 1, held),
    ):
        if count:
            start = time.perf_counter()
            sentences = [sentence for chapter in of for sentence in split_sentences(chapter["text"])]
            examples = fact_examples(
                sentences,
                lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
                count=count,
                tokens=tuple(given.tokens),
                seed=seed,
            )
            write_rows(given.out.with_name(f"{given.out.stem}_{name}.jsonl"), list(examples))
            print(f"over {len(sentences)} sentences, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
