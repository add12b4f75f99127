"""Changes of a file: of what it says (JSON, YAML, GGUF, Jinja), and of its bytes. Each is made by a `random.Random`."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

from benchmarks.fuzzing import gguf_tree

MEGABYTE = 2**20


class Raw(str):
    """JSON as it is to be written."""


class Pairs(list):
    """An object, as [key, value] lists: a key may be there twice."""


def hostile(rng: random.Random) -> Any:
    """A value that nobody expects."""
    return rng.choice(_VALUES)(rng)


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice([3, 100, 1500, 200_000])
    return Raw("[" * depth + "]" * depth) if rng.random() < 0.5 else Raw('{"a":' * depth + "1" + "}" * depth)


_NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**19, 0.5, -0.0, 1e-45, 1e40),
    *(1e308, math.pi, 10**400),
)
_TEXTS = (
    *("", " ", "a", "true", "null", "0", "1e400", "none", "\x00", "\x1b[31m\x1b]0;owned\x07", "\u2028x\x85y\r\nz"),
    *("\ud800", "é" * 50, "../../etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "(a+)+$", "(?i)x", "["),
    *("(.*)*(.*)*(.*)*x", "%s%n{0}{x.__class__}", "{{ 1 }}", "$(id)", "*", "a" * 300, "a.b.c", "package:os", "~root"),
)
_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    *[lambda rng: rng.choice(_NUMBERS)] * 5,
    *[lambda rng: rng.choice(_TEXTS)] * 5,
    lambda rng: rng.choice([None, True, False]),
    lambda rng: rng.choice([None, True, False]),
    lambda rng: Raw(rng.choice(["NaN", "Infinity", "-Infinity", "1e400", "1E-400", "00", "0x10", "1" * 5000])),
    lambda rng: rng.choice([[], Pairs(), [None], [[]], [0, -1], ["a", 1], Pairs([["a", 1]]), Pairs([["", None]])]),
    lambda rng: [rng.choice(_NUMBERS) for _ in range(rng.choice([1, 3, 1000]))],
    lambda rng: rng.choice("ax\x01/\u00e9") * MEGABYTE,
    _nested,
)


# --- JSON ----------------------------------------------------------------------------------------


def parse(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def dump(value: Any) -> str:
    """JSON; of Pairs and Raw too."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dump, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 10_000:
        return "1" + "0" * 4000  # more digits than Python prints
    return json.dumps(value)


def slots(tree: Any) -> list[tuple[Any, int]]:
    """Every place that holds a value: (container, index). A place in Pairs is a [key, value] list's."""
    found: list[tuple[Any, int]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        places = [(pair, 1) for pair in node] if isinstance(node, Pairs) else [(node, i) for i in range(len(node))]
        found += places
        todo += [place[0][place[1]] for place in places if isinstance(place[0][place[1]], list)]
    return found


def edit(tree: Any, rng: random.Random) -> Any:
    """The tree with one to a few changes; it is changed itself."""
    for _ in range(1 + (rng.random() < 0.3) + (rng.random() < 0.1)):
        if not isinstance(tree, list) or not (places := slots(tree)):
            return hostile(rng)
        holder, index = rng.choice(places)
        objects = [node for node in [tree, *(h[i] for h, i in places)] if isinstance(node, Pairs)]
        change = rng.random()
        if change < 0.45:
            holder[index] = hostile(rng)
        elif change < 0.6:
            holder[index] = _near(holder[index], rng)
        elif change < 0.7:
            other, at = rng.choice(places)
            holder[index], other[at] = other[at], holder[index]
        elif change < 0.98 and objects:
            _edit_object(rng.choice(objects), rng)
        else:
            tree = hostile(rng)
    return tree


def _edit_object(node: Pairs, rng: random.Random) -> None:
    pairs = list(node)
    change = rng.randrange(4)
    if change == 0 or not pairs:
        node.append([rng.choice(_TEXTS), hostile(rng)])
    elif change == 1:
        node.remove(rng.choice(pairs))
    elif change == 2:
        node.append([rng.choice(pairs)[0], hostile(rng)])
    else:
        pair = rng.choice(pairs)
        pair[0] = rng.choice([rng.choice(_TEXTS), pair[0] + "s", pair[0][:-1], pair[0].upper()])


def _near(value: Any, rng: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 2**32, 0])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e30, value * 1e40, value / 1e40, 0.0, int(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), value * 1000, value[::-1], value + "\x1b[2J"])
    if isinstance(value, Pairs):
        return Pairs(rng.sample(value, rng.randrange(len(value) + 1)))
    if isinstance(value, list):
        return rng.choice([value * 2, value[:-1], value[::-1], [value]])
    return hostile(rng)


# --- Forms ---------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, insertions, zeroed and repeated runs, numbers put in."""
    out = bytearray(data)
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 200) + 1)
        run = rng.choice([1, 4, 8, 64, 4096])
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(run)
            case 3:
                out[at : at + run] = bytes(len(out[at : at + run]))
            case 4:
                out[at:at] = out[at : at + run]
            case 5:
                number = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
                out[at : at + 8] = struct.pack("<Q", number)
            case _:
                del out[at : at + run]
    return bytes(out)


def of_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return of_bytes(data, rng)
    return dump(edit(parse(data), rng)).encode("utf-8", "surrogatepass")


def of_lines(data: bytes, rng: random.Random) -> bytes:
    """Return the JSON lines with one of them changed, torn, repeated or gone."""
    if rng.random() < 0.15:
        return of_bytes(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            del lines[at]
        case 1:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        case 2:
            lines.insert(at, lines[rng.randrange(len(lines))])
        case _:
            lines[at] = dump(edit(parse(lines[at]), rng)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines) + rng.choice([b"\n", b""])


def _split(regex: str) -> Pairs:
    pattern = Pairs([["Regex", regex]])
    return Pairs([["type", "Split"], ["pattern", pattern], ["behavior", "Isolated"], ["invert", False]])


_GROWS = Pairs([["type", "Replace"], ["pattern", Pairs([["String", "a"]])], ["content", "a" * 100]])
_SPLITS = ("(a+)+$", "(a|aa)+$", "(x+x+)+y", "((a{0,99}){0,99}){0,99}", "", "(?<!a{1,9})", "\\p{L}+*", "(" * 900)
_NORMALIZERS = (
    Pairs([["type", "Sequence"], ["normalizers", [_GROWS] * 6]]),
    Pairs([["type", "Prepend"], ["prepend", "x" * 10**7]]),
    Pairs([["type", "Precompiled"], ["precompiled_charsmap", "AAAA"]]),
    Pairs([["type", "Strip"]]),
)


def of_tokenizer(data: bytes, rng: random.Random) -> bytes:
    """Change a tokenizer.json, its patterns and rules in particular."""
    if rng.random() < 0.7:
        return of_json(data, rng)
    form = dict(parse(data))
    if rng.random() < 0.4:
        form["normalizer"] = rng.choice(_NORMALIZERS)
    else:
        form["pre_tokenizer"] = _split(rng.choice(_SPLITS))
    return dump(Pairs([[key, value] for key, value in form.items()])).encode()


_EXPRESSIONS = (
    *("(.*)*(.*)*(.*)*(.*)*x", "(a|a)*b", "((model|layers|.)+)+z", "(?i)q_proj", ")(", "(?P<a>q)(?P<a>r)", "q_proj|"),
    *("(?=.*){500}", "[", "\\", ".*{9999}", "(?:" * 500, "q_proj$", "^.*q_proj", "(((.+)+)+)+\\d$", ".*(q|v)_proj"),
)


def of_adapter(data: bytes, rng: random.Random) -> bytes:
    """Change an adapter_config.json, its expressions in particular."""
    if rng.random() < 0.6:
        return of_json(data, rng)
    config = dict(parse(data))
    key = rng.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
    found = rng.choice(_EXPRESSIONS)
    config[key] = Pairs([[found, 2]]) if key.endswith("pattern") else found
    return dump(Pairs([[key, value] for key, value in config.items()])).encode()


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = dump(edit(parse(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
    said = len(header) if rng.random() < 0.95 else rng.choice([0, len(header) - 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", said) + header + data[8 + length :]


def of_gguf(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    return gguf_tree.edited(data, rng, hostile)


_ANCHORS = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9) if i else 'x'}]" for i in range(12))
_YAML = (
    *(_ANCHORS, "# " + "x" * MEGABYTE, "a: &a [*a]", "? [1, 2]\n: x", "!!python/object:os.system {}", "\t- x"),
    *("--- 2", "<<: {a: 1}", "train: 5", "x: !!binary AAA", "y: !!timestamp 2001-99-99", "name: *missing"),
    *("extends: quickstart", "extends: /dev/zero", "extends: recipe.yaml", "%YAML 9.9", "z: |\n  a\n b"),
    *("'" * 5000, "- " * 5000, "{" * 5000),
)


def of_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return of_bytes(data, rng)
    if rng.random() < 0.2:
        lines = data.decode().split("\n")
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
        return "\n".join(lines).encode()
    tree = parse(json.dumps(yaml.safe_load(data), default=str).encode())
    return dump(edit(tree, rng)).encode("utf-8", "surrogatepass")


def of_overrides(data: bytes, rng: random.Random) -> bytes:
    """Lines of KEY=VALUE."""
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].partition("=")[0]
    key = rng.choice([key, key, key, key.partition(".")[0], key + ".x", key[:-1], rng.choice(_TEXTS)])
    lines[at] = f"{key}={dump(hostile(rng))}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_JINJA = (
    *("{{ messages }}", "{{ messages[0].content * 1000 }}", "{{ '%999999999d' % 1 }}", "{{ 10 ** 10 ** 9 }}"),
    *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 10 }}"),
    *("{{ messages | tojson(indent=10 ** 9) }}", "{{ strftime_now('%Y' * 10 ** 7) }}", "{{ 'a' | center(10 ** 10) }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ raise_exception('\x1b[31mno') }}"),
    *("{% set ns = namespace(x=[]) %}{% for i in range(10 ** 8) %}{% set ns.x = ns.x + [i] %}{% endfor %}", "{% if %}"),
    *("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% include 'x' %}", "{% extends 'x' %}", "{{ none.x.y }}"),
    *("{% generation %}", "{% endgeneration %}", "{% break %}", "{{ '('*5000 }}", "{{ range(10**18) | list }}"),
    *("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ " + "-" * 3000 + "1 }}", "{% if 1 %}" * 300, "{{ 1 / 0 }}"),
    *("{{ messages | map(attribute='content') | join | upper * 3 }}", "{{ bos_token }}", "{{ undefined_name }}", "{#"),
    *("{% for m in messages %}{{ m.role }}{% endfor %}", "{{ '\\ud800' }}", "{{ 'x' | indent(10 ** 9) }}", "%}", "{{"),
    *("{{ 'ab' | wordwrap(1) }}", "{{ dict(a=1) | xmlattr }}", "{{ [1] | batch(10 ** 9, 'x') | list }}"),
    *("{{ 'x' | format(1) }}", "{{ messages | slice(10 ** 8) | list }}", "{{ 2 ** 0.5 ** -9999 }}", "{{ 9 ** 99999 }}"),
)


def of_jinja(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return of_bytes(data, rng)
    parts = data.decode().replace("%}", "%}\0").replace("}}", "}}\0").split("\0")
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(parts) + 1)
        match rng.randrange(4):
            case 0 if at < len(parts):
                del parts[at]
            case 1 if at < len(parts):
                parts.insert(rng.randrange(len(parts)), parts[at])
            case _:
                parts.insert(at, rng.choice(_JINJA))
    return "".join(parts).encode("utf-8", "surrogatepass")


FORMS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": of_bytes,
    "json": of_json,
    "lines": of_lines,
    "tokenizer": of_tokenizer,
    "adapter": of_adapter,
    "safetensors": of_safetensors,
    "gguf": of_gguf,
    "yaml": of_yaml,
    "overrides": of_overrides,
    "jinja": of_jinja,
}
