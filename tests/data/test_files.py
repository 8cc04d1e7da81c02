"""Files as people have them: every kind is read as it was written, and what is wrong is one line."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import re
import zipfile

import pandas as pd
import pytest

from fedllm_helpers import data
from fedllm_helpers.evaluation import multiple_choice
from fedllm_helpers.federation import client_app

TABLE = [("What, then, is gout?", "Crystals; in a joint."), ("Was heißt Übel?", "Nausea – 5 €")]
ROWS = [dict(zip(("question", "answer"), row, strict=True)) for row in TABLE]
LINES = "\n".join(json.dumps(row) for row in ROWS)
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def table(delimiter=",", header=("question", "answer"), end="\n"):
    """The rows as text with a delimiter, each cell in quotes that needs them."""
    rows = [header, *([cell if delimiter not in cell else f'"{cell}"' for cell in row] for row in TABLE)]
    return end.join(delimiter.join(row) for row in rows)


def parquet(frame):
    stream = io.BytesIO()
    frame.to_parquet(stream)
    return stream.getvalue()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


READ = {
    "semicolons.csv": table(";"),
    "tabs.tsv": table("\t"),
    "tabs.csv": table("\t"),
    "bars.CSV": table("|"),
    "capitals.csv": table(header=("Question", " ANSWER ")),
    "blanks.csv": table().replace(',"', ', "').replace("question,", "question , "),
    "said.csv": "sep=;\r\n" + table(";", end="\r\n"),
    "old_mac.csv": table(end="\r"),
    "empty_columns.csv": "\n".join(line + ",," for line in table().splitlines()),
    "first_lines_empty.csv": "\n\n" + table() + "\n\n",
    "mark.csv": table().encode("utf-8-sig"),
    "excel.csv": table(";").encode("cp1252"),
    "unicode_text.txt.csv": table("\t").encode("utf-16"),
    "little.csv": table().encode("utf-16-le"),
    "big.csv": table().encode("utf-16-be"),
    "utf32.csv": table().encode("utf-32"),
    "list.json": json.dumps(ROWS),
    "lines.json": LINES,
    "lines.jsonl": LINES + "\n\n",
    "lines.ndjson": LINES.replace("\n", "\r\n"),
    "list.jsonl": json.dumps(ROWS),
    "spread_out.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "wrapped.json": json.dumps({"version": "2", "data": ROWS}),
    "columns.json": pd.DataFrame(ROWS).to_json(),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "by_id.json": json.dumps({f"PMID{i}": row for i, row in enumerate(ROWS)}),
    "utf16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "rows.csv.json": table(),
    "rows.json.csv": json.dumps(ROWS),
    "plain.parquet": parquet(pd.DataFrame(ROWS)),
    "misnamed.csv": parquet(pd.DataFrame(ROWS)),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.csv.bz2": bz2.compress(table().encode()),
    "packed.csv.xz": lzma.compress(table().encode()),
    "packed.zip": zipped(**{"inside.csv": table()}),
    "unpacked.csv.gz": table(),
    "mac.zip": zipped(**{"cards.csv": table(), "__MACOSX/._cards.csv": "x", ".DS_Store": "x"}),
    "twice.zip": zipped(**{"cards.csv.gz": gzip.compress(table().encode())}),
    "said_on_a_mac.csv": "sep=;\r" + table(";", end="\r"),
    "unseen.csv": table(header=("\u200bquestion", "\ufeffanswer\u200e")),
    "marks_within.csv": table().replace("Was", "\ufeffWas"),
    "open_end.csv": table().replace("answer", "answer,", 1),
    "unicode_text.txt": table("\t").encode("utf-16"),
    "index.csv": pd.DataFrame(ROWS).to_csv(),
    "split.json": pd.DataFrame(ROWS).to_json(orient="split"),
    "records.json": pd.DataFrame(ROWS).to_json(orient="table"),
    "categories.parquet": parquet(pd.DataFrame(ROWS).astype("category")),
    "a file #1 – für alle.csv": table(),
}


@pytest.mark.parametrize("name", READ)
def test_the_same_rows_come_out_of_every_file(tmp_path, name, caplog):
    content = READ[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.INFO):
        cards = data.load_flashcards(str(tmp_path / name))
    assert [(card["question"], card["answer"]) for card in cards] == TABLE
    (said,) = caplog.messages
    assert name in said and "\n" not in said and re.search("(question|QUESTION)('|) from", said)


@pytest.mark.parametrize(
    ("name", "level", "says"),
    [
        ("semicolons.csv", "INFO", "csv, delimiter ';', utf-8; question from 'question', answer from 'answer'"),
        ("capitals.csv", "INFO", "question from 'Question', answer from 'ANSWER '"),
        ("excel.csv", "WARNING", "delimiter ';', cp1252; .*not UTF-8, so read as cp1252: look at its accents"),
        ("little.csv", "INFO", "utf-16-le"),
        ("lines.json", "INFO", "JSON lines, utf-8"),
        ("misnamed.csv", "INFO", "parquet; question"),
    ],
)
def test_a_line_says_what_was_found_out(tmp_path, name, level, says, caplog):
    content = READ[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.INFO):
        data.load_flashcards(str(tmp_path / name))
    (record,) = caplog.records
    assert record.levelname == level and re.search(says, record.message)


def test_cells_stay_as_they_were_written(tmp_path):
    """No number, gap, date or line end of Unicode is made of a text, and no cell is too long."""
    texts = ["NA", "None", "null", "nan", "007", "39.0", "1e5", "2020-01-01", "True", "-5", "a\u2028b\x0cc\x85d"]
    texts += ["two\nlines", 'said "so"', "x" * 200_000]
    rows = [{"question": f"q{i}?", "answer": text} for i, text in enumerate(texts)]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    for name in ("a.csv", "b.jsonl", "c.parquet"):
        assert list(data.load_flashcards(str(tmp_path / name))["answer"]) == texts, name
    values = '[{"question": "a", "answer": 39}, {"question": "b", "answer": 39.50}, {"question": "c", "answer": false}]'
    (tmp_path / "d.json").write_text(values)
    assert list(data.load_flashcards(str(tmp_path / "d.json"))["answer"]) == ["39", "39.50", "false"]
    (tmp_path / "e.parquet").write_bytes(parquet(pd.DataFrame({"question": ["a", "b"], "answer": [39, None]})))
    assert list(data.load_flashcards(str(tmp_path / "e.parquet"))["answer"]) == ["39"]


def q(**more):
    return json.dumps([{"question": "a?", "answer": "b"}, {"question": "c?", **more}])


BAD = [
    ("empty.json", "", "the file is empty"),
    ("blank.csv", " \n\t\n", "the file is empty"),
    ("header.csv", "question,answer\n", "column names, but no row below them"),
    (
        "no_header.csv",
        "What is a?,A.\nWhat is b?,B.\n",
        r"has the columns What is a\?, A\.; expected 'question' and 'answer'",
    ),
    ("one.csv", "question\na?\n", "has the columns question; expected"),
    ("cut.json", '[{"question": "a", "answer": "b"}, {"ques', "line 1 column 37 .*is the file whole"),
    ("line2.jsonl", LINES.replace('"answer": "Nau', '"answer" "Nau'), "line 2 column"),
    ("word.json", "nonsense", "cannot be read as JSON: Expecting value"),
    ("text.json", '"question"', "expected a list of rows .*row 1 is str"),
    ("numbers.json", "[1, 2]", "expected a list of rows .*row 1 is int"),
    ("none.json", "[]", "expected a list of rows .*there is none"),
    ("mapping.json", "{}", "expected a list of rows .*there is none"),
    ("gap.json", '[{"question": "a", "answer": "b"}, null]', "row 2 is NoneType"),
    ("deep.json", "[" * 50_000, "recursion"),
    ("twice.json", '[{"question": "a", "answer": "b", "answer": "c"}]', "'answer' twice"),
    ("twice.csv", "question,answer,answer\na,right,note\n", "question, answer, answer: 'answer' stands there twice"),
    ("nearly_twice.csv", "question,Answer,answer \na,b,c\n", "'answer' stands there twice"),
    (
        "two_rows.json",
        '[{"question": "a", "answer": "b"}, {"Question": "c", "answer": "d"}]',
        "'question' stands there twice",
    ),
    ("short.csv", "question,answer\na,b\nonly\n", "line 3 has another number of columns .*1 for 2"),
    ("long.csv", "question,answer\nWhat is a?,A, with a comma\n", "line 2 has another number of columns .*3 for 2"),
    ("after_sep.csv", "sep=;\nquestion;answer\na;b;c\n", "line 3 has another number"),
    ("open_quote.csv", 'question,answer\n"a,b\n', "line 2: unexpected end of data; is the file whole"),
    ("stray_quote.csv", 'question,answer\n"a" b,c\n', "line 2: ',' expected after"),
    ("zero.csv", "question,answer\na?,b\0c\n", "line 2 holds a zero byte"),
    (
        "cyrillic.csv",
        "question,answer\nЧто это такое?,Это дом\n".encode("cp1251"),
        r"not UTF-8 text \(byte 16, line 2\)",
    ),
    ("japanese.csv", "question,answer\n痛風とは,病気\n".encode("shift-jis"), "not UTF-8 text .*save it as UTF-8"),
    ("mixed.csv", "question,answer\nÜbel?,".encode() + b"schlecht f\xfcr\n", "not UTF-8 text .*line 2"),
    ("cut16.csv", b"\xff\xfeq\0u", "not UTF-16 text"),
    ("half16.csv", table().encode("utf-16")[:-1], "not UTF-16 text"),
    ("half.json", '[{"question": "a \\ud83d?", "answer": "b"}]', r"row 1: the question holds half a character"),
    (
        "half_late.json",
        '[{"question": "a", "answer": ""}, {"question": "b", "answer": "\\udc00"}]',
        "row 2: the answer holds half",
    ),
    ("list.json", q(answer=["x", "y"]), "row 2: the answer is a list .*expected text"),
    ("mapping_answer.json", q(answer={"text": ["x"]}), "row 2: the answer is a mapping .*expected text"),
    (
        "squad.json",
        '[{"question": "a", "context": "c", "answers": {"text": ["x"]}}]',
        "columns question, context, answers; expected",
    ),
    ("context.json", '[{"question": "a", "answer": "b", "context": ["c"]}]', "row 1: the context is a list"),
    ("hollow.jsonl", '{"question": "a", "answer": " "}', "no card with a question and an answer in 1 rows: 1 without"),
    ("columns.json", '[{"prompt": "a", "reply": "b"}]', "has the columns prompt, reply; expected 'question'"),
    ("both.json", '[{"question": "a", "answer": "b", "prompt": "c", "completion": "d"}]', "several of which may be"),
    ("answers.json", '[{"question": "a", "output": "b", "response": "c"}]', "several of which may be"),
    ("chat_both.json", json.dumps([{"messages": TURNS, "question": "a", "answer": "b"}]), "several of which may be"),
    ("chat.jsonl", '{"messages": "hello"}', "row 1: a conversation is text, and no list of turns"),
    ("turns.jsonl", '{"messages": [1, 2]}', "row 1: a conversation is no list of turns"),
    ("content.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "row 1: the content of a turn is int"),
    (
        "unfinished.jsonl",
        '{"messages": [{"role": "user", "content": "u"}]}',
        "1 that do not end with a user's turn and",
    ),
    (
        "sheet.xlsx",
        zipped(**{"[Content_Types].xml": "x", "xl/workbook.xml": "x"}),
        "a spreadsheet: save its sheet as CSV",
    ),
    ("renamed.csv", zipped(**{"[Content_Types].xml": "x", "xl/workbook.xml": "x"}), "a spreadsheet"),
    ("old.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet"),
    ("notes.txt", "A note on gout.\nIt hurts.\n", "has the columns A note on gout.; expected"),
    ("pointer.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5\n", "a pointer of Git LFS"),
    ("packed.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\0\n", "not a table of rows"),
    ("base.db", b"SQLite format 3\0", "not a table of rows"),
    ("table.arrow", b"ARROW1\0\0", "not a table of rows"),
    ("sign_in.csv", "<!DOCTYPE html>\n<html>Sign in, please</html>\n", "not a table of rows"),
    ("hollow.zip", zipped(**{"a.csv": ""}), "the file is empty"),
    ("mac.csv", "question;answer\nWas heißt Übel?;Schlecht für mich\n".encode("mac-roman"), "not UTF-8 .*line 2"),
    ("polish.csv", "question,answer\nCo to gorączka?,Podwyższona ciepłota ciała\n".encode("cp1250"), "not UTF-8"),
    ("split.json", '{"columns": ["question", "answer"], "data": [["a", "b", "c"]]}', "has the columns columns, data"),
    ("paper.pdf", b"%PDF-1.7 ...", "not a table of rows"),
    ("paper.csv", b"%PDF-1.7 ...", "not a table of rows"),
    ("cut.csv.gz", gzip.compress(table().encode())[:-9], "cannot be unpacked .*is the file whole"),
    ("cut.zip", zipped(**{"a.csv": table()})[:-30], "cannot be unpacked"),
    ("many.zip", zipped(**{"a.csv": table(), "b.csv": table()}), "the archive holds 2 files: .*a.csv, b.csv"),
    ("junk.parquet", b"junk", "cannot be read as parquet"),
    ("cut.parquet", parquet(pd.DataFrame(ROWS))[:-20], "cannot be read as parquet"),
    ("bytes.parquet", parquet(pd.DataFrame({"question": ["a"], "answer": [b"\xff"]})), "row 1: the answer is bytes"),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD, ids=[name for name, _, _ in BAD])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=says) as caught:
        data.load_flashcards(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["nowhere.csv", "./nowhere", "~/nowhere/cards", "/nowhere/cards", "C:\\cards.csv", "a/b/c", "my cards",
     "nowhere.jsonl.gz", "nowhere.xlsx", ""],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_sought_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no data file at") as caught:
        data.load_flashcards(name)
    assert "\n" not in str(caught.value)


def test_a_home_folder_and_what_exists_under_a_hubs_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "train.csv").write_text(table())
    assert len(data.load_flashcards("~/squad/train.csv")) == len(data.load_flashcards("squad")) == 2
    if os.getuid():
        (tmp_path / "squad" / "train.csv").chmod(0)
        with pytest.raises(PermissionError, match="may not be read"):
            data.load_flashcards("squad")


def test_an_address_is_no_file_and_a_folder_may_be_laid_out_as_on_the_hub(tmp_path):
    for name in ("https://nowhere.example/cards.csv", "hf://datasets/lab/cards", "s3://bucket/cards.parquet"):
        with pytest.raises(ValueError, match=f"^{name}: an address; fetch what is there"):
            data.load_flashcards(name)
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# Cards")
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(parquet(pd.DataFrame(ROWS)))
    assert len(data.load_flashcards(str(tmp_path))) == 2


def test_a_folder_brings_its_own_test_part(tmp_path, caplog):
    (tmp_path / "train-00000-of-00002.jsonl").write_text(LINES)
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"question": "Third?", "answer": "3"}')
    (tmp_path / "validation.csv").write_text("Question;Answer\nwhat, then, is GOUT;Pain\nNew?;Yes\n")
    train, test = data.load_parts(str(tmp_path))
    assert list(train["question"]) == ["Was heißt Übel?", "Third?"] and len(test) == 2
    assert "left out 1 of 3 training cards whose question stands in the test part, too (train-0)" in caplog.text
    (tmp_path / "train.csv").write_text(table())
    with pytest.raises(ValueError, match="holds 3 files of train: train-00000-of-00002.jsonl, .*keep one"):
        data.load_parts(str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.csv").write_text(table())
    with pytest.raises(FileNotFoundError, match=r"no data file train\.\* .*there is notes.csv"):
        data.load_parts(str(tmp_path / "other"))
    (tmp_path / "other" / "train.csv").write_text(table())
    with pytest.raises(ValueError, match="every training question stands in the test part"):
        data.load_parts(str(tmp_path / "other"), test=str(tmp_path / "other" / "notes.csv"))


def test_multiple_choice_reads_the_same_files(tmp_path):
    rows = [{"Question": "Q1", "options": {"A": "yes", "B": "no"}, "answer": "B"},
            {"Question": "Q2", "options": {"A": "one", "B": "two"}, "answer": "one"}]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "q.parquet")
    as_text = [{**row, "options": json.dumps(row["options"])} for row in rows]
    pd.DataFrame(as_text).to_csv(tmp_path / "q.csv", index=False, sep=";")
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for name in ("q.parquet", "q.csv", "q.jsonl.gz"):
        found = multiple_choice.from_file(tmp_path / name)
        assert [(row["options"], row["answer"]) for row in found] == [(["yes", "no"], 1), (["one", "two"], 0)]
    nested = [{"question": "Q", "options": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "A"}]
    (tmp_path / "arc.json").write_text(json.dumps(nested))
    with pytest.raises(ValueError, match="row 1: 'options' must be a list or a mapping of two texts"):
        multiple_choice.from_file(tmp_path / "arc.json")


def test_a_node_reads_any_file_in_its_folder_and_tells_the_server_nothing(tmp_path, caplog):
    node = type("Node", (), {"node_config": {"data": str(tmp_path / "secret")}})
    with pytest.raises(FileNotFoundError, match="see the node's own log") as missing:
        client_app.node_cards(node, 3)
    (tmp_path / "secret").mkdir()
    train = tmp_path / "secret" / "train.csv"
    train.write_bytes(table(";").encode("cp1252"))
    assert [len(part) for part in client_app.node_cards(node, 3)] == [2, 0]
    train.write_text('[{"question": "Alice Doe?", "answer": ["ill"]}]')
    with pytest.raises(ValueError, match="hospital 3: the cards .* cannot be read") as broken:
        client_app.node_cards(node, 3)
    assert "the answer is a list" in caplog.text
    assert not any(word in str(error.value) for error in (missing, broken) for word in ("secret", "Alice", "list"))
