"""The one config tree: what a run is, field by field, with units and bounds."""

from vidfuse.config.augment import Augment, Blur, Erasing, Flip, Jitter, Mixing, RandAugment, Temporal
from vidfuse.config.data import Curriculum, DataConfig, FeaturesConfig, QualityConfig
from vidfuse.config.model import Adapters, Component, Lora, ModelConfig, Option, Stream
from vidfuse.config.pack import LayoutConfig, PackConfig, TranscodeConfig
from vidfuse.config.section import ConfigError, Section
from vidfuse.config.train import ClusterConfig, EvaluateConfig, RunConfig, TrackingConfig, TrainConfig
from vidfuse.config.tree import HARMLESS, Config, differences, flat, from_mapping, override, read_file
from vidfuse.config.tune import SearchConfig

__all__ = [
    "HARMLESS",
    "Adapters",
    "Augment",
    "Blur",
    "ClusterConfig",
    "Component",
    "Config",
    "ConfigError",
    "Curriculum",
    "DataConfig",
    "Erasing",
    "EvaluateConfig",
    "FeaturesConfig",
    "Flip",
    "Jitter",
    "LayoutConfig",
    "Lora",
    "Mixing",
    "ModelConfig",
    "Option",
    "PackConfig",
    "QualityConfig",
    "RandAugment",
    "RunConfig",
    "SearchConfig",
    "Section",
    "Stream",
    "Temporal",
    "TrackingConfig",
    "TrainConfig",
    "TranscodeConfig",
    "differences",
    "flat",
    "from_mapping",
    "override",
    "read_file",
]
