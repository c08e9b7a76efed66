"""Sets up the backends before anything imports them, and counts what was skipped."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic torch asks for
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

torch.set_num_threads(1)


LACKS = {"gpu": "needs a CUDA device", "cpu": "shows on a CPU alone", "two_devices": "needs two devices"}


@pytest.fixture
def exact_products():
    """Products of JAX in float32, where a GPU's are of fewer bits by default."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def in_compiling_process():
    """Calls a function in its own process: where TRITON_INTERPRET is set, Triton's functions are not compilable."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # starts it, with the environment as it is now
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def pytest_addoption(parser):
    parser.addoption("--require", action="store_true", help="a skipped test is a failed one, but for marks")
    parser.addoption("--cache-steps", type=int, default=60, help="moves of the random walks of caches")


def pytest_configure(config):
    for mark, reason in LACKS.items():
        config.addinivalue_line("markers", f"{mark}: {reason}")


def pytest_collection_modifyitems(items):
    cuda, devices = torch.cuda.is_available(), torch.cuda.device_count()
    lacking = {"gpu": not cuda, "cpu": cuda, "two_devices": cuda and devices < 2}
    for item in items:
        for mark, reason in LACKS.items():
            if lacking[mark] and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    elsewhere = any(item.get_closest_marker(mark) for mark in ("cpu", "two_devices"))
    if report.skipped and item.config.getoption("--require") and not elsewhere:
        report.outcome, report.longrepr = "failed", f"skipped under --require: {report.longrepr[2]}"
    return report


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    resources = [value for report in reports for key, value in report.user_properties if key == "resources"]
    if resources:
        terminalreporter.section("registers, spills and shared memory of every kernel (ptxas)")
        for line in sorted(resources):
            terminalreporter.write_line(line)
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"skipped: {report.nodeid}: {report.longrepr[2]}")
