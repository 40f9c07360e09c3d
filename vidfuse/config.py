"""The one config tree: what a run is, field by field, with units and bounds.

Comes in: a preset, a YAML file, dotted overrides (`a.b=value`). Goes out: a frozen `Config`, or a `ConfigError` that names
the dotted path, what was given and what is allowed. Validation is pydantic's; the override grammar is OmegaConf's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

HARMLESS = (
    "data.url",
    "data.buffer_bytes",
    "data.prefetch_batches",
    "data.block_bytes",
    "data.cpus_per_task",
    "data.unreadable_limit",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_samples",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.log_every_steps",
)
"""Fields that do not alter a run's numbers: they may be others when it continues."""

Option = bool | int | float | str | None | tuple[int | float | str, ...]


class ConfigError(ValueError):
    """A config that cannot be: the message has the dotted path, what was given, what is allowed and what to do."""


class Section(BaseModel):
    """A frozen part of the tree; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


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


class DataConfig(Section):
    """Which packed set, and how its videos become clips."""

    url: str | None = None
    """Folder or `s3://` URL of a packed set (it holds `manifest.json`)."""
    classes: int = Field(174, ge=2)
    """Number of classes; must be the manifest's."""
    train_split: str = "train"
    """Split of the manifest that is trained on."""
    validation_split: str = "validation"
    """Split of the manifest that is scored after epochs."""
    frames: int = Field(16, ge=1)
    """Frames of a clip."""
    size: int = Field(224, ge=16)
    """Height and width of a clip, in pixels."""
    sampling: Literal["uniform", "dense", "single"] = "uniform"
    """`uniform`: one frame a TSN segment; `dense`: consecutive frames `stride` apart; `single`: one frame, repeated."""
    stride: int = Field(2, ge=1)
    """Distance of neighbouring frames under dense sampling, in frames."""
    repeats: int = Field(1, ge=1)
    """Clips of each training video in its micro batch, decoded once, with frames and crops of their own (repeated augmentation,
    Hoffer et al. 2019, arXiv:1901.09335). Batches, steps and epochs count videos; memory and time grow with the clips."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the frame's area that a training crop takes."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest width : height of a training crop."""
    flip: bool = False
    """Whether training clips are mirrored left-right at random. Wrong wherever labels name a direction."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Video decoder."""
    block_bytes: int = Field(16 * 1024**2, ge=1)
    """Decoded clips that one Ray Data task reads and gives as one block, in bytes; at least one micro batch."""
    cpus_per_task: float = Field(0.5, gt=0)
    """CPUs that one reading task asks of Ray."""
    buffer_bytes: int = Field(4 * 1024**3, ge=1)
    """Decoded clips that may wait between reading tasks and workers, all workers together, in bytes."""
    prefetch_batches: int = Field(2, ge=0)
    """Micro batches that a worker fetches ahead."""
    unreadable_limit: float = Field(0.05, ge=0, le=1)
    """Share of an epoch's videos that may be unreadable before the run is stopped."""

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        for name, low, high in (("crop_area", 0.0, 1.0), ("crop_aspect", 0.0, 10.0)):
            a, b = getattr(self, name)
            if not low < a <= b <= high:
                raise ValueError(
                    f"{name} is (smallest, largest) with {low:g} < smallest <= largest <= {high:g}, given ({a:g}, {b:g})"
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


class TrainConfig(Section):
    """Optimisation, precision and memory."""

    epochs: int = Field(30, ge=1)
    """Passes over the training split."""
    global_batch: int = Field(64, ge=1)
    """Videos of one optimizer step, all workers and accumulation together. Constant at every world size."""
    micro_batch: int = Field(8, ge=1)
    """Videos of one forward pass of one worker; each is `data.repeats` clips."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    final_learning_rate_share: float = Field(0.01, ge=0, le=1)
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_epochs: float = Field(1.0, ge=0)
    """Epochs of linear warmup."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's weight decay; biases, norms and one-dimensional parameters have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moment estimates."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Learning rate of a trained backbone's block, as a share of the next one's; the last block's as a share of the head's. The
    same of exchanges between blocks. `null`: all are equal."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the global gradient. `null`: no clipping."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Share of an exponential moving average of the weights that an optimizer step leaves as it was. The average is what is
    validated, exported and evaluated; training goes on from the weights themselves. `null`: no average."""
    ema_warmup: bool = True
    """Whether the share grows as 1 - n^(-2/3) over the steps n until it is `ema_decay`: 0.99 after 1,000, 0.999 after 31,600."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread over all classes."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of forward and backward; the optimizer's weights are fp32. `fp16` has dynamic loss scaling."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 nothing is sharded, 1 optimizer state, 2 and gradients, 3 and parameters."""
    activation_checkpointing: bool = True
    """Whether blocks of trainable backbones and of the fusion recompute their activations in backward."""
    validate_every_epochs: int = Field(1, ge=1)
    """Epochs between validations."""
    early_stopping_epochs: int | None = Field(None, ge=1)
    """Epochs without a better validation top-1 after which training ends. `null`: never."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints, besides those after validations. `null`: not by steps."""
    checkpoint_every_samples: int | None = Field(None, ge=1)
    """Samples between checkpoints, besides those after validations. `null`: not by samples."""
    checkpoint_every_minutes: float | None = Field(None, gt=0)
    """Minutes between checkpoints, besides those after validations. `null`: not by time."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on the storage; the one with the best validation top-1 stays besides. With 1 there
    is none to go back to if it is damaged."""
    log_every_steps: int = Field(10, ge=1)
    """Optimizer steps between lines of metrics.jsonl (and TensorBoard points)."""

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.ema_decay is not None and self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("ema_decay averages fp32 weights, which fp16 has with zero_stage 1, 2 or 3; given zero_stage 0")
        return self


class EvaluateConfig(Section):
    """Multi-view testing."""

    split: str | None = None
    """Split to score. `null`: the validation split."""
    clips: int = Field(1, ge=1)
    """Temporal views of a video."""
    crops: Literal[1, 3] = 1
    """Spatial views of a clip: 1 centre, 3 along the longer side."""
    micro_batch: int | None = Field(None, ge=1)
    """Views of one forward pass of one worker. `null`: `train.micro_batch`."""


class ClusterConfig(Section):
    """What a run asks of the Ray cluster."""

    workers: int | tuple[int, int] | None = None
    """Train workers; `[least, most]` is elastic. `null`: one per GPU of the cluster, or 2 where there is none."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs reserved for one Train worker."""
    resize_seconds: float = Field(60.0, gt=0)
    """Seconds between looks whether an elastic run can have more workers; taking them restarts all from the last checkpoint."""
    max_failures: int = Field(3, ge=-1)
    """Restarts from the last checkpoint before the run is given up; -1 is Ray's own word for no limit."""

    @model_validator(mode="after")
    def _counts(self) -> ClusterConfig:
        low, high = (self.workers, self.workers) if isinstance(self.workers, int | None) else self.workers
        if low is not None and high is not None and not 1 <= low <= high:
            raise ValueError(f"workers is at least 1, and [least, most] in this order, given {self.workers}")
        return self


class RunConfig(Section):
    """Where a run lives. The same name on the same storage continues the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below `storage`."""
    storage: str = "runs"
    """Folder or `s3://` URL under which runs are kept."""


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0)
    """Source of every random draw: weights, order, crops, dropout."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig(motion=Stream(name="tiny_motion", frozen=False))
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _trains_in_time(self) -> Config:
        for name, stream in (("semantic", self.model.semantic), ("motion", self.model.motion)):
            if stream is not None and stream.train_from_epoch >= self.train.epochs:
                raise ValueError(
                    f"model.{name}.train_from_epoch is {stream.train_from_epoch}, but train.epochs is {self.train.epochs} "
                    "and epochs count from 0: it would never be trained; set frozen=true for that"
                )
        return self

    def to_yaml(self) -> str:
        """The resolved config as YAML; `--config` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """Hash of what decides the numbers of a run (storage, name, cluster and evaluation do not)."""
        part = self.model_dump(mode="json", include={"seed", "data", "model", "train"})
        for path in HARMLESS:
            section, _, field = path.partition(".")
            part[section].pop(field)
        return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]


def from_mapping(tree: Mapping[str, Any], *, source: str = "config") -> Config:
    """Validate a nested mapping into a `Config`.

    Raises:
        ConfigError: one line for each fault, with its dotted path.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault, source) for fault in error.errors())) from None


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Return `config` with dotted assignments (`train.epochs=3`) applied, in order.

    Naming another component (`model.fusion.name=concat`) starts from that component's defaults: options of the former one
    are dropped. `model.semantic=null` removes a stream.

    Raises:
        ConfigError: a malformed assignment, an unknown path, or a value the field refuses.
    """
    tree = config.model_dump(mode="json")
    for assignment in assignments:
        path, sep, _ = assignment.partition("=")
        if not sep or not path.strip():
            raise ConfigError(f"--set takes dotted.path=value, given {assignment!r}; for example --set train.epochs=3")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([assignment]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot read the value of {assignment!r}: {str(error).splitlines()[0]}") from None
        _merge(tree, parsed)  # type: ignore[arg-type]
    return from_mapping(tree, source="--set")


def read_file(path: str) -> Config:
    """Read a config from a YAML file, such as the `config.yaml` that every run saves.

    Raises:
        ConfigError: no such file, malformed YAML, or content that is no config.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = OmegaConf.to_container(OmegaConf.create(file.read()))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {path}: a mapping such as a run's config.yaml is needed, this is a {type(tree).__name__}")
    return from_mapping(tree, source=path)  # type: ignore[arg-type]


def differences(a: Config, b: Config) -> list[str]:
    """Dotted paths whose values differ, as `path: a -> b`."""

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}

    left, right = flat(a.model_dump(mode="json")), flat(b.model_dump(mode="json"))
    keys = [k for k in {**left, **right} if left.get(k, "absent") != right.get(k, "absent")]
    return [f"{k}: {left.get(k, 'absent')} -> {right.get(k, 'absent')}" for k in keys]


def _merge(tree: dict[str, Any], part: Mapping[str, Any]) -> None:
    if "name" in part and "name" in tree and tree["name"] != part["name"]:
        for option in set(tree) - {"name", "frozen", "weights", "storage"}:
            del tree[option]
    for key, value in part.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(fault: Any, source: str) -> str:
    path = ".".join(str(step) for step in fault["loc"])
    if fault["type"] == "extra_forbidden":
        keys = _keys_at(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{source}: {path}: no such key{hint}; allowed here: {', '.join(keys)}"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | BaseModel) else f", given {fault['input']!r}"
    return f"{source}: {path}: {message[:1].lower()}{message[1:]}{given if given not in message else ''}"


def _keys_at(loc: Sequence[int | str]) -> list[str]:
    model: Any = Config
    for step in loc:
        annotation = model.model_fields[str(step)].annotation
        model = next(a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel))
    return list(model.model_fields)
