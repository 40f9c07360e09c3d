"""`jobs.ablate`: every row is refused or planned before anything runs; only missing cells are trained; the table says what is there."""

from __future__ import annotations

import json
import threading

import pytest

from jobs import ablate, cli
from tests import support
from tuning import ablations
from tuning.tables import TABLES
from vidfuse.config import ConfigError, override
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray import fit
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import StorageError, write_bytes
from vidfuse.presets import PRESETS, get
from vidfuse.train.errors import CheckpointError, RunError

TINY = [
    *("data.classes=3", "data.frames=4", "data.size=32", "data.block_bytes=100000", "data.buffer_bytes=16000000"),
    *("train.epochs=1", "train.global_batch=8", "train.micro_batch=4", "train.validate_every_epochs=1"),
    *("model.motion.channels=8", "model.fusion.width=16", "cluster.workers=1", "run.name=tiny"),
]


def dry_run(table: str, *settings: str, preset: str = "demo", seeds: int = 2) -> int:
    return ablate.main(
        ["--preset", preset, "--table", table, "--seeds", str(seeds), "--dry-run", "--set", *(settings or ("seed=0",))]
    )


def rows_file(folder, text: str) -> str:
    (folder / "rows.yaml").write_text(text)
    return str(folder / "rows.yaml")


CROSS = ("ssv2_cross_attention", "ssv2_cross_attention_r3d", "ssv2_cross_attention_dinov2")
JOINED = ("demo", "demo_single_frame", *CROSS, "ssv2_gasm_cast", "ssv2_cast", "ssv2_vjepa2_dinov3", "ssv2_vjepa2g_dinov3")
SUITED = {
    "fusion": JOINED,
    "heads": JOINED,
    "semantic": (*CROSS, "ssv2_gasm_cast", "ssv2_cast"),
    "motion": (*CROSS, "ssv2_gasm_cast", "ucf101_i3d"),
    "direction": JOINED,
    "graph": ("ssv2_gasm_cast",),
    "bottleneck": ("ssv2_gasm_cast", "ssv2_cast"),
    "temporal": ("ucf101_cnn_rnn",),
}
"""Presets that each table is for."""
REFUSED = {
    "fusion": r"model\.semantic is null",
    "heads": r"has the option heads: attentive, .* it is (mean|temporal_rnn)",
    "semantic": r"is one of dinov2, dinov3, clip, vit; it is (null|tiny_image)|multiples of 112; data\.size is 256",
    "motion": r"is one of i3d, r3d, r2plus1d, c3d; it is \w+",
    "direction": r"has the option direction: bcast, .* it is (mean|temporal_rnn)",
    "graph": r"is gasm_cast; it is \w+",
    "bottleneck": r"has the option bottleneck: bcast, gasm_cast; it is \w+",
    "temporal": r"is temporal_rnn; it is \w+",
}
"""What the others are told."""
ROWS = {"fusion": 6, "heads": 3, "semantic": 4, "motion": 4, "direction": 3, "graph": 3, "bottleneck": 4, "temporal": 4}


@pytest.mark.parametrize(("table", "preset"), [(table, preset) for table in TABLES for preset in SUITED[table]])
def test_every_table_is_planned(table, preset, capsys):
    assert dry_run(table, preset=preset) == 0
    own = table == "fusion" and preset in ("ssv2_gasm_cast", "ssv2_cast")  # their fusion is a row, too
    assert f"\n{2 * (ROWS[table] + own)} trainings in" in capsys.readouterr().out


@pytest.mark.parametrize("table", TABLES)
def test_a_base_that_does_not_suit_is_refused(table):
    for preset in sorted(PRESETS.keys() - set(SUITED[table])):
        with pytest.raises(ConfigError, match=rf"^--table {table} .*({REFUSED[table]})"):
            dry_run(table, preset=preset)


def test_rows_change_what_they_say_and_nothing_else():
    base = override(get("demo"), ["seed=5"])
    ablation = ablations.plan(base, "fusion", 3)
    assert ablation.seeds == (5, 6, 7) and len(ablation.cells) == 18
    models = {cell.row.name: cell.config.model for cell in ablation.cells}
    assert models["cross_attention"] == base.model
    assert models["concat"].fusion.name == "concat" and models["concat"].motion == base.model.motion
    assert models["sum"].fusion.options == {"operation": "sum", "width": 64}  # the base's width
    assert models["gated"].fusion.options == {"width": 64}
    assert (models["semantic_only"].motion, models["motion_only"].semantic) == (None, None)
    for cell in ablation.cells:
        assert (cell.config.data, cell.config.train, cell.config.seed) == (base.data, base.train, cell.seed)
        assert cell.config.run.storage == "runs/demo-fusion" and cell.config.run.name == f"{cell.row.name}-seed{cell.seed}"
    assert len({cell.config.run.name for cell in ablation.cells}) == 18


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("wrong: [model.fusion.nmae=concat]", ["row wrong", "nmae"]),
        ("good: [model.fusion.name=concat]\nwrong: [model.fusion.hedas=2]", ["row wrong", "hedas", "did you mean heads"]),
        ("wrong: [train.epochs=0]", ["row wrong", "train.epochs"]),
        ("wrong: [seed=3]", ["row wrong", "seed=3", "leave them out"]),
        ("a: [train.epochs=2]\nb: [train.epochs=2]", ["rows a and b", "same training"]),
        ("'a/b': [train.epochs=2]", ["a/b", "letters"]),
        ("a: train.epochs=2", ["row a", "list of a.b=value"]),
        ("[1, 2]", ["mapping of rows"]),
        ("a: [", ["not YAML"]),
        ("a: [train.epochs=2]\na: [train.epochs=3]", ["duplicate key"]),
    ],
)
def test_a_wrong_row_is_named(rows, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        dry_run(rows_file(tmp_path, rows))
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_tables_and_seeds(tmp_path):
    with pytest.raises(ConfigError, match="did you mean fusion"):
        dry_run("fusions")
    with pytest.raises(ConfigError, match="No such file"):
        dry_run(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="--seeds"):
        dry_run("fusion", seeds=0)
    with pytest.raises(ConfigError, match=r"model\.semantic is null"):
        dry_run("fusion", preset="ucf101_videomae")


@pytest.fixture(scope="module")
def packed(ray_cluster, tmp_path_factory) -> str:
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": 9, "validation": 6})
    place = tmp_path_factory.mktemp("packed")
    pack(prepare(read_layout(source, "ssv2"), source, str(place), 100_000))
    return str(place)


@pytest.fixture
def command(packed, tmp_path, monkeypatch):
    """Runs the job in this process's cluster."""
    monkeypatch.setattr(cli, "start_ray", lambda: None)
    rows = rows_file(tmp_path, "concat: [model.fusion.name=concat]\nmotion: [model.fusion.name=concat, model.semantic=null]")

    def call(*settings: str, seeds: int = 1, table: str = rows) -> int:
        places = [f"data.url={packed}", f"run.storage={tmp_path / 'runs'}"]
        return ablate.main(["--preset", "demo", "--table", table, "--seeds", str(seeds), "--set", *TINY, *places, *settings])

    return call


@pytest.mark.ray
def test_a_cell_is_trained_through_the_main_path(command, tmp_path, capsys):
    rows = rows_file(tmp_path, "motion: [model.fusion.name=concat, model.semantic=null]")
    assert command(table=rows) == 0
    place, said = tmp_path / "runs" / "tiny-rows", capsys.readouterr().out
    result = json.loads((place / "motion-seed0" / "result.json").read_text())
    assert result["state"] == "finished" and result["steps"] == 2  # 9 videos in batches of 8
    assert json.loads((place / "motion-seed0" / "run.json").read_text())["table"] == "tiny-rows"
    assert f"motion-seed0: finished, best top-1 {result['best_top1']}" in said
    assert (place / "table.png").read_bytes().startswith(b"\x89PNG")
    top1 = f"{100 * result['best_top1']:.1f}"
    assert f"| {result['clips_per_second']:.1f} | {top1} | {top1} | - | - |" in (place / "table.md").read_text()
    assert f"{top1} & {top1} & - & - " in (place / "table.tex").read_text()
    with pytest.raises(CheckpointError, match=r"train\.epochs: 1 -> 2"):  # another budget is another table
        command("train.epochs=2", table=rows)


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Names of the runs that are trained, by a stand-in for the main path that leaves figures alone; `concat` fails at first."""
    names: list[str] = []

    def fitted(config, **_):
        done = fit.finished(config)
        if done is not None:
            return done
        names.append(config.run.name)
        if names.count("concat-seed0") == 1 and config.run.name == "concat-seed0":
            raise RunError("the machine is gone")
        top1 = 0.5 if config.model.semantic is None else 0.25 + 0.5 * config.seed
        result = {"state": "finished", "epochs": config.train.epochs, "best_top1": top1, "chance": 0.4}
        result |= {"steps": 10, "step_seconds": 1.0 + config.seed, "clips_per_second": 8.0}
        folder = RunFolder.of(config.run)
        folder.filesystem.create_dir(folder.root)
        write_bytes(folder.filesystem, f"{folder.root}/result.json", json.dumps(result).encode())
        return result

    monkeypatch.setattr(fit, "fit", fitted)
    return names


@pytest.mark.ray
def test_only_missing_cells_are_trained_and_the_table_has_all(command, trained, tmp_path):
    place = tmp_path / "runs" / "tiny-rows"
    assert command() == 1 and trained == ["concat-seed0", "motion-seed0"]  # one that fails leaves the others
    assert "1 of 2 trainings" in (place / "table.md").read_text()
    trained.append("-")
    assert command() == 0 and trained[3:] == ["concat-seed0"]
    assert command() == 0 and trained[4:] == []
    assert command(seeds=2) == 0 and trained[4:] == ["concat-seed1", "motion-seed1"]
    page, tree = (place / "table.md").read_text(), json.loads((place / "table.json").read_text())
    assert "4 of 4 trainings" in page and "guessing gives 40.0" in page
    rows = {row["name"]: row for row in tree["rows"]}
    sizes = {name: " | ".join(f"{number:,}" for number in row["parameters"].values()) for name, row in rows.items()}
    # Seeds 0 and 1 take 10 and 20 s; 0.25 and 0.75 deviate by 0.5 / sqrt(2); two seeds are too few for a test.
    assert f"| concat | {sizes['concat']} | 15 | 8.0 | 50.0 ± 35.4 | 25.0, 75.0 | - | - |" in page
    assert f"| motion | {sizes['motion']} | 15 | 8.0 | 50.0 ± 0.0 | 50.0, 50.0 | +0.0 | - |" in page
    assert r"50.0 $\pm$ 35.4 & 25.0, 75.0 & - & - \\" in (place / "table.tex").read_text()
    assert tree["reference"] == "concat" and rows["motion"]["difference"]["seeds"] == 2
    assert [rows["concat"]["results"][seed]["best_top1"] for seed in ("0", "1")] == [0.25, 0.75]


@pytest.mark.ray
def test_asked_to_stop_no_further_cell_begins(command, trained, monkeypatch):
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(cli, "stop_event", lambda: stop)
    assert command() == 0 and trained == []


@pytest.mark.ray
def test_a_bad_last_row_is_refused_before_the_first_is_trained(command, trained, tmp_path):
    rows = rows_file(tmp_path, "concat: [model.fusion.name=concat]\nelsewhere: [data.url=/no/such/place]")
    with pytest.raises(StorageError, match=r"row elsewhere, seed 0: .*no/such/place"):
        command(table=rows)
    rows = rows_file(tmp_path, "concat: [model.fusion.name=concat]\nmany: [train.micro_batch=2, data.buffer_bytes=1000]")
    with pytest.raises(ConfigError, match=r"row many.*buffer_bytes"):
        command(table=rows)
    assert trained == []
