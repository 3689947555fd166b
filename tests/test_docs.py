"""Every block of docs/ runs in order, or says why not."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_pages import DOCS, Block, Page, pages, read_page
from docs_runner import BlockError, Server, check_output, make_clone, run_page

from tove_llava.cli import main, verbs
from tove_llava.train.run import main as train

PAGES = pages()
RUN = [page for page in PAGES if any(block.is_run for block in page.blocks)]
READMES = [DOCS.parent / name / "README.md" for name in (".", "benchmarks", "playground")]
LINKED = [*sorted(DOCS.rglob("*.md")), *READMES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_is_to_be_done_with_it(page: Page) -> None:
    assert page.needs <= {"scenes", "model"}
    for block in page.blocks:
        assert block.language, f"{block.where}: no language; write text for what is no code"
        assert block.language == "text" or block.kind, f"{block.where}: no known comment above it; see docs_pages.py"
        assert block.kind not in ("with", "file", "not run") or block.argument, f"{block.where}: the comment is cut off"
        for verb in re.findall(r"\btove-llava ([a-z][a-z-]+)", block.text if block.language == "bash" else ""):
            assert verb in verbs(), f"{block.where}: there is no verb {verb!r}"
        for name in re.findall(r"\bbash ((?:scripts|eval|playground)/[\w./-]+\.sh)", block.text):
            assert (DOCS.parent / name).is_file(), f"{block.where}: there is no {name}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Playground scenes, a few."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    assert main(["scenes", "--out", str(folder), "--train", "24", "--val", "6"]) == 0
    return folder


@pytest.fixture(scope="module")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after both stages, a step each."""
    folder = tmp_path_factory.mktemp("model")
    common = ["--image_folder", str(scenes / "images"), "--max_steps", "1", "--report_to", "none"]
    captions = ["--stage", "pretrain", "--data_path", str(scenes / "train_captions.json")]
    assert train([*common, *captions, "--output_dir", str(folder / "pretrain")]) == 0
    questions = ["--stage", "finetune_lora", "--data_path", str(scenes / "train_instruct.json")]
    stage2 = [*common, *questions, "--pretrained", str(folder / "pretrain")]
    assert train([*stage2, "--output_dir", str(folder / "finetune_lora")]) == 0
    return folder / "finetune_lora"


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_page_runs(page: Page, server: Server, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    given = {name: request.getfixturevalue(name) for name in sorted(page.needs)}
    run_page(page, make_clone(tmp_path / "clone", **given), server.environment())


def anchors(page: Path) -> set[str]:
    """List the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page} links to {link}, and {file.name} has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"]({page.name})" not in index] == []


def test_pages_that_the_code_names_exist() -> None:
    for folder in ("tove_llava", "tests", "scripts", "benchmarks", "playground"):
        for file in (DOCS.parent / folder).rglob("*"):
            for name in _named_pages(file) if file.suffix in (".py", ".sh", ".yaml", ".md") else []:
                assert (DOCS.parent / name).is_file(), f"{file} names {name}, which is not there"


def _named_pages(file: Path) -> list[str]:
    return re.findall(r"\bdocs/(?:(?:guides|reference|background)/[\w-]+|architecture)\.md", file.read_text("utf-8"))


# --- the mechanism itself ---------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Page:
    (folder / "page.md").write_text(text)
    return read_page(folder / "page.md")


def test_marks_are_read(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        "<!-- test needs: scenes, model -->\n<!-- test -->\n```bash\necho 1\n```\n\n```python\nx\n```\n"
        "<!-- test: file a/b.yaml -->\n```yaml\nk: v\n```\n<!-- test: not run, needs a GPU -->\n```bash\nnvcc\n```\n"
        "<!-- test: output -->\n```text\n1\n```\n",
    )
    assert page.needs == {"scenes", "model"}
    run, unmarked, file, skipped, output = page.blocks
    assert run.is_run and run.text == "echo 1\n" and run.line == 3
    assert unmarked.kind is None and not unmarked.is_run
    assert file.file == "a/b.yaml" and (skipped.kind, skipped.argument) == ("not run", "needs a GPU")
    assert output.kind == "output"
    with pytest.raises(ValueError, match="not closed"):
        write(tmp_path, "```bash\necho\n")


def test_blocks_share_a_folder_and_a_failure_names_page_and_line(tmp_path: Path, server: Server) -> None:
    page = write(
        tmp_path,
        "<!-- test: file data/name.txt -->\n```text\nkite\n```\n"
        "<!-- test -->\n```bash\ncp data/name.txt copy.txt\n```\n"
        "<!-- test -->\n```python\nprint('a', open('copy.txt').read())\n```\n"
        "<!-- test: goes on -->\n```python\nprint('b', open('copy.txt').name)\n```\n"
        "<!-- test: output -->\n```text\na ...\nb copy.txt\n```\n",
    )
    folder = tmp_path / "work"
    folder.mkdir()
    run_page(page, folder, server.environment())
    assert (folder / "copy.txt").read_text() == "kite\n"
    for bad, message in (
        ("<!-- test -->\n```bash\ntrue\nfalse | true\necho no\n```\n", "page.md, line 2: the block failed"),
        ("<!-- test -->\n```python\nraise SystemExit('stop')\n```\n", "exit code 1(.|\n)*stop"),
        ("<!-- test -->\n```bash\ntove-llava no-such-verb\n```\n", "exit code 2(.|\n)*unknown verb"),
        ("<!-- test -->\n```python\nx = 1\n```\n<!-- test: goes on -->\n```python\n\nassert x == 2\n```\n", "line 8"),
        ("<!-- test: goes on -->\n```python\nx\n```\n", "line 2: it goes on, but"),
        ("<!-- test -->\n```ruby\nputs 1\n```\n", "'ruby' cannot be run"),
        ("<!-- test -->\n```bash\necho 1\n```\n<!-- test: output -->\n```text\n2\n```\n", "line 6: the line '2'"),
    ):
        with pytest.raises(BlockError, match=message):
            run_page(write(tmp_path, bad), folder, server.environment())


def test_output_is_compared_in_order() -> None:
    def shown(text: str) -> Block:
        return Block("page.md", 1, "text", text, "output")

    check_output(shown("a 1\n...\nc ... 3\n"), "a 1\nb\nc x 3\n")
    for wrong in ("c\na 1\n", "a\n", "a 1\nd\n", "c x\n"):
        with pytest.raises(BlockError):
            check_output(shown(wrong), "a 1\nb\nc x 3\n")
