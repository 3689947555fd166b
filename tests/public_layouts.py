"""Small data of the benchmarks whose releases are read as they are: one function each, as in test_eval_layouts.py."""

import io
import json

import pyarrow
import pyarrow.parquet
from PIL import Image
from score_parts import SAMPLES

from tove_llava.eval.benchmarks import OPTION_LETTER, SHORT_ANSWER

#: longest answers other than 128
LENGTHS = {"cv_bench": 512, "mmvp": 512, "realworldqa": 16, "blink": 1024, "mmstar": 32, "ai2d": 16}
LENGTHS |= {"chartqa": 16, "docvqa": 32, "infovqa": 32, "mmmu_pro": 256}


def embedded():
    """Return an image as Hugging Face's data sets hold it."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "1.png"}


def parquet(file, *rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)


def cv_bench(root):
    prompt = "How many? Select from the following choices.\n(A) 3\n(B) 4"
    row = {"idx": 0, "task": "Count", "image": embedded(), "choices": ["3", "4"], "answer": "(B)", "prompt": prompt}
    twin = {**row, "idx": 1, "source": "COCO"}
    parquet(root / "cv_bench" / "test_2d.parquet", {**row, "source": "ADE20K"}, twin)
    parquet(root / "cv_bench" / "test_3d.parquet", {**row, "idx": 2, "task": "Depth", "source": "Omni3D"})
    return None, f"{prompt}\n{OPTION_LETTER}", "B"


def mmvp(root):
    file = root / "mmvp" / "Questions.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f'{index},"Is it open, or not?",(a) None (b) Some (a few),(b)\n' for index in (1, 2)]
    file.write_text("lndex,Question,Options,Correct Answer\n" + "".join(rows))
    return "mmvp/MMVP Images/1.jpg", f"Is it open, or not? Options:\nA. None\nB. Some (a few)\n{OPTION_LETTER}", "some."


def realworldqa(root):
    rows = [{"image": embedded(), "question": f"Which?\nA. x\nB. y\nThe {n}.", "answer": "B"} for n in (1, 2)]
    for number, row in enumerate(rows):
        parquet(root / "realworldqa" / "data" / f"test-0000{number}-of-00002.parquet", row)
    return None, "Which?\nA. x\nB. y\nThe 1.", "The answer is (B)."


def blink(root):
    prompt = "Which?\nSelect from the following choices.\n(A) x\n(B) y\n"
    row = {"choices": ["x", "y"], "answer": "(B)", "prompt": prompt, "image_1": embedded(), "image_2": None}
    for task in ("Counting", "Multi-view_Reasoning"):
        file = root / "blink" / task / "val-00000-of-00001.parquet"
        parquet(file, {**row, "idx": f"val_{task}_1"}, {**row, "idx": f"val_{task}_2", "image_2": embedded()})
    request = "Please answer directly with only the letter of the correct option and nothing else."
    return None, f"{prompt}\n{request}", "I say (B)"


def mmstar(root):
    row = {"index": 0, "question": "Which?\nOptions: A: x, B: y", "image": embedded()["bytes"], "answer": "B"}
    parquet(root / "mmstar" / "mmstar.parquet", {**row, "category": "math", "l2_category": "geometry"})
    return None, f"Which?\nOptions: A: x, B: y\n{OPTION_LETTER[:-1]}", "Option B"


def ai2d(root):
    row = {"question": "Which?", "options": ["None", "B"], "answer": "0", "image": embedded()}
    parquet(root / "ai2d" / "data" / "test-00000-of-00001.parquet", row)
    return None, f"Which?\nA. None\nB. B\n{OPTION_LETTER}", "A. None"


def chartqa(root):
    row = {"type": "human_test", "question": "How many?", "answer": "7", "image": embedded()}
    parquet(root / "chartqa" / "test-00000-of-00001.parquet", row)
    return None, "How many?\nAnswer the question with a single word.", "7"


def docvqa(root, folder="docvqa/DocVQA"):
    row = {"questionId": "5", "question": "What?", "answers": ["red", "a red"], "data_split": "val"}
    parquet(root / folder / "validation-00000-of-00001.parquet", {**row, "image": embedded()})
    return None, f"What?\n{SHORT_ANSWER}", "Red"


def infovqa(root):
    return docvqa(root, "infovqa/InfographicVQA")


def first_record(name, file):
    """Write the first record of a benchmark's sample."""
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(json.loads((SAMPLES / name / "ground_truth.json").read_text())[:1]))


def ocrbench(root):
    first_record("ocrbench", root / "ocrbench" / "OCRBench.json")
    return "ocrbench/OCRBench_Images/IIIT5K/1.jpg", f"What is written?\n{SHORT_ANSWER}", "stop"


def hallusionbench(root):
    first_record("hallusionbench", root / "hallusionbench" / "HallusionBench.json")
    return "hallusionbench/hallusion_bench/VD/ocr/0_0.png", "Is it longer?", "yes"


def mmmu(root):
    row = {"id": "validation_Art_Theory_1", "question": "<image 1> or <image 2>?", "options": "['None', 'B']"}
    row |= {"answer": "A", "question_type": "multiple-choice", "image_1": embedded(), "image_2": embedded()}
    parquet(root / "mmmu" / "data" / "validation-00000-of-00001.parquet", row)
    return None, f"<image 1> or <image 2>?\n\n(A) None\n(B) B\n\n{OPTION_LETTER}", "(A)"


def mmmu_pro(root):
    row = {"id": "test_History_1", "question": "<image 1>?", "options": "['x', 'y']", "answer": "B"}
    file = root / "mmmu_pro" / "standard (10 options)" / "test-00000-of-00002.parquet"
    parquet(file, {**row, "subject": "History", "image_1": embedded()})
    request = "Answer with the option letter from the given choices directly."
    return None, f"<image 1>?\nA. x\nB. y\n\n{request}", "Answer: B"
