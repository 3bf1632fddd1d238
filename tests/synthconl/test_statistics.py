from modular_star_encoder.data.pairs import RetrievalExample, Snippet
from modular_star_encoder.synthconl.publishing import CodeCounts, dataset_statistics


def test_samples_and_average_lengths_are_those_of_each_language_and_side():
    statistics = dataset_statistics(
        [
            RetrievalExample("12345", (Snippet("python", "ab"), Snippet("cpp", "abcd"))),
            RetrievalExample("123", (Snippet("python", "abcd"), Snippet("go", "ab"))),
            RetrievalExample("1", (Snippet("go", "é" * 9), Snippet("cpp", "abcdef"))),
        ]
    )
    assert statistics.rows == 3
    assert statistics.original == {"python": CodeCounts(2, 3.0), "go": CodeCounts(1, 9.0)}
    assert statistics.synthetic == {"cpp": CodeCounts(2, 5.0), "go": CodeCounts(1, 2.0)}
    assert statistics.average_description_characters == 3.0
    assert statistics.to_markdown().splitlines()[2:] == [
        "| Python | 2 | 3 | 0 | 0 |",
        "| Go | 1 | 9 | 1 | 2 |",
        "| C++ | 0 | 0 | 2 | 5 |",
        "| all | 3 | 5 | 3 | 4 |",
    ]


def test_a_dataset_without_rows_has_figures_too():
    assert dataset_statistics([]).to_markdown().splitlines()[2:] == ["| all | 0 | 0 | 0 | 0 |"]
