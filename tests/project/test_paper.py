"""docs/paper.md is what its results say."""

from benchmarks.paper import PAGE, page


def test_the_page_is_made_of_the_stored_results():
    text, figures = page()
    assert PAGE.read_text(encoding="utf-8") == text, "`make paper` writes it anew"
    assert {path.name for path in PAGE.parent.joinpath("paper").rglob("*.svg")} == {path.name for path in figures}
