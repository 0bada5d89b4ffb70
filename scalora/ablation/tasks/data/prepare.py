"""Make movie_reviews.csv.gz from the file inside the vaderSentiment source distribution.

Held by tests/ablation/test_ablation_tasks_sentences.py.

    python scalora/ablation/tasks/data/prepare.py PATH/TO/movieReviewSnippets_GroundTruth.txt

The source is tab separated: number, mean rating, sentence. The number is dropped,
the rating (-4 to 4) and the sentence are kept as they stand. The archive carries no
name and no date, so the same input always gives the same bytes.
"""

import argparse
import csv
import gzip
import hashlib
import io
from pathlib import Path

SOURCE_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
OUTPUT = Path(__file__).with_name("movie_reviews.csv.gz")


def read_source(path: Path) -> list[tuple[str, str]]:
    """Return (sentence, rating) of every line, after checking that it is the known file."""
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SOURCE_SHA256:
        raise ValueError(f"{path.name}: sha256 is {digest}, expected {SOURCE_SHA256}")
    rows = []
    for line in raw.decode("utf-8").split("\r\n"):
        _, rating, sentence = line.split("\t")
        rows.append((sentence, rating))
    return rows


def write_csv(rows: list[tuple[str, str]], path: Path) -> str:
    """Write the rows as a gzipped CSV and return the sha256 of the CSV itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("text", "rating"))
    writer.writerows(rows)
    content = text.getvalue().encode("utf-8")
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as archive:
        archive.write(content)
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Write the archive beside this file and tell what is in it."""
    parser = argparse.ArgumentParser(description="Make movie_reviews.csv.gz.")
    parser.add_argument("source", type=Path, help="movieReviewSnippets_GroundTruth.txt")
    rows = read_source(parser.parse_args().source)
    digest = write_csv(rows, OUTPUT)
    print(f"{OUTPUT.name}: {len(rows):,} rows, sha256 of the CSV inside {digest}")


if __name__ == "__main__":
    main()
