import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from modular_star_encoder.inference.checkpoints import load_checkpoint
from modular_star_encoder.inference.encode import encode_exits
from modular_star_encoder.inference.exit_zero import NumpyEncoder, has_exit_zero, has_layers, read_config

MODEL = str(files("modular_star_encoder.hub_configs") / "mose-code")
TEXTS = ["parse an HTTP header", "def f(x):\n    return x + 1\n" * 200, "", "größe 🐍", "a <mask> <pad>"]


def test_numpy_embeds_what_the_model_embeds():
    model, tokenizer = load_checkpoint(MODEL)
    expected = encode_exits(model, tokenizer, TEXTS, exit_layers=(0, 2, 6), progress=False)
    np.testing.assert_allclose(NumpyEncoder(MODEL).encode(TEXTS), expected[0], atol=1e-5)
    embedded = NumpyEncoder(MODEL).encode_exits(TEXTS, (0, 2, 6))
    for exit_layer, vectors in embedded.items():
        np.testing.assert_allclose(vectors, expected[exit_layer], atol=1e-5)
        assert vectors[2].tolist() == [0.0] * 384


def test_words_have_the_tokens_of_the_whole_text():
    model = NumpyEncoder(MODEL)
    assert model._has_words
    pieces = [
        "HTTPServer",
        "aB",
        "A1b_c",
        "<mask>",
        "<",
        "ma",
        "é",
        "Ⅻ",
        "e\u0301",
        "\u0301",
        "\xa0",
        "\u2003",
        "ß",
        "中文",
        "ǅ",
    ]
    pieces += [chr(code) for code in range(128)] + ["x" * 70, "ß", "中文", "ǅ", "日本Go", "__", "!!!!", "->"]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(pieces, size)) for size in generator.integers(1, 60, 3000)]
    texts += [text for text in TEXTS if text] + ["word " * 9000, "größe " * 9000]
    texts += [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    expected = [one.ids for one in model.tokenizer.encode_batch_fast(texts)]
    assert model._ids(texts) == expected
    assert model._ids(texts) == expected


def test_a_checkpoint_without_such_an_exit_is_refused(tmp_path):
    assert has_exit_zero(read_config(MODEL))
    assert not has_exit_zero(read_config(tmp_path))
    for change in ({"exit_layers": [1]}, {"projection_head": "mlp"}, {"pooling": "lasttoken"}):
        assert not has_exit_zero(read_config(MODEL) | change)
    assert has_layers(read_config(MODEL))
    for change in ({"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "yarn"}}, {"exit_norm": "all"}):
        assert not has_layers(read_config(MODEL) | change)
    with pytest.raises(ValueError, match="exit 0"):
        NumpyEncoder(tmp_path)


@pytest.mark.slow
def test_search_imports_no_framework(tmp_path):
    (tmp_path / "a.py").write_text("def parse_header(text):\n    return text.split(':')\n")
    run = (
        "import sys; from modular_star_encoder.cli.main import main; "
        "folder = sys.argv[1]; "
        "status = main(['index', folder]) or main(['search', 'parse a header', folder, '--rerank-exit-layer', '6']); "
        "print(status, sorted({'torch', 'transformers', 'sentence_transformers', 'datasets'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", run, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "parse_header" in printed.stdout
    assert printed.stdout.splitlines()[-1] == "0 []"
