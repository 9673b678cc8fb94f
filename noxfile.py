"""The checks that deepfeat must pass, as nox sessions."""

import functools
import os
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
# A session that is skipped, for want of its Python, must not look as if it had passed.
nox.options.error_on_missing_interpreters = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)  # those in the classifiers

# A proxy that does not exist: a session that must not download anything fails if it tries to.
OFFLINE = {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "MPLBACKEND": "Agg",
}

# One process per core, each with one thread: more threads would compete for the cores.
PYTEST = ("-m", "pytest", "--numprocesses=auto", "--dist=worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# An environment with torch takes gigabytes, so most sessions share that of `dev`.
in_dev = functools.partial(nox.session, venv_backend="none", requires=["dev"])
on_request = functools.partial(in_dev, default=False)


@nox.session
def lint(session):
    """Check ruff's rules and format, and that imports go down the floors."""
    session.install(*requirements("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": os.getcwd()})


@nox.session(default=False)
def dev(session):
    """Install deepfeat (editable) and all development tools into .nox/dev."""
    session.install("--editable", ".[datasets,plot]", *requirements("dev"))


@in_dev()
def types(session):
    """Check the types in the package."""
    run_python(session, "-m", "mypy", *session.posargs)


@in_dev()
def tests(session):
    """Run all quick tests and doctests that need no network, GPU or real data."""
    run_pytest(session)


@on_request()
def slow(session):
    """Run the tests that take long."""
    run_pytest(session, "-m", "slow")


@on_request(name="property")
def property_(session):
    """Run the property tests on many more examples."""
    run_pytest(session, "-m", "hypothesis", "--hypothesis-profile=thorough")


@on_request()
def gpu(session):
    """Run the tests that need a GPU."""
    # Without a GPU the session must fail: skipped tests would leave it green.
    run_python(session, "-c", "import torch; torch.empty(0, device='cuda')")
    run_python(session, "-m", "pytest", "-m", "gpu", *session.posargs)


@on_request()
def real(session):
    """Run the tests on the real images and weights under DEEPFEAT_DATA."""
    if "DEEPFEAT_DATA" not in os.environ:
        session.error("DEEPFEAT_DATA must be set to the folder of the real images and weights.")
    run_pytest(session, "-m", "real")


@on_request()
def quickstart(session):
    """Run the quickstart."""
    run_python(session, "examples/quickstart.py", env=OFFLINE)


@on_request()
def examples(session):
    """Run all examples and, with --quick, all scripts of the report, without downloads."""
    for script in scripts_in(session, "examples"):
        run_python(session, script, env=OFFLINE)
    for script in scripts_in(session, "examples/report"):
        run_python(session, script, "--quick", "--out", session.create_tmp(), env=OFFLINE)


@nox.session(default=False)
def bench(session):
    """Run the benchmarks and print their results, in an environment with other libraries."""
    session.install("--editable", ".[jpeg,onnx,openvino,ray]", *requirements("bench"))
    for script in scripts_in(session, "tests/benchmarks"):
        session.run("python", script, *session.posargs)


@on_request()
def docs(session):
    """Build the documentation without warnings, check its links, run its examples and README."""
    sphinx = ("-m", "sphinx", "--nitpicky", "--fail-on-warning", "-d", "docs/_build/doctrees")
    # Pages reused from an earlier build would not repeat their warnings.
    html = ("--fresh-env", "-b", "html", "docs", "docs/_build/html")
    run_python(session, *sphinx, *html, env=OFFLINE)
    run_python(session, "docs/check_links.py", "docs/_build/html")
    run_python(session, "docs/draw_first_screen.py", "docs/_build/first_screen.png", env=OFFLINE)
    run_python(session, *sphinx, "-b", "doctest", "docs", "docs/_build/doctest", env=OFFLINE)


@nox.session(python=PYTHONS, venv_backend="uv", default=False)
def pythons(session):
    """Run the tests on each Python of the classifiers, in an environment of its own."""
    session.install("--editable", ".[datasets,plot]", *requirements("test"))
    session.run("python", *PYTEST, *session.posargs, env=ONE_THREAD)


@nox.session(python=PYTHONS[0], venv_backend="uv", reuse_venv=False, default=False)
def minimums(session):
    """Run the tests on the oldest Python and the oldest release of each dependency."""
    session.install(
        *("--resolution", "lowest-direct"),
        "--editable",
        ".[datasets,plot]",
        *requirements("test"),
    )
    session.run("python", *PYTEST, *session.posargs, env=ONE_THREAD)


@nox.session(reuse_venv=False, default=False)
def build(session):
    """Build both distributions, and run the quickstart with the wheel alone."""
    dist = Path(session.create_tmp(), "dist").resolve()
    session.install(*requirements("build"))
    session.run("python", "-m", "build", "--outdir", dist)
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for file in ("deepfeat/py.typed", "deepfeat/_backbones/resnet10_slim.safetensors"):
            if file not in archive.namelist():
                session.error(f"{wheel.name} does not contain {file}.")
    session.install(f"{wheel}[plot]")
    session.run("python", "examples/quickstart.py", env=OFFLINE)


def requirements(group):
    """Return the requirements in a dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, group)


def run_python(session, *args, env=None):
    """Run Python in the shared environment."""
    python = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    session.run(session.cache_dir.parent / "dev" / python, *args, env=env)


def run_pytest(session, *args):
    """Run tests in parallel; arguments of the user come last and so take precedence."""
    run_python(session, *PYTEST, *args, *session.posargs, env=ONE_THREAD)


def scripts_in(session, folder):
    """Return the scripts in a folder; fail if there are none."""
    scripts = sorted(Path(folder).glob("[!_]*.py"))
    if not scripts:
        session.error(f"{folder} does not contain any scripts.")
    return scripts
