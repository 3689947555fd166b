"""Every field of every key by which something computed earlier is used again."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from answer_parts import make_scenes
from tower_parts import IMAGE, expert_entries, text_config, tower_config
from train_parts import flags, write_inputs

from tove_llava.checkpoints.loading import tower_differences
from tove_llava.checkpoints.weight_fingerprints import exact_fingerprint, sampled_digest
from tove_llava.core.errors import CheckpointError, ConfigError, DataError
from tove_llava.eval.benchmarks import Question, get_benchmark
from tove_llava.eval.conditions import FULL, Condition
from tove_llava.eval.judge import Judge
from tove_llava.eval.judge import Request as JudgeRequest
from tove_llava.eval.result_files import data_fingerprint
from tove_llava.eval.runner import Settings, run_benchmark
from tove_llava.eval.tasks import Decoding, Task
from tove_llava.experts.expert_hub import ExpertHub
from tove_llava.experts.from_spec import complete_specs
from tove_llava.llava import ToveLlavaConfig
from tove_llava.scenes.writer import Request as SceneRequest
from tove_llava.scenes.writer import write_scenes
from tove_llava.train.arguments import parse
from tove_llava.train.feature_cache import check_part, describe_parts, read_description, write_part
from tove_llava.train.run_files import RUN_RECORD
from tove_llava.train.run_record import is_finished, run_record


def names(kind):
    return {field.name for field in dataclasses.fields(kind)}


# -- a judge's replies -------------------------------------------------------------------------------------------------

ASKED = JudgeRequest(({"role": "user", "content": "Good?"},), 0.0, 8)
OTHER_REQUESTS = {
    "messages": [({"role": "user", "content": "Bad?"},), ({"role": "system", "content": "Good?"},)],
    "temperature": [0.5],
    "max_tokens": [9],
}


class ToldJudge(Judge):
    def _client(self):
        return None

    def _call(self, client, request):
        return "yes"


def judge_calls(cache, request, model="m"):
    def exchange():
        return (yield request)

    judge = ToldJudge("http://127.0.0.1:9/v1", model, cache)
    assert judge.hold([exchange()]) == ["yes"]
    return judge.calls


def test_a_judges_reply_belongs_to_a_model_and_every_part_of_a_request(tmp_path):
    cache = tmp_path / "replies.jsonl"
    assert judge_calls(cache, ASKED) == 1 and judge_calls(cache, ASKED) == 0
    assert judge_calls(cache, ASKED, model="n") == 1
    assert set(OTHER_REQUESTS) == names(JudgeRequest)
    for key, values in OTHER_REQUESTS.items():
        for value in values:
            assert judge_calls(cache, dataclasses.replace(ASKED, **{key: value})) == 1, key


# -- answers on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    make_scenes(root := tmp_path_factory.mktemp("scenes"), images=1, questions_each=1)
    return root


def test_answers_belong_to_every_setting_of_their_run(answerer, scenes, tmp_path):
    task = Task.read("scenes", get_benchmark("scenes"), scenes, None)
    task = dataclasses.replace(task, decoding=Decoding(4))
    (question,) = task.questions
    benchmark = type("Other", (type(task.benchmark),), {})()

    def answer(answerer=answerer, task=task, condition=FULL, **settings):
        return run_benchmark(answerer, task, tmp_path, condition, Settings(**{"model_id": "m", **settings}), label=None)

    def asking(**changes):
        questions = [dataclasses.replace(question, **changes)]
        return {"task": dataclasses.replace(task, questions=questions, asked=questions)}

    def decoding(**changes):
        return {"task": dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, **changes))}

    square, half, moved = (copy.copy(answerer) for _ in range(3))
    square.transform = copy.copy(answerer.transform)
    square.transform.aspect_ratio = "square"
    half.model = copy.deepcopy(answerer.model).bfloat16()
    moved.model = copy.deepcopy(answerer.model)
    moved.model.model.multi_modal_projector.linear_1.weight.data += 1
    others = {
        "benchmark": [{"task": dataclasses.replace(task, benchmark=benchmark)}],
        "questions": [asking(text="Why?"), asking(question_id="other"), asking(image=scenes / "images" / "b.png")],
        "model": [{"model_id": "n"}],
        "weights": [{"answerer": moved}],
        "template": [{"answerer": answerer.with_template("plain")}],
        "image_aspect_ratio": [{"answerer": square}],
        "dtype": [{"answerer": half}],
        "blank_image": [{"condition": Condition("full", "", blank_image=True)}],
        "detach": [{"condition": Condition("full", "", detach=("depth",))}],
        "answering": [{"answering": "batches"}],
        "decoding": [
            decoding(max_new_tokens=5), decoding(temperature=0.5), decoding(top_p=0.5), decoding(num_beams=2),
            decoding(min_new_tokens=1),
        ],
    }  # fmt: skip
    assert len(others["decoding"]) == len(names(Decoding))
    answer()
    assert set(json.loads((tmp_path / "run.json").read_text())) == set(others)
    for key, changes in others.items():
        for change in changes:
            with pytest.raises(DataError, match=rf"another run \((?:\w+, )*{key}\b.*differ"):
                answer(**change)
    assert answer().answered == 0


def test_a_report_tells_data_apart_by_every_part_of_it():
    question, row = Question(1, "What?", Path("a.png")), {"question_id": 1, "answer": "red"}

    def digest(truth=row, **changes):
        found = data_fingerprint([dataclasses.replace(question, **changes)], truth and [truth])
        return found["questions"], found["ground_truth"]

    same = digest()
    assert digest(image=Path("elsewhere/a.png")) == same
    more = {"more_images": (Path("b.png"),)}
    for change in ({"question_id": 2}, {"text": "Why?"}, {"image": Path("b.png")}, {"image": None}, more):
        assert digest(**change)[0] != same[0], change
    for truth in ({**row, "answer": "blue"}, {**row, "more": 1}, None):
        assert digest(truth)[1] != same[1]


# -- pixels that experts share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["image_size", "interpolation", "mean", "std", "dtype"])
def test_experts_share_pixels_only_if_all_settings_are_equal(tmp_path, key):
    first, other = expert_entries(tmp_path, ("a", "b"))
    hub = ExpertHub(complete_specs([first, other]))
    hub.load()
    pixels = torch.rand(1, 3, 2 * IMAGE, 2 * IMAGE)
    expert, same = hub["b"], hub.condition(pixels, hub.names)
    assert same["a"] is same["b"]
    if key == "image_size":
        expert.spec = expert.spec.replace(image_size=IMAGE // 2)
    elif key == "dtype":
        expert.to(torch.bfloat16)
    else:
        setattr(expert, key, {"interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2, 0.3)}[key])
    ready = hub.condition(pixels, hub.names)
    for name, found in ready.items():
        expected = hub[name].condition(pixels)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert ready["b"].shape != ready["a"].shape or not torch.equal(ready["b"].float(), ready["a"].float())


# -- towers: stage 1's, and those whose features are cached ------------------------------------------------------------

# Key of the configuration -> another value, if a stage-1 checkpoint of the first fits no tower of the second, and which
# parts of a feature cache then differ.
EVERY, ONLY_CLIP, NONE = "every part", "clip", "no part"
TOWER_KEYS = {
    "clip_source": ("hf:elsewhere", True, ONLY_CLIP),
    "clip_revision": ("v2", True, ONLY_CLIP),
    "clip_layer": (-3, True, ONLY_CLIP),
    "image_size": (2 * IMAGE, True, ONLY_CLIP),  # in an expert's part that name is its own input size
    "image_mean": ([0.1, 0.2, 0.3], True, EVERY),
    "image_std": ([0.1, 0.2, 0.3], True, EVERY),
    "fusion": ("add", True, NONE),
    "fusion_options": ({"gate": "sigmoid"}, True, NONE),
    "projection_dim": (12, True, NONE),
    "noisy_gating": (False, True, NONE),
    "top_k": (2, True, NONE),
    "null_slot": (True, True, NONE),
    "router_aux_loss_coef": (0.5, False, NONE),
}
EXPERT_KEYS = {
    "name": "another", "expert": "another", "source": "hf:elsewhere", "revision": "v2", "mode": "map", "image_size": 16,
    "width": 99, "grid": [9, 9], "options": {"channels": 99},
}  # fmt: skip
ELSEWHERE = {
    "clip_config",
    "experts",
    "detached_experts",
}  # follow from the sources; below; a choice of the user


def changed(config, key, value):
    other = copy.deepcopy(config)
    setattr(other, key, value)
    return other


def whole(vision):
    return ToveLlavaConfig(vision_config=vision, text_config=text_config())


def cached_parts(config):
    return describe_parts(config, torch.float32)


def test_a_tower_is_told_from_another_by_every_key(tmp_path):
    config = tower_config(tmp_path)
    assert set(type(config).__annotations__) - ELSEWHERE == set(TOWER_KEYS), "a new key needs a line here"
    assert tower_differences(whole(config), whole(config)) == []
    before = cached_parts(config)
    for key, (value, another, parts) in TOWER_KEYS.items():
        other = changed(config, key, value)
        differences = tower_differences(whole(config), whole(other))
        assert any(phrase.startswith(f"{key} ") for phrase in differences) == another, key
        after = cached_parts(other)
        differing = {name for name in before if before[name] != after[name]}
        assert differing == {EVERY: set(before), ONLY_CLIP: {"clip"}, NONE: set()}[parts], key


def test_an_expert_is_told_from_another_by_every_key(tmp_path):
    config = tower_config(tmp_path)
    assert set(EXPERT_KEYS) == set(config.experts[0])
    before = cached_parts(config)
    for key, value in EXPERT_KEYS.items():
        experts = [config.experts[0] | {key: value}, *config.experts[1:]]
        other = changed(config, "experts", experts)
        (difference,) = tower_differences(whole(config), whole(other))
        assert ("its experts are" if key == "name" else f"expert depth: {key} ") in difference
        after = cached_parts(other)
        name = "another" if key == "name" else "depth"
        assert after[name] != before["depth"] and after["edge"] == before["edge"], key


def test_cached_features_are_of_every_recorded_key(tmp_path):
    description = cached_parts(tower_config(tmp_path))["depth"]
    (cache := tmp_path / "cache").mkdir()
    write_part(cache, "depth", description)
    check_part(cache, "depth", description)
    found = read_description(cache, "depth")
    assert set(found) == {*description, "files"}
    for key in description:
        with pytest.raises(ConfigError, match=rf"\({key} differ\)"):
            check_part(cache, "depth", description | {key: "another"})
    with pytest.raises(ConfigError, match=r"\(more differ\)"):
        check_part(cache, "depth", description | {"more": 1})


@pytest.mark.parametrize("digest", [exact_fingerprint, sampled_digest])
def test_weights_are_told_apart_by_name_shape_and_value(digest):
    tensors = {"a": torch.arange(200.0), "b": torch.ones(2, 3)}
    same = digest(dict(reversed(tensors.items())))
    assert digest(tensors) == same
    for other in (
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"] * 2},
        {"a": tensors["a"]},
        {"a": torch.cat([torch.zeros(1), tensors["a"][:-1]]), "b": tensors["b"]},
    ):
        assert digest(other) != same
    if digest is sampled_digest:  # the exact one is of files, in which safetensors keeps the shape
        assert digest({"a": tensors["a"], "b": tensors["b"].T}) != same


# -- runs of training --------------------------------------------------------------------------------------------------

# Fields of a run's settings that change neither data nor weights.
FREE_SETTINGS = {
    "output_dir", "self_contained", "allow_image_links", "feature_cache", "merge_image_folder", "merge_feature_cache",
    "eval_data_path", "eval_image_folder", "keep_best", "template_given",
    "eval_benchmarks", "eval_benchmarks_limit", "eval_data_root",
}  # fmt: skip
FREE_STAGE = {"checkpointing", "checkpointing_gib", "tower_execution"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("identities"), captions=2, count=2)


def other_value(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x"


def test_a_run_is_told_from_another_by_every_setting(root, tmp_path):
    settings = parse(flags(root, "merge", tmp_path / "run"))
    before = settings.record()
    (tmp_path / "other.json").write_text("[]")
    others = {
        "preset": dataclasses.replace(settings.preset, name="another"),
        "stage_name": "another",
        "data_path": tmp_path / "other.json",
        "merge_data_path": tmp_path / "other.json",
        "image_folder": tmp_path,
        "pretrained": tmp_path,
        "training": settings.training | {"learning_rate": 3e-3},
    }
    assert {*others, *FREE_SETTINGS, "stage"} == names(type(settings)), "a new setting needs a line here"
    for key, value in others.items():
        assert dataclasses.replace(settings, **{key: value}).record() != before, key
    for field in dataclasses.fields(settings.stage):
        value = getattr(settings.stage, field.name)
        if dataclasses.is_dataclass(value):
            inner = dataclasses.fields(value)[0].name
            changed = dataclasses.replace(value, **{inner: other_value(getattr(value, inner))})
        else:
            changed = {"adam_beta1": 0.5} if isinstance(value, dict) else other_value(value)
        stage = copy.copy(settings.stage)
        object.__setattr__(stage, field.name, changed)
        differs = dataclasses.replace(settings, stage=stage).record() != before
        assert differs == (field.name not in FREE_STAGE), field.name


def test_a_run_is_resumed_only_with_every_recorded_setting(root, tmp_path):
    folder = tmp_path / "run"
    record = run_record(parse(flags(root, "pretrain", folder)))
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (folder / RUN_RECORD).write_text(json.dumps(record))
    assert not is_finished(folder, record)
    assert {"deepspeed", "world_size", "plugins"} <= set(record)
    for key, value in record.items():
        with pytest.raises(CheckpointError, match="other settings") as error:
            is_finished(folder, record | {key: other_value(value)})
        assert f"({key}: " in str(error.value)
    assert not is_finished(folder, record | {"more": None})
    with pytest.raises(CheckpointError, match=r"\(more: None there, 1 now\)"):
        is_finished(folder, record | {"more": 1})


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_scenes_are_told_from_others_by_every_key(tmp_path):
    request = SceneRequest({"train": 1}, size=32)
    others = {"counts": {"train": 2}, "seed": 1, "size": 33, "image_format": "jpg", "maps": True}
    assert set(others) == names(SceneRequest)
    assert write_scenes(request, tmp_path / "s") and not write_scenes(request, tmp_path / "s")
    for key, value in others.items():
        with pytest.raises(DataError, match=rf"different: {key}\)"):
            write_scenes(dataclasses.replace(request, **{key: value}), tmp_path / "s")
