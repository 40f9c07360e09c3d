"""Options of a search."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vidfuse.config.section import Section


class SearchConfig(Section):
    """How much is tried, how values are proposed, and when a weak trial ends."""

    trials: int = Field(24, ge=1)
    """Trials to finish in all, early or not; those of earlier calls count."""
    sampler: Literal["tpe", "gp", "cmaes", "random"] = "tpe"
    """Who proposes values: Optuna's tree-structured Parzen estimator, Gaussian process, CMA-ES, or chance."""
    stopping: Literal["asha", "median", "none"] = "asha"
    """Which trials end early: at rungs of epochs all but the best share (ASHA), those below the median, none."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs that each trial has before it may be ended. null: `train.epochs` / `reduction`, rounded up, and a validation at least: what
    learns late is not ended for having warmed up."""
    reduction: int = Field(3, ge=2)
    """Of so many trials one goes on at each of ASHA's rungs, which are this factor of epochs apart."""
    first: str = ""
    """Presets or config files, separated by commas, whose values are tried first, after the base's own; those that a space does not
    allow are left to the sampler."""
    pareto: bool = False
    """Whether fewer trained parameters count beside accuracy: the answer is a Pareto front."""
    together: int | None = Field(None, ge=1)
    """Trials at a time. null: as many as the cluster has room for."""
    study: str | None = None
    """Database of the study, as sqlite:///study.db; null: a journal file in the search's folder."""
