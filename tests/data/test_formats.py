"""formats.py, html_text.py and rows.py: documents that are not plain text, whole and damaged."""

import gzip
import json
import random
import sys
import zipfile

import pytest

from minillm.data import documents, formats
from minillm.data.skipped import about_skipped
from minillm.errors import UnavailableError, UsageError

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
BODY = (
    "<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>One </w:t></w:r>"
    "<w:r><w:t xml:space='preserve'>caf\u00e9 &amp; co</w:t></w:r></w:p>"
    "<w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t></w:r>"
    "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
    "<w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom>"
    "<w:ins><w:r><w:t>new</w:t></w:r></w:ins></w:p>"
    "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>1</w:t></w:r></w:p></w:tc>"
    "<w:tc><w:p><w:r><w:t>2</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
)
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
CONTAINER = '<container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
PACKAGE = (
    '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
    '<item id="n" href="nav.xhtml" properties="nav"/><item id="b" href="text/two%20b.xhtml"/>'
    '<item id="a" href="one.xhtml"/></manifest><spine><itemref idref="n"/><itemref idref="a"/>'
    '<itemref idref="b"/></spine></package>'
)


def texts(*paths, **settings):
    return [d.text for d in documents.find([str(p) for p in paths], **settings).documents()]


def packed(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def docx(path, body=BODY, before=""):
    xml = f"<?xml version='1.0' encoding='UTF-8'?>{before}<w:document xmlns:w='{WORD}'><w:body>"
    return packed(path, **{"word/document.xml": f"{xml}{body}</w:body></w:document>"})


def epub(path, **changed):
    members = {
        "META-INF/container.xml": CONTAINER,
        "OEBPS/book.opf": PACKAGE,
        "OEBPS/nav.xhtml": "<p>contents</p>",
        "OEBPS/one.xhtml": "<html><head><title>t</title></head><body><h1>One</h1><p>caf&eacute;",
        "OEBPS/text/two b.xhtml": "<p>two</p>",
        **changed,
    }
    return packed(path, **{name: text for name, text in members.items() if text is not None})


def test_a_word_document_gives_its_words(tmp_path):
    wanted = "One caf\u00e9 & co\na\tb\ncnew\n1\t2\n"
    assert texts(docx(tmp_path / "a.DOCX")) == [wanted]
    assert texts(tmp_path) == [wanted]


def test_an_e_book_gives_its_chapters_in_the_order_of_its_spine(tmp_path):
    assert texts(epub(tmp_path / "a.epub")) == ["One\n\ncaf\u00e9\n\ntwo\n"]


def test_a_page_gives_what_a_reader_sees(tmp_path):
    page = (
        "<!DOCTYPE html><html><head><title>T</title><style>a {}</style><script>if (a<b) {}"
        "</script></head><body><h1>A &amp; B</h1>\n<p>One <b>two</b>\n  three<br>four<p>caf&eacute;"
        "&nbsp;x<ul><li>a<li>b</ul><pre>\n  x\n    y\n</pre><table><tr><td>1<td>2<tr><td>3</table>"
    )
    (tmp_path / "a.html").write_text(page)
    wanted = "A & B\n\nOne two three\nfour\n\ncaf\u00e9\u00a0x\n\na\nb\n\n  x\n    y\n\n1\t2\n3\n"
    assert texts(tmp_path / "a.html") == [wanted]


@pytest.mark.parametrize(
    "data",
    [
        '<meta charset="iso-8859-1"><p>\u00e9\u201cq'.encode("cp1252"),
        "<?xml version='1.0' encoding='windows-1252'?><p>\u00e9\u201cq".encode("cp1252"),
        "<p>\u00e9\u201cq".encode("utf-16"),
        b"\xef\xbb\xbf<meta charset=latin1><p>\xc3\xa9\xe2\x80\x9cq",
        '<meta charset="no-such"><p>\u00e9\u201cq'.encode(),
    ],
)
def test_a_page_says_its_encoding(tmp_path, data):
    (tmp_path / "a.htm").write_bytes(data)
    assert texts(tmp_path) == ["\u00e9\u201cq\n"]


def test_a_notebook_gives_its_cells_without_outputs(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Head\n", "text"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "secret"}]},
        {"cell_type": "raw", "source": "raw"},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4}))
    assert texts(tmp_path) == ["# Head\ntext\n\nx = 1\n"]


def test_an_old_notebook_gives_the_cells_of_all_its_sheets(tmp_path):
    first = [{"cell_type": "heading", "level": 1, "source": "Head"}]
    second = [{"cell_type": "code", "input": ["x = 1\n", "y"], "outputs": ["secret"]}]
    sheets = [{"cells": first}, {"cells": second}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"worksheets": sheets, "nbformat": 3}))
    assert texts(tmp_path) == ["Head\n\nx = 1\ny\n"]


def test_a_pdf_needs_pypdf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(UnavailableError, match=r'a.pdf: .*pip install "minillm\[pdf\]"'):
        texts(tmp_path / "a.pdf")
    source = documents.find([str(tmp_path)])
    assert [d.text for d in source.documents()] == ["b"]
    assert about_skipped(source.skipped).endswith(f"1 file (1 .pdf); {formats.NO_PDF}")


def test_a_pdf_is_read(tmp_path):
    pytest.importorskip("pypdf")
    draw = b"BT /F1 12 Tf 20 100 Td (Hello page) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 4 0 R /Resources "
        b"<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >> stream\n%s\nendstream" % (len(draw), draw),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj %s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    data += b"xref\n0 5\n0000000000 65535 f \n%strailer << /Size 5 /Root 1 0 R >>\n" % table
    (tmp_path / "a.pdf").write_bytes(data + b"startxref\n%d\n%%%%EOF" % data.index(b"xref"))
    assert texts(tmp_path) == ["Hello page\n"]
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4 and rubbish")
    with pytest.raises(UsageError, match=r"a.pdf: a damaged or locked PDF"):
        texts(tmp_path)


DAMAGED = {
    "not a zip": lambda path: path.write_bytes(b"rubbish"),
    "empty": lambda path: path.write_bytes(b""),
    "no document": lambda path: packed(path, other="x"),
    "torn": lambda path: path.write_bytes(docx(path).read_bytes()[:200]),
    "not XML": lambda path: docx(path, "<w:p>"),
    "entities": lambda path: docx(path, "&b;", BOMB),
    "deep": lambda path: docx(path, "<w:p>" * 10_000 + "</w:p>" * 10_000),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_word_document_is_named(tmp_path, damage):
    damage(tmp_path / "a.docx")
    with pytest.raises(UsageError, match="a.docx: a Word document, but damaged"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.docx", "a.epub"])
@pytest.mark.parametrize("start, what", [
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document with a password, or an old one"),
    (b"{\\rtf1 ", "RTF; save it as .docx or plain text"),
    (b"%PDF-1.4", "a PDF; let its name end in .pdf"),
])  # fmt: skip
def test_a_document_that_is_another_kind_of_file_is_called_that(tmp_path, name, start, what):
    (tmp_path / name).write_bytes(start + bytes(600))
    with pytest.raises(UsageError, match=f"{name}: is {what}"):
        texts(tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"META-INF/container.xml": None}, "an e-book, but damaged"),
        ({"META-INF/container.xml": "<container/>"}, "an e-book, but damaged"),
        ({"OEBPS/book.opf": PACKAGE.replace('id="a"', 'id="c"')}, "an e-book, but damaged"),
        ({"OEBPS/one.xhtml": None}, "an e-book, but damaged"),
        ({"OEBPS/one.xhtml": b"\xff"}, "one.xhtml: byte 0xff at offset 0 is not UTF-8"),
        ({"META-INF/encryption.xml": "<u URI='OEBPS/one.xhtml'/>"}, "its text is encrypted"),
    ],
)
def test_a_damaged_e_book_is_named(tmp_path, changed, message):
    epub(tmp_path / "a.epub", **changed)
    with pytest.raises(UsageError, match=f"a.epub: .*{message}|a.epub: {message}"):
        texts(tmp_path)


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LIMIT", 100_000)
    docx(tmp_path / "a.docx", "<w:p/>" * 100_000)
    with pytest.raises(UsageError, match="a.docx: unpacks to more than"):
        texts(tmp_path)


@pytest.mark.parametrize("make, name", [(docx, "a.docx"), (epub, "a.epub")])
def test_flipped_bytes_end_in_text_or_in_one_line(tmp_path, make, name):
    whole = make(tmp_path / name).read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / name).write_bytes(data)
        try:
            texts(tmp_path / name)
        except UsageError as error:
            assert name in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("name, what", [("a.zip", "a zip archive"), ("a.odt", "a zip archive")])
def test_an_archive_is_refused_as_one_and_not_as_a_pickle(tmp_path, name, what):
    packed(tmp_path / name, content="x")
    with pytest.raises(UsageError, match=f"{name}: {what}, not text; unpack it first"):
        texts(tmp_path / name)
    packed(tmp_path / name, **{"archive/data.pkl": b"\x80\x02."})
    with pytest.raises(UsageError, match="pickled files are never read"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    "content, wanted",
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('\n [\n{"text": "a", "n": 1}\n]\n', ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{"data": [{"text": "a"}]}', ['{"data": [{"text": "a"}]}']),
        ("[1, 2]", ["[1, 2]"]),
        ("just text", ["just text"]),
    ],
)
def test_a_json_file_is_rows_where_it_holds_rows(tmp_path, content, wanted):
    (tmp_path / "a.json").write_text(content)
    assert texts(tmp_path / "a.json") == wanted


def test_a_json_file_of_faulty_rows_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"body": "b"}]')
    with pytest.raises(
        UsageError, match='a.json:2: .* "text"; it has body: name one with text_column'
    ):
        texts(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"text": "a"},')
    with pytest.raises(UsageError, match="a.json: an array of rows, but not valid JSON"):
        texts(tmp_path / "a.json")


@pytest.mark.parametrize("row", [{"text": None}, {"id": 3}, {"messages": [{"content": "a"}]}, 3])
def test_a_row_without_any_text_says_what_to_do(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(row))
    with pytest.raises(UsageError, match='a.jsonl:2: .* "text"; take the row out, or give it'):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_the_column_of_rows_can_be_named(tmp_path, name):
    row = json.dumps({"title": "t", "body": "b"})
    data = (f"[{row}]" if name == "a.json" else row).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert texts(tmp_path / name, text_column="body") == ["b"]
    assert texts(tmp_path, text_column="body") == ["b"]
    with pytest.raises(UsageError, match="it has title, body: name one with text_column"):
        texts(tmp_path / name)


def test_packed_text_is_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'[{"text": "row"}]'))
    assert texts(tmp_path) == ["text", "row"]


def test_what_a_folder_passes_over_is_counted(tmp_path):
    names = "a.txt b.csv c.CSV d.png e.tar.gz noending f.json .hidden ~$g.docx sub/h.csv .git/x"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    source = documents.find([str(tmp_path)])
    skipped = source.skipped.copy()
    assert [d.text for d in source.documents("strict", skipped)] == ["a.txt"]
    assert about_skipped(skipped) == (
        "text      skipped 7 files (3 .csv, 1 .gz, 1 .json, 1 .png, 1 without an ending); "
        "3 hidden; 1 links to folders; 1 blank document"
    )
    assert about_skipped(documents.find([str(tmp_path / "a.txt")]).skipped) == ""


def test_a_folder_without_text_says_what_is_in_it(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UsageError, match=r"no text in this folder, .*; it has 1 file \(1 .csv\)"):
        documents.find([str(tmp_path)])


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "UTF-8", "utf-8-sig"])
def test_the_encoding_can_be_named(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("caf\u00e9 \u201cq\u201d\n".encode(encoding))
    rows = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in ("\u00e9", "x"))
    (tmp_path / "b.jsonl").write_bytes(rows.encode(encoding))
    assert texts(tmp_path, encoding=encoding) == ["caf\u00e9 \u201cq\u201d\n", "\u00e9", "x"]


@pytest.mark.parametrize("byte", [0x91, 0x92, 0x93, 0x94, 0x96, 0x97])
def test_the_quotes_of_windows_hint_at_their_encoding(tmp_path, byte):
    (tmp_path / "a.txt").write_bytes(b"it" + bytes([byte]) + b"s")
    with pytest.raises(UsageError, match=f"a.txt: byte 0x{byte:x} at offset 2 .*encoding cp1252"):
        texts(tmp_path)


def test_the_quotes_of_windows_are_seen_behind_other_letters_but_not_in_other_scripts(tmp_path):
    text = "d\u00e9j\u00e0 vu, she said: \u201cno\u201d"
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    with pytest.raises(UsageError, match=r"byte 0xe9 at offset 1 .*encoding cp1252"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(
        "\u041f\u0440\u0438\u0432\u0435\u0442".encode("cp866") + b"\x93"
    )
    with pytest.raises(UsageError, match="byte 0x8f at offset 0 .* name its encoding"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["no-such", "hex", "rot13", "undefined", ""])
def test_an_encoding_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=f"encoding {name}: no such encoding"):
        texts(tmp_path, encoding=name)
    (tmp_path / "a.txt").write_bytes(b"a\x81b")
    with pytest.raises(UsageError, match="byte 0x81 at offset 1 is not cp1252"):
        texts(tmp_path, encoding="cp1252")
