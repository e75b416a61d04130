"""The demo model's corpus: where the text comes from, and how it becomes tokens.

Four training streams and one for validation, each a flat array of token ids in which every
document ends with `<|endoftext|>`:

    library     the standard library's own modules
    tests       its test suite
    functions   each of the library's small top-level functions and classes, alone, so that the
                model learns what a single definition is and where it ends
    lessons     lessons.py, our own teaching programs, in many phrasings
    validation  library modules that none of the above has seen
"""
# SPDX-License-Identifier: Apache-2.0

import ast
import functools
import io
import random
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SPECIAL_TOKENS = [END, "<|im_start|>", "<|im_end|>"]

# Tables rather than code, or code that is wrong on purpose.
SKIPPED = ("site-packages/", "pydoc_data/", "encodings/", "lib2to3/tests/data/", "test/encoded_modules/")
TEST_FOLDERS = {"test", "tests", "idle_test"}
MAX_DIGITS = 0.12  # a file with a larger share of digits is a table
HELD_OUT = 40  # one library module in so many is for validation
MAX_DEFINITION_LINES = 70

# Words, each with the sign before it; numbers; signs; line breaks with the next line's indentation.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|(?:\r?\n)+[ \t]*|\s+(?!\S)|\s+"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

# Other names that people give to what the lessons define.
SYNONYMS = {
    "n": ["num", "number", "x", "k", "limit"],
    "items": ["arr", "lst", "values", "data", "nums", "a", "xs"],
    "numbers": ["nums", "values", "lst", "data", "xs"],
    "text": ["s", "string", "word", "txt"],
    "target": ["value", "x", "key"],
    "path": ["filename", "file_path"],
    "low": ["left", "lo"],
    "high": ["right", "hi"],
    "middle": ["mid"],
    "item": ["value", "x", "element"],
    "result": ["res", "output"],
    "mapping": ["d", "dictionary"],
    "average": ["mean", "avg"],
    "bfs": ["breadth_first_search"],
    "binary_search": ["search", "bisect"],
    "chunks": ["chunk", "batch", "batched"],
    "count_words": ["word_count", "count"],
    "dfs": ["depth_first_search"],
    "factorial": ["fact"],
    "fibonacci": ["fibo", "nth_fibonacci", "fibonacci_number"],
    "find_max": ["maximum", "get_max", "largest"],
    "find_min": ["minimum", "get_min", "smallest"],
    "gcd": ["greatest_common_divisor"],
    "greet": ["hello", "say_hello", "greeting"],
    "is_palindrome": ["palindrome", "check_palindrome"],
    "is_prime": ["prime", "check_prime"],
    "load_json": ["read_json"],
    "merge_sort": ["mergesort"],
    "primes_up_to": ["sieve", "primes", "get_primes", "prime_numbers"],
    "quicksort": ["quick_sort", "sort", "qsort"],
    "read_config": ["load_config", "parse_config"],
    "read_file": ["load_file", "read_text"],
    "reverse_string": ["reverse"],
    "save_json": ["write_json"],
    "sum_list": ["list_sum", "total_of"],
    "unique": ["remove_duplicates", "dedupe"],
    "write_file": ["save_file", "write_text"],
}

PHRASINGS = [
    "{0}", "{0}", "{0}.", "{0}.", "{1}",
    "Write a function to {1}.", "Write a Python function to {1}.", "write a function to {1}",
    "Write Python code to {1}.", "Please write a function to {1}.", "Can you {1}?", "How do I {1}?",
    "I need a function to {1}.", "Define a function to {1}.",
    "Write a function that {2}.", "write a function that {2}", "A function that {2}",
]  # fmt: skip
PREAMBLES = ["You are a helpful assistant.", "You are a Python programmer.", "You write clear and simple code."]
NAMED_PHRASINGS = ["{0}", "{0}", "Write {0}.", "write {0}", "Implement {0}.", "Please implement {0}.", "{0} in Python"]


@functools.cache
def modules() -> list[tuple[str, str]]:
    """Return (path, text) of the standard library's modules that are code, in a fixed order."""
    found = []
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if path.startswith(SKIPPED):
            continue
        try:
            text = file.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if text.strip() and sum(map(str.isdigit, text)) < MAX_DIGITS * len(text):
            found.append((path, text))
    return found


def is_test(path: str) -> bool:
    """Tell the test suite from the library."""
    return not TEST_FOLDERS.isdisjoint(path.split("/"))


def is_held_out(path: str) -> bool:
    """Choose the validation modules by their path alone."""
    return not is_test(path) and zlib.crc32(path.encode()) % HELD_OUT == 0


def definitions(text: str) -> Iterator[str]:
    """Yield the small top-level functions and classes of a module."""
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, Definition):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            definition = lines[first - 1 : node.end_lineno]
            if 3 <= len(definition) <= MAX_DEFINITION_LINES:
                yield "".join(definition)


def lessons() -> Iterator[tuple[list[str], str]]:
    """Yield (requests, code) for each piece of lessons.py."""
    text = Path(__file__).with_name("lessons.py").read_text(encoding="utf-8")
    for piece in text.strip().split("\n\n\n")[1:]:
        code = re.sub(r"\A(?:# .*\n)+", "", piece)
        yield re.findall(r"# (.*)\n", piece.removesuffix(code)), code + "\n"


def definition_in(code: str) -> ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None:
    """Return the first definition of a piece of code."""
    return next((node for node in ast.parse(code).body if isinstance(node, Definition)), None)


def docstring_in(code: str) -> str:
    """Return the docstring of the first definition, or an empty string."""
    node = definition_in(code)
    return (ast.get_docstring(node) or "") if node else ""


def requests_for(code: str, docstring: str) -> list[str]:
    """Return ways to ask for a definition, from its docstring and its name."""
    node = definition_in(code)
    if node is None:
        return []
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|_+", " ", node.name).strip().lower()
    named = [node.name, words, f"a {words} {kind}", f"a {kind} called {node.name}", f"the {node.name} {kind}"]
    requests = [phrasing.format(name) for phrasing in NAMED_PHRASINGS for name in named]
    summary = re.split(r"\.\s|\n\n|\.$", docstring.strip())[0]
    if 10 < len(summary) < 150 and "\n" not in summary:
        request = summary[0].lower() + summary[1:]
        verb, _, rest = request.partition(" ")
        third_person = f"{verb}{'es' if verb.endswith(('s', 'sh', 'ch', 'x')) else 's'} {rest}"
        plain = PHRASINGS[:4] if kind == "class" else PHRASINGS
        requests += [phrasing.format(summary, request, third_person) for phrasing in plain * 2]
    return requests


def without_docstring(code: str) -> str:
    """Return the code of a definition without its docstring."""
    for node in ast.parse(code).body:
        if isinstance(node, Definition) and ast.get_docstring(node) and len(node.body) > 1:
            lines = code.splitlines(keepends=True)
            del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
            return "".join(lines).replace(":\n\n", ":\n", 1)
    return code


def without_imports(code: str) -> str:
    """Return the code of a definition without the imports above it, which a prompt may have or lack."""
    return re.sub(r"\A(?:(?:import|from) .*\n)+\n", "", code)


def renamed(code: str, rng: random.Random) -> str:
    """Return the code with some variables named otherwise."""
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    strings = " ".join(token.string for token in tokens if token.type == tokenize.STRING)
    for name, others in SYNONYMS.items():
        other = rng.choice(others)
        if rng.random() < 0.5 or re.search(rf"\b{other}\b", code) or re.search(rf"\b{name}\b", strings):
            continue
        for i, token in enumerate(tokens):
            is_attribute = i > 0 and tokens[i - 1].string == "."
            if token.type == tokenize.NAME and token.string == name and not is_attribute:
                tokens[i] = token._replace(string=other)
        code = with_tokens(code, tokens)
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    return code


def with_tokens(code: str, tokens: list[tokenize.TokenInfo]) -> str:
    """Return the code with each name replaced by its token's string."""
    lines = code.splitlines(keepends=True)
    for token in reversed(tokens):
        if token.type == tokenize.NAME:
            row, start, stop = token.start[0] - 1, token.start[1], token.end[1]
            lines[row] = lines[row][:start] + token.string + lines[row][stop:]
    return "".join(lines)


def asked(requests: list[str], code: str, rng: random.Random, share: float) -> str:
    """Return the code below a comment that asks for it, for a share of all cases."""
    if not requests or rng.random() >= share:
        return code
    preamble = f"# {rng.choice(PREAMBLES)}\n\n" if rng.random() < 0.1 else ""
    return f"{preamble}# {rng.choice(requests)}\n{code}"


def documents(stream: str, rng: random.Random) -> Iterator[str]:
    """Yield the documents of one stream; the small ones come out differently each time."""
    if stream == "lessons":
        for own, code in lessons():
            docstring = docstring_in(code)
            if rng.random() < 0.5:
                code = renamed(without_docstring(code), rng)
            if rng.random() < 0.2:
                code = without_imports(code)
            # A program that is no definition has no other cue than the request.
            share = 0.6 if definition_in(code) else 1.0
            yield asked(own * 6 + requests_for(code, docstring), code, rng, share)
        return
    for path, text in modules():
        if is_held_out(path) != (stream == "validation") or is_test(path) != (stream == "tests"):
            continue
        if stream != "functions":
            yield text
            continue
        for code in definitions(text):
            requests = requests_for(code, docstring_in(code))
            code = without_docstring(code) if rng.random() < 0.3 else code
            yield asked(requests, code, rng, share=0.5)


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that gives back every text unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [text for name in ("library", "functions", *["lessons"] * 4) for text in documents(name, rng)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut(text: str, rng: random.Random, mean_length: int = 120) -> Iterator[str]:
    """Yield the text in pieces, half of which end at white space.

    A prompt can end anywhere, also inside what would have been one token (`def `, with its space).
    Text that was encoded in pieces shows the model how such a prompt goes on.
    """
    start = 0
    while start < len(text):
        end = start + 1 + int(rng.expovariate(1 / mean_length))
        if rng.random() < 0.5 and (space := re.compile(r"\s").search(text, min(end, len(text)))):
            end = space.end()
        yield text[start:end]
        start = end


def encode(tokenizer: Tokenizer, stream: str, copies: int, seed: int) -> np.ndarray:
    """Return the stream's token ids, (tokens,) uint16; each copy is cut at other places."""
    end = SPECIAL_TOKENS.index(END)
    rng = random.Random(f"{seed} {stream}")
    ids: list[int] = []
    for _ in range(copies):
        texts = list(documents(stream, rng))
        rng.shuffle(texts)
        pieces = [[text] if stream == "validation" else list(cut(text, rng)) for text in texts]
        encoded = iter(tokenizer.encode_batch([p for text in pieces for p in text], add_special_tokens=False))
        for text in pieces:
            for _ in text:
                ids += next(encoded).ids
            ids.append(end)
    return np.array(ids, dtype=np.uint16)
