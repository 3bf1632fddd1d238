# Marks that transformers' own tests carry; its repository registers them in a conftest that is not distributed.
MARKS = ("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "torch_compile_test")


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: from transformers' common tests")
