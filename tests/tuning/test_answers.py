"""The page of a search, from a study whose figures are known."""

from __future__ import annotations

import json
import re

import optuna
import pytest

from tuning import answers
from tuning.search import CONTINUED, Search, ended, resume, study_of, trial_name
from tuning.spaces import Parameter, Space
from vidfuse.config import SearchConfig, override
from vidfuse.data.shards import DataError
from vidfuse.presets import get

SPACE = Space(
    "mine",
    {
        "model.fusion.name": Parameter(choices=("concat", "cross_attention")),
        "model.fusion.heads": Parameter(choices=(2, 4), when={"model.fusion.name": ("cross_attention",)}),
        "train.learning_rate": Parameter(low=1e-4, high=1e-2, log=True),
    },
)


def searched(folder, count: int = 12, **options) -> tuple[Search, optuna.Study]:
    """A study of trials whose accuracy is their learning rate's, and that are larger with attention."""
    base = override(get("demo"), [f"run.storage={folder}", "run.name=known"])
    search = Search(base, SPACE, SearchConfig(**options))
    study = study_of(search)
    for _ in range(count):
        trial = study.ask()
        values = SPACE.suggest(trial)
        top1 = 0.5 + 40 * float(values["train.learning_rate"]) + (0.05 if "model.fusion.heads" in values else 0)
        if not search.options.pareto:
            trial.report(top1 / 2, 1)
            trial.report(top1, 2)
        study.tell(trial, [top1, 2000 if "model.fusion.heads" in values else 1000] if search.options.pareto else top1)
    return search, study


def test_the_best_are_those_with_the_highest_figure(tmp_path):
    search, study = searched(tmp_path)
    lines = list(answers.write(search, study, {"command": "python -m jobs.tune <b>"}))
    top = max(study.get_trials(), key=lambda t: t.values[0])
    assert answers.best(search, study)[0].number == top.number and len(answers.best(search, study)) == 3
    assert lines[1] == f"top-1 {top.values[0]:.4f}: --set " + " ".join(
        f"{path}={json.dumps(value)}" for path, value in answers.values_of(search, top).items()
    )
    page = (tmp_path / "known-mine" / "report.html").read_text()
    assert "python -m jobs.tune &lt;b&gt;" in page and "<b>" not in page.split("</style>")[1].split("<script>")[0]
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections == ["best", "history", "importance", "together", "each", "curves", "trials", "facts"]
    assert page.count("<svg") == 5 and f"{len(study.get_trials())}</div>" in page


def test_of_two_aims_the_front_is_told(tmp_path):
    search, study = searched(tmp_path, pareto=True)
    lines = list(answers.write(search, study, {}))
    front = answers.best(search, study)
    assert {t.number for t in front} == {t.number for t in study.best_trials} and len(front) == 2
    assert "1,000 trained parameters" in lines[2] and "2,000 trained parameters" in lines[1]
    assert '<section id="front">' in (tmp_path / "known-mine" / "report.html").read_text()


def test_one_trial_is_enough_for_a_page_without_plots(tmp_path):
    search, study = searched(tmp_path, count=1)
    list(answers.write(search, study, {}))
    page = (tmp_path / "known-mine" / "report.html").read_text()
    assert "<svg" not in page and "Best trials" in page


def test_a_search_without_a_figure_says_so(tmp_path):
    search, study = searched(tmp_path, count=0)
    with pytest.raises(DataError, match=r"no trial of .*known-mine was judged"):
        list(answers.write(search, study, {}))


def test_trials_that_were_cut_off_are_proposed_again(tmp_path):
    search, study = searched(tmp_path, count=2)
    cut_off = [SPACE.suggest(study.ask()) for _ in range(2)]
    assert resume(study_of(search)) == 2
    again = study_of(search)
    assert [SPACE.suggest(again.ask()) for _ in range(2)] == cut_off
    assert len(ended(again)) == 2 and sum(CONTINUED in t.user_attrs for t in again.get_trials()) == 2
    assert len({trial_name(values) for values in cut_off}) == 2 and trial_name(cut_off[0]) == trial_name(
        dict(reversed(cut_off[0].items()))
    )
