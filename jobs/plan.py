"""What `--dry-run` prints of a training."""

from __future__ import annotations

from jobs import cli
from vidfuse.config import Config
from vidfuse.data.flips import flip_lines
from vidfuse.on_ray import preflight
from vidfuse.on_ray.room import WORKERS_WITHOUT_GPU
from vidfuse.train import plan


def show(config: Config) -> None:
    """Print the resolved config and what it comes to.

    Raises:
        ConfigError, DataError, StorageError: as training would.
    """
    cli.say(config.to_yaml())
    model = preflight.check_model(config)
    for line in plan.parameter_lines(model):
        cli.say(line)
    cli.say("\nweights")
    for line in plan.weights_lines(config, model):
        cli.say(f"  {line}")
    wanted = config.cluster.workers or WORKERS_WITHOUT_GPU
    least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    cli.say(f"\nglobal batch {config.train.global_batch}")
    for line in plan.batch_lines(config, range(least, most + 1)):
        cli.say(f"  {line}")
    if config.data.url is None:
        cli.say("\nsteps: not known without data.url")
    else:
        manifest = preflight.check(config).manifest
        cli.say(f"\npacked set: {manifest.dataset}, version {manifest.version}")
        cli.say(plan.steps_line(config, manifest.splits[config.data.train_split].samples))
        for line in flip_lines(manifest.classes) if config.data.flip is True else ():
            cli.say(line)
    cli.say("\nmemory estimate")
    for workers in sorted({least, most}):
        cli.say(f"  {plan.memory_line(plan.memory(config, model, workers), workers)}")
