"""Small made-up files of every dataset, in the publishers' formats: dataset -> file -> content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

TITLES_100K = {1: "Amélie's Tale (1996)", 2: 'A "Quoted" Film (1995)', 3: "unknown", 4: 'A "Quoted" Film (1995)'}


def movie_line(item: int, title: str) -> str:
    """A line of ``u.item``; the film's genres are Action and the one of its own number."""
    flags = ["1" if flag in (1, item) else "0" for flag in range(19)]
    return "|".join([str(item), title, "01-Jan-1995", "", "http://example.org", *flags])


def json_lines(*objects: dict[str, Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


def review(user: str, business: str, stars: float, date: str) -> dict[str, Any]:
    return {"review_id": "r", "user_id": user, "business_id": business, "stars": stars, "text": "A\nb", "date": date}


def business(key: str, name: str, city: str, state: str = "AZ", categories: Any = "Diners, Bars") -> dict[str, Any]:
    return {"business_id": key, "name": name, "city": city, "state": state, "categories": categories, "hours": None}


def bought(user: str, product: str, stars: float, time: int) -> dict[str, Any]:
    return {"overall": stars, "verified": True, "reviewerID": user, "asin": product, "unixReviewTime": time}


def crlf(*lines: str) -> bytes:
    return "".join(line + "\r\n" for line in lines).encode("iso-8859-1")


FILES: dict[str, dict[str, bytes]] = {
    "ml-100k": {
        "u.data": (
            b"1\t1\t5\t874965758\n1\t2\t4\t874965759\n1\t4\t2\t874965700\n"  # film 4 is film 2 again
            b"2\t3\t1\t883888671\n2\t1\t3\t883888671\n3\t4\t5\t879959583\n"
        ),
        "u.item": "".join(movie_line(*row) + "\n" for row in TITLES_100K.items()).encode("iso-8859-1"),
        "u.user": b"1|24|M|technician|85711\n2|53|F|other|T8H1N\n3|23|M|writer|32067\n",
    },
    "ml-1m": {
        "ratings.dat": b"1::20::5::978300760\n1::10::3::978302109\n2::10::4::978298413\n2::30::1::978298400\n",
        "movies.dat": '10::Été: "One" (1995)::Comedy|Drama\n20::2001: Two (1968)::Drama\n30::Three (2000)::War'.encode(
            "iso-8859-1"
        ),
        "users.dat": b"1::F::1::10::48067\n2::M::56::16::70072-1\n",
    },
    "ml-10m": {
        "ratings.dat": b"1::122::5::838985046\n1::185::4.5::838983525\n7::122::0.5::1230000000\n7::99::3::1230000001\n",
        "movies.dat": "122::Été, L' (a.k.a. Summer) (1992)::Comedy\n185::Net, The (1995)::Action\n".encode(),
    },
    "ml-latest-small": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n1,1,4.0,964982703\n1,3,0.5,964981247\n2,3,5.0,1445714835\n",
        "movies.csv": (
            'movieId,title,genres\n1,Toy (1995),Comedy|War\n3,"Été, The ""Big"" One (1995)",(no genres listed)\n'
        ).encode(),
    },
    "book-crossing": {
        "BX-Book-Ratings.csv": crlf(
            *('"User-ID";"ISBN";"Book-Rating"', '"8";"01X";"9"', '"8";"02";"0"', '"9";" 01x";"10"', '"9";"03";"7"'),
            *('"9";"99";"8"', '"10";"04";"8"', '"9";"01X";"1"'),
        ),
        "BX-Books.csv": crlf(
            '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher";"Image-URL-S";"Image-URL-M";"Image-URL-L"',
            r'"01X";"\"O\" Is; for Öl";"Ann &amp; Bob";"2001";"House";"";"";""',
            r'"02";"Salt &amp; Pepper";"C";"0";"House";"u";"v";"w"',
            r'"03";"Salt & Pepper";"C";"1999";"Other \\ House";"u";"v";"w"',
            r'"04";"X-Men: How (Level 4)\";Michael T";"2000";"DK Publishing";"u";"v";"w"',
        ),
        "BX-Users.csv": crlf(
            *('"User-ID";"Location";"Age"', '"8";"bonn, \\"nrw\\", germany";NULL', '"9";"a, b, usa";"34"'),
            '"10";"c, , ";NULL',
        ),
    },
    "yelp": {
        "yelp_academic_dataset_review.json": json_lines(
            review("u1", "b1", 4.0, "2011-10-29 19:32:49"),
            review("u1", "b2", 5.0, "2011-10-30 00:00:00"),
            review("u2", "b1", 1, "2012-01-02 00:00:01"),
            review("u2", "b1", 5, "2012-01-01 00:00:01"),
            review("u2", "gone", 3.0, "2012-01-01 00:00:01"),
            review("u3", "b3", 3.0, "2012-01-01 00:00:01"),
            review("u3", "b4", 2.0, "2012-01-05 00:00:01"),
        ),
        "yelp_academic_dataset_business.json": json_lines(
            business("b1", "Blue Café ", "Tucson"),
            business("b2", "Jo's", "Reno", "NV", None),
            business("b3", "Jo's", "Tucson"),
            business("b4", "Jo's", "Tucson"),
        ),
    },
    "amazon": {
        "All_Beauty.json": json_lines(
            bought("A1", "B1", 5.0, 1500000000),
            bought("A1", "B2", 2.0, 1500086400),
            bought("A2", "B2", 4.0, 1400000000),
            bought("A2", "B3", 4.0, 1400000000),
            bought("A2", "B9", 4.0, 1400000000),
        ),
        "meta_All_Beauty.json": json_lines(
            {
                "asin": "B1",
                "title": "Soap &amp; <b>Glory</b>",
                "brand": "S&amp;G",
                "category": ["Beauty", "Bath, Body"],
            },
            {"asin": "B2", "title": "Rose\n Oil", "category": []},
            {"asin": "B3", "title": "var aPageStart = (new Date()).getTime();"},
            {"asin": "B4", "brand": "none"},
            {"asin": "B1", "title": "Soap again"},
        ),
    },
    "lastfm": {
        "user_artists.dat": b"userID\tartistID\tweight\n2\t51\t13883\n2\t52\t1\n3\t52\t7\n3\t53\t9\n",
        "artists.dat": (
            'id\tname\turl\tpictureURL\n51\tDuran "D" Duran\thttp://a\thttp://b\n52\tBjörk\thttp://a\n53\tBjörk\t\t\n'
        ).encode(),
    },
    "custom": {
        "interactions.csv": (
            'user,item,title,rating,time,extra\nann,007,"Été, one",4.5,2018-07-30,\nann,8,Two,2,1532995201,x\n'
            "bob,8,Two again,5,2018-07-30T12:00:00.25+00:00,\n"
        ).encode(),
    },
}
PACKED = {"amazon"}  # these also come as .gz


def write(name: str, folder: Path, packed: bool = False) -> Path:
    """Write the files of a dataset into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in FILES[name].items():
        (folder / f"{file}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    return folder
