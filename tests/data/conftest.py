"""Folders that others may enter: those of pytest are private."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture
def open_folder() -> Generator[Path, None, None]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for each in folder.iterdir():
        each.chmod(0o700)
    shutil.rmtree(folder)
    assert not os.path.exists(folder)
