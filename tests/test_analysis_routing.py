"""Routing as arrays and images."""

import json

import numpy as np
import pytest
import torch
from answer_parts import make_answerer, picture, save_model
from PIL import Image
from tower_parts import make_tower, open_output, pixels

from tove_llava import cli
from tove_llava.analysis.routing_maps import seen_image, show_routing
from tove_llava.core.errors import ConfigError, DataError
from tove_llava.inference.engine import Engine
from tove_llava.inference.routing_map import RoutingMap, routing_map


def test_grid_is_the_towers_routing_in_reading_order(tmp_path):
    tower = make_tower(tmp_path, opened=True, null_slot=True)
    image = pixels(1)
    found = routing_map(tower, image[0])
    assert found.names == ("depth", "edge", "normal", "none") and found.weights.shape == (4, 4, 4)
    with torch.no_grad():
        assert torch.equal(found.weights[1, 2], tower(image).routing[0, 1 * 4 + 2])
    torch.testing.assert_close(found.weights.sum(dim=-1), torch.ones(4, 4))


def test_means_and_argmax():
    weights = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.7, 0.3]]])
    found = RoutingMap(("a", "b"), weights)
    assert found.means == pytest.approx({"a": 0.7, "b": 0.3})
    assert found.argmax.tolist() == [[0, 1], [0, 0]] and found.chosen == {"a": 0.75, "b": 0.25}


def test_the_chat_reports_the_same_numbers(answerer):
    found = routing_map(answerer.tower, answerer.pixels(picture(), upright=True))
    chat = Engine(answerer).routing(picture())
    assert chat.means == found.means
    assert chat.grids["edge"] == found.weights[..., 1].tolist()


def test_the_image_is_what_the_model_sees(answerer):
    image = Image.new("RGB", (40, 20), (10, 200, 30))
    seen = np.asarray(seen_image(answerer.pixels(image), answerer.tower.config))
    assert seen.shape == (32, 32, 3)
    assert np.abs(seen[16, 16].astype(int) - (10, 200, 30)).max() <= 1
    assert np.abs(seen[1, 16].astype(int) - (122, 116, 104)).max() <= 1, "padded with the mean colour above"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved"))


def test_command_writes_maps_and_arrays(folder, tmp_path, capsys):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    picture(0).save(tmp_path / "a" / "scene.png")
    picture(1).save(tmp_path / "b" / "scene.png")
    picture(2, size=(20, 50)).save(tmp_path / "tall.png")
    files = [str(tmp_path / name) for name in ("a/scene.png", "b/scene.png", "tall.png")]
    arguments = ["routing", "--model", str(folder), "--out", str(tmp_path / "out"), "--image", *files]
    assert cli.main(arguments) == 0
    assert "tall.png" in capsys.readouterr().out
    names, stems = ["argmax", "weight_depth", "weight_edge", "weight_normal"], ("scene_1", "scene_2", "tall")
    wanted = {f"{stem}_{name}.png" for stem in stems for name in names} | {f"{stem}.npz" for stem in stems}
    assert {file.name for file in (tmp_path / "out").iterdir()} == wanted
    for file in (tmp_path / "out").glob("*.png"):
        with Image.open(file) as plot:
            assert plot.size == (640, 520)
    arrays = [np.load(tmp_path / "out" / f"{stem}.npz") for stem in stems]
    for array in arrays:
        assert array["routing"].shape == (4, 4, 3) and array["names"].tolist() == ["depth", "edge", "normal"]
        np.testing.assert_allclose(array["routing"].sum(axis=-1), 1, rtol=1e-5)
    assert not np.array_equal(arrays[0]["routing"], arrays[1]["routing"])
    assert cli.main([*arguments[:-2], "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["images"]
    assert sum(row["means"].values()) == pytest.approx(1) and len(row["files"]) == 5


def test_a_detached_expert_has_no_heat_map(tmp_path):
    answerer = make_answerer(tmp_path / "parts")
    open_output(answerer.tower)
    picture().save(tmp_path / "p.png")
    answerer.tower.detach_experts("edge")
    ((_, found, files),) = show_routing(answerer, [tmp_path / "p.png"], tmp_path / "out")
    assert "p_weight_edge.png" not in {file.name for file in files} and found.means["edge"] == 0


def test_bad_input_is_named(folder, tmp_path, capsys):
    answerer = make_answerer(tmp_path / "parts")
    answerer.tower.detach_experts(["depth", "edge", "normal"])
    picture().save(tmp_path / "p.png")
    with pytest.raises(ConfigError, match="no experts to route to"):
        show_routing(answerer, [tmp_path / "p.png"], tmp_path / "out")
    answerer.tower.attach_experts(["depth", "edge", "normal"])
    with pytest.raises(DataError, match="gone.png"):
        show_routing(answerer, [tmp_path / "p.png", tmp_path / "gone.png"], tmp_path / "out")
    assert cli.main(["routing", "--model", "nowhere", "--image", "x.png", "--out", str(tmp_path / "out")]) == 2
    assert "there is no model folder nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
