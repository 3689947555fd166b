"""The playground's scenes: exact geometry, true answers, fair questions, reproducible files."""

import filecmp
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.records import parse_record
from tove_llava.scenes import Scene, ask, caption, describe, render, sample_scene
from tove_llava.scenes.language import CATEGORIES, SHORT_ANSWER, contrast
from tove_llava.scenes.objects import SHAPES, Camera, Object
from tove_llava.scenes.render import CLASSES, FAR, GROUND, SKY, coverage
from tove_llava.scenes.world import HELD_OUT_PAIRS, scene_rng
from tove_llava.scenes.writer import Request, instruct_record, write_scenes


def scenes(count, split="train", seed=5):
    return [sample_scene(seed, split, index) for index in range(count)]


def single(shape, radius=1.0, angle=0.0):
    """Make a scene of one object, seen along +y from ten metres."""
    camera = Camera.look_at(np.array([0.0, -10.0, 5.0]), np.array([0.0, 0.0, 5.0]), fov_degrees=40.0)
    item = Object(shape, "red", "matte", radius, (0.0, 0.0, 5.0), angle)
    return Scene(0, "train", 0, camera, (0.0, 0.0, 1.0), 0.4, (0.5,) * 3, (0.8,) * 3, [item])


@pytest.mark.parametrize(("shape", "depth"), [("sphere", 9.0), ("cube", 9.15), ("cylinder", 9.25), ("cone", 9.5)])
def test_depth_of_each_solid_is_exact_at_the_middle_of_the_image(shape, depth):
    rendering = render(single(shape), size=97)  # odd: one pixel looks exactly along the axis
    assert rendering.depth[48, 48] == pytest.approx(depth, abs=1e-4)
    assert rendering.instances[48, 48] == 0
    assert CLASSES[rendering.classes[48, 48]] == shape


def test_normals_are_in_camera_axes():
    sphere = render(single("sphere"), size=97)
    assert sphere.normals[48, 48] == pytest.approx([0, 0, 1], abs=1e-4)  # towards the viewer
    row, column = np.argwhere(sphere.instances == 0)[0]  # the topmost pixel of the sphere looks up
    assert sphere.normals[row, column, 1] > 0.9
    cube = render(single("cube", angle=np.pi / 4), size=97)  # an upright edge faces the viewer
    left, right = cube.normals[48, 40], cube.normals[48, 56]
    assert left == pytest.approx([-(0.5**0.5), 0, 0.5**0.5], abs=1e-4)
    assert right == pytest.approx([0.5**0.5, 0, 0.5**0.5], abs=1e-4)
    assert cube.edges[40:56, 47:50].any(axis=1).all(), "the crease between two faces is an edge"


def test_the_silhouette_of_a_sphere_has_the_area_that_projection_gives():
    rendering = render(single("sphere"), size=256)
    expected = np.pi * (np.tan(np.arcsin(1.0 / 10.0)) / np.tan(np.radians(20.0)) / 2) ** 2
    assert (rendering.instances == 0).mean() == pytest.approx(expected, rel=0.02)


def test_maps_agree_with_each_other_on_every_scene():
    for scene in scenes(30):
        r = render(scene, 64)
        sky, ground, solid = r.instances == SKY, r.instances == GROUND, r.instances >= 0
        assert (r.depth[sky] == FAR).all() and (r.normals[sky] == 0).all()
        assert np.allclose(np.linalg.norm(r.normals[~sky], axis=-1), 1.0, atol=1e-3)
        steps = ((np.arange(64) + 0.5) / 32 - 1) * scene.camera.tangent
        towards_eye = np.stack([-steps[None, :] + 0 * r.depth, steps[:, None] + 0 * r.depth, np.ones_like(r.depth)], -1)
        facing = (r.normals * towards_eye).sum(-1)[solid]
        assert (facing > -1e-3).all(), "a visible surface does not face away"
        assert (r.classes[ground] == CLASSES.index("ground")).all()
        for index, item in enumerate(scene.objects):
            mine = r.instances == index
            assert mine.any() and (r.classes[mine] == CLASSES.index(item.shape)).all()
            assert (np.abs(r.depth[mine] - item.depth) < 1.6 * item.radius).all()
            rows, columns = np.nonzero(mine)
            assert abs(columns.mean() / 64 - item.u) < 0.05 and abs(rows.mean() / 64 - item.v) < 0.05
        assert not (r.edges & sky & np.roll(sky, 1, 0) & np.roll(sky, 1, 1)).any()


def test_coverage_sums_to_the_visible_area():
    for scene in scenes(10):
        assert coverage(scene, 6).mean(axis=(0, 1)) == pytest.approx([o.area for o in scene.objects], abs=1e-6)


def test_splits_are_independent_and_scenes_reproducible():
    assert sample_scene(1, "train", 3) == sample_scene(1, "train", 3)
    others = ((1, "val", 3), (1, "parts", 3), (2, "train", 3), (1, "train", 4))
    different = [sample_scene(*other) for other in others]
    assert all(sample_scene(1, "train", 3).to_dict()["objects"] != other.to_dict()["objects"] for other in different)
    assert scene_rng(1, "val", 2, 0).random() != scene_rng(1, "val", 2, 1).random()


def test_held_out_pairs_occur_only_in_the_novel_split():
    for split in ("train", "val", "parts"):
        for scene in scenes(150, split):
            assert not HELD_OUT_PAIRS & {o.pair for o in scene.objects}
            texts = [caption(scene, np.random.default_rng(0)), *(q.text for q in ask(scene, np.random.default_rng(0)))]
            assert not any(f"{c} {s}" in text for c, s in HELD_OUT_PAIRS for text in texts)
    for scene in scenes(30, "novel"):
        assert HELD_OUT_PAIRS & {o.pair for o in scene.objects}


def truth(scene, question):
    """Answer from the question's words and the world, by separate rules."""
    by_name = {o.name: o for o in scene.objects}
    names = re.findall(rf"(?:red|green|blue|yellow|purple|cyan|orange|white) (?:{'|'.join(SHAPES)})", question)
    if question.startswith("Is there"):
        return "Yes" if names[0] in by_name else "No"
    if question.startswith("How many"):
        word = question.split()[2]
        return str(sum(word in ("objects", o.colour, o.shape + "s") for o in scene.objects))
    if question.startswith("What color"):
        (item,) = [o for o in scene.objects if f"the {o.shape}?" in question]
        return item.colour
    if question.startswith("What shape"):
        (item,) = [o for o in scene.objects if f" {o.colour} " in question]
        return item.shape
    a, b = (by_name[name] for name in names)
    if question.startswith("Which"):
        word = re.match(r"Which is (\w+)", question)[1]
        choose = min if word in ("closer", "smaller") else max
        return choose((a, b), key=lambda o: o.depth if word in ("closer", "farther") else o.radius).name
    holds = {"left of": a.u < b.u, "above": a.v < b.v, "in front of": a.depth < b.depth}
    holds |= {"right of": a.u > b.u, "below": a.v > b.v, "behind": a.depth > b.depth}
    (claim,) = [value for words, value in holds.items() if f"{words} the {b.name}" in question]
    return str(claim) if "true or false" in question else ("Yes" if claim else "No")


def test_every_answer_is_true():
    for scene in scenes(200):
        for question in ask(scene, np.random.default_rng(scene.index)):
            assert question.answer == truth(scene, question.text), question


def test_answers_are_balanced_and_every_category_is_asked():
    answers, first_named = defaultdict(Counter), Counter()
    for scene in scenes(600):
        for question in ask(scene, np.random.default_rng(scene.index)):
            answers[question.category][question.answer] += 1
            if question.category in ("nearer", "bigger"):
                first_named[question.text.split(", the ")[1].startswith(question.answer)] += 1
    assert set(answers) == set(CATEGORIES)
    for category in ("existence", "left_right", "above_below", "front_behind", "statement"):
        counts = answers[category]
        assert len(counts) == 2 and max(counts.values()) / counts.total() < 0.57, (category, counts)
    for category, share in (("counting", 0.4), ("colour", 0.25), ("shape", 0.35)):
        assert max(answers[category].values()) / answers[category].total() < share
    assert abs(first_named[True] / first_named.total() - 0.5) < 0.07


def test_place_in_the_image_does_not_give_depth_or_size_away():
    items = [(o.v, o.depth, o.area, o.radius) for scene in scenes(400) for o in scene.objects]
    height, depth, area, radius = np.array(items).T
    assert abs(np.corrcoef(height, depth)[0, 1]) < 0.6
    assert np.corrcoef(np.sqrt(area), radius)[0, 1] < 0.85


def test_a_description_names_every_object_from_left_to_right():
    scene = scenes(1)[0]
    names = re.findall(r"(\w+ \w+) at [A-F][1-6], \w+ metres, \w+\.", describe(scene))
    assert names == [o.name for o in sorted(scene.objects, key=lambda o: o.u)]


def test_files_are_identical_for_one_seed_and_read_by_the_data_path(tmp_path):
    request = Request({"train": 4, "val": 3, "novel": 1}, seed=9, size=64, maps=True)
    assert write_scenes(request, tmp_path / "a") and write_scenes(request, tmp_path / "b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    _, different, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", [str(f) for f in files], shallow=False)
    assert not different and not missing

    for name in ("train_captions", "train_instruct", "val_captions", "val_instruct", "novel_instruct"):
        for raw in json.loads((tmp_path / "a" / f"{name}.json").read_text()):
            record = parse_record(raw)
            with Image.open(tmp_path / "a" / "images" / raw["image"]) as image:
                assert image.size == (64, 64)
            assert record.images
    rows = [json.loads(line) for line in (tmp_path / "a" / "val_questions.jsonl").read_text().splitlines()]
    assert len({row["question_id"] for row in rows}) == len(rows) > 15
    scene = sample_scene(9, "val", 0)
    with Image.open(tmp_path / "a" / "maps" / "depth" / "val_000000.png") as image:
        assert np.allclose(np.asarray(image) / 1000, render(scene, 64).depth, atol=6e-4)
    with Image.open(tmp_path / "a" / "images" / "val_000000.png") as image:
        assert (np.asarray(image) == render(scene, 64).image).all()


def test_half_of_the_conversations_go_without_the_request_for_a_short_answer():
    for scene in scenes(6):
        questions = ask(scene, scene_rng(5, "train", scene.index, 1))
        opening = instruct_record(scene, "x.png", questions)["conversations"][0]["value"]
        assert opening.startswith(f"<image>\n{questions[0].text}")
        assert opening.endswith(SHORT_ANSWER) == (scene.index % 2 == 0)


def test_contrasts_agree_with_the_world():
    for scene in scenes(20):
        a, b = scene.objects[:2]
        text, answer = contrast(a, b)
        assert text == f"How does the {a.name} compare with the {b.name}?"
        sides = ("left", "right"), ("above", "below"), ("closer", "farther"), ("smaller", "bigger")
        values = (a.u, b.u), (a.v, b.v), (a.depth, b.depth), (a.radius, b.radius)
        assert answer.split(", ") == [side[x >= y] for side, (x, y) in zip(sides, values, strict=True)]


def test_pope_files_are_balanced_and_true(tmp_path):
    write_scenes(Request({"val": 12}, seed=2), tmp_path / "s")
    worlds = [json.loads(line) for line in (tmp_path / "s" / "val_worlds.jsonl").read_text().splitlines()]
    present = {f"val_{w['index']:06d}.png": {f"{o['colour']} {o['shape']}" for o in w["objects"]} for w in worlds}
    for category in ("random", "popular", "adversarial"):
        lines = (tmp_path / "s" / "pope" / "coco" / f"coco_pope_{category}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert Counter(r["label"] for r in rows)["yes"] == len(rows) / 2 > 0
        for row in rows:
            named = re.search(r"an? (\w+ \w+) in", row["text"])[1]
            assert (named in present[row["image"]]) == (row["label"] == "yes")


def test_what_is_there_is_reused_and_never_overwritten(tmp_path):
    request = Request({"train": 2}, seed=1)
    assert write_scenes(request, tmp_path / "s")
    stamp = (tmp_path / "s" / "train_captions.json").stat().st_mtime_ns
    assert not write_scenes(request, tmp_path / "s"), "already there"
    assert (tmp_path / "s" / "train_captions.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="different: seed"):
        write_scenes(Request({"train": 2}, seed=2), tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="holds no scenes"):
        write_scenes(request, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path):
    def interrupt(done, total, seconds):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(Request({"train": 4}), tmp_path / "s", interrupt)
    assert not (tmp_path / "s").exists()
    assert write_scenes(Request({"train": 4}), tmp_path / "s")


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    """The second writer begins and ends during the first one's images."""
    request, seen = Request({"train": 3}), []

    def meanwhile(done, total, seconds):
        if done == 2:
            seen.append(write_scenes(request, tmp_path / "s"))

    assert not write_scenes(request, tmp_path / "s", meanwhile), "already there"
    assert seen == [True]
    assert write_scenes(request, tmp_path / "other")
    files = [file for file in (tmp_path / "other").rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        assert (tmp_path / "s" / file.relative_to(tmp_path / "other")).read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"s", "other"}, "nothing is left behind"


def test_a_writer_overtaken_by_other_scenes_gets_an_error(tmp_path):
    def meanwhile(done, total, seconds):
        if done == 1:
            write_scenes(Request({"train": 1}, seed=5), tmp_path / "s")

    with pytest.raises(DataError, match="different: counts, seed"):
        write_scenes(Request({"train": 2}), tmp_path / "s", meanwhile)
    assert json.loads((tmp_path / "s" / "scenes.json").read_text())["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [("size", 8, "size"), ("seed", -1, "seed"), ("counts", {"train": 0}, "train"), ("image_format", "bmp", "format")],
)
def test_bad_requests_name_the_flag(key, value, flag):
    with pytest.raises(ConfigError, match=f"--{flag}"):
        Request(**{"counts": {"train": 1}, key: value})
