"""Rows of the named tables: what each changes of its base, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from tuning import ablations
from tuning.tables import TABLES
from vidfuse.config import Config, ConfigError, ModelConfig, override
from vidfuse.models import select
from vidfuse.models.parts import Tokens
from vidfuse.on_ray import preflight
from vidfuse.presets import get


def models(table: str, base: Config) -> dict[str, ModelConfig]:
    return {row.name: override(base, row.settings).model for row in TABLES[table](base)}


@pytest.mark.parametrize(
    ("table", "preset", "row"),
    [
        ("fusion", "ssv2_gasm_cast", "gasm_cast"),
        ("heads", "ssv2_cross_attention", "heads_8"),
        ("semantic", "ssv2_cross_attention", "dinov3"),
        ("motion", "ssv2_cross_attention_r3d", "r3d"),
        ("direction", "ssv2_cross_attention", "both"),
        ("graph", "ssv2_gasm_cast", "graph"),
        ("bottleneck", "ssv2_cast", "half"),
        ("temporal", "ucf101_cnn_rnn", "full"),
    ],
)
def test_the_row_that_is_the_base_changes_nothing_and_is_the_reference(table, preset, row):
    ablation = ablations.plan(get(preset), table, 1)
    assert ablation.rows[ablation.reference] == ablations.Row(row)


def test_without_such_a_row_the_first_is_the_reference():
    ablation = ablations.plan(override(get("ssv2_cross_attention"), ["model.fusion.heads=2"]), "heads", 1)
    assert ablation.reference == 0 and all(row.settings for row in ablation.rows)


def test_images_are_looked_at_by_transformers_of_one_size():
    base = override(get("ssv2_cross_attention"), ["model.semantic.weights=pretrained", "model.semantic.grid=[16,7,7]"])
    found = {name: model.semantic for name, model in models("semantic", base).items()}
    assert {name: s.options["variant"] for name, s in found.items()} == {
        **{"dinov2": "vits14", "dinov3": "vits16plus", "clip": "vitb16", "vit": "vits16"}  # there is no CLIP of size S
    }
    assert all((s.weights, s.frozen, s.grid) == ("pretrained", True, (16, 7, 7)) for s in found.values())
    large = override(base, ["model.semantic.variant=vith16plus"])
    assert {name: m.semantic.options["variant"] for name, m in models("semantic", large).items()} == {
        **{"dinov2": "vitl14", "dinov3": "vith16plus", "clip": "vitl14", "vit": "vitl16"}
    }


def test_another_backbone_keeps_adapters_and_shared_options():
    base = override(get("ssv2_cast"), ["model.semantic.adapters.ratio=0.125"])
    for name, model in models("semantic", base).items():
        assert model.semantic.adapters == base.model.semantic.adapters
        assert model.semantic.options == {**base.model.semantic.options, "variant": model.semantic.options["variant"]}, name
        assert (model.motion, model.fusion) == (base.model.motion, base.model.fusion)


def test_another_video_network_keeps_what_it_has_an_option_for():
    base = override(get("ssv2_gasm_cast"), ["model.motion.weights=pretrained", "model.motion.stage=layer3"])
    found = {name: model.motion for name, model in models("motion", base).items()}
    assert found["r2plus1d"].options == {"batch_norm": "frozen", "segments": 8, "stage": "layer3"}
    assert found["i3d"].options == {"batch_norm": "frozen"} and found["c3d"].options == {}
    assert all((m.weights, m.frozen) == ("pretrained", False) for m in found.values())
    assert models("motion", base)["i3d"].max_trainable_parameters is None
    assert models("motion", base)["r3d"].max_trainable_parameters == 50_000_000


def test_weights_of_one_backbone_and_clips_that_another_cannot_take_are_refused():
    with pytest.raises(ConfigError, match=r"model\.motion\.weights is i3d\.pth, which fits i3d alone"):
        models("motion", override(get("ucf101_i3d"), ["model.motion.weights=i3d.pth"]))
    with pytest.raises(ConfigError, match=r"row c3d: .*data\.frames is 8 or more"):
        ablations.plan(override(get("ucf101_i3d"), ["data.frames=4"]), "motion", 1)


def test_without_graphs_the_exchanges_stay_and_complete_graphs_are_as_large():
    base = override(get("ssv2_gasm_cast"), ["model.fusion.layers=2", "model.fusion.windows=none", "model.fusion.dropout=0"])
    configs = {row.name: override(base, row.settings) for row in TABLES["graph"](base)}
    graph, complete, none = ({n: p.shape for n, p in preflight.check_model(c).named_parameters()} for c in configs.values())
    assert graph == complete
    assert none == {name: shape for name, shape in graph.items() if not name.startswith("fusion.graphs.")}
    kept = {"layers": 2, "bottleneck": 256, "heads": 8, "direction": "both", "windows": "none", "dropout": 0.0}
    assert configs["none"].model.fusion.options == {"placement": "late", **kept}


def test_complete_graphs_join_all_patches_of_a_frame_and_all_segments_of_a_place():
    base = get("ssv2_gasm_cast")
    options = models("graph", base)["complete"].fusion.options | {"bottleneck": 8, "heads": 2}
    made = select.build("fusion", "gasm_cast", widths={"semantic": 8, "motion": 8}, **options)
    times = (torch.arange(base.data.frames) + 0.5) / base.data.frames
    places = torch.tensor([0.25, 0.75])
    tokens = Tokens(torch.randn(2, 4 * len(times), 8), torch.cartesian_prod(times, places, places))
    for windows, edges in (made._spatial(tokens), made._temporal(tokens)):
        assert all(among.all() for among in edges)
        assert {w.keys.shape[1] for w in windows} in ({4}, {len(times)})


@pytest.mark.parametrize(("heads", "widths"), [(8, (96, 192, 384, 768)), (10, (100, 200, 390, 770))])
def test_bottlenecks_are_shares_of_the_wider_stream_in_whole_heads(heads, widths):
    base = override(get("ssv2_gasm_cast"), [f"model.fusion.heads={heads}", "model.fusion.bottleneck=40"])
    assert [m.fusion.options["bottleneck"] for m in models("bottleneck", base).values()] == list(widths)


def test_a_cnn_rnn_is_simplified_by_one_thing_and_by_both():
    found = {name: m.fusion.options for name, m in models("temporal", get("ucf101_cnn_rnn")).items()}
    assert found == {
        "full": {},
        "no_attention": {"attention": False},
        "one_direction": {"bidirectional": False},
        "neither": {"attention": False, "bidirectional": False},
    }
