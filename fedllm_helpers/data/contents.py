"""From a file's bytes to text: unpacked, in the encoding that it is in, or one line on what else it is."""

import bz2
import gzip
import io
import lzma
import re
import string
import zipfile
import zlib
from pathlib import Path

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zip")
PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
MARKS = {  # the longer first: UTF-32's mark begins with that of UTF-16
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}  # fmt: skip
SHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
FOREIGN = (  # the first bytes of files that hold no table, or one that other programs read
    b"%PDF", b"{\\rtf", b"\xd0\xcf\x11\xe0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!\x1a", b"ARROW1",
    b"\xff\xff\xff\xff", b"Obj\x01", b"SQLite format 3", b"\x89HDF", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"<!",
    b"<?xml", b"<html",
)  # fmt: skip
LFS = b"version https://git-lfs"
# What cp1252 makes of a text in another code page for Latin letters: signs, or capitals, in the middle of words
BENT = re.compile("[a-z](?:[¡¢£¤¥¦§©¬®±²³¶¹¼½¾¿†‡][a-z]|[ŠŒŽŸ])")
BLANKS = string.whitespace + "".join(filter(str.isspace, map(chr, range(128, 0x3001)))) + "\x1c\x1d\x1e\x1f\ufeff"
INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060]")
SAMPLE = 65_536  # bytes from which an encoding without a mark is guessed


def unpack(content: bytes, path: Path) -> bytes:
    """The bytes of a file, out of its archive; raises ValueError for what is no table of rows."""
    suffix = path.suffix.lower()
    try:
        if content[:4] == b"PK\x03\x04" and suffix not in SHEETS:
            archive = zipfile.ZipFile(io.BytesIO(content))
            names = [name for name in archive.namelist() if not re.search(r"(^|/)\.|/$", name)]  # no .DS_Store
            if "[Content_Types].xml" in names:
                suffix = SHEETS[0]
            elif len(names) != 1:
                raise ValueError(f"the archive holds {len(names)} files: unpack it, and name one ({', '.join(names)})")
            else:
                return unpack(archive.read(names[0]), Path(names[0]))
        how = next((how for mark, how in PACKED.items() if content.startswith(mark)), None)
        content = how(content) if how else content
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot be unpacked ({error}); is the file whole?") from None
    if suffix in SHEETS:
        raise ValueError("a spreadsheet: save its sheet as CSV UTF-8 (in Excel: Save as), and name that file")
    if not content.strip():
        raise ValueError("the file is empty")
    if content.startswith(LFS):
        raise ValueError("a pointer of Git LFS, and not yet the file itself: fetch it with `git lfs pull`")
    if content.startswith(FOREIGN) or content[257:262] == b"ustar" or suffix in (".pdf", ".docx", ".md"):
        raise ValueError(f"not a table of rows: bring {', '.join(SUFFIXES)} with a question and an answer in each row")
    return content


def decode(content: bytes) -> tuple[str, str]:
    """Text and its encoding: by its mark, else UTF-8, else UTF-16 by where its zeros lie, else cp1252."""
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "")
    zeros, some = [content[side:SAMPLE:2].count(0) for side in (0, 1)], min(len(content), SAMPLE) / 20
    if not encoding and b"\0" in content:
        encoding = (
            "utf-16-le" if zeros[1] > some + 9 * zeros[0] else "utf-16-be" if zeros[0] > some + 9 * zeros[1] else ""
        )
    try:
        text = content.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        place = f"(byte {error.start}, line {content[: error.start].count(10) + 1})"
        if encoding or not _western(content):
            raise ValueError(f"not {(encoding or 'utf-8').upper()} text {place}; save it as UTF-8") from None
        text, encoding = content.decode("cp1252"), "cp1252"
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line} holds a zero byte: it is no text, or was damaged; save it as UTF-8")
    return text, encoding or "utf-8"


def _western(content: bytes) -> bool:
    """Whether bytes read as cp1252: not broken UTF-8, and words mostly of plain letters, unlike those of cp1251."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return False
    whole = len(re.findall(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", content))
    body = text.partition("\n")[2] or text  # names of columns are English
    letters = [letter for letter in body[: 16 * SAMPLE] if letter.isalpha() or letter > "\x7f"]
    return not whole and not BENT.search(body) and sum(letter > "\x7f" for letter in letters) <= len(letters) / 2
