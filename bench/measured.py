"""``python -m bench.measured``: the table by which ``--kernels fused`` chooses, made of the benchmarks' results.

    pytest bench --benchmark-only -m gpu --full --save-results      # on a GPU: bench/results/<device>.csv and .txt
    python -m bench.measured                                        # all of them: kernels/measured.json

:mod:`raccgan.kernels.measured` says what a row is. Of an implementation counts what the dispatcher can take: its time
channels_last, without ``torch.compile``. A class that not everybody was measured in keeps those who were in all cases.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import layers
from bench.peers import NO_KERNEL, kind_of
from bench.results import COLUMNS, FOLDER
from raccgan.errors import InputError
from raccgan.kernels import backend, measured
from raccgan.kernels.measured import Class, Row, Table
from raccgan.outputs.files import write_text

Times = dict[str, dict[str, float]]
"""Milliseconds by case, then by implementation."""


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m bench.measured", description=__doc__.partition("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="CSV files, each with its .txt beside it (default: all)")
    files = parser.parse_args(arguments).results or sorted(FOLDER.glob("*.csv"))
    try:
        tables = tables_of(files)
        write_text(measured.SHIPPED, written(tables))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables:
        print(f"{table.name}: {len(table.rows)} classes")
    return 0


def tables_of(files: Iterable[Path]) -> list[Table]:
    """One for each device that has measurements of single ops, of all its files; a case counts as measured last.

    Raises:
        InputError: a file is missing, or is not what ``--save-results`` writes.
    """
    of_devices: dict[str, list[tuple[dict[str, str], dict[Class, Times]]]] = {}
    for file in files:
        said = _circumstances(file.with_suffix(".txt"))
        of_devices.setdefault(said["device"].rpartition(", ")[0], []).append((said, _cases_in(file)))
    tables = []
    for name, found in of_devices.items():
        found.sort(key=lambda one: one[0]["date"])
        cases: dict[Class, Times] = {}
        for _, newer in found:
            for of, times in newer.items():
                cases.setdefault(of, {}).update(times)
        said = found[-1][0]
        command = "; ".join(one["command"] for one, of_file in found if of_file)
        device = "cuda" if "GPU" in said else "cpu"
        tables.append(Table(device, name, said["date"], said["versions"], command, tuple(rows_of(cases))))
    return [table for table in tables if table.rows]


def _cases_in(file: Path) -> dict[Class, Times]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(f"{file} has not the columns that --save-results writes")
            return cases_of(reader)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no table of results: {error}") from None


def _circumstances(file: Path) -> dict[str, str]:
    """The lines of a .txt file that say what the numbers depend on, by their first word."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(f"the circumstances of the measurement are missing: {error}") from None
    said = {name: rest.strip() for name, _, rest in (line.partition(" ") for line in lines)}
    if missing := [name for name in ("device", "date", "versions", "command") if not said.get(name)]:
        raise InputError(f"{file} does not say {missing[0]}")
    return said


def cases_of(lines: Iterable[Mapping[str, str]]) -> dict[Class, Times]:
    """The classes that the lines of a CSV file are cases of, in its order.

    Raises:
        ValueError: a line is of no known case, or its time is no number.
    """
    families = backend.families()
    cases: dict[Class, Times] = {}
    for line in lines:
        if line["op"] not in families or line["layout"] != "channels_last" or line["median_ms"] == "raises":
            continue
        name = line["implementation"].removesuffix(NO_KERNEL)
        if name in families[line["op"]]:
            times = cases.setdefault(class_of(line), {}).setdefault(line["case"], {})
            times[name] = float(line["median_ms"])
    return cases


def rows_of(cases: Mapping[Class, Times]) -> Iterator[Row]:
    for of, by_case in cases.items():
        times = measured.together(list(by_case.values()))
        if times:
            yield Row(of, tuple(by_case), {name: float(f"{time:.4g}") for name, time in times.items()})


def class_of(line: Mapping[str, str]) -> Class:
    """The class that a line's case belongs to."""
    op, pass_ = line["op"], line["pass"]
    try:
        arguments = layers.cases(op, pass_)[line["case"]]
    except KeyError:
        raise ValueError(f"the benchmarks have no case {line['case']!r} of {op}, {pass_}") from None
    _, channels, *sides = (measured.up_to_a_power_of_two(n) for n in arguments["shape"])
    return Class(op, pass_, kind_of(op, arguments), line["dtype"], channels, max(sides))


def written(tables: Sequence[Table]) -> str:
    """The file's text, a line a row."""

    def of_table(table: Table) -> str:
        about = {name: value for name, value in table._asdict().items() if name != "rows"}
        lines = ",\n    ".join(json.dumps(_as_json(row)) for row in table.rows)
        head = "".join(f"   {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
        return f'  {{\n{head}   "rows": [\n    {lines}\n   ]\n  }}'

    return '{\n "tables": [\n' + ",\n".join(map(of_table, tables)) + "\n ]\n}\n"


def _as_json(row: Row) -> dict[str, object]:
    of = {name.rstrip("_"): value for name, value in row.of._asdict().items()}
    return {**of, "milliseconds": row.milliseconds, "cases": list(row.cases)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
