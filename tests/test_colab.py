"""The set-up cell and notebook 01 in an environment like Colab's: ``make test-colab``, minutes, needs a network."""

import json
import re
import shutil
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from fedllm_helpers import __version__

pytestmark = pytest.mark.colab
ROOT = Path(__file__).resolve().parents[1]
# What the runtime of August 2026 has, as far as this Python can have it; all else is what pip resolves beside these.
RUNTIME = {
    "numpy": "2.1.3",
    "torch": "2.11.*",
    "transformers": "5.15.*",
    "peft": "0.20.*",
    "accelerate": "1.14.*",
    "datasets": "4.0.*",
    "ipython": "7.34.0",
}
ALSO_THERE = ("ipykernel<7", "ipywidgets<8", "matplotlib", "pandas", "scikit-learn", "scipy")
GITIGNORED = shutil.ignore_patterns(".git", ".venv", "build", "adapters", "__pycache__", ".*_cache", "*.egg-info")


def installed(python):
    command = [python, "-m", "pip", "list", "--format", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {row["name"].lower(): row["version"] for row in found}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The interpreter of an environment that has what Colab has, and not this package."""
    folder = tmp_path_factory.mktemp("runtime")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    wanted = [f"{name}=={version}" for name, version in RUNTIME.items()]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, *ALSO_THERE], check=True)
    yield python
    shutil.rmtree(folder)  # it is of gigabytes


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Environment variables with which git takes the release from this tree and not from its public address."""
    folder = tmp_path_factory.mktemp("release") / "tree"
    shutil.copytree(ROOT, folder, ignore=GITIGNORED)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"], ["tag", f"v{__version__}"]):
        subprocess.run([*git, *words], check=True)
    address = re.search(r"git\+(https://[^@]+)@", set_up())[1]
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{folder}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }


def set_up():
    notebook = nbformat.read(ROOT / "notebooks" / "01_intro.ipynb", as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def run(notebook, python, folder, environment):
    """Execute a notebook in a kernel of that interpreter, with a stand-in for ``google.colab`` already imported."""
    stand_in = folder / "site" / "google" / "colab"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("import google.colab, numpy\n")  # both are there before the first cell
    spec = folder / "kernels" / "colab"
    spec.mkdir(parents=True)
    paths = {"PYTHONPATH": str(folder / "site"), "IPYTHONDIR": str(folder / "ipython")}
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    described = {"argv": argv, "display_name": "colab", "language": "python", "env": environment | paths}
    (spec / "kernel.json").write_text(json.dumps(described))
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    kernel = AsyncKernelManager(kernel_name="colab", kernel_spec_manager=specs)
    (folder / "content").mkdir()
    resources = {"metadata": {"path": str(folder / "content")}}
    return NotebookClient(notebook, km=kernel, timeout=1800, resources=resources).execute()


def text_of(cell):
    return "".join(out.get("text", "") for out in cell.outputs)


def test_the_set_up_cell_leaves_the_runtime_as_it_is_and_notebook_01_runs(runtime, released, tmp_path, capsys):
    before = installed(runtime)
    assert "fedllm-helpers" not in before and "flwr" not in before
    notebook = nbformat.read(ROOT / "notebooks" / "01_intro.ipynb", as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    grids = "print(len(results.read(results.stored('analysis.csv'))[0]) > 0)"  # what notebooks 3, 4, 5 and 7 need
    ends = "print(tokenizer.eos_token, tokenizer.pad_token)"  # older transformers convert the model on their own
    where = "from fedllm_helpers.study import results\nprint(results.__file__)"
    where = nbformat.v4.new_code_cell(f"{where}\n{ends}\n{grids}")
    notebook.cells.append(where)
    done = run(notebook, runtime, tmp_path, released | {"FEDLLM_CACHE": str(tmp_path / "cache")})
    after = installed(runtime)
    moved = {name: f"{old} → {after.get(name)}" for name, old in before.items() if after.get(name) != old}
    with capsys.disabled():
        print(f"\n{len(after) - len(before)} packages came, {len(moved)} moved: {moved}")
    assert not set(moved) & set(RUNTIME)
    assert str(Path(runtime).parent.parent) in text_of(done.cells[-1]), "what ran is what was installed there"
    assert text_of(done.cells[-1]).endswith("<|im_end|> <|im_end|>\nTrue\n")
    code = [cell for cell in done.cells if cell.cell_type == "code"][:-1]
    assert before["torch"] in text_of(code[0]) and before["transformers"] in text_of(code[0])
    assert all(out.output_type != "error" for cell in code for out in cell.outputs)
    strict = [i for i, cell in enumerate(stored) if "nbval-ignore-output" not in cell.metadata.get("tags", [])]
    assert [text_of(code[i]) for i in strict] == [text_of(stored[i]) for i in strict], "counts are those stored"


def test_a_runtime_that_is_too_old_is_told_to_restart(runtime, released, tmp_path):
    """pip had to replace what the kernel has loaded: the first cell stops with what to do."""
    older = nbformat.v4.new_code_cell("numpy.__version__ = '1.26.4'")  # as if pip had moved it since
    notebook = nbformat.v4.new_notebook(cells=[older, nbformat.v4.new_code_cell(set_up())])
    with pytest.raises(Exception, match="numpy 1.26.4 was loaded before .* was installed: restart"):
        run(notebook, runtime, tmp_path, released)
