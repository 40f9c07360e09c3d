"""Fields of a model: streams, what is added to frozen ones, fusion."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from vidfuse.config.section import Section

Option = bool | int | float | str | None | tuple[int | float | str, ...]


class Component(Section):
    """A named file of a registry folder and the options of its `build`."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option] = Field(init=False)

    name: str
    """File name in the folder, without `.py`."""

    @property
    def options(self) -> dict[str, Option]:
        """Keyword arguments for the component's `build`; they are checked against its signature."""
        return dict(self.__pydantic_extra__)


class Adapters(Section):
    """Bottleneck adapters in the blocks of a vision transformer that itself stays as it is."""

    ratio: float = Field(0.25, gt=0)
    """Width of an adapter's bottleneck, as a share of the tokens' width."""
    placement: Literal["attention", "mlp", "both"] = "both"
    """`attention`: one after each attention of a block; `mlp`: one beside its feed-forward part; `both`: all of them."""
    scale: float = Field(0.5, gt=0)
    """Factor of what the adapter beside the feed-forward part adds."""


class Lora(Section):
    """Low-rank updates of linear layers in the blocks of a vision transformer that itself stays as it is."""

    rank: int = Field(8, ge=1)
    """Rank of an update."""
    alpha: int = Field(16, ge=1)
    """Updates are multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of what an update is given, in training."""
    targets: tuple[str, ...] | None = None
    """Linear layers of a block by the end of their names (`qkv`, `mlp.fc1`). `null`: those of its attentions."""


class Stream(Component):
    """A backbone of `models/backbones/`, and how it is trained."""

    frozen: bool = True
    """Whether the backbone's weights stay as they are (no gradients, no stored activations, evaluation mode). With adapters or
    LoRA these are trained all the same, and gradients pass through the backbone to reach them."""
    adapters: Adapters | None = None
    """Bottleneck adapters that are trained in a frozen vision transformer. `null`: none."""
    lora: Lora | None = None
    """Low-rank updates that are trained in a frozen vision transformer; with adapters, too, if both are given. `null`: none."""
    train_from_epoch: int = Field(0, ge=0)
    """Epoch from which a stream that is not frozen, or its adapters and LoRA, are trained; until then it runs as a frozen one."""
    trained_blocks: int | None = Field(None, ge=1)
    """How many of its last blocks are trained, and nothing else of it, where it is not frozen; how many of them have adapters
    and LoRA, where it is. `null`: all."""
    grid: tuple[int, int, int] | None = None
    """Cells (time, height, width) of the clip that the stream's tokens are averaged in; what comes after sees one token a cell. A class
    token counts in its frame's centre; leave it out by the backbone's own `tokens`. `null`: tokens stay as they are."""
    weights: str | None = None
    """`null`: random from the seed; `pretrained`: the backbone's published weights; else a file: a path, an `s3://` or `https://` URL,
    `hf:OWNER/REPOSITORY[/FILE]`, `timm:MODEL` or `torchvision:NAME`. `...#sha256=HEX` states its hash."""

    @property
    def added(self) -> tuple[str, ...]:
        """What is put into the backbone to be trained: `adapters`, `lora`, both or neither."""
        return tuple(name for name in ("adapters", "lora") if getattr(self, name) is not None)

    @property
    def trained(self) -> bool:
        """Whether any of it is: its own weights, or what is put into it."""
        return not self.frozen or bool(self.added)

    @field_validator("grid")
    @classmethod
    def _has_cells(cls, grid: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if grid is not None and min(grid) < 1:
            raise ValueError(f"a grid has at least one cell along time, height and width, given {grid}")
        return grid

    @model_validator(mode="after")
    def _trained_or_not(self) -> Stream:
        given = [name for name in ("train_from_epoch", "trained_blocks") if getattr(self, name)]
        if given and not self.trained:
            raise ValueError(
                f"{' and '.join(given)} is for a stream that is trained; frozen=false makes it one, and so do adapters or lora"
            )
        if self.added and not self.frozen:
            raise ValueError(
                f"{' and '.join(self.added)} is trained in the place of the backbone's own weights: give frozen=true with it, "
                f"or {'=null and '.join(self.added)}=null to train the backbone itself"
            )
        return self


class ModelConfig(Section):
    """One or two streams of tokens, how they are joined, and the head."""

    semantic: Stream | None = None
    """The stream of *what*: an image backbone over frames. `null`: none."""
    motion: Stream | None = None
    """The stream of *how*: a video backbone over the clip. `null`: none."""
    fusion: Component = Component(name="mean")
    """How the streams' tokens become one feature."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the classifier."""
    max_trainable_parameters: int | None = None
    """A larger model is refused. `null`: no limit."""
    weights: str | None = None
    """`model.safetensors` of another run's checkpoint (path or `s3://` URL; `...#sha256=HEX` states its hash) that the whole model
    starts from. A head of another number of classes is made anew. A run that continues does not read it again. `null`: none."""

    @model_validator(mode="after")
    def _has_stream(self) -> ModelConfig:
        if self.semantic is None and self.motion is None:
            raise ValueError("a model has a semantic stream, a motion stream or both; both are null")
        return self
