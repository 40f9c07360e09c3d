"""What a search found, in a form a person can act on.

Comes in: a search and its study. Goes out, in the search's folder: `best.yaml`, the best trial's config for `jobs.train --config`, and
`trials.json`, every trial with its values and figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuning.search import Search, ended, trial_name
from tuning.spaces import Values, asked, settings
from vidfuse.config import override
from vidfuse.data.shards import DataError
from vidfuse.on_ray.storage import join, open_storage, write_bytes


def values_of(search: Search, trial: FrozenTrial) -> Values:
    """A trial's values, in the space's order."""
    values: Values = {}
    for path, parameter in search.space.parameters.items():
        if path in trial.params and asked(parameter, values):
            values[path] = trial.params[path]
    return values


def judged(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a figure, the best first."""
    done = [trial for trial in ended(study) if trial.state == TrialState.COMPLETE and trial.values]
    return sorted(done, key=lambda trial: trial.values[0], reverse=True)


def best(search: Search, study: optuna.Study) -> list[FrozenTrial]:
    """The best trials: of a search for accuracy alone up to three, of two aims the Pareto front.

    Raises:
        DataError: none was judged.
    """
    order = judged(study)
    if not order:
        raise DataError(
            f"no trial of {search.url} was judged: none reached its first validation; look at their runs below trials/"
        )
    return sorted(study.best_trials, key=lambda t: t.values[0], reverse=True) if search.options.pareto else order[:3]


def write(search: Search, study: optuna.Study) -> Iterator[str]:
    """Write the files; what was found, in words.

    Raises:
        DataError: no trial was judged.
    """
    chosen = best(search, study)
    filesystem, root = open_storage(search.url, write=True)
    config = override(search.base, [*settings(values_of(search, chosen[0])), f"run.name={search.name}-best"])
    write_bytes(filesystem, join(root, "best.yaml"), config.to_yaml().encode())
    write_bytes(filesystem, join(root, "trials.json"), json.dumps(_tree(search, study), indent=1).encode())
    states = [trial.state.name.lower() for trial in ended(study)]
    yield f"{len(states)} trials, {states.count('fail')} failed"
    for trial in chosen:
        cost = f", {trial.values[1]:,.0f} trained parameters" if search.options.pareto else ""
        yield f"top-1 {trial.values[0]:.4f}{cost}: --set {' '.join(settings(values_of(search, trial)))}"
    yield f"retrain the best: python -m jobs.train --config {join(search.url, 'best.yaml')} --set train.epochs=..."


def _tree(search: Search, study: optuna.Study) -> dict[str, Any]:
    return {
        "study": search.name,
        "space": search.space.to_json(),
        "base": search.base.model_dump(mode="json"),
        "trials": [
            {
                "number": trial.number,
                "run": trial_name(values_of(search, trial)),
                "state": trial.state.name.lower(),
                "values": values_of(search, trial),
                "figures": trial.values,
                "by_epoch": trial.intermediate_values,
                "seconds": trial.duration.total_seconds() if trial.duration else None,
            }
            for trial in ended(study)
        ],
    }
