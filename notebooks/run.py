"""Run the course: every notebook in order, from the folder of this file into ``build/``.

``python notebooks/run.py [NAME ...] [--inplace] [--jobs N]``: NAME picks notebooks (``01`` is enough); ``--inplace``
also stores the fresh outputs in the notebooks themselves. Two run side by side where there are cores and memory for it,
and the one that mostly waits beside them; that takes two thirds of the time. The minutes that README names are of one
alone.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from pages import page
from PIL import Image

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
WAITS = "06"  # it computes for one of its three minutes, and else waits for processes, heartbeats and polls


def main() -> int:
    """Fetch the model, run the notebooks, print a table; 1 as soon as one notebook fails."""
    parser = argparse.ArgumentParser(description="Run the course's notebooks into build/.")
    parser.add_argument("names", nargs="*", help="notebooks to run, such as 01 or 02_centralized; default all")
    parser.add_argument("--inplace", action="store_true", help="store the outputs in the notebooks too")
    parser.add_argument("--jobs", type=int, choices=(1, 2), help="notebooks at a time; default by cores and memory")
    arguments = parser.parse_args()
    there = sorted(HERE.glob("*.ipynb"))
    unknown = [name for name in arguments.names if not any(name and p.stem.startswith(name) for p in there)]
    if unknown:
        print(f"no notebook named {', '.join(unknown)}: there are {', '.join(p.stem for p in there)}", file=sys.stderr)
        return 2
    paths = [p for p in there if not arguments.names or p.stem.startswith(tuple(arguments.names))]
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            apart.submit(fetch).result()
    except (OSError, ValueError, BrokenProcessPool) as error:
        print(f"the model is not there: {error}", file=sys.stderr)
        return 1
    BUILD.mkdir(exist_ok=True)
    jobs = arguments.jobs or (1 if arguments.inplace or len(paths) == 1 else room())
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    failed, rows = None, []
    try:
        rows = asyncio.run(run_all(paths, arguments.inplace, jobs))
    except* (CellExecutionError, CellTimeoutError, DeadKernelError) as group:
        failed = min(group.exceptions, key=lambda error: error.when)  # the others died because it ended them
        print(f"\n{failed.place}:\n{plain(str(failed))}", file=sys.stderr)
    if rows:
        print_table(rows)
    return 1 if failed else 0


def fetch() -> None:
    """Have the model on this machine: in a process of its own, whose gigabyte ends with it."""
    from fedllm_helpers.models import embedded

    embedded.fetch()


def room() -> int:
    """How many notebooks may compute at a time: a kernel uses up to 5 GB."""
    return 2 if (os.cpu_count() or 1) > 1 and psutil.virtual_memory().available > 10e9 else 1


async def run_all(paths: list[Path], inplace: bool, jobs: int) -> list[tuple[str, float, int | None, list[str], Path]]:
    """The notebooks in order, some at a time; the first that fails ends the others."""
    turns, at = asyncio.Semaphore(jobs), {}
    beside = WAITS if jobs > 1 and psutil.virtual_memory().available > 14e9 else ()

    async def in_turn(path: Path) -> tuple[str, float, int | None, list[str], Path]:
        async with contextlib.nullcontext() if path.stem.startswith(beside) else turns:
            return await run(path, inplace, at)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(in_turn(path)) for path in paths]
    return [task.result() for task in tasks]


async def run(path: Path, inplace: bool, at: dict[str, str]) -> tuple[str, float, int | None, list[str], Path]:
    """Execute one notebook with a live line; write its executed form and its page.

    Args:
        path: of the notebook.
        inplace: whether to store the outputs in it, too.
        at: where each running notebook is; all of them share the line.

    Returns:
        Name, seconds, peak memory of its kernel in bytes (None where unknown), headline lines, page.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    start, number, peak = time.perf_counter(), [0], [None]

    def say() -> None:
        clock = time.strftime("%M:%S", time.gmtime(time.perf_counter() - start))
        at[path.stem] = f"{path.stem:26s} cell {number[0]:2d} of {len(code)}  {clock}"
        if sys.stdout.isatty():
            print("\r" + "  |  ".join(at.values()), end="", flush=True)

    def started(cell: nbformat.NotebookNode, cell_index: int) -> None:
        number[0] = code.index(cell_index) + 1 if cell_index in code else number[0]
        say()

    def completed(cell: nbformat.NotebookNode, cell_index: int) -> None:
        peak[0] = peak_memory(client.km.provisioner.pid) or peak[0]

    client = NotebookClient(
        notebook,
        timeout=None,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_start=started,
        on_cell_complete=completed,
    )
    try:
        await client.async_execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        error.when = time.perf_counter()
        error.place = f"{path.name} failed in cell {number[0]} of {len(code)}"
        raise
    say()
    over = "\r" if sys.stdout.isatty() else ""  # the live line
    print(f"{over}{at.pop(path.stem):<{110 if over else 0}s}", flush=True)
    seconds, shown = time.perf_counter() - start, BUILD / f"{path.stem}.html"
    drop_widgets(notebook)
    pack_pictures(notebook)
    nbformat.write(notebook, BUILD / path.name)
    if inplace:
        nbformat.write(notebook, path)
    shown.write_text(page(notebook), encoding="utf8")
    return path.stem, seconds, peak[0], headlines(notebook), shown


def drop_widgets(notebook: nbformat.NotebookNode) -> None:
    """Sliders work where a kernel runs; what is stored of them is a line that nobody can move."""
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        view = "application/vnd.jupyter.widget-view+json"
        cell.outputs = [out for out in cell.outputs if view not in out.get("data", {})]


def pack_pictures(notebook: nbformat.NotebookNode) -> None:
    """Store pictures in fewer bytes, with a palette of 256 colours: figures of lines and marks need few."""
    for out in (out for cell in notebook.cells for out in cell.get("outputs", [])):
        if "image/png" in out.get("data", {}):
            packed, given = io.BytesIO(), base64.b64decode(out["data"]["image/png"])
            Image.open(io.BytesIO(given)).convert("RGB").quantize(256).save(packed, "PNG", optimize=True)
            if len(packed.getvalue()) < len(given):
                out["data"]["image/png"] = base64.b64encode(packed.getvalue()).decode()


def headlines(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells tagged ``headline`` printed."""
    tagged = [cell for cell in notebook.cells if "headline" in cell.metadata.get("tags", [])]
    return [line for cell in tagged for out in cell.outputs for line in out.get("text", "").splitlines()]


def peak_memory(pid: int) -> int | None:
    """Largest resident size of a process so far, in bytes; None where the system does not tell."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def plain(text: str) -> str:
    """Without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def print_table(rows: list[tuple[str, float, int | None, list[str], Path]]) -> None:
    """Notebook, time, memory and headline numbers; then where the pages are."""
    print(f"\n{'notebook':32s} {'time':>6s} {'memory':>8s}  headline")
    for name, seconds, peak, lines, _ in rows:
        memory = f"{peak / 1e9:.1f} GB" if peak else ""
        for number, line in enumerate(lines or [""]):
            lead = (name, time.strftime("%M:%S", time.gmtime(seconds)), memory) if number == 0 else ("", "", "")
            print(f"{lead[0]:32s} {lead[1]:>6s} {lead[2]:>8s}  {line}")
    print("pages:\n" + "\n".join(f"  {page}" for *_, page in rows))


if __name__ == "__main__":
    sys.exit(main())
