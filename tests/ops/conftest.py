import pytest

from tests import operator_checks


@pytest.fixture(params=operator_checks.TARGETS)
def device(request):
    """Where the operator NAME of the test's module now runs, on one of its backends."""
    backend, device = request.param
    with operator_checks.target(request.module.NAME, backend):
        yield device
