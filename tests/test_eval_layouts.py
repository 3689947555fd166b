"""Every benchmark in LLaVA's folders: questions, images and ground truth."""

import base64
import io
import json
from collections import Counter

import public_layouts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from score_parts import SAMPLES, refuse, score, write_rows

from tove_llava.core.errors import DataError
from tove_llava.data import IMAGE_PLACEHOLDER
from tove_llava.eval.benchmarks import BENCHMARKS, OPTION_LETTER, SHORT_ANSWER, EmbeddedImage, Question, get_benchmark
from tove_llava.eval.benchmarks.scienceqa import PLACEHOLDER
from tove_llava.testing import check_benchmark

SHORT = f"\n{SHORT_ANSWER}"
LETTER = f"\n{OPTION_LETTER}"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def ask(key, image, text):
    return {"question_id": key, "image": image, "text": text, "category": "default"}


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def vqa_record(key):
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    return {"question_id": key, "question_type": "what", "answer_type": "other", "answers": answers}


def vqav2(root):
    write_rows(root / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", [ask(1, "COCO_1.jpg", "What?" + SHORT)])
    return "vqav2/test2015/COCO_1.jpg", "What?" + SHORT, None


def okvqa(root):
    question = {"question_id": 7, "image_id": 42, "question": "What?"}
    write(root / "okvqa" / "OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    write(root / "okvqa" / "mscoco_val2014_annotations.json", {"annotations": [vqa_record(7)]})
    return "okvqa/val2014/COCO_val2014_000000000042.jpg", "What?" + SHORT, "red"


def gqa(root):
    question = ask("1", "n1.jpg", "What color is the car?" + SHORT)
    write_rows(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", [question])
    truth = json.loads((SAMPLES / "gqa" / "ground_truth.json").read_text())
    write(root / "gqa" / "data" / "questions1.2" / "testdev_balanced_questions.json", {"1": truth["1"]})
    return "gqa/data/images/n1.jpg", question["text"], "red"


def vizwiz(root):
    write_rows(root / "vizwiz" / "llava_test.jsonl", [ask(0, "VizWiz_test_00000000.jpg", "What?" + SHORT)])
    return "vizwiz/test/VizWiz_test_00000000.jpg", "What?" + SHORT, None


def scienceqa(root):
    turns = [{"from": "human", "value": "Which?\nA. x\nB. y\n<image>"}, {"from": "gpt", "value": "A"}]
    folder = root / "scienceqa"
    records = [{"id": "5", "image": "5/image.png", "conversations": turns}]
    write(folder / "llava_test_CQM-A.json", records)
    write(folder / "problems.json", {"5": {"choices": ["x", "y"], "answer": 1}, "6": {"choices": ["x"], "answer": 0}})
    write(folder / "pid_splits.json", {"test": ["5"], "train": ["6"]})
    return "scienceqa/images/test/5/image.png", "<image>\nWhich?\nA. x\nB. y" + LETTER, "B"


def textvqa(root):
    text = "What does it say?\nReference OCR token: STOP" + SHORT
    write_rows(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", [ask("i1", "i1.jpg", text)])
    record = {"image_id": "i1", "question_id": 3, "question": "What does it say?", "answers": ["stop"] * 10}
    write(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [record]})
    return "textvqa/train_images/i1.jpg", text, "Stop"


def pope(root):
    question = {**ask(0, "1.jpg", "Is there a cat?" + SHORT), "category": "random"}
    write_rows(root / "pope" / "llava_pope_test.jsonl", [question])
    write_rows(root / "pope" / "coco" / "coco_pope_random.json", [{"question_id": 1, "image": "1.jpg", "label": "yes"}])
    return "pope/val2014/1.jpg", "Is there a cat?" + SHORT, "Yes"


def mme(root):
    texts = ("Is there a cat? Please answer yes or no.", "Is there a dog?  Please answer yes or no.")
    rows = [ask("existence/1.jpg", "existence/1.jpg", text + SHORT) for text in texts]
    write_rows(root / "MME" / "llava_mme.jsonl", rows)
    answers = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tYes\n"
    write(root / "MME" / "MME_Benchmark_release_version" / "existence" / "1.txt", answers)
    return "MME/MME_Benchmark_release_version/existence/1.jpg", texts[0] + SHORT, "Yes"


def sheet(root, folder, name):
    cells = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit\n"
    write(root / folder / name, f"{cells}1\tWhich?\tLook.\tN/A's\tno\t\tlast\tB\tx\t{png()}\tl\tdev\n")


def test_an_image_cell_of_mmbench_may_name_another_row(tmp_path):
    mmbench(tmp_path)
    file = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    first = file.read_text()
    row = first.splitlines()[1].split("\t")
    for cell, right in (("1", True), ("7", False), ("1000001", False), ("", False)):
        write(file, first + "\t".join(["1000001", *row[1:9], cell, *row[10:]]) + "\n")
        if right:
            assert [q.image.open().size for q in get_benchmark("mmbench").questions(tmp_path)] == [(4, 3)] * 2
        else:
            with pytest.raises(DataError, match="row 1000001"):
                [q.image.open() for q in get_benchmark("mmbench").questions(tmp_path)]


def mmbench(root):
    sheet(root, "mmbench", "mmbench_dev_20230712.tsv")
    return None, "Look.\nWhich?\nA. N/A's\nB. no" + LETTER, "B"


def mmbench_cn(root):
    sheet(root, "mmbench_cn", "mmbench_dev_cn_20231003.tsv")
    return None, "Look.\nWhich?\nA. N/A's\nB. no\n请直接回答选项字母。", "B"


def seed(root):
    text = "What?\nA. a\nB. b\nC. c\nD. d" + LETTER
    write_rows(root / "seed_bench" / "llava-seed-bench.jsonl", [ask(4, "SEED-Bench-image/4", text)])
    question = {"question_id": "4", "answer": "D", "data_type": "image", "question_type_id": 2}
    write(root / "seed_bench" / "SEED-Bench.json", {"question_type": {"Instance Identity": 2}, "questions": [question]})
    return "seed_bench/SEED-Bench-image/4", text, "D"


def llava_bench(root):
    folder = root / "llava-bench-in-the-wild"
    for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"):
        write(folder / name, (SAMPLES / "llava_bench" / name).read_text())
    return "llava-bench-in-the-wild/images/000.jpg", "Question 0?", ""


def mmvet(root):
    write_rows(root / "mm-vet" / "llava-mm-vet.jsonl", [ask(0, "v1_0.png", "Question 0?")])
    write(root / "mm-vet" / "mm-vet.json", (SAMPLES / "mmvet" / "ground_truth.json").read_text())
    return "mm-vet/images/v1_0.png", "Question 0?", ""


CAPTION = "Provide a one-sentence caption for the provided image."


def coco_caption(root):
    record = {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["a cat", "a small cat"]}
    write(root / "coco_caption" / "coco_karpathy_test.json", [record])
    return "coco_caption/val2014/COCO_val2014_000000000042.jpg", CAPTION, "a cat"


def nocaps(root):
    images = [{"id": 0, "file_name": "a.jpg", "domain": "near-domain"}]
    captions = [{"id": i, "image_id": 0, "caption": text} for i, text in enumerate(("a cat", "one cat"))]
    write(root / "nocaps" / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    return "nocaps/images/a.jpg", CAPTION, "a cat"


def vsr(root):
    row = {"image": "1.jpg", "caption": "The cat is on it.", "label": 1, "relation": "on"}
    write_rows(root / "vsr" / "test.jsonl", [row])
    text = f"Is the following statement about the image true or false? {row['caption']}{SHORT}"
    return "vsr/images/1.jpg", text, "True"


def scenes(root):
    write_rows(root / "val_questions.jsonl", [{**ask("a", "1.png", "What colour?"), "answer": "red"}])
    return "images/1.png", "What colour?", "red"


LAYOUTS = {name: globals().get(name) or getattr(public_layouts, name) for name in BENCHMARKS}

LENGTHS = {"mmbench": 1024, "mmbench_cn": 1024, "scienceqa": 1024, "llava_bench": 1024, "mmvet": 1024, "scenes": 16}
LENGTHS |= public_layouts.LENGTHS


def test_chartqa_reads_the_authors_files_in_the_order_of_the_hub_s(tmp_path):
    for half, label in (("human", "7"), ("augmented", "Ann")):
        write(tmp_path / "chartqa" / f"test_{half}.json", [{"imgname": "1.png", "query": "Which?", "label": label}])
    benchmark = get_benchmark("chartqa")
    rows = benchmark.ground_truth(tmp_path)
    assert rows == benchmark.read_ground_truth(tmp_path / "chartqa" / "test_augmented.json")
    assert [(row["question_id"], row["type"]) for row in rows] == [(0, "human"), (1, "augmented")]
    asked = benchmark.questions(tmp_path)
    assert asked[1].image == tmp_path / "chartqa" / "png" / "1.png" and asked[1].text.startswith("Which?\nAnswer")
    (tmp_path / "chartqa" / "test_augmented.json").unlink()
    with pytest.raises(DataError, match=r"test_augmented\.json"):
        benchmark.questions(tmp_path)


def test_mmmu_shows_all_images_of_a_question_and_names_one_without(tmp_path):
    LAYOUTS["mmmu"](tmp_path)
    (question,) = get_benchmark("mmmu").questions(tmp_path)
    assert [image.name.rpartition(", ")[2] for image in question.images] == ["image_1", "image_2"]
    row = {"id": "validation_Math_7", "question": "?", "options": "[]", "answer": "7", "question_type": "open"}
    public_layouts.parquet(tmp_path / "mmmu" / "Math" / "validation-00000-of-00001.parquet", row)
    with pytest.raises(DataError, match="record 1: the question 'validation_Math_7' has no image"):
        get_benchmark("mmmu").questions(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_images_and_lengths(tmp_path, name):
    image, text, _ = LAYOUTS[name](tmp_path)
    benchmark = get_benchmark(name)
    assert benchmark.question_file(tmp_path).is_file()
    question = benchmark.questions(tmp_path)[0]
    assert question.text == text
    assert benchmark.max_new_tokens == LENGTHS.get(name, 128)
    if image is None:
        assert isinstance(question.image, EmbeddedImage) and question.image.open().size == (4, 3)
    else:
        assert question.image == tmp_path / image


REFERENCES = {"coco_caption": ["a cat", "a small cat"], "nocaps": ["a cat", "one cat"]}
NEEDING_MORE = ("coco_caption", "nocaps", "llava_bench", "mmvet")  # Java or a judge


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in NEEDING_MORE])
def test_right_answers_score_full_marks_against_the_data_root(capsys, tmp_path, name):
    _, _, right = LAYOUTS[name](tmp_path)
    benchmark = get_benchmark(name)
    asked = benchmark.questions(tmp_path)
    rows = [{"question_id": each.question_id, "prompt": each.text, "text": right or ""} for each in asked]
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    if right is None:  # the answers are the server's secret
        assert "only its server scores them" in refuse(capsys, name, answers, tmp_path)
        return
    got = score(capsys, name, answers, tmp_path)
    assert not got["unanswered"] and not got["unknown"] and got["count"] == len(asked)
    result = benchmark.score(rows, benchmark.ground_truth(tmp_path))
    assert result.marks and all(mark == 1 for mark in result.marks.values())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in NEEDING_MORE])
def test_every_benchmark_keeps_the_contract(tmp_path, name):
    LAYOUTS[name](tmp_path)
    for question in get_benchmark(name).questions(tmp_path):
        if not isinstance(question.image, EmbeddedImage):
            question.image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3)).save(question.image, "PNG")
    assert len(check_benchmark(name, tmp_path)) >= 2  # two have no public answers


@pytest.mark.parametrize("name", NEEDING_MORE)
def test_ground_truth_answers_the_questions(tmp_path, name):
    LAYOUTS[name](tmp_path)
    benchmark = get_benchmark(name)
    truth = {benchmark.truth_key(row) for row in benchmark.ground_truth(tmp_path)}
    assert {benchmark.question_key(question) for question in benchmark.questions(tmp_path)} <= truth
    if name in REFERENCES:
        assert benchmark.ground_truth(tmp_path)[0]["references"] == REFERENCES[name]
    if name == "coco_caption":
        assert benchmark.read_ground_truth(benchmark.question_file(tmp_path)) == benchmark.ground_truth(tmp_path)


def test_placeholder_is_the_package_s():
    assert PLACEHOLDER == IMAGE_PLACEHOLDER


def test_a_damaged_embedded_image_is_named():
    for content, words in (("not base64!", "not base64"), (base64.b64encode(b"text").decode(), "not a")):
        with pytest.raises(DataError, match=f"image row 3 is {words}"):
            EmbeddedImage("row 3", content).open()


def test_mme_names_a_question_without_an_answer(tmp_path):
    mme(tmp_path)
    file = tmp_path / "MME" / "MME_Benchmark_release_version" / "existence" / "1.txt"
    for text, words in (
        ("Is there a dog? Please answer yes or no.\tYes\n", "no answer to 'existence/1.jpg': 'Is there a cat"),
        ("Is there a dog? Yes\n", "line 1: a question and an answer"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            get_benchmark("mme").ground_truth(tmp_path)


def questions_of(name, units, size):
    """List questions in units of ``size`` in the file's order.

    MMBench's rotations stand far apart.
    """
    if name == "mme":
        return [Question(f"count/{unit}.jpg", f"Is it {turn}?", None) for unit in range(units) for turn in range(size)]
    return [Question(unit + turn * 1_000_000, "Which?", None) for turn in range(size) for unit in range(units)]


@settings(deadline=None)
@given(st.sampled_from(["mme", "mmbench", "mmbench_cn"]), st.integers(1, 30), st.integers(1, 4), st.integers(1, 130))
def test_a_limit_keeps_together_what_is_scored_together(name, units, size, limit):
    benchmark, questions = get_benchmark(name), questions_of(name, units, size)
    some = benchmark.limited(questions, limit)
    asked = Counter(map(benchmark.unit, some))
    assert some and set(asked.values()) == {size} and len(some) <= max(limit, size)
    assert len(questions) - len(some) == 0 if limit >= len(questions) else len(some) > limit - size
    assert [question for question in questions if question in some] == some, "in the file's order"


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 70))
def test_a_limit_of_other_benchmarks_is_exact(count, limit):
    questions = [Question(number, "What?", None) for number in range(count)]
    assert len(get_benchmark("vqav2").limited(questions, limit)) == min(count, limit)
    assert get_benchmark("vqav2").limited(questions, None) == questions
