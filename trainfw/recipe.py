"""The typed recipe: YAML -> `Recipe`, composed of each package's own `Config`."""

from __future__ import annotations

import contextlib
import functools
import keyword
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from trainfw import yaml_text
from trainfw.adapters import AdapterConfig
from trainfw.backends import BackendConfig, load_sdk
from trainfw.checkpoint import CheckpointConfig, saved_recipe
from trainfw.config import Config, invalid, name_problem
from trainfw.data import DataConfig
from trainfw.errors import UserError, did_you_mean, nearest
from trainfw.hardware import HardwareConfig
from trainfw.interop import read_model_config
from trainfw.models import ModelConfig
from trainfw.names import FIRST, KEYS, SECTIONS, VALUES
from trainfw.objectives import ObjectiveConfig
from trainfw.optim import OptimizerConfig
from trainfw.parallel import ParallelConfig
from trainfw.paths import check_file, path_text, resolve_path
from trainfw.training import EvaluationConfig, FaultsConfig, TrainConfig, WatchdogConfig

Sources = dict[str, str]
"""Where each dotted key was written: `file:line`, or `command line`."""

_COMMAND_LINE = "command line"
_WHOLE_MODEL = ("model.preset=", "model.from=")
"""Keys that say what all of the model is."""
_FREE_TEXT = ("data.system_prompt", "train.sample_prompt")
_MOST_EXTENDED = 32
"""Recipes in a chain of `extends`."""
_MOST_PROBLEMS = 20
"""Told at once; to find the nearest key takes a while."""


class Recipe(Config):
    """A whole training run. See `trainfw recipe schema` for every key."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    """Names the run, and its directory under runs/."""
    model: ModelConfig
    adapter: AdapterConfig | None = None
    """Train an adapter of the model, whose own weights are frozen. Null trains all of them."""
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig | None = None
    """What the model makes of held-out prompts, by a metric of the task; null: only its loss is computed."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    backend: BackendConfig = Field(default_factory=BackendConfig)

    _sources: Sources = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _sdk_is_known(self) -> Recipe:
        try:
            load_sdk(self.hardware.sdk)
        except UserError as error:
            invalid("hardware.sdk", str(error).removeprefix("sdk = "))
        return self

    @model_validator(mode="after")
    def _objective_reads_the_data(self) -> Recipe:
        name, pairs = self.objective.name, self.data.format == "preferences"
        if self.objective.reads_pairs and not pairs:
            invalid("objective.name", f"{name} learns from pairs: set data.format: preferences, not {self.data.format}")
        if pairs and name == "next_token":
            invalid("objective.name", "next_token learns no pairs: set it to dpo, ipo, simpo or orpo")
        return self

    @property
    def group(self) -> int:
        """Rows of tokens in each of train.global_batch_size: two of a pair."""
        return 2 if self.data.format == "preferences" else 1

    @property
    def tokens_per_step(self) -> int:
        """Places for a token in a global batch."""
        return self.train.global_batch_size * self.group * self.data.sequence_length

    def __eq__(self, other: object) -> bool:
        # Where a key was written is not part of what it says.
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def written(self, key: str) -> str:
        """Where `key` itself was written, `file:line` or `command line`; empty for a default."""
        return self._sources.get(key, "")

    def error(self, key: str, problem: str) -> UserError:
        """A UserError that says where `key` (dotted) was written, its value, and the problem."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, f"{part}_" if keyword.iskeyword(part) else part)
        return UserError(f"{_where(key, self._sources, problem)}{key} = {_show(value)}: {problem}")

    @contextlib.contextmanager
    def blamed(self, key: str) -> Iterator[None]:
        """A UserError inside is about `key`: say so, and where it was written.

        Of a section, about the field that the message begins with, or that the error names (`errors.about`).
        """
        try:
            yield
        except UserError as error:
            text = str(error)
            first = re.match(r"[a-z_0-9.]+(?= =|:| ')", text)
            named = f"{key}.{first[0].removeprefix(f'{key}.')}" if first else ""
            if first and named in keys():
                key, text = named, text[first.end() :]
            else:
                key, text = f"{key}.{error.field}" if error.field else key, f": {text}"
            raise UserError(f"{_where(key, self._sources, text)}{key}{text}") from error

    def to_yaml(self) -> str:
        """The resolved recipe, every key written out; loads back to the same recipe."""
        return yaml_text.dump(self.model_dump())

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (value here, value in `other`), where they differ."""
        mine, theirs = dict(_leaves(self.model_dump())), dict(_leaves(other.model_dump()))
        return {key: (mine.get(key), theirs.get(key)) for key in [*mine, *theirs] if mine.get(key) != theirs.get(key)}


def load_recipe(path: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe file (or a bundled recipe by name, or a file's keys as a dict), what it extends, and overrides.

    Raises UserError naming file, line, key, value, what was expected and the nearest valid key.
    """
    if isinstance(overrides, str | Mapping) or not all(isinstance(text, str) for text in overrides):
        raise UserError(f"overrides = {_show(overrides)}: expected a list of key=value, such as ['train.steps=50']")
    if isinstance(path, Mapping):
        given, path = dict(path), "recipe"
        tree, sources = _extended(given, {key: path for key, _ in _leaves(given)}, Path(), ())
    elif isinstance(path, str | os.PathLike):
        file = find_recipe(path)
        saved = saved_recipe(file)
        tree, sources = _read(file, ()) if saved is None else (saved, {})
    else:
        raise UserError(f"recipe = {_show(path)}: expected the path of a file, a bundled recipe's name, or a dict")
    # The preset or the weights first: they replace the inherited model, which other overrides then refine.
    for override in sorted(overrides, key=lambda text: not text.startswith(_WHOLE_MODEL)):
        key, found, text = override.partition("=")
        if not found or not all(key.split(".")):
            raise UserError(f"{_COMMAND_LINE}: {override!r}: expected key=value, such as train.steps=50")
        if len(key) > yaml_text.MOST_KEY or key.count(".") >= yaml_text.MOST_DEPTH:
            raise UserError(f"{_COMMAND_LINE}: {_show(key)}: is too long for a key")
        value = yaml_text.load(text, f"{_COMMAND_LINE}: {key}", lines=False)
        if f"{key}=" in _WHOLE_MODEL:
            tree = _without_tokenizer_of_model(tree)
            tree = tree | {"model": {}}
            sources = _without_model(sources) | {"model": _COMMAND_LINE}  # what the preset says, too
        tree = _set(tree, key.split("."), value)
        sources = {k: v for k, v in sources.items() if not k.startswith(f"{key}.")} | {key: _COMMAND_LINE}
        _check_sections(tree, sources)
    return _validate(tree, sources, str(path))


def expect_recipe(given: Any) -> Recipe:
    """What Python code handed over as a recipe. Raises UserError, with the call that makes one, where it is none."""
    if isinstance(given, Recipe):
        return given
    path = _show(given) if isinstance(given, str | os.PathLike | Mapping) else "'quickstart'"
    raise UserError(f"recipe = {_show(given)}: expected a trainfw.Recipe, such as trainfw.load_recipe({path}) returns")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file. Nothing is required, since a file may extend another."""
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"] = {
        "extends": {
            "type": "string",
            "description": "Another recipe that this one refines: a file, relative to this one, or a bundled recipe.",
        },
        **schema["properties"],
    }
    return schema


def recipe_directory() -> Path:
    """Where the bundled recipes are: inside the installed package, or at the top of the repository."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def bundled_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipe_directory().glob("*.yaml"))}


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """`path` itself, a bundled recipe of that name, or the recipe of a run directory."""
    if not str(path):
        raise UserError("recipe: the path is empty")
    file, bundled = Path(path), bundled_recipes()
    if (file / "recipe.yaml").is_file():
        return file / "recipe.yaml"
    if file.is_file():
        return file
    if str(path) in bundled:
        return bundled[str(path)]
    if file.is_dir():
        raise UserError(f"{path}: is a directory without a recipe.yaml")
    if file.exists():
        check_file(file)  # says what it is
    beside = [str(p) for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
    raise UserError(f"{path}: no such recipe{did_you_mean(str(path), [*beside, *bundled])}")


def refuse_recipe(path: str | os.PathLike[str]) -> None:
    """Raise UserError for a recipe, or the name of a run under runs/, where a run or a model is expected."""
    text = path_text(path)
    if Path(text, "recipe.yaml").is_file() or (Path(text).exists() and not text.endswith((".yaml", ".yml"))):
        return
    run = Path("runs", text)
    if (run / "recipe.yaml").is_file():
        raise UserError(f"{path}: no such file or directory; did you mean {str(run)!r}?")
    if text not in bundled_recipes() and not Path(text).is_file():
        return
    run = Path("runs", load_recipe(text).name)
    trained = (run / "recipe.yaml").is_file()
    then = f"did you mean {str(run)!r}?" if trained else f"it has not been trained here: trainfw train {text}"
    raise UserError(f"{path}: is a recipe, where a run or a model is expected; {then}")


# --- Reading -------------------------------------------------------------------------------------


def _read(file: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], Sources]:
    """A file's keys merged over those it extends, and where each was written."""
    chain = (*chain, file.resolve())
    if len(chain) > _MOST_EXTENDED:
        raise UserError(f"{file}: is extended by {len(chain) - 1} recipes, one by the other; {_MOST_EXTENDED} at most")
    node = yaml_text.compose(yaml_text.read_text(file), file)
    if node is None:
        raise UserError(f"{file}: is empty; expected keys such as model: {{preset: tiny}}")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}:{node.start_mark.line + 1}: expected `key: value` lines at the top level")
    sources: Sources = {}
    tree = _construct(node, "", file, sources)
    _check_sections(tree, sources)
    return _extended(tree, sources, file.parent, chain)


def _extended(
    tree: dict[str, Any], sources: Sources, directory: Path, chain: tuple[Path, ...]
) -> tuple[dict[str, Any], Sources]:
    """Keys merged over those they extend, and where each was written."""
    if "extends" not in tree:
        return tree, sources
    base = tree.pop("extends")
    where = sources.pop("extends", "recipe")
    if not isinstance(base, str):
        raise UserError(f"{where}: extends = {_show(base)}: expected the path of another recipe")
    base_file, bundled = directory / base, bundled_recipes()
    if not base_file.is_file():
        base_file = bundled.get(base.removesuffix(".yaml"), base_file)
    if not base_file.is_file():
        if base_file.exists():
            raise UserError(f"{where}: extends = {base!r}: is not a regular file")
        beside = [p.name for p in directory.glob("*.yaml")]
        raise UserError(f"{where}: extends = {base!r}: no such file{did_you_mean(base, [*beside, *bundled])}")
    if base_file.resolve() in chain:
        cycle = " -> ".join(p.name for p in (*chain[chain.index(base_file.resolve()) :], base_file))
        raise UserError(f"{where}: extends = {base!r}: the chain comes back to itself: {cycle}")
    base_tree, base_sources = _read(base_file, chain)
    if _names_model(tree.get("model")):
        base_sources = _without_model(base_sources)
    return _merge(base_tree, tree), base_sources | sources


def _construct(node: yaml.MappingNode, prefix: str, file: Path, sources: Sources) -> dict[str, Any]:
    """A mapping's values, recording the line of every key and refusing a key written twice."""
    values: dict[str, Any] = {}
    loader = yaml_text.Loader("")
    for key_node, value_node in node.value:
        line = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{line}: expected a plain key")
        name = key_node.value
        if len(name) > yaml_text.MOST_KEY:
            raise UserError(f"{line}: a key of {len(name):,} characters; {yaml_text.MOST_KEY:,} at most")
        dotted = f"{prefix}{name}"
        if name in values:
            raise UserError(f"{line}: {dotted}: is written twice (first at {sources[dotted]})")
        sources[dotted] = line
        try:
            if isinstance(value_node, yaml.MappingNode):
                values[name] = _construct(value_node, f"{dotted}.", file, sources)
            else:
                values[name] = loader.construct_object(value_node, deep=True)
        except yaml_text.MALFORMED as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{line}: {dotted}: {yaml_text.problem_of(error)}") from None
    return values


def _check_sections(tree: dict[str, Any], sources: Sources) -> None:
    """Refuse a value in a section's place, which another file or override would replace without a word."""
    for section in {key.rpartition(".")[0] for key in keys()} - {""}:
        *outer, last = section.split(".")
        parent: Any = tree
        for part in outer:
            parent = parent.get(part) if isinstance(parent, dict) else None
        value = parent.get(last) if isinstance(parent, dict) else None
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{_where(section, sources)}{section} = {_show(value)}: {_section_of(last, value)}")


def _section_of(section: str, value: Any) -> str:
    """Say what is expected where `value` was given."""
    inside = f"{FIRST[section]}: {value:.60}" if isinstance(value, str) and section in FIRST else "key: value"
    return f"expected a section, `{section}: {{{inside}}}`"


def _without_tokenizer_of_model(tree: dict[str, Any]) -> dict[str, Any]:
    """Without the tokenizer that came with `model.from`, since another model comes with its own."""
    model, data = tree.get("model"), tree.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict) or model.get("from") is None:
        return tree
    tokenizer = data.get("tokenizer")
    if not isinstance(tokenizer, dict) or tokenizer.get("path") != model["from"]:
        return tree
    return {**tree, "data": {key: value for key, value in data.items() if key != "tokenizer"}}


def _names_model(model: Any) -> bool:
    return isinstance(model, dict) and bool({"preset", "from"} & set(model))


def _without_model(sources: Sources) -> Sources:
    return {key: where for key, where in sources.items() if not key.startswith("model.")}


def _set(tree: Any, path: list[str], value: Any) -> dict[str, Any]:
    """`tree` with the value at `path` replaced, whatever was there."""
    first, *rest = path
    tree = tree if isinstance(tree, dict) else {}
    return {**tree, first: _set(tree.get(first), rest, value) if rest else value}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and not (key == "model" and _names_model(value)):
            merged[key] = _merge(base[key], value)
        else:
            merged[key] = value
    return merged


# --- Validating ----------------------------------------------------------------------------------


def _validate(tree: dict[str, Any], sources: Sources, file: str) -> Recipe:
    for key, value in _leaves(tree):
        for text in _texts(value):
            if problem := _text_problem(key, text):
                raise UserError(f"{_where(key, sources)}{_show(key)[1:-1]} = {_show(text)}: {problem}")
    tree = _from_adapter(_from_weights(tree, sources), sources)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        if any(e["loc"] == ("model", "preset") for e in errors):  # then what it should have filled in is not missing
            errors = [e for e in errors if not (e["loc"][0] == "model" and e["type"] == "missing")]
        problems = list(dict.fromkeys(_describe(e, sources, file) for e in errors[:_MOST_PROBLEMS]))
        if len(errors) > _MOST_PROBLEMS:
            problems.append(f"and {len(errors) - _MOST_PROBLEMS:,} more")
        raise UserError("\n".join(problems)) from None
    recipe._sources.update(sources)
    return recipe


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value:
            yield from _texts(each)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))


def _text_problem(key: str, text: str) -> str | None:
    """Say why a text of `key` cannot be meant; None where it can. All but free text is a name, a pattern or a path."""
    if "\0" in text:
        return "holds a NUL character"
    if key not in _FREE_TEXT:
        return name_problem(text) or name_problem(key)
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not Unicode: it holds half a character"
    return None


def _from_weights(tree: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """The fields of the model and the tokenizer that `model.from` stands for, where they are not written out."""
    model, data = tree.get("model"), tree.get("data")
    source = model.get("from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(source, str):
        return tree
    if model.get("preset") is not None:
        raise UserError(f"{_where('model.from', sources)}model.from = {source!r}: says all that model.preset says")
    required = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
    if not required <= set(model):
        try:
            fields = _fields_of(source)
        except UserError as error:
            raise UserError(f"{_where('model.from', sources)}model.from: {error}") from error
        # Dispatch and the like are not the weights': field by field.
        tree = {**tree, "model": _merge(fields, model)}
    if isinstance(data, dict) and "tokenizer" not in data:
        tree = {**tree, "data": {**data, "tokenizer": {"name": "file", "path": source}}}
    return tree


def _from_adapter(tree: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """The fields that `adapter.from` stands for, where none of an adapter's shape is written out."""
    adapter = tree.get("adapter")
    source = adapter.get("from") if isinstance(adapter, dict) else None
    if not isinstance(adapter, dict) or not isinstance(source, str) or {"rank", "targets"} & set(adapter):
        return tree
    try:
        return {**tree, "adapter": {**_adapter_of(source), **adapter}}
    except UserError as error:
        raise UserError(f"{_where('adapter.from', sources)}adapter.from: {error}") from error


def _fields_of(source: str) -> dict[str, Any]:
    """The fields of the model at a path: a run's, or those of weights."""
    refuse_recipe(source)
    run = resolve_path(source) / "recipe.yaml"
    config = load_recipe(run).model if run.is_file() else read_model_config(source)
    return config.model_dump(exclude={"preset", "from_"}, exclude_defaults=True)


def _adapter_of(source: str) -> dict[str, Any]:
    """The fields of the adapter at a path: a run's, or one in PEFT's form."""
    refuse_recipe(source)
    if not resolve_path(source).exists():
        raise UserError(f"{source}: no such directory; expected a run of an adapter, or one in PEFT's form")
    run = resolve_path(source) / "recipe.yaml"
    if not run.is_file():
        from trainfw.interop import peft_fields  # with NumPy and JAX, which other recipes do without

        return peft_fields(run.parent)
    config = load_recipe(run).adapter
    if config is None:
        raise UserError(f"{source}: is a run that trained all weights, not an adapter")
    return config.model_dump(exclude={"from_"}, exclude_defaults=True)


def _describe(error: Any, sources: Sources, file: str) -> str:
    kind, value = error["type"], error["input"]
    path = [str(part) for part in error["loc"]]
    if kind == "combination" and error["ctx"]["field"]:
        path.append(error["ctx"]["field"])
    # A field that takes several types is followed by their names.
    if kind != "extra_forbidden":
        path = [part for part in path if not re.fullmatch(r"str|bool|float|list\[str\]|literal\[.*\]", part)]
    elif "." not in path[-1]:
        while isinstance(value, dict) and len(value) == 1:  # of an unknown section, the key in it
            (name, value), *_ = value.items()
            path.append(str(name))
    key = ".".join(path)
    where = _where(key, sources, error["msg"] if kind == "combination" else "") or f"{file}: "
    match kind:
        case "extra_forbidden" if "." in path[-1]:
            section, _, rest = path[-1].partition(".")
            return f"{where}{key}: unknown key; in a file, write it as a section, {section}: {{{rest}: ...}}"
        case "extra_forbidden":
            return f"{where}{key} = {_show(value)}: unknown key{nearest_key(key)}"
        case "missing":
            return f"{where}{key}: is required{nearest_key(key) if not key else ''}"
        case "combination":
            return f"{where}{key}: {error['msg']}"
        case "literal_error":
            choices = [part.strip("' ") for part in re.split(r", | or ", error["ctx"]["expected"])]
            if type(None) in get_args(keys().get(key)):
                choices.append("null")
            return f"{where}{key} = {_show(value)}: expected one of {', '.join(choices)}{_nearest(value, choices)}"
        case "string_pattern_mismatch" if key in _IN_WORDS:
            return f"{where}{key} = {_show(value)}: expected {_IN_WORDS[key]}"
        case "model_type" | "model_attributes_type":
            return f"{where}{key} = {_show(value)}: {_section_of(path[-1] if path else file, value)}"
        case _:
            expected = re.sub(r"^(Input should be|Value should|String should( have)?) ", "", error["msg"])
            hint = _meant(kind, value)
            return f"{where}{key} = {_show(value)}: expected {expected[:1].lower()}{expected[1:]}{hint}"


_IN_WORDS = {
    "name": "letters, digits, '.', '_' and '-', with a letter or a digit first",
    "data.date": "a day, YYYY-MM-DD",
}
"""What the patterns of keys ask for."""


def _where(key: str, sources: Sources, problem: str = "") -> str:
    """`file:line: ` of the key, or of the nearest section it is in, or of what is in it.

    What the command line says is blamed before what a file does: the key itself, what is in it, or a key that the
    problem names.
    """
    inside = [name for name in sources if name.startswith(f"{key}.")]
    written = key
    while written and written not in sources:
        written = written.rpartition(".")[0]
    found = sources[written] if written else sources[inside[0]] if inside else ""
    if found != _COMMAND_LINE:
        given = [name for name, source in sources.items() if source == _COMMAND_LINE and name != "model"]
        named = next((name for name in given if name in inside or _names(problem, name, key)), None)
        found = found if named is None else f"{_COMMAND_LINE} ({named})"
    return f"{found}: " if found else ""


def _names(problem: str, name: str, key: str) -> bool:
    """Whether a problem with `key` is said to be one with the key `name` too, or with the section it is in.

    Within one section, by its last part alone.
    """
    section, _, last = name.rpartition(".")
    said = {name, section if "." in section else name, last if section and key.startswith(f"{section}.") else name}
    return re.search(rf"(?<![\w.])(?:{'|'.join(map(re.escape, said))})(?!\w|\.\w)", problem) is not None


def _meant(kind: str, value: Any) -> str:
    """What a value of the wrong type was meant to be, where it can be read."""
    text = str(value).strip().lower()
    if kind.startswith("bool"):
        words = {"true": ("true", "yes", "on", "1", "y"), "false": ("false", "no", "off", "0", "n")}
        return next((f"; did you mean {word}?" for word, same in words.items() if text in same), "")
    found = re.fullmatch(r"([-+]?\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d+)?) ?([kmb]?)", text)
    if not kind.startswith(("int", "float")) or isinstance(value, bool) or found is None:
        return ""
    number = float(re.sub("[_,]", "", found[1])) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]]
    if kind.startswith("float"):
        return f"; did you mean {number:g}?"
    return f"; did you mean {number:.0f}?" if number.is_integer() else ""


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def keys() -> dict[str, Any]:
    """Every valid dotted key, and its type."""
    return dict(_keys(Recipe))


def _keys(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for attribute, field in config.model_fields.items():
        name = field.alias or attribute
        yield f"{prefix}{name}", field.annotation
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and get_origin(field.annotation) is not dict:
                yield from _keys(kind, f"{prefix}{name}.")


def our_key(key: str) -> str | None:
    """The key that says what `key` does elsewhere: in another section, or in another trainer. May add what to know."""
    section, _, last = key.rpartition(".")
    name = last.lower().replace("-", "_")
    same = [valid for valid in keys() if valid.rpartition(".")[2] == name]
    return (
        KEYS.get(f"{section}.{name}")
        or next((valid for valid in same if section and valid == f"{_our_section(section)}.{name}"), None)
        or KEYS.get(name)
        or (None if section else SECTIONS.get(name))
        or next(iter(same), None)
    )


def nearest_key(key: str) -> str:
    """`"; did you mean 'x'?"` for a key that is none: the one that says it here, or the nearest by its letters."""
    section, _, last = key.rpartition(".")
    ours = _our_section(section)
    siblings = {valid.rpartition(".")[2]: valid for valid in keys() if valid.rpartition(".")[0] == ours}
    anywhere = {valid.rpartition(".")[2]: valid for valid in reversed(keys())} | KEYS
    # Of another section, a key has to be nearly the same.
    near = nearest(last, siblings, likeness=0.75 if section and not ours else 0.6) or ""
    far = nearest(last, anywhere, likeness=0.75) or ""
    known = our_key(key) or siblings.get(near) or anywhere.get(far)
    if known is None:
        return did_you_mean(last, siblings) if ours or not section else ""
    found, _, note = known.partition(" ")
    return f"; did you mean {found!r}?{f' {note}' if note else ''}"


def _our_section(section: str) -> str:
    """The section that `section` is, or is like."""
    sections = {valid.rpartition(".")[0] for valid in keys()}
    section = SECTIONS.get(section, section)
    return section if section in sections else nearest(section, sections - {""}) or ""


def _nearest(value: Any, choices: Sequence[str]) -> str:
    known = VALUES.get(str(value).lower())
    if known in choices:
        return f"; did you mean {known!r}?"
    near = did_you_mean(str(value), choices)
    return near if "mean" in near else ""
