import os
import signal

import pytest

from modular_star_encoder.utils.crash_safe import crash_safe_map


def squares(numbers):
    for number in numbers:
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1000:
            raise ValueError("a thousand")
    return [number * number for number in numbers]


def run(numbers, processes=2, chunk_size=3):
    options = {"processes": processes, "chunk_size": chunk_size, "crashed": lambda number: [("crashed", number)]}
    return [result for results in crash_safe_map(squares, iter(numbers), **options) for result in results]


def test_results_come_in_order_whatever_the_number_of_processes():
    assert run(range(24)) == run(range(24), processes=1) == [number * number for number in range(24)]


@pytest.mark.parametrize("deadly", [{0}, {23}, {5, 6, 20}])
def test_an_item_that_kills_its_process_costs_no_other(deadly):
    numbers = [-number - 1 if number in deadly else number for number in range(24)]
    assert run(numbers) == [("crashed", number) if number < 0 else number * number for number in numbers]


def test_an_error_in_the_function_is_that_of_the_caller():
    with pytest.raises(ValueError, match="a thousand"):
        run([1, 2, 1000])
