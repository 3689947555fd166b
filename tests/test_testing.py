"""The contracts that users run on parts of their own: ours keep them, and each broken rule is named."""

import pytest
import torch

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data.templates import Segment, get_template, template_names
from tove_llava.data.templates.base import TEMPLATES
from tove_llava.eval.benchmarks import BENCHMARKS, Score
from tove_llava.eval.benchmarks.playground_scenes import Scenes
from tove_llava.experts import EXPERTS
from tove_llava.testing import ContractError, check_benchmark, check_expert, check_fusion, check_template
from tove_llava.tower import FUSIONS
from tove_llava.tower.fusion.add import AddFusion

EDGE = {"name": "edge", "source": "bundled:edge", "mode": "map"}


@pytest.mark.parametrize("name", FUSIONS.names())
def test_our_fusions_keep_the_contract(name):
    assert len(check_fusion(name)) >= 7


@pytest.mark.parametrize("name", sorted(set(template_names()) - {"chat_template"}))
def test_our_templates_keep_the_contract(name):
    assert len(check_template(name)) >= 3


@pytest.mark.parametrize("name", ["depth", "segmentation"])
def test_our_experts_keep_the_contract(name):
    assert len(check_expert({"name": name, "source": f"bundled:{name}", "mode": "map"})) == 9


class Broken(AddFusion):
    """One rule is broken, the one that the class attribute names."""

    rule = ""

    def __init__(self, config):
        super().__init__(config)
        if self.rule == "layers":
            self.scale = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1))])

    def forward(self, base, experts, *, noise=None, usable=None):
        rule, attached = self.rule, self.config.attached_experts
        if rule == "batch":
            base = base - base.mean(dim=0)
        if rule == "usable":
            usable = None
        if rule == "detached":
            self.config.detached_experts = []
        output = super().forward(base, experts, noise=noise, usable=usable)
        if rule == "detached":
            self.config.detached_experts = [n for n in self.config.expert_names if n not in attached]
        if rule == "layers":
            output = output._replace(tokens=output.tokens * self.scale[0])
        if rule == "zero rows" and len(attached) < 3:
            output = output._replace(tokens=base + 0 * self.output.weight.sum())
        if rule == "shape":
            output = output._replace(tokens=output.tokens[:, 1:])
        if rule == "dtype":
            output = output._replace(tokens=output.tokens.double())
        return output

    def transfers(self, base, experts, *, usable=None):
        parts = super().transfers(base, experts, usable=usable)
        return {**parts, "first": parts["first"] * 2} if self.rule == "transfers" else parts


@pytest.mark.parametrize(
    "rule, words",
    [
        ("shape", "and the class says"),
        ("dtype", "tokens in torch.float64"),
        ("batch", "an image by itself"),
        ("usable", "other features where the expert is unusable"),
        ("detached", "detaching an expert changes nothing"),
        ("zero rows", "no gradient for embeddings"),
        ("layers", "reset_parameters"),
        ("transfers", "the parts do not add up"),
    ],
)
def test_a_fusion_that_breaks_a_rule_is_told_which(rule, words, monkeypatch):
    monkeypatch.setitem(FUSIONS._entries, "broken", type("Broken", (Broken,), {"rule": rule, "__module__": __name__}))
    with pytest.raises(ContractError, match=f"(?s)'broken' breaks .*test_testing.py.*{words}"):
        check_fusion("broken")


def test_an_expert_that_breaks_a_rule_is_told_which(monkeypatch):
    [(scheme, cls)] = [pair for pair in EXPERTS.get("edge").items() if pair[0] == "bundled"]
    broken = {
        "shape": (lambda self, pixels: cls.features(self, pixels)[:, :, 1:], "features"),
        "batch": (
            lambda self, pixels: cls.features(self, pixels).mean(0, keepdim=True).expand(len(pixels), -1, -1, -1),
            "an",
        ),
        "writes": (lambda self, pixels: cls.features(self, pixels.mul_(1.5)), "features\\(\\) writes into its input"),
        "values": (lambda self, pixels: cls.features(self, pixels) / 0.0, "not finite"),
    }
    for features, words in broken.values():
        monkeypatch.setitem(EXPERTS.get("edge"), scheme, type("Broken", (cls,), {"features": features}))
        with pytest.raises((ContractError, ConfigError), match=words):
            check_expert(EDGE)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda segments: [Segment(s.text) for s in segments], "is not learned"),
        (lambda segments: [Segment(s.text, True) for s in segments], "is learned"),
        (
            lambda segments: [Segment(s.text.replace(":", ";"), s.supervised) for s in segments],
            "missing, or not in order",
        ),
        (lambda segments: [Segment(s.text.replace("</s>", ""), s.supervised) for s in segments], "no end is learned"),
        (lambda segments: [Segment(f"{len(segments)} ")] + segments, "the ids differ"),
        (lambda segments: [Segment(s.text.replace("<image>", ""), s.supervised) for s in segments], "placeholder"),
    ],
)
def test_a_template_that_breaks_a_rule_is_told_which(change, words, monkeypatch):
    v1 = get_template("v1")
    broken = type("Broken", (type(v1),), {"render": lambda self, turns, tokenizer: change(v1.render(turns, tokenizer))})
    monkeypatch.setitem(TEMPLATES._entries, "broken", broken())
    with pytest.raises(ContractError, match=words):
        check_template("broken")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from tove_llava.cli import main

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    assert main(["scenes", "--out", str(folder), "--train", "1", "--val", "3"]) == 0
    return folder


def test_the_scenes_keep_the_contract_and_missing_files_break_no_rule(scenes, tmp_path):
    assert len(check_benchmark("scenes", scenes)) == 8
    with pytest.raises(DataError, match="there is no file"):
        check_benchmark("scenes", tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"questions": lambda self, root: []}, "no questions"),
        ({"answer_key": lambda self, row: 1, "truth_key": lambda self, row: 1}, "share a key"),
        ({"score": lambda self, answers, truth: Score({"a": 1.0}, len(answers), {})}, "scores them; pair answers"),
        ({"score": lambda self, answers, truth: Score({"a": answers[0]["text"]}, 1, {})}, "and, backwards,"),
        ({"score": lambda self, answers, truth: Score({"a": float("nan")}, 0, {})}, "a count of zero"),
        ({"max_new_tokens": None}, "max_new_tokens is not set"),
    ],
)
def test_a_benchmark_that_breaks_a_rule_is_told_which(changes, words, scenes, monkeypatch):
    monkeypatch.setitem(BENCHMARKS._entries, "broken", type("Broken", (Scenes,), changes))
    with pytest.raises(ContractError, match=words):
        check_benchmark("broken", scenes)
