"""The whole tree: built from presets, files and overrides, checked, hashed, compared.

Comes in: a preset, a YAML file, dotted overrides (`a.b=value`). Goes out: a frozen `Config`, or a `ConfigError` that names
the dotted path, what was given and what is allowed. Validation is pydantic's; the override grammar is OmegaConf's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator

from vidfuse.config.data import DataConfig, FeaturesConfig, QualityConfig
from vidfuse.config.model import ModelConfig, Stream
from vidfuse.config.section import ConfigError, Section
from vidfuse.config.train import ClusterConfig, EvaluateConfig, RunConfig, TrackingConfig, TrainConfig

HARMLESS = (
    "data.url",
    "data.buffer_bytes",
    "data.prefetch_batches",
    "data.block_bytes",
    "data.cpus_per_task",
    "data.unreadable_limit",
    "data.features",
    "data.frame_cache",
    "data.frame_cache_bytes",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_samples",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.log_every_steps",
)
"""Fields that do not alter a run's numbers: they may be others when it continues."""


class Config(Section):
    """A whole run."""

    seed: int = Field(0, ge=0)
    """Source of every random draw: weights, order, crops, dropout."""
    data: DataConfig = DataConfig()
    features: FeaturesConfig = FeaturesConfig()
    model: ModelConfig = ModelConfig(motion=Stream(name="tiny_motion", frozen=False))
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    quality: QualityConfig = QualityConfig()

    @model_validator(mode="after")
    def _trains_in_time(self) -> Config:
        for name, stream in (("semantic", self.model.semantic), ("motion", self.model.motion)):
            if stream is not None and stream.train_from_epoch >= self.train.epochs:
                raise ValueError(
                    f"model.{name}.train_from_epoch is {stream.train_from_epoch}, but train.epochs is {self.train.epochs} "
                    "and epochs count from 0: it would never be trained; set frozen=true for that"
                )
        return self

    @model_validator(mode="after")
    def _uses_all_that_is_hard(self) -> Config:
        easy = self.data.curriculum
        if easy is not None and easy.start < 1 and easy.epochs >= self.train.epochs:
            raise ValueError(
                f"data.curriculum.epochs is {easy.epochs}, but train.epochs is {self.train.epochs}: the hardest videos would never be used; "
                "make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _caches_what_is_fixed(self) -> Config:
        if self.data.features == "off":
            return self
        streams = [s for s in (self.model.semantic, self.model.motion) if s is not None]
        if not any(stream.frozen and not stream.trained for stream in streams):
            raise ValueError(
                "data.features=auto keeps tokens of streams that stay as they are, and every stream of this model is trained; freeze "
                "one, without adapters or lora, or set data.features=off"
            )
        if self.train.mixing is not None:
            raise ValueError(
                "train.mixing mixes clips, of which data.features=auto keeps tokens only; set one of them to null or off"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved config as YAML; `--config` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """Hash of what decides the numbers of a run (storage, name, tracking, cluster and evaluation do not)."""
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


def flat(config: Config) -> dict[str, Any]:
    """Every field's value by its dotted path; a part that is `null` is one of them."""

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}.{key}" if prefix else key).items()}

    return leaves(config.model_dump(mode="json"))


def differences(a: Config, b: Config) -> list[str]:
    """Dotted paths whose values differ, as `path: a -> b`."""
    left, right = flat(a), flat(b)
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
