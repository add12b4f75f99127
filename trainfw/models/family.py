"""The contract of a kind of model, and the registry of those that there are. Imports no JAX: recipes load by it."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

import yaml
from pydantic import Field, SerializeAsAny
from pydantic_core import core_schema

from trainfw.config import Config, Dim, invalid
from trainfw.errors import UserError, did_you_mean, nearest, short
from trainfw.parallel import AXES, GATHERED_RULES, SPLIT_RULES
from trainfw.pieces import is_own, make_piece, running

if TYPE_CHECKING:
    from flax import nnx

    from trainfw.backends import Backend
    from trainfw.models.layer_shapes import ModelShapes

Remat: TypeAlias = Literal["none", "dots", "full", "stage"]
DEFAULT_FAMILY = "decoder"
FAMILIES = {
    "decoder": "trainfw.models.decoder.family:Decoder",
    "dit": "trainfw.models.dit.family:DiffusionTransformer",
    "autoencoder": "trainfw.models.autoencoder.family:ImageAutoencoder",
}


class FamilyConfig(Config):
    """The section `model` of a recipe, as far as every family has it."""

    family: str = DEFAULT_FAMILY
    """The kind of model: `decoder`, a decoder-only transformer; `dit`, a diffusion transformer; `autoencoder`, a
    convolutional one of images; or your own, `package.module:Name`, whose config then says which other keys there are:
    see `trainfw.models.Family`."""
    from_: str | None = Field(default=None, alias="from")
    """Start from these weights: a run directory of the same family, or a directory that diffusers reads (`dit`,
    `autoencoder`): of the model, or of a pipeline with it."""
    hidden_size: Dim
    """D: width of the residual stream."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """L: layers of the stack."""

    @property
    def layer_kinds(self) -> tuple[Any, ...]:
        """The kind of every layer, in order."""
        return ("layer",) * self.num_layers

    @property
    def layer_period(self) -> int:
        """Layers after which their kinds repeat."""
        return 1

    @property
    def longest_context(self) -> int | None:
        """Tokens of the longest context that the weights were trained for; None where there is no such limit."""
        return None

    @property
    def update_scales(self) -> Mapping[str, float] | None:
        """Factors on the optimizer's updates of parameters, by patterns of their names (muP); None: there are none."""
        return None

    @property
    def num_patches(self) -> int | None:
        """Patches of an image, which are the sequence of a model of images; None for a model of tokens."""
        return None

    @property
    def depends_on_cut(self) -> str:
        """Why the numbers depend on how a batch is cut over devices and microbatches; empty where they do not."""
        return ""


@functools.cache
def load_presets(package: str) -> dict[str, dict[str, object]]:
    """Read a package's presets.yaml: fields of its config by the preset's name, without where they come from."""
    presets = yaml.safe_load(resources.files(package).joinpath("presets.yaml").read_text())
    for fields in presets.values():
        fields.pop("source", None)
    return {name: fields for name, fields in presets.items() if not name.startswith(".")}


def preset_fields(package: str, preset: str, like: str) -> dict[str, object]:
    """Return the fields of one of a package's presets; where there is none, suggest that which is most `like`."""
    presets = load_presets(package)
    if preset not in presets:
        invalid("preset", f"unknown preset {preset!r}{did_you_mean(like, presets)}")
    return presets[preset]


class TokenFamilyConfig(FamilyConfig):
    """The section `model` of a model of tokens, as far as every such family has it."""

    vocab_size: Dim
    """Rows of the embedding table."""


Conditioning: TypeAlias = Literal["none", "class", "cross", "joint"]


class ImageFamilyConfig(FamilyConfig):
    """The section `model` of a model of images, as far as every such family has it."""

    image_size: Dim
    """Height and width of an image: pixels, or latents of an autoencoder."""
    channels: Dim
    """C: channels of an image."""


class DenoisingFamilyConfig(ImageFamilyConfig):
    """The section `model` of a model that takes noise out of images (`DenoisingModel`), as far as every such family has
    it."""

    conditioning: Conditioning = "none"
    """Condition of an image beside the time: none; its `class`; or a caption, which patches read by `cross` attention
    (PixArt) or which is a stream of the layers' own, `joint` with the patches (SD3)."""
    num_classes: Dim | None = None
    """Classes, with `class`. The table has one row more, for images whose class is left out."""
    caption_size: Dim | None = None
    """F: features of a caption's token, with `cross` and `joint`: hidden_size of the text encoder."""
    caption_length: Dim | None = None
    """T: tokens of a caption, with `cross` and `joint`: longer ones are cut, shorter ones padded."""
    autoencoder: str | None = None
    """Path of the autoencoder whose latents the images are: a diffusers directory, or a run of family `autoencoder`.
    Pictures are encoded once, into the data cache. Null: images are the pictures themselves."""
    text_encoder: str | None = None
    """Path of the decoder whose hidden states are the captions' features; or `hashed-words`, a fixed vector for each
    word, which needs no model and knows no meanings."""
    text_encoder_layers: Dim | None = None
    """Layers of the text encoder that are run, from the first; by default all. States in the middle often say more
    about a text than the last ones, which are about the token to come."""


@dataclass(frozen=True)
class ModelOptions:
    """Options of how a model is computed: they change time, memory and rounding, not the function.

    Args:
        compute_dtype: dtype of activations, and of weights where they are used. Norms, rotary embeddings, softmax
            and logits are f32 whatever it is.
        matmul_dtype: "fp8": the layers' linear maps multiply in 8 bits (`fp8_matmul`).
        remat: what the backward pass recomputes: "none" saves all but what was gathered, "full" saves each layer's
            input only, "dots" saves what the layers' projections return as well, "stage" a pipeline stage's input only.
        scan_layers: compile one layer (one period of kinds) and loop over it, rather than all layers in a row.
        prefetch: gather the next layer's weights while one computes (with remat "full" or "stage"; scanned, where
            all layers are of one kind).
        ring: see `ParallelConfig.context_attention`.
        microbatch_rows, interleave: of a pipeline's microbatches, and chunks of layers in a stage (`pipelined`).
    """

    compute_dtype: str = "float32"
    matmul_dtype: Literal["fp8"] | None = None
    remat: Remat = "none"
    scan_layers: bool = True
    prefetch: bool = False
    ring: bool = True
    microbatch_rows: int = 1
    interleave: int = 1


@dataclass(frozen=True)
class Limit:
    """A size of a model that is divided over the mesh axes that split a dim."""

    field: str
    """A field of the family's config; `moe.num_experts` of a section in it."""
    size: int
    """The number that is to divide, `field` or a multiple of it."""
    dim: str
    """A name of the rules table (`SPLIT_RULES`, `GATHERED_RULES`), or one of the family's own."""
    shared: bool = False
    """Fewer than the devices will do, where each is shared by as many."""
    pads: bool = False
    """A larger size costs nothing but rows that are not used."""


class Family(Protocol):
    """A kind of model: its config, its Flax module, and what is known of it without running it.

    Derive from it. `trainfw.models.LanguageModel` runs a stack of layers in every layout; what a family says here
    decides in which layouts its models may be.
    """

    config: ClassVar[type[FamilyConfig]]
    """Class that validates the section `model`."""
    decodes: ClassVar[bool] = False
    """True where its models are `Transformer`s, or decode as they do: text can be drawn from them."""
    reads: ClassVar[Literal["tokens", "images"]] = "tokens"
    """Input of its models: tokens (`TokenModel`, with `vocab_size` in the config) or images (`DenoisingModel`)."""

    def build(self, config: Any, options: ModelOptions, rngs: nnx.Rngs) -> nnx.Module:
        """Return the model, a `TokenModel` or a `DenoisingModel`; its stacked layers, and nothing else, are under the
        name `layers`."""

    def limits(self, config: Any) -> Iterator[Limit]:
        """List what of the model is divided over mesh axes; layers over `pipeline` are no part of it."""

    def flops_per_token(self, config: Any, sequence_length: int) -> float:
        """Count the FLOPs of training, forward and backward, on one token of sequences of that length.

        Of a model of images a token is a patch, and the sequence an image.
        """

    def tiny(self, config: Any, *, layers: int, tensor: int) -> dict[str, Any]:
        """Return fields that make the model small, for `trainfw train --tiny`.

        `layers` is a number of layers that divides over stages and chunks; `tensor` is the size of that axis before.
        """

    def dims(self, config: Any) -> Mapping[str, tuple[str, ...]]:
        """Declare dim names of the family's own: the mesh axes along which weights are kept split, and gathered."""
        return {}

    def unspread(self, config: Any) -> Mapping[str, str]:
        """Return the mesh axes over which the model must not be spread, each with the reason.

        Those that a layer has to know of, unless a family says that its layers do.
        """
        return dict.fromkeys(("expert", "context", "tensor"), f"the layers of {config.family} do not take part in it")

    def backend_problems(self, config: Any, backend: Backend) -> Iterator[tuple[str, str]]:
        """List what of the model the backend cannot compute: (field, why)."""
        yield from ()

    def shapes(self, config: Any) -> ModelShapes | None:
        """Return what `trainfw plan --search` estimates a step by; None: it is refused for the family."""
        return None


_PARTS = (
    "config", "decodes", "reads", "build", "limits", "flops_per_token", "tiny", "dims", "unspread", "backend_problems",
    "shapes",
)  # fmt: skip


@functools.cache
def load_family(name: str) -> Family:
    """Return the family of this name, or `package.module:Name`. Raises UserError where there is none."""
    if name not in FAMILIES and not is_own(name):
        near, known = nearest(name, FAMILIES), ", ".join(FAMILIES)
        meant = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"family = {name!r}: unknown family; expected {known}, or package.module:Name{meant}")
    path, expected = FAMILIES.get(name, name), "trainfw.models.Family"
    family: Family = make_piece(path, {}, key="family", methods=_PARTS, expected=expected)
    if not (isinstance(family.config, type) and issubclass(family.config, FamilyConfig)):
        raise UserError(f"family = {name!r}: its config is no class that extends trainfw.models.FamilyConfig")
    if family.reads == "tokens" and "vocab_size" not in family.config.model_fields:
        raise UserError(
            f"family = {name!r}: its config has no vocab_size, which a model of tokens needs: extend "
            "trainfw.models.TokenFamilyConfig"
        )
    if family.reads == "images" and not issubclass(family.config, ImageFamilyConfig):
        raise UserError(f"family = {name!r}: reads images; its config is to extend trainfw.models.ImageFamilyConfig")
    return family


def family_of(config: FamilyConfig) -> Family:
    return load_family(config.family)


def flops_per_token(config: FamilyConfig, sequence_length: int) -> float:
    """Count the FLOPs of training a model, forward and backward, on one token of sequences of that length.

    Raises UserError, as the next two, where what its family says is none.
    """
    with running("model.family", config.family, "flops_per_token"):
        count = float(family_of(config).flops_per_token(config, sequence_length))
    if not 0 < count < math.inf:
        raise _wrong(config, "flops_per_token", count, "a number above zero")
    return count


def image_config(config: FamilyConfig) -> ImageFamilyConfig:
    assert isinstance(config, ImageFamilyConfig)  # `load_family` has seen to it
    return config


def conditioning_of(config: FamilyConfig) -> Conditioning:
    """Return the condition that a model of images is given."""
    return config.conditioning if isinstance(config, DenoisingFamilyConfig) else "none"


def vocabulary_of(config: FamilyConfig) -> int:
    """Return the rows of a model's embedding table; 0 for a model of images."""
    return int(getattr(config, "vocab_size", 0))


def limits_of(config: FamilyConfig) -> list[Limit]:
    """List what of a model is divided over mesh axes."""
    dims = SPLIT_RULES | GATHERED_RULES | dims_of(config)
    with running("model.family", config.family, "limits"):
        limits = list(family_of(config).limits(config))
        for limit in limits:
            operator.attrgetter(limit.field)(config)
            if limit.dim not in dims:
                raise _wrong(config, "limits", limit, f"a dim of the rules{did_you_mean(str(limit.dim), dims)}")
            if not (isinstance(limit.size, int) and limit.size > 0):
                raise _wrong(config, "limits", limit, "a size above zero")
    return limits


def dims_of(config: FamilyConfig) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes of dim names that a family declares."""
    with running("model.family", config.family, "dims"):
        return {name: tuple(axes) for name, axes in family_of(config).dims(config).items()}


def unspread_of(config: FamilyConfig) -> Mapping[str, str]:
    """Return the mesh axes over which a model must not be spread, each with the reason."""
    with running("model.family", config.family, "unspread"):
        unspread = dict(family_of(config).unspread(config))
    if unknown := [axis for axis in unspread if axis not in AXES]:
        raise _wrong(config, "unspread", unspread, f"mesh axes{did_you_mean(str(unknown[0]), AXES)}")
    return unspread


def _wrong(config: FamilyConfig, part: str, value: object, expected: str) -> UserError:
    return UserError(f"model.family = {config.family!r}: its {part} says {short(value)}; expected {expected}")


class _ByFamily:
    """Has a section validated by the config of the family that it names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        # The default's own schema is what JSON Schema shows.
        default = handler.generate_schema(load_family(DEFAULT_FAMILY).config)
        return core_schema.no_info_wrap_validator_function(_validated, default)


def _validated(section: Any, default: Any) -> Any:
    name = section.get("family") if isinstance(section, dict) else getattr(section, "family", None)
    if not isinstance(name, str) or name == DEFAULT_FAMILY:
        return default(section)
    try:
        family = load_family(name)
    except UserError as error:
        invalid("family", str(error).removeprefix("family = "))
    return family.config.model_validate(section)


ModelSection: TypeAlias = Annotated[FamilyConfig, _ByFamily(), SerializeAsAny()]
