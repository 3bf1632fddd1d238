from tests.search.conftest import checkpoint, code, shared_index  # noqa: F401 (fixtures)
