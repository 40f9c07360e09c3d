"""Fields of training and evaluation, of where they run and where they are kept."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from vidfuse.config.augment import Flip, Mixing
from vidfuse.config.section import Section


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
    mixing: Mixing | None = None
    """Mixup and CutMix. `null`: none; `{}`: VideoMAE's. Needs an even micro batch."""
    focal_gamma: float | None = Field(None, ge=0)
    """Exponent of the focal loss (Lin et al. 2017, arXiv:1708.02002). `null`: cross-entropy."""
    class_balance: float | None = Field(None, ge=0, lt=1)
    """Classes weigh by the effective number of their training samples, 1 - beta^n, with this beta, such as 0.999 (Cui et al. 2019,
    arXiv:1901.05555). `null`: all samples weigh the same."""
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
        if self.mixing is not None and self.micro_batch % 2:
            raise ValueError(f"mixing pairs the videos of a micro batch, so micro_batch is even, given {self.micro_batch}")
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
    flip: Flip = False
    """Whether each view is scored mirrored, too; classes that name a side or a turn are swapped back. Refused where a class
    cannot be mirrored, or where classes are only numbers. `keep_labels`: no class is swapped."""
    mean: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over views, and over the runs of an ensemble."""
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
    standby: bool = True
    """Whether an elastic run keeps, for each worker, an idle process (some 0.8 GB of memory) that takes over after a fault."""

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


class TrackingConfig(Section):
    """Where a run is told of besides its own folder, which has TensorBoard's events in any case."""

    mlflow: str | None = None
    """MLflow's tracking URI: `http://host:5000` or `https://host` of a server, `sqlite:////folder/mlflow.db` of a database by its
    whole path, since workers run in other folders than the command. It is saved with the run, so credentials are no part of it: MLflow
    reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN or its own file. `null`: no MLflow."""
    experiment: str = Field("vidfuse", min_length=1, max_length=500)
    """Name of MLflow's experiment; it is made if it is not there."""

    @model_validator(mode="after")
    def _is_a_tracking_uri(self) -> TrackingConfig:
        if self.mlflow is None:
            return self
        parts = urlsplit(self.mlflow)
        if "@" in parts.netloc or parts.query or parts.fragment:  # what was given is not repeated
            raise ValueError(
                "mlflow: credentials and options do not belong into a URI; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, in the environment"
            )
        served = parts.scheme in ("http", "https") and parts.hostname
        kept = parts.scheme == "sqlite" and not parts.netloc and parts.path.startswith("//") and parts.path.strip("/")
        if not served and not kept:
            raise ValueError(
                "mlflow is http://host:port or https://host of a server, or sqlite:////folder/mlflow.db, a database by its whole path; "
                f"MLflow keeps no folders of files any more; given {self.mlflow!r}"
            )
        return self
