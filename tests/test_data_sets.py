"""Public data sets: their descriptions, and checks of their folders."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image
from test_eval_layouts import LAYOUTS, write

from tove_llava import cli
from tove_llava.core.errors import ConfigError
from tove_llava.data.sets import BENCHMARK, TRAINING, Part, get_set, set_names
from tove_llava.eval.benchmarks import BENCHMARKS, get_benchmark
from tove_llava.eval.completeness import check_set

LENGTHS = {"md5": 32, "sha256": 64}


def uncounted(data_set, **changes):
    """Forget what is known of the real set."""
    parts = tuple(replace(part, bytes=None, digest="") for part in data_set.parts)
    return replace(data_set, **{"parts": parts, "questions": None, "images": None, "groups": None, **changes})


def paint(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((64, 48), 60).save(file, "PNG")


def place(name, root):
    """Lay out a benchmark with one or two questions, its images included."""
    LAYOUTS[name](root)
    for question in get_benchmark(name).questions(root):
        if hasattr(question.image, "parent"):
            paint(question.image)
    for part in get_set(name).parts:
        if part.is_folder and part.found(root) is None:  # SEED-Bench's frames of videos, of which there are none here
            write(root / part.path / "unused.txt", "")
    return root


def kinds(result):
    return [finding.kind for finding in result.findings]


def test_every_benchmark_and_both_training_sets_are_described():
    sets = {name: get_set(name) for name in set_names()}
    assert {name for name, entry in sets.items() if entry.kind == BENCHMARK} == set(BENCHMARKS)
    assert {name for name, entry in sets.items() if entry.kind == TRAINING} == {"llava_pretrain", "llava_mix665k"}
    for name, entry in sets.items():
        assert entry.title and entry.licence and entry.sources and entry.parts, name
        for part in entry.parts:
            assert part.url.startswith(("http://", "https://")) or part.note, f"{name}: {part.path} comes from nowhere"
            if part.digest:
                algorithm, digits = part.digest.split(":")
                assert len(digits) == LENGTHS[algorithm] and int(digits, 16)
        if entry.kind == TRAINING:
            assert entry.records in [part.path for part in entry.parts]
            assert sum((entry.groups or {}).values()) == (entry.questions or 0), "the groups are all records"


def test_one_download_has_one_size_and_digest():
    parts = [part for name in set_names() for part in get_set(name).parts if part.archive]
    for url in {part.url for part in parts}:
        assert len({(part.archive, part.bytes, part.digest) for part in parts if part.url == url}) == 1, url
    whole = get_set("pope").download_bytes
    assert whole == 6_645_013_297 and get_set("mme").download_bytes is None
    with pytest.raises(ConfigError, match="unknown data set 'popo'. Did you mean 'pope'"):
        get_set("popo")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_parts_are_what_the_benchmark_reads(tmp_path, name):
    data_set, root = uncounted(get_set(name)), place(name, tmp_path)
    beyond = ["ground truth"] if name == "mmvet" else []  # the sample has more answers than the layout has questions
    result = check_set(data_set, root)
    assert kinds(result) == beyond and result.questions
    for part in data_set.parts:
        found, away = part.found(root), tmp_path.parent / f"{tmp_path.name}.away"
        shutil.move(found, away)
        missing = check_set(data_set, root)
        assert "missing" in kinds(missing) and str(root / part.path) in missing.findings[0].message
        shutil.move(away, found)
    assert kinds(check_set(data_set, root)) == beyond


@pytest.fixture
def pope(tmp_path):
    return place("pope", tmp_path / "eval")


def image_of(root):
    return get_benchmark("pope").questions(root)[0].image


def test_images_are_decoded(pope):
    data_set, image = uncounted(get_set("pope")), image_of(pope)
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    (finding,) = check_set(data_set, pope).findings
    assert finding.kind == "picture" and "question 0" in finding.message and str(image) in finding.message
    assert check_set(data_set, pope, decode=False).findings == []
    paint(image.with_name("other.jpg"))
    image.unlink()
    (finding,) = check_set(data_set, pope, decode=False).findings
    assert finding.kind == "picture" and f"there is no image file {image}" in finding.message


def test_counts_are_compared(pope):
    result = check_set(get_set("pope"), pope)
    assert set(kinds(result)) == {"count"}
    text = "\n".join(finding.message for finding in result.findings)
    assert "1 questions instead of 8,910" in text
    assert "1 questions of 'random' instead of 2,910" in text and "0 questions of 'popular' instead of 3,000" in text
    assert result.to_dict()["complete"] is False


def test_questions_without_ground_truth_are_named(tmp_path):
    root = place("seed", tmp_path)
    file = root / "seed_bench" / "SEED-Bench.json"
    content = json.loads(file.read_text())
    content["questions"][0]["question_id"] = "77"
    file.write_text(json.dumps(content))
    first, second = check_set(uncounted(get_set("seed")), root).findings
    assert "1 questions have no ground truth: 4;" in first.message
    assert "belong to no question: 77;" in second.message and "different releases" in second.message


def test_damaged_files_are_named(pope):
    data_set = uncounted(get_set("pope"))
    labels = pope / "pope" / "coco" / "coco_pope_random.json"
    labels.write_text(labels.read_text() * 2)  # another release's
    (finding,) = check_set(data_set, pope).findings
    assert finding.kind == "ground truth" and "2 labels" in finding.message
    file = get_benchmark("pope").question_file(pope)
    file.write_text(file.read_text()[:-9])
    assert any(f.kind == "file" and f"{file}, line 1" in f.message for f in check_set(data_set, pope).findings)
    shutil.rmtree(pope / "pope" / "val2014")
    write(pope / "pope" / "val2014.zip", "zip")
    missing = [finding.message for finding in check_set(data_set, pope).findings if finding.kind == "missing"]
    assert len(missing) == 1 and "pope/val2014.zip is: unpack it" in missing[0]


def test_a_download_is_compared_with_its_size_and_digest(pope, tmp_path):
    def findings(**known):
        parts = [replace(part, bytes=None, digest="") for part in get_set("pope").parts]
        changed = [replace(part, **known) if part.archive == "val2014.zip" else part for part in parts]
        return check_set(uncounted(get_set("pope"), parts=tuple(changed)), pope).findings

    write(pope / "val2014.zip", "zip")
    right = f"sha256:{sha256(b'zip').hexdigest()}"
    assert findings(bytes=3, digest=right) == []
    (wrong_size,) = findings(bytes=4, digest=right)
    assert wrong_size.kind == "download" and "3 bytes instead of 4" in wrong_size.message
    (wrong,) = findings(bytes=3, digest="md5:" + "0" * 32)
    assert wrong.kind == "download" and "md5 checksum" in wrong.message and "damaged" in wrong.message
    (finding,) = check_set(get_set("coco_caption"), place("coco_caption", tmp_path / "captions")).findings
    assert finding.kind == "download" and "coco_karpathy_test.json has the md5" in finding.message  # without an archive


@pytest.mark.parametrize("given", ["eval/pope", "", "eval/x/y"])
def test_the_wrong_root_is_explained(pope, given):
    root = pope.parent / given
    root.mkdir(parents=True, exist_ok=True)
    found = check_set(uncounted(get_set("pope")), root).findings
    (message,) = (f.message for f in found if f.kind == "misplaced" and "llava_pope_test" in f.message)
    assert Path(message.split(", but ")[1].split(" is: ")[0]).resolve() == pope / "pope" / "llava_pope_test.jsonl"


def record(name, image):
    turns = [{"from": "human", "value": "<image>\nWhat?" if image else "What?"}, {"from": "gpt", "value": "A kite."}]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


def mixture(root):
    images = ["coco/train2017/1.jpg", "gqa/images/2.jpg", None]
    write(root / "llava_v1_5_mix665k.json", [record(str(i), image) for i, image in enumerate(images)])
    for image in images[:2]:
        paint(root / image)
    wanted = ("llava_v1_5_mix665k.json", "coco/train2017/", "gqa/images/")
    parts = tuple(part for part in uncounted(get_set("llava_mix665k")).parts if part.path in wanted)
    return uncounted(get_set("llava_mix665k"), parts=parts, groups={"coco": 1, "gqa": 1, "text only": 1}, questions=3)


def test_a_training_set(tmp_path):
    data_set = mixture(tmp_path)
    result = check_set(data_set, tmp_path)
    assert result.findings == [] and (result.questions, result.images) == (3, 2)
    assert result.groups == {"coco": 1, "gqa": 1, "text only": 1}
    assert "3 records instead of 4" in check_set(replace(data_set, questions=4), tmp_path).findings[0].message
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"no image")
    shutil.rmtree(tmp_path / "gqa")
    found = check_set(data_set, tmp_path).findings
    assert [finding.kind for finding in found] == ["missing", "picture"], "images of a missing folder are one problem"
    assert "gqa/images" in found[0].message and "id '0'" in found[1].message
    write(tmp_path / "llava_v1_5_mix665k.json", [{"id": "9", "conversations": []}])
    assert "record" in kinds(check_set(data_set, tmp_path))


def command(capsys, *arguments):
    code = cli.main(["data", *map(str, arguments)])
    return code, capsys.readouterr()


def test_list_and_show(capsys, pope):
    code, printed = command(capsys, "list", "--data-root", pope)
    lines = {line.split()[0]: line for line in printed.out.splitlines() if line.strip()}
    assert code == 0 and "8,910" in lines["pope"] and "3 of 3" in lines["pope"] and "0 of 2" in lines["vqav2"]
    code, printed = command(capsys, "list", "--json", "--data-root", pope)
    assert json.loads(printed.out)["pope"]["present"] == 3
    code, printed = command(capsys, "show", "pope", "vqav2", "--data-root", pope)
    assert code == 0 and "[there]   pope/coco/" in printed.out and "[missing] vqav2/test2015/" in printed.out
    assert "test2015.zip (13.3 GB) from http://images.cocodataset.org/zips/test2015.zip" in printed.out
    code, printed = command(capsys, "show", "pope", "--json")
    assert json.loads(printed.out)["pope"]["questions"] == 8910


def test_check_of_named_sets(capsys, pope, tmp_path):
    code, printed = command(capsys, "check", "pope", "--data-root", pope, "--workers", "2", "--show", "2")
    assert code == 2 and "1 questions instead of 8,910" in printed.out and "... and 2 more" in printed.out
    code, printed = command(capsys, "check", "all", "--data-root", pope, "--json")
    assert code == 2 and list(json.loads(printed.out)) == ["pope"]
    place("scenes", tmp_path / "scenes")
    code, printed = command(capsys, "check", "scenes", "--data-root", tmp_path / "scenes")
    assert code == 0 and printed.out.splitlines()[-1] == "  complete"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--data-path"),
        (("pope", "--data-path", "x.json"), "or --data-path"),
        (("popo",), "Did you mean 'pope'"),
        (("pope", "--data-root", "nowhere"), "there is no data folder nowhere"),
        (("all", "--data-root", "nowhere"), "no public data set is there"),
        (("pope", "--workers", "0"), "--workers must be at least 1"),
    ],
)
def test_wrong_requests(capsys, arguments, words):
    code, printed = command(capsys, "check", *arguments)
    assert code == 2 and words in printed.err and not printed.out


def test_a_part_is_a_file_or_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "a").mkdir()
    assert Part("a/").found(tmp_path) is None and Part("a").found(tmp_path) is None
    write(tmp_path / "a" / "b", "")
    assert Part("a/").found(tmp_path) == tmp_path / "a/" and Part("a/c", instead=("a/b",)).found(tmp_path)
