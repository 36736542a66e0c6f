"""Check the text of each kind of document, and the documents that are refused."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reportlab.pdfgen.canvas import Canvas

from lwm.core.errors import InputError
from lwm.data.text.documents import read_document


def write(directory: Path, name: str, content: bytes | str) -> Path:
    file = directory / name
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", "First line.\nZweite Zeile: grün."),
        ("plain.md", "# Title\n\n- *one*\n- two"),
        ("crlf.txt", "First line.\r\nSecond line."),
        ("mark.txt", b"\xef\xbb\xbfFirst line."),
        ("little.txt", "First line: grün.".encode("utf-16")),
        ("big.txt", b"\xfe\xff" + "First line: grün.".encode("utf-16-be")),
        ("noname", "  \n First line. \n "),
        ("program.py", "if a < b:\n    print('<html>')"),
    ],
)
def test_plain_text(tmp_path: Path, name: str, content: bytes | str) -> None:
    expected = {
        "crlf.txt": "First line.\nSecond line.",
        "mark.txt": "First line.",
        "little.txt": "First line: grün.",
        "big.txt": "First line: grün.",
        "noname": "First line.",
    }
    assert read_document(write(tmp_path, name, content)) == expected.get(name, content)


@pytest.mark.parametrize("name", ["page.html", "PAGE.HTM"])
def test_a_page_gives_its_visible_text(tmp_path: Path, name: str) -> None:
    page = """<!doctype html><html><head><title>The title</title><style>p {color: red}</style>
    <script>var secret = "<p>hidden</p>";</script></head><body><h1>Heading</h1>
    <p>Text with   <b>bold</b> &amp; <i>slanted</i> words.</p><!-- a remark -->
    <noscript>turn it on</noscript><template>unseen</template><ul><li>one<li>two</ul></body>"""
    text = read_document(write(tmp_path, name, page))
    joined = " ".join(text.split())
    assert joined == "The title Heading Text with bold & slanted words. one two"
    for hidden in ("secret", "color", "remark", "turn it on", "unseen", "<"):
        assert hidden not in text


def test_a_pdf_gives_the_text_of_its_pages(tmp_path: Path) -> None:
    file = tmp_path / "book.pdf"
    canvas = Canvas(str(file))
    for page in ("The needle lies in San Francisco.", "The second page follows."):
        canvas.drawString(72, 720, page)
        canvas.showPage()
    canvas.save()
    text = read_document(file)
    assert re.split(r"\n+", text) == [
        "The needle lies in San Francisco.",
        "The second page follows.",
    ]
    renamed = write(tmp_path, "book.txt", file.read_bytes())  # detected by its first bytes
    assert read_document(renamed) == text


def test_pdfs_without_text_or_broken_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "blank.pdf"
    canvas = Canvas(str(file))
    canvas.showPage()
    canvas.save()
    with pytest.raises(InputError, match="holds no text"):
        read_document(file)
    with pytest.raises(InputError, match=r"cut.pdf"):
        read_document(write(tmp_path, "cut.pdf", file.read_bytes()[:200]))
    with pytest.raises(InputError, match=r"junk.pdf"):
        read_document(write(tmp_path, "junk.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 4))


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n ", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_empty_files_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="holds no text"):
        read_document(write(tmp_path, "empty.txt", content))


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF\x02\x01\x01\x00\x00\x00",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        b"text with a \x00 in it",
        "grün".encode("latin-1"),
        b"\xff\xfe\x00",
    ],
)
def test_binary_files_are_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("file.txt", "file.html"):
        with pytest.raises(InputError, match=r"binary, not text"):
            read_document(write(tmp_path, name, content))


def test_directories_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        read_document(tmp_path)
    with pytest.raises(InputError, match=r"missing.txt cannot be read \(No such file"):
        read_document(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_document(write(tmp_path, "file", "text") / "below")


@given(st.binary(max_size=400), st.sampled_from(["a.txt", "a.html", "a.pdf"]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_text_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, pdf: bool
) -> None:
    file = write(tmp_path_factory.getbasetemp(), name, b"%PDF-1.4\n" * pdf + content)
    try:
        text = read_document(file)
    except InputError:
        return
    assert text == text.strip() != ""
