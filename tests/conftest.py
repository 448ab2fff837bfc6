"""The command line options of the Python tests, here so that pytest knows them wherever it is called from."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kinds",
        default="stock,ours,ours2,mixed",
        help="behaviour tests: comma-separated kinds of cluster to run on (default: %(default)s)",
    )
