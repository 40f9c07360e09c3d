"""Fields of what is drawn for a clip, and for pairs of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vidfuse.config.section import Section, check_range

Flip = bool | Literal["keep_labels"]
"""Whether clips are mirrored, and, if so, whether labels follow the names of their classes."""


class Jitter(Section):
    """Random colours of a training clip, as torchvision's `ColorJitter`."""

    probability: float = Field(1.0, ge=0, le=1)
    """Share of clips that it changes."""
    brightness: float = Field(0.4, ge=0)
    """Brightness is multiplied by 1 - this to 1 + this (at least 0)."""
    contrast: float = Field(0.4, ge=0)
    """The same of contrast."""
    saturation: float = Field(0.4, ge=0)
    """The same of saturation."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Most that hue is turned either way, as a share of the colour circle."""


class RandAugment(Section):
    """Random transforms, one after the other (Cubuk et al. 2019, arXiv:1909.13719); timm's `rand-m7-n4-mstd0.5-inc1` as it is."""

    operations: int = Field(4, ge=1)
    """Transforms that are drawn for a clip, of 15."""
    magnitude: float = Field(7.0, ge=0, le=10)
    """How strong they are: 0 least, 10 most."""
    deviation: float = Field(0.5, ge=0)
    """Standard deviation of the magnitude, which is drawn for each of them."""
    probability: float = Field(0.5, ge=0, le=1)
    """Share of those drawn that are made."""


class Blur(Section):
    """Random Gaussian blur of a training clip."""

    probability: float = Field(0.5, ge=0, le=1)
    """Share of clips that it changes."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and most blur, standard deviation in pixels of the clip."""


class Erasing(Section):
    """Random erasing: rectangles of a training clip, the same in all frames (Zhong et al. 2017, arXiv:1708.04896)."""

    probability: float = Field(0.25, ge=0, le=1)
    """Share of clips that it changes."""
    count: int = Field(1, ge=1)
    """Rectangles of a clip; they share the area."""
    area: tuple[float, float] = (0.02, 0.3333)
    """Least and most of the clip's area that is erased."""
    aspect: tuple[float, float] = (0.3, 3.3333)
    """Smallest and largest height : width of a rectangle."""
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """What is put there: noise, one random colour, or the mean colour."""


class Temporal(Section):
    """Which frames a training clip has, beyond what `data.sampling` draws; nothing by default."""

    speed: tuple[float, float] = (1.0, 1.0)
    """Least and most that the distance of neighbouring frames is multiplied by, drawn evenly in its logarithm. Under `uniform` sampling
    it is the share of the video that the clip is cut from, at a random place, so at most 1."""
    jitter: float | None = Field(None, ge=0, le=1)
    """How far a frame is moved at random, as a share of the distance of neighbouring frames. `null`: as `data.sampling` has it: 1 under
    `uniform` (anywhere in its segment), 0 under `dense`."""
    dropped: float = Field(0.0, ge=0, lt=1)
    """Share of a clip's frames, the first aside, that are lost: the frame before is shown on."""
    reverse: float = Field(0.0, ge=0, le=1)
    """Share of clips that run backwards. Refused where classes are each other's reverse, such as opening and closing."""


class Augment(Section):
    """How training clips are altered, besides crop and mirror image. The same for all frames of a clip; nothing by default."""

    temporal: Temporal = Temporal()
    """Frames."""
    rotation_degrees: float = Field(0.0, ge=0, le=180)
    """Most that a clip is turned either way. 0: not at all."""
    rand_augment: RandAugment | None = None
    """Random transforms. `null`: none; `{}`: VideoMAE's."""
    jitter: Jitter | None = None
    """Random colours. `null`: none; `{}`: those above."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Share of clips that lose their colours."""
    blur: Blur | None = None
    """Gaussian blur. `null`: none."""
    erasing: Erasing | None = None
    """Rectangles that are erased. `null`: none; `{}`: VideoMAE's."""

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        check_range("temporal.speed", self.temporal.speed, 16.0)
        if self.blur is not None:
            check_range("blur.sigma", self.blur.sigma, 100.0)
        if self.erasing is not None:
            check_range("erasing.area", self.erasing.area, 1.0)
            check_range("erasing.aspect", self.erasing.aspect, 100.0)
        return self


class Mixing(Section):
    """Mixing neighbouring videos of a batch with each other, clips and labels: mixup and CutMix, as in VideoMAE's fine-tuning."""

    probability: float = Field(1.0, ge=0, le=1)
    """Share of pairs that are mixed."""
    mixup_alpha: float | None = Field(0.8, gt=0)
    """Mixup's shares are drawn from Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412). `null`: no mixup."""
    cutmix_alpha: float | None = Field(1.0, gt=0)
    """The same of CutMix (Yun et al. 2019, arXiv:1905.04899). `null`: no CutMix."""
    switch_probability: float = Field(0.5, ge=0, le=1)
    """Share of mixed pairs that take CutMix, where both are on."""
    cut: Literal["spatial", "temporal", "spatiotemporal"] = "spatial"
    """What CutMix exchanges: a rectangle of all frames, some frames, or a rectangle of some (VideoMix, Yun et al. 2020,
    arXiv:2012.03457)."""

    @model_validator(mode="after")
    def _something(self) -> Mixing:
        if self.mixup_alpha is None and self.cutmix_alpha is None:
            raise ValueError("mixup_alpha and cutmix_alpha are both null, so nothing is mixed: give one, or train.mixing=null")
        return self
