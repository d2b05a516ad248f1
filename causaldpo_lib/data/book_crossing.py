"""Book-Crossing in its publisher's dialect."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble
from causaldpo_lib.data.reading import Layout, outside, published, read_rows, refuse, unescaped, warn_of_subset

RELEASES = {"Book-Crossing": {"ratings": 1_149_780, "users": 278_858, "books": 271_379}}
DIALECT = {"separator": ";", "header": True, "quoted": True, "escaped": True, "encoding": "iso-8859-1"}
RATINGS = Layout({"User-ID": int, "ISBN": str, "Book-Rating": int}, **DIALECT)
BOOK_FIELDS = ("ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher")
BOOKS = Layout(dict.fromkeys((*BOOK_FIELDS, "Image-URL-L"), str), lacking=1, **DIALECT)
USERS = Layout({"User-ID": int, "Location": str, "Age": str}, **DIALECT)
SWALLOWED = '";'  # within a title: what is left of a separator whose quote the publisher escaped by mistake


def load_book_crossing(folder: Path, *, implicit: bool = False) -> Interactions:
    r"""Book-Crossing: ratings of books from a web community, collected in August and September 2004.

    Source: Ziegler et al. (WWW 2005, doi:10.1145/1060745.1060754), http://www2.informatik.uni-freiburg.de/~cziegler/BX/.
    Downloaded from there when ``folder`` does not exist.
    Licence: no formal one; free for research with acknowledgement; treat as not for redistribution.
    Complete set: 1,149,780 ratings by 278,858 listed users of 271,379 listed books; 716,109 of the ratings are
    0, which means "implicit": the book was had, and not rated. A smaller set loads with a warning.

    Files, all cut by ``;``, in double quotes, ``\"`` inside fields, ISO-8859-1, CRLF, with header:
    ``BX-Book-Ratings.csv`` (User-ID, ISBN, Book-Rating), ``BX-Books.csv`` (ISBN, Book-Title, Book-Author,
    Year-Of-Publication, Publisher, three image addresses), ``BX-Users.csv`` (User-ID, Location, Age or NULL; may be
    absent).

    Ratings are 1 to 10; positive are those above 7 (CausalDPO's B.1), unless a split says otherwise.

    Quirks: there are no times. Editions have an ISBN each: books of the same title are one item, whoever wrote them,
    since a title is all that a model answers. Titles hold HTML entities (``&amp;``), which are resolved, and garbled
    accents, which are not. ISBNs are compared without blanks around them and in upper case. Many ratings are of ISBNs
    that no book has; they are dropped and counted. Three lines of the complete ``BX-Books.csv`` escape the quote that
    ends the title, so they lack a field; title and author are taken apart again. Years of 0 and after 2004 exist;
    0 counts as none.

    Args:
        folder: holds the files.

    Options:
        ``implicit``: whether the implicit ratings are kept, as rating 0. They are positive only to a split with
            ``positive_threshold`` 0 and ``strict`` false.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named).
    """
    ratings_path, books_path = published("book-crossing", folder, "BX-Book-Ratings.csv", "BX-Books.csv")
    users_path = folder / "BX-Users.csv"
    books, ratings = read_rows(books_path, BOOKS), read_rows(ratings_path, RATINGS)
    refuse(ratings, ratings_path, RATINGS, outside("Book-Rating", 0, 10))
    lacking = pl.col("Image-URL-L").is_null() & ~pl.col("Book-Title").str.contains(SWALLOWED, literal=True)
    refuse(books, books_path, BOOKS, {"7 fields instead of 8: restore the line": lacking})
    ratings = ratings.select(user="User-ID", item=_isbn(), rating=pl.col("Book-Rating").cast(pl.Float32))
    users = _users(read_rows(users_path, USERS)) if users_path.exists() else None
    listed = ratings["user"].n_unique() if users is None else len(users)
    warn_of_subset({"ratings": len(ratings), "users": listed, "books": len(books)}, RELEASES, folder)
    kept = ratings if implicit else ratings.filter(pl.col("rating") > 0)
    return assemble(
        "book-crossing", kept, _books(books), users, rows_read=len(ratings), positive_threshold=7.0, strict=True
    )


def _isbn() -> pl.Expr:
    return pl.col("ISBN").str.strip_chars().str.to_uppercase()


def _books(rows: pl.DataFrame) -> pl.DataFrame:
    _, title, author, year, publisher = BOOK_FIELDS
    both = pl.col(title).str.splitn(SWALLOWED, 2).struct
    shifted = pl.col(title).str.contains(SWALLOWED, literal=True)
    columns = {
        "title": (both.field("field_0"), title),
        "author": (both.field("field_1"), author),
        "year": (pl.col(author), year),
        "publisher": (pl.col(year), publisher),
    }
    books = rows.select(
        _isbn().alias("item"),
        **{name: pl.when(shifted).then(moved).otherwise(usual) for name, (moved, usual) in columns.items()},
    )
    number = pl.col("year").cast(pl.Int64, strict=False)
    texts = (unescaped(books[name]) for name in ("title", "author", "publisher"))
    return books.with_columns(*texts, year=pl.when(number > 0).then(number))


def _users(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(user="User-ID", location="Location", age=pl.col("Age").cast(pl.Int64, strict=False))
