"""What a search found, in a form a person can act on.

Comes in: a search and its study. Goes out, in the search's folder: `report.html`, with Optuna's own plots; `best.yaml`, the best
trial's config for `jobs.train --config`; `trials.json`, every trial with its values and figures.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import matplotlib as mpl
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots

from tuning.search import EPOCHS, Search, ended, trial_name
from tuning.spaces import Values, asked, settings
from vidfuse.config import Config, override
from vidfuse.data.shards import DataError
from vidfuse.evaluate import drawing, page
from vidfuse.on_ray.storage import join, open_storage, write_bytes

LABEL_POINTS = 7.5
BELOW = 0.3
"""Share of a figure's height below axes on which choices are named."""
SECTIONS = tuple(f"{name}." for name in Config.model_fields)
"""Beginnings of a parameter's path."""
ENOUGH = 2
"""Trials that a plot over trials needs."""


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


def write(search: Search, study: optuna.Study, facts: Mapping[str, str]) -> Iterator[str]:
    """Write the files; what was found, in words.

    Raises:
        DataError: no trial was judged.
    """
    chosen = best(search, study)
    filesystem, root = open_storage(search.url, write=True)
    config = override(search.base, [*settings(values_of(search, chosen[0])), f"run.name={search.name}-best"])
    write_bytes(filesystem, join(root, "best.yaml"), config.to_yaml().encode())
    write_bytes(filesystem, join(root, "trials.json"), json.dumps(_tree(search, study), indent=1).encode())
    write_bytes(filesystem, join(root, "report.html"), report(search, study, facts).encode())
    states = [trial.state.name.lower() for trial in ended(study)]
    yield f"{len(states)} trials, {states.count('fail')} failed"
    for trial in chosen:
        yield f"top-1 {trial.values[0]:.4f}{_cost(search, trial)}: --set {' '.join(settings(values_of(search, trial)))}"
    yield f"report: {join(search.url, 'report.html')}"
    yield f"the best again, for longer: python -m jobs.train --config {join(search.url, 'best.yaml')} --set train.epochs=..."


def report(search: Search, study: optuna.Study, facts: Mapping[str, str]) -> str:
    """The page."""
    order, everyone = judged(study), ended(study)
    pictures = {
        name: {"heading": heading, "about": about, "drawn": page.inline({name: (figure, heading)})[name]}
        for name, (heading, about, figure) in _pictures(search, study).items()
    }
    epochs = sum(_epochs(trial) for trial in everyone)
    full = len(everyone) * search.base.train.epochs
    headlines = [
        page.Headline("Best validation top-1", page.percent(order[0].values[0]), f"trial {order[0].number}"),
        page.Headline("Trials", f"{len(everyone)}", f"{len(everyone) - len(order)} without a figure"),
        page.Headline("Epochs", f"{epochs:,}", f"of {full:,} that all trials would have taken"),
    ]
    return page.render(
        "search.html.j2",
        title=search.name,
        url=search.url,
        headlines=headlines,
        about_best="Those that no other beats in both accuracy and parameters."
        if search.options.pareto
        else "By their best validation.",
        best=[
            {
                "top1": t.values[0],
                "cost": f"{t.values[1]:,.0f}" if search.options.pareto else "",
                "settings": settings(values_of(search, t)),
            }
            for t in best(search, study)
        ],
        pictures=pictures,
        paths=list(search.space.parameters),
        trials=[
            {
                "number": t.number,
                "top1": t.values[0] if t.values else None,
                "epochs": _epochs(t),
                "seconds": _seconds(t),
                "values": {path: _shown(value) for path, value in values_of(search, t).items()},
                "state": t.state.name.lower(),
            }
            for t in everyone
        ],
        facts={**facts, **{name: str(value) for name, value in search.options.model_dump().items()}},
    )


def _pictures(search: Search, study: optuna.Study) -> dict[str, tuple[str, str, Figure]]:
    """Heading, words and figure by name; those for which there are too few trials are left out."""
    several = search.options.pareto
    accuracy: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": "top-1"}
    varied = len({json.dumps(trial.params, sort_keys=True) for trial in judged(study)}) >= ENOUGH
    shown: dict[str, tuple[str, str, Callable[[], Any]]] = {
        "history": ("History", "Each trial's best validation, in the order in which they ended.",
                    lambda: plots.plot_optimization_history(study, **accuracy)),
        "importance": ("What mattered", "Share of the differences between trials that a parameter explains (fANOVA).",
                       lambda: plots.plot_param_importances(study, **accuracy)),
        "together": ("Together", "A line is a trial; its colour is its top-1.", lambda: plots.plot_parallel_coordinate(study, **accuracy)),
        "each": ("One by one", "Top-1 over each parameter's values.", lambda: plots.plot_slice(study, **accuracy)),
    }  # fmt: skip
    if several:
        shown["front"] = (
            "Accuracy and parameters",
            "The Pareto front among all trials.",
            lambda: plots.plot_pareto_front(study, target_names=["top-1", "trained parameters"]),
        )
    else:
        shown["curves"] = (
            "Curves",
            "Best validation so far of each trial, by epoch.",
            lambda: plots.plot_intermediate_values(study),
        )
    drawn = {}
    for name, (heading, about, plot) in shown.items():
        figure = _drawn(plot) if varied else None
        if figure is not None:
            drawn[name] = (heading, about, figure)
    return drawn


def _drawn(plot: Callable[[], Any]) -> Figure | None:
    """A plot of Optuna's as a figure of ours; `None` where it has too little to say."""
    with mpl.rc_context({**drawing.STYLE, "backend": "Agg"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            axes = plot()
        except (ValueError, RuntimeError):  # Optuna's own word for too few or too equal trials
            return None
        first = axes.flat[0] if hasattr(axes, "flat") else axes
        figure: Figure = first.figure
        figure.set_size_inches(drawing.WIDTH_INCHES, 4.2)
        _shorten(figure)
        from matplotlib import pyplot

        pyplot.close(figure)
    return figure


def _shorten(figure: Figure) -> None:
    """Paths on axes, without their section, in small letters: several axes share the width of a page."""
    choices = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_label_text(_path(axis.get_label_text()), fontsize=LABEL_POINTS)
            texts = [tick.get_text() for tick in axis.get_ticklabels()]
            if any(text.startswith(SECTIONS) for text in texts):
                axis.set_ticks(axis.get_ticklocs(), [_path(text) for text in texts], fontsize=LABEL_POINTS)
        choices += [tick for tick in axes.get_xticklabels() if tick.get_text().startswith("'")]
    for tick in choices:  # side by side
        tick.set(rotation=90, fontsize=LABEL_POINTS)
    for axes in figure.axes if choices else ():
        box = axes.get_position()
        axes.set_position((box.x0, BELOW, box.width, box.y1 - BELOW))


def _path(text: str) -> str:
    return text.split(".", 1)[1] if text.startswith(SECTIONS) else text


def _cost(search: Search, trial: FrozenTrial) -> str:
    return f", {trial.values[1]:,.0f} trained parameters" if search.options.pareto else ""


def _epochs(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get(EPOCHS, max(trial.intermediate_values, default=0)))


def _seconds(trial: FrozenTrial) -> float | None:
    return trial.duration.total_seconds() if trial.duration else None


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


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
                "epochs": _epochs(trial),
                "by_epoch": trial.intermediate_values,
                "seconds": _seconds(trial),
            }
            for trial in ended(study)
        ],
    }
