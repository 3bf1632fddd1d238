import pytest

from modular_star_encoder.inference.exit_profile import ExitProfile, Measurement, ProfiledExit
from modular_star_encoder.utils.reports import machine_kind
from tests.search.conftest import build, checkpoint, write_code  # noqa: F401 (a fixture)

HOSTILE_NAME = "<img src=x onerror='window.attacked=1'>.py"
HOSTILE_CODE = """\
def render(page):
    script = "<script>window.attacked = 2</script>"
    image = "<img src=x onerror='window.attacked=3'>"
    template = "${window.attacked=4} {{window.attacked=5}}"
    return "</code></pre></article>" + script + image + template
"""


@pytest.fixture(scope="session")
def index(tmp_path_factory, checkpoint):  # noqa: F811 (the fixture)
    """An index at exits 1 and 4, with a file whose name and code are HTML; no test changes it."""
    folder = tmp_path_factory.mktemp("demo")
    code = write_code(folder / "code")
    (code / HOSTILE_NAME).write_text(HOSTILE_CODE)
    return build(code, folder / "index", checkpoint, exit_layers=(1, 4))


def profile_of(fingerprint, exits=(1, 2, 4), quality=True, machine=None):
    """Exit k takes k × 1.23 ms and 100 + k MB, has k × 1.1 million parameters and a quality of k / 9."""
    return ExitProfile(
        exits={
            k: ProfiledExit(
                parameters=k * 1_100_000,
                weights_mb=4.4 * k,
                measurements=(Measurement(1, 32, 1e6, 1.23 * k, 2.0 * k, 10.0, 320.0, 100.0 + k, 5),),
                quality={"tiny-mrr": k / 9} if quality else {},
            )
            for k in exits
        },
        device="cpu",
        dtype="float32",
        attn_implementation="sdpa",
        checkpoint=fingerprint,
        base_memory_mb=50.0,
        machine=machine or machine_kind(),
        versions={},
        date="2026-01-02",
    )
