from pathlib import Path


def write_page(results: Path, page: Path) -> None:
    """To be written."""
