"""Check that the documentation names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"docs/log.md", "docs/from-lwm.md"}))
def test_paths_and_links_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    places = (ROOT, ROOT / "src" / "lwm", ROOT / "tests")
    for name in re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py|\.c|/))`", text):
        if name not in ("serving/", "vqgan/"):  # planned, and a folder of model directories
            assert any((place / name).exists() for place in places), name
    for link, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / link
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }
