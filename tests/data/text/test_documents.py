"""Check the text of each kind of document, and the documents that are refused."""

import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter
from reportlab.pdfgen.canvas import Canvas

from lwm.core.errors import InputError
from lwm.data.text import zipped_documents
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
    with pytest.raises(InputError, match=r"no text layer.*OCR"):
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
        b"\xff\xfe\x00",
        random.Random(0).randbytes(5000),
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


FRENCH = "L’été déjà passé, l’élève n’a pas reçu la réponse. Où êtes-vous, garçon ?"
RUSSIAN = "Привет, как дела? Мы едем в Москву завтра утром."


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.html", f'<meta charset="windows-1251"><p>{RUSSIAN}'.encode("cp1251"), RUSSIAN),
        (
            "a.htm",
            "<html><head><META http-equiv=Content-Type content='text/html; charset=ISO-8859-1'>"
            f"<body>{FRENCH}".encode("cp1252"),
            FRENCH,
        ),
        ("a.xml", f"<?xml version='1.0' encoding='koi8-r'?>\n{RUSSIAN}".encode("koi8-r"), RUSSIAN),
        ("a.html", f'<meta charset="utf-16"><p>{RUSSIAN}'.encode(), RUSSIAN),
        ("a.html", f'<meta charset="no-such"><p>{RUSSIAN}'.encode(), RUSSIAN),
        ("a.html", b"\xef\xbb\xbf" + f'<meta charset="koi8-r"><p>{RUSSIAN}'.encode(), RUSSIAN),
        ("a.txt", f"<!DOCTYPE html><title>x</title><p>{RUSSIAN}".encode(), f"x\n{RUSSIAN}"),
        ("a.txt", RUSSIAN.encode("utf-32"), RUSSIAN),
        ("a.html", f'<meta charset="punycode"><p>{RUSSIAN}'.encode(), RUSSIAN),
        ("a.html", f'<meta charset="unicode-escape"><p>{RUSSIAN}'.encode(), RUSSIAN),
    ],
)
def test_declared_encodings_are_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    expected: str,
) -> None:
    text = read_document(write(tmp_path, name, content))
    assert text.removeprefix("<?xml version='1.0' encoding='koi8-r'?>\n") == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "cp1252"),
        ("Der Käse ist grün, über alle Maßen schön. Die Straße führt zum Fluß.", "latin-1"),
        (RUSSIAN, "cp1251"),
        ("こんにちは世界。これはテストです。", "shift_jis"),
        ("你好，世界，这是一个测试文件。", "gb18030"),
        ("你好，世界，这是一个测试文件。x" * 3000, "gb18030"),  # one line, longer than the sample
        ("It’s “quoted” – by the editor… " * 5 + "Yes.", "cp1252"),
        (FRENCH, "utf-16-le"),
        (FRENCH, "utf-16-be"),
    ],
)
def test_an_encoding_is_guessed_with_a_remark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, encoding: str
) -> None:
    content = ("plain lines\n" * 10_000 + text).encode(encoding)
    assert read_document(write(tmp_path, "a.txt", content)).endswith(f"\n{text}")
    assert "a guess" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_damaged_characters_leave_the_rest_of_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    content = (FRENCH * 20).encode(encoding)
    assert read_document(write(tmp_path, "cut.txt", content[:-1])).startswith(FRENCH * 19)
    middle = len(content) // 2
    half = content[:middle].decode(encoding, errors="ignore")
    broken = content[:middle] + b"\xff\xdf" * 2 + content[middle:]
    text = read_document(write(tmp_path, "broken.txt", broken))
    assert text.startswith(half)
    assert text.endswith((FRENCH * 20)[len(half) + 1 :])
    assert "characters that are not valid UTF-" in " ".join(capsys.readouterr().err.split())


def test_words_stay_whole_and_blocks_begin_lines(tmp_path: Path) -> None:
    page = """<?xml version="1.0"?><html><head><title>T</title><script src="a.js"/></head><body>
    <p title='a > b'><span class="first">O</span>nce upon\n a <i>time</i>,<br/>there</p>was
    <![CDATA[a <king>]]><!-- <p>hidden -->.<ul><li>one<li>two</ul><pre>x\ny</pre>
    <table><tr><td>a<td><b>b</b></tr><tr><td></td><td>d</td></tr></table>
    <p don't="x">&lt;p&gt; &#233; &#99999999999;&amp;amp;</p><STYLE>p {}</STYLE ></body></html>"""
    assert read_document(write(tmp_path, "a.xhtml", page)).split("\n") == [
        *("T", "Once upon a time,", "there", "was a <king>.", "one", "two", "x", "y"),
        *("a\tb", "\td", "<p> é \ufffd&amp;"),
    ]


@pytest.mark.parametrize("part", ["<!--", "<!", "<a ", '<a b="', "</", "<![CDATA[", "&#", "<div>"])
def test_pages_take_linear_time(tmp_path: Path, part: str) -> None:
    started = time.perf_counter()
    read_document(write(tmp_path, "a.html", "<p>text" + part * 100_000))
    assert time.perf_counter() - started < 5.0


def test_a_text_about_pdf_is_text(tmp_path: Path) -> None:
    text = "The header %PDF-1.7 begins a file."
    assert read_document(write(tmp_path, "a.txt", text)) == text


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_pdfs_open_without_a_password_or_are_refused(tmp_path: Path, algorithm: str) -> None:
    plain = tmp_path / "plain.pdf"
    canvas = Canvas(str(plain))
    canvas.drawString(72, 720, "The needle lies here.")
    canvas.save()
    for password in ("", "secret"):
        writer = PdfWriter(clone_from=plain)
        writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
        file = tmp_path / "locked.pdf"
        writer.write(file)
        if password:
            with pytest.raises(InputError, match="locked by a password"):
                read_document(file)
        else:
            assert read_document(file) == "The needle lies here."


def zipped(
    file: Path, contents: Mapping[str, str | bytes], compression: int = ZIP_DEFLATED
) -> Path:
    with ZipFile(file, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
MC = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
WORD = "word/document.xml"
LETTER = f"""<?xml version="1.0" encoding="UTF-8"?><w:document {W} {MC}><w:body>
<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>The ti</w:t></w:r><w:r><w:t>tle</w:t></w:r>
</w:p><w:p><w:r><w:t xml:space="preserve">Left </w:t><w:tab/><w:t>right &amp; </w:t><w:br/>
<w:t>below</w:t></w:r><w:del><w:r><w:delText>gone</w:delText><w:t>gone</w:t></w:r></w:del>
<w:ins><w:r><w:t>, new</w:t></w:r></w:ins><w:hyperlink><w:r><w:instrText>HYPERLINK x</w:instrText>
<w:t>, linked</w:t></w:r></w:hyperlink></w:p>
<w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc>
<w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr>
<w:tr><w:tc><w:p/></w:tc><w:tc><w:p><w:r><w:t>d</w:t></w:r></w:p></w:tc></w:tr></w:tbl>
<w:sdt><w:sdtContent><w:p><w:r><mc:AlternateContent><mc:Choice><w:t>once</w:t></mc:Choice>
<mc:Fallback><w:t>twice</w:t></mc:Fallback></mc:AlternateContent></w:r></w:p></w:sdtContent></w:sdt>
</w:body></w:document>"""
CONTAINER, PACKAGE = "META-INF/container.xml", "OEBPS/book.opf"
SPINE = """<package xmlns="http://www.idpf.org/2007/opf"><manifest>
<item id="one" href="text/first%20part.xhtml"/><item id="two" href="second.xhtml"/>
<item id="toc" href="toc.xhtml" properties="nav"/><item id="ad" href="ad.xhtml"/></manifest>
<spine><itemref idref="toc"/><itemref idref="two"/><itemref idref="ad" linear="no"/>
<itemref idref="one"/></spine></package>"""
BEGINNING = "<?xml version='1.0' encoding='windows-1251'?><html><p>Начало.</p></html>"
BOOK: dict[str, str | bytes] = {
    "mimetype": "application/epub+zip",
    CONTAINER: f'<container><rootfiles><rootfile full-path="{PACKAGE}"/></rootfiles></container>',
    PACKAGE: SPINE,
    "OEBPS/text/first part.xhtml": "<html><head><title/></head><p>The end.</p></html>",
    "OEBPS/second.xhtml": BEGINNING.encode("cp1251"),
    "OEBPS/toc.xhtml": "<html>Contents</html>",
    "OEBPS/ad.xhtml": "<html>Buy</html>",
}


def test_parts_of_word_documents_may_have_other_places(tmp_path: Path) -> None:
    cells = "<w:sdt><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc></w:sdt><w:tc><w:p/></w:tc>"
    box = "<w:p><w:r><w:t>out</w:t><w:txbx><w:p><w:t>in</w:t></w:p></w:txbx></w:r></w:p>"
    document = f"<w:document {W}><w:tbl><w:tr>{cells}</w:tr></w:tbl>{box}</w:document>"
    file = zipped(tmp_path / "cloud.docx", {"word/document2.xml": document.encode("utf-16")})
    assert read_document(file) == "a\t\nout\nin"


@pytest.mark.parametrize("name", ["letter.docx", "letter.zip", "letter"])
def test_word_documents_are_read(tmp_path: Path, name: str) -> None:
    text = read_document(zipped(tmp_path / name, {WORD: LETTER}))
    assert text == "The title\nLeft \tright & \nbelow, new, linked\na\tb\n\td\nonce"


def test_epubs_are_read_in_the_order_of_their_spine(tmp_path: Path) -> None:
    assert read_document(zipped(tmp_path / "book.epub", BOOK)) == "Начало.\n\nThe end."


def encrypted(name: str) -> dict[str, str | bytes]:
    reference = f'<CipherData><CipherReference URI="{name}"/></CipherData>'
    return {"META-INF/encryption.xml": f"<a><EncryptedData>{reference}</EncryptedData></a>"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"notes.txt": "text"}, "neither docx nor epub"),
        ({"xl/workbook.xml": "<a/>"}, "an Excel workbook; save it as"),
        ({"content.xml": "<a/>"}, "an OpenDocument file; save it as docx"),
        ({WORD: "<w:document>"}, "broken or protected"),
        ({WORD: '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'}, "XML entities"),
        ({WORD: '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode("utf-16")}, "XML entities"),
        ({WORD: "<a>" * 100_000}, "nests more than"),
        ({WORD: f"<w:document {W}/>"}, "holds no text"),
        ({**BOOK, PACKAGE: SPINE.replace('id="two"', 'id="2"')}, "broken or protected"),
        ({**BOOK, CONTAINER: "<container/>"}, "broken or protected"),
        ({**BOOK, **encrypted("OEBPS/second.xhtml")}, "DRM"),
    ],
)
def test_other_archives_are_refused(
    tmp_path: Path, contents: dict[str, str | bytes], message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read_document(zipped(tmp_path / "file.zip", contents))
    assert "\n" not in str(raised.value)


def test_fonts_may_be_encrypted_and_archives_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zipped(tmp_path / "book.epub", {**BOOK, **encrypted("font.otf")})
    assert read_document(file).endswith("The end.")
    large = zipped(tmp_path / "large.docx", {WORD: LETTER + " " * 100_000})
    monkeypatch.setattr(zipped_documents, "_MAX_UNPACKED", 50_000)
    with pytest.raises(InputError, match="once unpacked; split it"):
        read_document(large)
    bomb = zipped(tmp_path / "bomb.docx", {WORD: LETTER}, ZIP_BZIP2)  # unpacks without a bound
    with pytest.raises(InputError, match="compressed by method 12"):
        read_document(bomb)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old or encrypted Office document; save it"),
        (b"{\\rtf1\\ansi text}", "RTF; save it as docx"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b"PK\x03\x04 cut", "broken"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_document(write(tmp_path, "file.txt", content))
