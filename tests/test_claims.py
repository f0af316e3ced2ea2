"""The script behind `make claims` reads the passages of the pages, and finds numbers that no longer hold."""

import sys
from pathlib import Path

import claims
import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_comments_are_invisible_and_whole() -> None:
    """GitHub shows a comment that has -- in it, and one that begins a line within a paragraph ends the paragraph."""
    found = [claim for page in claims.PAGES for claim in claims.claims_of(page, (ROOT / page).read_text(encoding="utf-8"))]
    assert len(found) > 20
    assert all("--" not in claim.command and TEXT.count("<!-- claim") == TEXT.count("<!-- /claim") for claim in found)
    assert all("<!-- claim" not in claim.text for claim in found)


@pytest.mark.parametrize(
    ("factor", "printed", "wrong"),
    [
        (1, "before | 0.98 of 1,204 in 2.0 s, by `ig` | after", ""),
        (1, "| 0.97 of 1,204 in 2.0 s, by `ig` |", "0.98 is now 0.97"),
        (1, "| 0.98 of 1,204 in 2.1 s, by `ig` |", "2.0 is now 2.1"),
        (1, "| 0.98 of 1,204 in 2.0 s, by `atp` |", "the page says 'in 2.0 s , by ` ig"),
        (1, "", "the page says"),
        (1, 2 * "| 0.98 of 1,204 in 2.0 s, by `ig` |", "prints its words 2 times"),
        (1.5, "| 0.98\nof 1,204 in 2.9 s, by `ig` |", ""),
        (1.5, "| 0.98 of 1,204 in 3.1 s, by `ig` |", "2.0 is now 3.1"),
        (1.5, "| 0.98 of 1,204 in 1.3 s, by `ig` |", "2.0 is now 1.3"),
        (1.5, "| 0.98 of 1,205 in 2.0 s, by `ig` |", "1,204 is now 1,205"),
        (1.5, "| -0.98 of 1,204 in 2.0 s, by `ig` |", "0.98 is now -0.98"),
    ],
)
def test_a_passage_beside_what_is_printed(factor: float, printed: str, wrong: str) -> None:
    claim = claims.Claim("README.md", "| 0.98 of 1,204\nin 2.0 s, by `ig` |", "none", factor, long=False)
    found = "; ".join(claims.compare(claim, printed).wrong)
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_writing_repairs_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place, where words agree; a command that fails, or prints other words, is told and nothing is written."""
    page = tmp_path / "README.md"
    page.write_text(
        "Of <!-- claim: echo 3 of 41 found, by 0.5 -->3 of\n40 found, by 0.25<!-- /claim -->, <!-- claim: false -->1<!-- /claim -->"
        "<!-- claim: echo 5 pears -->4 apples<!-- /claim --> <!-- claim long: echo 8 -->7<!-- /claim -->"
    )
    for name, value in (("ROOT", tmp_path), ("OUTPUTS", tmp_path / "kept"), ("PAGES", ("README.md",))):
        monkeypatch.setattr(claims, name, value)
    before = page.read_text()
    for arguments, after, holding in (
        ([], before, "0 of 3"),
        (["--write"], before.replace("\n40", "\n41").replace("0.25", "0.5"), "0 of 3"),
        (["--resume"], before.replace("\n40", "\n41").replace("0.25", "0.5"), "1 of 3"),
    ):
        monkeypatch.setattr(sys, "argv", ["claims", *arguments])
        with pytest.raises(SystemExit) as ended:
            claims.main()
        assert ended.value.code == 1
        assert page.read_text() == after
        said = capsys.readouterr().out
        assert f"{holding} passages hold; 1 not selected" in said
        assert "the command exited with code 1" in said
        assert "the page says '4 apples', the command prints '5 pears'" in said
