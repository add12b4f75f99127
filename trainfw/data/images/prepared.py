"""Cache of pictures: they are decoded once, and again only when something has changed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from trainfw.data.cache import OneSource
from trainfw.data.cache_directory import CacheDirectory, Meta, fingerprint_of, is_held_out, write_meta
from trainfw.data.config import DataConfig
from trainfw.data.examples import Refusals, Refused
from trainfw.data.images.captions import CaptionEncoder, encode_captions
from trainfw.data.images.decoding import decode_all
from trainfw.data.images.latents import ImageEncoder, encode_images
from trainfw.data.images.sources import PictureSource, open_pictures
from trainfw.data.images.store import ImageInfo, ImageStore, ImageWriter
from trainfw.data.messages import Unusable, check_text
from trainfw.data.progress import Progress, reported
from trainfw.data.readers import Unreadable
from trainfw.data.sources import Row
from trainfw.errors import UserError, about, expect
from trainfw.json_text import read_json
from trainfw.unfinished import write_text

FORMAT_VERSION = 1
LONGEST_NAME = 200
"""Most characters of a class's name."""
CONDITIONS_FILE = "conditions.json"

Condition = Literal["label", "caption"]


@dataclass(frozen=True)
class PreparedImages(OneSource):
    """Both splits, decoded, and the names of their classes."""

    train: ImageStore
    validation: ImageStore
    classes: tuple[str, ...]
    """Names of the classes in the order of their numbers; empty where there are none."""
    fingerprint: str
    """Hash of the inputs and of every option that shapes the pictures."""
    refused: tuple[Refused, ...] = ()
    """Pictures that could not be used, and why."""
    remarks: tuple[str, ...] = ()
    """Further lines about the pictures."""
    skipped: str = ""
    """Files of the source that were not read, by kind; empty if there are none."""
    damage: str = ""
    """Damage for which a cache was made again; empty if there was none."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Identities of what made latents (`autoencoder`) and the captions' features (`text_encoder`), where there are any.
    """
    cut: int = 0
    """Captions that were cut short."""

    def notes(self) -> list[str]:
        """Describe the data in lines: files that were not read, numbers of pictures, refused ones."""
        damage = f"warning: the cache of pictures was damaged, and was made again: {self.damage}" if self.damage else ""
        refused = sum(one.count for one in self.refused)
        height, width, channels = self.train.shape
        kind = f"{height} x {width}, {'grey' if channels == 1 else 'in colour'}"
        classes = f", of {len(self.classes)} classes" if self.classes else ""
        captions = ", with captions" if self.train.text is not None else ""
        counts = (
            f"{len(self.train):,} pictures to train on, {len(self.validation):,} held out ({kind}{classes}{captions})"
        )
        counts += f"; {refused:,} refused:" if refused else ""
        cut = f"{self.cut:,} captions cut at the encoder's length" if self.cut else ""
        lines = [damage, self.skipped, counts, *(f"  {one}" for one in self.refused), *self.remarks, cut]
        return [line for line in lines if line]

    def facts(self) -> dict[str, str]:
        """Name what all processes of a run must have alike."""
        return {
            "digest of the training data": self.train.digest,
            "digest of the held-out data": self.validation.digest,
            "encoders of pictures and captions": " ".join(self.encoders.values()),
        }

    def save(self, directory: Path) -> None:
        """Write the classes' names and the encoders' identities, where there are any, into a run's directory."""
        kept = {"classes": self.classes, "encoders": dict(self.encoders)}
        if any(kept.values()):
            write_text(directory / CONDITIONS_FILE, json.dumps(kept, indent=2, ensure_ascii=False))


def read_conditions(directory: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the names of the classes, and the identities of the encoders, that `save` wrote; none where it wrote none.

    Raises UserError where the file is something else.
    """
    file = directory / CONDITIONS_FILE
    if not file.exists():
        return (), {}
    kept = read_json(file)
    names, encoders = kept.get("classes"), kept.get("encoders")
    if isinstance(names, list) and isinstance(encoders, dict):
        classes = tuple(name for name in names if isinstance(name, str))
        identities = {key: value for key, value in encoders.items() if isinstance(value, str)}
        if (len(classes), len(identities)) == (len(names), len(encoders)):
            return classes, identities
    raise UserError(f"{file}: expected the names of classes and the encoders of a run of images")


def prepare_images(
    config: DataConfig,
    *,
    size: int,
    channels: int,
    condition: Condition | None = None,
    encoder: CaptionEncoder | None = None,
    autoencoder: ImageEncoder | None = None,
    progress: Progress | None = None,
) -> PreparedImages:
    """Return both splits of the pictures that `config` names, from the cache unless something has changed.

    Pictures are scaled to `size` on their shorter side and cut to the middle square. Any number of processes may call
    this at once; one of them builds the cache. Raises UserError where the source cannot be read, no picture of it can
    be used, a split would be empty, or the cache cannot be written.

    Args:
        channels: 3 for colours, 1 for grey.
        condition: the thing that every picture must have, others being refused: a class, or a caption. By default
            classes are kept if all pictures have one, and captions likewise.
        encoder: the encoder of captions, which every picture must have then.
        autoencoder: the encoder whose latents are learnt in the place of the pictures.
    """
    expect("flip", config.flip, not (config.flip and autoencoder), "false: latents of mirrored pictures are not kept")
    expect("size", size, 0 < size <= 2**13, "from 1 to 8,192 pixels")
    expect("channels", channels, channels in (1, 3), "3 for colours, or 1 for grey")
    with about("source"):
        source = open_pictures(config)
        cache = _ImageCache(config, source, (size, size, channels), "caption" if encoder else condition, progress)
    data, damage = cache.prepared(source)
    data = replace(data, skipped=source.skipped, damage=damage)
    if autoencoder is not None:
        data = _with_latents(config, data, autoencoder, progress)
    if encoder is None:
        return data
    captions = encode_captions(config, data.train, data.validation, encoder, progress)
    return replace(
        data,
        train=replace(data.train, features=captions.train),
        validation=replace(data.validation, features=captions.validation),
        damage="; ".join(filter(None, (data.damage, captions.damage))),
        encoders={**data.encoders, "text_encoder": encoder.identity},
        cut=captions.cut,
    )


def _with_latents(
    config: DataConfig, data: PreparedImages, autoencoder: ImageEncoder, progress: Progress | None
) -> PreparedImages:
    stores, damages = [], [data.damage]
    for split, store in (("train", data.train), ("validation", data.validation)):
        latents, damage = encode_images(config, store, split, autoencoder, progress)
        stores.append(replace(store, latents=latents, latent_shape=autoencoder.shape))
        damages.append(damage)
    return replace(
        data,
        train=stores[0],
        validation=stores[1],
        damage="; ".join(filter(None, damages)),
        encoders={"autoencoder": autoencoder.identity},
    )


class _ImageCache(CacheDirectory[PreparedImages, PictureSource]):
    """The directory of one source's pictures, in one size."""

    what = "cache of pictures"

    def __init__(
        self,
        config: DataConfig,
        source: PictureSource,
        shape: tuple[int, int, int],
        condition: Condition | None,
        progress: Progress | None,
    ) -> None:
        options = [shape, condition, config.validation_fraction, config.max_documents, config.image_filter]
        fingerprint = fingerprint_of(["images", FORMAT_VERSION, source.fingerprint(), *options])
        super().__init__(config, fingerprint, progress)
        self._shape, self._condition = shape, condition

    def _source_again(self) -> PictureSource:
        return open_pictures(self._config)

    def _load(self, directory: Path, meta: Meta) -> tuple[PreparedImages, list[str]]:
        train, validation = (
            ImageInfo(**meta[split]).open(directory, split, self._fingerprint, self._mend)
            for split in ("train", "validation")
        )
        refused = tuple(Refused(**one) for one in meta["refused"])
        classes, remarks = tuple(meta["classes"]), tuple(meta["remarks"])
        data = PreparedImages(train, validation, classes, self._fingerprint, refused, remarks)
        return data, [train.digest, validation.digest]

    def _build(self, directory: Path, source: PictureSource) -> list[str]:
        refusals = Refusals()
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(ImageWriter(directory, split, self._fingerprint, self._shape))
                for split in ("train", "validation")
            }
            size, channels = self._shape[1:]
            rows = self._usable(source, refusals)
            decoded = decode_all(rows, size, channels, self._config.image_filter)
            for row, one in reported(decoded, "Decoding pictures", source.num_documents(), self._progress):
                if isinstance(one, str):
                    refusals.add(one, row.id)
                else:
                    held_out = is_held_out(one.key, self._config.validation_fraction)
                    label, caption = _checked_label(row.value.label), _checked_caption(row.value.caption)
                    writers["validation" if held_out else "train"].append(one.image, label, caption)
            classes, captions, remarks = self._conditions(writers.values())
            infos = {split: writer.finish(classes, captions) for split, writer in writers.items()}
        self._check(infos, refusals)
        meta: Meta = {split: asdict(info) for split, info in infos.items()} | {
            "classes": classes,
            "refused": [asdict(one) for one in refusals.summary()],
            "remarks": [*remarks, *filter(None, [source.credit])],
        }
        write_meta(directory, meta)
        return [info.digest for info in infos.values()]

    def _usable(self, source: PictureSource, refusals: Refusals) -> Iterable[Row]:
        """Yield the pictures with a class and a caption that can be used, and count the others."""
        for row in itertools.islice(source.rows(), self._config.max_documents):
            try:
                if isinstance(row.value, Unreadable):
                    raise Unusable(row.value.reason)
                label, caption = _checked_label(row.value.label), _checked_caption(row.value.caption)
                if (label if self._condition == "label" else caption if self._condition else "") is None:
                    raise Unusable(f"no {'class' if self._condition == 'label' else 'caption'}")
            except Unusable as problem:
                refusals.add(str(problem), row.id)
            else:
                yield row

    def _conditions(self, writers: Iterable[ImageWriter]) -> tuple[tuple[str, ...], bool, list[str]]:
        """Return the classes, if all pictures have one; a flag for captions likewise; and lines on what is left out."""
        writers, remarks = list(writers), []
        found = {"class": [one for writer in writers for one in writer.labels]}
        found["caption"] = [one for writer in writers for one in writer.captions]
        for name, values in found.items():
            if missing := values.count(None) if any(values) else 0:
                remarks.append(f"{missing:,} pictures have no {name}: those of the others are not read")
        classes = found["class"] if None not in found["class"] and self._condition != "caption" else []
        names = sorted({str(name) for name in classes}, key=_by_number)
        captions = bool(found["caption"]) and None not in found["caption"] and self._condition != "label"
        return tuple(names), captions, remarks if self._condition is None else []

    def _check(self, infos: dict[str, ImageInfo], refusals: Refusals) -> None:
        total = sum(info.count for info in infos.values())
        if not total:
            refused = "".join(f"\n  {one}" for one in refusals.summary())
            raise UserError(f"no picture of the source can be used:{refused or ' it has none'}")
        for split, info in infos.items():
            if not info.count:
                raise UserError(
                    f"validation_fraction = {self._config.validation_fraction}: the {split} split is empty, of {total} "
                    "picture(s); change the fraction, or give more pictures"
                )


def _by_number(name: str) -> tuple[bool, int, str]:
    """Sort numbers by size, before other names."""
    number = name.isascii() and name.isdigit()
    return not number, int(name) if number else 0, name


def _checked_label(label: object) -> str | None:
    """Return a class's name; None where there is none. Raises Unusable for what is neither name nor whole number."""
    if label is None:
        return None
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST_NAME:
        raise Unusable(f"a class that is neither a whole number nor a name of up to {LONGEST_NAME} characters")
    check_text(label, "the class")
    return label.strip()


def _checked_caption(caption: object) -> str | None:
    """Return a caption without blanks around it; None where there is none. Raises Unusable for what is no text."""
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise Unusable("a caption that is not text")
    check_text(caption, "the caption")
    return caption.strip() or None
