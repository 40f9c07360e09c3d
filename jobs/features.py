"""Keep the tokens of frozen streams, of `data.views` clips of each training video and of validation's; given again, it continues.

python -m jobs.features --preset NAME --set data.url=URL run.storage=URL data.views=4
python -m jobs.train --preset NAME --set data.url=URL run.storage=URL data.views=4 data.features=auto
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli, plan
from vidfuse.config import override
from vidfuse.on_ray import features, featurizing, preflight


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parser(__doc__, config=True).parse_args(argv)
    config = override(cli.config_of(options), ["data.features=auto", "features.absent=compute"])
    if options.dry_run:
        plan.show(config)
        return 0
    packed, model = preflight.open_set(config), preflight.check_model(config)
    preflight.check_reachable(model)
    features.check(config, model)
    cli.start_ray()
    caches = features.wanted(config, packed)
    missing = [cache for cache in caches if features.find(cache) is None]
    featurizing.compute(config, packed, model, missing, lambda done: cli.say(f"features  {done.line()}"))
    for cache in caches:
        cli.say(
            f"{cache.recipe.split}, {cache.recipe.stream}: {features.words(cache)}{'' if cache in missing else ' (was there)'}"
        )
    return 0


if __name__ == "__main__":
    cli.main(main)
