"""Whether a worker can use the GPU that Ray gave it, told in one line where it cannot, before anything is built.

Comes in: what torch sees on the worker's machine. Goes out: nothing, or what is wrong there and what to do. Ray counts GPUs by NVIDIA's
files and by what nodes say of themselves; whether the Python of the worker can use them, it does not ask. NCCL's or DeepSpeed's words for
it name neither the machine nor the remedy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass

import ray
import torch

from vidfuse.train.errors import RunError

DRIVER = 580
"""The oldest driver of NVIDIA's that has CUDA 13, of which the pinned torch is."""


@dataclass(frozen=True)
class Sight:
    """What torch sees on a machine."""

    host: str
    """Name and address."""
    torch: str
    """Its version."""
    build: str | None
    """CUDA that torch is built for; `None`: a build for CPUs."""
    gpu: str | None
    """Name of the first GPU that can be used; `None`: there is none."""
    bf16: bool = False
    """Whether that one computes in bf16 by itself."""
    fault: str = ""
    """What CUDA said, in a sentence."""


def look() -> Sight:
    """What this process' torch sees."""
    host = f"{platform.node()} ({ray.util.get_node_ip_address()})"
    if not torch.backends.cuda.is_built():
        return Sight(host, torch.__version__, None, None)
    build = torch.version.cuda or torch.version.hip
    try:
        torch.cuda.init()
        name, bf16 = torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False)
    except (AssertionError, RuntimeError) as error:  # torch raises both, of one cause
        return Sight(host, torch.__version__, build, None, fault=" ".join(str(error).split()).split(". ")[0])
    return Sight(host, torch.__version__, build, name, bf16=bf16)


def fault_of(sight: Sight, precision: str) -> str | None:
    """What keeps a worker from training on its GPU, and what to do; `None`: nothing.

    Args:
        sight: of its machine.
        precision: `train.precision`.
    """
    if sight.build is None:
        return (
            f"{sight.host}: Ray gives the worker a GPU, but torch {sight.torch} there is a build for CPUs; install it as constraints.txt has "
            "it, or use the image of cluster/Dockerfile"
        )
    if sight.gpu is None:
        said = f" ({sight.fault})" if sight.fault else ""
        return (
            f"{sight.host}: Ray gives the worker a GPU, but torch {sight.torch} for CUDA {sight.build} sees none there{said}; `nvidia-smi` "
            f"in the same container has to list it: NVIDIA's driver {DRIVER} or newer on the machine, and its device plugin or container "
            "toolkit for the image"
        )
    if precision == "bf16" and not sight.bf16:
        return f"{sight.host}: train.precision is bf16, which {sight.gpu} does not have; set train.precision=fp16 or fp32, or use another GPU"
    return None


def hold(sights: Iterable[Sight], precision: str) -> None:
    """Refuse to train where a GPU cannot be used.

    Raises:
        RunError: one line, with each such machine.
    """
    faults = dict.fromkeys(fault for sight in sights if (fault := fault_of(sight, precision)) is not None)
    if faults:
        raise RunError("; ".join(faults))
