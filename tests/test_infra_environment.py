"""What a run records about its machine, and what `doctor` finds."""

import json
import socket
import subprocess
import sys

import numpy as np
import torch

from infra.environment import check_requirements, doctor, system_metrics


def checks(root=".", port=5000):
    return {check.name: check for check in doctor(root, port)}


def test_versions_are_recorded_without_importing_the_packages():
    code = """if True:
        import json, sys
        from infra.environment import versions
        slow = {"torch", "ray", "mlflow", "transformers", "numpy"}
        print(json.dumps([versions(), sorted(slow & sys.modules.keys())]))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, imported = json.loads(out)
    assert imported == []
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "missing" not in found.values()
    assert found["cpus"] >= 1


def test_system_metrics_describe_this_process():
    before = system_metrics()["system/rss_gib"]
    ballast = np.ones(2**27, dtype=np.uint8)  # 1/8 GiB, touched
    after = system_metrics()
    assert after["system/rss_gib"] - before > 0.9 * ballast.nbytes / 2**30
    assert 0 < after["system/memory_percent"] <= 100
    assert all(name.startswith("system/") for name in after)


def test_doctor_is_content_with_the_machine_that_runs_the_tests(tmp_path):
    assert [check for check in doctor(tmp_path) if check.needed and not check.ok] == []


def test_packages_outside_of_their_ranges_are_named_with_both_versions():
    fine, *rest = check_requirements(["numpy>=1", "no-such-extra>=1; extra == 'gpu'"])
    assert fine.ok
    assert rest == []
    wrong = check_requirements(["numpy>=999", "no-such-package-at-all", "torch"])
    assert [(check.name, check.ok) for check in wrong] == [("numpy", False), ("no-such-package-at-all", False)]
    assert np.__version__ in wrong[0].detail
    assert ">=999" in wrong[0].detail


def test_unwritable_home_and_root_are_found(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(file))
    found = checks(file / "store")
    assert not found["home"].ok
    assert not found["root"].ok
    assert str(file) in found["root"].detail
    assert checks(tmp_path / "not" / "made" / "yet")["root"].ok


def test_a_stale_ray_cluster_file_is_found_and_a_live_one_is_not_called_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert checks()["ray"].ok
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        file.write_text(f"127.0.0.1:{cluster.getsockname()[1]}")
        assert checks()["ray"].ok
    stale = checks()["ray"]
    assert not stale.ok
    assert str(file) in stale.fix


def test_the_port_of_the_ui_is_reported_in_use_only_when_it_is():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not checks(port=port)["port"].ok
    assert checks(port=port)["port"].ok
