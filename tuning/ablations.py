"""Ablations: rows of changes to one config, each trained with several seeds, side by side in a table.

Comes in: a base config and the name of a table (or a YAML file of rows). Goes out: one training through the main path for each
cell (row x seed), and below the runs `table.md`, `table.tex`, `table.png` and `table.json`, written anew after each cell. A cell
that is finished is not trained again, one that was cut off continues from its checkpoint: the same command goes on where it
ended.

Everything is below `run.storage/<run.name>-<table>/`; a cell is the run `<row>-seed<seed>` there, as any other run.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tuning.tables import TABLES, Row
from vidfuse.config import Config, ConfigError, differences, from_mapping, override
from vidfuse.data.shards import DataError
from vidfuse.evaluate import comparison, drawing
from vidfuse.on_ray import fit, preflight
from vidfuse.on_ray.room import resources
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import StorageError, join, open_storage, write_bytes
from vidfuse.train.errors import CheckpointError, RunError
from vidfuse.train.worker import Progress

FIGURE = "best validation top-1"
"""What the table compares: of each training the best validation, the checkpoint that is kept."""
OWN = ("seed", "run.name", "run.storage")
"""What the runner sets for each cell; a row may not."""


@dataclass(frozen=True)
class Cell:
    """A row with a seed: one training."""

    row: Row
    seed: int
    config: Config


class Parameters(NamedTuple):
    """Sizes of a row's model."""

    trained: int
    total: int


@dataclass(frozen=True)
class Ablation:
    """A table that is planned: every cell's config is resolved and its model was built on the meta device."""

    name: str
    base: Config
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    parameters: Mapping[str, Parameters]
    """Of each row's model."""
    reference: int
    """Place of the row that the others are compared with: the base itself, or the first row if none is."""

    @property
    def url(self) -> str:
        """Folder of the table, with its cells' runs below."""
        return _url(self.base, self.name)


def rows_of(name: str, base: Config) -> tuple[str, tuple[Row, ...]]:
    """A table's name and its rows.

    Args:
        name: of `TABLES`, or a YAML file `{row: [a.b=value, ...], ...}`, whose table is called as the file.
        base: config that the rows change.

    Raises:
        ConfigError: there is no such table, or the file is none.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, _read(name)
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"--table: there is no {name!r}{hint}; there are: {', '.join(sorted(TABLES))}, or give a YAML file of rows"
        )
    return name, TABLES[name](base)


def plan(base: Config, table: str, seeds: int) -> Ablation:
    """Resolve every cell, and build every row's model on the meta device; nothing is read or written.

    Args:
        base: config that the rows change; its `seed` is the first.
        table: see `rows_of`.
        seeds: trainings of a row.

    Raises:
        ConfigError: names the row and what is wrong with it.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds: at least one training of a row is needed, given {seeds}")
    name, rows = rows_of(table, base)
    configs = {row.name: _changed(base, row) for row in rows}
    _check_distinct(rows, configs)
    numbers = tuple(range(base.seed, base.seed + seeds))
    cells = tuple(Cell(row, seed, _cell(configs[row.name], row, seed, _url(base, name))) for seed in numbers for row in rows)
    parameters = {row.name: _parameters(row, configs[row.name]) for row in rows}
    same = [i for i, row in enumerate(rows) if _identity(configs[row.name]) == _identity(base)]
    return Ablation(name, base, rows, numbers, cells, parameters, reference=same[0] if same else 0)


def check(ablation: Ablation) -> None:
    """Refuse, before any cell runs, what could not train: as `preflight.check`, and a run of that name that was another training.

    Raises:
        ConfigError, DataError, StorageError, CheckpointError: one clear message that names the cell.
    """
    for cell in ablation.cells:
        with _named(cell):
            preflight.check(cell.config)
        folder = RunFolder.of(cell.config.run)
        last = folder.checkpoints()["last"]
        saved = from_mapping(folder.state(last).config) if last is not None else cell.config
        if saved.digest() != cell.config.digest():  # preflight.check admits other epochs; in a table they are another budget
            raise CheckpointError(
                f"{folder.url} was trained as another config ({'; '.join(differences(saved, cell.config))}): give the same one "
                "to continue, or another --set run.name=... to start afresh"
            )


def run(
    ablation: Ablation, *, facts: Mapping[str, str], on_progress: Callable[[Cell], Progress], stop: threading.Event
) -> Iterator[tuple[Cell, dict[str, Any] | RunError]]:
    """Train the cells that are not finished, one after the other, all rows of a seed before the next seed.

    A cell that fails does not keep the others from being trained; the same call tries it again.

    Args:
        ablation: checked; Ray is initialised.
        facts: about the table, for its records and the runs'.
        on_progress: gives what hears a cell's progress.
        stop: set it to have the running cell end with a checkpoint, and no further one begin.

    Yields:
        Each cell with its figures or its fault; the table is up to date then.

    Raises:
        ConfigError: the cluster has no room for a cell; nothing has run.
    """
    done = results(ablation)
    for cell in ablation.cells:
        if (cell.row.name, cell.seed) not in done:
            with _named(cell):
                resources(cell.config)
    publish(ablation, facts)
    told = {**facts, "table": ablation.url.rsplit("/", 1)[-1]}
    for cell in ablation.cells:
        if stop.is_set():
            return
        outcome: dict[str, Any] | RunError
        try:
            outcome = fit.fit(cell.config, facts=told, on_progress=on_progress(cell), stop=stop)
        except RunError as error:
            outcome = error
        publish(ablation, facts)
        yield cell, outcome


def results(ablation: Ablation) -> dict[tuple[str, int], dict[str, Any]]:
    """result.json of the cells that are finished, by row and seed."""
    found = {(cell.row.name, cell.seed): fit.finished(cell.config) for cell in ablation.cells}
    return {key: result for key, result in found.items() if result is not None}


def variants(ablation: Ablation, found: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[comparison.Variant]:
    """The rows with their cells' figures, and what they cost."""

    def variant(row: Row) -> comparison.Variant:
        results = [found.get((row.name, seed)) for seed in ablation.seeds]
        known = [result for result in results if result is not None]
        return comparison.Variant(
            row.name,
            tuple(None if result is None else result["best_top1"] for result in results),
            trained=ablation.parameters[row.name].trained,
            parameters=ablation.parameters[row.name].total,
            seconds=_mean([result["steps"] * result["step_seconds"] for result in known]),
            clips_per_second=_mean([result["clips_per_second"] for result in known]),
        )

    return [variant(row) for row in ablation.rows]


def publish(ablation: Ablation, facts: Mapping[str, str]) -> None:
    """Write the table as Markdown, LaTeX, JSON and a picture, of what is finished so far."""
    found = results(ablation)
    entries = variants(ablation, found)
    chance = next((result["chance"] for result in found.values() if "chance" in result), None)
    made = comparison.Table(entries, figure=FIGURE, seeds=ablation.seeds, reference=ablation.reference)
    filesystem, root = open_storage(ablation.url, write=True)
    drawn = drawing.png(comparison.picture(entries, figure=FIGURE, chance=chance))
    write_bytes(filesystem, join(root, "table.png"), drawn)
    write_bytes(filesystem, join(root, "table.md"), "\n".join(_page(ablation, made, chance, facts)).encode())
    write_bytes(filesystem, join(root, "table.tex"), "\n".join(comparison.latex(made)).encode())
    write_bytes(filesystem, join(root, "table.json"), json.dumps(_tree(ablation, made, found, facts), indent=1).encode())


def _page(ablation: Ablation, made: comparison.Table, chance: float | None, facts: Mapping[str, str]) -> Iterator[str]:
    train, done = ablation.base.train, sum(len(entry.known) for entry in made.variants)
    yield f"# {ablation.base.run.name}: {ablation.name}"
    yield ""
    yield from comparison.markdown(made)
    yield ""
    yield (
        f"Per cent{'' if chance is None else f'; guessing gives {100 * chance:.1f}'}. {done} of {len(ablation.cells)} trainings are "
        f"done. {comparison.explained(made)}"
    )
    yield ""
    yield f"The base trains {train.epochs} epochs with batches of {train.global_batch}; a row changes of it:"
    yield ""
    yield from (f"- {row.name}: {' '.join(f'`{setting}`' for setting in row.settings) or 'nothing'}" for row in ablation.rows)
    yield ""
    yield from (f"{name.replace('_', ' ')}: `{value}`  " for name, value in facts.items())
    yield ""


def _tree(
    ablation: Ablation,
    made: comparison.Table,
    found: Mapping[tuple[str, int], Mapping[str, Any]],
    facts: Mapping[str, str],
) -> dict[str, Any]:
    rows = [
        {
            "name": row.name,
            "settings": row.settings,
            "parameters": ablation.parameters[row.name]._asdict(),
            "mean": variant.mean,
            "spread": variant.spread,
            "seconds": variant.seconds,
            "clips_per_second": variant.clips_per_second,
            "difference": difference and asdict(difference),
            "results": {str(seed): found.get((row.name, seed)) for seed in ablation.seeds},
        }
        for row, variant, difference in zip(ablation.rows, made.variants, made.differences, strict=True)
    ]
    return {
        "table": ablation.name,
        "figure": FIGURE,
        "reference": ablation.rows[ablation.reference].name,
        "base": ablation.base.model_dump(mode="json"),
        "facts": {**facts},
        "rows": rows,
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _url(base: Config, table: str) -> str:
    return join(base.run.storage, f"{base.run.name}-{table}")


def _read(path: str) -> tuple[Row, ...]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(Path(path).read_text(encoding="utf-8")))  # refuses a row given twice
    except OSError as error:
        raise ConfigError(f"--table {path}: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--table {path}: not YAML: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"--table {path}: a mapping of rows is needed, as `concat: [model.fusion.name=concat]`")
    for name, settings in tree.items():
        if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
            raise ConfigError(f"--table {path}: row {name!s}: a list of a.b=value is needed, given {settings!r}")
    return tuple(Row(str(name), tuple(settings)) for name, settings in tree.items())


def _changed(base: Config, row: Row) -> Config:
    """The base with a row's changes, and no others.

    Raises:
        ConfigError: names the row.
    """
    taken = [s for s in row.settings if s.partition("=")[0].strip() in OWN]
    if taken:
        raise ConfigError(f"row {row.name}: {', '.join(taken)}: {', '.join(OWN)} are each cell's own; leave them out")
    try:
        return override(base, row.settings)
    except ConfigError as error:
        raise ConfigError(f"row {row.name}: {error}") from None


def _cell(config: Config, row: Row, seed: int, url: str) -> Config:
    own = {"seed": seed, "run": {"name": f"{row.name}-seed{seed}", "storage": url}}
    return from_mapping(config.model_dump(mode="json") | own)


@contextlib.contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Say which cell is refused."""
    try:
        yield
    except (ConfigError, DataError, StorageError, CheckpointError) as error:
        raise type(error)(f"row {cell.row.name}, seed {cell.seed}: {error}") from None


def _identity(config: Config) -> tuple[str, str | None]:
    """What two configs share that are one and the same training."""
    return config.digest(), config.data.url


def _check_distinct(rows: Sequence[Row], configs: Mapping[str, Config]) -> None:
    seen: dict[tuple[str, str | None], str] = {}
    for row in rows:
        config = configs[row.name]
        key = _identity(config)
        if key in seen:
            raise ConfigError(f"rows {seen[key]} and {row.name} are one and the same training; drop one of them")
        seen[key] = row.name


def _parameters(row: Row, config: Config) -> Parameters:
    try:
        model = preflight.check_model(config)
    except ConfigError as error:
        raise ConfigError(f"row {row.name}: {error}") from None
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Parameters(sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers))
