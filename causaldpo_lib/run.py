"""Run one notebook through papermill, once every parameter is known to be one that it declares.

    python -m causaldpo_lib.run NOTEBOOK [-f params.yaml ...] [-p key value ...] [-o OUTPUT.ipynb]

NOTEBOOK is a path or just a name such as ``03_preference_alignment``. Of several values the later wins: first
the files, then ``-y`` (one JSON object), then ``-p``. What the notebook prints is shown as it comes. The
executed copy is kept also when a cell fails; one sentence then says what went wrong; the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError
from causaldpo_lib.parameters import check, declared_in, from_text, read_yaml, unknown_key
from causaldpo_lib.paths import NOTEBOOKS, RESULTS, ROOT
from causaldpo_lib.records import shown

# ipykernel warns at every start that it listens on a local TCP port: harmless, and noise in a training log.
KERNEL = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=50"]}


def find_notebook(name: str) -> Path:
    """The notebook's file: a path as given, or a name in ``notebooks/`` with or without its ending.

    Raises:
        StudyError: there is no such notebook.
    """
    for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if path.is_file():
            return path.resolve()
    known = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    raise unknown_key("notebooks", "notebook", name, known)


def parameters_of(
    notebook: Path, files: Sequence[Path] = (), inline: str = "", pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """All overrides of a notebook from files, JSON and key-value pairs, checked against what it declares.

    Raises:
        StudyError: an unknown key or a value of the wrong kind, with the file it stands in.
    """
    defaults = declared_in(notebook)
    found: dict[str, Any] = {}
    for file in files:
        found |= check(defaults, read_yaml(file), f"{file} for {notebook.name}")
    if inline:
        found |= check(defaults, _object(inline), notebook.name)
    for key, text in pairs:
        found |= check(defaults, {key: from_text(text, defaults.get(key))}, notebook.name)
    return found


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text of the command line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise StudyError(f"-y {text!r} is not JSON: write one object, its keys in double quotes") from None
    if not isinstance(found, dict):
        raise StudyError(f'-y {text!r} is no object: write one, such as {{"seed": 1}}')
    return found


def run_notebook(notebook: Path, parameters: dict[str, Any], output: Path) -> None:
    """Execute a notebook in a fresh kernel with ``notebooks/`` as its folder, and keep the executed copy.

    Raises:
        StudyError: a cell failed; the sentence is that of the notebook's own StudyError, if it raised one.
    """
    _prepare_kernel()
    import papermill  # a second of imports that refused parameters need not wait for
    from nbclient.exceptions import DeadKernelError

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters,
            cwd=str(NOTEBOOKS),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            **KERNEL,
        )
    except papermill.PapermillExecutionError as error:
        raise failure(notebook.name, error.exec_count, error.ename, error.evalue) from None
    except DeadKernelError:
        reason = "its kernel died, perhaps for lack of memory: try a smaller batch_size"
        raise StudyError(f"{notebook.name}: {reason}") from None


def failure(notebook: str, cell: int | None, name: str, message: str) -> StudyError:
    """The one sentence for a failed cell; a StudyError already says what is wrong and what to do."""
    if name == "StudyError":
        return StudyError(message)
    first = message.strip().splitlines()[0] if message.strip() else "no message"
    return StudyError(f"Cell {cell} of {notebook} failed: {name}: {first}")


def execute_in_place(notebook: Path) -> None:
    """Re-execute a committed notebook with its declared defaults; timings and versions are left out of it.

    Raises:
        StudyError: a cell failed; the file is then left as it was.
    """
    _prepare_kernel()
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    content = nbformat.read(notebook, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    client = NotebookClient(content, timeout=None, record_timing=False, resources=where, **KERNEL)
    try:
        client.execute()
    except CellExecutionError as error:
        cell = sum(c.cell_type == "code" and c.execution_count is not None for c in content.cells)
        raise failure(notebook.name, cell, error.ename, error.evalue) from None
    except DeadKernelError:
        raise StudyError(f"{notebook.name}: its kernel died, perhaps for lack of memory") from None
    content.metadata.pop("papermill", None)
    content.metadata.get("language_info", {}).pop("version", None)
    for cell in content.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
    nbformat.write(content, notebook)


def _prepare_kernel() -> None:
    """Settings that kernels inherit: this tree's library comes first; debugger and tokenizer keep quiet."""
    found = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([found] if found else [])])
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make a small model many times slower wherever another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # tqdm misses the browser's progress bars, which no executed notebook could show.
    quiet = [os.environ.get("PYTHONWARNINGS", ""), "ignore:IProgress not found"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    warnings.filterwarnings("ignore", module="(zmq|jupyter_client|papermill|traitlets).*")


def _end_with(parent: int) -> None:
    """End this process when its parent is gone; its kernel notices and follows within a second or two."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line (see the module's text); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m causaldpo_lib.run", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", help="path, or name in notebooks/")
    parser.add_argument("-f", metavar="FILE", type=Path, action="append", default=[], help="YAML file")
    parser.add_argument("-y", metavar="JSON", default="", help="parameters as one JSON object")
    parser.add_argument("-p", metavar=("KEY", "VALUE"), nargs=2, action="append", default=[])
    parser.add_argument("-o", metavar="OUTPUT", type=Path, help="executed copy: results/notebooks/NAME.ipynb")
    parser.add_argument("--end-with-parent", action="store_true", help="end when the calling process ends")
    options = parser.parse_args(arguments)
    if options.end_with_parent:
        _end_with(os.getppid())
    try:
        notebook = find_notebook(options.notebook)
        output = (options.o or RESULTS / "notebooks" / notebook.name).resolve()
        if output == notebook:
            raise StudyError(f"{shown(output)} is the notebook itself: give another -o for the executed copy")
        parameters = parameters_of(notebook, options.f, options.y, options.p)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        run_notebook(notebook, parameters, output)
    except StudyError as error:
        print(f"error: {error} (executed copy: {shown(output)})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again", file=sys.stderr)
        return 130
    print(f"executed copy: {shown(output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
